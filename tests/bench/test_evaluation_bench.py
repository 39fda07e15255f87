"""The evaluation bench scores the same files both ways and refuses to time what differs."""

import json

import pytest

from ftengine.bench import evaluation


def test_both_ways_agree_and_every_sample_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    document = evaluation.run(cases=3, distinct=2, shape_zyx=(40, 44, 48), blocks=1, workers=1, as_json=True)
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(document))
    assert [len(row["samples_s"]) for row in document["rows"]] == [1, 1, 1]
    assert document["largest_difference"] < 1e-6
    assert document["times_faster"]["monai"] == 1.0


def test_other_values_are_not_timed() -> None:
    same = {"a": [(0.5, 2.0, 0.25), (None, None, None)]}
    assert evaluation.check_equal(same, {"a": [(0.5, 2.0, 0.25), (float("nan"), float("nan"), float("nan"))]}) == 0.0
    with pytest.raises(AssertionError, match="differ by 1"):
        evaluation.check_equal(same, {"a": [(0.5, 2.0 + 2.4e-6, 0.25), (None, None, None)]})
    with pytest.raises(AssertionError, match="where MONAI has"):
        evaluation.check_equal(same, {"a": [(0.5, float("inf"), 0.25), (None, None, None)]})
    with pytest.raises(AssertionError, match="other cases"):
        evaluation.check_equal(same, {"b": []})
