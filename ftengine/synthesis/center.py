"""Where a tumour's centre goes: the margin of ``kernels.choose_center`` in voxels, and the law of the released code."""

import numpy as np
import scipy.ndimage as ndi
from numpy.typing import NDArray

from ftengine.geometry import FloatZYX, IntZYX, int_zyx, mm_to_vox


def margin_vox(margin_mm: float, spacing_mm_zyx: FloatZYX) -> IntZYX:
    """The whole voxels in ``margin_mm`` along each axis, as ``kernels.choose_center`` takes them."""
    return int_zyx(mm_to_vox(margin_mm, spacing_mm_zyx))


def choose_center_released(organ: NDArray[np.bool_], draw: tuple[float, float]) -> IntZYX:
    """The released law (reference 1.4): a slice in the middle 40 % of the organ's z range, a pixel of it eroded by 5 x 5.

    Where the slice has no pixel left, (0, 0, 0) is returned as in the released code: usually an empty mask.
    """
    slices = np.flatnonzero(organ.any(axis=(1, 2)))
    if not len(slices):
        return 0, 0, 0
    first, last = int(slices[0]), int(slices[-1])
    z = first + round((0.3 + 0.4 * draw[0]) * (last - first))
    pixels = np.argwhere(ndi.binary_erosion(organ[z], np.ones((5, 5), dtype=bool), border_value=1))
    if not len(pixels):
        return 0, 0, 0
    y, x = pixels[int(draw[1] * len(pixels))]
    return z, int(y), int(x)
