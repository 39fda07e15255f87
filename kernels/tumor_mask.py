"""Warped ellipsoids as voxel masks: the shape of FreeTumor's synthetic tumours.

The law (FreeTumor's released code): an ellipsoid in a box of twice its diameters is deformed by three successive
two-dimensional warps in the planes (0, 1), (1, 2) and (0, 2) of the axes x, y, z. Each warp holds 3 x 3 displacements
per component, is interpolated by a cubic spline over the box, is constant along the third axis, and looks its values
up at the nearest voxel; outside the box there is nothing. The warped box is pasted with its centre on the given voxel
and kept where the organ is.

Nearest-neighbour lookups compose, so a voxel is decided on its own: look back through the warps in reverse order,
then test the ellipsoid. Both paths do that; neither keeps a canvas. A warp is constant along an axis, so each lookup is
worked out once for its plane, as a table, and not once for every voxel.

Rounding band: positions are float64, off by less than 1e-13 of the largest displacement or box length. The CPU path
and the CUDA kernel do the same IEEE operations in the same order and agree in every voxel. An evaluation in another
order (the released code, ``tumor_mask_ref``) can differ only in a voxel whose position lies within that band of
halfway between two voxels or of the box's face, which normal displacements practically never meet. The ellipsoid test
itself follows the released rounding for whole radii, so that voxels exactly on the surface agree too.
"""

from collections.abc import Sequence
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
    require_apart,
    require_buffer,
    require_device,
    require_shape_zyx,
    require_tensor,
    small_table,
)
from ftengine.kernels._ops import register
from ftengine.kernels._threads import for_shares

MAX_RADIUS_VOX = 4096.0  # more is a unit error, and its tables would not be small any more

_NAME = "tumor_mask"
_FILE = "tumor_mask.cu"
COMPILE_OPTIONS = ("--fmad=false",)  # the same rounding as on the CPU: see the module's docstring
_THREADS = 256
_VOXELS_PER_THREAD = 4  # each block that paints ends with atomics on its sample's box
_MAX_BLOCKS = 1 << 20
_MAX_TABLE_BYTES = 16 << 20  # of one tumour; a larger one looks up each voxel by itself
_NOTHING = np.empty((0, 0, 3, 2, 3, 3))
_FAR = 1 << 40  # voxels: a centre beyond is moved there, where it paints nothing either


