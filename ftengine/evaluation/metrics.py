"""How well predictions agree with the truth: Dice (Eq. 9) per class, and detection at the level of volumes (Eq. 7, 10, 11)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ftengine.errors import CaseError, FailureCode


@dataclass(frozen=True)
class ClassScore:
    """One class in one volume. dice is NaN where neither truth nor prediction holds the class: there is nothing to score."""

    dice: float
    truth_voxels: int
    predicted_voxels: int
    overlap_voxels: int

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


def score_case(
    case: str, predicted: NDArray[np.uint8], truth: NDArray[np.uint8], labels: Mapping[str, int]
) -> CaseScore:
    """Score a predicted label map against the truth, both uint8 [z, y, x] on one grid. Raises CaseError where shapes differ."""
    if predicted.shape != truth.shape:
        raise CaseError(
            f"{case}: the prediction has shape_zyx={predicted.shape}, the truth {truth.shape}; want the same grid.",
            "Bring the prediction to the grid of its truth.",
            code=FailureCode.GRID_MISMATCH,
        )
    scores = {}
    for name, value in labels.items():
        if value == 0:
            continue
        p, t = predicted == value, truth == value
        both, total = int((p & t).sum()), int(p.sum()) + int(t.sum())
        scores[name] = ClassScore(2.0 * both / total if total else math.nan, int(t.sum()), int(p.sum()), both)
    return CaseScore(case, scores)


def summarize(scores: Sequence[CaseScore]) -> dict[str, dict[str, Any]]:
    """Per class: mean Dice over the volumes whose truth holds the class, and the detection figures of Eq. 7, 10 and 11.

    A figure without any volume to take it from (no truth, no healthy volume) is None, never NaN.
    """
    table = {}
    for name in scores[0].classes if scores else ():
        of_class = [s.classes[name] for s in scores]
        dice = [c.dice for c in of_class if c.truth_voxels]
        counts = {k: sum(c.outcome == k for c in of_class) for k in ("tp", "fp", "tn", "fn")}
        sensitivity = _ratio(counts["tp"], counts["tp"] + counts["fn"])
        precision = _ratio(counts["tp"], counts["tp"] + counts["fp"])
        table[name] = {
            "dice": float(np.mean(dice)) if dice else None,
            "num_volumes_with_truth": len(dice),
            "sensitivity": sensitivity,
            "specificity": _ratio(counts["tn"], counts["tn"] + counts["fp"]),
            "precision": precision,
            "f1": _ratio(2 * counts["tp"], 2 * counts["tp"] + counts["fp"] + counts["fn"]),  # Eq. 10 with Eq. 11 put in
            **counts,
        }
    return table


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None
