"""The noise texture of FreeTumor's released code, with the same bits on CPU and GPU.

Its random numbers are Philox4x32-10 (Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3. SC 2011),
a function of a counter and a key, so every voxel's number is known without the one before. NumPy's Philox, which
``ftengine.rng`` uses, is Philox4x64-10: another generator, of 64 bit words. Voxel i of a field, counted in memory order,
takes word i % 4 of the counter ``(block, block >> 32, number, purpose << 8 | stream)``, each modulo 2**32, with
block = i // 4; the key is the seed, its low 32 bits first. Stream 0 is the noise, stream 1 the coins.

Everything else is float32 with one rounding an operation, in one order, or an exact reduction: see ``.cu``.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ftengine.errors import KernelInputError
from ftengine.geometry import IntZYX
from ftengine.kernels import _launch
from ftengine.kernels._checks import require_device, require_shape_zyx
from ftengine.kernels._threads import for_each
from ftengine.kernels.gaussian_blur import gaussian_blur
from ftengine.rng import Purpose, patch_rng

FIELD_SHAPE_ZYX: IntZYX = (320, 300, 420)  # released: 420 x 300 x 320 in x, y, z
BRIGHT = 0.12  # the values above it set the scale

_NAME = "texture_field"
_FILE = "texture_field.cu"
COMPILE_OPTIONS = ("--fmad=false",)  # the same rounding as on the CPU
_THREADS = 256  # the reductions' arrays have this many places
_MAX_REDUCING_BLOCKS = 2048  # each ends in two atomics
_SLAB_VOXELS = 1 << 20  # a task of the CPU path; a multiple of 4
_PER_UNIT = 2.0**27  # see bright_sum in the .cu


def texture_field(
    seed: int,
    number: int,
    sigma_a: float,
    sigma_b: float,
    shape_zyx: Sequence[int] = FIELD_SHAPE_ZYX,
    *,
    device: torch.device | str = "cpu",
) -> Tensor:
    """One texture field: float32 [z, y, x] in [0, 1] on ``device``, a function of its other arguments alone.

    Uniform noise; Gaussian sigma_a; stretched so that its range becomes [base, base + scale]; 1 with that probability,
    else 0; Gaussian sigma_b; times u0 over the mean of the values above 0.12; clipped to 1. scale is uniform in
    [.19, .21), base in [.04, .06), u0 in [.5, .55).
    seed: 0 to 2**64 - 1; number: of the field, 0 to 2**32 - 1. sigma_a, sigma_b: standard deviations in voxels, finite
        and >= 0; the blurs are ``gaussian_blur``. device: cpu or cuda.

    CPU and CUDA give the same bits wherever ``gaussian_blur`` does: nothing else here depends on the device, on the
    number of threads or on the launch. Memory: the field, and what the blur takes. On CUDA it works on torch's current
    stream and does not wait for it.
    Degenerate fields: where all smoothed noise is equal (one voxel) the probability is base; where no value exceeds 0.12
    the field is not scaled. Not differentiable, and not traceable by torch.compile: fields are made once and kept
    (``synthesis.released.TextureFields``).
    Raises KernelInputError, before any launch, for a seed, number, sigma, shape or device outside these ranges; and
    where ``gaussian_blur`` does.
    Source: FreeTumor's released code, which took shape and ranges from SyntheticTumors (CVPR 2023). It draws in float64
    from another generator: equal in distribution, not in its numbers.
    """
    shape = require_shape_zyx(_NAME, shape_zyx)
    for name, sigma in (("sigma_a", sigma_a), ("sigma_b", sigma_b)):
        if not 0 <= sigma < math.inf:
            raise KernelInputError(
                f"{_NAME}: {name} is {sigma}; want a finite number of 0 or more voxels. Check the region's sigmas."
            )
    for name, value, bits in (("seed", seed, 64), ("number", number, 32)):
        if not 0 <= value < 1 << bits:
            raise KernelInputError(f"{_NAME}: {name} is {value}; want 0 to 2**{bits} - 1. Choose another {name}.")
    device = torch.device(device)
    require_device(_NAME, "device", device)
    return _make_eagerly(seed, number, float(sigma_a), float(sigma_b), shape, device)


def _make_eagerly(*arguments: Any) -> Tensor:
    """``_make`` outside compiled code; torch's compiler, a second of imports and 70 MB, is asked only where it is in use."""
    if "torch._dynamo" not in sys.modules:
        return _make(*arguments)
    field: Tensor = torch.compiler.disable(_make)(*arguments)
    return field


