"""Resuming: a killed run ends as an unbroken one, and what changed in between is named, refused or permitted."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ftengine.assemble import build_loader, train_segmentation, train_synthesis
from ftengine.config import Config
from ftengine.errors import ConfigError, DivergedError
from ftengine.loader.loader import Loader
from ftengine.store.reader import Store
from ftengine.training.checkpoint import load_checkpoint
from ftengine.training.resume import check_changes, loader_state
from ftengine.training.run import read_metrics
from ftengine.training.weight_files import sha256_of
from tests.support import make_store, small_config

CONFIG = small_config(
    training__steps=24,
    generator_training__steps=12,
    training__checkpoint_every=4,
    generator_training__checkpoint_every=3,
    training__keep_checkpoints=2,
    generator_training__keep_checkpoints=2,
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(tmp_path_factory.mktemp("resume"), CONFIG)


@pytest.fixture(scope="module")
def whole(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unbroken baseline."""
    return train_segmentation(CONFIG, store.path, tmp_path_factory.mktemp("runs") / "whole").checkpoint.parent


_KILLED = """
import sys
from pathlib import Path
from ftengine.assemble import train_segmentation, train_synthesis
from ftengine.config import Config
config, store, out, stage, baseline, resume = sys.argv[1:]
def show(step, _values):
    print(step, flush=True)
arguments = {"resume": resume == "resume", "on_step": show}
if stage == "seg":
    train_segmentation(Config.from_file(config), store, out, **arguments)
else:
    train_synthesis(Config.from_file(config), store, out, baseline=baseline, **arguments)
"""


