"""Scores of a predicted volume: Dice, every true tumour on its own, false positives."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.ndimage as ndi
from numpy.typing import NDArray

from ftengine.bench.experiments.few_labels.protocol import Scoring
from ftengine.geometry import FloatZYX

_NEIGHBOURS = np.ones((3, 3, 3), dtype=bool)


@dataclass(frozen=True)
class TrueTumor:
    """A tumour of the truth: where its centre lies, and its kind (``volume.phantom.KINDS``)."""

    center_zyx: tuple[float, float, float]
    kind: str


@dataclass(frozen=True)
class FoundTumor:
    """One component of the truth. diameter_mm: of the ball of its volume; overlap: share of its voxels that are predicted."""

    kind: str
    diameter_mm: float
    overlap: float


@dataclass(frozen=True)
class VolumeScore:
    """One predicted volume. dice: None without a tumour in the truth; ``_anywhere``: predictions outside the organ count too.

    scanner: index into ``volume.phantom.SCANNERS``.
    """

    case: str
    scanner: int
    dice: float | None
    dice_anywhere: float | None
    num_false: int
    num_false_anywhere: int
    tumors: tuple[FoundTumor, ...]


def score_volume(
    case: str,
    predicted: NDArray[np.bool_],
    tumor: NDArray[np.bool_],
    organ: NDArray[np.bool_],
    placed: Sequence[TrueTumor],
    *,
    scanner: int,
    spacing_mm_zyx: FloatZYX,
    scoring: Scoring,
) -> VolumeScore:
    """Score a predicted tumour mask against the truth, all bool [z, y, x]; ``organ`` includes the tumour.

    A component of the truth (26 neighbours) has the kind of the placed tumour whose centre is nearest to its own.
    """
    inside = predicted & organ
    components, num = ndi.label(tumor, structure=_NEIGHBOURS)
    centers = [(c[0], c[1], c[2]) for c in ndi.center_of_mass(tumor, components, range(1, num + 1))]
    voxel_mm3 = float(np.prod(spacing_mm_zyx))
    tumors = []
    for number, center in enumerate(centers, start=1):
        own = components == number
        voxels = int(own.sum())
        diameter_mm = float((6.0 / np.pi * voxels * voxel_mm3) ** (1.0 / 3.0))
        tumors.append(FoundTumor(_nearest_kind(center, placed), diameter_mm, float(inside[own].mean())))
    return VolumeScore(
        case,
        scanner,
        _dice(inside, tumor),
        _dice(predicted, tumor),
        _num_false(inside, tumor, scoring.min_false_voxels),
        _num_false(predicted, tumor, scoring.min_false_voxels),
        tuple(tumors),
    )


def summarize(scores: Sequence[VolumeScore], scoring: Scoring, seen_scanners: Sequence[int]) -> dict[str, float | None]:
    """The figures of a test set; one without anything to take it from is None."""
    ill = [s for s in scores if s.dice is not None]
    healthy = [s for s in scores if s.dice is None]
    tumors = [t for s in ill for t in s.tumors]
    small = [t for t in tumors if t.diameter_mm < scoring.small_mm]
    large = [t for t in tumors if t.diameter_mm >= scoring.small_mm]
    seen = set(seen_scanners)
    figures: dict[str, float | None] = {
        "dice": _mean([s.dice for s in ill]),
        "dice_anywhere": _mean([s.dice_anywhere for s in ill]),
        "dice_seen_scanners": _mean([s.dice for s in ill if s.scanner in seen]),
        "dice_unseen_scanners": _mean([s.dice for s in ill if s.scanner not in seen]),
        "small_any": _found(small, 0.0),
        "small_half": _found(small, scoring.half_overlap),
        "large_any": _found(large, 0.0),
        "large_half": _found(large, scoring.half_overlap),
        "false_per_tumor_volume": _mean([s.num_false for s in ill]),
        "false_per_healthy_volume": _mean([s.num_false for s in healthy]),
        "false_anywhere_per_tumor_volume": _mean([s.num_false_anywhere for s in ill]),
        "false_anywhere_per_healthy_volume": _mean([s.num_false_anywhere for s in healthy]),
    }
    for kind in ("hypo", "hyper", "rim"):
        figures[f"{kind}_any"] = _found([t for t in tumors if t.kind == kind], 0.0)
        figures[f"{kind}_half"] = _found([t for t in tumors if t.kind == kind], scoring.half_overlap)
    return figures


def count_tumors(scores: Sequence[VolumeScore], scoring: Scoring) -> dict[str, int]:
    """How many true tumours the sensitivities are taken of."""
    tumors = [t for s in scores for t in s.tumors]
    kinds: Mapping[str, int] = {kind: sum(t.kind == kind for t in tumors) for kind in ("hypo", "hyper", "rim")}
    return {"all": len(tumors), "small": sum(t.diameter_mm < scoring.small_mm for t in tumors), **kinds}


def _nearest_kind(center: tuple[float, float, float], placed: Sequence[TrueTumor]) -> str:
    return min(placed, key=lambda t: sum((a - b) ** 2 for a, b in zip(t.center_zyx, center, strict=True))).kind


def _dice(predicted: NDArray[np.bool_], truth: NDArray[np.bool_]) -> float | None:
    if not truth.any():
        return None
    return float(2 * (predicted & truth).sum() / (predicted.sum() + truth.sum()))


def _num_false(predicted: NDArray[np.bool_], truth: NDArray[np.bool_], min_voxels: int) -> int:
    components, num = ndi.label(predicted, structure=_NEIGHBOURS)
    sizes = np.bincount(components.ravel(), minlength=num + 1)
    hits = np.bincount(components[truth], minlength=num + 1)
    return int(((sizes >= min_voxels) & (hits == 0))[1:].sum())


def _found(tumors: Sequence[FoundTumor], least: float) -> float | None:
    """Share of tumours with more than nothing, or at least ``least``, of their voxels predicted."""
    return _mean([float(t.overlap >= least and t.overlap > 0) for t in tumors])


def _mean(values: Sequence[Any]) -> float | None:
    return float(np.mean(values)) if values else None