# what torch.compiler.disable sets; itself it would import the compiler here
_make_eagerly._torchdynamo_disable = True  # type: ignore[attr-defined]
_make_eagerly._torchdynamo_disable_msg = (  # type: ignore[attr-defined]
    "texture_field is made once, outside compiled code; pass its crops in"
)


def _make(seed: int, number: int, sigma_a: float, sigma_b: float, shape_zyx: IntZYX, device: torch.device) -> Tensor:
    rng = patch_rng(seed, Purpose.TEXTURE_FIELD, index=number)
    scale, base, u0 = rng.uniform(0.19, 0.21), rng.uniform(0.04, 0.06), rng.uniform(0.5, 0.55)
    batch = torch.empty((1, *shape_zyx), dtype=torch.float32, device=device)
    _draw_noise(batch, _Stream(seed, number, 0))
    gaussian_blur(batch, [sigma_a] * 3, out=batch)
    _toss_coins(batch, np.float32(scale), np.float32(base), _Stream(seed, number, 1))
    gaussian_blur(batch, [sigma_b] * 3, out=batch)
    _scale_to_mean(batch, u0)
    return batch[0]


@dataclass(frozen=True)
class _Stream:
    """Which random numbers: all of a field that serve one end."""

    seed: int
    number: int
    use: int

    @property
    def words(self) -> tuple[np.uint32, np.uint32, np.uint64]:
        """The counter's upper two words, and the key: as the kernels take them."""
        return np.uint32(self.number), np.uint32(int(Purpose.TEXTURE_FIELD) << 8 | self.use), np.uint64(self.seed)


# ---- the three steps beside the blurs, in place on a contiguous float32 tensor ----


def _draw_noise(values: Tensor, stream: _Stream) -> None:
    """Uniform numbers in [0, 1), multiples of 2**-24."""
    if _launch.uses_kernel(values):
        _start("noise", values, _pointers(values), stream.words, per_thread=4)
        return
    slabs, words = _slabs(values), stream.words
    for_each(len(slabs), lambda s: _fill_noise(slabs[s], _first_block(s), *words))


def _toss_coins(values: Tensor, scale: np.float32, base: np.float32, stream: _Stream) -> None:
    """1 where a uniform number is below the value stretched to [base, base + scale], else 0."""
    if _launch.uses_kernel(values):
        extremes = torch.zeros(1, dtype=torch.int64, device=values.device)
        _start("value_range", values, _pointers(extremes, values), max_blocks=_MAX_REDUCING_BLOCKS)
        _start("coins", values, _pointers(values, extremes), (scale, base, *stream.words), per_thread=4)
        return
    slabs, words = _slabs(values), stream.words
    lows, highs = np.empty(len(slabs), np.float32), np.empty(len(slabs), np.float32)

    def find_range(s: int) -> None:
        lows[s], highs[s] = slabs[s].min(), slabs[s].max()

    for_each(len(slabs), find_range)
    low, high = lows.min(), highs.max()
    slope = scale / (high - low) if high > low else np.float32(0)
    for_each(len(slabs), lambda s: _fill_coins(slabs[s], low, slope, base, _first_block(s), *words))


def _scale_to_mean(values: Tensor, u0: float) -> None:
    """Times u0 over the mean of the values above 0.12, at most 1."""
    if _launch.uses_kernel(values):
        sums = torch.zeros(2, dtype=torch.int64, device=values.device)
        _start("bright_sum", values, _pointers(sums, values), max_blocks=_MAX_REDUCING_BLOCKS)
        _start("scale_to_mean", values, _pointers(values, sums), (np.float64(u0),))
        return
    slabs = _slabs(values)
    sums_of = np.zeros((len(slabs), 2), np.int64)
    for_each(len(slabs), lambda s: _sum_bright(slabs[s], sums_of[s]))
    total, count = (int(n) for n in sums_of.sum(0))
    beta = np.float32(u0 * count * _PER_UNIT / total) if count > 0 else np.float32(1)

    def scale(s: int) -> None:
        np.multiply(slabs[s], beta, out=slabs[s])
        np.minimum(slabs[s], np.float32(1), out=slabs[s])

    for_each(len(slabs), scale)


def _pointers(*tensors: Tensor) -> tuple[np.uint64, ...]:
    return tuple(_launch.pointer(tensor) for tensor in tensors)


