"""Single lesions of a label: connected components with their size."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

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
    # importing SciPy for the same takes a third of a second, in every worker; what scores stores alone need not have it
    import SimpleITK as sitk

    voxel_ml = float(np.prod(spacing_mm_zyx)) / 1000.0
    extents = value_extents(label)
    lesions = []
    for value in values:
        if value not in extents:
            continue
        selected = (label[extents[value].box] == value).view(np.uint8)
        image = sitk.ConnectedComponent(sitk.GetImageFromArray(selected), True)  # numbered in C order of first voxels
        components = sitk.GetArrayViewFromImage(image)
        shapes = sitk.LabelShapeStatisticsImageFilter()
        shapes.ComputePerimeterOff()
        shapes.Execute(image)
        for number in shapes.GetLabels():
            x, y, z, nx, ny, nz = shapes.GetBoundingBox(number)
            voxels = components[z : z + nz, y : y + ny, x : x + nx] == number
            count = int(shapes.GetNumberOfPixels(number))
            lesions.append(Lesion(value, count, count * voxel_ml, axial_diameter_mm(voxels, spacing_mm_zyx)))
    return lesions


def axial_diameter_mm(voxels: NDArray[np.bool_], spacing_mm_zyx: FloatZYX) -> float:
    """Longest distance between two voxel borders of one axial slice (the WHO measure): the largest distance of voxel centres plus one voxel.

    voxels: [z, y, x] with at least one set voxel.
    """
    spacing_yx = spacing_mm_zyx[1:]
    bounds = []  # no two voxels of a slice are farther apart than the corners of its bounding box
    for z in np.flatnonzero(voxels.any(axis=(1, 2))).tolist():
        lengths = [np.ptp(np.flatnonzero(voxels[z].any(axis=1 - axis))) for axis in range(2)]
        bounds.append((math.hypot(*(n * mm for n, mm in zip(lengths, spacing_yx, strict=True))), z))
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
    rows = np.flatnonzero(plane.any(axis=1))
    first = plane[rows].argmax(axis=1)
    last = plane.shape[1] - 1 - plane[rows, ::-1].argmax(axis=1)
    # only the two ends of each row can be farthest apart
    y, x = np.tile(rows, 2) * spacing_yx[0], np.concatenate([first, last]) * spacing_yx[1]
    squares = np.square(np.subtract.outer(y, y)) + np.square(np.subtract.outer(x, x))
    return float(np.sqrt(squares.max()) + spacing_yx.mean())
