"""Folders against folders: which files pair, what is refused and listed, and worker processes that die."""

import json
import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from ftengine.config import Config, EvaluationConfig
from ftengine.errors import CaseError, ConfigError, FailureCode
from ftengine.evaluation.evaluate import Evaluation, cases_csv, evaluate_folders, load_evaluation
from ftengine.evaluation.metrics import CaseScore
from ftengine.evaluation.pairs import pair_files
from ftengine.evaluation.scoring_jobs import Job, run_jobs
from ftengine.geometry import grid_from_matrix
from ftengine.volume.nifti import write_nifti

REGION = Config.preset("demo").region
SETTINGS = EvaluationConfig()
SHAPE = (12, 14, 16)


def _label(seed: int) -> "np.typing.NDArray[np.uint8]":
    label = np.zeros(SHAPE, dtype=np.uint8)
    label[2:10, 2:12, 2:14] = 1
    label[4:7, 4 + seed % 3 : 8, 5:9] = 2
    return label


def _write(path: Path, label: "np.typing.NDArray[np.uint8]", *, shift_mm: float = 0.0, spacing_mm: float = 2.0) -> None:
    matrix = np.diag([spacing_mm, spacing_mm, spacing_mm, 1.0])
    matrix[0, 3] = shift_mm
    path.parent.mkdir(parents=True, exist_ok=True)
    write_nifti(path, label, grid_from_matrix(label.shape, matrix))


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Three cases, one of them in a folder of its own, as ``ftengine predict`` writes them beside labels as a data set has them."""
    predictions, truths = tmp_path / "pred", tmp_path / "truth"
    for seed, name in enumerate(("a", "b", "sub/c")):
        _write(predictions / f"{name}.nii.gz", _label(seed + 1))
        _write(truths / f"{name}_label.nii.gz", _label(seed))
    return predictions, truths


@pytest.mark.parametrize("workers", [1, 2])
def test_folders_are_scored_whoever_works(folders: tuple[Path, Path], workers: int) -> None:
    totals: list[int] = []
    seen: list[str] = []
    result = evaluate_folders(
        *folders, REGION, SETTINGS, workers=workers, on_start=totals.append, on_case=lambda s: seen.append(s.case)
    )
    assert [s.case for s in result.cases] == ["a", "b", "sub/c"]
    assert (totals, sorted(seen), result.exit_code) == ([3], ["a", "b", "sub/c"], 0)
    one = evaluate_folders(*folders, REGION, SETTINGS)
    assert one.to_json() == result.to_json()


def test_a_round_trip_through_json_keeps_everything(folders: tuple[Path, Path], tmp_path: Path) -> None:
    result = evaluate_folders(*folders, REGION, EvaluationConfig(match="iou", small_mm=5.0))
    file = tmp_path / "a.json"
    file.write_text(json.dumps(result.to_json(), allow_nan=False))
    again = load_evaluation(file)
    assert again == result
    assert again.to_json() == result.to_json()
    assert result.to_json()["sizes"]["sub"]["liver_tumor"] == {"small": 0, "large": 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "is not what 'ftengine evaluate --json' prints"),
        ('{"format": 1}', "is not what 'ftengine evaluate --json' prints"),
        ('{"format": 2}', "reads 1"),
        ('{"format": 1, "cases": [{"case": "a", "classes": {"x": {"dice": 1, "lesions": null}}}]}', "is not what"),
    ],
)
def test_other_files_are_no_evaluations(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_evaluation(tmp_path / "x.json")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_evaluation(tmp_path / "missing.json")


def test_missing_pairs_are_listed_on_both_sides(folders: tuple[Path, Path]) -> None:
    predictions, truths = folders
    (predictions / "a.nii.gz").unlink()
    _write(predictions / "d_seg.nii.gz", _label(0))
    result = evaluate_folders(predictions, truths, REGION, SETTINGS)
    assert "has no prediction" in result.failed["a"]
    assert result.without_truth == ["d"]
    assert result.exit_code == 1
    shutil.rmtree(predictions / "sub")
    (predictions / "b.nii.gz").unlink()
    assert evaluate_folders(predictions, truths, REGION, SETTINGS).exit_code == 4


def test_other_grids_are_refused_and_the_rest_goes_on(folders: tuple[Path, Path]) -> None:
    predictions, truths = folders
    _write(predictions / "a.nii.gz", _label(0), shift_mm=1.0)
    _write(predictions / "b.nii.gz", np.zeros((12, 14, 17), np.uint8), spacing_mm=1.5)
    result = evaluate_folders(predictions, truths, REGION, SETTINGS)
    assert [s.case for s in result.cases] == ["sub/c"]
    assert "lies up to 0.50 voxels off" in result.failed["a"]
    assert "has shape (12, 14, 17) (z, y, x in RAS+) at 1.5 x 1.5 x 1.5 mm" in result.failed["b"]
    for reason in result.failed.values():
        assert str(truths) in reason
        assert "then bring the prediction to the grid of its truth" in reason


def test_the_same_grid_in_another_axis_order_is_scored(folders: tuple[Path, Path]) -> None:
    """A prediction whose file runs to the left and to the front (LPS) lies in the same place."""
    predictions, truths = folders
    turned = np.diag([-2.0, -2.0, 2.0, 1.0])
    turned[0, 3], turned[1, 3] = 2.0 * (SHAPE[2] - 1), 2.0 * (SHAPE[1] - 1)
    write_nifti(
        predictions / "a.nii.gz",
        np.ascontiguousarray(_label(0)[:, ::-1, ::-1]),
        grid_from_matrix(SHAPE, turned),
    )
    score = evaluate_folders(predictions, truths, REGION, SETTINGS).cases[0]
    assert score.classes["liver_tumor"].dice == 1.0


def test_labels_outside_the_map_are_named_with_their_file(folders: tuple[Path, Path]) -> None:
    predictions, truths = folders
    strange = _label(0)
    strange[0, 0, :3] = 7
    _write(truths / "a_label.nii.gz", strange)
    _write(predictions / "b.nii.gz", strange)
    result = evaluate_folders(predictions, truths, REGION, SETTINGS)
    assert "a_label.nii.gz: label values 7 (3 voxels)" in result.failed["a"]
    assert "--label-map 7=VALUE" in result.failed["a"]
    assert "b.nii.gz: label values 7 (3 voxels)" in result.failed["b"]
    assert "--predicted-label-map 7=VALUE" in result.failed["b"]
    mapped = evaluate_folders(predictions, truths, REGION, SETTINGS, label_map={7: 0}, predicted_map={7: 0, 1: 1})
    assert mapped.failed == {}


def test_pairs_are_found_by_name(tmp_path: Path) -> None:
    predictions, truths = tmp_path / "p", tmp_path / "t"
    for path in (
        predictions / "a_ct.nii.gz", predictions / "b.mha", predictions / "c.nii", predictions / "c.nrrd",
        predictions / "a_probabilities" / "liver.nii.gz",
        truths / "a_ct.nii.gz", truths / "a_label.nii.gz", truths / "b_seg.nrrd", truths / "c_mask.nii.gz",
        truths / "d_label.nii.gz", truths / "d_mask.nii.gz", truths / "notes.txt", truths / ".hidden_label.nii.gz",
    ):  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    pairing = pair_files(predictions, truths)
    assert [(p.case, p.predicted.name, p.truth.name) for p in pairing.pairs] == [
        ("a", "a_ct.nii.gz", "a_label.nii.gz"),  # the CT beside the label is no truth
        ("b", "b.mha", "b_seg.nrrd"),
    ]
    assert "c.nii and" in pairing.failed["c"]
    assert "d_label.nii.gz and" in pairing.failed["d"]
    assert set(pairing.failed) == {"c", "d"}
    assert pairing.without_truth == []


def test_folders_that_cannot_be_compared_are_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    predictions, truths = folders
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "a_ct.nii.gz").write_bytes(b"")
    with pytest.raises(CaseError, match="holds no label file; want the true labels") as caught:
        pair_files(predictions, empty)
    assert caught.value.exit_code == 4
    (empty / "a_ct.nii.gz").unlink()
    with pytest.raises(CaseError, match="holds no label file; want predictions"):
        pair_files(empty, truths)
    with pytest.raises(ConfigError, match="is not there"):
        pair_files(tmp_path / "missing", truths)
    with pytest.raises(ConfigError, match="one is a folder and one a file"):
        pair_files(predictions / "a.nii.gz", truths)
    with pytest.raises(ConfigError, match="agrees with itself"):
        pair_files(truths, tmp_path / "empty" / ".." / "truth")
    pair = pair_files(predictions / "a.nii.gz", truths / "b_label.nii.gz").pairs
    assert [(p.case, p.predicted.name) for p in pair] == [("b", "a.nii.gz")]


def test_the_csv_has_a_line_a_case_and_class_and_no_formula(folders: tuple[Path, Path]) -> None:
    predictions, truths = folders
    _write(predictions / "=1+1.nii.gz", _label(0))
    _write(truths / "=1+1_label.nii.gz", np.zeros(SHAPE, np.uint8))
    _write(truths / "@gone_label.nii.gz", _label(0))
    lines = cases_csv(evaluate_folders(predictions, truths, REGION, SETTINGS)).splitlines()
    assert len(lines) == 1 + 4 * 2 + 1
    assert lines[2].startswith("'=1+1,liver_tumor,0.000000,,0.000000,0,")
    assert lines[2].endswith("fp,0,0,0,0,1,1")
    assert lines[1].endswith("fp,,,,,,")
    assert lines[-1] == "'@gone,,,,,,,,failed,,,,,,"


@dataclass(frozen=True)
class Dies:
    """A case that kills the process that scores it."""

    case: str = "dies"

    def run(self) -> CaseScore:
        """As the kernel does where memory is out."""
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


@dataclass(frozen=True)
class Lives:
    """A case that is scored."""

    case: str

    def run(self) -> CaseScore:
        """At once."""
        return CaseScore(self.case, {})


@dataclass(frozen=True)
class Fails:
    """A case that cannot be used."""

    case: str = "fails"

    def run(self) -> CaseScore:
        """A reader's refusal."""
        raise CaseError("broken file", code=FailureCode.TRUNCATED)


