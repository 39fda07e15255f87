"""Kappas and AUC against published examples and SciPy."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from ftengine.turing.agreement import Ratings, auc, cohen_kappa, fleiss_kappa, rating

# Fleiss' own kind of example, as every textbook repeats it: 14 raters, 10 subjects, 5 categories; kappa 0.210
VOTES = np.array(
    [
        [0, 0, 0, 0, 14],
        [0, 2, 6, 4, 2],
        [0, 0, 3, 5, 6],
        [0, 3, 9, 2, 0],
        [2, 2, 8, 1, 1],
        [7, 7, 0, 0, 0],
        [3, 2, 6, 3, 0],
        [2, 5, 3, 2, 2],
        [6, 5, 2, 1, 0],
        [0, 2, 2, 3, 7],
    ]
)


def test_fleiss_kappa_of_the_textbook() -> None:
    assert fleiss_kappa(VOTES) == pytest.approx(0.210, abs=5e-4)


def test_fleiss_kappa_where_it_is_not_defined() -> None:
    assert fleiss_kappa(np.zeros((0, 2), dtype=np.int64)) is None
    assert fleiss_kappa(np.array([[1, 0], [0, 1]])) is None  # one rater
    assert fleiss_kappa(np.array([[3, 0], [3, 0]])) is None  # all alike
    assert fleiss_kappa(np.array([[3, 0], [0, 3]])) == 1.0
    with pytest.raises(ValueError, match="equally many raters"):
        fleiss_kappa(np.array([[3, 0], [1, 0]]))


def test_cohen_kappa_of_the_textbook() -> None:
    """50 proposals: both yes 20, both no 15, yes-no 5, no-yes 10: kappa 0.4."""
    first = [True] * 25 + [False] * 25
    second = [True] * 20 + [False] * 5 + [True] * 10 + [False] * 15
    assert cohen_kappa(first, second) == pytest.approx(0.4)
    assert cohen_kappa([], []) is None
    assert cohen_kappa([True, True], [True, True]) is None
    assert cohen_kappa([True, False], [False, True]) == -1.0
    with pytest.raises(ValueError, match="want pairs"):
        cohen_kappa([True], [])


@given(
    synthetic=st.lists(st.integers(-5, 5), min_size=1, max_size=20),
    real=st.lists(st.integers(-5, 5), min_size=1, max_size=20),
)
def test_auc_is_mann_whitneys_u(synthetic: list[int], real: list[int]) -> None:
    s, r = np.array(synthetic, dtype=float), np.array(real, dtype=float)
    u = stats.mannwhitneyu(s, r).statistic
    assert auc(s, r) == pytest.approx(u / (len(s) * len(r)), abs=1e-12)
    assert auc(np.append(s, np.nan), r) == auc(s, r)
    assert auc(s, np.array([np.nan])) is None


def test_ratings_order_all_answers() -> None:
    scale = [rating(synthetic=False, confidence=c) for c in (5, 4, 3, 2, 1)]
    scale += [rating(synthetic=True, confidence=c) for c in (1, 2, 3, 4, 5)]
    assert scale == sorted(scale)
    assert len(set(scale)) == 10


def test_intervals_hold_the_truth_and_shrink_with_readers_and_cases() -> None:
    rng = np.random.default_rng(5)
    synthetic = np.arange(40) % 2 == 0
    right = rng.random((6, 40)) < 0.7
    values = np.where(right == synthetic, 3.0, -3.0)
    large, small = Ratings(values, synthetic), Ratings(values[:2, :10], synthetic[:10])
    widths = []
    for ratings in (large, small):
        intervals = ratings.intervals(num_resamples=400)
        accuracy = intervals["accuracy"]
        assert accuracy is not None
        assert accuracy.low is not None
        assert accuracy.high is not None
        assert accuracy.low <= accuracy.mean <= accuracy.high
        widths.append(accuracy.high - accuracy.low)
        figures = ratings.figures(ratings.values, ratings.synthetic)
        assert {name: None if i is None else i.mean for name, i in intervals.items()} == figures
        assert ratings.intervals(num_resamples=400) == intervals
    assert widths[0] < widths[1]


def test_figures_leave_out_what_was_not_answered() -> None:
    values = np.array([[3.0, -2.0, np.nan, 1.0]])
    figures = Ratings(values, np.array([True, True, False, False])).figures(
        values, np.array([True, True, False, False])
    )
    assert figures == {"sensitivity": 0.5, "specificity": 0.0, "accuracy": pytest.approx(1 / 3), "auc": 0.5}
    only_real = Ratings(values[:, 2:], np.array([False, False]))
    assert only_real.intervals(num_resamples=10)["auc"] is None
    assert only_real.intervals(num_resamples=10)["sensitivity"] is None
