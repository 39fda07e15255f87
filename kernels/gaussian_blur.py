"""Gaussian blur of a batch of volumes, each sample and axis with its own width: the texture g(x) of FreeTumor's Eq. 1.

The boundary is half-sample symmetric, so the blur of one axis is a symmetric matrix: the blur is its own adjoint, and
the backward pass is the forward pass on the gradient.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ftengine.errors import KernelInputError
from ftengine.kernels import _launch
from ftengine.kernels._checks import host_floats, require_output, require_tensor

TRUNCATE = 4.0  # the window ends at this many sigmas: SciPy's default, and what the released code uses
MAX_LINE_VOX = 12_288  # an axis and its window at both ends must fit the 48 KiB of shared memory of every device

_NAME = "gaussian_blur"
_FILE = "gaussian_blur.cu"
_THREADS = 256
_SHARED_FLOATS = MAX_LINE_VOX
_ROWS_PER_PRODUCT = 96


def gaussian_blur(x: Tensor, sigma_vox_zyx: Any, *, out: Tensor | None = None) -> Tensor:
    """Blur each sample as ``scipy.ndimage.gaussian_filter(sample, sigma, mode="reflect", truncate=4)`` does.

    x: [B, z, y, x] float32, C-contiguous, cpu or cuda; finite (a NaN spreads over its window, on the CPU further).
    sigma_vox_zyx: standard deviation in voxels, z y x, finite and >= 0: one triple for all samples or [B, 3]; nested
        sequence, NumPy array or CPU tensor (it decides the launch, so it must be on the host). An axis with 0, or
        with less than 1/8 voxel, where the window is one voxel, is left untouched bit for bit.
    out: float32 of x's shape and device, or None; may be x itself. Only where no gradient is required.

    Returns ``out`` or a new tensor. Differentiable in x. A sample's result does not depend on its batch-mates.
    Accuracy: the CPU path sums in float64 and rounds once. The CUDA kernel sums in float32 and stores float32 between
    the axes: off by at most (2 r + 4) 2**-24 max|x| for each axis, r the radius of its window.
    Raises KernelInputError, before any launch, for a wrong type, dtype, shape, device or memory order, a sigma that
    is negative or not finite, and an axis that with its window exceeds 12,288 voxels.
    Source: FreeTumor, Eq. 1 (g, "the Gaussian filter to blur the textures"); truncation and boundary are those of
    the released code's blurs.
    """
    require_tensor(_NAME, "x", x, (torch.float32,))
    sigma = _sigma_rows(sigma_vox_zyx, x)
    if torch.is_grad_enabled() and x.requires_grad:
        if out is not None:
            raise KernelInputError(
                f"{_NAME}: out was given but x requires a gradient; want a new tensor. "
                "Drop out, or call under torch.no_grad()."
            )
        blurred: Tensor = _Blur.apply(x, sigma)
        return blurred
    out = require_output(_NAME, out, torch.float32, tuple(x.shape), x.device, may_be=[("x", x)])
    _blur(x, sigma, out)
    return out


def window(sigma_vox: float) -> NDArray[np.float64]:
    """Weights of the 2 r + 1 taps for one sigma, summing to 1, with SciPy's radius r = int(4 sigma + 0.5)."""
    radius = int(TRUNCATE * sigma_vox + 0.5)
    if radius == 0:
        return np.ones(1)
    weights: NDArray[np.float64] = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma_vox) ** 2)
    return weights / weights.sum()


