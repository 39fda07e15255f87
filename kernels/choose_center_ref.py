"""The choice of a centre as it is told: erode voxel by voxel, list what is left, take one."""

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray


def eroded_ref(organ: ArrayLike, margin_vox_zyx: tuple[int, int, int]) -> NDArray[np.bool_]:
    """bool [z, y, x]: organ voxels whose box of 2 margin + 1 voxels holds nothing but organ, inside the patch."""
    voxels = np.asarray(organ) != 0
    left = np.zeros_like(voxels)
    for place in np.argwhere(voxels):
        box = tuple(slice(max(0, p - m), p + m + 1) for p, m in zip(place, margin_vox_zyx, strict=True))
        left[tuple(place)] = voxels[box].all()
    return left


def choose_center_ref(organ: ArrayLike, margin_vox_zyx: tuple[int, int, int], draw: float) -> tuple[int, ...]:
    """One sample: organ [z, y, x], three margins, a draw in [0, 1) -> z y x, or -1 three times without an organ."""
    candidates = np.argwhere(eroded_ref(organ, margin_vox_zyx))
    if len(candidates) == 0:
        candidates = np.argwhere(np.asarray(organ) != 0)
    if len(candidates) == 0:
        return -1, -1, -1
    return tuple(int(c) for c in candidates[math.floor(draw * len(candidates))])
