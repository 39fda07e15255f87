"""A patch from a padded read, one operation after the other, in float64."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ftengine.geometry import IntZYX


def prepare_patch_ref(
    image: ArrayLike,
    label: ArrayLike,
    *,
    shape_zyx: IntZYX,
    window_hu: tuple[float, float],
    origin_zyx: Sequence[Sequence[int]],
    transpose_yx: Sequence[bool],
    flip_zyx: Sequence[Sequence[bool]],
    scale: Sequence[float],
    shift: Sequence[float],
) -> tuple[NDArray[np.float64], NDArray[np.uint8]]:
    """image, label: [B, Z, Y, X] -> [B, z, y, x]: crop, transpose of y and x, flips, window to [0, 1], scale, shift, clip."""
    low, high = window_hu
    images, labels = [], []
    for b, origin in enumerate(origin_zyx):
        z, y, x = shape_zyx
        crop = (z, x, y) if transpose_yx[b] else (z, y, x)
        box = tuple(slice(start, start + length) for start, length in zip(origin, crop, strict=True))
        axes = tuple(axis for axis in range(3) if flip_zyx[b][axis])
        hu, classes = np.asarray(image)[b][box].astype(np.float64), np.asarray(label)[b][box]
        if transpose_yx[b]:
            hu, classes = hu.transpose(0, 2, 1), classes.transpose(0, 2, 1)
        unit = np.clip((np.flip(hu, axes) - low) / (high - low), 0, 1)
        images.append(np.clip(unit * scale[b] + shift[b], 0, 1))
        labels.append(np.flip(classes, axes))
    shape = (len(images), *shape_zyx)
    return np.array(images, dtype=np.float64).reshape(shape), np.array(labels, dtype=np.uint8).reshape(shape)
