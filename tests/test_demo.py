"""The demo runs the whole road and leaves a report and a summary."""

import json
import re
from pathlib import Path

import pytest

from ftengine.demo import run_demo
from ftengine.errors import ConfigError
from ftengine.store.reader import open_store


def test_the_quick_demo_runs_every_stage(tmp_path: Path) -> None:
    said: list[str] = []
    summary = run_demo(tmp_path / "demo", quick=True, say=said.append)
    assert json.loads((tmp_path / "demo" / "summary.json").read_text()) == json.loads(json.dumps(summary))
    assert {"dice_baseline", "dice_synthesis", "qc_pass_rate", "wait_fraction", "patches_per_s", "versions"} <= set(
        summary
    )
    stages = [
        "phantoms",
        "convert",
        "baseline",
        "generator",
        "calibrate",
        "student without synthesis",
        "student with synthesis",
        "evaluate",
        "pictures",
    ]
    assert list(summary["seconds_per_stage"]) == stages
    assert [line for line in said if line.endswith(" ...")] == [f"{stage} ..." for stage in stages]
    store = open_store(tmp_path / "demo" / "store.zarr")
    assert sorted(set(store.index.column("annotation").to_pylist())) == ["organ", "tumor"]
    assert summary["quality"]["by_organ"]["liver"]["painted"] > 0
    report = (tmp_path / "demo" / "report.html").read_text(encoding="utf-8")
    assert len(report.encode()) < 5_000_000
    assert "phantom" in report
    assert not re.search(r'(src|href)="https?://', report)


def test_the_demo_replaces_only_its_own_folder(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="was not made by the demo"):
        run_demo(tmp_path)
    assert (tmp_path / "thesis.txt").exists()
