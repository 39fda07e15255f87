"""The contrast of a tumour: its mean minus that of the organ in a ring around it."""

import math

import numpy as np
import scipy.ndimage as ndi
from numpy.typing import NDArray

from ftengine.geometry import FloatZYX

RING_MM = (1.5, 6.0)  # from the tumour's surface; what is nearer is blurred into it
MIN_RING_VOXELS = 8


def contrast_hu(
    image_hu: NDArray[np.floating] | NDArray[np.int16],
    tumor: NDArray[np.bool_],
    organ: NDArray[np.bool_],
    spacing_mm_zyx: FloatZYX,
) -> float:
    """Mean of ``image_hu`` in ``tumor`` minus its mean in the organ's voxels 1.5 to 6 mm away from it, in HU.

    All [z, y, x]; ``organ``: healthy voxels, without any tumour. NaN where the tumour is empty or the ring has fewer than 8 voxels.
    """
    place = ndi.find_objects(tumor.astype(np.uint8))
    if not place or place[0] is None:
        return math.nan
    reach = [math.ceil(RING_MM[1] / s) for s in spacing_mm_zyx]
    box = tuple(slice(max(0, s.start - r), s.stop + r) for s, r in zip(place[0], reach, strict=True))
    distance_mm = ndi.distance_transform_edt(~tumor[box], sampling=spacing_mm_zyx)
    ring = organ[box] & (distance_mm > RING_MM[0]) & (distance_mm <= RING_MM[1])
    if np.count_nonzero(ring) < MIN_RING_VOXELS:
        return math.nan
    image = image_hu[box]
    return float(image[tumor[box]].mean(dtype=np.float64) - image[ring].mean(dtype=np.float64))
