"""torch's elementwise functions on the CPU, made safe to call first from several threads at once.

torch hands contiguous ``exp``, ``sqrt``, ``tanh`` and their like to MKL's vector maths. MKL picks the routine of each
function on that function's first call; where several threads make this call at once, one of them may run the routine
of the lowest accuracy for its share (pytorch/pytorch#188792; adr/0006): wrong in the fifth digit, once a process,
without an error. A single call on one element beforehand settles the choice.
"""

from functools import cache

import torch

# every function that torch calls through MKL's vms* and vmd* routines
_NAMES = (
    "acos",
    "asin",
    "atan",
    "cos",
    "erf",
    "erfc",
    "erfinv",
    "exp",
    "log",
    "log10",
    "log2",
    "sin",
    "sqrt",
    "tan",
    "tanh",
    "trunc",
)


@cache
def settle() -> None:
    """Call each function once on one element, float32 and float64; later calls of this function do nothing.

    Called where ``ftengine.kernels`` and the networks are imported, so before any thread of ours computes.
    """
    for dtype in (torch.float32, torch.float64):
        one = torch.full((1,), 0.5, dtype=dtype)
        for name in _NAMES:
            getattr(torch, name)(one)
