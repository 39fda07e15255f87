"""Where a tumour's centre goes: a voxel of the eroded organ, drawn uniformly; a thin organ uses its own voxels.

Both paths pack the organ to bits, one a voxel, a row at a time: an erosion is then a few shifts and ANDs on 32 or 64
voxels at once, and a count is a sum of words. Everything is integers but one product, draw times count, so both paths
pick the same voxel.
"""

from typing import Any

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ftengine.errors import KernelInputError
from ftengine.kernels import _launch
from ftengine.kernels._checks import MASK_DTYPES, require_apart, require_tensor, small_table
from ftengine.kernels._ops import register
from ftengine.kernels._threads import for_each

_NAME = "choose_center"
_FILE = "choose_center.cu"
_THREADS = 256  # also the words of a chunk, whose voxels are counted together
_WARP = 32
_MAX_BLOCKS = 1 << 20


def choose_center(organ: Tensor, margin_vox_zyx: Any, draws: Any, *, out: Tensor | None = None) -> Tensor:
    """Pick voxels of organs at least a margin away from their borders: [B, z, y, x] and draws -> [B, N, 3].

    organ: [B, z, y, x] uint8 or bool; not 0 is organ.
    margin_vox_zyx: three integers >= 0, or [B, 3], on the host. The organ is eroded by the box of 2 margin + 1 voxels;
        the patch's border counts as organ, since the organ goes on behind it.
    draws: [B] or [B, N] in [0, 1), N picks a sample; on the host, or float64 on the organ's device (not checked there:
        a draw outside picks the first or the last voxel).
    out: int64 [B, N, 3], or None.

    Returns int64 z y x on the organ's device: for each draw the voxel number floor(draw * count), counted in C order,
    of the eroded organ, or of the organ where erosion leaves nothing; (-1, -1, -1) where there is no organ. ``draws``
    of [B] gives N = 1. Not differentiable.
    Draws come from counter-based streams on the host (``ftengine.rng``), so equal addresses give equal voxels on every
    device. CUDA takes scratch memory from torch's allocator: 3 bits a voxel of rows padded to 32, and 8 bytes for each
    8192 voxels; four launches. In a CUDA graph: with draws on the device and one margin for all samples, else each
    replay sees the values of the capture, and their copies may be gone by then.
    Raises KernelInputError, before any launch, for wrong types, dtypes, shapes, devices or memory order, for negative
    margins and, on the host, for draws outside [0, 1).
    Source: design of the engine; the released code erodes one slice by 5 x 5 voxels and falls back to the point
    (0, 0, 0), which wastes the patch (``ftengine.synthesis.center``).
    """
    require_tensor(_NAME, "organ", organ, MASK_DTYPES)
    margin = small_table(_NAME, "margin_vox_zyx", margin_vox_zyx, torch.int64, None)
    draws = small_table(_NAME, "draws", draws, torch.float64, organ.device)
    batch = organ.shape[0]
    if tuple(margin.shape) not in {(3,), (batch, 3)}:
        raise KernelInputError(
            f"{_NAME}: margin_vox_zyx has shape {tuple(margin.shape)}; want three integers z y x, or {(batch, 3)}, "
            "three per sample. Convert millimetres with geometry.mm_to_vox."
        )
    if draws.ndim not in {1, 2} or draws.shape[0] != batch:
        raise KernelInputError(
            f"{_NAME}: draws has shape {tuple(draws.shape)}; want ({batch},) or ({batch}, N), draws per sample. "
            "Wrap a single draw in a list."
        )
    if margin.ndim == 1:
        margin = margin.unsqueeze(0)
    if draws.ndim == 1:
        draws = draws.unsqueeze(1)
    if organ.dtype == torch.bool:
        organ = organ.view(torch.uint8)
    if out is None:
        chosen: Tensor = _choose(organ, margin, draws)
        return chosen
    _check_buffer(out, (batch, draws.shape[1], 3), organ.device)
    _choose_out(organ, margin, draws, out)
    return out


