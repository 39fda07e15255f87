"""How well predictions agree with the truth: Dice (Eq. 9), surfaces and lesions of each class, and detection by volume (Eq. 7, 10, 11).

What is not defined is None, with these rules (docs/evaluation.md): Dice and surface Dice have no value where neither truth nor prediction
holds the class, and are 0 where one of the two does; HD95 has a value only where both do. Means are over the volumes whose truth holds
the class; how many of those have no HD95 because nothing was predicted is counted beside it.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ftengine.config import EvaluationConfig
from ftengine.errors import CaseError, FailureCode
from ftengine.evaluation.lesions import Lesions, ScoredLesion, match_lesions
from ftengine.evaluation.statistics import Interval, bootstrap_interval, proportion_interval, ratio_interval
from ftengine.evaluation.surface import surface_distances
from ftengine.geometry import FloatZYX
from ftengine.volume.labels import value_extents

DEFAULTS = EvaluationConfig()


@dataclass(frozen=True)
class ClassScore:
    """One class in one volume.

    dice: None where neither truth nor prediction holds the class. hd95_mm: None unless both hold it. surface_dice: as dice. lesions: of tumour classes. The last three are None where only overlaps were asked for.
    """

    dice: float | None
    truth_voxels: int
    predicted_voxels: int
    overlap_voxels: int
    hd95_mm: float | None = None
    surface_dice: float | None = None
    lesions: Lesions | None = None

    @property
    def outcome(self) -> str:
        """Volume-level detection as the paper counts it: tp where prediction and truth overlap at all; an empty truth gives fp or tn.

        A volume with a tumour and a prediction only beside it is a miss (fn).
        """
        if self.truth_voxels:
            return "tp" if self.overlap_voxels else "fn"
        return "fp" if self.predicted_voxels else "tn"


@dataclass(frozen=True)
class CaseScore:
    """All classes of one volume, by class name; the background is not scored."""

    case: str
    classes: dict[str, ClassScore]


@dataclass(frozen=True)
class FullScoring:
    """What more than overlaps needs: the voxels' sides, which classes are tumours, and the definitions."""

    spacing_mm_zyx: FloatZYX
    tumor_values: tuple[int, ...]
    settings: EvaluationConfig = DEFAULTS


def score_case(
    case: str,
    predicted: NDArray[np.uint8],
    truth: NDArray[np.uint8],
    labels: Mapping[str, int],
    full: FullScoring | None = None,
) -> CaseScore:
    """Score a predicted label map against the truth, both uint8 [z, y, x] on one grid. Raises CaseError where shapes differ.

    full: surfaces of all classes and lesions of the tumours, too; None: overlaps alone.
    """
    if predicted.shape != truth.shape:
        raise CaseError(
            f"{case}: the prediction has shape_zyx={predicted.shape}, the truth {truth.shape}; want the same grid.",
            "Bring the prediction to the grid of its truth.",
            code=FailureCode.GRID_MISMATCH,
        )
    true_extents, predicted_extents = value_extents(truth), value_extents(predicted)
    scores = {}
    for name, value in labels.items():
        if value == 0:
            continue
        found = [extents[value] for extents in (true_extents, predicted_extents) if value in extents]
        box = (
            tuple(
                slice(min(e.box[axis].start for e in found), max(e.box[axis].stop for e in found)) for axis in range(3)
            )
            if found
            else (slice(0, 0),) * 3
        )
        scores[name] = _score_class(predicted[box] == value, truth[box] == value, value, full)
    return CaseScore(case, scores)


def _score_class(
    predicted: NDArray[np.bool_], truth: NDArray[np.bool_], value: int, full: FullScoring | None
) -> ClassScore:
    """The masks of one class, cropped to the box of their union."""
    both, num_true, num_predicted = (int(np.count_nonzero(m)) for m in (predicted & truth, truth, predicted))
    total = num_true + num_predicted
    dice = 2.0 * both / total if total else None
    if full is None:
        return ClassScore(dice, num_true, num_predicted, both)
    hd95_mm, surface = None, 0.0 if total else None
    if num_true and num_predicted:
        distances = surface_distances(predicted, truth, full.spacing_mm_zyx, surface=full.settings.surface)
        hd95_mm = distances.hausdorff_mm()
        surface = distances.surface_dice(full.settings.tolerance_mm)
    is_tumor = value in full.tumor_values
    lesions = match_lesions(predicted, truth, full.spacing_mm_zyx, full.settings) if is_tumor else None
    return ClassScore(dice, num_true, num_predicted, both, hd95_mm, surface, lesions)


def summarize(scores: Sequence[CaseScore], settings: EvaluationConfig = DEFAULTS) -> dict[str, dict[str, Any]]:
    """Per class: means over the volumes whose truth holds it, and the detection figures of Eq. 7, 10 and 11; for JSON.

    A figure without any volume to take it from (no truth, no healthy volume) is None, never NaN. ``*_interval`` is [low, high] or None:
    by bootstrap over volumes for means, ratios of lesions and F1, exact for proportions of volumes.
    """
    return {
        name: _summarize_class([s.classes[name] for s in scores], settings)
        for name in (scores[0].classes if scores else ())
    }


