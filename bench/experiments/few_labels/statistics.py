"""Means, paired differences over seeds, two-sided paired t-tests, and Holm's correction for how many of them there are."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

_NO_SPREAD = 1e-12  # differences that are equal but for rounding


@dataclass(frozen=True)
class Comparison:
    """``first`` minus ``second``, over the seeds that both have. t and p: of the paired t-test, None with fewer than two seeds or without
    any spread; p_holm: corrected for all tests of its table. interval: 95 % of the mean, None as p.
    """

    first: str
    second: str
    seeds: tuple[int, ...]
    differences: tuple[float, ...]
    t: float | None
    p: float | None
    p_holm: float | None = None
    interval: tuple[float, float] | None = None

    @property
    def mean(self) -> float:
        """Mean of the differences."""
        return float(np.mean(self.differences))

    @property
    def sd(self) -> float | None:
        """Standard deviation of the differences (n - 1); None for one seed."""
        return sd(self.differences)


def sd(values: Sequence[float]) -> float | None:
    """Standard deviation with n - 1; None for fewer than two values."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def compare(by_arm: Mapping[str, Mapping[int, float]], pairs: Sequence[tuple[str, str]]) -> list[Comparison]:
    """Compare pairs of arms, each {seed: figure}; pairs without a common seed are left out. Holm's correction counts all that have a p."""
    found = []
    for first, second in pairs:
        seeds = sorted(set(by_arm.get(first, {})) & set(by_arm.get(second, {})))
        if seeds:
            found.append(_compare(first, second, by_arm, seeds))
    corrected = iter(holm([c.p for c in found if c.p is not None]))
    return [
        c
        if c.p is None
        else Comparison(c.first, c.second, c.seeds, c.differences, c.t, c.p, next(corrected), c.interval)
        for c in found
    ]


def _compare(first: str, second: str, by_arm: Mapping[str, Mapping[int, float]], seeds: Sequence[int]) -> Comparison:
    a, b = ([by_arm[name][seed] for seed in seeds] for name in (first, second))
    differences = tuple(x - y for x, y in zip(a, b, strict=True))
    if len(seeds) < 2 or np.ptp(differences) < _NO_SPREAD:
        return Comparison(first, second, tuple(seeds), differences, None, None)
    test = stats.ttest_rel(a, b)
    low, high = test.confidence_interval(0.95)
    return Comparison(
        first,
        second,
        tuple(seeds),
        differences,
        float(test.statistic),
        float(test.pvalue),
        interval=(float(low), float(high)),
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction: the k-th smallest of m times m - k + 1, made monotonic, at most 1; in the given order."""
    order = np.argsort(p_values, kind="stable")
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, p_values[place] * (len(p_values) - rank)))
        corrected[place] = largest
    return corrected
