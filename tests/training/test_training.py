"""Both stages run, leave the frozen networks alone, and resume to the same losses."""

import json
import os
import shutil
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ftengine.assemble import calibrate_judge, train_segmentation, train_synthesis
from ftengine.config import Config
from ftengine.errors import ConfigError, RejectionError
from ftengine.loader import nvtx
from ftengine.quality.calibrate import JudgedTumor, calibration_file, write_calibration
from ftengine.store.reader import Store
from ftengine.training.checkpoint import load_checkpoint, load_generator, load_segmenter
from ftengine.training.networks import build_segmenter
from ftengine.training.run import learning_rate, read_epochs, read_metrics, stopping_on_signals
from tests.support import make_store, small_config

CONFIG = small_config(
    training__steps=8, generator_training__steps=4, training__checkpoint_every=3, generator_training__checkpoint_every=3
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(tmp_path_factory.mktemp("training"), CONFIG)


@pytest.fixture(scope="module")
def baseline(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_segmentation(CONFIG, store.path, tmp_path_factory.mktemp("runs") / "baseline").checkpoint


@pytest.fixture(scope="module")
def generator(store: Store, baseline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_synthesis(
        CONFIG, store.path, tmp_path_factory.mktemp("runs") / "generator", baseline=baseline
    ).checkpoint


def _weights_equal(a: Path, b: Path) -> bool:
    first, second = load_checkpoint(a)["model"], load_checkpoint(b)["model"]
    return all(torch.equal(first[k], second[k]) for k in first)


def test_baseline_learns_on_annotated_volumes(store: Store, tmp_path: Path) -> None:
    result = train_segmentation(CONFIG.with_overrides({"training.steps": 40}), store.path, tmp_path / "run")
    assert result.steps == 40
    assert sum(result.losses[-5:]) < sum(result.losses[:5])
    assert {"wait_fraction", "patches_per_s", "median_step_s"} <= set(result.stall)
    assert [part.name for part in result.speed.parts] == ["reads", "prepare", "training"]
    logged = read_metrics(tmp_path / "run")
    steps_s = sum(row["step_s"] for row in logged)  # every step is logged
    assert steps_s == pytest.approx(result.speed.wall_s, rel=0.05)
    assert sum(row["wait_s"] for row in logged) == pytest.approx(result.speed.wait_s)
    assert logged[-1]["loader/level/ready"] <= 2
    assert [row["step"] for row in logged] == list(range(40))
    assert list((tmp_path / "run" / "tensorboard").iterdir())
    document = json.loads((tmp_path / "run" / "run.json").read_text())
    assert document["versions"]["ftengine"]
    assert document["kind"] == "segmenter"
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == json.loads(json.dumps(result.document()))


def test_generator_training_changes_g_and_c_and_nothing_of_s(store: Store, baseline: Path, tmp_path: Path) -> None:
    from ftengine.training.networks import build_generator

    before = load_checkpoint(baseline)["model"]
    result = train_synthesis(CONFIG, store.path, tmp_path / "g", baseline=baseline)
    document = load_checkpoint(result.checkpoint, "generator")
    fresh = build_generator(CONFIG).state_dict()
    assert any(not torch.equal(document["model"][k], fresh[k]) for k in fresh)
    assert set(document["classifier"]) == set(fresh)
    assert all(torch.equal(v, before[k]) for k, v in load_checkpoint(baseline)["model"].items())
    assert "loss_seen" in read_metrics(tmp_path / "g")[-1]


def test_student_sees_painted_tumors(store: Store, baseline: Path, generator: Path, tmp_path: Path) -> None:
    config = CONFIG.with_overrides({"qc.threshold": None})
    result = train_segmentation(
        config, store.path, tmp_path / "s", generator_path=generator, judge_path=baseline, init=baseline
    )
    assert result.quality["qc/pass_rate"] == 1.0
    logged = read_metrics(tmp_path / "s")
    assert sum(row["mix/painted"] for row in logged) > 0
    for row in logged:
        assert row["mix/painted"] + row["mix/annotated"] + row["mix/healthy"] == pytest.approx(1)
    mix = result.mix
    assert mix["num_patches"] == 2 * 8
    assert mix["num_painted"] == result.quality["passed"] == sum(2 * row["mix/painted"] for row in logged)
    assert mix["num_painted"] + mix["num_annotated"] + mix["num_healthy"] == 16
    assert {"a", "o"} >= set(result.quality["by_dataset"])
    epochs = read_epochs(tmp_path / "s")
    assert [(e["epoch"], e["step"], e["patches"]) for e in epochs] == [(n, 2 * n + 1, 4) for n in range(4)]
    assert sum(4 * e["mix/painted"] for e in epochs) == mix["num_painted"]


def test_a_rejected_patch_counts_as_healthy(store: Store, baseline: Path, generator: Path, tmp_path: Path) -> None:
    """Eq. 5: it comes back as it was. Nothing that this generator paints covers its mask by S wholly."""
    config = CONFIG.with_overrides({"qc.threshold": 1.0, "qc.retries": 1})
    result = train_segmentation(config, store.path, tmp_path / "s", generator_path=generator, judge_path=baseline)
    mix, quality = result.mix, result.quality
    assert mix["num_rejected"] == quality["painted"] - quality["passed"] > 0
    assert mix["num_healthy"] == mix["num_rejected"] + 16 - quality["painted"] - mix["num_annotated"]
    last = read_metrics(tmp_path / "s")[-1]
    assert last["qc/pass_rate"] == quality["qc/pass_rate"]
    assert quality["draws"] == quality["painted"] + mix["num_rejected"] + quality["passed_at_draw"].get("2", 0)


def test_tensorboard_has_the_stall_meter_and_the_epochs(
    store: Store, baseline: Path, generator: Path, tmp_path: Path
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train_segmentation(CONFIG, store.path, tmp_path / "s", generator_path=generator, judge_path=baseline)
    board = EventAccumulator(str(tmp_path / "s" / "tensorboard"))
    board.Reload()
    names = set(board.Tags()["scalars"])
    assert {
        "loader/wait_fraction",
        "loader/level/ready",
        "loader/busy/synthesis + qc",
        "mix/painted",
        "qc/window_pass_rate",
        "epoch/mix/painted",
    } <= names
    logged = read_metrics(tmp_path / "s")
    shown = [event.value for event in board.Scalars("loader/level/ready")]
    assert shown == pytest.approx([row["loader/level/ready"] for row in logged])


def test_a_profile_shows_waits_steps_and_saves_one_after_another(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a machine with a GPU; the loader's threads have ranges of their own."""
    told: list[str] = []

    def tell(text: str) -> None:
        if threading.current_thread() is threading.main_thread():
            told.append(text)

    monkeypatch.setattr(nvtx, "_profilers_listen", lambda: True)
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", tell)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: tell("end"))
    train_segmentation(CONFIG.with_overrides({"training.steps": 3, "device": "cpu"}), store.path, tmp_path / "run")
    step = ["wait for data", "end", "training step", "end"]
    end_of_epoch = ["wait for data", "end"]  # which brings none; two volumes are one batch
    assert told == [*step, *end_of_epoch, *step, *end_of_epoch, *step, "save", "end"]


def test_init_starts_from_the_given_weights(store: Store, baseline: Path, tmp_path: Path) -> None:
    config = CONFIG.with_overrides(
        {"training.steps": 1, "training.warmup_steps": 5}
    )  # the first step of a warm-up has rate 0
    result = train_segmentation(config, store.path, tmp_path / "s", init=baseline)
    assert _weights_equal(result.checkpoint, baseline)


def test_almost_nothing_passing_stops_the_run(store: Store, baseline: Path, generator: Path, tmp_path: Path) -> None:
    config = CONFIG.with_overrides(
        {"qc.threshold": 1.0, "qc.min_pass_rate": 1.0, "qc.window": 3, "training.steps": 200}
    )
    warned: list[str] = []
    steps: list[int] = []
    with pytest.raises(RejectionError, match="of the last 3 painted patches"):
        train_segmentation(
            config,
            store.path,
            tmp_path / "s",
            generator_path=generator,
            judge_path=baseline,
            on_step=lambda step, _values: steps.append(step),
            warn=lambda text: warned.extend([f"after step {len(steps)}", text]),
        )
    uncalibrated, *warned = warned[1:]
    assert "has not been calibrated" in uncalibrated
    assert len(warned) == 2
    assert "The run stops if the next 3 stay below" in warned[1]
    logged = read_metrics(tmp_path / "s")
    assert {row["qc/below_min"] for row in logged} == {0.0, 1.0}
    assert len(logged) > int(warned[0].split()[-1])  # it went on after the warning


def test_a_generator_of_the_other_contrast_is_told_before_training(
    store: Store, baseline: Path, generator: Path, tmp_path: Path
) -> None:
    judge = tmp_path / "S.pt"
    shutil.copy(baseline, judge)
    calibration = calibrate_judge(
        CONFIG, store, judge_path=judge, generator_path=generator, out=tmp_path / "c", num_painted=4
    )
    real = JudgedTumor("real", "liver", "small", 10.0, -30.0, 1.0)
    painted = JudgedTumor("painted", "liver", "small", 10.0, 20.0, 1.0)
    write_calibration(replace(calibration, tumors=(real, painted) * 12), calibration_file(judge))
    warned: list[str] = []
    config = CONFIG.with_overrides({"training.steps": 1})
    train_segmentation(
        config, store.path, tmp_path / "s", generator_path=generator, judge_path=judge, warn=warned.append
    )
    assert sum("painted tumours are brighter than their organ, but 0% of 12 real ones" in text for text in warned) == 1
    assert not any("has not been calibrated" in text for text in warned)


# resume


class _StopError(Exception):
    pass


def _stop_after(step: int) -> Callable[[int, dict[str, float]], None]:
    def check(done: int, _values: dict[str, float]) -> None:
        if done == step:
            raise _StopError

    return check


def test_a_broken_baseline_resumes_to_the_same_losses_and_weights(store: Store, tmp_path: Path) -> None:
    whole = train_segmentation(CONFIG, store.path, tmp_path / "whole")
    with pytest.raises(_StopError):
        train_segmentation(CONFIG, store.path, tmp_path / "broken", on_step=_stop_after(5))  # last checkpoint: 3 steps
    resumed = train_segmentation(CONFIG, store.path, tmp_path / "broken", resume=True)
    assert resumed.losses == whole.losses
    assert _weights_equal(resumed.checkpoint, whole.checkpoint)
    assert [r["step"] for r in read_metrics(tmp_path / "broken")] == list(range(8))
    assert [r["loss"] for r in read_metrics(tmp_path / "broken")] == [
        r["loss"] for r in read_metrics(tmp_path / "whole")
    ]


def test_a_broken_student_resumes_to_the_same_losses(
    store: Store, baseline: Path, generator: Path, tmp_path: Path
) -> None:
    config = CONFIG.with_overrides({"qc.threshold": 0.1})

    def run(out: Path, *, resume: bool = False, stop_after: int = -1) -> list[float]:
        return train_segmentation(
            config,
            store.path,
            out,
            generator_path=generator,
            judge_path=baseline,
            resume=resume,
            on_step=_stop_after(stop_after),
        ).losses

    with pytest.raises(_StopError):
        run(tmp_path / "broken", stop_after=4)
    assert run(tmp_path / "broken", resume=True) == run(tmp_path / "whole")


def test_a_resumed_run_counts_and_stops_as_an_unbroken_one(
    store: Store, baseline: Path, generator: Path, tmp_path: Path
) -> None:
    config = CONFIG.with_overrides(
        {"qc.threshold": 1.0, "qc.min_pass_rate": 1.0, "qc.window": 4, "training.steps": 40}
    ).with_overrides({"training.checkpoint_every": 1})

    def run(out: Path, *, resume: bool = False, stop_after: int = -1) -> str:
        with pytest.raises(RejectionError if stop_after < 0 else _StopError) as caught:
            train_segmentation(
                config,
                store.path,
                out,
                generator_path=generator,
                judge_path=baseline,
                resume=resume,
                on_step=_stop_after(stop_after),
            )
        return str(caught.value)

    whole = run(tmp_path / "whole")
    logged = read_metrics(tmp_path / "whole")
    for number in range(2, len(logged), 2):  # broken off again and again
        run(tmp_path / "broken", resume=number > 2, stop_after=number)
    assert run(tmp_path / "broken", resume=True) == whole
    for name in ("qc/", "mix/"):
        assert [{k: v for k, v in row.items() if k.startswith(name)} for row in read_metrics(tmp_path / "broken")] == [
            {k: v for k, v in row.items() if k.startswith(name)} for row in logged
        ]
    assert read_epochs(tmp_path / "broken") == read_epochs(tmp_path / "whole")


def test_a_checkpoint_from_before_the_ledger_still_resumes(
    store: Store, baseline: Path, generator: Path, tmp_path: Path
) -> None:
    out = tmp_path / "s"
    config = CONFIG.with_overrides({"training.steps": 4, "qc.threshold": None})
    train_segmentation(config, store.path, out, generator_path=generator, judge_path=baseline)
    document = torch.load(out / "checkpoint.pt", weights_only=True)
    del document["ledger"]
    torch.save(document, out / "checkpoint.pt")
    longer = config.with_overrides({"training.steps": 6})
    result = train_segmentation(
        longer,
        store.path,
        out,
        generator_path=generator,
        judge_path=baseline,
        resume=True,
        allow=["training.steps"],
    )
    assert result.steps == 6
    assert result.mix["num_patches"] == 4  # of the two steps since


def test_a_broken_generator_resumes_to_the_same_weights(store: Store, baseline: Path, tmp_path: Path) -> None:
    whole = train_synthesis(CONFIG, store.path, tmp_path / "whole", baseline=baseline)
    with pytest.raises(_StopError):
        train_synthesis(CONFIG, store.path, tmp_path / "broken", baseline=baseline, on_step=_stop_after(4))
    resumed = train_synthesis(CONFIG, store.path, tmp_path / "broken", baseline=baseline, resume=True)
    assert _weights_equal(resumed.checkpoint, whole.checkpoint)


EVERYTHING = CONFIG.with_overrides(
    {
        "training.steps": 6,
        "training.accumulate": 2,
        "training.ema_decay": 0.9,
        "training.cutmix_probability": 0.7,
        "training.precision": "bf16",
        "training.amsgrad": True,
        "generator_training.accumulate": 2,
        "generator_training.ema_decay": 0.9,
    }
)


def test_averages_accumulation_and_cutmix_resume_to_the_same_weights(
    store: Store, baseline: Path, tmp_path: Path
) -> None:
    """An epoch is one batch of two volumes, or two: steps of two batches reach over its end."""
    whole = train_segmentation(EVERYTHING, store.path, tmp_path / "whole")
    with pytest.raises(_StopError):
        train_segmentation(EVERYTHING, store.path, tmp_path / "broken", on_step=_stop_after(5))
    resumed = train_segmentation(EVERYTHING, store.path, tmp_path / "broken", resume=True)
    assert resumed.losses == whole.losses
    assert len(whole.losses) == 6
    assert _weights_equal(resumed.checkpoint, whole.checkpoint)
    assert whole.speed.num_steps == 12  # batches
    g = train_synthesis(EVERYTHING, store.path, tmp_path / "g", baseline=baseline)
    with pytest.raises(_StopError):
        train_synthesis(EVERYTHING, store.path, tmp_path / "h", baseline=baseline, on_step=_stop_after(4))
    h = train_synthesis(EVERYTHING, store.path, tmp_path / "h", baseline=baseline, resume=True)
    assert _weights_equal(g.checkpoint, h.checkpoint)
    document = load_checkpoint(g.checkpoint)
    raw = document["learners"]["generator"]["weights"]
    assert any(not torch.equal(v, raw[k]) for k, v in document["model"].items())


def test_a_network_that_draws_resumes_to_the_same_losses(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drop-out takes torch's global generator: its state is part of the run, and the caller's is left alone."""
    from torch import nn

    from ftengine.training import segmentation

    def with_dropout(config: Config) -> nn.Module:
        return nn.Sequential(build_segmenter(config), nn.Dropout3d(0.5))

    monkeypatch.setattr(segmentation, "build_segmenter", with_dropout)
    before = torch.get_rng_state()
    whole = train_segmentation(CONFIG, store.path, tmp_path / "whole")
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(_StopError):
        train_segmentation(CONFIG, store.path, tmp_path / "broken", on_step=_stop_after(5))
    torch.manual_seed(99)
    assert train_segmentation(CONFIG, store.path, tmp_path / "broken", resume=True).losses == whole.losses


def test_a_run_of_an_older_version_is_not_resumed(store: Store, baseline: Path, tmp_path: Path) -> None:
    document = torch.load(baseline, weights_only=True)
    document["optimizer"] = document.pop("learners")["segmenter"]["optimizer"]
    (tmp_path / "run").mkdir()
    torch.save(document, tmp_path / "run" / "checkpoint.pt")
    with pytest.raises(ConfigError, match="was written by an older version"):
        train_segmentation(CONFIG, store.path, tmp_path / "run", resume=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "checkpoint.pt").write_bytes(baseline.read_bytes())
    averaged = CONFIG.with_overrides({"training.ema_decay": 0.5})
    with pytest.raises(ConfigError, match="ema_decay"):
        train_segmentation(averaged, store.path, tmp_path / "other", resume=True)


def test_sigterm_finishes_the_step_and_saves(store: Store, tmp_path: Path) -> None:
    def terminate(done: int, _values: dict[str, float]) -> None:
        if done == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    result = train_segmentation(CONFIG, store.path, tmp_path / "run", on_step=terminate)
    assert result.interrupted
    assert 4 <= result.steps < 8
    resumed = train_segmentation(CONFIG, store.path, tmp_path / "run", resume=True)
    assert not resumed.interrupted
    assert resumed.losses == train_segmentation(CONFIG, store.path, tmp_path / "whole").losses


def test_signals_are_given_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with stopping_on_signals() as stop:
        assert not stop
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_run_is_not_overwritten_and_nothing_is_not_resumed(store: Store, tmp_path: Path) -> None:
    train_segmentation(CONFIG.with_overrides({"training.steps": 1}), store.path, tmp_path / "run")
    with pytest.raises(ConfigError, match="holds a run already"):
        train_segmentation(CONFIG, store.path, tmp_path / "run")
    with pytest.raises(ConfigError, match="there is nothing to resume"):
        train_segmentation(CONFIG, store.path, tmp_path / "nothing", resume=True)
    assert not (tmp_path / "nothing").exists()


def test_a_refused_resume_changes_nothing(store: Store, baseline: Path, generator: Path, tmp_path: Path) -> None:
    config = CONFIG.with_overrides({"training.steps": 2})
    out = tmp_path / "run"
    train_segmentation(config, store.path, out, generator_path=generator, judge_path=baseline)
    before = {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()}
    longer = CONFIG.with_overrides({"training.steps": 4})
    with pytest.raises(ConfigError, match="batch_size: was 2, is 3"):
        train_segmentation(
            longer.with_overrides({"training.batch_size": 3}),
            store.path,
            out,
            generator_path=generator,
            judge_path=baseline,
            resume=True,
        )
    with pytest.raises(ConfigError, match=r"judge: was sha256:.{16}, is nothing"):
        train_segmentation(longer, store.path, out, generator_path=generator, resume=True)
    with pytest.raises(ConfigError, match=r"synth: was sha256:.{16}, is nothing"):
        train_segmentation(longer, store.path, out, resume=True)
    assert {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()} == before


def test_a_diverged_run_stops_and_keeps_the_last_checkpoint(store: Store, tmp_path: Path) -> None:
    config = CONFIG.with_overrides(
        {
            "training.steps": 60,
            "training.learning_rate": 1e18,
            "training.warmup_steps": 0,
            "training.checkpoint_every": 1,
        }
    )
    with pytest.raises(ConfigError, match="training diverged"):
        train_segmentation(config, store.path, tmp_path / "run")
    assert (tmp_path / "run" / "checkpoint.pt").exists()


def test_a_run_killed_before_its_first_checkpoint_starts_with_an_empty_log(store: Store, tmp_path: Path) -> None:
    with pytest.raises(_StopError):
        train_segmentation(CONFIG, store.path, tmp_path / "run", on_step=_stop_after(2))
    train_segmentation(CONFIG, store.path, tmp_path / "run")
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == list(range(8))


# checkpoints


def test_a_checkpoint_of_another_network_is_named(store: Store, baseline: Path, tmp_path: Path) -> None:
    wider = CONFIG.with_overrides({"network.channels": (6, 12)})
    with pytest.raises(ConfigError, match="holds the weights of another network"):
        train_segmentation(wider, store.path, tmp_path / "run", init=baseline)
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_the_other_stage_is_named(baseline: Path, generator: Path) -> None:
    with pytest.raises(ConfigError, match="holds a segmenter; want a generator"):
        load_generator(baseline)
    with pytest.raises(ConfigError, match="holds a generator; want a segmenter"):
        load_segmenter(generator)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 cut"])
def test_a_damaged_checkpoint_is_named(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "broken.pt"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"broken\.pt: is not a checkpoint of ftengine or is damaged"):
        load_checkpoint(file)


def test_a_checkpoint_cannot_run_code(tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {tmp_path}/harm",)

    torch.save({"format": 1, "kind": "segmenter", "model": Harm()}, tmp_path / "harm.pt")
    with pytest.raises(ConfigError, match=r"harm\.pt: is not a checkpoint"):
        load_checkpoint(tmp_path / "harm.pt")
    assert not (tmp_path / "harm").exists()


def test_a_checkpoint_for_other_labels_is_refused(
    store: Store, baseline: Path, generator: Path, tmp_path: Path
) -> None:
    from ftengine.assemble import load_painters

    with pytest.raises(ConfigError, match=r"was trained with region\."):
        load_painters(Config.preset("abdomen"), generator, baseline)


# the rate


def test_learning_rate_warms_up_and_falls_to_zero() -> None:
    rates = [learning_rate(s, base=1.0, warmup_steps=10, steps=110) for s in range(111)]
    assert rates[0] == 0
    assert rates[5] == 0.5
    assert rates[10] == 1.0
    assert rates[60] == pytest.approx(0.5)
    assert rates[110] == pytest.approx(0)
    assert learning_rate(0, base=1.0, warmup_steps=0, steps=5) == 1.0
