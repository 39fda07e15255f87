"""A damaged volume in training: told, counted, skipped; a run that cannot do without it stops."""

import json
import subprocess
import sys
from pathlib import Path

from tests.support import make_store, small_config


def _train(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "ftengine.cli.main", "train", "seg", str(folder / "store.zarr")]
    return subprocess.run(
        [*command, "--out", str(folder / "run"), "--config", str(folder / "c.yaml"), *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_bad_volume_is_named_and_training_goes_on(tmp_path: Path) -> None:
    config = small_config(training__steps=6, loader__max_bad_fraction=0.5)
    (tmp_path / "c.yaml").write_text(config.to_yaml())
    store = make_store(tmp_path, config, num_annotated=3, num_organs=0)
    (store.path / "volumes/a/1/labels/seg/0/c/0/0/0").unlink()
    done = _train(tmp_path, "--json")
    assert done.returncode == 0, done.stderr
    assert "a/1 could not be read and is skipped; 'ftengine store verify' says why" in done.stderr
    document = json.loads(done.stdout)
    assert document["steps"] == 6
    assert list(document["bad_reads"]) == ["a/1"]
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loader/bad_reads"] >= 1
    shown = _train(tmp_path, "--resume", "--allow", "training.steps", "--set", "training.steps=8")
    assert shown.returncode == 0, shown.stderr
    assert "reads failed and were replaced: a/1 (" in shown.stdout


def test_too_many_stop_it_with_the_stores_exit_code(tmp_path: Path) -> None:
    config = small_config(training__steps=200)
    (tmp_path / "c.yaml").write_text(config.to_yaml())
    store = make_store(tmp_path, config, num_annotated=2, num_organs=0)
    (store.path / "volumes/a/1/0/c/0/0/0").unlink()
    done = _train(tmp_path)
    assert done.returncode == 3
    assert "a chunk is missing or damaged" in done.stderr
    assert "loader.max_bad_fraction=0.01 of at least 100" in done.stderr
    assert "Traceback" not in done.stderr
