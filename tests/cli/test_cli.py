"""The command line: one line an error, the documented exit codes, JSON alone on stdout."""

import contextlib
import io
import json
import subprocess
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from ftengine.cli.main import run
from ftengine.errors import FtengineError
from ftengine.store.reader import open_store
from ftengine.volume.nifti import write_nifti
from tests.support import make_store, organ_volume, ras_grid_at, small_config

CONFIG = small_config(training__steps=3, generator_training__steps=2)


@dataclass(frozen=True)
class Done:
    """What a command printed."""

    stdout: str
    stderr: str


def _run(*arguments: object, code: int = 0) -> Done:
    """Run a command line in this process (a new one would spend seconds importing torch) and check its exit code."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["ftengine", *map(str, arguments)])
        try:
            run()
        except SystemExit as stop:
            found = int(stop.code or 0)
        except FtengineError:  # with --debug, errors are not caught
            traceback.print_exc()
            found = 1
        else:
            found = 0
    assert found == code, f"{found}: {out.getvalue()}\n{err.getvalue()}"
    return Done(out.getvalue(), err.getvalue())


def _nifti(path: Path) -> Any:
    return nibabel.load(path)


def _error(*arguments: object, code: int) -> str:
    """The one line on stderr of a command that must fail with ``code``."""
    done = _run(*arguments, code=code)
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("ftengine: error: ")]
    assert len(lines) == 1, done.stderr
    return lines[0]


def _write_case(folder: Path, name: str, *, tumor: bool = False, shape: tuple[int, int, int] = (30, 32, 34)) -> Path:
    image, label = organ_volume(shape, tumor=tumor, seed=len(name))
    folder.mkdir(parents=True, exist_ok=True)
    write_nifti(folder / f"{name}_ct.nii.gz", image, ras_grid_at(shape))
    write_nifti(folder / f"{name}_label.nii.gz", label, ras_grid_at(shape))
    return folder / f"{name}_ct.nii.gz"


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("config") / "small.yaml"
    file.write_text(CONFIG.to_yaml())
    return file


@pytest.fixture(scope="module")
def store_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("cli"), CONFIG).path


@pytest.fixture(scope="module")
def baseline(store_path: Path, config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "baseline"
    done = _run("train", "seg", store_path, "--out", out, "--config", config_file)
    assert "training waited" in done.stdout
    return out / "checkpoint.pt"


def test_the_program_itself_shows_help_and_one_line_errors(tmp_path: Path) -> None:
    """Once as a user starts it: a process of its own."""
    program = [sys.executable, "-m", "ftengine.cli.main"]
    done = subprocess.run([*program, "--help"], capture_output=True, text=True, check=True)
    for command in ("demo", "convert", "store", "train", "predict", "evaluate", "preview", "doctor"):
        assert command in done.stdout
    assert "130 interrupted" in done.stdout
    failed = subprocess.run([*program, "store", "info", str(tmp_path)], capture_output=True, text=True, check=False)
    assert (failed.returncode, failed.stdout) == (3, "")
    assert failed.stderr.startswith("ftengine: error: ")
    assert len(failed.stderr.splitlines()) == 1
    assert _run("--version").stdout.startswith("ftengine 0.")


@pytest.mark.parametrize(
    "command",
    [
        "convert",
        "store info",
        "train seg",
        "train synth",
        "predict",
        "evaluate",
        "preview",
        "replay",
        "doctor",
        "config",
        "demo",
    ],
)
def test_every_command_has_help(command: str) -> None:
    assert "Usage" in _run(*command.split(), "--help").stdout


# convert and store


def test_convert_lists_bad_files_and_goes_on(tmp_path: Path) -> None:
    _write_case(tmp_path / "src", "good", tumor=True)
    bad = _write_case(tmp_path / "src", "truncated")
    bad.write_bytes(bad.read_bytes()[:2000])
    done = _run(
        "convert", tmp_path / "src", tmp_path / "s.zarr", "--region", "demo", "--dataset", "d", "--json", code=1
    )
    report = json.loads(done.stdout)
    assert (report["converted"], report["failed"]) == (1, 1)
    failed = next(c for c in report["cases"] if c["status"] == "failed")
    assert failed["case"] == "d/truncated"
    assert "truncated_ct.nii.gz" in failed["reason"]
    assert open_store(tmp_path / "s.zarr").cases == ["d/good"]


def test_convert_again_skips_what_is_there_and_redoes_what_changed(tmp_path: Path) -> None:
    _write_case(tmp_path / "src", "a")
    _write_case(tmp_path / "src", "b", shape=(31, 32, 33))
    arguments = ("convert", tmp_path / "src", tmp_path / "s.zarr", "--region", "demo", "--json")
    assert json.loads(_run(*arguments).stdout)["converted"] == 2
    _write_case(tmp_path / "src", "b", tumor=True, shape=(31, 32, 33))
    report = json.loads(_run(*arguments).stdout)
    assert (report["converted"], report["skipped"]) == (1, 1)
    store = open_store(tmp_path / "s.zarr")
    assert store.row("data/b")["num_tumors"] == 1


def test_convert_again_with_other_options_does_what_it_is_told(tmp_path: Path) -> None:
    _write_case(tmp_path / "src", "a")
    arguments = ("convert", tmp_path / "src", tmp_path / "s.zarr", "--region", "demo", "--json")
    _run(*arguments)
    assert open_store(tmp_path / "s.zarr").row("data/a")["annotation"] == "organ"
    report = json.loads(_run(*arguments, "--annotated", "tumor", "--split", "train").stdout)
    assert report["converted"] == 1
    assert any("replaces the volume" in note for note in report["cases"][0]["notes"])
    row = open_store(tmp_path / "s.zarr").row("data/a")
    assert (row["annotation"], row["split"]) == ("tumor", "train")
    _run(*arguments, "--annotated", "tumor", "--split", "train", "--label-map", "1=0")
    assert open_store(tmp_path / "s.zarr").row("data/a")["class_voxels"][1] == 0


def test_convert_dry_run_writes_nothing(tmp_path: Path) -> None:
    _write_case(tmp_path / "src", "a")
    done = _run("convert", tmp_path / "src", tmp_path / "s.zarr", "--region", "demo", "--dry-run", "--json")
    assert json.loads(done.stdout)["cases"][0]["shape_zyx"] == [30, 32, 34]
    assert not (tmp_path / "s.zarr").exists()


def test_convert_errors(tmp_path: Path, store_path: Path) -> None:
    image = _write_case(tmp_path / "src", "a")
    assert "nowhere" in _error("convert", tmp_path / "nowhere", tmp_path / "s.zarr", code=2)
    (tmp_path / "empty").mkdir()
    assert "empty" in _error("convert", tmp_path / "empty", tmp_path / "s.zarr", code=4)
    assert "--annotated maybe" in _error("convert", image, tmp_path / "s.zarr", "--annotated", "maybe", code=2)
    assert "--label-map 1:1" in _error("convert", image, tmp_path / "s.zarr", "--label-map", "1:1", code=2)
    assert "preset 'knee'" in _error("convert", image, tmp_path / "s.zarr", "--region", "knee", code=2)
    assert "holds region" in _error("convert", image, store_path, "--region", "chest", code=2)
    assert not (tmp_path / "s.zarr").exists()


def test_all_files_failing_is_exit_4(tmp_path: Path) -> None:
    (tmp_path / "a.nii.gz").write_bytes(b"\x1f\x8b broken")
    done = _run("convert", tmp_path / "a.nii.gz", tmp_path / "s.zarr", code=4)
    assert "a.nii.gz" in done.stderr


def test_store_info_and_export(store_path: Path, tmp_path: Path) -> None:
    document = json.loads(_run("store", "info", store_path, "--json", "--cases").stdout)
    assert document["num_volumes"] == 4
    assert {c["case"] for c in document["cases"]} == {"a/0", "a/1", "o/0", "o/1"}
    assert "organ" in _run("store", "info", store_path, "--cases").stdout
    for grid in ("store", "native"):
        done = _run("store", "export", store_path, "--out", tmp_path / grid, "--case", "a/0", "--grid", grid)
        assert done.stdout.split() == [
            str(tmp_path / grid / "a/0_ct.nii.gz"),
            str(tmp_path / grid / "a/0_label.nii.gz"),
        ]
        exported = np.asanyarray(_nifti(tmp_path / grid / "a/0_ct.nii.gz").dataobj).transpose(2, 1, 0)
        np.testing.assert_array_equal(exported, open_store(store_path).read_volume("a/0").image)
    assert "--grid other" in _error("store", "export", store_path, "--out", tmp_path, "--grid", "other", code=2)


def test_store_errors_are_exit_3(tmp_path: Path) -> None:
    assert "is not a store" in _error("store", "info", tmp_path, code=3)
    assert "is not a store" in _error("train", "seg", tmp_path, "--out", tmp_path / "run", code=3)
    assert not (tmp_path / "run").exists()


# training, prediction, evaluation


def test_train_prints_one_json_document(store_path: Path, config_file: Path, tmp_path: Path) -> None:
    done = _run(
        "train",
        "seg",
        store_path,
        "--out",
        tmp_path / "run",
        "--config",
        config_file,
        "--set",
        "training.steps=2",
        "--json",
    )
    document = json.loads(done.stdout)
    assert document["steps"] == 2
    stall = document["stall"]
    assert set(stall) >= {"wait_fraction", "patches_per_s", "wall_s", "wait_s", "save_s", "loader_start_s", "sentence"}
    assert stall["num_steps"] == 2
    assert [stage["name"] for stage in stall["stages"]] == ["reads", "prepare", "training"]
    assert {"busy_s", "share", "queue", "mean_level"} < set(stall["stages"][0])
    assert set(stall["queues"]) == {"reads", "prepared", "ready"}
    assert stall["slowest"] in {"reads", "prepare", "training"}
    assert (document["quality"], document["mix"], document["warnings"]) == ({}, {}, [])


def test_the_three_trainings_run_and_resume(
    store_path: Path, config_file: Path, baseline: Path, tmp_path: Path
) -> None:
    _run("train", "synth", store_path, "--baseline", baseline, "--out", tmp_path / "g", "--config", config_file)
    painting = ("--synth", tmp_path / "g" / "checkpoint.pt", "--judge", baseline, "--init", baseline)
    longer = ("--resume", "--allow", "training.steps", "--set")
    _run("train", "seg", store_path, "--out", tmp_path / "s", "--config", config_file, *painting)
    _run("train", "seg", store_path, "--out", tmp_path / "s", *painting, *longer, "training.steps=5")
    document = json.loads(
        _run(
            "train",
            "seg",
            store_path,
            "--out",
            tmp_path / "s",
            *painting,
            *longer,
            "training.steps=6",
            "--json",
        ).stdout
    )
    assert document["steps"] == 6
    quality, mix = document["quality"], document["mix"]
    assert quality["by_organ"]["liver"]["painted"] == quality["painted"] > 0
    assert sum(row["painted"] for row in quality["by_dataset"].values()) == quality["painted"]
    assert mix["num_patches"] == 6 * 2  # those of the parts before, too
    assert mix["num_painted"] == quality["passed"]


def test_precision_is_short_for_the_key_of_the_stage(
    store_path: Path, config_file: Path, baseline: Path, tmp_path: Path
) -> None:
    common = ("--config", config_file, "--precision", "bf16")
    _run("train", "seg", store_path, "--out", tmp_path / "s", *common)
    _run("train", "synth", store_path, "--out", tmp_path / "g", "--baseline", baseline, *common)
    for name, found in (("s", ("bf16", "fp32")), ("g", ("fp32", "bf16"))):
        config = json.loads((tmp_path / name / "run.json").read_text())["config"]
        assert (config["training"]["precision"], config["generator_training"]["precision"]) == found


def test_training_ends_with_a_table_and_says_what_is_slow(
    store_path: Path, config_file: Path, baseline: Path, tmp_path: Path
) -> None:
    painting = ("--synth", tmp_path / "g" / "checkpoint.pt", "--judge", baseline)
    done = _run("train", "synth", store_path, "--baseline", baseline, "--out", tmp_path / "g", "--config", config_file)
    assert "training waited" in done.stdout
    done = _run("train", "seg", store_path, "--out", tmp_path / "s", "--config", config_file, *painting)
    for text in (
        "reads",
        "prepare",
        "synthesis + qc",
        "of the time",
        "the slowest stage is",
        "training saw",
        "patches/s",
    ):
        assert text in done.stdout, text
    assert len([line for line in done.stdout.splitlines() if "training waited" in line]) == 1  # whole, for grep


def test_a_run_on_nothing_is_warned_of_and_stopped(
    store_path: Path, config_file: Path, baseline: Path, tmp_path: Path
) -> None:
    _run("train", "synth", store_path, "--baseline", baseline, "--out", tmp_path / "g", "--config", config_file)
    arguments = (
        *("train", "seg", store_path, "--out", tmp_path / "s", "--config", config_file),
        *("--synth", tmp_path / "g" / "checkpoint.pt", "--judge", baseline),
        *("--set", "qc.threshold=1.0", "--set", "qc.min_pass_rate=0.9", "--set", "qc.window=3"),
        *("--set", "training.steps=60", "--json"),
    )
    done = _run(*arguments, code=4)
    assert done.stdout == ""
    warnings = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
    errors = [line for line in done.stderr.splitlines() if line.startswith("ftengine: error: ")]
    assert (len(warnings), len(errors)) == (2, 1)
    assert "has not been calibrated" in warnings.pop(0)
    assert "The run stops if the next 3 stay below" in warnings[0]
    for text in (
        "of the last 3 painted patches",
        "patches in each tenth",
        "worst: organ liver",
        "qc.min_pass_rate=90%",
    ):
        assert text in errors[0], text


def test_train_errors(store_path: Path, config_file: Path, baseline: Path, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "run", "--config", config_file)
    assert "Did you mean training.batch_size?" in _error(
        "train", "seg", store_path, *out, "--set", "training.batchsize=2", code=2
    )
    assert "no such checkpoint" in _error("train", "synth", store_path, "--baseline", tmp_path / "x.pt", *out, code=2)
    assert "holds the weights of another network" in _error(
        "train", "seg", store_path, *out, "--init", baseline, "--set", "network.channels=[6, 12]", code=2
    )
    assert "--judge without --synth" in _error("train", "seg", store_path, *out, "--judge", baseline, code=2)
    assert "holds a run already" in _error(
        "train", "seg", store_path, "--out", baseline.parent, "--config", config_file, code=2
    )
    assert not (tmp_path / "run").exists()


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    done = _run("store", "info", tmp_path, "--debug", code=1)
    assert "Traceback" in done.stderr
    assert "StoreError" in done.stderr


def test_predict_writes_the_inputs_own_grid(baseline: Path, tmp_path: Path) -> None:
    image = _write_case(tmp_path / "src", "p", shape=(20, 30, 40))
    flipped = nibabel.Nifti1Image(
        np.asanyarray(_nifti(image).dataobj)[::-1, :, ::2],
        np.array([[-3, 0, 0, 117], [0, 3, 0, -40], [0, 0, 6, 12], [0, 0, 0, 1.0]]),
    )
    nibabel.save(flipped, tmp_path / "src" / "q_ct.nii.gz")
    (tmp_path / "src" / "broken.nii").write_bytes(b"x")
    (tmp_path / "src" / "p_label.nii.gz").unlink()
    done = _run("predict", baseline, tmp_path / "src", "--out", tmp_path / "out", "--json", code=1)
    document = json.loads(done.stdout)
    assert len(document["predictions"]) == 2
    assert list(document["failed"]) == ["predict/broken"]
    for name in ("p", "q"):
        source, result = (
            _nifti(tmp_path / "src" / f"{name}_ct.nii.gz"),
            _nifti(tmp_path / "out" / f"{name}.nii.gz"),
        )
        assert source.shape == result.shape
        np.testing.assert_allclose(source.affine, result.affine, atol=1e-4)
        assert result.get_data_dtype() == np.uint8


def test_predict_never_replaces_its_input(baseline: Path, tmp_path: Path) -> None:
    image, _ = organ_volume((20, 22, 24), tumor=False, seed=0)
    write_nifti(tmp_path / "a.nii.gz", image, ras_grid_at((20, 22, 24)))
    before = (tmp_path / "a.nii.gz").read_bytes()
    assert "is an input and would be replaced" in _error(
        "predict", baseline, tmp_path / "a.nii.gz", "--out", tmp_path, code=2
    )
    assert (tmp_path / "a.nii.gz").read_bytes() == before


def test_a_path_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    image = _write_case(tmp_path / "src", "a")
    assert "file" in _error("convert", image, tmp_path / "file" / "s.zarr", code=3)


def test_evaluate_folders_and_checkpoint(store_path: Path, baseline: Path, tmp_path: Path) -> None:
    _write_case(tmp_path / "truth", "a", tumor=True)
    (tmp_path / "truth" / "a_ct.nii.gz").unlink()
    (tmp_path / "pred").mkdir()
    (tmp_path / "pred" / "a.nii.gz").write_bytes((tmp_path / "truth" / "a_label.nii.gz").read_bytes())
    csv_file = tmp_path / "scores.csv"
    done = _run("evaluate", tmp_path / "pred", tmp_path / "truth", "--region", "demo", "--json", "--csv", csv_file)
    assert json.loads(done.stdout)["summary"]["liver_tumor"]["dice"] == 1.0
    assert len(csv_file.read_text().splitlines()) == 3
    _write_case(tmp_path / "truth", "b", tumor=True)
    (tmp_path / "truth" / "b_ct.nii.gz").unlink()
    done = _run("evaluate", tmp_path / "pred", tmp_path / "truth", "--region", "demo", "--json", code=1)
    assert "has no prediction" in json.loads(done.stdout)["failed"]["b"]
    done = _run("evaluate", baseline, store_path, "--json")
    assert json.loads(done.stdout)["summary"]["liver_tumor"]["num_volumes_with_truth"] == 2
    assert json.loads(done.stdout)["num_left_out"] == 2
    assert json.loads(_run("evaluate", baseline, store_path, "--json", "--workers", "2").stdout) == json.loads(
        done.stdout
    )
    assert "--config" in _error("evaluate", baseline, store_path, "--config", baseline, code=2)
    assert "no labelled volume" in _error("evaluate", baseline, store_path, "--split", "none", code=2)


def test_preview_writes_sheets(store_path: Path, baseline: Path, config_file: Path, tmp_path: Path) -> None:
    done = _run("preview", store_path, "--out", tmp_path, "--num", "1", "--judge", baseline, "--config", config_file)
    sheets = [Path(line) for line in done.stdout.split()]
    assert len(sheets) == 1
    assert sheets[0].read_bytes()[:4] == b"\x89PNG"


def test_doctor_says_what_will_be_used() -> None:
    document = json.loads(_run("doctor", "--json").stdout)
    assert document["packages"]["torch"]
    assert document["will_use"]["kernels"]
    assert document["cores"] >= 1


def test_config_prints_every_key(config_file: Path) -> None:
    from ftengine.config import Config

    assert "learning_rate" in _run("config", "chest").stdout
    text = _run("config", "--config", config_file, "--set", "seed=4").stdout
    assert "seed: 4" in text
    assert Config.preset("abdomen").to_yaml() == _run("config").stdout
