"""Dice (Eq. 9) and volume-level detection (Eq. 7, 10, 11), with the empty cases spelled out."""

import json
import math
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from monai.metrics.meandice import compute_dice

from ftengine.config import EvaluationConfig
from ftengine.errors import CaseError
from ftengine.evaluation.metrics import CaseScore, ClassScore, FullScoring, score_case, summarize

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


def _full(**fields: object) -> FullScoring:
    return FullScoring((2.0, 1.0, 1.0), (2,), EvaluationConfig.model_validate(fields))


@settings(max_examples=40, deadline=None)
@given(VOLUMES, VOLUMES)
def test_dice_equals_monai(predicted: "np.typing.NDArray[np.uint8]", truth: "np.typing.NDArray[np.uint8]") -> None:
    of_monai = compute_dice(_one_hot(predicted), _one_hot(truth), include_background=False)[0]
    for c, expected in zip(score_case("c", predicted, truth, LABELS).classes.values(), of_monai, strict=True):
        if c.truth_voxels:
            assert c.dice == pytest.approx(float(expected), abs=1e-6)
        else:
            assert math.isnan(
                expected
            )  # MONAI scores no volume whose truth is empty; ours is 0 where something was predicted
            assert c.dice == (0.0 if c.predicted_voxels else None)


def _one_hot(label: "np.typing.NDArray[np.uint8]") -> torch.Tensor:
    return torch.from_numpy(np.stack([label == value for value in LABELS.values()]))[None]


def _volumes() -> list[CaseScore]:
    """Three volumes: two lesions of which the small one is found and a false one; a large one missed; healthy with a false one."""
    first_truth = np.zeros((4, 30, 40), np.uint8)
    first_truth[1, 2:5, 2:5] = 2  # 3 mm
    first_truth[1, 2:26, 10:34] = 2  # 24 mm
    first = np.zeros_like(first_truth)
    first[1, 4, 4] = first[3, 29, 39] = 2
    second_truth = np.zeros_like(first_truth)
    second_truth[0, :24, :24] = 2
    nothing = np.zeros_like(first_truth)
    third = nothing.copy()
    third[0, 0, 0] = 2
    pairs = {"a": (first, first_truth), "b": (nothing, second_truth), "c": (third, nothing)}
    return [score_case(case, p, t, LABELS, _full()) for case, (p, t) in pairs.items()]


def test_lesions_are_counted_over_all_volumes() -> None:
    row = summarize(_volumes())["liver_tumor"]
    lesions = row["lesions"]
    assert (lesions["num_truth"], lesions["num_found"], lesions["num_predicted"]) == (3, 1, 3)
    assert lesions["sensitivity"] == 1 / 3
    assert lesions["precision"] == 1 / 3
    assert lesions["f1"] == pytest.approx(1 / 3)
    assert lesions["false_positives_per_volume"] == 2 / 3
    assert lesions["by_size"]["small"] == {
        "num_truth": 1,
        "num_found": 1,
        "sensitivity": 1.0,
        "sensitivity_interval": None,
    }
    assert lesions["by_size"]["large"]["num_truth"] == 2
    assert lesions["by_size"]["large"]["sensitivity"] == 0.0
    assert row["num_without_hd95"] == 1
    assert (row["tp"], row["fn"], row["fp"], row["tn"]) == (1, 1, 1, 0)
    assert row["small_volumes"]["num_volumes"] == 0
    assert row["small_volumes"]["sensitivity"] is None
    assert summarize(_volumes())["liver"]["lesions"] is None


def test_the_size_class_follows_the_definition() -> None:
    """A square of 24 voxels of 1 mm is 23 * sqrt(2) + 1 = 33.5 mm across."""
    for small_mm, num_small in ((33.0, 1), (34.0, 3)):
        lesions = summarize(_volumes(), EvaluationConfig(small_mm=small_mm))["liver_tumor"]["lesions"]
        assert lesions["by_size"]["small"]["num_truth"] == num_small
        assert lesions["by_size"]["large"]["num_truth"] == 3 - num_small


def test_the_papers_arithmetic_of_detection() -> None:
    """28 hits of 45: Fig. 2 prints 62.3 %, it is 62.2 %."""
    scores = [CaseScore(str(i), {"t": ClassScore(0.5, 4, 4, int(i < 28))}) for i in range(45)]
    row = summarize(scores)["t"]
    assert round(100 * row["sensitivity"], 1) == 62.2
    low, high = row["sensitivity_interval"]
    assert low < 28 / 45 < high


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(VOLUMES, VOLUMES), max_size=4))
def test_every_figure_is_a_number_or_none(pairs: list[tuple[Any, Any]]) -> None:
    scores = [score_case(str(n), p, t, LABELS, _full()) for n, (p, t) in enumerate(pairs)]
    json.dumps(summarize(scores), allow_nan=False)
    json.dumps([asdict(s) for s in scores], allow_nan=False)