def tumor_mask(
    center_zyx: Any,
    radii_zyx: Any,
    warp: Any,
    shape_zyx: Sequence[int],
    organ: Tensor | None = None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Rasterise warped ellipsoids: one tumour a sample, or the union of several -> [B, z, y, x].

    center_zyx: [B, 3] or [B, N, 3] integers, the voxel of each tumour's centre; it may lie outside the volume. On the
        host, or int64 on the result's device.
    radii_zyx: as center_zyx, voxels, > 0; on the host: they decide the launch. Three zeros: no tumour, to fill up a
        batch. The box of an axis has n = 2 ceil(2 r) voxels with the centre at index n / 2; for whole radii these are
        the released 4 r and 2 r. A voxel is inside where 1 - sum(((i - n/2) / r)**2) > 0.
    warp: [B, 3, 2, 3, 3] or [B, N, 3, 2, 3, 3] displacements in voxels, already scaled by their sigma: sample; tumour;
        plane (0,1), (1,2), (0,2); component; node on the plane's first axis; node on its second. Axes and components
        in the order x, y, z. Zeros leave the ellipsoid as it is. On the host, or float32 or float64 on the result's
        device (NaN in it finds no voxel).
    shape_zyx: of the volume, the same for all samples.
    organ: [B, z, y, x] uint8 or bool, or None; the mask is the ellipsoids AND organ > 0.
    out: uint8 [B, z, y, x], or None; overwritten completely; memory of its own, not ``organ``'s.

    What is on the host may be nested sequences, NumPy arrays or CPU tensors. Returns uint8 of 0 and 1, on the device of
    ``organ``, else of ``out``, else of ``warp`` or ``center_zyx`` where one is on a GPU, else on the CPU. Only the
    tumours' boxes are computed. Not differentiable.
    CUDA takes scratch memory from torch's allocator: 24 bytes for each voxel of a plane of a tumour's box (0.4 MB for a
    radius of 32), at most 16 MB a tumour. Not for capture in a CUDA graph: each call copies its tables anew.
    Raises KernelInputError, before any launch, for wrong types, dtypes, shapes, devices or memory order, for radii
    that are negative or too large, and for numbers on the host that are not finite.
    Source: FreeTumor's released mask simulation; golden masks in tests/kernels/test_tumor_mask.py. The released code
    draws one tumour a patch; the union is the engine's own.
    """
    return _drawn(center_zyx, radii_zyx, warp, shape_zyx, organ, out, None)[0]


def tumor_mask_and_box(
    center_zyx: Any,
    radii_zyx: Any,
    warp: Any,
    shape_zyx: Sequence[int],
    organ: Tensor | None = None,
    *,
    out: Tensor | None = None,
    box_out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``tumor_mask``, and the tight box of each sample's mask.

    The box is int64 [B, 2, 3] on the result's device: z y x of the first voxel and of the one behind the last, exact;
    all 0 where the mask is empty. box_out: int64 [B, 2, 3], or None; it decides the device after ``out``. Everything
    else as ``tumor_mask``.
    """
    return _drawn(center_zyx, radii_zyx, warp, shape_zyx, organ, out, box_out)


def _drawn(
    center_zyx: Any,
    radii_zyx: Any,
    warp: Any,
    shape_zyx: Sequence[int],
    organ: Tensor | None,
    out: Tensor | None,
    box_out: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Check what the arguments look like and call the operator, with an axis of tumours."""
    shape = require_shape_zyx(_NAME, shape_zyx)
    device = _result_device(organ, out, box_out, warp, center_zyx)
    center = small_table(_NAME, "center_zyx", center_zyx, torch.int64, device)
    radii = small_table(_NAME, "radii_zyx", radii_zyx, torch.float64, None)
    warp = small_table(_NAME, "warp", warp, torch.float64, device)
    if center.ndim not in {2, 3} or center.shape[-1] != 3:
        raise KernelInputError(
            f"{_NAME}: center_zyx has shape {tuple(center.shape)}; want (B, 3) or (B, N, 3), a voxel z y x per tumour. "
            "Wrap a single centre in a list."
        )
    if radii.shape != center.shape:
        raise KernelInputError(
            f"{_NAME}: radii_zyx has shape {tuple(radii.shape)}; want {tuple(center.shape)}, as center_zyx. "
            "Give three radii per tumour."
        )
    if tuple(warp.shape) != (*center.shape[:-1], 3, 2, 3, 3):
        raise KernelInputError(
            f"{_NAME}: warp has shape {tuple(warp.shape)}; want {(*center.shape[:-1], 3, 2, 3, 3)}: sample, tumour "
            "where there are several, plane, component, 3 x 3 nodes. Zeros mean no warp."
        )
    if center.ndim == 2:
        center, radii, warp = center.unsqueeze(1), radii.unsqueeze(1), warp.unsqueeze(1)
    batch_shape = (center.shape[0], *shape)
    if organ is not None:
        require_tensor(_NAME, "organ", organ, MASK_DTYPES, shape=batch_shape)
        organ = organ.view(torch.uint8) if organ.dtype == torch.bool else organ
    if out is None and box_out is None:
        mask, box = _mask(center, radii, warp, shape, organ)
        return mask, box
    if out is None:
        out = torch.empty(batch_shape, dtype=torch.uint8, device=device)
    else:
        require_buffer(_NAME, out, torch.uint8, batch_shape, device)
    if box_out is None:
        box_out = torch.empty((batch_shape[0], 2, 3), dtype=torch.int64, device=device)
    else:
        _check_box_buffer(box_out, batch_shape[0], device)
    _mask_out(center, radii, warp, organ, out, box_out)
    return out, box_out


def _result_device(
    organ: Tensor | None, out: Tensor | None, box_out: Tensor | None, warp: Any, center: Any
) -> torch.device:
    for name, tensor in (("organ", organ), ("out", out), ("box_out", box_out)):
        if isinstance(tensor, Tensor):
            require_device(_NAME, name, tensor.device)
            return tensor.device
    for name, table in (("warp", warp), ("center_zyx", center)):
        if isinstance(table, Tensor) and table.device.type != "cpu":
            require_device(_NAME, name, table.device)
            return table.device
    return torch.device("cpu")


def _check_box_buffer(box: Tensor, batch: int, device: torch.device) -> None:
    if box.dtype != torch.int64 or tuple(box.shape) != (batch, 2, 3) or box.device != device:
        raise KernelInputError(
            f"{_NAME}: box_out is {box.dtype} of shape {tuple(box.shape)} on {box.device}; want torch.int64 of shape "
            f"{(batch, 2, 3)} on {device}. Pass a new buffer, or none."
        )
    if not box.is_contiguous():
        raise KernelInputError(
            f"{_NAME}: box_out has strides {box.stride()}; want memory order. Call box_out.contiguous()."
        )


def _run(
    center: Tensor, radii: Tensor, warp: Tensor, shape: Sequence[int], organ: Tensor | None
) -> tuple[Tensor, Tensor]:
    out, box = _fake(center, radii, warp, shape, organ)
    _run_checked(center, radii, warp, organ, out, box)
    return out, box


def _run_out(center: Tensor, radii: Tensor, warp: Tensor, organ: Tensor | None, out: Tensor, box_out: Tensor) -> None:
    require_apart(
        _NAME, out, apart_from=[("box_out", box_out)] if organ is None else [("organ", organ), ("box_out", box_out)]
    )
    _run_checked(center, radii, warp, organ, out, box_out)


def _fake(
    center: Tensor, radii: Tensor, warp: Tensor, shape: Sequence[int], organ: Tensor | None
) -> tuple[Tensor, Tensor]:
    like = organ if organ is not None else warp if warp.device.type != "cpu" else center
    batch = radii.shape[0]
    return (
        torch.empty((batch, *shape), dtype=torch.uint8, device=like.device),
        torch.empty((batch, 2, 3), dtype=torch.int64, device=like.device),
    )


def _run_checked(center: Tensor, radii: Tensor, warp: Tensor, organ: Tensor | None, out: Tensor, box: Tensor) -> None:
    radii_zyx = radii.contiguous().numpy()
    center, warp = center.contiguous(), warp.contiguous()
    _check_values(radii_zyx, warp.numpy() if _on_host(warp) else _NOTHING)
    if _launch.uses_kernel(out):
        _mask_by_kernel(center, radii_zyx, warp, organ, out, box)
        return
    masks, boxes, centers, warps = out.numpy(), box.numpy(), center.numpy(), warp.numpy()
    organs = masks if organ is None else organ.numpy()
    cost = np.ceil(4 * radii_zyx).prod(axis=2).sum(axis=1).tolist()
    for_shares(
        cost,
        lambda share: _mask_share(masks, boxes, centers, radii_zyx, warps, organs, organ is not None, share),
    )


def _check_values(radii_zyx: NDArray[np.float64], warp: NDArray[np.float64]) -> None:
    match _fault(radii_zyx, warp):
        case 1:
            raise KernelInputError(f"{_NAME}: warp holds NaN or infinity; want finite numbers. Check how it was drawn.")
        case 2:
            raise KernelInputError(
                f"{_NAME}: radii_zyx holds NaN or infinity; want finite numbers. Check how it was drawn."
            )
        case 3:
            raise KernelInputError(
                f"{_NAME}: radii_zyx holds {radii_zyx.min()}; want more than 0 voxels, or three zeros for no tumour. "
                "Leave the tumour out instead."
            )
        case 4:
            raise KernelInputError(
                f"{_NAME}: radii_zyx holds {radii_zyx.max()}; want at most {MAX_RADIUS_VOX} voxels. "
                "Give radii in voxels, not micrometres."
            )


@numba.njit(nogil=True, cache=True)
def _fault(radii_zyx: Any, warp: Any) -> Any:
    """What is wrong with the values, 0 for nothing; NumPy would take longer than painting a small tumour."""
    for value in warp.reshape(warp.size):
        if not np.isfinite(value):
            return 1
    for z, y, x in radii_zyx.reshape((radii_zyx.size // 3, 3)):
        if not (np.isfinite(z) and np.isfinite(y) and np.isfinite(x)):
            return 2
        if min(z, y, x) <= 0 and not z == y == x == 0:
            return 3
        if max(z, y, x) > MAX_RADIUS_VOX:
            return 4
    return 0


def _mask_by_kernel(
    center: Tensor,
    radii_zyx: NDArray[np.float64],
    warp: Tensor,
    organ: Tensor | None,
    out: Tensor,
    box: Tensor,
) -> None:
    """Two launches: clear and tabulate, then paint."""
    batch, num_tumors = radii_zyx.shape[:2]
    radii = radii_zyx.reshape(-1, 3)
    if not radii.any():
        out.zero_()
        box.zero_()
        return
    size_zyx = 2 * np.ceil(2 * radii).astype(np.int64)
    z, y, x = size_zyx.T
    num_entries = z * x + y * z + y * x
    words = y * z + y * x + (z * x + y * z) // 2  # of 8 bytes: see the .cu; sizes are even
    words[words > _MAX_TABLE_BYTES // 8] = 0
    tables = batch + np.concatenate(([0], np.cumsum(words)))  # the samples' counters lie in front
    scratch = torch.empty(int(tables[-1]), dtype=torch.int64, device=out.device)
    starts = np.where(words > 0, tables[:-1], -1)
    most_entries = int(num_entries[words > 0].max(initial=0))
    most_voxels = int(np.minimum(size_zyx, out.shape[1:]).prod(axis=1).max())

    host = [starts, radii.view(np.int64).ravel()]
    host += [t.numpy().view(np.int64).ravel() for t in (center, warp) if _on_host(t)]
    uploaded = _launch.upload(np.concatenate(host), out.device)
    at = np.cumsum([0, *(len(part) for part in host)])[:-1].tolist()
    pointers = [np.uint64(uploaded.data_ptr() + 8 * offset) for offset in at]
    starts_at, radii_at = pointers[:2]
    rest = iter(pointers[2:])
    center_at, warp_at = (next(rest) if _on_host(t) else _launch.pointer(t) for t in (center, warp))

    clearing = min(-(-out.numel() // (8 * _THREADS)), 4096)
    tabulating = -(-most_entries // _THREADS)
    shape = [np.int64(n) for n in out.shape]
    _launch.launch(
        _FILE,
        "clear_and_tabulate",
        (min(clearing + tabulating * len(radii), _launch.MAX_BLOCKS_X),),
        (_THREADS,),
        (
            *(_launch.pointer(t) for t in (out, box, scratch)),
            starts_at,
            radii_at,
            warp_at,
            *shape,
            np.int64(len(radii)),
            np.int32(clearing),
            np.int32(max(1, tabulating)),
        ),
        out.device,
        options=COMPILE_OPTIONS,
    )
    _launch.launch(
        _FILE,
        "paint",
        (
            min(-(-most_voxels // (_THREADS * _VOXELS_PER_THREAD)), _MAX_BLOCKS),
            min(len(radii), _launch.MAX_BLOCKS_YZ),
        ),
        (_THREADS,),
        (
            *(_launch.pointer(t) for t in (out, box, scratch, organ)),
            starts_at,
            center_at,
            radii_at,
            warp_at,
            *shape,
            np.int64(num_tumors),
        ),
        out.device,
        options=COMPILE_OPTIONS,
    )


def _on_host(table: Tensor) -> bool:
    return table.device.type == "cpu"


# ---- CPU path: the same lookups as tables; the same operations in the same order as the CUDA kernel ----


@numba.njit(nogil=True, cache=True)
def _mask_share(
    out: Any, box: Any, center_zyx: Any, radii_zyx: Any, warp: Any, organ: Any, has_organ: Any, share: Any
) -> None:
    """Some of a batch's samples."""
    for b in share:
        _mask_sample(out[b], box[b], center_zyx[b], radii_zyx[b], warp[b], organ[b], has_organ)


@numba.njit(nogil=True, cache=True)
def _mask_sample(out: Any, box: Any, center_zyx: Any, radii_zyx: Any, warp: Any, organ: Any, has_organ: Any) -> None:
    """One sample. out, organ: uint8 [z, y, x]; box: int64 [2, 3]; the rest [N, ...] as the operator has it."""
    out.reshape(out.size)[:] = 0
    for axis in range(3):
        box[0, axis] = out.shape[axis]
        box[1, axis] = 0
    for k in range(len(radii_zyx)):
        if radii_zyx[k, 0] > 0:
            _add_tumor(out, box, center_zyx[k], radii_zyx[k], warp[k], organ, has_organ)
    if box[1, 0] == 0:
        box[:] = 0


@numba.njit(nogil=True, cache=True)
def _add_tumor(out: Any, box: Any, center_zyx: Any, radii_zyx: Any, warp: Any, organ: Any, has_organ: Any) -> None:
    """Set the tumour's voxels to 1 and widen the box by them.

    The last warp mixes x and z and leaves y alone, so the voxels of a row along y move together: the row comes from one
    column (x, y) and one of (z, y) of the box before that warp.
    """
    size, start = np.empty(3, np.int64), np.empty(3, np.int64)  # of the box
    first, count = np.empty(3, np.int64), np.empty(3, np.int64)  # of its part in the volume, seen from the box
    for axis in range(3):
        half = np.int64(np.ceil(2.0 * radii_zyx[axis]))
        size[axis] = 2 * half
        start[axis] = min(max(center_zyx[axis], -_FAR), _FAR) - half
        first[axis] = max(0, -start[axis])
        count[axis] = min(size[axis], out.shape[axis] - start[axis]) - first[axis]
        if count[axis] <= 0:
            return
    weights_z, weights_y, weights_x = _spline_weights(size[0]), _spline_weights(size[1]), _spline_weights(size[2])
    square_z = _squared_coordinates(size[0], radii_zyx[0])
    square_y = _squared_coordinates(size[1], radii_zyx[1])
    square_x = _squared_coordinates(size[2], radii_zyx[2])

    last_x, last_z = _look_through(warp[2], weights_x, weights_z, first[2], count[2], first[0], count[0])  # [z, x]
    low_x, num_x = _range(last_x)
    low_z, num_z = _range(last_z)
    if num_x == 0:
        return

    # rows along y of the planes (z, y) and (x, y) before the last warp: what they add to the level, which is < 1 inside
    middle_y, middle_z = _look_through(warp[1], weights_y, weights_z, first[1], count[1], low_z, num_z)  # [z, y]
    level_z = np.full((num_z, count[1]), np.inf)
    span_y = np.zeros((num_z, 2), np.int64)  # where a row of z can be inside
    least_z = np.full(num_z, np.inf)
    low_y, high_y = size[1], -1
    for z in range(num_z):
        for y in range(count[1]):
            if middle_z[z, y] >= 0 and square_z[middle_z[z, y]] < 1.0:
                level_z[z, y] = square_z[middle_z[z, y]]
                least_z[z] = min(least_z[z], level_z[z, y])
                low_y = min(low_y, middle_y[z, y])
                high_y = max(high_y, middle_y[z, y])
                if span_y[z, 1] == 0:
                    span_y[z, 0] = y
                span_y[z, 1] = y + 1
            else:
                middle_y[z, y] = -1
    if high_y < 0:
        return
    first_x, first_y = _look_through(warp[0], weights_x, weights_y, low_x, num_x, low_y, high_y + 1 - low_y)  # [y, x]
    level_xy = np.full((num_x, high_y + 1 - low_y), np.inf)
    least_xy = np.full(num_x, np.inf)
    for x in range(num_x):
        for y in range(level_xy.shape[1]):
            if first_x[y, x] >= 0:
                level_xy[x, y] = square_x[first_x[y, x]] + square_y[first_y[y, x]]
                least_xy[x] = min(least_xy[x], level_xy[x, y])

    z0, y0, x0 = start[0] + first[0], start[1] + first[1], start[2] + first[2]
    for z in range(count[0]):
        for x in range(count[2]):
            if last_x[z, x] < 0:
                continue
            from_x, from_z = last_x[z, x] - low_x, last_z[z, x] - low_z
            if not least_xy[from_x] + least_z[from_z] < 1.0:  # rounding is monotonic: no sum in this row is less
                continue
            lowest, highest = -1, -1
            for y in range(span_y[from_z, 0], span_y[from_z, 1]):
                source = max(middle_y[from_z, y] - low_y, 0)  # where it is -1 the level is infinite
                if level_xy[from_x, source] + level_z[from_z, y] < 1.0 and (
                    not has_organ or organ[z0 + z, y0 + y, x0 + x] != 0
                ):
                    out[z0 + z, y0 + y, x0 + x] = 1
                    highest = y
                    if lowest < 0:
                        lowest = y
            if lowest >= 0:
                box[0, 0] = min(box[0, 0], z0 + z)
                box[0, 1] = min(box[0, 1], y0 + lowest)
                box[0, 2] = min(box[0, 2], x0 + x)
                box[1, 0] = max(box[1, 0], z0 + z + 1)
                box[1, 1] = max(box[1, 1], y0 + highest + 1)
                box[1, 2] = max(box[1, 2], x0 + x + 1)


@numba.njit(nogil=True, cache=True)
def _spline_weights(size: Any) -> Any:
    """[3, size]: at each voxel of an axis the weights of the three nodes in the cubic spline through them.

    The nodes lie at 0, 1 and 2 and the voxels spread evenly over that range. Mirrored ends mean slope 0 there, and
    the slope at the middle node is then 3/4 (third - first): the rest is Hermite interpolation on each half.
    """
    weights = np.empty((3, size))
    for i in range(size):
        position = 2.0 * i / (size - 1.0)
        first_half = position <= 1.0
        s = position if first_half else position - 1.0
        square = s * s
        cube = square * s
        rise = 3.0 * square - 2.0 * cube
        fall = 1.0 - rise
        if first_half:
            slope = 0.75 * (cube - square)
            weights[0, i] = fall - slope
            weights[1, i] = rise
            weights[2, i] = slope
        else:
            slope = 0.75 * (cube - 2.0 * square + s)
            weights[0, i] = -slope
            weights[1, i] = fall
            weights[2, i] = rise + slope
    return weights


@numba.njit(nogil=True, cache=True)
def _squared_coordinates(size: Any, radius: Any) -> Any:
    """((i - size / 2) / radius)**2 for each voxel of an axis, rounded as released.

    The coordinate counts steps of 1 / r from the radius rounded up (from -1 for a whole radius). That is not always the
    rounded quotient, and it decides which of the voxels exactly on the surface are inside.
    """
    reach = np.ceil(radius)
    squared = np.empty(size)
    for i in range(size):
        coordinate = (i - size / 2.0 + reach) * (1.0 / radius) - reach / radius
        squared[i] = coordinate * coordinate
    return squared


@numba.njit(nogil=True, cache=True)
def _look_through(warp: Any, weights_a: Any, weights_b: Any, start_a: Any, num_a: Any, start_b: Any, num_b: Any) -> Any:
    """One warp over a rectangle of its plane: for each voxel the voxel whose value it takes, as two tables [b, a].

    Both hold -1 where that lies outside the box.
    """
    to_a = _columns(warp[0], weights_a, start_a, num_a)
    to_b = _columns(warp[1], weights_a, start_a, num_a)
    end_a, end_b = weights_a.shape[1] - 1.0, weights_b.shape[1] - 1.0
    source_a, source_b = np.empty((num_b, num_a), np.int32), np.empty((num_b, num_a), np.int32)
    for b in range(num_b):
        w0, w1, w2 = weights_b[0, start_b + b], weights_b[1, start_b + b], weights_b[2, start_b + b]
        place_b = float(start_b + b)
        for a in range(num_a):
            at_a = to_a[0, a] * w0 + to_a[1, a] * w1 + to_a[2, a] * w2 + (start_a + a)
            at_b = to_b[0, a] * w0 + to_b[1, a] * w1 + to_b[2, a] * w2 + place_b
            found = (at_a >= 0.0) & (at_a <= end_a) & (at_b >= 0.0) & (at_b <= end_b)
            source_a[b, a] = np.int32(at_a + 0.5) if found else np.int32(-1)
            source_b[b, a] = np.int32(at_b + 0.5) if found else np.int32(-1)
    return source_a, source_b


@numba.njit(nogil=True, cache=True)
def _columns(nodes: Any, weights: Any, start: Any, count: Any) -> Any:
    """[3, count]: for each node of the second axis the displacement at the voxels of the first."""
    columns = np.empty((3, count))
    for j in range(3):
        for i in range(count):
            columns[j, i] = (
                weights[0, start + i] * nodes[0, j]
                + weights[1, start + i] * nodes[1, j]
                + weights[2, start + i] * nodes[2, j]
            )
    return columns


@numba.njit(nogil=True, cache=True)
def _range(table: Any) -> Any:
    """The smallest index found in a table and the number of indices from there to the largest: (0, 0) for none."""
    low, high = np.int64(1 << 62), np.int64(-1)
    for row in range(table.shape[0]):
        for column in range(table.shape[1]):
            if table[row, column] >= 0:
                low = min(low, table[row, column])
                high = max(high, table[row, column])
    if high < 0:
        return 0, 0
    return low, high + 1 - low


_mask = register(
    "tumor_mask(Tensor center, Tensor radii, Tensor warp, SymInt[] shape, Tensor? organ) -> (Tensor, Tensor)",
    _run,
    _fake,
)
_mask_out = register(
    "tumor_mask_out(Tensor center, Tensor radii, Tensor warp, Tensor? organ, Tensor(a!) out, Tensor(b!) box_out) -> ()",
    _run_out,
    lambda _center, _radii, _warp, _organ, _out, _box_out: None,
)
