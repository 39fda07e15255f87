"""Evaluations as the report reads them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ftengine.errors import ConfigError
from ftengine.evaluation.evaluate import Evaluation
from ftengine.evaluation.metrics import score_case
from ftengine.report.scores import read_scores, scores_of, tumor_classes, worst_and_best

LABELS = {"background": 0, "liver": 1, "liver_tumor": 2}


def evaluation(dice_shifts: list[int]) -> Evaluation:
    """Volumes whose prediction is the truth moved by so many voxels; the last holds no tumour."""
    result = Evaluation()
    for number, shift in enumerate(dice_shifts):
        truth = np.zeros((8, 8, 16), dtype=np.uint8)
        truth[2:6, 2:6, 2:6] = 2
        predicted = np.roll(truth, shift, axis=2)
        result.cases.append(score_case(f"a/{number}", predicted, truth, LABELS))
    healthy = np.ones((8, 8, 16), dtype=np.uint8)
    result.cases.append(score_case("a/healthy", healthy, healthy, LABELS))
    result.failed["a/lost"] = "no such file"
    return result


def test_reads_what_evaluate_writes(tmp_path: Path) -> None:
    made = evaluation([0, 1, 8])
    file = tmp_path / "first.json"
    file.write_text(json.dumps(made.to_json()), encoding="utf-8")
    scores = read_scores(file)
    assert scores.name == "first"
    assert scores.of_class("liver_tumor") == {"a/0": 1.0, "a/1": 0.75, "a/2": 0.0}
    assert scores.of_class("liver") == {"a/healthy": 1.0}
    assert scores.outcomes["a/2"]["liver_tumor"] == "fn"
    assert scores.figure("liver_tumor", "sensitivity") == pytest.approx(2 / 3)
    assert scores.figure("liver_tumor", "no such figure") is None
    assert scores.failed == {"a/lost": "no such file"}


def test_worst_and_best_share_no_case() -> None:
    scores = scores_of("x", evaluation([0, 1, 2, 3, 8]).to_json())
    chosen = worst_and_best(scores, ["liver_tumor"], 2)
    assert chosen == [
        ("a/4", "Worst 1 of 5 by Dice"),
        ("a/3", "Worst 2 of 5 by Dice"),
        ("a/0", "Best 1 of 5 by Dice"),
        ("a/1", "Best 2 of 5 by Dice"),
    ]
    assert len(worst_and_best(scores, ["liver_tumor"], 9)) == 5
    assert worst_and_best(scores_of("x", evaluation([1]).to_json()), ["liver_tumor"], 3) == [
        ("a/0", "Worst 1 of 1 by Dice")
    ]
    assert worst_and_best(scores, ["kidney_tumor"], 3) == []


@pytest.mark.parametrize(
    "document",
    [
        {"cases": [], "summary": {}},
        {
            "cases": [None, 3, {}, {"case": 5, "classes": [1]}, {"case": "a", "classes": {"t": None}}],
            "summary": {"t": 4},
        },
        {"cases": [{"case": "a", "classes": {"t": {"dice": "x", "truth_voxels": 1}}}], "summary": {"t": {"dice": "x"}}},
        {
            "cases": [{"case": "a", "classes": {"t": {"lesions": {"truth": [1, {"diameter_mm": "x"}]}}}}],
            "summary": {"t": {"dice": 0.5, "dice_interval": "ab"}},
            "failed": [1],
            "num_left_out": "x",
            "settings": 5,
        },
    ],
)
def test_missing_and_wrong_values_are_nothing(document: dict[str, Any]) -> None:
    scores = scores_of("x", document)
    assert scores.of_class("t") == {}
    assert scores.interval("t", "dice") is None
    assert scores.num_left_out == 0


@pytest.mark.parametrize("text", ["", "{", "[]", '{"cases": 5, "summary": {}}', '{"cases": []}', "[" * 100_000])
def test_what_is_no_evaluation_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "x.json"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match="ftengine evaluate"):
        read_scores(file)


def test_tumour_classes_by_name() -> None:
    assert tumor_classes(["liver", "liver_tumor", "lung lesion"]) == ["liver_tumor", "lung lesion"]
    assert tumor_classes(["a", "b"]) == ["a", "b"]