def _start(
    kernel: str,
    values: Tensor,
    pointers: tuple[np.uint64, ...],
    numbers: tuple[np.generic, ...] = (),
    *,
    per_thread: int = 1,
    max_blocks: int = _launch.MAX_BLOCKS_X,
) -> None:
    _launch.launch(
        _FILE,
        kernel,
        (min(_launch.blocks_for(values.numel(), _THREADS * per_thread), max_blocks),),
        (_THREADS,),
        (*pointers, *numbers, np.int64(values.numel())),
        values.device,
        options=COMPILE_OPTIONS,
    )


# ---- CPU path: slab by slab ----


def _slabs(values: Tensor) -> list[NDArray[np.float32]]:
    flat = values.view(-1).numpy()
    return [flat[start : start + _SLAB_VOXELS] for start in range(0, len(flat), _SLAB_VOXELS)]


def _first_block(slab: int) -> np.uint64:
    return np.uint64(slab * (_SLAB_VOXELS // 4))


@numba.njit(nogil=True, cache=True, inline="always")
def _philox(block: Any, number: Any, stream: Any, seed: Any) -> Any:
    """Four words, in 64 bit variables: numba's arithmetic of 32 bit integers is 64 bit."""
    low32 = np.uint64(0xFFFFFFFF)
    half = np.uint64(32)
    a, b, c, d = block & low32, block >> half, np.uint64(number), np.uint64(stream)
    key_low, key_high = seed & low32, seed >> half
    for _ in range(10):
        even = np.uint64(0xD2511F53) * a
        odd = np.uint64(0xCD9E8D57) * c
        a = (odd >> half) ^ b ^ key_low
        b = odd & low32
        c = (even >> half) ^ d ^ key_high
        d = even & low32
        key_low = (key_low + np.uint64(0x9E3779B9)) & low32
        key_high = (key_high + np.uint64(0xBB67AE85)) & low32
    return a, b, c, d


@numba.njit(nogil=True, cache=True, inline="always")
def _uniform(word: Any) -> Any:
    return np.float32(word >> np.uint64(8)) * np.float32(2.0**-24)


@numba.njit(nogil=True, cache=True)
def _fill_words(out: Any, first_block: Any, number: Any, stream: Any, seed: Any) -> None:
    """The generator alone, for its known answers. out: uint32, four words a block."""
    for b in range(len(out) // 4):
        w = _philox(first_block + np.uint64(b), number, stream, seed)
        for k in range(4):
            out[4 * b + k] = np.uint32(w[k])


@numba.njit(nogil=True, cache=True)
def _fill_noise(out: Any, first_block: Any, number: Any, stream: Any, seed: Any) -> None:
    whole = len(out) // 4
    for b in range(whole):
        p, q, r, s = _philox(first_block + np.uint64(b), number, stream, seed)
        out[4 * b] = _uniform(p)
        out[4 * b + 1] = _uniform(q)
        out[4 * b + 2] = _uniform(r)
        out[4 * b + 3] = _uniform(s)
    last = _philox(first_block + np.uint64(whole), number, stream, seed)
    for k in range(len(out) - 4 * whole):
        out[4 * whole + k] = _uniform(last[k])


@numba.njit(nogil=True, cache=True)
def _fill_coins(
    values: Any, low: Any, slope: Any, base: Any, first_block: Any, number: Any, stream: Any, seed: Any
) -> None:
    whole = len(values) // 4
    one, zero = np.float32(1), np.float32(0)
    for b in range(whole):
        i = 4 * b
        p, q, r, s = _philox(first_block + np.uint64(b), number, stream, seed)
        values[i] = one if _uniform(p) < (values[i] - low) * slope + base else zero
        values[i + 1] = one if _uniform(q) < (values[i + 1] - low) * slope + base else zero
        values[i + 2] = one if _uniform(r) < (values[i + 2] - low) * slope + base else zero
        values[i + 3] = one if _uniform(s) < (values[i + 3] - low) * slope + base else zero
    last = _philox(first_block + np.uint64(whole), number, stream, seed)
    for k in range(len(values) - 4 * whole):
        i = 4 * whole + k
        values[i] = one if _uniform(last[k]) < (values[i] - low) * slope + base else zero


@numba.njit(nogil=True, cache=True)
def _sum_bright(values: Any, sums: Any) -> None:
    """Sum of the values above 0.12 in units of 2**-27, exact (see bright_sum in the .cu), and their count."""
    bright, per_unit = np.float32(BRIGHT), np.float32(_PER_UNIT)
    total, count = np.int64(0), np.int64(0)
    for i in range(len(values)):
        value = values[i]
        if value > bright:
            total += np.int64(np.int32(value * per_unit))
            count += 1
    sums[0], sums[1] = total, count
