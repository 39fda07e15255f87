"""Warped ellipsoids as voxel masks: the shape of FreeTumor's synthetic tumours.

The law (FreeTumor's released code): an ellipsoid in a box of twice its diameters is deformed by three successive
two-dimensional warps in the planes (0, 1), (1, 2) and (0, 2) of the axes x, y, z. Each warp holds 3 x 3 displacements
per component, is interpolated by a cubic spline over the box, is constant along the third axis, and looks its values
up at the nearest voxel; outside the box there is nothing. The warped box is pasted with its centre on the given voxel
and kept where the organ is.

Nearest-neighbour lookups compose, so a voxel is decided on its own: look back through the warps in reverse order,
then test the ellipsoid. Both paths do that; neither keeps a canvas.

Rounding band: positions are float64, off by less than 1e-13 of the largest displacement or box length. The CPU path
and the CUDA kernel do the same IEEE operations in the same order and agree in every voxel. An evaluation in another
order (the released code, ``tumor_mask_ref``) can differ only in a voxel whose position lies within that band of
halfway between two voxels or of the box's face, which normal displacements practically never meet. The ellipsoid test
itself follows the released rounding for whole radii, so that voxels exactly on the surface agree too.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ftengine.errors import KernelInputError
from ftengine.geometry import Box, int_zyx
from ftengine.kernels import _launch
from ftengine.kernels._checks import (
    MASK_DTYPES,
    host_floats,
    host_integers,
    require_device,
    require_output,
    require_shape_zyx,
    require_tensor,
)

MAX_RADIUS_VOX = 4096.0  # more is a unit error, and its tables would not be small any more

_NAME = "tumor_mask"
_FILE = "tumor_mask.cu"
COMPILE_OPTIONS = ("--fmad=false",)  # the same rounding as on the CPU: see the module's docstring
_THREADS = 256
_MAX_BLOCKS_PER_TUMOR = 1 << 20


def tumor_mask(
    center_zyx: Any,
    radii_zyx: Any,
    warp: Any,
    shape_zyx: Sequence[int],
    organ: Tensor | None = None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Rasterise one warped ellipsoid per sample: [B] tumours -> [B, z, y, x].

    center_zyx: [B, 3] integers, the voxel of each tumour's centre; it may lie outside the volume.
    radii_zyx: [B, 3] voxels, > 0. The box of an axis has n = 2 ceil(2 r) voxels with the centre at index n / 2; for
        whole radii these are the released 4 r and 2 r. A voxel is inside where 1 - sum(((i - n/2) / r)**2) > 0.
    warp: [B, 3, 2, 3, 3] displacements in voxels, already scaled by their sigma: sample; plane (0,1), (1,2), (0,2);
        component; node on the plane's first axis; node on its second. Axes and components in the order x, y, z.
        Zeros leave the ellipsoid as it is.
    shape_zyx: of the volume, the same for all samples.
    organ: [B, z, y, x] uint8 or bool, or None; the mask is the ellipsoid AND organ > 0.
    out: uint8 [B, z, y, x], or None; overwritten completely; memory of its own, not ``organ``'s.

    Centre and radii are nested sequences, NumPy arrays or CPU tensors: they decide the launch, so they must be on the
    host. So may the warp be, or a float32 or float64 tensor on the result's device (NaN in it finds no voxel).
    Returns uint8 of 0 and 1, on the device of ``organ``, else of ``out``, else of ``warp`` where that is a tensor,
    else on the CPU. Only the tumours' boxes are computed. Not differentiable.
    Raises KernelInputError, before any launch, for wrong types, dtypes, shapes, devices or memory order, for radii
    that are not positive, and for numbers that are not finite.
    Source: FreeTumor's released mask simulation; golden masks in tests/kernels/test_tumor_mask.py.
    """
    shape = require_shape_zyx(_NAME, shape_zyx)
    center, radii = _checked_geometry(_NAME, center_zyx, radii_zyx)
    batch_shape = (len(center), *shape)
    device = _result_device(organ, out, warp)
    if organ is not None:
        require_tensor(_NAME, "organ", organ, MASK_DTYPES, shape=batch_shape)
    boxes = [_whole_box(c, r) for c, r in zip(center, radii, strict=True)]
    checked_warp = _checked_warp(warp, len(center), device)
    out = require_output(
        _NAME, out, torch.uint8, batch_shape, device, apart_from=[] if organ is None else [("organ", organ)]
    )
    out.zero_()
    if _launch.uses_kernel(out):
        _mask_by_kernel(boxes, radii, checked_warp, organ, out)
        return out
    rows = checked_warp.numpy() if isinstance(checked_warp, Tensor) else checked_warp
    for b, box in enumerate(boxes):
        _mask_sample(box, radii[b], rows[b], None if organ is None else organ[b].numpy(), out[b].numpy())
    return out


