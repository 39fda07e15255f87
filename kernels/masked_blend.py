"""Painting: FreeTumor's Eq. 1 with its gradients, and its twin with plus for the released chest model.

The released chest model uses a sigmoid and plus where Eq. 1 has tanh and minus: for s = sigmoid(h), x + M s t is this
function with ``sign=1`` for g = atanh(s).
"""

from typing import Any

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ftengine.errors import KernelInputError
from ftengine.kernels import _launch
from ftengine.kernels._checks import (
    MASK_DTYPES,
    dtype_name,
    refuse_gradient,
    require_apart,
    require_buffer,
    require_tensor,
    small_table,
)
from ftengine.kernels._ops import register
from ftengine.kernels._threads import for_each

_NAME = "masked_blend"
_FILE = "masked_blend.cu"
_DTYPES = (torch.float32, torch.float64)
_THREADS = 256


def masked_blend(
    x: Tensor,
    g: Tensor,
    texture: Tensor,
    mask: Tensor,
    *,
    sign: int = -1,
    organ: Tensor | None = None,
    box: Any = None,
    out: Tensor | None = None,
) -> Tensor:
    """Paint tumours into patches: ``(1 - M) x + M (x - tanh(g) texture)``, computed as ``x - M (tanh(g) texture)``.

    x, g, texture: [B, z, y, x] float32 or float64, all of one dtype, C-contiguous, on one device; x in [0, 1]
        (windowed HU) or in HU, texture alike; g is the generator's output before tanh.
    mask: the same shape, float32 in [0, 1], or uint8 or bool of 0 and 1. Its values are not checked.
    sign: -1 as in Eq. 1, which darkens where g is positive; 1 adds instead.
    organ: the same shape, uint8 or bool, or None; where it is 0 the mask counts as 0, so that a soft edge stays inside.
    box: a promise that the mask is 0 outside, int64 [B, 2, 3] as ``tumor_mask_and_box`` gives it, clamped to the volume, on
        the host or on x's device; or None. The CPU path then looks nowhere else: painting in place costs what the
        tumour costs. The CUDA kernel reads the whole mask either way.
    out: of x's dtype, shape and device, or None; may be any of the inputs. Only where no gradient is required.

    Returns ``out`` or a new tensor. Where the mask is 0 x comes back bit-identical, whatever g and texture hold
    there. The result is not clipped: the paper does not clip it either.
    Differentiable in x, g and texture (once); their gradients are 0, for x the incoming one, where the mask is 0. Not
    in the mask. Raises KernelInputError, before any launch, for wrong types, dtypes, shapes, devices or memory order,
    a sign other than -1 and 1, ``out`` where a gradient is required, a mask that requires one, and a second derivative.
    Source: FreeTumor, Eq. 1, where ``texture`` is g(x) and ``g`` is G(x).
    """
    require_tensor(_NAME, "x", x, _DTYPES)
    for name, tensor in (("g", g), ("texture", texture)):
        require_tensor(_NAME, name, tensor, (x.dtype,), like=("x", x))
    require_tensor(_NAME, "mask", mask, (torch.float32, *MASK_DTYPES), like=("x", x))
    refuse_gradient(_NAME, "mask", mask, "Eq. 1 is differentiated in x, g and texture only")
    if sign not in {-1, 1}:
        raise KernelInputError(f"{_NAME}: sign is {sign}; want -1 (Eq. 1) or 1. Put other factors into the texture.")
    boxes = None if box is None else small_table(_NAME, "box", box, torch.int64, x.device)
    if boxes is not None and tuple(boxes.shape) != (len(x), 2, 3):
        raise KernelInputError(
            f"{_NAME}: box has shape {tuple(boxes.shape)}; want {(len(x), 2, 3)}: for each sample the first voxel z y x and "
            "the one behind the last. Repeat one box for each sample."
        )
    if organ is not None:
        require_tensor(_NAME, "organ", organ, MASK_DTYPES, like=("x", x))
        organ = organ.view(torch.uint8) if organ.dtype == torch.bool else organ
    if mask.dtype == torch.bool:
        mask = mask.view(torch.uint8)
    if out is None:
        painted: Tensor = _blend(x, g, texture, mask, sign, organ, boxes)
        return painted
    if torch.is_grad_enabled() and (x.requires_grad or g.requires_grad or texture.requires_grad):
        raise KernelInputError(
            f"{_NAME}: out was given but x, g or texture requires a gradient; want a new tensor. "
            "Drop out, or call under torch.no_grad()."
        )
    require_buffer(_NAME, out, x.dtype, tuple(x.shape), x.device)
    _blend_out(x, g, texture, mask, sign, organ, boxes, out)
    return out