class _Blur(torch.autograd.Function):
    """The blur with its gradient; applied to the gradient again, so that higher derivatives exist too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sigma: NDArray[np.float64]) -> Tensor:
        ctx.sigma = sigma
        out = torch.empty_like(x)
        _blur(x.detach(), sigma, out)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gaussian_blur(gradients[0].contiguous(), ctx.sigma), None


def _sigma_rows(sigma_vox_zyx: Any, x: Tensor) -> NDArray[np.float64]:
    """Sigma as [B, 3], checked."""
    sigma = host_floats(_NAME, "sigma_vox_zyx", sigma_vox_zyx)
    if sigma.shape not in {(3,), (x.shape[0], 3)}:
        raise KernelInputError(
            f"{_NAME}: sigma_vox_zyx has shape {sigma.shape}; want (3,) or ({x.shape[0]}, 3): z, y, x in voxels. "
            "Repeat one value for each axis."
        )
    if sigma.size and sigma.min() < 0:
        raise KernelInputError(
            f"{_NAME}: sigma_vox_zyx holds {sigma.min()}; want 0 or more voxels. "
            "Check the spacing it was computed with."
        )
    padded = np.array(x.shape[1:]) + 2 * np.floor(TRUNCATE * sigma + 0.5)
    if padded.size and padded.max() > MAX_LINE_VOX:
        raise KernelInputError(
            f"{_NAME}: an axis with its window takes {int(padded.max())} voxels (shape_zyx={tuple(x.shape[1:])}, "
            f"largest sigma {sigma.max()}); want at most {MAX_LINE_VOX}. Give sigma in voxels, not micrometres."
        )
    return np.broadcast_to(sigma, (x.shape[0], 3)).astype(np.float64)


def _blur(x: Tensor, sigma: NDArray[np.float64], out: Tensor) -> None:
    if x.numel() == 0:
        return
    if _launch.uses_kernel(x):
        _blur_by_kernel(x, sigma, out)
    else:
        for sample, result, row in zip(x, out, sigma, strict=True):
            result.copy_(_blur_sample(sample, row))


def _blur_sample(sample: Tensor, sigma_zyx: NDArray[np.float64]) -> Tensor:
    """One volume, axis by axis, as matrix products: five times faster here than a weighted sum of shifted copies.

    In float64, which neither autocast nor torch's float32 precision switches touch, and sample by sample, so that
    nothing but the sample decides its bits.
    """
    nz, ny, nx = sample.shape
    z, y, x = (window(sigma) for sigma in sigma_zyx)
    if len(z) == len(y) == len(x) == 1:
        return sample
    result = sample.to(torch.float64)
    if len(z) > 1:
        result = _blur_rows(z, result.view(1, nz, ny * nx)).view(nz, ny, nx)
    if len(y) > 1:
        result = _blur_rows(y, result)
    if len(x) > 1:
        result = _blur_rows(x, result.view(1, nz * ny, nx).transpose(1, 2)).transpose(1, 2).view(nz, ny, nx)
    return result


def _blur_rows(weights: NDArray[np.float64], stack: Tensor) -> Tensor:
    """Blur [n, rows, columns] along the rows; the result has the strides of ``stack``.

    Block by block: the rows of one product need only the voxels that their windows reach, so that the cost of a long
    axis grows with its window, not with the square of its length.
    """
    count, num_rows, _ = stack.shape
    radius = len(weights) // 2
    out = torch.empty_like(stack)
    for start in range(0, num_rows, _ROWS_PER_PRODUCT):
        stop = min(start + _ROWS_PER_PRODUCT, num_rows)
        first, last = max(0, start - radius), min(num_rows, stop + radius)
        matrix = _folded_windows(weights, num_rows, start, stop)[:, first:last]
        torch.bmm(matrix.expand(count, *matrix.shape), stack[:, first:last], out=out[:, start:stop])
    return out


def _folded_windows(weights: NDArray[np.float64], length: int, start: int, stop: int) -> Tensor:
    """Rows start..stop of an axis' blur as a matrix: every voxel's weight for the row's, windows folded at the ends."""
    radius = len(weights) // 2
    voxels, rows = np.arange(start, stop), np.arange(stop - start)
    matrix = np.zeros((stop - start, length))
    for tap, weight in zip(range(-radius, radius + 1), weights, strict=True):
        inside = (voxels + tap) % (2 * length)
        matrix[rows, np.where(inside < length, inside, 2 * length - 1 - inside)] += weight
    return torch.from_numpy(matrix)


def _blur_by_kernel(x: Tensor, sigma: NDArray[np.float64], out: Tensor) -> None:
    """One launch an axis; the second and third work in place on ``out``."""
    batch, *shape = x.shape
    windows = [[window(sigma[b, axis]) for b in range(batch)] for axis in range(3)]
    radii = np.array([[len(w) // 2 for w in row] for row in windows], dtype=np.int32)
    weights = np.zeros((3, batch, 2 * int(radii.max()) + 1), dtype=np.float32)
    for axis, row in enumerate(windows):
        for b, w in enumerate(row):
            weights[axis, b, : len(w)] = w
    weights_on_device = _launch.to_device(weights, x.device)
    radii_on_device = _launch.to_device(radii, x.device)

    source = x
    for axis in range(3):
        largest = int(radii[axis].max())
        if largest == 0:
            continue
        length = shape[axis]
        lines = shape[0] * shape[1] * shape[2] // length
        lines_per_block = _lines_per_block(length + 2 * largest)
        _launch.launch(
            _FILE,
            "blur_axis",
            (batch * -(-lines // lines_per_block),),
            (_THREADS,),
            (
                _launch.pointer(out),
                _launch.pointer(source),
                _launch.pointer(weights_on_device[axis]),
                _launch.pointer(radii_on_device[axis]),
                np.int32(weights.shape[2]),
                np.int32(length),
                np.int32(np.prod(shape[axis + 1 :], dtype=np.int64)),
                np.int32(lines),
                np.int32(lines_per_block),
            ),
            x.device,
            shared_bytes=4 * (length + 2 * largest) * (lines_per_block | 1),
        )
        source = out
    if source is x and out.data_ptr() != x.data_ptr():
        out.copy_(x)


def _lines_per_block(padded: int) -> int:
    """Most lines, a power of two up to a warp's width, that fit shared memory with their windows; one always does."""
    lines = 32
    while lines > 1 and padded * (lines | 1) > _SHARED_FLOATS:
        lines //= 2
    return lines
