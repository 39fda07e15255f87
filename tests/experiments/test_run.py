"""The plan on phantoms, whole: run, killed and taken up, changed, failing; by the command line."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from ftengine.cli.main import app
from ftengine.errors import ConfigError
from ftengine.experiments.folder import is_done, read_result, result_file
from ftengine.experiments.plan import shipped_plan
from ftengine.store.export import export_case
from ftengine.store.reader import open_store

ROOT = Path(__file__).parents[2]
FEW = ["--method", "baseline", "--method", "freetumor", "--fold", "0", "--jobs", "2"]


def _call(*arguments: str) -> tuple[int, str]:
    """Exit code and stdout of ``ftengine experiment ...``."""
    done = CliRunner().invoke(app, ["experiment", *arguments], catch_exceptions=False)
    return done.exit_code, done.stdout


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped plan, run to its end."""
    folder = tmp_path_factory.mktemp("whole") / "experiment"
    code, _ = _call("run", "phantoms", "--out", str(folder), "--jobs", "2", "--quiet")
    assert code == 0
    return folder


def test_the_plan_on_phantoms_fills_its_tables(whole: Path) -> None:
    document = json.loads((whole / "table.json").read_text())
    assert document["num_done"] == document["num_evaluations"] == 24
    table = document["tables"]["dice"]
    assert table["columns"] == ["home", "home to abroad"]
    assert len(table["rows"]) == 6
    assert all(len(cell["values"]) == 2 for cell in table["cells"])
    assert {(t["method"], t["column"]) for t in document["tests"] if t["measure"] == "dice"} == {
        (method, column)
        for method in ("copy-paste", "syntumor", "constant", "freetumor", "released")
        for column in table["columns"]
    }
    kinds = [file.parent.name.split("-")[0] for file in whole.glob("units/*/result.json")]
    assert {kind: kinds.count(kind) for kind in kinds} == {
        "segmenter": 2,
        "generator": 4,
        "student": 10,
        "calibration": 2,
        "evaluation": 24,
    }
    student = next(read_result(whole, f.parent.name) for f in whole.glob("units/student-*/result.json"))
    assert student["steps"] == 4
    assert student["mix"]["painted"] > 0


def test_the_same_command_does_nothing_again(whole: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in whole.glob("units/*/result.json")}
    code, printed = _call("run", "phantoms", "--out", str(whole), "--json")
    assert code == 0
    assert json.loads(printed)["missing"] == []
    assert {file: file.stat().st_mtime_ns for file in whole.glob("units/*/result.json")} == before


def test_tables_need_no_store(whole: Path) -> None:
    before = (whole / "table.md").read_text()
    hidden = whole / "stores-elsewhere"
    (whole / "stores").rename(hidden)
    try:
        code, printed = _call("table", str(whole))
    finally:
        hidden.rename(whole / "stores")
    assert (code, (whole / "table.md").read_text()) == (0, before)
    assert "24 of 24 evaluations are done" in printed


def test_status_counts_units_and_tells_their_time(whole: Path) -> None:
    code, printed = _call("status", str(whole), "--json")
    document = json.loads(printed)
    assert (code, len(document["done"]), document["missing"], document["failed"]) == (0, 42, [], {})
    assert set(document["mean_seconds"]) == {"segmenter", "generator", "student", "calibration", "evaluation"}


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    code, printed = _call("run", "phantoms", "--out", str(tmp_path / "e"), "--dry-run", "--method", "baseline")
    assert code == 0
    assert not (tmp_path / "e").exists()
    assert "S of baseline, home, fold 1" in printed
    assert "6 units are open, 8 training steps; 'ftengine train seg STORE --dry-run' measures" in printed


