"""``ftengine predict`` as a user meets it: bad checkpoints, Ctrl-C, several processes, stores."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch

from ftengine.training.checkpoint import save_checkpoint, save_weights
from ftengine.training.networks import build_generator, build_segmenter
from tests.cli.test_cli import _error, _run, _write_case
from tests.support import make_store, small_config

CONFIG = small_config(inference__overlap=0.25)
PROGRAM = [sys.executable, "-m", "ftengine.cli.main"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "weights.safetensors"
    save_weights(path, "segmenter", CONFIG, build_segmenter(CONFIG).state_dict(), identity={})
    return path


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    for name in ("a", "b", "c"):
        _write_case(tmp_path / "in", name, shape=(20, 24, 26))
    return tmp_path / "in"


def test_a_generator_is_refused(tmp_path: Path, scans: Path) -> None:
    save_checkpoint(tmp_path / "g.pt", "generator", CONFIG, {"model": build_generator(CONFIG).state_dict()})
    said = _error("predict", tmp_path / "g.pt", scans, "--out", tmp_path / "out", code=2)
    assert "holds a generator; want a segmenter" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("lost", [("region", "labels"), ("region",)])
def test_a_checkpoint_without_its_label_map_is_refused(tmp_path: Path, scans: Path, lost: tuple[str, ...]) -> None:
    save_checkpoint(tmp_path / "s.pt", "segmenter", CONFIG, {"model": build_segmenter(CONFIG).state_dict()})
    document = torch.load(tmp_path / "s.pt", weights_only=True)
    inner: dict[str, Any] = document["config"]
    for key in lost[:-1]:
        inner = inner[key]
    del inner[lost[-1]]
    torch.save(document, tmp_path / "s.pt")
    said = _error("predict", tmp_path / "s.pt", scans, "--out", tmp_path / "out", code=2)
    assert "s.pt" in said
    assert "label map" in said


def test_options_reach_the_prediction(weights: Path, scans: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ["--tta", "zx", "--overlap", "0.5", "--weighting", "gaussian", "--precision", "bf16", "--skip-air"]
    _run("predict", weights, scans, "--out", out, "--quiet", "--windows-per-call", "2", *options)
    settings = json.loads((out / "a.json").read_text())["settings"]
    assert settings["mirror_axes"] == ["z", "x"]
    assert (settings["overlap"], settings["weighting"], settings["precision"]) == (0.5, "gaussian", "bf16")
    assert settings["skip_air"] is True
    document = json.loads(_run("predict", weights, scans, "--out", out, "--json", *options).stdout)
    assert [p["status"] for p in document["predictions"]] == ["complete"] * 3
    assert "complete" in _run("predict", weights, scans, "--out", out, *options).stdout
    assert "mirror_axes" in _error("predict", weights, scans, "--out", out, "--tta", "q", code=2)
    assert "--grid" in _error("predict", weights, scans, "--out", out, "--grid", "q", code=2)
    done = _run("predict", weights, scans / "a_ct.nii.gz", "--out", tmp_path / "n", "--overwrite")
    assert "warning: predict/a: " in done.stderr
    assert "is not DICOM" in _run("predict", weights, scans, "--out", out, "--format", "dicom-seg", code=4).stderr


def test_a_store_and_its_splits(weights: Path, tmp_path: Path) -> None:
    store = make_store(tmp_path, CONFIG, shape_zyx=(20, 22, 24))
    done = _run("predict", weights, store.path, "--out", tmp_path / "out", "--split", "train", "--json")
    assert len(json.loads(done.stdout)["predictions"]) == len(store)
    assert (tmp_path / "out" / "a" / "0.nii.gz").exists()
    assert "holds no volume" in _error("predict", weights, store.path, "--out", tmp_path, "--split", "x", code=2)


def test_ctrl_c_leaves_whole_results_and_the_same_command_goes_on(weights: Path, tmp_path: Path) -> None:
    for number in range(6):
        _write_case(tmp_path / "in", f"p{number:02d}", shape=(30, 40, 40))
    command = [
        *PROGRAM,
        "predict",
        str(weights),
        str(tmp_path / "in"),
        "--out",
        str(tmp_path / "out"),
        "--overlap",
        "0.75",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 100
    while not list((tmp_path / "out").glob("*.nii.gz")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "interrupted" in err
    whole = sorted((tmp_path / "out").glob("*.nii.gz"))
    assert 1 <= len(whole) < 6
    assert not list((tmp_path / "out").glob(".*"))
    for path in whole:
        assert np.asarray(nibabel.load(path).dataobj).shape == (40, 40, 30)  # type: ignore[attr-defined]  # nibabel's stubs
    document = json.loads(_run(*command[len(PROGRAM) :], "--json").stdout)
    statuses = [p["status"] for p in document["predictions"]]
    assert statuses == ["complete"] * len(whole) + ["predicted"] * (6 - len(whole))


def test_two_processes_share_the_cases_and_the_first_reports(weights: Path, scans: Path, tmp_path: Path) -> None:
    (scans / "bad.nii.gz").write_bytes(b"\x1f\x8b nothing")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [*PROGRAM, "predict", str(weights), str(scans), "--out", str(tmp_path / "two"), "--json"]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            command,
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    ended = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [1, 0], (
        ended
    )  # only the first tells torchrun that cases failed
    document = json.loads(ended[0][0])
    assert ended[1][0] == ""
    assert [p["case"] for p in document["predictions"]] == ["predict/a", "predict/b", "predict/c"]
    assert list(document["failed"]) == ["predict/bad"]
    _run("predict", weights, scans, "--out", tmp_path / "one", "--quiet", code=1)
    for name in ("a", "b", "c"):
        two, one = (nibabel.load(tmp_path / out / f"{name}.nii.gz") for out in ("two", "one"))
        np.testing.assert_array_equal(np.asarray(two.dataobj), np.asarray(one.dataobj))  # type: ignore[attr-defined]  # nibabel's stubs
