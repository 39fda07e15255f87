"""What the training commands print: estimates, progress, JSON lines, hashes, and the patches of a broken step."""

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from ftengine.cli import console
from ftengine.cli.train import _step_size
from ftengine.cli.training_view import StepSize, training_view
from ftengine.training.run import read_metrics
from ftengine.training.weight_files import sha256_of
from tests.cli.test_cli import _error, _run
from tests.support import make_store, small_config

CONFIG = small_config(training__steps=4, generator_training__steps=3, device="cpu")
VALUES = {
    "loss": 1.25,
    "epoch": 2.0,
    "step_s": 0.5,
    "wait_s": 0.1,
    "loader/wait_fraction": 0.2,
    "qc/window_pass_rate": 0.625,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with store.zarr, c.yaml and the baseline s."""
    folder = tmp_path_factory.mktemp("view")
    make_store(folder, CONFIG)
    (folder / "c.yaml").write_text(CONFIG.to_yaml())
    _run("train", "seg", folder / "store.zarr", "--out", folder / "s", "--config", folder / "c.yaml")
    return folder


def test_json_log_is_a_document_a_line_and_nothing_else(place: Path, tmp_path: Path) -> None:
    arguments = [
        "--out",
        tmp_path / "g",
        "--config",
        place / "c.yaml",
        "--baseline",
        place / "s" / "weights.safetensors",
    ]
    done = _run("train", "synth", place / "store.zarr", *arguments, "--json-log")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["event"] for line in lines] == ["step"] * 3 + ["end"]
    metrics = read_metrics(tmp_path / "g")
    assert [line["step"] for line in metrics] == [0, 1, 2]
    assert [{name: x for name, x in line.items() if name != "event"} for line in lines[:3]] == metrics
    assert all({"loss_classifier", "learning_rate", "epoch", "step_s"} <= line.keys() for line in lines[:3])
    assert lines[-1]["checkpoint"] == str(tmp_path / "g" / "checkpoint.pt")
    digest = sha256_of(place / "s" / "weights.safetensors")
    assert f"--baseline {place / 's' / 'weights.safetensors'}: sha256 {digest}" in done.stderr
    assert json.loads((tmp_path / "g" / "run.json").read_text())["given"] == {"--baseline": f"sha256:{digest}"}


def test_warnings_are_events_too(capsys: pytest.CaptureFixture[str]) -> None:
    with training_view("t", loss="loss", steps=9, step=StepSize(4), json_log=True, quiet=False) as view:
        view.warn("mind this")
        view(1, {})
    out, err = capsys.readouterr()
    assert [json.loads(line) for line in out.splitlines()] == [{"event": "warning", "text": "mind this"}]
    assert err == "warning: mind this\n"


def test_json_and_json_log_exclude_each_other(place: Path, tmp_path: Path) -> None:
    done = _run("train", "seg", place / "store.zarr", "--out", tmp_path / "x", "--json", "--json-log", code=2)
    assert "give one of" in done.stderr
    assert not (tmp_path / "x").exists()


def test_plain_lines_hold_all_figures(capsys: pytest.CaptureFixture[str]) -> None:
    with training_view("t", loss="loss", steps=9, step=StepSize(4), json_log=False, quiet=False) as view:
        view(1, VALUES)
        view(2, {})
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "[1/9] step 1: epoch 2, loss 1.2500, 8 patches/s, waited 20%, QC passes 62%, 4 s left\n"


def test_the_time_left_is_that_of_all_batches(capsys: pytest.CaptureFixture[str]) -> None:
    """step_s is of a batch; here of three in each of two processes."""
    with training_view("t", loss="loss", steps=9, step=StepSize(8, 3), json_log=False, quiet=False) as view:
        view(1, VALUES)
    assert "16 patches/s, waited 20%, QC passes 62%, 12 s left\n" in capsys.readouterr().err


def test_accumulation_and_processes_reach_the_view(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    settings = CONFIG.with_overrides({"training.accumulate": 3}).training
    assert _step_size(settings) == StepSize(patches=4, batches=3)


def test_the_generators_view_shows_the_loss_that_is_trained(place: Path, tmp_path: Path) -> None:
    options = ["--baseline", place / "s" / "checkpoint.pt", "--config", place / "c.yaml", "--out", tmp_path / "g"]
    shown = _run("train", "synth", place / "store.zarr", *options, "--set", "generator_training.losses=fools").stderr
    losses = [row["loss_fools"] for row in read_metrics(tmp_path / "g")]
    assert len(losses) == 3
    for loss in losses:
        assert f"loss_fools {loss:.4f}, " in shown


def test_gpu_memory_is_shown_where_there_is_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("is_available", True), ("is_initialized", True), ("memory_reserved", 3_456_000_000)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    with training_view("t", loss="loss", steps=1, step=StepSize(4), json_log=False, quiet=False) as view:
        view(1, VALUES)
    assert "GPU 3.5 GB" in capsys.readouterr().err


def test_a_terminal_gets_a_bar_with_the_figures_and_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(console, "Console", lambda **_: Console(file=screen, force_terminal=True, width=160))
    with training_view("training", loss="loss", steps=3, step=StepSize(4), json_log=False, quiet=False) as view:
        for step in (1, 2, 3):
            view(step, VALUES)
        view.note("a note above the bar")
    shown = screen.getvalue()
    assert "3/3" in shown
    assert "loss 1.2500, 8 patches/s, waited 20%" in shown
    assert "a note above the bar" in shown


def test_a_dry_run_prints_what_it_will_take_and_stops(place: Path, tmp_path: Path) -> None:
    arguments = [
        "train",
        "seg",
        place / "store.zarr",
        "--out",
        tmp_path / "x",
        "--config",
        place / "c.yaml",
        "--dry-run",
    ]
    text = _run(*arguments).stdout
    assert text.splitlines()[0] == "4 steps of 2 patches: 4.0 epochs of 2 from 2 volumes"
    for part in ("memory of a step: ", " s a step, about ", "a checkpoint takes "):
        assert part in text
    document = json.loads(_run(*arguments, "--json").stdout)
    assert document["steps"] == 4
    assert document["memory"]["fits"] is True
    assert document["total_s"] == pytest.approx(4 * document["step_s"])
    assert not (tmp_path / "x").exists()
    baseline = place / "s" / "checkpoint.pt"
    generator = [
        "train",
        "synth",
        place / "store.zarr",
        "--out",
        tmp_path / "x",
        "--config",
        place / "c.yaml",
        "--baseline",
        baseline,
    ]
    assert json.loads(_run(*generator, "--dry-run", "--json").stdout)["kind"] == "generator"
    assert not (tmp_path / "x").exists()


def test_the_estimate_comes_before_the_first_step(place: Path, tmp_path: Path) -> None:
    done = _run("train", "seg", place / "store.zarr", "--out", tmp_path / "x", "--config", place / "c.yaml")
    lines = done.stderr.splitlines()
    assert lines[1].startswith("memory of a step: ")
    assert lines[2].startswith("[1/4] step 1: epoch 0, loss ")
    quiet = _run("train", "seg", place / "store.zarr", "--out", tmp_path / "y", "--config", place / "c.yaml", "--quiet")
    assert quiet.stderr == ""


def test_replay_shows_the_patches_of_the_broken_step(place: Path, tmp_path: Path) -> None:
    run = tmp_path / "x"
    broken = ["--set", "training.learning_rate=1e18", "--set", "training.warmup_steps=0", "--set", "training.steps=40"]
    text = _error("train", "seg", place / "store.zarr", "--out", run, "--config", place / "c.yaml", *broken, code=2)
    (file,) = run.glob("replay-*.json")
    assert f"ftengine replay {file}" in text
    done = _run("replay", file)
    assert "All patches are finite" in done.stdout
    assert "a/0" in done.stdout or "a/1" in done.stdout
    assert len(list(file.with_suffix("").glob("*.png"))) == 2
    document = json.loads(_run("replay", file, "--all", "--json", "--out", tmp_path / "pictures").stdout)
    assert document["reason"].startswith("loss is ")
    assert all(p["as_recorded"] and p["num_not_finite"] == 0 for p in document["patches"])
    assert len(document["patches"]) == len(list((tmp_path / "pictures").iterdir()))
    moved = tmp_path / "elsewhere.zarr"
    (place / "store.zarr").rename(moved)
    try:
        assert "store.zarr" in _error("replay", file, code=3)
        _run("replay", file, "--store", moved)
    finally:
        moved.rename(place / "store.zarr")