def _run_out(
    x: Tensor,
    g: Tensor,
    texture: Tensor,
    mask: Tensor,
    sign: int,
    organ: Tensor | None,
    box: Tensor | None,
    out: Tensor,
) -> None:
    inputs = [("x", x), ("g", g), ("texture", texture), ("mask", mask)]
    require_apart(_NAME, out, may_be=inputs if organ is None else [*inputs, ("organ", organ)])
    if _launch.uses_kernel(x):
        _launch_elementwise("blend", (out, x, g, texture), mask, organ, sign, x)
        return
    o, a, c, t = (_flat(tensor) for tensor in (out, x, g, texture))
    place = _Place(mask, organ, box)
    for_each(len(x), lambda b: _paint(o[b], a[b], c[b], t[b], place, b, sign), cost=place.cost)


def _run(
    x: Tensor, g: Tensor, texture: Tensor, mask: Tensor, sign: int, organ: Tensor | None, box: Tensor | None
) -> Tensor:
    out = torch.empty_like(x)
    _run_out(x, g, texture, mask, sign, organ, box, out)
    return out


def _run_backward(
    grad_out: Tensor,
    g: Tensor,
    texture: Tensor,
    mask: Tensor,
    sign: int,
    organ: Tensor | None,
    box: Tensor | None,
    needs_g: bool,
    needs_texture: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of g and texture; one that is not needed comes back without voxels."""
    grad_g, grad_texture = _fake_backward(grad_out, g, texture, mask, sign, organ, box, needs_g, needs_texture)
    grad_out = grad_out.contiguous()
    wanted = [t if needed else None for t, needed in ((grad_g, needs_g), (grad_texture, needs_texture))]
    if _launch.uses_kernel(g):
        _launch_elementwise("blend_backward", (*wanted, grad_out, g, texture), mask, organ, sign, g)
        return grad_g, grad_texture
    to_g, to_texture = (None if tensor is None else _flat(tensor) for tensor in wanted)
    o, c, t = (_flat(tensor) for tensor in (grad_out, g, texture))
    place = _Place(mask, organ, box)
    for_each(
        len(g),
        lambda b: _differentiate(
            None if to_g is None else to_g[b],
            None if to_texture is None else to_texture[b],
            o[b],
            c[b],
            t[b],
            place,
            b,
            sign,
        ),
        cost=place.cost,
    )
    return grad_g, grad_texture


def _fake_backward(
    _grad_out: Tensor,
    g: Tensor,
    texture: Tensor,
    _mask: Tensor,
    _sign: int,
    _organ: Tensor | None,
    _box: Tensor | None,
    needs_g: bool,
    needs_texture: bool,
) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(g) if needs_g else g.new_empty(0),
        torch.empty_like(texture) if needs_texture else texture.new_empty(0),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, g, texture, mask, ctx.sign, organ, box = inputs
    ctx.save_for_backward(g, texture, mask, organ, box)


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    g, texture, mask, organ, box = ctx.saved_tensors
    needs_x, needs_g, needs_texture = ctx.needs_input_grad[:3]
    grad_g = grad_texture = None
    if needs_g or needs_texture:
        grad_g, grad_texture = _blend_backward(grad_out, g, texture, mask, ctx.sign, organ, box, needs_g, needs_texture)
    return (
        grad_out if needs_x else None,
        grad_g if needs_g else None,
        grad_texture if needs_texture else None,
        None,
        None,
        None,
        None,
    )


def _refuse_second(_ctx: Any, *_gradients: Tensor) -> None:
    raise KernelInputError(
        f"{_NAME}: a second derivative was asked for; want first derivatives only. "
        "Write Eq. 1 in torch operations for that."
    )


def _launch_elementwise(
    kernel: str, tensors: tuple[Tensor | None, ...], mask: Tensor, organ: Tensor | None, sign: int, like: Tensor
) -> None:
    if mask.numel() == 0:
        return
    _launch.launch(
        _FILE,
        f"{kernel}_{dtype_name(like.dtype)}_{dtype_name(mask.dtype)}",
        (_launch.blocks_for(mask.numel(), _THREADS),),
        (_THREADS,),
        (*(_launch.pointer(tensor) for tensor in (*tensors, mask, organ)), np.int32(sign), np.int64(mask.numel())),
        mask.device,
    )


# ---- CPU path: a tumour fills a small part of a patch, so its voxels are picked, worked on, and put back ----


class _Place:
    """Where a batch is painted: masks, organs and boxes as arrays, one a sample."""

    def __init__(self, mask: Tensor, organ: Tensor | None, box: Tensor | None) -> None:
        shape = np.array(mask.shape[1:], dtype=np.int64)
        whole = np.stack([np.zeros_like(shape), shape])
        self._boxes = np.tile(whole, (len(mask), 1, 1)) if box is None else np.clip(box.numpy(), 0, shape)
        self.masks = mask.detach().numpy()
        self._organs = self.masks if organ is None else organ.numpy()
        self.cost = (self._boxes[:, 1] - self._boxes[:, 0]).clip(min=0).prod(axis=1).tolist()

    def pick(self, b: int, values: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[Any]]:
        """Flat indices of what is painted of a sample, and the values there."""
        painted, picked = _pick(values, self.masks[b], self._organs[b], self._boxes[b])
        return painted, picked


def _paint(
    out: NDArray[Any], x: NDArray[Any], g: NDArray[Any], texture: NDArray[Any], place: _Place, b: int, sign: int
) -> None:
    """One sample, flat. Everything is read before ``out`` is written, which may be any of the inputs.

    NumPy's tanh works on several voxels at a time; a compiled loop would call the C library for each.
    """
    painted, values = place.pick(b, g)
    np.tanh(values, out=values)
    _blend_picked(values, x, texture, place.masks[b].ravel(), painted, x.dtype.type(sign))
    if out.ctypes.data != x.ctypes.data:
        np.copyto(out, x)
    _put(out, painted, values)


def _differentiate(
    grad_g: NDArray[Any] | None,
    grad_texture: NDArray[Any] | None,
    grad_out: NDArray[Any],
    g: NDArray[Any],
    texture: NDArray[Any],
    place: _Place,
    b: int,
    sign: int,
) -> None:
    """One sample, flat."""
    painted, contrast = place.pick(b, g)
    np.tanh(contrast, out=contrast)
    common = grad_out.take(painted)
    common *= place.masks[b].ravel().take(painted)
    common *= sign
    if grad_g is not None:
        grad_g.fill(0)
        grad_g[painted] = common * texture.take(painted) * (1 - contrast * contrast)
    if grad_texture is not None:
        grad_texture.fill(0)
        grad_texture[painted] = common * contrast


@numba.njit(nogil=True, cache=True)
def _pick(values: Any, mask: Any, organ: Any, box: Any) -> Any:
    """Flat indices of the voxels inside the box, of one sample [z, y, x], where mask and organ are not 0; and their values."""
    first, last = box[0], box[1]
    in_row = np.zeros((max(last[0] - first[0], 0), max(last[1] - first[1], 0)), np.int64)
    total = 0
    for z in range(first[0], last[0]):
        for y in range(first[1], last[1]):
            row = mask[z, y, first[2] : last[2]]
            count = 0
            for x in range(row.size):  # several voxels at a time: most rows hold nothing
                count += row[x] != 0
            in_row[z - first[0], y - first[1]] = count
            total += count
    found = np.empty(total + 1, np.int64)  # without a branch a voxel is written before it is known to count
    k = 0
    for z in range(first[0], last[0]):
        for y in range(first[1], last[1]):
            if in_row[z - first[0], y - first[1]] == 0:
                continue
            start = (z * mask.shape[1] + y) * mask.shape[2]
            for x in range(first[2], last[2]):
                found[k] = start + x
                k += (mask[z, y, x] != 0) & (organ[z, y, x] != 0)
    picked = np.empty(k, values.dtype)
    for i in range(k):
        picked[i] = values[found[i]]
    return found[:k], picked


@numba.njit(nogil=True, cache=True)
def _blend_picked(contrast: Any, x: Any, texture: Any, mask: Any, painted: Any, sign: Any) -> None:
    """Eq. 1 at the flat indices ``painted``, in place of the contrast there."""
    for k in range(painted.size):
        i = painted[k]
        contrast[k] = x[i] + sign * (x.dtype.type(mask[i]) * (contrast[k] * texture[i]))


@numba.njit(nogil=True, cache=True)
def _put(out: Any, painted: Any, values: Any) -> None:
    for k in range(painted.size):
        out[painted[k]] = values[k]


def _flat(tensor: Tensor) -> NDArray[Any]:
    """[B, voxels], on the tensor's own memory."""
    return tensor.detach().flatten(1).numpy()


_blend = register(
    "masked_blend(Tensor x, Tensor g, Tensor texture, Tensor mask, int sign, Tensor? organ, Tensor? box) -> Tensor",
    _run,
    lambda x, _g, _texture, _mask, _sign, _organ, _box: torch.empty_like(x),
    backward=_backward,
    save=_save,
)
_blend_out = register(
    "masked_blend_out(Tensor x, Tensor g, Tensor texture, Tensor mask, int sign, Tensor? organ, Tensor? box, Tensor(a!) out) -> ()",
    _run_out,
    lambda _x, _g, _texture, _mask, _sign, _organ, _box, _out: None,
)
_blend_backward = register(
    "masked_blend_backward(Tensor grad_out, Tensor g, Tensor texture, Tensor mask, int sign, Tensor? organ, "
    "Tensor? box, bool needs_g, bool needs_texture) -> (Tensor, Tensor)",
    _run_backward,
    _fake_backward,
    backward=_refuse_second,
)
