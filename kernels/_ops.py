"""The kernels as operators of torch, ``torch.ops.ftengine.*``: what torch.compile traces and autograd differentiates.

A public function checks what its arguments look like (types, dtypes, shapes, devices, memory order: all that a compiler
knows too), then calls its operator. What needs values or addresses is checked inside the operator, which also runs in
compiled code. One Python function serves both devices; it decides by ``_launch.uses_kernel``.
"""

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = "ftengine"


def register(
    schema: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    backward: Callable[..., Any] | None = None,
    save: Callable[..., None] | None = None,
) -> Callable[..., Any]:
    """Make an operator and return it.

    schema: ``name(Tensor x, ...) -> Tensor``; an argument that is written to is declared ``Tensor(a!) out``. Small
        tables (radii, sigmas) are tensors on the host: plain numbers would compile anew for each value.
    run: computes; gets tensors without gradients. fake: gives empty results of the right shape, dtype and device.
    backward, save: as ``torch.library.register_autograd`` wants them; None for an operator without a gradient.
    """
    name = schema.split("(", maxsplit=1)[0]
    qualified = f"{_LIBRARY}::{name}"
    torch.library.define(qualified, schema.removeprefix(name))
    torch.library.impl(qualified, ("cpu", "cuda"), run)
    torch.library.register_fake(qualified, fake)
    if backward is not None:
        torch.library.register_autograd(qualified, backward, setup_context=save)
    operator: Callable[..., Any] = getattr(getattr(torch.ops, _LIBRARY), name).default
    return operator