def _check_buffer(out: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    if out.dtype != torch.int64 or tuple(out.shape) != shape or out.device != device:
        raise KernelInputError(
            f"{_NAME}: out is {out.dtype} of shape {tuple(out.shape)} on {out.device}; want torch.int64 of shape "
            f"{shape} on {device}. Pass a new buffer, or none."
        )
    if not out.is_contiguous():
        raise KernelInputError(f"{_NAME}: out has strides {out.stride()}; want memory order. Call out.contiguous().")


def _fake(organ: Tensor, _margin: Tensor, draws: Tensor) -> Tensor:
    return torch.empty((organ.shape[0], draws.shape[1], 3), dtype=torch.int64, device=organ.device)


def _run(organ: Tensor, margin: Tensor, draws: Tensor) -> Tensor:
    out = _fake(organ, margin, draws)
    _run_checked(organ, margin, draws, out)
    return out


def _run_out(organ: Tensor, margin: Tensor, draws: Tensor, out: Tensor) -> None:
    require_apart(_NAME, out, apart_from=[("organ", organ), ("draws", draws)])
    _run_checked(organ, margin, draws, out)


def _run_checked(organ: Tensor, margin: Tensor, draws: Tensor, out: Tensor) -> None:
    margins, draws = margin.contiguous().numpy(), draws.contiguous()
    if margins.size and margins.min() < 0:
        raise KernelInputError(
            f"{_NAME}: margin_vox_zyx holds {margins.min()}; want 0 or more voxels. Check the margin in millimetres."
        )
    if _on_host(draws):
        values = draws.numpy()
        if not ((values >= 0) & (values < 1)).all():
            raise KernelInputError(
                f"{_NAME}: draws holds a number outside [0, 1) or NaN; want uniform draws. Take them from "
                "rng.patch_rng."
            )
    if out.numel() == 0:
        return
    if _launch.uses_kernel(organ):
        _choose_by_kernel(organ, margins, draws, out)
        return
    organs, numbers, centers = organ.flatten(1).numpy(), draws.numpy(), out.numpy()
    shape = np.array(organ.shape[1:], dtype=np.int64)
    for_each(
        len(organs),
        lambda b: _choose_in_sample(organs[b], shape, margins[min(b, len(margins) - 1)], numbers[b], centers[b]),
    )


def _on_host(table: Tensor) -> bool:
    return table.device.type == "cpu"


def _choose_by_kernel(organ: Tensor, margins: NDArray[np.int64], draws: Tensor, out: Tensor) -> None:
    batch, nz, ny, nx = organ.shape
    words_per_row = -(-nx // 32)
    words_per_sample = nz * ny * words_per_row
    num_words = batch * words_per_sample
    chunks_per_sample = -(-words_per_sample // _THREADS)
    scratch = torch.empty(3 * num_words + 2 * batch * chunks_per_sample, dtype=torch.int32, device=organ.device)
    bits, rows, eroded, counts = (
        np.uint64(scratch.data_ptr() + 4 * offset) for offset in (0, num_words, 2 * num_words, 3 * num_words)
    )
    host = [margins.ravel()] if len(margins) > 1 else []
    host += [draws.numpy().view(np.int64).ravel()] if _on_host(draws) else []
    uploaded = _launch.upload(np.concatenate(host), organ.device) if host else None
    own_margins = _launch.pointer(uploaded if len(margins) > 1 else None)
    draws_at = _launch.pointer(draws)
    if uploaded is not None and _on_host(draws):
        draws_at = np.uint64(uploaded.data_ptr() + 8 * (uploaded.numel() - draws.numel()))
    all_margins = (own_margins, *(np.int64(m) for m in margins[0]))
    shape = [np.int64(n) for n in organ.shape]

    def launch(name: str, num_blocks: int, *args: np.generic) -> None:
        _launch.launch(_FILE, name, (min(num_blocks, _MAX_BLOCKS),), (_THREADS,), args, organ.device)

    launch("pack", -(-num_words // (_THREADS // _WARP)), bits, _launch.pointer(organ), *shape)
    launch("erode_xy", -(-num_words // _THREADS), rows, bits, *all_margins, *shape)
    launch("erode_z", batch * chunks_per_sample, eroded, counts, rows, bits, *all_margins, *shape)
    num_draws = np.int64(draws.shape[1])
    launch("pick", draws.numel(), _launch.pointer(out), eroded, bits, counts, draws_at, num_draws, *shape)


# ---- CPU path: words of 64 voxels, the same word of all rows side by side: one instruction does several rows ----


def _choose_in_sample(
    organ: NDArray[np.uint8],
    shape: NDArray[np.int64],
    margin: NDArray[np.int64],
    draws: NDArray[np.float64],
    out: NDArray[np.int64],
) -> None:
    """One sample; organ flat, draws [N], out [N, 3]."""
    margin = np.minimum(margin, shape - 1)  # enough to leave nothing of an organ with a gap
    lead = -(-int(margin[2]) // 64)  # words in front, so that a row may begin before the first voxel
    packed = np.packbits(organ, bitorder="little")
    words = np.zeros(lead + len(organ) // 64 + 3, dtype=np.uint64)
    words.view(np.uint8)[8 * lead : 8 * lead + len(packed)] = packed
    _choose_in_bits(words, lead, shape, margin, draws, out)


@numba.njit(nogil=True, cache=True)
def _choose_in_bits(words: Any, lead: Any, shape: Any, margin: Any, draws: Any, out: Any) -> None:
    """words: the organ's bits in C order behind ``lead`` empty words, two or more empty words at the end."""
    ny, nx = shape[1], shape[2]
    rows = _rows_with_margins(words, lead, shape, margin)
    _erode(rows, shape, margin)
    num_words = (nx + 63) // 64
    beyond = _ones_from(nx - 64 * (num_words - 1))
    counts = np.zeros(shape[0], np.int64)  # of each slice
    for w in range(num_words):
        for z in range(shape[0]):
            for y in range(ny):
                if w == num_words - 1:
                    rows[w, z, y] &= ~beyond
                counts[z] += _popcount(rows[w, z, y])
    count = counts.sum()
    own_count = 0  # without erosion
    if count == 0:
        for word in words:
            own_count += _popcount(word)
    for n in range(len(draws)):
        out[n] = -1
        if count > 0:
            left = np.int64(draws[n] * count)
            z = 0
            while left >= counts[z]:
                left -= counts[z]
                z += 1
            y, w = 0, 0
            while left >= _popcount(rows[w, z, y]):
                left -= _popcount(rows[w, z, y])
                w += 1
                if w == num_words:
                    y, w = y + 1, 0
            out[n, 0], out[n, 1], out[n, 2] = z, y, 64 * w + _place_of(rows[w, z, y], left)
        elif own_count > 0:
            left = np.int64(draws[n] * own_count)
            k = 0
            while left >= _popcount(words[k]):
                left -= _popcount(words[k])
                k += 1
            voxel = 64 * (k - lead) + _place_of(words[k], left)
            out[n, 0], out[n, 1], out[n, 2] = voxel // (ny * nx), voxel // nx % ny, voxel % nx


@numba.njit(nogil=True, cache=True)
def _rows_with_margins(words: Any, lead: Any, shape: Any, margin: Any) -> Any:
    """[words of a row, z, y]: each row behind a margin of ones, ones behind it, and slices and rows of ones around."""
    nz, ny, nx = shape
    margin_z, margin_y, margin_x = margin
    num_words = (nx + 2 * margin_x + 63) // 64
    rows = np.full((num_words, nz + 2 * margin_z, ny + 2 * margin_y), ~np.uint64(0))
    for w in range(num_words):
        outside = ~np.uint64(0)
        if 64 * (w + 1) > margin_x:
            outside = ~_ones_from(margin_x - 64 * w)
        outside |= _ones_from(margin_x + nx - 64 * w)
        if outside == ~np.uint64(0):
            continue
        for z in range(nz):
            for y in range(ny):
                start = 64 * (lead + w) - margin_x + (z * ny + y) * nx
                shift = np.uint64(start & 63)
                low = words[start >> 6] >> shift
                high = (words[min((start >> 6) + 1, len(words) - 1)] << (np.uint64(63) - shift)) << np.uint64(1)
                rows[w, margin_z + z, margin_y + y] = low | high | outside
    return rows


@numba.njit(nogil=True, cache=True)
def _erode(rows: Any, shape: Any, margin: Any) -> None:
    """In place: the AND of 2 margin + 1 neighbours along each axis ends up at the first of them.

    What covers ``length`` neighbours covers twice as many after an AND with itself, shifted. What a shift brings in
    from outside is organ: such words are left alone.
    """
    num_words, num_z, num_y = rows.shape
    nz, ny = shape[0], shape[1]
    margin_z, margin_y, margin_x = margin
    line = np.empty(num_y, np.uint64)  # memory of its own: a loop over what overlaps does one word at a time
    length = 1
    while length < 2 * margin_x + 1:
        step = min(length, 2 * margin_x + 1 - length)
        whole, low = step // 64, np.uint64(step % 64)
        high = np.uint64(63) - low
        for w in range(num_words - whole):
            for z in range(margin_z, margin_z + nz):
                for y in range(num_y):
                    line[y] = rows[w + whole, z, y] >> low
                if w + whole + 1 < num_words:
                    for y in range(num_y):
                        rows[w, z, y] &= line[y] | (rows[w + whole + 1, z, y] << high) << np.uint64(1)
                else:
                    above = (~np.uint64(0) << high) << np.uint64(1)
                    for y in range(num_y):
                        rows[w, z, y] &= line[y] | above
        length += step
    length = 1
    while length < 2 * margin_y + 1:
        step = min(length, 2 * margin_y + 1 - length)
        for w in range(num_words):
            for z in range(margin_z, margin_z + nz):
                ahead = rows[w, z, step:]
                for y in range(len(ahead)):
                    line[y] = ahead[y]
                for y in range(len(ahead)):
                    rows[w, z, y] &= line[y]
        length += step
    length = 1
    while length < 2 * margin_z + 1:
        step = min(length, 2 * margin_z + 1 - length)
        for w in range(num_words):
            for z in range(num_z - step):
                for y in range(ny):
                    rows[w, z, y] &= rows[w, z + step, y]
        length += step


@numba.njit(nogil=True, cache=True)
def _ones_from(place: Any) -> Any:
    """A word of ones from this bit on: all of them for a negative place, none from 64 on."""
    if place <= 0:
        return ~np.uint64(0)
    if place >= 64:
        return np.uint64(0)
    return ~np.uint64(0) << np.uint64(place)


@numba.njit(nogil=True, cache=True)
def _popcount(word: Any) -> Any:
    """The number of ones: sums of 2, 4 and 8 bits side by side, then of all bytes."""
    word -= (word >> np.uint64(1)) & np.uint64(0x5555555555555555)
    word = (word & np.uint64(0x3333333333333333)) + ((word >> np.uint64(2)) & np.uint64(0x3333333333333333))
    word = (word + (word >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return np.int64((word * np.uint64(0x0101010101010101)) >> np.uint64(56))


@numba.njit(nogil=True, cache=True)
def _place_of(word: Any, number: Any) -> Any:
    """The place of the one with this number, counted from the lowest bit and from 0."""
    for _ in range(number):
        word &= word - np.uint64(1)
    place = 0
    while (word >> np.uint64(place)) & np.uint64(1) == 0:
        place += 1
    return place


_choose = register("choose_center(Tensor organ, Tensor margin, Tensor draws) -> Tensor", _run, _fake)
_choose_out = register(
    "choose_center_out(Tensor organ, Tensor margin, Tensor draws, Tensor(a!) out) -> ()",
    _run_out,
    lambda _organ, _margin, _draws, _out: None,
)
