"""Single lesions of a label: connected components with their size."""

import math
from dataclasses import dataclass

import numpy as np
import scipy.ndimage as ndi
from numpy.typing import NDArray
from scipy.spatial import ConvexHull, QhullError
from scipy.spatial.distance import pdist

from ftengine.geometry import FloatZYX
from ftengine.volume.labels import value_extents


@dataclass(frozen=True)
class Lesion:
    """One connected component: its label value, volume and longest axial diameter."""

    value: int
    num_voxels: int
    volume_ml: float
    diameter_mm: float


def find_lesions(label: NDArray[np.uint8], values: tuple[int, ...], spacing_mm_zyx: FloatZYX) -> list[Lesion]:
    """The 26-connected components of each label value, ordered by value, then by position.

    ``diameter_mm`` is ``axial_diameter_mm`` of the component.
    """
    voxel_ml = float(np.prod(spacing_mm_zyx)) / 1000.0
    extents = value_extents(label)
    lesions = []
    for value in values:
        if value not in extents:
            continue
        selected = label[extents[value].box] == value
        components, _ = ndi.label(selected, structure=np.ones((3, 3, 3)))
        for number, place in enumerate(ndi.find_objects(components), start=1):
            voxels = components[place] == number
            count = int(voxels.sum())
            lesions.append(Lesion(value, count, count * voxel_ml, axial_diameter_mm(voxels, spacing_mm_zyx)))
    return lesions


def axial_diameter_mm(voxels: NDArray[np.bool_], spacing_mm_zyx: FloatZYX) -> float:
    """Longest distance between two voxel borders of one axial slice (the WHO measure): the largest distance of voxel centres plus one voxel.

    voxels: [z, y, x] with at least one set voxel.
    """
    spacing_yx = spacing_mm_zyx[1:]
    bounds = []  # no two voxels of a slice are farther apart than the corners of its bounding box
    for z in np.flatnonzero(voxels.any(axis=(1, 2))).tolist():
        box = ndi.find_objects(voxels[z].astype(np.uint8))[0]
        bounds.append((math.hypot(*((s.stop - s.start - 1) * mm for s, mm in zip(box, spacing_yx, strict=True))), z))
    voxel_mm = sum(spacing_yx) / 2
    longest = 0.0
    for bound, z in sorted(bounds, reverse=True):
        if bound + voxel_mm <= longest:
            break
        longest = max(longest, _longest_distance_mm(voxels[z], spacing_mm_zyx))
    return longest


def _longest_distance_mm(plane: NDArray[np.bool_], spacing_mm_zyx: FloatZYX) -> float:
    """Largest distance of two voxel centres of an axial (y, x) plane, plus one voxel (the mean of its two sides)."""
    spacing_yx = np.array(spacing_mm_zyx[1:])
    points = np.argwhere(plane) * spacing_yx
    if len(points) > 16:  # only corners of the hull can be farthest apart
        try:
            points = points[ConvexHull(points).vertices]
        except QhullError:  # all on one line: the two ends are enough
            order = np.lexsort(points.T)
            points = points[order[[0, -1]]]
    longest = float(pdist(points).max()) if len(points) > 1 else 0.0
    return longest + float(spacing_yx.mean())
