"""Intervals and paired tests equal SciPy's; what is not defined is None."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ftengine.evaluation.statistics import bootstrap_interval, paired_tests, proportion_interval

# steps of a thousandth, with ties and zeros, as scores have them
SCORES = st.lists(st.integers(-1000, 1000).map(lambda n: n / 1000), min_size=1, max_size=30)


@settings(max_examples=40, deadline=None)
@given(SCORES)
def test_an_interval_is_finite_and_holds_its_mean(values: list[float]) -> None:
    interval = bootstrap_interval(values, num_resamples=199)
    assert interval.mean == pytest.approx(math.fsum(values) / len(values), abs=1e-12)
    if len(values) == 1:
        assert interval.low is None
        assert interval.high is None
    else:
        assert interval.low is not None
        assert interval.high is not None
        rounding = 1e-9
        assert min(values) - rounding <= interval.low <= interval.high <= max(values) + rounding


def test_the_interval_is_scipys_and_depends_on_nothing_but_the_seed() -> None:
    values = np.random.default_rng(1).beta(5, 2, 40)
    interval = bootstrap_interval(values, seed=3)
    assert interval == bootstrap_interval(values, seed=3)
    reference = stats.bootstrap((values,), np.mean, rng=np.random.default_rng(3)).confidence_interval
    assert (interval.low, interval.high) == (reference.low, reference.high)
    narrow = bootstrap_interval(values, confidence=0.5, seed=3)
    assert narrow.low is not None
    assert interval.low is not None
    assert narrow.low > interval.low


def test_intervals_cover_as_often_as_they_say() -> None:
    """400 samples of 30 from a known law: BCa covers the true mean in 95 % of them, within three standard errors of sampling plus 2 %."""
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(400):
        interval = bootstrap_interval(rng.beta(4, 2, 30), num_resamples=499)
        assert interval.low is not None
        assert interval.high is not None
        hits += interval.low <= 4 / 6 <= interval.high
    assert hits / 400 > 0.95 - 0.02 - 3 * math.sqrt(0.95 * 0.05 / 400)


@pytest.mark.parametrize("values", [[], [0.5, math.nan], [math.inf, 0.0]])
def test_values_that_are_none_are_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match=r"Leave out what has n"):
        bootstrap_interval(values)


@pytest.mark.parametrize(("successes", "total"), [(0, 10), (10, 10), (28, 45), (1, 1)])
def test_proportions_have_the_exact_interval(successes: int, total: int) -> None:
    interval = proportion_interval(successes, total)
    # Clopper and Pearson by the beta distribution
    low = stats.beta.ppf(0.025, successes, total - successes + 1) if successes else 0.0
    high = stats.beta.ppf(0.975, successes + 1, total - successes) if successes < total else 1.0
    assert (interval.mean, interval.low, interval.high) == pytest.approx((successes / total, low, high), abs=1e-9)


@pytest.mark.parametrize(("successes", "total"), [(0, 0), (3, 2), (-1, 2)])
def test_impossible_proportions_are_refused(successes: int, total: int) -> None:
    with pytest.raises(ValueError, match="want 0 <= successes <= total"):
        proportion_interval(successes, total)


def test_paired_tests_equal_scipy() -> None:
    rng = np.random.default_rng(2)
    b = rng.uniform(0, 1, 25)
    a = b + rng.normal(0.05, 0.1, 25)
    tests = paired_tests(a, b)
    assert tests.num_pairs == 25
    assert tests.mean_difference == pytest.approx(np.mean(a - b))
    assert tests.t_pvalue == pytest.approx(stats.ttest_rel(a, b).pvalue, rel=1e-9)
    assert tests.wilcoxon_pvalue == pytest.approx(stats.wilcoxon(a, b).pvalue, rel=1e-9)
    assert tests.interval == bootstrap_interval(a - b)
    swapped = paired_tests(b, a)
    assert (swapped.t_pvalue, swapped.wilcoxon_pvalue) == pytest.approx((tests.t_pvalue, tests.wilcoxon_pvalue))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), max_size=12))
def test_paired_tests_are_never_nan(pairs: list[tuple[int, int]]) -> None:
    a, b = [p[0] / 20 for p in pairs], [p[1] / 20 for p in pairs]
    tests = paired_tests(a, b, num_resamples=99)
    for value in (tests.mean_difference, tests.t_pvalue, tests.wilcoxon_pvalue):
        assert value is None or math.isfinite(value)
    different = {round(x - y, 9) for x, y in zip(a, b, strict=True)}
    assert (tests.t_pvalue is None) == (len(pairs) < 2 or len(different) == 1)
    assert (tests.wilcoxon_pvalue is None) == (len(pairs) < 2 or different == {0.0})


def test_lists_of_other_lengths_are_no_pairs() -> None:
    with pytest.raises(ValueError, match="want pairs"):
        paired_tests([0.1, 0.2], [0.1])
