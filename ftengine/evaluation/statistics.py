"""Means with confidence intervals, and paired two-sided tests between two runs."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

NUM_RESAMPLES = 9999
_BATCH_VALUES = 10_000_000  # values resampled at a time: 80 MB


@dataclass(frozen=True)
class Interval:
    """A mean and its confidence interval; ``low`` and ``high`` are None where one value alone gives none."""

    mean: float
    low: float | None
    high: float | None

    def to_json(self) -> dict[str, float | None]:
        """Plain values."""
        return asdict(self)


@dataclass(frozen=True)
class PairedTests:
    """Two runs on the same cases. What is not defined is None, never NaN.

    mean_difference: mean of a - b. t_pvalue: paired two-sided t-test; not defined for fewer than two pairs and where all differences
    are equal (no spread to compare the mean with). wilcoxon_pvalue: Wilcoxon's signed-rank test, two-sided, pairs without a difference
    left out; not defined for fewer than two pairs and where all differences are 0. interval: bootstrap interval of the mean difference.
    """

    num_pairs: int
    mean_difference: float | None
    t_pvalue: float | None
    wilcoxon_pvalue: float | None
    interval: Interval | None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def bootstrap_interval(
    values: ArrayLike, *, confidence: float = 0.95, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> Interval:
    """Mean of float64 [N] and its bootstrap interval (bias-corrected and accelerated, ``scipy.stats.bootstrap``).

    The values are resampled as they stand: give one value a case, not one a lesion, where lesions of a case are alike. Equal values give
    an interval of no width, one value gives none. Raises ValueError for no value and for NaN or infinity.
    """
    array = _finite(values, "bootstrap_interval")
    if not array.size:
        raise ValueError("bootstrap_interval: no values; want at least one. Leave out what has none.")
    mean = float(array.mean())
    if array.size == 1:
        return Interval(mean, None, None)
    if _no_spread(array):
        return Interval(mean, mean, mean)
    result = stats.bootstrap(
        (array,),
        np.mean,
        n_resamples=num_resamples,
        batch=max(1, _BATCH_VALUES // array.size),
        confidence_level=confidence,
        method="BCa",
        rng=np.random.default_rng(seed),
    )
    return Interval(mean, float(result.confidence_interval.low), float(result.confidence_interval.high))


def proportion_interval(successes: int, total: int, *, confidence: float = 0.95) -> Interval:
    """``successes / total`` and its exact interval (Clopper and Pearson, ``scipy.stats.binomtest``).

    Raises ValueError unless 0 <= successes <= total and total > 0.
    """
    if total <= 0 or not 0 <= successes <= total:
        raise ValueError(
            f"proportion_interval: {successes} of {total}; want 0 <= successes <= total and a total above 0. Leave out what has none."
        )
    exact = stats.binomtest(successes, total).proportion_ci(confidence_level=confidence, method="exact")
    return Interval(successes / total, float(exact.low), float(exact.high))


def paired_tests(
    a: Sequence[float] | NDArray[np.float64],
    b: Sequence[float] | NDArray[np.float64],
    *,
    confidence: float = 0.95,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> PairedTests:
    """Compare two runs by pairs, a and b float64 [N] in the same order of cases: t-test and Wilcoxon's test, both two-sided.

    Raises ValueError where the lengths differ, and for NaN or infinity.
    """
    first, second = _finite(a, "paired_tests"), _finite(b, "paired_tests")
    if first.shape != second.shape:
        raise ValueError(f"paired_tests: {first.size} and {second.size} values; want pairs.")
    difference = first - second
    if not difference.size:
        return PairedTests(0, None, None, None, None)
    interval = bootstrap_interval(difference, confidence=confidence, num_resamples=num_resamples, seed=seed)
    if difference.size < 2:
        return PairedTests(1, interval.mean, None, None, interval)
    return PairedTests(
        num_pairs=difference.size,
        mean_difference=interval.mean,
        t_pvalue=None if _no_spread(difference) else float(stats.ttest_1samp(difference, 0.0).pvalue),
        wilcoxon_pvalue=float(stats.wilcoxon(difference).pvalue) if difference.any() else None,
        interval=interval,
    )


def _finite(values: ArrayLike, where: str) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not np.isfinite(array).all():
        raise ValueError(f"{where}: want one list of finite numbers. Leave out what has no value.")
    return array


def _no_spread(values: NDArray[np.float64]) -> bool:
    """Equal but for rounding: nothing can be scaled by their spread."""
    return bool(np.ptp(values) <= 1e-12 * np.abs(values).max())