def _summarize_class(scores: Sequence[ClassScore], settings: EvaluationConfig) -> dict[str, Any]:
    with_truth = [c for c in scores if c.truth_voxels]
    counts = {k: sum(c.outcome == k for c in scores) for k in ("tp", "fp", "tn", "fn")}
    tp, fp, tn, fn = counts.values()
    row: dict[str, Any] = {"num_volumes_with_truth": len(with_truth), **counts}
    row |= _mean("dice", [c.dice for c in with_truth], settings)
    row |= _mean("hd95_mm", [c.hd95_mm for c in with_truth], settings)
    row["num_without_hd95"] = sum(c.hd95_mm is None for c in with_truth)
    row |= _mean("surface_dice", [c.surface_dice for c in with_truth], settings)
    for name, part, whole in (("sensitivity", tp, tp + fn), ("specificity", tn, tn + fp), ("precision", tp, tp + fp)):
        row |= _proportion(name, part, whole, settings)
    # Eq. 10 with Eq. 11 put in
    hits = [(2 * (c.outcome == "tp"), 2 * (c.outcome == "tp") + (c.outcome in {"fp", "fn"})) for c in scores]
    row |= _ratio("f1", hits, settings)
    lesions = [c.lesions for c in scores if c.lesions is not None]
    row["lesions"] = _summarize_lesions(lesions, settings) if lesions else None
    row["small_volumes"] = _summarize_small_volumes(with_truth, settings) if lesions else None
    return row


def _summarize_small_volumes(with_truth: Sequence[ClassScore], settings: EvaluationConfig) -> dict[str, Any]:
    """Detection of the volumes whose true lesions are all small: the volume-level reading of Table A10."""
    small = [c for c in with_truth if c.lesions is not None and all(is_small(t, settings) for t in c.lesions.truth)]
    num_found = sum(c.outcome == "tp" for c in small)
    return {"num_volumes": len(small), "num_found": num_found} | _proportion(
        "sensitivity", num_found, len(small), settings
    )


def _summarize_lesions(volumes: Sequence[Lesions], settings: EvaluationConfig) -> dict[str, Any]:
    """Sums over all volumes, with and without true lesions."""
    predicted = [lesion for v in volumes for lesion in v.predicted]
    num_right = sum(lesion.matched for lesion in predicted)
    row = _found(volumes, settings, lambda _lesion: True)
    row |= {"num_predicted": len(predicted), "num_false_positives": len(predicted) - num_right}
    row |= _ratio("precision", [(sum(p.matched for p in v.predicted), len(v.predicted)) for v in volumes], settings)
    row["false_positives_per_volume"] = (len(predicted) - num_right) / len(volumes)
    recall, precision = row["sensitivity"], row["precision"]
    # Eq. 10 of lesions: found ones and right ones are two numbers where the rule is many to many
    row["f1"] = (
        None
        if recall is None or precision is None
        else (2 * recall * precision / (recall + precision) if recall + precision else 0.0)
    )
    sizes = {"small": lambda lesion: is_small(lesion, settings), "large": lambda lesion: not is_small(lesion, settings)}
    row["by_size"] = {size: _found(volumes, settings, chosen) for size, chosen in sizes.items()}
    return row


def is_small(lesion: ScoredLesion, settings: EvaluationConfig) -> bool:
    """Whether a lesion counts as small: its diameter is below ``small_mm``."""
    return lesion.diameter_mm < settings.small_mm


def _found(
    volumes: Sequence[Lesions], settings: EvaluationConfig, chosen: Callable[[ScoredLesion], bool]
) -> dict[str, Any]:
    """How many of the chosen true lesions were found."""
    of_volumes = [[lesion.matched for lesion in v.truth if chosen(lesion)] for v in volumes]
    found = [(sum(matched), len(matched)) for matched in of_volumes]
    row: dict[str, Any] = {"num_truth": sum(n for _, n in found), "num_found": sum(n for n, _ in found)}
    return row | _ratio("sensitivity", found, settings)


def _mean(name: str, values: Sequence[float | None], settings: EvaluationConfig) -> dict[str, Any]:
    present = [v for v in values if v is not None]
    interval = bootstrap_interval(present, confidence=settings.confidence) if present else None
    return _figure(name, interval)


def _proportion(name: str, part: int, whole: int, settings: EvaluationConfig) -> dict[str, Any]:
    return _figure(name, proportion_interval(part, whole, confidence=settings.confidence) if whole else None)


def _ratio(name: str, pairs: Collection[tuple[int, int]], settings: EvaluationConfig) -> dict[str, Any]:
    held = [(part, whole) for part, whole in pairs if whole]
    interval = ratio_interval(*zip(*held, strict=True), confidence=settings.confidence) if held else None
    return _figure(name, interval)


def _figure(name: str, interval: Interval | None) -> dict[str, Any]:
    if interval is None:
        return {name: None, f"{name}_interval": None}
    bounds = None if interval.low is None else [interval.low, interval.high]
    return {name: interval.mean, f"{name}_interval": bounds}
