"""Gaussian blur of a batch of volumes, each sample and axis with its own width: the texture g(x) of FreeTumor's Eq. 1.

The boundary is half-sample symmetric, so the blur of one axis is a symmetric matrix: the blur is its own adjoint, and
the backward pass is the forward pass on the gradient.
"""

from dataclasses import dataclass
from typing import Any, TypeAlias

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
    host_floats,
    host_integers,
    refuse_gradient,
    require_apart,
    require_buffer,
    require_tensor,
)
from ftengine.kernels._ops import register
from ftengine.kernels._threads import for_each, for_shares

TRUNCATE = 4.0  # the window ends at this many sigmas: SciPy's default, and what the released code uses
MAX_LINE_VOX = 12_288  # an axis and its window at both ends must fit the 48 KiB of shared memory of every device
MAX_LINE_VOX_FLOAT64 = MAX_LINE_VOX // 2
COMPILE_OPTIONS = ("--fmad=false",)  # the CPU path rounds each product, so the kernels must

_NAME = "gaussian_blur"
_FILE = "gaussian_blur.cu"
_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, *MASK_DTYPES)
_THREADS = 256  # of every block

# The kernel that does all axes in one pass; constants of the .cu file.
_MAX_RADIUS = 8
_TILE_X = 32
_TILE_Y = {torch.float32: 32, torch.float64: 16}
_SAMPLES = {torch.float32: 16, torch.float64: 8}  # of one launch
_BLOCKS_PER_MULTIPROCESSOR = 2
_MOST_CHUNKS = 32

Regions: TypeAlias = NDArray[np.int64]  # [B, 2, 3]: first voxel z y x, and the one behind the last


def gaussian_blur(x: Tensor, sigma_vox_zyx: Any, *, box: Any = None, out: Tensor | None = None) -> Tensor:
    """Blur each sample as ``scipy.ndimage.gaussian_filter(sample, sigma, mode="reflect", truncate=4)`` does.

    x: [B, z, y, x] float32, float64, float16 or bfloat16, C-contiguous, cpu or cuda; or uint8 or bool, a mask, which is
        blurred as float32. A NaN or an infinity spreads over
        the voxels whose windows hold it and no further.
    sigma_vox_zyx: standard deviation in voxels, z y x, finite and >= 0: one triple for all samples or [B, 3]; nested
        sequence, NumPy array or CPU tensor (it decides the launch, so it must be on the host). An axis with 0, or
        with less than 1/8 voxel, where the window is one voxel, is left untouched bit for bit (a NaN stays a NaN).
    box: the voxels to compute, integers [B, 2, 3]: first voxel z y x, and the one behind the last. None for all. From
        the host (nested sequence, array, CPU tensor) or an int64 tensor on x's device. A box is clamped to the volume,
        so that one may be grown without knowing the volume; where first >= last on an axis it is empty.
    out: of x's dtype (float32 for a mask), shape and device, or None; may be x itself. Only where no gradient is required.

    Returns ``out`` or a new tensor. Inside the box are the bits of the whole blur; outside, ``out`` keeps what it held,
    and a new tensor is 0. Differentiable in x as often as wanted: the gradient is the blur of the incoming one, which
    counts as 0 outside the box. Not in sigma. A sample's result does not depend on its batch-mates.
    Accuracy: x is summed first, then y, then z; each product and each sum is rounded once, in float64 for float64 and
    in float32 for the others, from weights computed in float64. With N = the sum of 2 r + 2 over the axes with a
    radius r = int(4 sigma + 0.5) > 0 a result is off by at most N u / (1 - N u) max|x|, u = 2**-24 or 2**-53 (and
    underflow); float16 and bfloat16 results are rounded once more, at the end. CPU and CUDA give the same bits.
    Memory besides the result: on the CPU 2 r + 1 planes a thread, and the box in float32 for float16 and bfloat16; on
    CUDA a mask in float32, up to radius 8 a copy of x where ``out`` is x, above it one float32 (float64) tensor like x where there is a box
    or x is float16 or bfloat16. Up to radius 8 a call can be captured in a CUDA graph, which keeps the values of sigma
    and of a host box; a box on the device may change between replays.
    Raises KernelInputError, before any launch, for a wrong type, dtype, shape, device or memory order, a sigma that
    is negative, not finite or requires a gradient, an axis that with its window exceeds 12,288 voxels (float64: 6,144),
    and a graph capture with a radius above 8.
    Source: FreeTumor, Eq. 1 (g, "the Gaussian filter to blur the textures"); truncation and boundary are those of
    the released code's blurs.
    """
    require_tensor(_NAME, "x", x, _DTYPES)
    sigma = _sigma_table(sigma_vox_zyx, x)
    boxes = None if box is None else _box_table(box, x)
    if out is None:
        blurred: Tensor = _blur(x, sigma, boxes, None)
        return blurred
    if torch.is_grad_enabled() and x.requires_grad:
        raise KernelInputError(
            f"{_NAME}: out was given but x requires a gradient; want a new tensor. "
            "Drop out, or call under torch.no_grad()."
        )
    require_buffer(_NAME, out, _result_dtype(x), tuple(x.shape), x.device)
    _blur_out(x, sigma, boxes, out)
    return out


