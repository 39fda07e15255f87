"""Dice (Eq. 9) and volume-level detection (Eq. 7, 10, 11), with the empty cases spelled out."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ftengine.errors import CaseError
from ftengine.evaluation.metrics import CaseScore, ClassScore, score_case, summarize

LABELS = {"background": 0, "liver": 1, "liver_tumor": 2}
VOLUMES = arrays(np.uint8, (3, 4, 5), elements=st.integers(0, 2))


@given(VOLUMES, VOLUMES)
def test_dice_equals_its_formula(
    predicted: "np.typing.NDArray[np.uint8]", truth: "np.typing.NDArray[np.uint8]"
) -> None:
    score = score_case("c", predicted, truth, LABELS)
    for name, value in (("liver", 1), ("liver_tumor", 2)):
        p, t = set(np.flatnonzero(predicted == value)), set(np.flatnonzero(truth == value))
        if p or t:
            assert score.classes[name].dice == 2 * len(p & t) / (len(p) + len(t))
        else:
            assert score.classes[name].dice is None
    assert "background" not in score.classes


@given(VOLUMES)
def test_a_perfect_prediction_scores_one(truth: "np.typing.NDArray[np.uint8]") -> None:
    for c in score_case("c", truth, truth, LABELS).classes.values():
        assert c.dice in (1.0, None)
        assert c.outcome in ("tp", "tn")


@pytest.mark.parametrize(
    ("truth", "predicted", "overlap", "outcome"),
    [(5, 5, 1, "tp"), (5, 5, 0, "fn"), (5, 0, 0, "fn"), (0, 3, 0, "fp"), (0, 0, 0, "tn")],
)
def test_a_volume_is_a_hit_where_prediction_and_truth_overlap_at_all(
    truth: int, predicted: int, overlap: int, outcome: str
) -> None:
    assert ClassScore(0.0, truth, predicted, overlap).outcome == outcome


def _scores(outcomes: str) -> list[CaseScore]:
    made = {
        "p": ClassScore(0.5, 4, 4, 2),
        "n": ClassScore(0.0, 4, 0, 0),
        "f": ClassScore(0.0, 0, 3, 0),
        "t": ClassScore(None, 0, 0, 0),
    }
    return [CaseScore(str(i), {"tumor": made[o]}) for i, o in enumerate(outcomes)]


def test_summary_counts_as_the_paper() -> None:
    row = summarize(_scores("pppnftt"))["tumor"]
    assert (row["tp"], row["fn"], row["fp"], row["tn"]) == (3, 1, 1, 2)
    assert row["sensitivity"] == 3 / 4
    assert row["specificity"] == 2 / 3
    assert row["precision"] == 3 / 4
    assert row["f1"] == 3 / 4
    assert row["dice"] == pytest.approx((0.5 * 3 + 0) / 4)  # volumes with truth only


def test_a_figure_without_volumes_is_none_never_nan() -> None:
    healthy = summarize(_scores("tt"))["tumor"]
    assert (healthy["dice"], healthy["sensitivity"], healthy["precision"], healthy["f1"]) == (None, None, None, None)
    assert healthy["specificity"] == 1.0
    missed = summarize(_scores("nnf"))["tumor"]
    assert (missed["sensitivity"], missed["precision"], missed["f1"]) == (0.0, 0.0, 0.0)
    silent = summarize(_scores("nt"))["tumor"]  # a model that never predicts
    assert (silent["sensitivity"], silent["precision"], silent["f1"]) == (0.0, None, 0.0)
    assert summarize([]) == {}


def test_other_shapes_are_refused() -> None:
    with pytest.raises(CaseError, match="want the same grid"):
        score_case("c", np.zeros((2, 2, 2), np.uint8), np.zeros((2, 2, 3), np.uint8), LABELS)
