"""``ftengine evaluate`` and ``ftengine compare``: what they print and write, their exit codes, and Ctrl-C."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from ftengine.cli.main import app
from ftengine.errors import CaseError, ConfigError
from ftengine.volume.nifti import write_nifti
from tests.support import ras_grid_at

SHAPE = (14, 16, 18)
RUNNER = CliRunner()


def _call(*arguments: object, code: int = 0) -> Result:
    done = RUNNER.invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"})
    assert done.exit_code == code, done.output
    return done


def _write(path: Path, offset: int, *, shape: tuple[int, int, int] = SHAPE) -> None:
    label = np.zeros(shape, dtype=np.uint8)
    label[2:12, 2:14, 2:16] = 1
    label[4:8, 4 + offset : 10, 5:9] = 2
    path.parent.mkdir(parents=True, exist_ok=True)
    write_nifti(path, label, ras_grid_at(shape))


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    for number in range(3):
        _write(tmp_path / "pred" / f"case_{number}.nii.gz", 1 + number % 2)
        _write(tmp_path / "truth" / f"case_{number}_label.nii.gz", 0)
    return tmp_path / "pred", tmp_path / "truth"


def test_tables_are_printed_and_written(folders: tuple[Path, Path], tmp_path: Path) -> None:
    files = {name: tmp_path / "new" / name / f"out.{name}" for name in ("csv", "markdown", "latex")}
    options = [text for name, file in files.items() for text in (f"--{name}", file)]
    done = _call("evaluate", *folders, "--region", "demo", *options)
    assert "HD95" in done.stdout
    assert "3/3" in done.stdout  # lesions found
    rows = list(csv.DictReader(files["csv"].read_text().splitlines()))
    assert len(rows) == 6
    assert float(rows[1]["hd95_mm"]) == pytest.approx(3.0)
    assert "| pred | 99.3 | 87.3 |" in files["markdown"].read_text()  # the tumour: (10/11 + 8/10 + 10/11) / 3
    assert r"liver\_tumor" in files["latex"].read_text()
    assert files["latex"].read_text().count(r"\begin{tabular}") == files["markdown"].read_text().count("|---|")


@pytest.mark.parametrize("option", ["--csv", "--markdown", "--latex"])
def test_files_that_cannot_be_written_are_refused_before_the_work(
    folders: tuple[Path, Path], tmp_path: Path, option: str
) -> None:
    (tmp_path / "file").write_text("mine")
    for name, message in ((tmp_path / "file" / "t", "its folder cannot be made"), (tmp_path, "is a folder")):
        call = ["evaluate", *map(str, folders), "--region", "nowhere", option, str(name)]
        with pytest.raises(ConfigError, match=message):  # not what is wrong with the region, which is looked at later
            RUNNER.invoke(app, call, catch_exceptions=False)
    assert (tmp_path / "file").read_text() == "mine"


def test_options_choose_the_definitions(folders: tuple[Path, Path]) -> None:
    options = (
        "--tolerance 6.5 --surface voxels --match iou --match-fraction 0.9 --connectivity 6 --diameter 3d --small 15"
    )
    document = json.loads(_call("evaluate", *folders, "--region", "demo", "--json", *options.split()).stdout)
    assert document["settings"] == {
        "surface": "voxels", "tolerance_mm": 6.5, "connectivity": 6, "match": "iou", "match_fraction": 0.9,
        "diameter": "3d", "small_mm": 15.0, "confidence": 0.95,
    }  # fmt: skip
    row = document["summary"]["liver_tumor"]
    assert row["surface_dice"] == 1.0
    assert row["lesions"]["num_found"] == 0  # IoU 5/6 and 4/6
    assert row["lesions"]["by_size"]["large"]["num_truth"] == 3
    bad = RUNNER.invoke(app, ["evaluate", *map(str, folders), "--surface", "faces"])
    assert isinstance(bad.exception, ConfigError)
    assert "surface" in str(bad.exception)


def test_failed_cases_are_listed_and_the_exit_code_says_so(folders: tuple[Path, Path]) -> None:
    predictions, truths = folders
    _write(predictions / "case_1.nii.gz", 0, shape=(14, 16, 20))
    _write(predictions / "other.nii.gz", 0)
    done = _call("evaluate", predictions, truths, "--region", "demo", "--json", code=1)
    document = json.loads(done.stdout)
    assert "want the same grid" in document["failed"]["case_1"]
    assert document["without_truth"] == ["other"]
    assert "failed: case_1: " in done.stderr
    assert "a prediction without a truth: other" in done.stderr
    for file in predictions.iterdir():
        file.unlink()
    empty = RUNNER.invoke(app, ["evaluate", str(predictions), str(truths), "--region", "demo"])
    assert isinstance(empty.exception, CaseError)  # which main turns into exit code 4
    assert empty.exception.exit_code == 4


def test_foreign_labels_can_be_mapped(folders: tuple[Path, Path]) -> None:
    done = _call("evaluate", *folders, "--region", "chest", code=0)  # lung 1, lesion 2: the same values
    assert "lesion" in done.stdout
    done = _call("evaluate", *folders, "--region", "demo", "--json", "--label-map", "2=liver")
    assert json.loads(done.stdout)["summary"]["liver_tumor"]["num_volumes_with_truth"] == 0
    done = _call("evaluate", *folders, "--region", "demo", "--json", "--predicted-label-map", "2=0")
    assert json.loads(done.stdout)["summary"]["liver_tumor"]["fn"] == 3
    bad = RUNNER.invoke(app, ["evaluate", *map(str, folders), "--region", "demo", "--label-map", "2=spleen"])
    assert isinstance(bad.exception, ConfigError)


@pytest.mark.parametrize(("option", "value"), [("--split", "test"), ("--fold", "0"), ("--overlap", "0.5")])
def test_options_of_a_store_are_refused_for_files(folders: tuple[Path, Path], option: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"^{option}: for a checkpoint on a store"):
        RUNNER.invoke(app, ["evaluate", *map(str, folders), option, value], catch_exceptions=False)


def test_compare_makes_tables_and_tests(folders: tuple[Path, Path], tmp_path: Path) -> None:
    predictions, truths = folders
    runs = {}
    for name in ("base", "new"):
        runs[name] = tmp_path / f"{name}.json"
        runs[name].write_text(_call("evaluate", predictions, truths, "--region", "demo", "--json").stdout)
        _write(predictions / "case_0.nii.gz", 0)
        _write(predictions / "case_9.nii.gz", 0)
        _write(truths / "case_9_label.nii.gz", 0)
    done = _call("compare", f"base={runs['base']}", f"new={runs['new']}", "--markdown", tmp_path / "t.md")
    assert "new - base" in done.stdout
    assert "not tested, only in new: case_9" in done.stderr
    assert "| new | **99.6** | **92.7** |" in (tmp_path / "t.md").read_text()
    document = json.loads(_call("compare", runs["base"], runs["new"], "--json").stdout)
    test = next(t for t in document["tests"] if (t["class"], t["measure"]) == ("liver_tumor", "dice"))
    assert (test["method"], test["reference"], test["num_pairs"]) == ("new", "base", 3)
    assert test["mean_difference"] == pytest.approx((1 - 10 / 11) / 3)
    folds = json.loads(_call("compare", f"m={runs['base']}", f"m={runs['new']}", "--json").stdout)
    assert folds["tests"] == []
    assert len(folds["tables"][0]["cells"][0]["values"]) == 2


def test_ctrl_c_ends_all_workers_with_130(tmp_path: Path) -> None:
    """A process group as a shell makes it; all of it is gone within seconds, and only one line is said."""
    label = np.random.default_rng(0).integers(0, 3, (64, 64, 64)).astype(np.uint8)  # noise: seconds of work a case
    for number in range(6):
        for folder in ("pred", "truth"):
            path = tmp_path / folder / f"{number}.nii"
            path.parent.mkdir(exist_ok=True)
            write_nifti(path, np.roll(label, number + (folder == "pred"), 0), ras_grid_at((64, 64, 64)))
    program = [sys.executable, "-m", "ftengine.cli.main", "evaluate", str(tmp_path / "pred"), str(tmp_path / "truth")]
    running = subprocess.Popen(
        [*program, "--region", "demo", "--workers", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert running.stderr is not None
    assert running.stderr.readline().startswith("[1/6] ")
    os.killpg(running.pid, signal.SIGINT)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == 130
    assert "interrupted" in errors
    assert "Traceback" not in errors
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            os.killpg(running.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail("a worker lives on")