def tumor_boxes(center_zyx: Any, radii_zyx: Any, shape_zyx: Sequence[int]) -> list[Box]:
    """The part of the volume that each tumour's mask can touch, whatever its warp: its box, cut to the volume.

    An axis on which the box lies outside the volume has length 0. Arguments and errors as of ``tumor_mask``.
    """
    shape = require_shape_zyx("tumor_boxes", shape_zyx)
    center, radii = _checked_geometry("tumor_boxes", center_zyx, radii_zyx)
    return [_whole_box(c, r).inside(shape) for c, r in zip(center, radii, strict=True)]


def _checked_geometry(where: str, center_zyx: Any, radii_zyx: Any) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    center = host_integers(where, "center_zyx", center_zyx)
    radii = host_floats(where, "radii_zyx", radii_zyx)
    if center.ndim != 2 or center.shape[1] != 3:
        raise KernelInputError(
            f"{where}: center_zyx has shape {center.shape}; want (B, 3), a voxel z y x per sample. "
            "Wrap a single centre in a list."
        )
    if radii.shape != center.shape:
        raise KernelInputError(
            f"{where}: radii_zyx has shape {radii.shape}; want {center.shape}, as center_zyx. "
            "Give three radii per sample."
        )
    if radii.size and radii.min() <= 0:
        raise KernelInputError(
            f"{where}: radii_zyx holds {radii.min()}; want more than 0 voxels. Leave the tumour out instead."
        )
    if radii.size and radii.max() > MAX_RADIUS_VOX:
        raise KernelInputError(
            f"{where}: radii_zyx holds {radii.max()}; want at most {MAX_RADIUS_VOX} voxels. "
            "Give radii in voxels, not micrometres."
        )
    return center, radii


def _result_device(organ: Tensor | None, out: Tensor | None, warp: Any) -> torch.device:
    for name, tensor in (("organ", organ), ("out", out), ("warp", warp)):
        if isinstance(tensor, Tensor):
            require_device(_NAME, name, tensor.device)
            return tensor.device
    return torch.device("cpu")


def _checked_warp(warp: Any, batch: int, device: torch.device) -> NDArray[np.float64] | Tensor:
    """The warp as a float64 array on the host, or as a float64 tensor where it lies on the device already."""
    if isinstance(warp, Tensor) and warp.device.type != "cpu":
        if warp.dtype not in {torch.float32, torch.float64}:
            raise KernelInputError(
                f"{_NAME}: warp is {warp.dtype}; want float64 or float32. Convert it: warp.double()."
            )
        if warp.device != device:
            raise KernelInputError(
                f"{_NAME}: warp is on {warp.device}; want {device}, where organ or out is, or the host. Draw it there."
            )
        checked: NDArray[np.float64] | Tensor = warp.detach().to(torch.float64)
    else:
        checked = host_floats(_NAME, "warp", warp)
    if tuple(checked.shape) != (batch, 3, 2, 3, 3):
        raise KernelInputError(
            f"{_NAME}: warp has shape {tuple(checked.shape)}; want {(batch, 3, 2, 3, 3)}: sample, plane, component, "
            "3 x 3 nodes. Zeros mean no warp."
        )
    return checked


def _whole_box(center_zyx: NDArray[np.int64], radii_zyx: NDArray[np.float64]) -> Box:
    """The box that the warps act on: 2 ceil(2 r) voxels on each axis, the centre at half; not cut to the volume."""
    half = np.ceil(2 * radii_zyx).astype(np.int64)
    return Box(int_zyx(center_zyx - half), int_zyx(2 * half))


