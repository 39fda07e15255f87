"""Where each value of a label lies, found in one pass and without arrays of the volume's size."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ftengine.geometry import IntZYX


@dataclass(frozen=True)
class ValueExtent:
    """The smallest box that holds every voxel of one label value, as slices in z, y and x, and their number."""

    box: tuple[slice, slice, slice]
    num_voxels: int

    @property
    def origin_zyx(self) -> IntZYX:
        """First index of the box on each axis."""
        z, y, x = self.box
        return int(z.start), int(y.start), int(x.start)


def value_extents(label: NDArray[np.uint8]) -> dict[int, ValueExtent]:
    """The extent of each value above 0 of a label [z, y, x], in the order of the values."""
    count = np.zeros(256, dtype=np.int64)
    # low and high: first index, and last index plus one, on each axis
    low = np.full((256, 3), np.iinfo(np.int64).max, dtype=np.int64)
    high = np.zeros((256, 3), dtype=np.int64)
    for z, plane in enumerate(label):
        inside = plane[plane != 0]
        if not inside.size:
            continue
        here = np.bincount(inside)
        count[: len(here)] += here
        for value in np.flatnonzero(here).tolist():
            equal = plane == value
            y, x = np.flatnonzero(equal.any(axis=1)), np.flatnonzero(equal.any(axis=0))
            low[value] = np.minimum(low[value], (z, y[0], x[0]))
            high[value] = np.maximum(high[value], (z + 1, y[-1] + 1, x[-1] + 1))
    found: dict[int, ValueExtent] = {}
    for value in np.flatnonzero(count).tolist():
        z_part, y_part, x_part = (slice(int(a), int(b)) for a, b in zip(low[value], high[value], strict=True))
        found[value] = ValueExtent((z_part, y_part, x_part), int(count[value]))
    return found
