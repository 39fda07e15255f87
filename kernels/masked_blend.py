"""Painting: FreeTumor's Eq. 1 with its gradients.

The released chest model uses a sigmoid and plus where Eq. 1 has tanh and minus. That variant is its caller's affair:
with s = sigmoid(h), x + M s t is this function for g = atanh(s) and the texture -t.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ftengine.errors import KernelInputError
from ftengine.kernels import _launch
from ftengine.kernels._checks import MASK_DTYPES, refuse_gradient, require_output, require_tensor

_NAME = "masked_blend"
_FILE = "masked_blend.cu"
_THREADS = 256


def masked_blend(x: Tensor, g: Tensor, texture: Tensor, mask: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Paint tumours into patches: ``(1 - M) x + M (x - tanh(g) texture)``, computed as ``x - M (tanh(g) texture)``.

    x, g, texture: [B, z, y, x] float32, C-contiguous, on one device; x in [0, 1] (windowed HU) or in HU, texture
        alike; g is the generator's output before tanh.
    mask: the same shape, float32 in [0, 1], or uint8 or bool of 0 and 1. Its values are not checked.
    out: float32 of x's shape and device, or None; may be ``x`` itself. Only where no gradient is required.

    Returns ``out`` or a new tensor. Where the mask is 0 x comes back bit-identical, whatever g and texture hold
    there. The result is not clipped: the paper does not clip it either.
    Differentiable in x, g and texture (once); their gradients are 0, for x the incoming one, where the mask is 0. Not
    in the mask. Raises KernelInputError, before any launch, for wrong types, dtypes, shapes, devices or memory order,
    for ``out`` where a gradient is required, for a mask that requires one, and for ``create_graph=True``.
    Source: FreeTumor, Eq. 1, where ``texture`` is g(x) and ``g`` is G(x).
    """
    require_tensor(_NAME, "x", x, (torch.float32,))
    for name, tensor in (("g", g), ("texture", texture)):
        require_tensor(_NAME, name, tensor, (torch.float32,), like=("x", x))
    require_tensor(_NAME, "mask", mask, (torch.float32, *MASK_DTYPES), like=("x", x))
    refuse_gradient(_NAME, "mask", mask, "Eq. 1 is differentiated in x, g and texture only")
    if mask.dtype == torch.bool:
        mask = mask.view(torch.uint8)
    if torch.is_grad_enabled() and (x.requires_grad or g.requires_grad or texture.requires_grad):
        if out is not None:
            raise KernelInputError(
                f"{_NAME}: out was given but x, g or texture requires a gradient; want a new tensor. "
                "Drop out, or call under torch.no_grad()."
            )
        painted: Tensor = _Blend.apply(x, g, texture, mask)
        return painted
    inputs = (("x", x), ("g", g), ("texture", texture), ("mask", mask))
    out = require_output(_NAME, out, torch.float32, tuple(x.shape), x.device, may_be=inputs)
    _blend(x.detach(), g.detach(), texture.detach(), mask, out)
    return out


class _Blend(torch.autograd.Function):
    """Eq. 1 with its backward pass written out: autograd's own makes NaN gradients of a NaN outside the mask."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, g: Tensor, texture: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(g, texture, mask)
        out = torch.empty_like(x)
        _blend(x.detach(), g.detach(), texture.detach(), mask, out)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise KernelInputError(
                f"{_NAME}: its gradient was asked for with create_graph=True; want first derivatives only, since a "
                "second one would silently lack this part. Write Eq. 1 in torch operations for that."
            )
        g, texture, mask = ctx.saved_tensors
        needs_x, needs_g, needs_texture, _ = ctx.needs_input_grad
        grad_g = torch.empty_like(g) if needs_g else None
        grad_texture = torch.empty_like(texture) if needs_texture else None
        if needs_g or needs_texture:
            _blend_backward(gradients[0].contiguous(), g, texture, mask, grad_g, grad_texture)
        return (gradients[0] if needs_x else None), grad_g, grad_texture, None


def _blend(x: Tensor, g: Tensor, texture: Tensor, mask: Tensor, out: Tensor) -> None:
    if _launch.uses_kernel(x):
        tensors = (out, x, g, texture, mask)
        _launch_elementwise(f"blend_{_suffix(mask)}", tensors, x)
        return
    painted, m = _painted_voxels(mask)
    values = x.view(-1)[painted] - m * (torch.tanh(g.view(-1)[painted]) * texture.view(-1)[painted])
    if out.data_ptr() != x.data_ptr():
        out.copy_(x)
    out.view(-1)[painted] = values


def _blend_backward(
    grad_out: Tensor, g: Tensor, texture: Tensor, mask: Tensor, grad_g: Tensor | None, grad_texture: Tensor | None
) -> None:
    if _launch.uses_kernel(g):
        _launch_elementwise(f"blend_backward_{_suffix(mask)}", (grad_g, grad_texture, grad_out, g, texture, mask), g)
        return
    painted, m = _painted_voxels(mask)
    contrast = torch.tanh(g.view(-1)[painted])
    common = -m * grad_out.view(-1)[painted]
    if grad_g is not None:
        grad_g.zero_().view(-1)[painted] = common * texture.view(-1)[painted] * (1 - contrast * contrast)
    if grad_texture is not None:
        grad_texture.zero_().view(-1)[painted] = common * contrast


def _painted_voxels(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Flat indices of the voxels whose mask is not 0, and the mask there as float32.

    A tumour fills a small part of a patch: picking its voxels out costs a quarter of a tanh over all of them.
    """
    flat = mask.detach().view(-1)
    painted = torch.from_numpy(np.flatnonzero(flat.numpy() != 0))
    return painted, flat[painted].to(torch.float32)


def _suffix(mask: Tensor) -> str:
    return "float32" if mask.dtype == torch.float32 else "uint8"


def _launch_elementwise(kernel: str, tensors: tuple[Tensor | None, ...], like: Tensor) -> None:
    if like.numel() == 0:
        return
    arguments = (*(_launch.pointer(tensor) for tensor in tensors), np.int64(like.numel()))
    _launch.launch(_FILE, kernel, (_launch.blocks_for(like.numel(), _THREADS),), (_THREADS,), arguments, like.device)