def _run_and_kill(folder: Path, num_done: int, *, group: bool) -> None:
    """Start a run and kill it with SIGKILL once so many units are done: its whole group, or the one process."""
    command = [sys.executable, "-m", "ftengine.cli.main", "experiment", "run", "phantoms", "--out", str(folder), *FEW]
    process = subprocess.Popen(
        command, cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    for _ in range(3000):
        if len(list(folder.glob("units/*/result.json"))) >= num_done or process.poll() is not None:
            break
        time.sleep(0.02)
    assert process.poll() is None
    (os.killpg if group else os.kill)(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two methods of the plan: killed, killed again in another way, then run to the end."""
    folder = tmp_path_factory.mktemp("killed") / "experiment"
    _run_and_kill(folder, 1, group=True)
    _run_and_kill(folder, 3, group=False)  # its workers save and end on their own
    code, _ = _call("run", "phantoms", "--out", str(folder), *FEW, "--quiet")
    assert code == 0
    return folder


def test_a_killed_run_ends_with_the_same_table(whole: Path, resumed: Path) -> None:
    tables = [json.loads((folder / "table.json").read_text())["tables"]["dice"]["cells"] for folder in (whole, resumed)]
    rows = {"Baseline", "FreeTumor"}
    one, other = ({(c["row"], c["column"]): c["values"] for c in cells if c["row"] in rows} for cells in tables)
    assert {key: values[:1] for key, values in one.items()} == other
    done = [file.parent.name for file in resumed.glob("units/evaluation-*/result.json")]
    assert len(done) == 4
    for key in done:
        assert read_result(resumed, key)["evaluation"] == read_result(whole, key)["evaluation"]


def test_a_unit_that_fails_is_listed_and_the_others_go_on(resumed: Path, tmp_path: Path) -> None:
    values = yaml.safe_load(shipped_plan("phantoms"))
    keys = {
        "qc.min_pass_rate": 1.0,
        "qc.window": 1,
        "qc.threshold": 1.0,
    }  # nothing passes, so training would be on nothing
    values["methods"]["strict"] = {**values["methods"]["constant"], "title": "Strict", "set": keys}
    plan = tmp_path / "plan.yaml"
    plan.write_text(yaml.safe_dump(values, sort_keys=False))
    before = set(resumed.glob("units/*/result.json"))
    arguments = ["run", str(plan), "--out", str(resumed), "--method", "strict", "--method", "copy-paste", "--fold", "0"]
    code, printed = _call(*arguments, "--json")
    document = json.loads(printed)
    assert code == 1
    (key,) = document["failed"]
    assert document["titles"][key] == "strict, home, fold 0"
    assert "quality control" in document["failed"][key]
    new = [file.parent.name for file in set(resumed.glob("units/*/result.json")) - before]
    assert sorted(name.split("-")[0] for name in new) == ["evaluation", "evaluation", "student"]  # copy-paste
    assert not any(is_done(resumed, k) for k in document["missing"])
    assert {document["titles"][k] for k in document["missing"]} == {
        "strict, home, fold 0, scored on fold 0",
        "strict, home, fold 0, scored on abroad",
    }
    code, printed = _call("status", str(resumed), "--json")
    assert (code, list(json.loads(printed)["failed"])) == (1, [key])
    assert "Strict" in (resumed / "table.md").read_text()


def test_predictions_of_others_are_scored(whole: Path, tmp_path: Path) -> None:
    store = open_store(whole / "stores" / "liver.zarr")
    fold_of: dict[str, str] = {}
    for key in (file.parent.name for file in whole.glob("units/evaluation-*/unit.json")):
        unit = read_result(whole, key)
        if "scored on fold" in unit["title"]:
            fold_of |= dict.fromkeys(unit["spec"]["cases"], unit["title"][-1])
    assert len(fold_of) == 4
    for case, fold in fold_of.items():
        image, label = export_case(store, case, tmp_path / fold / "truth")
        image.unlink()
        predicted = tmp_path / fold / "predicted" / label.relative_to(tmp_path / fold / "truth")
        predicted.parent.mkdir(parents=True, exist_ok=True)
        predicted.write_bytes(label.read_bytes())  # a perfect method
    values = yaml.safe_load(shipped_plan("phantoms"))
    place = str(tmp_path / "{fold}")
    values["external"]["nnunet"] |= {"predictions": f"{place}/predicted/{{task}}", "truth": f"{place}/truth/{{task}}"}
    plan = tmp_path / "plan.yaml"
    plan.write_text(yaml.safe_dump(values, sort_keys=False))
    code, printed = _call("run", str(plan), "--out", str(whole), "--method", "nnunet", "--json")
    assert code == 0, printed
    cells = {(c["row"], c["column"]): c["values"] for c in json.loads(printed)["tables"]["dice"]["cells"]}
    assert cells["nnUNet", "home"] == [1.0, 1.0]
    assert cells["nnUNet", "home to abroad"] == []


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: (folder / "x").write_text("mine"), "is not empty and holds no experiment"),
        (lambda folder: (folder.rmdir(), folder.write_text("")), "is a file"),
    ],
)
def test_a_folder_of_something_else_is_left_alone(tmp_path: Path, make: Any, message: str) -> None:
    folder = tmp_path / "e"
    folder.mkdir()
    make(folder)
    with pytest.raises(ConfigError, match=message):
        _call("run", "phantoms", "--out", str(folder))


def test_the_commands_that_need_no_data(tmp_path: Path) -> None:
    code, printed = _call("list", "--json")
    assert code == 0
    assert json.loads(printed)["table-a15"]["repeats"] == 5
    code, printed = _call("show", "table-a5")
    assert printed == shipped_plan("table-a5")
    with pytest.raises(ConfigError, match="no such plan"):
        _call("show", "table-a1")
    with pytest.raises(ConfigError, match="or a plan with --out"):
        _call("status", "table-a5")
    with pytest.raises(ConfigError, match="want NAME=PATH"):
        _call("status", "table-a5", "--out", str(tmp_path), "--store", "liver")


def test_several_processes_train_one_unit(tmp_path: Path, whole: Path) -> None:
    values = yaml.safe_load(shipped_plan("phantoms")) | {"processes": 2}
    plan = tmp_path / "plan.yaml"
    plan.write_text(yaml.safe_dump(values, sort_keys=False))
    folder = tmp_path / "e"
    arguments = ["run", str(plan), "--out", str(folder), "--store", f"liver={whole / 'stores' / 'liver.zarr'}"]
    code, printed = _call(*arguments, "--method", "baseline", "--fold", "0", "--device", "cpu", "--json")
    assert code == 0, printed
    (key,) = (file.parent.name for file in folder.glob("units/segmenter-*/result.json"))
    assert read_result(folder, key)["spec"]["processes"] == 2
    assert not result_file(whole, key).exists()  # steps of twice the patches are another training