def _sigma_table(sigma_vox_zyx: Any, x: Tensor) -> Tensor:
    """Sigma as a float64 tensor on the host, [3] or [B, 3]; its values are looked at where they are known."""
    if isinstance(sigma_vox_zyx, Tensor):
        refuse_gradient(_NAME, "sigma_vox_zyx", sigma_vox_zyx, "the blur is differentiated in x only")
        if sigma_vox_zyx.device.type != "cpu" or sigma_vox_zyx.is_complex() or sigma_vox_zyx.dtype == torch.bool:
            host_floats(_NAME, "sigma_vox_zyx", sigma_vox_zyx)  # says what is wrong with it
        sigma = sigma_vox_zyx.to(torch.float64)
    elif torch.compiler.is_compiling():  # constants of the graph
        sigma = torch.tensor(sigma_vox_zyx, dtype=torch.float64)
    else:
        sigma = torch.from_numpy(host_floats(_NAME, "sigma_vox_zyx", sigma_vox_zyx))
    if tuple(sigma.shape) not in {(3,), (x.shape[0], 3)}:
        raise KernelInputError(
            f"{_NAME}: sigma_vox_zyx has shape {tuple(sigma.shape)}; want (3,) or ({x.shape[0]}, 3): z, y, x in voxels. "
            "Repeat one value for each axis."
        )
    return sigma


def _box_table(box: Any, x: Tensor) -> Tensor:
    """Boxes as an int64 tensor [B, 2, 3], on the host or on x's device."""
    if not isinstance(box, Tensor):
        if torch.compiler.is_compiling():
            boxes = torch.tensor(box, dtype=torch.int64)
        else:
            boxes = torch.from_numpy(host_integers(_NAME, "box", box)).contiguous()
    elif box.device.type == "cpu":
        if box.is_floating_point() or box.is_complex() or box.dtype == torch.bool:
            host_integers(_NAME, "box", box)  # says what is wrong with it
        boxes = box.to(torch.int64).contiguous()
    elif box.device != x.device or box.dtype != torch.int64 or not box.is_contiguous():
        raise KernelInputError(
            f"{_NAME}: box is {dtype_name(box.dtype)} on {box.device} with strides {box.stride()}; want int64 in memory "
            f"order, on the host or on {x.device} like x. Convert it: box.to('{x.device}', torch.int64).contiguous()."
        )
    else:
        boxes = box
    if tuple(boxes.shape) != (x.shape[0], 2, 3):
        raise KernelInputError(
            f"{_NAME}: box has shape {tuple(boxes.shape)}; want {(x.shape[0], 2, 3)}: for each sample the first voxel "
            "z y x and the one behind the last. Repeat one box for each sample."
        )
    return boxes


