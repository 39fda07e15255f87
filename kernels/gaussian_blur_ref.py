"""The Gaussian blur, written out: every voxel is the weighted mean of its window, axis after axis, in float64."""

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray


def gaussian_blur_ref(x: ArrayLike, sigma_vox_zyx: ArrayLike) -> NDArray[np.float64]:
    """Blur one volume [z, y, x] or a batch [B, z, y, x] of them; sigma in voxels, z y x, one triple or [B, 3].

    Window of radius int(4 sigma + 0.5), weights exp(-k**2 / (2 sigma**2)) over their sum; beyond its ends an axis is
    mirrored at the outer face of the end voxel. As ``scipy.ndimage.gaussian_filter(..., mode="reflect",
    truncate=4)``.
    """
    volume = np.asarray(x, dtype=np.float64)
    sigma = np.asarray(sigma_vox_zyx, dtype=np.float64)
    if volume.ndim == 4:
        return np.stack(
            [gaussian_blur_ref(v, s) for v, s in zip(volume, np.broadcast_to(sigma, (len(volume), 3)), strict=True)]
        )
    for axis in range(3):
        volume = _blur_axis(volume, axis, float(sigma[axis]))
    return volume


def _blur_axis(volume: NDArray[np.float64], axis: int, sigma: float) -> NDArray[np.float64]:
    radius = int(4.0 * sigma + 0.5)
    if radius == 0:
        return volume
    weights = {k: math.exp(-(k**2) / (2 * sigma**2)) for k in range(-radius, radius + 1)}
    length = volume.shape[axis]
    period = np.concatenate([np.arange(length), np.arange(length)[::-1]])  # the axis, then the axis mirrored, and again
    blurred = np.zeros_like(volume)
    for k, weight in weights.items():
        blurred += weight * np.take(volume, period[(np.arange(length) + k) % len(period)], axis=axis)
    return blurred / sum(weights.values())
