"""Several processes on the CPU (gloo): the joint batch's gradients, disjoint data, one stop for all, one writer."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ftengine.assemble import train_segmentation, train_synthesis
from ftengine.config import Config
from ftengine.errors import ConfigError
from ftengine.store.reader import Store
from ftengine.training.checkpoint import load_checkpoint
from ftengine.training.distributed import World, device_name_for, world_of_environment
from ftengine.training.run import TrainingResult, read_metrics
from tests.support import make_store, small_config
from tests.training.support import assert_alike, recorded

JOINT = small_config(training__steps=1, generator_training__steps=1, training__warmup_steps=0)
HALVES = JOINT.with_overrides({"training.batch_size": 1, "generator_training.batch_size": 1})

STAGES = ("seg", "synth")
# records the gradient of each update of each network, as rank 0 sees it, into <out>/<stage>.pt
_PROGRAM = """
import os, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from ftengine.config import Config
from ftengine.training.distributed import joined
from tests.training.support import recorded
from tests.training.test_distributed import STAGES, train
_, config, store, out, baseline = sys.argv
with joined():  # a group that is there already is used
    for stage in STAGES:
        with recorded() as gradients:
            train(stage, Config.from_file(config), store, Path(out) / stage, baseline)
        if os.environ["RANK"] == "0":
            torch.save(gradients, Path(out) / f"{stage}.pt")
"""


def train(stage: str, config: Config, store: str, out: Path, baseline: str) -> TrainingResult:
    """Either stage."""
    if stage == "seg":
        return train_segmentation(config, store, out)
    return train_synthesis(config, store, out, baseline=baseline)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(tmp_path_factory.mktemp("distributed"), JOINT)


@pytest.fixture(scope="module")
def baseline(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_segmentation(JOINT, store.path, tmp_path_factory.mktemp("runs") / "baseline").checkpoint


def _start(arguments: list[str], size: int = 2) -> list[subprocess.Popen[str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size), "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, *arguments],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]


def _wait(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    ended = []
    for process in processes:
        out, err = process.communicate(timeout=120)
        ended.append((process.returncode, out, err))
    return ended


def test_two_processes_have_the_gradients_of_the_joint_batch(store: Store, baseline: Path, tmp_path: Path) -> None:
    """Of both stages; later updates are left out where Adam has turned rounding into steps of the weights."""
    (tmp_path / "config.yaml").write_text(HALVES.to_yaml())
    (tmp_path / "two").mkdir()
    arguments = [str(tmp_path / "config.yaml"), str(store.path), str(tmp_path / "two"), str(baseline)]
    for code, _, err in _wait(_start(["-c", _PROGRAM, *arguments])):
        assert code == 0, err
    for stage in STAGES:
        with recorded() as joint:
            train(stage, JOINT, str(store.path), tmp_path / stage, str(baseline))
        assert len(joint) == {"seg": 1, "synth": 2}[stage]
        assert_alike(torch.load(tmp_path / "two" / f"{stage}.pt"), joint)
        (two,), (one,) = read_metrics(tmp_path / "two" / stage), read_metrics(tmp_path / stage)
        compared = [name for name in one if name.startswith(("loss", "qc/", "proportion"))]
        assert compared
        for name in compared:
            assert two[name] == pytest.approx(one[name], rel=1e-5), name


def test_a_signal_to_one_process_stops_all_at_the_same_step_and_they_go_on(store: Store, tmp_path: Path) -> None:
    """Through the command line. Rank 1 is told to stop; rank 0 alone writes, both leave with 130."""
    config = HALVES.with_overrides({"training.steps": 4000, "training.checkpoint_every": 4000})
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    run = tmp_path / "run"
    arguments = ["-m", "ftengine.cli.main", "train", "seg", str(store.path), "--out", str(run)]
    processes = _start([*arguments, "--config", str(tmp_path / "config.yaml"), "--json"])
    deadline = time.monotonic() + 100
    metrics = run / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") > 2) and time.monotonic() < deadline:
        time.sleep(0.02)
    processes[1].send_signal(signal.SIGTERM)
    (code, out, err), (other_code, other_out, _) = _wait(processes)
    assert (code, other_code) == (130, 130), err
    assert other_out == ""
    document = json.loads(out)
    assert document["interrupted"]
    saved = load_checkpoint(run / "checkpoint.pt")
    assert saved["step"] == document["steps"] == len(read_metrics(run))
    assert len(saved["rng"]) == 2
    longer = [
        *arguments,
        "--resume",
        "--allow",
        "training.steps",
        "--json",
        "--set",
        f"training.steps={saved['step'] + 2}",
    ]
    for code, _, err in _wait(_start(longer)):
        assert code == 0, err
    assert [row["step"] for row in read_metrics(run)] == list(range(saved["step"] + 2))


def test_a_dry_run_is_measured_and_printed_by_the_first_process(store: Store, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(HALVES.with_overrides({"training.accumulate": 2}).to_yaml())
    arguments = ["-m", "ftengine.cli.main", "train", "seg", str(store.path), "--out", str(tmp_path / "run")]
    ended = _wait(_start([*arguments, "--config", str(tmp_path / "config.yaml"), "--dry-run", "--json"]))
    (code, out, err), (other_code, other_out, other_err) = ended
    assert (code, other_code) == (0, 0), err + other_err
    assert other_out == ""
    document = json.loads(out)
    assert (document["world_size"], document["accumulate"], document["patches_a_step"]) == (2, 2, 4)
    assert document["epochs"] == 4 / document["patches_per_epoch"]
    assert document["step_s"] > 0
    assert document["checkpoint_bytes"] > 0
    assert not (tmp_path / "run").exists()


def test_a_world_is_what_torchrun_says(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert world_of_environment() == World()
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(ConfigError, match="Start the processes with torchrun"):
        world_of_environment()
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert world_of_environment() == World(3, 8, 1)
    monkeypatch.setenv("WORLD_SIZE", "many")
    with pytest.raises(ConfigError, match="want whole numbers"):
        world_of_environment()


def test_each_process_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device_name_for("auto", World()) == "auto"
    assert device_name_for("cuda", World(3, 4, 1)) == "cuda:1"
    assert device_name_for("cpu", World(3, 4, 1)) == "cpu"
    with pytest.raises(ConfigError, match="this machine has 2 CUDA devices"):
        device_name_for("auto", World(2, 4, 2))
    with pytest.raises(ConfigError, match="cannot share one GPU"):
        device_name_for("cuda:0", World(1, 2, 1))


def test_one_process_exchanges_nothing() -> None:
    alone = World()
    values = torch.ones(3)
    assert alone.gather("x") == ["x"]
    assert alone.sum(values) is values
    alone.sum_gradients([torch.nn.Parameter(torch.zeros(2))])
