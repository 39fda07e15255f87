"""MKL's routines are chosen before a thread of ours computes (adr/0006)."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ftengine import vml

MKL_FUNCTIONS = [
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
]


class _Recorder(TorchDispatchMode):
    """Notes each elementwise function with the dtype and the size that it is called on."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, torch.dtype, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if args and isinstance(args[0], torch.Tensor):
            self.calls.append((func.overloadpacket.__name__, args[0].dtype, args[0].numel()))
        return func(*args, **(kwargs or {}))


def test_every_function_is_called_once_on_one_element() -> None:
    vml.settle.cache_clear()
    with _Recorder() as recorder:
        vml.settle()
        vml.settle()
    want = [(name, dtype, 1) for dtype in (torch.float32, torch.float64) for name in MKL_FUNCTIONS]
    assert recorder.calls == want  # one element: torch never splits that over threads


@pytest.mark.parametrize("module", ["ftengine.kernels", "ftengine.training.networks", "ftengine.assemble"])
def test_importing_what_computes_settles(module: str) -> None:
    code = f"import {module}; from ftengine import vml; print(vml.settle.cache_info().misses)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split()[-1] == "1"


@pytest.mark.parametrize("name", MKL_FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_first_large_call_is_accurate(name: str, dtype: torch.dtype) -> None:
    """After settling, a call that torch splits over threads is right to a few units in the last place."""
    vml.settle()
    x = torch.linspace(0.05, 0.95, 50_000, dtype=dtype)
    function = getattr(torch, name)
    wanted = function(x.double().reshape(-1, 1).expand(-1, 2)[:, 0])  # strided: torch's own code, not MKL
    error = (function(x).double() - wanted).abs() / wanted.abs().clamp(min=torch.finfo(dtype).tiny)
    # relative errors of the input's rounding do not arise (same x); MKL's high accuracy is below 1 ulp, a log near 1
    # is absolute: allow 8 eps of the largest value
    assert float((error * wanted.abs()).max()) <= 8 * torch.finfo(dtype).eps * float(wanted.abs().max().clamp(min=1.0))
