"""Distances between the surfaces of two masks, and what is read from them: HD95 and the normalised surface Dice.

Two definitions of a surface, each with the library that it equals (docs/evaluation.md):

========  =============================================================================================================================
elements  the triangles of marching cubes, each at a corner between 2 x 2 x 2 voxels, weighted by its area in mm2: ``surface-distance``
voxels    the voxels of a mask with a face neighbour outside it, each counted once: MONAI
========  =============================================================================================================================

What lies outside the array is background. Distances are exact: from each point of a surface to the nearest point of the other one, by a
k-d tree, which costs as much as the surfaces are large and not as much as the volume between them.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree
from surface_distance.lookup_tables import create_table_neighbour_code_to_surface_area

from ftengine.geometry import FloatZYX

Surface = Literal["elements", "voxels"]
_LEAF_POINTS = 32
_INSIDE = 255  # neighbour code of eight set voxels


@dataclass(frozen=True)
class Directed:
    """From each point of one surface to the nearest point of the other: distance_mm float64 [N], weight float64 [N] (mm2, or 1 each)."""

    distance_mm: NDArray[np.float64]
    weight: NDArray[np.float64]


@dataclass(frozen=True)
class SurfaceDistances:
    """Both directions between two surfaces of one kind."""

    surface: Surface
    truth_to_predicted: Directed
    predicted_to_truth: Directed

    def hausdorff_mm(self, percent: float = 95.0) -> float:
        """The larger of the two directed percentiles of distance, in mm; ``percent`` 100 is the Hausdorff distance.

        elements: the distance within which ``percent`` per cent of the area lies (``compute_robust_hausdorff``). voxels: the percentile
        of the distances, linear between neighbours (``compute_hausdorff_distance``).
        """
        return max(self._percentile(d, percent) for d in (self.truth_to_predicted, self.predicted_to_truth))

    def surface_dice(self, tolerance_mm: float) -> float:
        """Share of both surfaces, by weight, that lies at most ``tolerance_mm`` from the other one: 0 to 1.

        elements: ``compute_surface_dice_at_tolerance``. voxels: MONAI's ``compute_surface_dice``. Source: Nikolov et al., Deep learning to
        achieve clinically applicable segmentation of head and neck anatomy for radiotherapy, 2018.
        """
        both = (self.truth_to_predicted, self.predicted_to_truth)
        near = sum(float(d.weight[d.distance_mm <= tolerance_mm].sum()) for d in both)
        return near / sum(float(d.weight.sum()) for d in both)

    def _percentile(self, directed: Directed, percent: float) -> float:
        if self.surface == "voxels":
            return float(np.percentile(directed.distance_mm, percent))
        # areas among equal distances in order, too: the sums round as those of surface-distance
        order = np.lexsort((directed.weight, directed.distance_mm))
        weight = directed.weight[order]
        share = np.cumsum(weight) / weight.sum()
        reached = int(np.searchsorted(share, percent / 100.0))
        return float(directed.distance_mm[order[min(reached, len(order) - 1)]])


def surface_distances(
    predicted: NDArray[np.bool_], truth: NDArray[np.bool_], spacing_mm_zyx: FloatZYX, *, surface: Surface = "elements"
) -> SurfaceDistances:
    """Distances between the surfaces of two masks, bool [z, y, x] of one shape, spacing in mm.

    Crop both to the box of their union before: the distances are the same, and the time is that of the crop. Raises ValueError where one
    is empty or the shapes differ: there is no distance.
    """
    if predicted.shape != truth.shape or not predicted.any() or not truth.any():
        raise ValueError(
            f"surface_distances: masks of shapes {predicted.shape} and {truth.shape}; want one shape and no empty mask."
        )
    if surface == "voxels":
        is_truth, is_predicted = _border(truth), _border(predicted)
        weights = (np.ones(int(is_truth.sum())), np.ones(int(is_predicted.sum())))
    else:
        truth_code, predicted_code = neighbour_code(truth), neighbour_code(predicted)
        is_truth, is_predicted = (((c != 0) & (c != _INSIDE)) for c in (truth_code, predicted_code))
        area_mm2 = _element_areas(spacing_mm_zyx)
        weights = (area_mm2[truth_code[is_truth]], area_mm2[predicted_code[is_predicted]])
    return SurfaceDistances(
        surface,
        Directed(_nearest_mm(is_truth, is_predicted, spacing_mm_zyx), weights[0]),
        Directed(_nearest_mm(is_predicted, is_truth, spacing_mm_zyx), weights[1]),
    )


def neighbour_code(mask: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """The 8 voxels around each corner of the voxel grid as bits: uint8 [z + 1, y + 1, x + 1].

    The highest bit is the voxel before the corner on every axis, the next one its neighbour behind it along x, and so on in C order: the
    code of ``surface-distance``.
    """
    code = np.pad(mask, 1).view(np.uint8)
    code = (code[:, :, :-1] << np.uint8(1)) | code[:, :, 1:]
    code = (code[:, :-1] << np.uint8(2)) | code[:, 1:]
    return (code[:-1] << np.uint8(4)) | code[1:]


def _border(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Set voxels with one of the six face neighbours outside the mask or outside the array."""
    inside = mask.copy()
    for axis in range(3):
        low, high = [slice(None)] * 3, [slice(None)] * 3
        low[axis], high[axis] = slice(None, -1), slice(1, None)
        inside[tuple(high)] &= mask[tuple(low)]
        inside[tuple(low)] &= mask[tuple(high)]
        for end in (0, -1):
            inside[(slice(None),) * axis + (end,)] = False
    return mask & ~inside


def _nearest_mm(start: NDArray[np.bool_], target: NDArray[np.bool_], spacing_mm_zyx: FloatZYX) -> NDArray[np.float64]:
    """Distance from each point of ``start`` (in C order) to the nearest of ``target``; points of both have none to go."""
    distance_mm = np.zeros(int(np.count_nonzero(start)))
    away = ~target[start]
    if not away.any():
        return distance_mm
    spacing = np.array(spacing_mm_zyx)
    starts, targets = np.argwhere(start)[away], np.argwhere(target)
    tree = cKDTree(targets * spacing, leafsize=_LEAF_POINTS, compact_nodes=False, balanced_tree=False)
    nearest = tree.query(starts * spacing)[1]
    # from whole steps, as a distance transform has it: coordinates in mm would add their rounding to a distance that equals a tolerance
    distance_mm[away] = np.sqrt(np.square((starts - targets[nearest]) * spacing).sum(axis=1))
    return distance_mm


@lru_cache(maxsize=64)
def _element_areas(spacing_mm_zyx: FloatZYX) -> NDArray[np.float64]:
    """Area in mm2 by neighbour code, float64 [256]."""
    areas: NDArray[np.float64] = create_table_neighbour_code_to_surface_area(spacing_mm_zyx)
    areas.flags.writeable = False
    return areas
