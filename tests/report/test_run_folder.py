"""Run folders in every state: whole, going on, killed, old, broken, none."""

import json
from pathlib import Path
from typing import Any

import pytest

from ftengine.errors import ConfigError
from ftengine.report.run_folder import distinct_names, read_run, read_runs


def write_run(folder: Path, *, num_lines: int = 10, result: dict[str, Any] | None = None, **document: Any) -> Path:
    """A run's folder as training writes it."""
    folder.mkdir(parents=True)
    lines = [
        {
            "step": s,
            "loss": 2.0 / (s + 1),
            "learning_rate": 1e-3,
            "step_s": 0.5,
            "loader/wait_fraction": 0.1 if s < 50 else 0.3,
            "loader/busy/reads": 0.2,
            "loader/level/reads": 3.0,
        }
        for s in range(9, 10 * num_lines, 10)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    (folder / "validation.jsonl").write_text("", encoding="utf-8")
    config = {"training": {"steps": 100, "batch_size": 2, "accumulate": 1}, "qc": {"threshold": 0.5}}
    details = {"config": config, "versions": {"ftengine": "0.1.0"}, "kind": "segmenter", **document}
    (folder / "run.json").write_text(json.dumps(details), encoding="utf-8")
    (folder / "config.yaml").write_text("seed: 0\n", encoding="utf-8")
    if result is not None:
        (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
    return folder


def test_whole_run(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "a", result={"interrupted": False}))
    assert run.notes == ()
    assert (run.name, run.kind, run.steps_done, run.steps_wanted) == ("a", "segmenter", 100, 100)
    assert run.series("loss")[0] == list(range(10, 101, 10))
    assert run.weighted("loader/wait_fraction") == pytest.approx(0.2)
    assert sum(run.line_seconds()) == pytest.approx(50.0)
    assert run.setting("qc", "threshold") == 0.5
    assert run.samples_per_step == 2.0


def test_run_that_goes_on_or_was_killed(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "a", num_lines=4))
    assert any("Unfinished: 40 of 100 steps" in note for note in run.notes)
    stopped = read_run(write_run(tmp_path / "b", num_lines=4, result={"interrupted": True}))
    assert any("Interrupted after 40 of 100" in note for note in stopped.notes)
    empty = read_run(write_run(tmp_path / "c", num_lines=0))
    assert any("nothing to draw" in note for note in empty.notes)


def test_last_line_that_is_cut_off(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", result={})
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    (folder / "metrics.jsonl").write_text(text[:-30], encoding="utf-8")
    run = read_run(folder)
    assert run.steps_done == 90
    assert any("last line of metrics.jsonl is cut off" in note for note in run.notes)


def test_broken_lines_and_files_are_counted(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a")
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as stream:
        stream.write('nonsense\n[1]\n{"loss": 1}\n{"step": 109, "loss": NaN, "x": "text", "y": true, "z": 1e999}\n')
    (folder / "run.json").write_text("{", encoding="utf-8")
    (folder / "config.yaml").unlink()
    run = read_run(folder)
    assert dict(run.metrics[-1]) == {"step": 109.0}
    assert any("3 of 14 lines of metrics.jsonl cannot be read (the first: line 11)" in note for note in run.notes)
    assert any("run.json cannot be read" in note for note in run.notes)
    assert any("config.yaml cannot be read" in note for note in run.notes)
    assert (run.kind, run.steps_wanted, run.samples_per_step) == ("", None, None)


def test_nested_nonsense_does_not_break_it(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", result={})
    (folder / "metrics.jsonl").write_text("[" * 100_000 + "\n", encoding="utf-8")
    (folder / "result.json").write_text('{"a":' * 100_000, encoding="utf-8")
    run = read_run(folder)
    assert run.metrics == []
    assert run.result is None


@pytest.mark.parametrize("kind", ["missing", "file", "empty"])
def test_what_is_no_run_is_refused(tmp_path: Path, kind: str) -> None:
    place = tmp_path / "x"
    if kind == "file":
        place.write_text("x", encoding="utf-8")
    elif kind == "empty":
        place.mkdir()
    with pytest.raises(ConfigError, match="training run" if kind == "empty" else "is no folder"):
        read_run(place)


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / part / "run") for part in "ab"]
    assert [run.name for run in read_runs(folders)] == ["a/run", "b/run"]
    assert [run.name for run in read_runs(folders[:1])] == ["run"]
    assert [run.name for run in read_runs([folders[0], folders[0]])] == ["run", "run"]


def test_files_of_one_name_are_told_apart(tmp_path: Path) -> None:
    files = [tmp_path / part / "scores.json" for part in "ab"]
    for file in files:
        file.parent.mkdir()
        file.touch()
    assert distinct_names(files) == ["a/scores", "b/scores"]
    assert distinct_names(files[:1]) == ["scores"]
    assert distinct_names([]) == []


def test_latest_pictures(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a")
    for step in (20, 100):
        place = folder / "pictures" / f"step-{step:07d}"
        place.mkdir(parents=True)
        (place / "sheet-000.png").write_bytes(b"x")
    (folder / "pictures" / "step-0000200").mkdir()  # not drawn yet
    assert [p.parent.name for p in read_run(folder).pictures] == ["step-0000100"]
