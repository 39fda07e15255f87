"""How well readers agree, with themselves and with each other, and how far their confidence tells real from synthetic."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ftengine.evaluation.statistics import Interval

NUM_RESAMPLES = 2000
_CONFIDENCE = 0.95


def rating(*, synthetic: bool, confidence: int) -> int:
    """A forced choice with a confidence of 1 to 5 on one scale: -5, surely real, to 5, surely synthetic."""
    return confidence if synthetic else -confidence


def cohen_kappa(first: Sequence[bool], second: Sequence[bool]) -> float | None:
    """Agreement of two passes over the same cases, beyond chance (Cohen, 1960).

    None where nothing is shared, and where chance alone agrees always (all answers alike). Raises ValueError for unequal lengths.
    """
    a, b = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    if a.shape != b.shape:
        raise ValueError(f"cohen_kappa: {a.size} and {b.size} answers; want pairs.")
    if not a.size:
        return None
    by_chance = a.mean() * b.mean() + (1 - a.mean()) * (1 - b.mean())
    return None if by_chance == 1 else float(((a == b).mean() - by_chance) / (1 - by_chance))


def fleiss_kappa(votes: NDArray[np.int64]) -> float | None:
    """Agreement of more than two raters, beyond chance (Fleiss, 1971). votes: [cases, categories], how many raters chose each.

    None below two raters, without a case, and where all votes are alike. Raises ValueError where cases have unlike numbers of raters.
    """
    if not len(votes):
        return None
    raters = votes.sum(axis=1)
    if (raters != raters[0]).any():
        raise ValueError("fleiss_kappa: want equally many raters for each case.")
    num = int(raters[0])
    if num < 2:
        return None
    observed = float(((votes * (votes - 1)).sum(axis=1) / (num * (num - 1))).mean())
    by_chance = float(((votes.sum(axis=0) / votes.sum()) ** 2).sum())
    return None if by_chance == 1 else (observed - by_chance) / (1 - by_chance)


def auc(synthetic: NDArray[np.float64], real: NDArray[np.float64]) -> float | None:
    """Area under the ROC curve of ratings: how often a synthetic case is rated above a real one, ties half. NaN ratings are left out.

    None without a rating of both kinds.
    """
    s, r = synthetic[~np.isnan(synthetic)], real[~np.isnan(real)]
    if not s.size or not r.size:
        return None
    above = (s[:, None] > r[None, :]).mean() + 0.5 * (s[:, None] == r[None, :]).mean()
    return float(above)


@dataclass(frozen=True)
class Ratings:
    """Ratings of the readers who saw one set of cases: float64 [readers, cases], NaN where one did not answer. synthetic: bool [cases]."""

    values: NDArray[np.float64]
    synthetic: NDArray[np.bool_]

    def figures(self, values: NDArray[np.float64], synthetic: NDArray[np.bool_]) -> dict[str, float | None]:
        """Sensitivity, specificity and accuracy over all answers, and the mean AUC of the readers."""
        answered = ~np.isnan(values)
        called = values > 0
        right = called == synthetic
        areas = [a for row in values if (a := auc(row[synthetic], row[~synthetic])) is not None]
        return {
            "sensitivity": _mean(right[:, synthetic], answered[:, synthetic]),
            "specificity": _mean(right[:, ~synthetic], answered[:, ~synthetic]),
            "accuracy": _mean(right, answered),
            "auc": float(np.mean(areas)) if areas else None,
        }

    def intervals(self, *, num_resamples: int = NUM_RESAMPLES, seed: int = 0) -> dict[str, Interval | None]:
        """The figures with percentile intervals: readers, real cases and synthetic cases are resampled, so that they hold for other ones.

        With one reader only cases are resampled. None where a figure is not defined.
        """
        rng = np.random.default_rng(seed)
        kinds = [np.flatnonzero(self.synthetic == kind) for kind in (True, False)]
        drawn: dict[str, list[float]] = {}
        for _ in range(num_resamples):
            readers = rng.integers(0, len(self.values), len(self.values))
            cases = np.concatenate([rng.choice(kind, len(kind)) for kind in kinds if len(kind)])
            for name, value in self.figures(self.values[np.ix_(readers, cases)], self.synthetic[cases]).items():
                if value is not None:
                    drawn.setdefault(name, []).append(value)
        tail = (1 - _CONFIDENCE) / 2
        result: dict[str, Interval | None] = {}
        for name, value in self.figures(self.values, self.synthetic).items():
            low, high = (float(np.quantile(drawn[name], q)) for q in (tail, 1 - tail)) if name in drawn else (0.0, 0.0)
            result[name] = None if value is None else Interval(value, low, high)
        return result


def _mean(right: NDArray[np.bool_], answered: NDArray[np.bool_]) -> float | None:
    count = int(answered.sum())
    return int((right & answered).sum()) / count if count else None