def _mask_by_kernel(
    boxes: list[Box],
    radii_zyx: NDArray[np.float64],
    warp: NDArray[np.float64] | Tensor,
    organ: Tensor | None,
    out: Tensor,
) -> None:
    largest = max(
        (int(np.prod(box.inside(int_zyx(out.shape[1:])).shape_zyx, dtype=np.int64)) for box in boxes), default=0
    )
    if largest == 0:
        return
    lengths = np.array(
        [(*box.origin_zyx[::-1], *box.shape_zyx[::-1], *r[::-1]) for box, r in zip(boxes, radii_zyx, strict=True)],
        dtype=np.float64,
    )
    if isinstance(warp, Tensor):
        tumors = torch.cat((_launch.to_device(lengths, out.device), warp.reshape(len(boxes), -1)), dim=1)
    else:
        tumors = _launch.to_device(np.concatenate((lengths, warp.reshape(len(boxes), -1)), axis=1), out.device)
    _launch.launch(
        _FILE,
        "tumor_mask",
        (min(-(-largest // _THREADS), _MAX_BLOCKS_PER_TUMOR), min(len(boxes), _launch.MAX_BLOCKS_YZ)),
        (_THREADS,),
        (_launch.pointer(out), _launch.pointer(tumors), _launch.pointer(organ), *(np.int64(n) for n in out.shape)),
        out.device,
        options=COMPILE_OPTIONS,
    )


# ---- CPU path: the same lookups as tables, in NumPy on the tensors' own memory ----


@dataclass(frozen=True)
class _Lookup:
    """One warp over a rectangle of its plane: for each voxel (a, b) the voxel whose value it takes.

    ``found`` is False where that lies outside the box; ``a`` and ``b`` are 0 there.
    """

    found: NDArray[np.bool_]
    a: NDArray[np.int64]
    b: NDArray[np.int64]


def _mask_sample(
    box: Box,
    radii_zyx: NDArray[np.float64],
    warp: NDArray[np.float64],
    organ: NDArray[Any] | None,
    out: NDArray[np.uint8],
) -> None:
    """Write one tumour into ``out``, which is all 0.

    The last warp mixes x and z and leaves y alone, so the voxels of a row along y move together. The rows' values,
    before that warp, are worked out once, for the rows that are asked for and can hold something; then whole rows are
    picked.
    """
    nz, ny, nx = box.shape_zyx
    inside = box.inside(int_zyx(out.shape))
    if 0 in inside.shape_zyx:
        return
    z, y, x = (
        np.arange(i - o, i - o + n) for i, o, n in zip(inside.origin_zyx, box.origin_zyx, inside.shape_zyx, strict=True)
    )
    weights_z, weights_y, weights_x = (_spline_weights(n) for n in (nz, ny, nx))
    square_z, square_y, square_x = (
        _squared_coordinates(n, float(r)) for n, r in zip((nz, ny, nx), radii_zyx, strict=True)
    )

    last = _look_through(warp[2], weights_x, weights_z, x, z)  # [x, z]
    if not last.found.any():
        return
    rows_x, rows_z = _range(last.a[last.found]), _range(last.b[last.found])
    middle = _look_through(warp[1], weights_y, weights_z, y, rows_z)  # [y, rows_z]
    level_z = np.where(middle.found, square_z[middle.b], np.inf)
    if not (level_z < 1).any():
        return
    columns_y = _range(middle.a[middle.found])
    first = _look_through(warp[0], weights_x, weights_y, rows_x, columns_y)  # [rows_x, columns_y]
    level_xy = np.where(first.found, square_x[first.a] + square_y[first.b], np.inf)
    if not (level_xy < 1).any():
        return

    # what can be inside at all: about half of each axis, so an eighth of the work remains
    keep_x = _span(level_xy < 1, axis=0)
    keep_y, keep_z = (_span(level_z < 1, axis=axis) for axis in (0, 1))
    level_z = level_z[keep_y, keep_z].T
    source_y = np.maximum(middle.a[keep_y, keep_z].T - columns_y[0], 0)
    level = np.take(level_xy[keep_x], source_y, axis=1)  # [rows_x, rows_z, y]
    level += level_z
    rows = level < 1

    row_x, row_z = last.a.T - rows_x[keep_x][0], last.b.T - rows_z[keep_z][0]  # [z, x]
    found = last.found.T & (row_x >= 0) & (row_x < rows.shape[0]) & (row_z >= 0) & (row_z < rows.shape[1])
    if not found.any():
        return
    out_z, out_x = (_span(found, axis=axis) for axis in (0, 1))
    found = found[out_z, out_x]
    mask = rows[np.where(found, row_x[out_z, out_x], 0), np.where(found, row_z[out_z, out_x], 0)]  # [z, x, y]
    mask &= found[:, :, None]

    oz, oy, ox = inside.origin_zyx
    target = (_shifted(out_z, oz), _shifted(keep_y, oy), _shifted(out_x, ox))
    out[target] = mask.transpose(0, 2, 1)
    if organ is not None:
        out[target] &= organ[target] != 0


def _spline_weights(size: int) -> NDArray[np.float64]:
    """[size, 3]: at each voxel of an axis the weights of the three nodes in the cubic spline through them.

    The nodes lie at 0, 1 and 2 and the voxels spread evenly over that range. Mirrored ends mean slope 0 there, and
    the slope at the middle node is then 3/4 (third - first): the rest is Hermite interpolation on each half.
    """
    position = 2.0 * np.arange(size) / (size - 1.0)
    first_half = position <= 1.0
    s = np.where(first_half, position, position - 1.0)
    square = s * s
    cube = square * s
    rise = 3.0 * square - 2.0 * cube
    fall = 1.0 - rise
    slope_first = 0.75 * (cube - square)
    slope_second = 0.75 * (cube - 2.0 * square + s)
    weights = np.empty((size, 3))
    weights[:, 0] = np.where(first_half, fall - slope_first, -slope_second)
    weights[:, 1] = np.where(first_half, rise, fall)
    weights[:, 2] = np.where(first_half, slope_first, rise + slope_second)
    return weights


def _look_through(
    warp: NDArray[np.float64],
    weights_a: NDArray[np.float64],
    weights_b: NDArray[np.float64],
    a: NDArray[np.int64],
    b: NDArray[np.int64],
) -> _Lookup:
    """The warp of one plane at the voxels a x b; operation by operation what the CUDA kernel does."""
    size_a, size_b = len(weights_a), len(weights_b)
    on_a, on_b = weights_a[a], weights_b[b]
    source = []
    for nodes in warp:
        column = [on_a[:, 0] * nodes[0, j] + on_a[:, 1] * nodes[1, j] + on_a[:, 2] * nodes[2, j] for j in range(3)]
        source.append(
            column[0][:, None] * on_b[:, 0] + column[1][:, None] * on_b[:, 1] + column[2][:, None] * on_b[:, 2]
        )
    source_a, source_b = source[0] + a[:, None], source[1] + b
    found = (source_a >= 0) & (source_a <= size_a - 1) & (source_b >= 0) & (source_b <= size_b - 1)
    nearest_a, nearest_b = (np.where(found, np.floor(s + 0.5), 0).astype(np.int64) for s in (source_a, source_b))
    return _Lookup(found, nearest_a, nearest_b)


def _squared_coordinates(size: int, radius: float) -> NDArray[np.float64]:
    """((i - size / 2) / radius)**2 for each voxel of an axis, rounded as released.

    The coordinate counts steps of 1 / r from the radius rounded up (from -1 for a whole radius). That is not always the
    rounded quotient, and it decides which of the voxels exactly on the surface are inside.
    """
    reach = np.ceil(radius)
    coordinate = (np.arange(size) - size / 2.0 + reach) * (1.0 / radius) - reach / radius
    squared: NDArray[np.float64] = coordinate * coordinate
    return squared


def _range(indices: NDArray[np.int64]) -> NDArray[np.int64]:
    """All indices from the smallest to the largest."""
    return np.arange(int(indices.min()), int(indices.max()) + 1)


def _span(flags: NDArray[np.bool_], *, axis: int) -> slice:
    """Along one axis of a table: from the first to behind the last line that holds a True; there is at least one."""
    lines = np.flatnonzero(np.moveaxis(flags, axis, 0).any(axis=1))
    return slice(int(lines[0]), int(lines[-1]) + 1)


def _shifted(span: slice, by: int) -> slice:
    return slice(span.start + by, span.stop + by)