# ---- the operators ----


@dataclass(frozen=True)
class _Work:
    """What a call has to do, on the host."""

    radii: NDArray[np.int64]  # [B, 3]
    half_windows: NDArray[np.float64]  # [B, 3, largest radius + 1], by distance from the middle
    target: Regions  # voxels to write; the whole volume where the device knows better
    source: Regions  # voxels that do not count as 0; likewise


def _run(x: Tensor, sigma: Tensor, box: Tensor | None, source: Tensor | None) -> Tensor:
    """The blur inside ``box``, 0 outside; x counts as 0 outside ``source``. Each is the other's in the adjoint."""
    make = torch.empty_like if box is None and source is None else torch.zeros_like
    out = make(x, dtype=_result_dtype(x))
    _fill(out, x, sigma, box, source)
    return out


def _run_out(x: Tensor, sigma: Tensor, box: Tensor | None, out: Tensor) -> None:
    require_apart(_NAME, out, may_be=[("x", x)])
    _fill(out, x, sigma, box, None)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, sigma, box, source = inputs
    ctx.save_for_backward(sigma, box, source)


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    sigma, box, source = ctx.saved_tensors
    return _blur(grad_out.contiguous(), sigma, source, box), None, None, None


def _fill(out: Tensor, x: Tensor, sigma: Tensor, box: Tensor | None, source: Tensor | None) -> None:
    """Check the values of the tables and blur."""
    rows = _checked_sigma(sigma, x)
    target, counted = _checked_regions(box, x), _checked_regions(source, x)
    if x.numel() == 0:
        return
    radii, half_windows = _half_windows(rows)
    if source is not None:
        target = _reached(target, counted, radii)
    work = _Work(radii, half_windows, target, counted)
    if not _launch.uses_kernel(x):
        _blur_on_cpu(out, x, work, cut=source is not None)
        return
    if x.dtype in MASK_DTYPES:
        x = x.to(torch.float32)
    blur = _blur_at_once if radii.max() <= _MAX_RADIUS else _blur_by_axes
    blur(out, x, work, box, source)


def _is_on_device(table: Tensor) -> bool:
    return table.is_cuda


def _checked_sigma(sigma: Tensor, x: Tensor) -> NDArray[np.float64]:
    """Sigma as [B, 3]."""
    rows = host_floats(_NAME, "sigma_vox_zyx", sigma)
    if rows.size and rows.min() < 0:
        raise KernelInputError(
            f"{_NAME}: sigma_vox_zyx holds {rows.min()}; want 0 or more voxels. Check the spacing it was computed with."
        )
    most = MAX_LINE_VOX_FLOAT64 if x.dtype == torch.float64 else MAX_LINE_VOX
    padded = np.array(x.shape[1:]) + 2 * np.floor(TRUNCATE * rows + 0.5)
    if padded.size and padded.max() > most:
        raise KernelInputError(
            f"{_NAME}: an axis with its window takes {int(padded.max())} voxels (shape_zyx={tuple(x.shape[1:])}, "
            f"largest sigma {rows.max()}); want at most {most}. Give sigma in voxels, not micrometres."
        )
    return rows if rows.ndim == 2 else np.tile(rows, (x.shape[0], 1))


def _checked_regions(table: Tensor | None, x: Tensor) -> Regions:
    """Boxes on the host, clamped to the volume; the whole volume for none, and for those that only the device knows."""
    if table is None or _is_on_device(table):
        whole = np.zeros((x.shape[0], 2, 3), dtype=np.int64)
        whole[:, 1] = x.shape[1:]
        return whole
    return np.clip(host_integers(_NAME, "box", table), 0, np.array(x.shape[1:]))