@pytest.mark.parametrize(("stage", "seed"), [("seg", 11), ("synth", 12)])
def test_a_run_killed_at_a_random_step_resumes_to_the_same_losses_and_weights(
    store: Store, whole: Path, tmp_path: Path, stage: str, seed: int
) -> None:
    baseline = whole / "checkpoint.pt"
    (tmp_path / "config.yaml").write_text(CONFIG.to_yaml())
    steps = CONFIG.training.steps if stage == "seg" else CONFIG.generator_training.steps
    every = CONFIG.training.checkpoint_every if stage == "seg" else CONFIG.generator_training.checkpoint_every
    kill_at = random.Random(seed).randrange(every + 1, steps - 1)
    out = tmp_path / "killed"
    arguments = [
        sys.executable,
        "-c",
        _KILLED,
        str(tmp_path / "config.yaml"),
        str(store.path),
        str(out),
        stage,
        str(baseline),
    ]
    with subprocess.Popen([*arguments, "new"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) == kill_at:
                os.kill(process.pid, signal.SIGKILL)
                break
    assert process.returncode == -signal.SIGKILL
    began = load_checkpoint(out / "checkpoint.pt")["step"]
    assert 0 < began <= steps
    subprocess.run([*arguments, "resume"], check=True, stdout=subprocess.DEVNULL)
    unbroken = whole
    if stage == "synth":
        unbroken = tmp_path / "unbroken"
        train_synthesis(CONFIG, store.path, unbroken, baseline=baseline)
    ours, theirs = read_metrics(out), read_metrics(unbroken)
    assert [row["step"] for row in ours] == list(range(steps))
    for name in ("loss", "loss_seen", "loss_fools", "loss_classifier", "proportion", "learning_rate"):
        assert [row.get(name) for row in ours] == [row.get(name) for row in theirs]
    mine, other = load_checkpoint(out / "checkpoint.pt"), load_checkpoint(unbroken / "checkpoint.pt")
    assert mine["losses"] == other["losses"]
    for part in ("model", *(["classifier"] if stage == "synth" else [])):
        assert all(torch.equal(tensor, other[part][name]) for name, tensor in mine[part].items())
    assert (out / "weights.safetensors").read_bytes() == (unbroken / "weights.safetensors").read_bytes()
    assert json.loads((out / "run.json").read_text())["resumed"][0]["step"] == began


# what may change


def _resume(store: Store, whole: Path, tmp_path: Path, config: Config, *allow: str) -> Path:
    """Go on with a copy of the unbroken run."""
    out = tmp_path / "run"
    out.mkdir()
    for name in ("checkpoint.pt", "metrics.jsonl", "run.json"):
        (out / name).write_bytes((whole / name).read_bytes())
    train_segmentation(config, store.path, out, resume=True, allow=allow)
    return out


def test_all_changes_are_listed_with_what_permits_them(store: Store, whole: Path, tmp_path: Path) -> None:
    changed = {
        "training.steps": 26,
        "training.learning_rate": 0.5,
        "augment.flip_probability": 0.75,
        "seed": 5,
        "network.channels": (4, 12),
    }
    with pytest.raises(ConfigError) as caught:
        _resume(store, whole, tmp_path, CONFIG.with_overrides(changed), "training.steps")
    text = str(caught.value)
    assert f"{tmp_path / 'run'}: --resume would go on with another run" in text
    for part in (
        "augment.flip_probability: was 0.2, is 0.75",
        f"training.learning_rate: was {CONFIG.training.learning_rate}, is 0.5",
        "seed: was 0, is 5",
        "network.channels: was [4, 8], is [4, 12]",
        "--allow augment.flip_probability --allow network.channels --allow seed --allow training.learning_rate",
    ):
        assert part in text
    assert "training.steps:" not in text  # permitted


def test_speed_logs_and_the_other_stage_may_change_silently(store: Store, whole: Path, tmp_path: Path) -> None:
    free = {
        "device": "cpu",
        "loader.reader_threads": 1,
        "loader.queue_batches": 1,
        "loader.reads_in_flight": 3,
        "training.log_every": 7,
        "training.checkpoint_every": 9,
        "training.keep_checkpoints": 1,
        "tracking.project": "other",
        "generator_training.learning_rate": 0.5,
    }
    out = _resume(store, whole, tmp_path, CONFIG.with_overrides(free))
    assert json.loads((out / "run.json").read_text())["resumed"][0]["changes"] == []


@pytest.mark.parametrize("allow", ["training.steps", "training", "all"])
def test_a_longer_run_is_permitted_and_written_down(store: Store, whole: Path, tmp_path: Path, allow: str) -> None:
    warned: list[str] = []
    out = tmp_path / "run"
    out.mkdir()
    for name in ("checkpoint.pt", "metrics.jsonl"):
        (out / name).write_bytes((whole / name).read_bytes())
    longer = CONFIG.with_overrides({"training.steps": 26})
    result = train_segmentation(longer, store.path, out, resume=True, allow=[allow], warn=warned.append)
    assert result.steps == 26
    assert warned == ["the run goes on with a permitted change: training.steps: was 24, is 26"]
    resumed = json.loads((out / "run.json").read_text())["resumed"]
    assert resumed[0]["changes"] == ["training.steps: was 24, is 26"]
    assert resumed[0]["step"] == 24
    rates = [row["learning_rate"] for row in read_metrics(out)]
    assert rates[24] > rates[23]  # up to the longer run's cosine


def test_a_permitted_batch_size_goes_on_behind_the_patches_seen(store: Store) -> None:
    config = CONFIG.with_overrides({"loader.patches_per_epoch": 24})
    with build_loader(config, store, mix="annotated") as loader:
        state = {**loader.state_dict(), "epoch": 3, "step": 7}  # 14 patches of epoch 3
    document = {"loader": state, "config": config.model_dump(mode="json"), "identity": {}, "engine_version": "0.1.0"}

    def going_on(**overrides: object) -> Loader:
        keys = {key.replace("__", "."): value for key, value in overrides.items()}
        other = config.with_overrides(keys)
        loader = build_loader(other, store, mix="annotated")
        changes = check_changes(
            Path("run/checkpoint.pt"),
            document,
            kind="segmenter",
            config=other,
            loader=loader,
            identity={},
            allow=["all"],
        )
        assert [change.name for change in changes] == list(keys)
        loader.load_state_dict(loader_state(document, loader, changes))
        return loader

    assert (going_on(training__batch_size=4).state_dict()["step"], 14 // 4) == (3, 3)
    assert going_on(augment__flip_probability=0.5).state_dict()["step"] == 7
    assert going_on(loader__patches_per_epoch=8).state_dict()["step"] == 3  # an epoch has 4 steps now
    loader = going_on(seed=9)
    batch = next(iter(loader))
    loader.close()
    assert [(r.request.epoch, r.request.index) for r in batch.records] == [(3, 14), (3, 15)]


def test_a_store_with_other_volumes_is_named(store: Store, whole: Path, tmp_path: Path) -> None:
    grown = make_store(tmp_path, CONFIG, num_annotated=3)
    with pytest.raises(ConfigError, match=r"store: was 2 volumes to draw from, is 3 of other names.*--allow store"):
        _resume(grown, whole, tmp_path, CONFIG)


def test_another_fold_is_named_by_its_option_alone(store: Store, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "checkpoint.pt").write_bytes((whole / "checkpoint.pt").read_bytes())
    with pytest.raises(ConfigError, match=r"\(split: was nothing, is train\)"):
        train_segmentation(CONFIG, store.path, out, resume=True, split="train")


def test_another_torch_is_a_warning(store: Store, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    document = torch.load(whole / "checkpoint.pt", weights_only=True)
    torch.save({**document, "torch_version": "1.0.0"}, out / "checkpoint.pt")
    warned: list[str] = []
    train_segmentation(CONFIG, store.path, out, resume=True, warn=warned.append)
    assert warned == [
        f"the run began with torch 1.0.0 and goes on with torch {torch.__version__}: losses may differ in their last digits"
    ]


def test_a_run_told_to_stop_after_it_diverged_keeps_its_last_good_checkpoint(store: Store, tmp_path: Path) -> None:
    """No logged step lies between: the weights are NaN already when the signal asks to save."""
    config = CONFIG.with_overrides(
        {"training.learning_rate": 1e18, "training.warmup_steps": 0, "training.log_every": 100, "training.steps": 40}
    )
    config = config.with_overrides({"training.checkpoint_every": 40})

    def terminate(step: int, _values: dict[str, float]) -> None:
        if step == 12:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(DivergedError, match="There is no checkpoint yet"):
        train_segmentation(config, store.path, tmp_path / "run", on_step=terminate)
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_a_permitted_decay_is_the_one_that_trains(store: Store, tmp_path: Path) -> None:
    short = CONFIG.with_overrides({"training.steps": 2})
    train_segmentation(short, store.path, tmp_path / "run")
    changed = short.with_overrides({"training.weight_decay": 0.5, "training.steps": 4})
    train_segmentation(
        changed, store.path, tmp_path / "run", resume=True, allow=("training.weight_decay", "training.steps")
    )
    state = load_checkpoint(tmp_path / "run" / "checkpoint.pt")["learners"]["segmenter"]["optimizer"]
    assert state["param_groups"][0]["weight_decay"] == 0.5
    with pytest.raises(ConfigError, match="amsgrad: the run began with False"):
        train_segmentation(
            changed.with_overrides({"training.amsgrad": True}),
            store.path,
            tmp_path / "run",
            resume=True,
            allow=("all",),
        )


def test_where_a_run_began_from_is_not_forgotten(store: Store, whole: Path, tmp_path: Path) -> None:
    file = whole / "weights.safetensors"
    short = CONFIG.with_overrides({"training.steps": 2})
    began = train_segmentation(short, store.path, tmp_path / "run", init=file)
    assert began.init.startswith(f"{file}: ")
    before = json.loads((tmp_path / "run" / "run.json").read_text())
    longer = short.with_overrides({"training.steps": 3})
    train_segmentation(longer, store.path, tmp_path / "run", resume=True, allow=("training.steps",))
    after = json.loads((tmp_path / "run" / "run.json").read_text())
    assert after["init"] == before["init"]
    assert after["given"] == before["given"] == {"--init": f"sha256:{sha256_of(file)}"}
    with pytest.raises(ConfigError, match="init: was sha256:"):
        train_segmentation(longer, store.path, tmp_path / "run", resume=True, init=whole / "checkpoint.pt")


def test_the_result_holds_what_was_said(store: Store, whole: Path, tmp_path: Path) -> None:
    said: list[str] = []
    result = train_segmentation(
        CONFIG.with_overrides({"training.steps": 2}), store.path, tmp_path / "run", warn=said.append
    )
    assert result.warnings == said
    again = CONFIG.with_overrides({"training.steps": 3})
    resumed = train_segmentation(
        again, store.path, tmp_path / "run", resume=True, allow=("training.steps",), warn=said.append
    )
    assert any("training.steps: was 2, is 3" in text for text in resumed.warnings)
    assert set(resumed.warnings) <= set(said)
