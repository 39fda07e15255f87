"""``ftengine report`` on what the other commands leave: runs, evaluations, predictions, a store."""

import json
from pathlib import Path

import pytest

from ftengine.assemble import train_segmentation, train_synthesis
from ftengine.store.reader import open_store
from ftengine.volume.nifti import write_nifti
from tests.cli.test_cli import _error, _run
from tests.support import make_store, small_config

CONFIG = small_config(training__steps=4, generator_training__steps=2, qc__threshold=0.5, inference__overlap=0.25)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store, a configuration and three runs."""
    folder = tmp_path_factory.mktemp("report")
    store = make_store(folder, CONFIG)
    (folder / "small.yaml").write_text(CONFIG.to_yaml(), encoding="utf-8")
    baseline = train_segmentation(CONFIG, store.path, folder / "baseline")
    generator = train_synthesis(CONFIG, store.path, folder / "generator", baseline=baseline.checkpoint)
    train_segmentation(
        CONFIG,
        store.path,
        folder / "student",
        generator_path=generator.checkpoint,
        judge_path=baseline.checkpoint,
    )
    return folder


def _report(place: Path, out: Path, *arguments: object) -> str:
    done = _run("report", *arguments, "--out", out, "-q")
    assert done.stdout.split() == [str(out)]
    return out.read_text(encoding="utf-8")


def test_report_of_runs_alone(place: Path, tmp_path: Path) -> None:
    text = _report(place, tmp_path / "r.html", *(place / name for name in ("baseline", "generator", "student")))
    for words in ("Segmenter, 4 of 4 steps", "Generator, 2 of 2 steps", "Distribution of P", "Pass rate by size class"):
        assert words in text
    assert "Painted tumours by organ and size class" in text
    assert "No evaluation was given" in text
    assert text.count("This run was not validated while it trained") == 2
    assert "Unfinished" not in text


def test_report_scores_and_draws_a_checkpoint(place: Path, tmp_path: Path) -> None:
    text = _report(
        place,
        tmp_path / "r.html",
        place / "student",
        *("--store", place / "store.zarr", "--checkpoint", place / "student" / "checkpoint.pt", "--cases", "1"),
        *("--synth", place / "generator" / "checkpoint.pt", "--judge", place / "baseline" / "checkpoint.pt"),
        *("--painted", "2", "--config", place / "small.yaml", "--window", "liver", "--title", "<b>Mine</b>"),
    )
    assert "<h1>&lt;b&gt;Mine&lt;/b&gt;</h1>" in text
    assert "Worst 1 of 2 by Dice" in text
    assert "Best 1 of 2 by Dice" in text
    assert "2 tumours in the order of the size classes" in text
    assert "liver window \N{MINUS SIGN}45 to 105 HU" in text


def test_report_draws_predictions_with_an_evaluation(place: Path, tmp_path: Path) -> None:
    opened = open_store(place / "store.zarr")
    folder = tmp_path / "predicted"
    folder.mkdir()
    write_nifti(folder / "0.nii.gz", opened.read_volume("a/0").label, opened.grid("a/0"))
    checkpoint = place / "baseline" / "checkpoint.pt"
    scored = _run("evaluate", checkpoint, place / "store.zarr", "--json", "-q")
    (tmp_path / "scores.json").write_text(scored.stdout, encoding="utf-8")
    text = _report(
        place,
        tmp_path / "r.html",
        *("--evaluation", tmp_path / "scores.json", "--store", place / "store.zarr", "--predictions", folder),
    )
    assert text.count('class="prediction" d=') >= 4
    assert "holds no prediction of it (1.nii.gz)" in text
    alone = _report(place, tmp_path / "r2.html", "--store", place / "store.zarr", "--predictions", folder)
    assert "files that could not be scored" in alone
    assert "1.000" in alone  # the truth itself was given as the prediction


def test_bad_requests_are_one_line(place: Path, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "r.html")
    store, checkpoint = place / "store.zarr", place / "baseline" / "checkpoint.pt"
    empty = tmp_path / "empty.json"
    empty.write_text(json.dumps({"cases": [], "summary": {}}), encoding="utf-8")
    assert "nothing to report on" in _error("report", *out, code=2)
    assert "not the folder of a training run" in _error("report", tmp_path, *out, code=2)
    assert "is no folder" in _error("report", tmp_path / "none", *out, code=2)
    assert "give --store" in _error("report", place / "baseline", "--checkpoint", checkpoint, *out, code=2)
    both = ("--checkpoint", checkpoint, "--predictions", tmp_path)
    assert "give one of them" in _error("report", "--store", store, *both, *out, code=2)
    other = tmp_path / "other.json"
    other.write_text(empty.read_text(encoding="utf-8"), encoding="utf-8")
    assert "given twice" in _error("report", "--evaluation", empty, "--evaluation", empty, *out, code=2)
    two = ("--evaluation", empty, "--evaluation", other)
    assert "2 evaluations and 1 predictions" in _error("report", "--store", store, *two, *both[:2], *out, code=2)
    assert "cannot be read as JSON" in _error("report", "--evaluation", tmp_path / "none.json", *out, code=2)
    assert "--window 5" in _error("report", "--evaluation", empty, "--window", "5", *out, code=2)
    assert not (tmp_path / "r.html").exists()


def test_report_of_a_run_that_is_being_written(place: Path, tmp_path: Path) -> None:
    folder = tmp_path / "going"
    folder.mkdir()
    for name in ("metrics.jsonl", "run.json", "config.yaml"):
        (folder / name).write_bytes((place / "student" / name).read_bytes())
    whole = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    (folder / "metrics.jsonl").write_text(whole[:-40], encoding="utf-8")
    text = _report(place, tmp_path / "r.html", folder)
    assert "Unfinished: 3 of 4 steps are logged" in text
    assert "last line of metrics.jsonl is cut off" in text
    assert "Pass rates so far; counts come when the run ends" in text