def _half_windows(sigma: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Radii int(4 sigma + 0.5) as SciPy's, and weights by distance from the middle, one row for each sigma.

    A window's weights sum to 1, the two sides counted; each row is computed as if it were alone.
    """
    radii = (TRUNCATE * sigma + 0.5).astype(np.int64)
    distance = np.arange(int(radii.max()) + 1)
    inside = distance <= radii[..., None]
    scaled = distance / np.where(radii > 0, sigma, 1.0)[..., None]
    weights = np.where(inside, np.exp(-0.5 * scaled**2), 0.0)
    one_side = np.cumsum(weights[..., 1:], axis=-1)[..., -1:] if distance.size > 1 else 0.0  # term after term
    return radii, weights / (weights[..., :1] + 2 * one_side)


def _window(work: _Work, sample: int, axis: int) -> NDArray[np.float64]:
    """The 2 r + 1 weights of one window."""
    half = work.half_windows[sample, axis, : work.radii[sample, axis] + 1]
    return np.concatenate([half[:0:-1], half])


def _reached(target: Regions, source: Regions, radii: NDArray[np.int64]) -> Regions:
    """What the windows reach of the target from the source: beyond it the blur is 0."""
    first = np.maximum(target[:, 0], source[:, 0] - radii)
    last = np.minimum(target[:, 1], source[:, 1] + radii)
    empty = (source[:, 0] >= source[:, 1]).any(axis=1, keepdims=True)
    return np.stack([first, np.where(empty, first, last)], axis=1)


def _result_dtype(x: Tensor) -> torch.dtype:
    return torch.float32 if x.dtype in MASK_DTYPES else x.dtype


def _real(x: Tensor) -> torch.dtype:
    """What is summed in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# ---- CUDA path ----


def _blur_at_once(out: Tensor, x: Tensor, work: _Work, box: Tensor | None, source: Tensor | None) -> None:
    """All axes in one pass, for windows up to _MAX_RADIUS. Blocks read their neighbours' voxels, so never in place."""
    boxes, sources = (table if table is not None and _is_on_device(table) else None for table in (box, source))
    real = _real(x)
    given = x.clone() if out.data_ptr() == x.data_ptr() else x
    samples = np.dtype(
        [
            ("radius", np.int32, 3),
            ("target", np.int32, (2, 3)),
            ("source", np.int32, (2, 3)),
            ("weight", np.float64 if real == torch.float64 else np.float32, (3, _MAX_RADIUS + 1)),
        ],
        align=True,
    )
    for start in range(0, len(x), _SAMPLES[real]):
        part = slice(start, min(start + _SAMPLES[real], len(x)))
        nz, ny, nx = (int(n) for n in (work.target[part, 1] - work.target[part, 0]).max(axis=0))
        if min(nz, ny, nx) <= 0:
            continue
        table = np.zeros(1, np.dtype([("of", samples, _SAMPLES[real])]))
        rows = table["of"][0, : part.stop - start]
        rows["radius"], rows["target"], rows["source"] = work.radii[part], work.target[part], work.source[part]
        rows["weight"][..., : work.half_windows.shape[2]] = work.half_windows[part]
        tiles_y, tiles_x = -(-ny // _TILE_Y[real]), -(-nx // _TILE_X)
        tiles = (part.stop - start) * tiles_y * tiles_x
        chunks = _chunks(tiles, nz, int(work.radii[part, 0].max()), _blocks_at_once(x.device))
        depth = -(-nz // chunks)
        chunks = -(-nz // depth)
        _launch.launch(
            _FILE,
            f"blur_{dtype_name(x.dtype)}",
            (tiles * chunks,),
            (_THREADS,),
            (
                _launch.pointer(out),
                _launch.pointer(given),
                table[0],
                _launch.pointer(boxes),
                _launch.pointer(sources),
                *(np.int32(n) for n in (start, *x.shape[1:], tiles_x, tiles_y, chunks, depth)),
            ),
            x.device,
            options=COMPILE_OPTIONS,
        )


def _chunks(tiles: int, num_planes: int, radius: int, at_once: int) -> int:
    """Into how many pieces along z the blocks' columns are cut.

    A block marches through its planes and those of its windows, and blocks come in waves of as many as run at once:
    the fewest planes one after another win.
    """

    def planes_in_turn(chunks: int) -> int:
        return -(-tiles * chunks // at_once) * (-(-num_planes // chunks) + 2 * radius)

    return min(range(1, min(num_planes, _MOST_CHUNKS) + 1), key=planes_in_turn)


def _blocks_at_once(device: torch.device) -> int:
    if device.type != "cuda":
        return 1  # a CPU tensor that poses as a CUDA tensor
    return _BLOCKS_PER_MULTIPROCESSOR * int(torch.cuda.get_device_properties(device).multi_processor_count)


def _blur_by_axes(out: Tensor, x: Tensor, work: _Work, box: Tensor | None, source: Tensor | None) -> None:
    """One launch an axis, for windows of any radius; from the first to the last in float32 (float64)."""
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        raise KernelInputError(
            f"{_NAME}: a graph is being captured and a window has radius {work.radii.max()}; want at most "
            f"{_MAX_RADIUS}, since wider ones copy a table from the host. Blur outside the graph, or by smaller sigmas."
        )
    real, batch = _real(x), len(x)
    width = 2 * int(work.radii.max()) + 1
    windows = np.zeros((3, batch, width), dtype=np.float64 if real == torch.float64 else np.float32)
    for axis in range(3):
        for b in range(batch):
            weights = _window(work, b, axis)
            windows[axis, b, : len(weights)] = weights
    windows_on_device = _launch.upload(windows, x.device)
    radii_on_device = _launch.upload(work.radii.T.astype(np.int32), x.device)
    boxes, sources = (
        table if table is None or _is_on_device(table) else _launch.upload(table.numpy(), x.device)
        for table in (box, source)
    )

    axes = [axis for axis in (2, 1, 0) if work.radii[:, axis].any()]
    between = out
    if len(axes) > 1 and (box is not None or source is not None or x.dtype != real):
        between = torch.empty_like(x, dtype=real)  # a box keeps what lies around it
    given = x
    for axis in axes:
        result = out if axis == axes[-1] else between
        largest = int(work.radii[:, axis].max())
        lines = x[0].numel() // x.shape[axis + 1]
        lines_per_block = _lines_per_block(x.shape[axis + 1] + 2 * largest, real)
        _launch.launch(
            _FILE,
            f"blur_axis_{dtype_name(given.dtype)}_{dtype_name(result.dtype)}",
            (batch * -(-lines // lines_per_block),),
            (_THREADS,),
            (
                *(_launch.pointer(t) for t in (result, given, windows_on_device[axis], radii_on_device)),
                *(_launch.pointer(t) for t in (boxes, sources)),
                np.int32(source is not None and axis == axes[0]),
                *(np.int32(n) for n in (axis, batch, width, *x.shape[1:], x.stride(axis + 1), lines, lines_per_block)),
            ),
            x.device,
            options=COMPILE_OPTIONS,
            shared_bytes=real.itemsize * (x.shape[axis + 1] + 2 * largest) * (lines_per_block | 1),
        )
        given = result


def _lines_per_block(padded: int, real: torch.dtype) -> int:
    """Most lines, a power of two up to a warp's width, that fit shared memory with their windows; one always does."""
    lines = 32
    while lines > 1 and padded * (lines | 1) * real.itemsize > MAX_LINE_VOX * torch.float32.itemsize:
        lines //= 2
    return lines


# ---- CPU path ----


def _blur_on_cpu(out: Tensor, x: Tensor, work: _Work, *, cut: bool) -> None:
    real = _real(x)
    if x.dtype == torch.bool:
        x = x.view(torch.uint8)
    if cut or x.dtype not in {real, torch.uint8}:
        for_each(len(x), lambda b: _blur_sample(out[b], x[b], work, b, cut=cut))
        return
    results, given = out.detach().numpy(), x.detach().numpy()
    half_windows = work.half_windows.astype(results.dtype)
    cost = (work.target[:, 1] - work.target[:, 0]).clip(min=0).prod(axis=1).tolist()
    for_shares(cost, lambda share: _blur_share(results, given, work.target, work.radii, half_windows, share))


def _blur_sample(out: Tensor, x: Tensor, work: _Work, b: int, *, cut: bool) -> None:
    """One volume; x counts as 0 outside the source where it is to be cut."""
    first, last = work.target[b]
    if (first >= last).any():
        return
    inside = _slices(first, last)
    radii = work.radii[b]
    if not cut and not radii.any():
        out[inside] = x[inside]
        return
    real = _real(x)
    low, high = np.maximum(first - radii, 0), np.minimum(last + radii, x.shape)  # mirrored, windows stay within these
    if cut:
        from_, to = np.maximum(work.source[b, 0], low), np.minimum(work.source[b, 1], high)
        given = torch.zeros(tuple(high - low), dtype=real)
        given[_slices(from_ - low, to - low)] = x[_slices(from_, to)]
    elif x.dtype != real:
        given = x[_slices(low, high)].to(real, memory_format=torch.contiguous_format)
    else:
        given, low = x, np.zeros(3, dtype=np.int64)
    direct = out.dtype == real
    result = out if direct else torch.empty(tuple(last - first), dtype=real)
    windows = [_window(work, b, axis).astype(np.float64 if real == torch.float64 else np.float32) for axis in range(3)]
    _blur_box(
        result.numpy(),
        np.zeros(3, dtype=np.int64) if direct else first,
        given.detach().numpy(),
        low,
        np.array(x.shape, dtype=np.int64),
        first,
        last,
        *windows,
    )
    if not direct:
        out[inside] = result.to(out.dtype)


def _slices(first: NDArray[np.int64], last: NDArray[np.int64]) -> tuple[slice, ...]:
    return tuple(slice(int(a), int(b)) for a, b in zip(first, last, strict=True))


@numba.njit(nogil=True, cache=True)
def _blur_share(out: Any, x: Any, target: Any, radii: Any, half_windows: Any, share: Any) -> None:  # pragma: no cover
    """Some of a batch's volumes, from memory of the result's dtype into such memory."""
    for b in share:
        _blur_directly(out[b], x[b], target[b], radii[b], half_windows[b])


@numba.njit(nogil=True, cache=True)
def _blur_directly(out: Any, x: Any, target: Any, radii: Any, half_windows: Any) -> None:  # pragma: no cover
    first, last = target[0], target[1]
    for axis in range(3):
        if first[axis] >= last[axis]:
            return
    if radii[0] == 0 and radii[1] == 0 and radii[2] == 0:
        for z in range(first[0], last[0]):
            for y in range(first[1], last[1]):
                for x_ in range(first[2], last[2]):
                    out[z, y, x_] = x[z, y, x_]
        return
    shape = np.array(x.shape, np.int64)
    zero = np.zeros(3, np.int64)
    window_z = _both_sides(half_windows[0], radii[0])
    window_y = _both_sides(half_windows[1], radii[1])
    window_x = _both_sides(half_windows[2], radii[2])
    _blur_box(out, zero, x, zero, shape, first, last, window_z, window_y, window_x)


@numba.njit(nogil=True, cache=True)
def _both_sides(half: Any, radius: Any) -> Any:  # pragma: no cover
    """The 2 r + 1 weights of a window from those of one side."""
    window = np.empty(2 * radius + 1, half.dtype)
    for i in range(2 * radius + 1):
        window[i] = half[abs(i - radius)]
    return window


@numba.njit(nogil=True, cache=True)
def _blur_box(  # pragma: no cover
    out: NDArray[Any],
    out_start: NDArray[np.int64],
    x: NDArray[Any],
    x_start: NDArray[np.int64],
    shape: NDArray[np.int64],
    first: NDArray[np.int64],
    last: NDArray[np.int64],
    window_z: NDArray[Any],
    window_y: NDArray[Any],
    window_x: NDArray[Any],
) -> None:
    """Blur the voxels first <= i < last of a volume of ``shape``; ``out`` and ``x`` hold the parts from their starts on.

    Plane by plane: along x, along y, into a ring of the planes that a window along z needs; the scratch stays in the
    core's cache. A plane of ``out`` is written when no window needs that plane of ``x`` any more: they may be the same.
    """
    nz, ny, nx = shape
    z0, y0, x0 = first
    z1, y1, x1 = last
    rz, ry, rx = len(window_z) // 2, len(window_y) // 2, len(window_x) // 2
    height, width = y1 - y0, x1 - x0
    low_z, low_y, high_y = max(0, z0 - rz), max(0, y0 - ry), min(ny, y1 + ry)
    pitch = width + 2 * rx
    size = height * width
    num_slots = min(2 * rz + 1, min(nz, z1 + rz) - low_z)

    mirrored = np.empty((high_y - low_y) * pitch, out.dtype)
    along_x = np.empty_like(mirrored)
    stacked = np.empty((height + 2 * ry) * width, out.dtype)
    ring = np.empty(num_slots * size, out.dtype)
    plane = np.empty(size, out.dtype)
    flat_out = out.reshape(out.size)
    left, right = np.empty(rx, np.int64), np.empty(rx, np.int64)  # where the mirrored ends of a row come from
    for i in range(rx):
        left[i] = _reflected(x0 - rx + i, nx) - x_start[2]
        right[i] = _reflected(x1 + i, nx) - x_start[2]
    starts_x = np.arange(2 * rx + 1)
    starts_y = np.arange(2 * ry + 1) * width
    starts_z = np.empty(2 * rz + 1, np.int64)

    next_z = low_z
    for z in range(z0, z1):
        for arriving in range(next_z, min(nz, z + rz + 1)):
            for y in range(low_y, high_y):
                row = x[arriving - x_start[0], y - x_start[1]]
                line = mirrored[(y - low_y) * pitch : (y - low_y + 1) * pitch]
                for i in range(rx):
                    line[i] = row[left[i]]
                    line[rx + width + i] = row[right[i]]
                middle, voxels = line[rx : rx + width], row[x0 - x_start[2] : x1 - x_start[2]]
                for i in range(width):
                    middle[i] = voxels[i]
            # one run over all rows: what straddles two of them is not used
            _sum_taps(along_x, mirrored, starts_x, window_x, len(mirrored) - 2 * rx)
            for k in range(height + 2 * ry):
                y = _reflected(y0 - ry + k, ny) - low_y
                line, voxels = stacked[k * width : (k + 1) * width], along_x[y * pitch : y * pitch + width]
                for i in range(width):
                    line[i] = voxels[i]
            _sum_taps(ring[(arriving - low_z) % num_slots * size :], stacked, starts_y, window_y, size)
        next_z = max(next_z, min(nz, z + rz + 1))
        for tap in range(2 * rz + 1):
            starts_z[tap] = (_reflected(z - rz + tap, nz) - low_z) % num_slots * size
        whole_rows = width == out.shape[2]
        start = ((z - out_start[0]) * out.shape[1] + y0 - out_start[1]) * width
        sums = flat_out[start:] if whole_rows else plane
        _sum_taps(sums, ring, starts_z, window_z, size)
        if not whole_rows:
            for y in range(height):
                line = out[z - out_start[0], y0 - out_start[1] + y, x0 - out_start[2] : x1 - out_start[2]]
                voxels = plane[y * width : (y + 1) * width]
                for i in range(width):
                    line[i] = voxels[i]


@numba.njit(nogil=True, cache=True)
def _sum_taps(  # pragma: no cover
    sums: NDArray[Any], values: NDArray[Any], starts: NDArray[np.int64], window: NDArray[Any], count: int
) -> None:
    """``sums[i]`` = the sum of ``window[t] * values[starts[t] + i]`` over t, in ascending order, each step rounded.

    Up to eight taps in one sweep: the inner loop becomes vectors, and sums are loaded an eighth as often.
    """
    lead = (len(window) - 1) % 8 + 1  # odd, as a window's length is
    v0, w0 = values[starts[0] :], window[0]
    if lead == 1:
        for i in range(count):
            sums[i] = w0 * v0[i]
    elif lead == 3:
        v1, v2 = values[starts[1] :], values[starts[2] :]
        w1, w2 = window[1], window[2]
        for i in range(count):
            sums[i] = w0 * v0[i] + w1 * v1[i] + w2 * v2[i]
    elif lead == 5:
        v1, v2, v3, v4 = values[starts[1] :], values[starts[2] :], values[starts[3] :], values[starts[4] :]
        w1, w2, w3, w4 = window[1], window[2], window[3], window[4]
        for i in range(count):
            sums[i] = w0 * v0[i] + w1 * v1[i] + w2 * v2[i] + w3 * v3[i] + w4 * v4[i]
    else:
        v1, v2, v3, v4, v5, v6 = (
            values[starts[1] :],
            values[starts[2] :],
            values[starts[3] :],
            values[starts[4] :],
            values[starts[5] :],
            values[starts[6] :],
        )
        w1, w2, w3, w4, w5, w6 = window[1], window[2], window[3], window[4], window[5], window[6]
        for i in range(count):
            sums[i] = w0 * v0[i] + w1 * v1[i] + w2 * v2[i] + w3 * v3[i] + w4 * v4[i] + w5 * v5[i] + w6 * v6[i]
    for t in range(lead, len(window), 8):
        v0, v1, v2, v3 = values[starts[t] :], values[starts[t + 1] :], values[starts[t + 2] :], values[starts[t + 3] :]
        v4, v5, v6, v7 = (
            values[starts[t + 4] :],
            values[starts[t + 5] :],
            values[starts[t + 6] :],
            values[starts[t + 7] :],
        )
        w0, w1, w2, w3 = window[t], window[t + 1], window[t + 2], window[t + 3]
        w4, w5, w6, w7 = window[t + 4], window[t + 5], window[t + 6], window[t + 7]
        for i in range(count):
            sums[i] = (
                sums[i]
                + w0 * v0[i]
                + w1 * v1[i]
                + w2 * v2[i]
                + w3 * v3[i]
                + w4 * v4[i]
                + w5 * v5[i]
                + w6 * v6[i]
                + w7 * v7[i]
            )


@numba.njit(nogil=True, cache=True)
def _reflected(i: int, n: int) -> int:  # pragma: no cover
    """Index of position i on an axis of n voxels, mirrored at the outer faces of its end voxels; any distance."""
    inside = i % (2 * n)
    return inside if inside < n else 2 * n - 1 - inside


_blur = register(
    "gaussian_blur(Tensor x, Tensor sigma_vox_zyx, Tensor? box, Tensor? source) -> Tensor",
    _run,
    lambda x, _sigma, _box, _source: torch.empty_like(x, dtype=_result_dtype(x)),
    backward=_backward,
    save=_save,
)
_blur_out = register(
    "gaussian_blur_out(Tensor x, Tensor sigma_vox_zyx, Tensor? box, Tensor(a!) out) -> ()",
    _run_out,
    lambda _x, _sigma, _box, _out: None,
)