def test_a_worker_that_dies_costs_one_case() -> None:
    outcomes = dict(run_jobs([Fails(), Dies(), Lives("1")], 2))
    died, refused = outcomes["dies"], outcomes["fails"]
    assert outcomes["1"] == CaseScore("1", {})
    assert isinstance(died, CaseError)
    assert died.code is FailureCode.WORKER_DIED
    assert "dies: the process that scored it died" in str(died)
    assert isinstance(refused, CaseError)
    assert refused.code is FailureCode.TRUNCATED


@dataclass(frozen=True)
class Raises:
    """A case whose scoring raises what no reader raises on purpose."""

    case: str
    error: Exception

    def run(self) -> CaseScore:
        """As NumPy where memory is out, or a fault of ours."""
        raise self.error


@pytest.mark.parametrize("workers", [1, 2])
def test_no_exception_of_a_case_ends_the_others(workers: int) -> None:
    jobs: list[Job] = [Raises("big", MemoryError()), Raises("odd", ZeroDivisionError("by\nzero")), Lives("1")]
    outcomes = dict(run_jobs(jobs, workers))
    big, odd = outcomes["big"], outcomes["odd"]
    assert outcomes["1"] == CaseScore("1", {})
    assert isinstance(big, CaseError)
    assert big.code is FailureCode.OUT_OF_MEMORY
    assert "--workers 1" in str(big)
    assert isinstance(odd, CaseError)
    assert odd.code is FailureCode.INTERNAL
    assert str(odd).startswith("odd: an unexpected ZeroDivisionError while it was scored (by zero).")


def test_jobs_are_asked_for_as_workers_are_free() -> None:
    """Predictions would fill the memory: three are there at most for two workers, two at work and one waiting."""
    made = []

    def jobs() -> Iterator[Lives]:
        for number in range(8):
            made.append(number)
            yield Lives(str(number))

    outcomes = run_jobs(jobs(), 2)
    next(outcomes)
    assert len(made) <= 4
    assert len(list(outcomes)) == 7


def test_nothing_scored_is_no_success() -> None:
    assert Evaluation().exit_code == 4
    assert Evaluation([CaseScore("a", {})], {"b": "broken"}).exit_code == 1
