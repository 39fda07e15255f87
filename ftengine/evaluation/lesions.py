"""Single lesions of a class: which true ones were found, which predicted ones are wrong, and how large each is.

A lesion is a connected component of the class. Rules for a match (``evaluation.match``):

=======  ==================================================================  ======================================================
rule     a true lesion is found where                                        a predicted one is right where
=======  ==================================================================  ======================================================
any      one of its voxels is predicted                                      one of its voxels is true; many to many
overlap  at least ``match_fraction`` of its voxels are predicted, by         at least ``match_fraction`` of its voxels are true;
         however many components                                             many to many
iou      it is paired with a predicted one of at least this intersection     it is paired; one to one, the pairing with the most pairs,
         over union                                                          and among those the largest sum of IoU
=======  ==================================================================  ======================================================

Diameters (``evaluation.diameter``): ``axial`` (WHO, ``volume.lesions``), ``3d`` (the same in space: the largest distance of two voxel
centres plus the mean of a voxel's three sides), ``equivalent`` (of the ball of the same volume).
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import scipy.ndimage as ndi
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from scipy.spatial import ConvexHull, QhullError
from scipy.spatial.distance import pdist

from ftengine.config import EvaluationConfig
from ftengine.geometry import FloatZYX
from ftengine.volume.lesions import axial_diameter_mm

Diameter = Literal["axial", "3d", "equivalent"]
_RANKS = {6: 1, 18: 2, 26: 3}  # SciPy counts the axes along which neighbours may differ
_HULL_FROM_POINTS = 500  # below, all pairs are as fast as their hull


@dataclass(frozen=True)
class ScoredLesion:
    """One component: its size, and whether the other side has it too (a true one found, a predicted one right)."""

    diameter_mm: float
    volume_ml: float
    matched: bool


@dataclass(frozen=True)
class Lesions:
    """The lesions of one class in one volume, each side in C order of first voxels."""

    truth: tuple[ScoredLesion, ...]
    predicted: tuple[ScoredLesion, ...]


def match_lesions(
    predicted: NDArray[np.bool_], truth: NDArray[np.bool_], spacing_mm_zyx: FloatZYX, scoring: EvaluationConfig
) -> Lesions:
    """Compare the lesions of two masks, bool [z, y, x] of one shape with axial slices along z."""
    structure = ndi.generate_binary_structure(3, _RANKS[scoring.connectivity])
    true_map, num_true = ndi.label(truth, structure)
    predicted_map, num_predicted = ndi.label(predicted, structure)
    both = truth & predicted
    # voxels that each pair of components shares
    shared = np.zeros((num_true, num_predicted), dtype=np.int64)
    pairs, counts = np.unique(np.stack([true_map[both], predicted_map[both]]), axis=1, return_counts=True)
    shared[pairs[0] - 1, pairs[1] - 1] = counts
    true_voxels = np.bincount(true_map.ravel(), minlength=num_true + 1)[1:]
    predicted_voxels = np.bincount(predicted_map.ravel(), minlength=num_predicted + 1)[1:]
    found, right = _matched(shared, true_voxels, predicted_voxels, scoring)
    return Lesions(
        _scored(true_map, true_voxels, found, spacing_mm_zyx, scoring.diameter),
        _scored(predicted_map, predicted_voxels, right, spacing_mm_zyx, scoring.diameter),
    )


def diameter_mm(voxels: NDArray[np.bool_], spacing_mm_zyx: FloatZYX, kind: Diameter) -> float:
    """Diameter of a component, bool [z, y, x] with at least one set voxel, in mm."""
    if kind == "axial":
        return axial_diameter_mm(voxels, spacing_mm_zyx)
    if kind == "equivalent":
        return float(np.cbrt(6.0 * np.count_nonzero(voxels) * math.prod(spacing_mm_zyx) / math.pi))
    rows = np.argwhere(voxels.any(axis=2))
    kept = voxels[rows[:, 0], rows[:, 1]]
    first, last = kept.argmax(axis=1), voxels.shape[2] - 1 - kept[:, ::-1].argmax(axis=1)
    # only the two ends of a row along x can be farthest apart
    ends = np.unique(np.concatenate([np.column_stack((rows, x)) for x in (first, last)]), axis=0)
    points = np.asarray(ends * np.array(spacing_mm_zyx), dtype=np.float64)
    if len(points) > _HULL_FROM_POINTS:
        points = _corners(points)
    longest = float(pdist(points).max()) if len(points) > 1 else 0.0
    return longest + sum(spacing_mm_zyx) / 3


def _corners(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """The points [N, 3] between which the largest distance lies; all of them where they lie in a plane."""
    try:
        return points[ConvexHull(points).vertices]
    except QhullError:
        return points


def _matched(
    shared: NDArray[np.int64],
    true_voxels: NDArray[np.int64],
    predicted_voxels: NDArray[np.int64],
    scoring: EvaluationConfig,
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """(found, right) by the rule; shared: int64 [true, predicted] voxels in common."""
    if scoring.match == "any":
        hit = shared > 0
        return np.asarray(hit.any(axis=1)), np.asarray(hit.any(axis=0))
    least = scoring.match_fraction
    if scoring.match == "overlap":
        covered = (shared.sum(axis=1) >= least * true_voxels, shared.sum(axis=0) >= least * predicted_voxels)
        return np.asarray(covered[0]), np.asarray(covered[1])
    iou = shared / np.maximum(true_voxels[:, None] + predicted_voxels[None] - shared, 1)
    # one pair more outweighs whatever the others could gain in IoU
    worth = np.where(iou >= least, 1.0 + iou / (min(iou.shape, default=0) + 1), 0.0)
    chosen = linear_sum_assignment(worth, maximize=True)
    found, right = np.zeros(len(true_voxels), dtype=bool), np.zeros(len(predicted_voxels), dtype=bool)
    for t, p in zip(*chosen, strict=True):
        found[t] = right[p] = worth[t, p] > 0
    return found, right


def _scored(
    components: NDArray[np.signedinteger],
    num_voxels: NDArray[np.int64],
    matched: NDArray[np.bool_],
    spacing_mm_zyx: FloatZYX,
    kind: Diameter,
) -> tuple[ScoredLesion, ...]:
    if not len(num_voxels):
        return ()
    voxel_ml = math.prod(spacing_mm_zyx) / 1000.0
    return tuple(
        ScoredLesion(
            diameter_mm(components[place] == number + 1, spacing_mm_zyx, kind),
            float(num_voxels[number] * voxel_ml),
            bool(matched[number]),
        )
        for number, place in enumerate(ndi.find_objects(components))
    )
