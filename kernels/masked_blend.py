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
from ftengine.kernels._threads import for_shares

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
    box: int64 [B, 2, 3] as ``tumor_mask_and_box`` gives it, clamped to the volume, on the host or on x's device, or None;
        outside the mask counts as 0. The CPU path looks nowhere else: painting in place costs what the tumour costs.
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
    boxes = None if box is None else small_table(_NAME, "box", box, torch.int64, x.device).contiguous()
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
        _launch_elementwise("blend", (out, x, g, texture), mask, organ, box, sign, x)
        return
    if x.numel() == 0:
        return
    o, a, c, t = (_flat(tensor) for tensor in (out, x, g, texture))
    place = _Place(mask, organ, box)
    for_shares(place.cost, lambda share: _paint(o, a, c, t, place, share, sign))


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
        _launch_elementwise("blend_backward", (*wanted, grad_out, g, texture), mask, organ, box, sign, g)
        return grad_g, grad_texture
    for tensor in wanted:
        if tensor is not None:
            tensor.zero_()
    if g.numel() == 0:
        return grad_g, grad_texture
    to_g, to_texture = (None if tensor is None else _flat(tensor) for tensor in wanted)
    o, c, t = (_flat(tensor) for tensor in (grad_out, g, texture))
    place = _Place(mask, organ, box)
    for_shares(place.cost, lambda share: _differentiate(to_g, to_texture, o, c, t, place, share, sign))
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
    kernel: str,
    tensors: tuple[Tensor | None, ...],
    mask: Tensor,
    organ: Tensor | None,
    box: Tensor | None,
    sign: int,
    like: Tensor,
) -> None:
    if mask.numel() == 0:
        return
    if box is not None and box.device != mask.device:
        box = _launch.upload(box.numpy(), mask.device)
    pointers = [_launch.pointer(tensor) for tensor in (*tensors, mask, organ, box)]
    _launch.launch(
        _FILE,
        f"{kernel}_{dtype_name(like.dtype)}_{dtype_name(mask.dtype)}",
        (_launch.blocks_for(mask.numel(), _THREADS),),
        (_THREADS,),
        (*pointers, np.int32(sign), *(np.int64(n) for n in mask.shape)),
        mask.device,
    )


# ---- CPU path: a tumour fills a small part of a patch, so its voxels are picked, worked on, and put back ----


class _Place:
    """Where a batch is painted: masks, organs and boxes as arrays."""

    def __init__(self, mask: Tensor, organ: Tensor | None, box: Tensor | None) -> None:
        shape = np.array(mask.shape[1:], dtype=np.int64)
        whole = np.stack([np.zeros_like(shape), shape])
        self._boxes = np.tile(whole, (len(mask), 1, 1)) if box is None else np.clip(box.numpy(), 0, shape)
        self._masks = mask.detach().numpy()
        self._organs = self._masks if organ is None else organ.numpy()
        self.weights = self._masks.reshape(-1)
        self.cost = (self._boxes[:, 1] - self._boxes[:, 0]).clip(min=0).prod(axis=1).tolist()

    def pick(self, share: NDArray[np.int64]) -> NDArray[np.int64]:
        """Indices into the flat batch of what is painted of some samples."""
        painted: NDArray[np.int64] = _pick(self._masks, self._organs, self._boxes, share)
        return painted


def _paint(
    out: NDArray[Any],
    x: NDArray[Any],
    g: NDArray[Any],
    texture: NDArray[Any],
    place: _Place,
    share: NDArray[np.int64],
    sign: int,
) -> None:
    """Some samples of a flat batch. Everything is read before ``out`` is written, which may be any of the inputs.

    NumPy's tanh works on several voxels at a time; a compiled loop would call the C library for each.
    """
    painted = place.pick(share)
    values = _taken(g, painted)
    np.tanh(values, out=values)
    _blend_picked(values, x, texture, place.weights, painted, x.dtype.type(sign))
    if out.ctypes.data != x.ctypes.data:
        size = x.size // len(place.cost)
        for b in share:
            np.copyto(out[b * size : (b + 1) * size], x[b * size : (b + 1) * size])
    _put(out, painted, values)


def _differentiate(
    grad_g: NDArray[Any] | None,
    grad_texture: NDArray[Any] | None,
    grad_out: NDArray[Any],
    g: NDArray[Any],
    texture: NDArray[Any],
    place: _Place,
    share: NDArray[np.int64],
    sign: int,
) -> None:
    """Some samples of a flat batch; the gradients are 0 before."""
    painted = place.pick(share)
    contrast = _taken(g, painted)
    np.tanh(contrast, out=contrast)
    common = _taken(grad_out, painted)
    common *= place.weights.take(painted)
    common *= sign
    if grad_g is not None:
        _put(grad_g, painted, common * _taken(texture, painted) * (1 - contrast * contrast))
    if grad_texture is not None:
        _put(grad_texture, painted, common * contrast)


@numba.njit(nogil=True, cache=True)
def _pick(mask: Any, organ: Any, box: Any, share: Any) -> Any:
    """Indices into the flat batch of the voxels inside the boxes where mask and organ, [B, z, y, x], are not 0."""
    nz, ny, nx = mask.shape[1:]
    num_rows = 0
    for b in share:
        num_rows += max(box[b, 1, 0] - box[b, 0, 0], 0) * max(box[b, 1, 1] - box[b, 0, 1], 0)
    in_row = np.zeros(num_rows, np.int64)
    total, number = 0, 0
    for b in share:
        for z in range(box[b, 0, 0], box[b, 1, 0]):
            for y in range(box[b, 0, 1], box[b, 1, 1]):
                row = mask[b, z, y, box[b, 0, 2] : box[b, 1, 2]]
                count = 0
                for x in range(row.size):  # several voxels at a time: most rows hold nothing
                    count += row[x] != 0
                in_row[number] = count
                number += 1
                total += count
    found = np.empty(total + 1, np.int64)  # without a branch a voxel is written before it is known to count
    k, number = 0, 0
    for b in share:
        for z in range(box[b, 0, 0], box[b, 1, 0]):
            for y in range(box[b, 0, 1], box[b, 1, 1]):
                number += 1
                if in_row[number - 1] == 0:
                    continue
                start = ((b * nz + z) * ny + y) * nx
                for x in range(box[b, 0, 2], box[b, 1, 2]):
                    found[k] = start + x
                    k += (mask[b, z, y, x] != 0) & (organ[b, z, y, x] != 0)
    return found[:k]


@numba.njit(nogil=True, cache=True)
def _taken(values: Any, painted: Any) -> Any:
    taken = np.empty(painted.size, values.dtype)
    for k in range(painted.size):
        taken[k] = values[painted[k]]
    return taken


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
    """The whole batch, on the tensor's own memory."""
    return tensor.detach().view(-1).numpy()


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
