"""Guards: the step that broke is named and its patches come back bit by bit; warnings come by name and once."""

import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from ftengine.assemble import (
    SynthesisStage,
    build_loader,
    build_synthesis_stage,
    load_painters,
    replay,
    train_segmentation,
    train_synthesis,
)
from ftengine.cli.main import app
from ftengine.config import Config
from ftengine.errors import ConfigError, DivergedError
from ftengine.quality.gate import QualityGate
from ftengine.store.reader import Store
from ftengine.training.checkpoint import Kind
from ftengine.training.cutmix import cutmix
from ftengine.training.guards import CONTRAST_MEAN, CONTRAST_SD, MOST_OVERFLOWS, WINDOW, Guards, contrast_figures
from ftengine.training.replay import Replay, ReplayStep, Sources, read_replay, rebuild, write_replay
from ftengine.training.run import read_metrics
from ftengine.types import Batch, Painted
from tests.support import host_syncs_forbidden, make_store, small_config

CONFIG = small_config(training__steps=12, generator_training__steps=4, device="cpu")
SOURCES = Sources("s.zarr", "g.pt", "")
BROKEN = {"training.learning_rate": 1e18, "training.warmup_steps": 3, "training.log_every": 7, "training.steps": 60}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(tmp_path_factory.mktemp("guards"), CONFIG)


@pytest.fixture(scope="module")
def painters(store: Store, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """G and S."""
    folder = tmp_path_factory.mktemp("painters")
    baseline = train_segmentation(CONFIG, store.path, folder / "s").checkpoint
    return train_synthesis(CONFIG, store.path, folder / "g", baseline=baseline).checkpoint, baseline


def _batch_at(step: int, batches: Iterator[Batch]) -> Batch:
    return next(batch for number, batch in enumerate(batches) if number == step)


def _all_batches(config: Config, store: Store, stage: SynthesisStage | None) -> Iterator[Batch]:
    stages = () if stage is None else (stage,)
    with build_loader(config, store, mix="mixed" if stage else "annotated", stages=stages) as loader:
        while True:
            yield from loader


@pytest.mark.parametrize("painted", [False, True])
def test_a_diverged_run_names_the_step_and_its_patches_come_back(
    store: Store, painters: tuple[Path, Path], tmp_path: Path, painted: bool
) -> None:
    """Logged every 7 steps, broken within them: the first step is found all the same."""
    config = CONFIG.with_overrides({**BROKEN, "qc.threshold": 0.05, "synthesis.edge_sigma_mm": 2.0})
    generator, judge = painters if painted else (None, None)
    with pytest.raises(DivergedError) as caught:
        train_segmentation(config, store.path, tmp_path / "run", generator_path=generator, judge_path=judge)
    assert caught.value.exit_code == 2
    found = read_replay(caught.value.replay)
    step = found.steps[-1]
    assert f"loss is {step.losses['loss']} at step {step.step}: training diverged" in str(caught.value)
    assert not math.isfinite(step.losses["loss"])
    assert all(math.isfinite(s.losses["loss"]) for s in found.steps[:-1])
    assert [s.step for s in found.steps] == list(range(step.step - len(found.steps) + 1, step.step + 1))
    assert not (tmp_path / "run" / "checkpoint.pt").exists()
    stage = build_synthesis_stage(config, *load_painters(config, generator, judge)) if painted else None
    trained_on = _batch_at(step.step, _all_batches(config, store, stage))
    again = build_synthesis_stage(config, *load_painters(config, generator, judge)) if painted else None
    _, made = rebuild(found.config, store, step, device=torch.device("cpu"), stages=() if again is None else (again,))
    assert torch.equal(made.image, trained_on.image)
    assert torch.equal(made.label, trained_on.label)
    assert (
        [r.painted for r in made.records]
        == [r.painted for r in step.records]
        == [r.painted for r in trained_on.records]
    )
    assert any(r.painted for r in step.records) == painted
    reason, patches = replay(caught.value.replay, tmp_path / "pictures", every_step=True)
    assert reason.reason.startswith("loss is ")
    assert len(patches) == 2 * len(found.steps)
    assert all(
        p.as_recorded and p.num_not_finite == 0 and p.sheet is not None and p.sheet.stat().st_size > 10_000
        for p in patches
    )
    assert patches[-1].label_voxels["liver"] == int((trained_on.label[1] == 1).sum())
    assert patches[-1].mean == pytest.approx(float(trained_on.image[1].double().mean()))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_replayed_batch_is_cut_as_training_cut_it(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accumulate: int
) -> None:
    config = CONFIG.with_overrides(
        {**BROKEN, "training.cutmix_probability": 0.7, "training.accumulate": accumulate, "training.batch_size": 3}
    )
    taken: list[Batch] = []

    def noting(batch: Batch, *, seed: int, probability: float) -> Batch:
        taken.append(cutmix(batch, seed=seed, probability=probability))
        return taken[-1]

    monkeypatch.setattr("ftengine.training.segmentation.cutmix", noting)
    with pytest.raises(DivergedError) as caught:
        train_segmentation(config, store.path, tmp_path / "run")
    found = read_replay(caught.value.replay)
    changed = False
    for step in found.steps:
        given, made = rebuild(found.config, store, step, device=torch.device("cpu"), cuts=True)
        trained_on = taken[accumulate * step.step : accumulate * (step.step + 1)]
        assert torch.equal(made.image, torch.cat([b.image for b in trained_on]))
        assert torch.equal(made.label, torch.cat([b.label for b in trained_on]))
        changed |= not torch.equal(made.image, given.image)
    assert changed
    _, patches = replay(caught.value.replay)
    last = taken[accumulate * found.steps[-1].step]
    assert [p.mean for p in patches[:3]] == pytest.approx(last.image.double().mean((1, 2, 3, 4)).tolist())


def test_a_replay_names_painters_that_have_changed(store: Store, painters: tuple[Path, Path], tmp_path: Path) -> None:
    files = [shutil.copy(file, tmp_path / name) for file, name in zip(painters, ("g.pt", "s.pt"), strict=True)]
    with pytest.raises(DivergedError) as caught:
        train_segmentation(
            CONFIG.with_overrides(BROKEN), store.path, tmp_path / "run", generator_path=files[0], judge_path=files[1]
        )
    told: list[str] = []
    replay(caught.value.replay, warn=told.append)
    assert told == []
    for file in files:
        document = torch.load(file, weights_only=True)
        torch.save({**document, "step": 99}, file)
    replay(caught.value.replay, warn=told.append)
    assert [text.split(" (")[0] for text in told] == [f"{file}: is not the file that the run had" for file in files]
    result = CliRunner().invoke(app, ["replay", str(caught.value.replay), "--out", str(tmp_path / "p"), "--json"])
    assert json.loads(result.stdout)["warnings"] == told
    result = CliRunner().invoke(app, ["replay", str(caught.value.replay), "--out", str(tmp_path / "p")])
    assert "g.pt: is not the file that the run had" in result.stdout


def test_a_patch_that_holds_nan_is_told_from_a_step_that_is_too_large(store: Store, tmp_path: Path) -> None:
    """Painted with a generator whose weights are NaN."""
    generator = train_synthesis(
        CONFIG, store.path, tmp_path / "g", baseline=train_segmentation(CONFIG, store.path, tmp_path / "s").checkpoint
    ).checkpoint
    document = torch.load(generator, weights_only=True)
    document["model"]["head.bias"].fill_(math.nan)
    torch.save(document, generator)
    config = CONFIG.with_overrides({"qc.threshold": None})
    with pytest.raises(DivergedError) as caught:
        train_segmentation(config, store.path, tmp_path / "run", generator_path=generator)
    _, patches = replay(caught.value.replay)
    assert any(p.num_not_finite for p in patches)


def test_a_generators_broken_step_is_replayed_with_its_last_checkpoint(
    store: Store, painters: tuple[Path, Path], tmp_path: Path
) -> None:
    config = CONFIG.with_overrides(
        {
            "generator_training.learning_rate": 1e19,
            "generator_training.warmup_steps": 2,
            "generator_training.steps": 40,
            "generator_training.checkpoint_every": 1,
        }
    )
    with pytest.raises(DivergedError, match=r"lower generator_training\.learning_rate") as caught:
        train_synthesis(config, store.path, tmp_path / "g", baseline=painters[1])
    assert "checkpoint.pt is kept" in str(caught.value)
    found, patches = replay(caught.value.replay)
    assert found.kind == "generator"
    assert any(p.now for p in patches)
    assert {p.as_recorded for p in patches} == {None}  # the loader painted nothing: there is no verdict to compare
    told: list[str] = []
    replay(caught.value.replay, warn=told.append)
    assert told == []
    document = torch.load(found.checkpoint, weights_only=True)
    torch.save({**document, "step": found.steps[-1].step + 5}, found.checkpoint)
    replay(caught.value.replay, warn=told.append)
    assert len(told) == 1
    assert re.search(r"checkpoint\.pt: is of step \d+, and the run broke at step \d+: it went on since", told[0])


def test_a_replay_file_comes_back_as_it_was(store: Store, painters: tuple[Path, Path], tmp_path: Path) -> None:
    stage = build_synthesis_stage(CONFIG, *load_painters(CONFIG, *painters))
    batch = _batch_at(2, _all_batches(CONFIG, store, stage))
    step = ReplayStep(2, {"loss": math.inf, "other": -math.inf, "fine": 0.1}, batch.records)
    given = Replay("segmenter", "because", CONFIG, SOURCES, "", [step])
    write_replay(tmp_path / "r.json", given)
    found = read_replay(tmp_path / "r.json")
    assert found == given


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not a replay file"),
        ("[]", "is not a replay file"),
        ('{"format": 1}', "is not a replay file"),
        ('{"format": 9, "engine_version": "9.0"}', r"has replay format 9 of ftengine 9\.0; this version reads 1"),
    ],
)
def test_another_file_is_no_replay(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(ConfigError, match=rf"r\.json: {message}"):
        read_replay(tmp_path / "r.json")
    with pytest.raises(ConfigError, match=r"none\.json: cannot be read \(No such file or directory\)"):
        read_replay(tmp_path / "none.json")


def test_processes_agree_on_the_first_broken_step(tmp_path: Path) -> None:
    """One of two has a bad loss: both stop, and the one that had the patches writes them."""

    def guards(name: str, gather: Callable[[int], list[int]]) -> Guards:
        (tmp_path / name).mkdir()
        return Guards("segmenter", CONFIG, tmp_path / name, checkpoint=tmp_path / "none.pt", gather=gather)

    bad, good = guards("bad", lambda step: [step, -1]), guards("good", lambda _step: [3, -1])
    for step in range(5):
        for watching, value in ((bad, math.nan if step >= 3 else 1.0), (good, 1.0)):
            watching.arrived(Batch(torch.zeros(0), torch.zeros(0)))
            watching.step(step, {"loss": torch.tensor(value)})
    for watching, found in ((bad, "loss is nan at step 3"), (good, "a loss is no number in another process at step 3")):
        with pytest.raises(DivergedError, match=found):
            watching.check()
    assert [p.name for p in tmp_path.rglob("*.json")] == ["replay-3.json"]
    assert (tmp_path / "bad" / "replay-3.json").exists()


def test_of_processes_that_break_together_the_first_writes(tmp_path: Path) -> None:
    for rank in (1, 0):
        guards = Guards(
            "segmenter", CONFIG, tmp_path, checkpoint=tmp_path / "none.pt", gather=lambda step: [step, step], rank=rank
        )
        guards.step(3, {"loss": torch.tensor(math.nan)})
        with pytest.raises(DivergedError):
            guards.check()
        assert (tmp_path / "replay-3.json").exists() == (rank == 0)


def test_an_overflow_in_fp16_is_left_out_by_the_scaler_and_tolerated_for_a_while(tmp_path: Path) -> None:
    config = CONFIG.with_overrides({"training.precision": "fp16"})
    guards = Guards("segmenter", config, tmp_path, checkpoint=tmp_path / "none.pt")
    for step in range(2 * MOST_OVERFLOWS):  # every other one
        guards.step(step, {"loss": torch.tensor(1.0 if step % 2 else math.inf)})
        guards.check()
    for step in range(MOST_OVERFLOWS):
        guards.step(step, {"loss": torch.tensor(math.nan)})
    guards.check()
    guards.step(99, {"loss": torch.tensor(math.nan)})
    with pytest.raises(DivergedError, match="at step 99"):
        guards.check()


@pytest.mark.gpu
def test_steps_that_are_not_logged_wait_for_nothing(tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    guards = Guards("segmenter", CONFIG, tmp_path, checkpoint=tmp_path / "none.pt")
    loss = torch.ones((), device="cuda")
    with host_syncs_forbidden():
        for step in range(20):
            guards.arrived(Batch(loss, loss))
            guards.step(step, {"loss": loss / (step + 1)})
    guards.check()


# warnings


def _guards(config: Config, tmp_path: Path, gate: QualityGate | None = None) -> tuple[Guards, list[str]]:
    warned: list[str] = []
    kind: Kind = "generator" if gate is None else "segmenter"
    main_loss = "loss_seen" if gate is None else "loss"
    guards = Guards(
        kind, config, tmp_path, checkpoint=tmp_path / "c.pt", gate=gate, warn=warned.append, main_loss=main_loss
    )
    return guards, warned


def _watched(losses: Iterator[float] | list[float], tmp_path: Path, **settings: object) -> list[str]:
    keys = {f"training.{name}": value for name, value in settings.items()}
    guards, warned = _guards(CONFIG.with_overrides(keys), tmp_path, QualityGate(CONFIG.qc))
    for step, loss in enumerate(losses):
        guards.watch(step, {"loss": loss})
    assert guards.warnings == warned
    return [text.split(":")[0] for text in warned]


def test_a_loss_that_moves_is_fine(tmp_path: Path) -> None:
    noise = [0.03 * math.sin(7.0 * n) for n in range(400)]
    falling = [2.0 * 0.99**n + noise[n] for n in range(400)]
    assert _watched(falling, tmp_path, warmup_steps=0) == []
    converged = [0.3 + 0.7 * 0.9**n + noise[n] for n in range(400)]  # flat in the end, as it should be
    assert _watched(converged, tmp_path, warmup_steps=0) == []


def test_a_loss_that_does_not_move_is_named_once_behind_the_warm_up(tmp_path: Path) -> None:
    flat = [2.0 + 0.003 * math.sin(7.0 * n) for n in range(400)]
    assert _watched(flat, tmp_path, warmup_steps=0) == ["loss does not move"]
    assert _watched(flat[: WINDOW + 20], tmp_path, warmup_steps=30) == []
    assert _watched(flat[: WINDOW + 30], tmp_path, warmup_steps=30) == ["loss does not move"]


def test_a_frozen_loss_is_named_whenever_it_freezes(tmp_path: Path) -> None:
    losses = [2.0 * 0.98**n for n in range(100)] + [0.25] * (WINDOW + 5)
    assert _watched(losses, tmp_path, warmup_steps=0) == ["frozen loss"]


def test_a_run_whose_weights_do_not_move_says_so(store: Store, tmp_path: Path) -> None:
    """For real: a rate of nearly nothing, so that only the patches change the loss."""
    config = CONFIG.with_overrides(
        {
            "training.steps": 2 * WINDOW,
            "training.learning_rate": 1e-12,
            "training.warmup_steps": 0,
            "loader.positive_fraction": 1.0,
        }
    ).with_overrides({"augment.flip_probability": 0.0, "augment.rot90_probability": 0.0, "training.batch_size": 8})
    result = train_segmentation(config, store.path, tmp_path / "run")
    assert [text.split(":")[0] for text in result.warnings] == ["loss does not move"]


@pytest.mark.parametrize(
    ("threshold", "name"), [(0.0, ["quality control passes everything"]), (1.0, ["quality control passes nothing"])]
)
def test_quality_control_that_decides_nothing_is_named(
    store: Store, painters: tuple[Path, Path], tmp_path: Path, threshold: float, name: list[str]
) -> None:
    config = CONFIG.with_overrides({"qc.threshold": threshold, "qc.window": 6, "training.steps": 16})
    result = train_segmentation(
        config, store.path, tmp_path / "run", generator_path=painters[0], judge_path=painters[1]
    )
    assert [text.split(":")[0] for text in result.warnings if "calibrat" not in text] == name
    assert f"the last 6 painted tumours passed at T={threshold}" in result.warnings[0]


def test_without_a_threshold_passing_all_is_what_was_asked(
    store: Store, painters: tuple[Path, Path], tmp_path: Path
) -> None:
    config = CONFIG.with_overrides({"qc.threshold": None, "qc.window": 6, "training.steps": 12})
    result = train_segmentation(
        config, store.path, tmp_path / "run", generator_path=painters[0], judge_path=painters[1]
    )
    assert result.warnings == []


def test_the_contrast_of_a_generator_is_that_of_the_masks_alone() -> None:
    g = torch.full((2, 4, 4, 4), 50.0)
    mask = torch.zeros((2, 4, 4, 4), dtype=torch.uint8)
    mask[0, 1, 1, :2], mask[1, 2, 2, :2] = 1, 1
    g[0, 1, 1, :2], g[1, 2, 2, :2] = torch.atanh(torch.tensor(-0.2)), torch.atanh(torch.tensor(0.4))
    cpu = torch.device("cpu")
    found = contrast_figures([(g, mask)], device=cpu)
    assert contrast_figures([(g[:1], mask[:1]), (g[1:], mask[1:])], device=cpu) == pytest.approx(
        found
    )  # several batches
    assert found[CONTRAST_MEAN] == pytest.approx(0.1, abs=1e-6)
    assert found[CONTRAST_SD] == pytest.approx(0.3, abs=1e-6)
    assert math.isnan(contrast_figures([(g, torch.zeros_like(mask))], device=cpu)[CONTRAST_SD])


@pytest.mark.parametrize(
    ("contrast", "is_named"),
    [
        (lambda n: (-0.12, 0.001), True),
        (lambda n: (-0.12, 0.03), False),  # a few HU: as healthy runs
        (lambda n: (-0.12 + 0.02 * math.sin(n), 0.001), False),  # another one in each patch
        (lambda n: (-0.9999, 0.0), True),
    ],
)
def test_a_generator_that_paints_one_contrast_is_named(
    tmp_path: Path, contrast: Callable[[int], tuple[float, float]], is_named: bool
) -> None:
    guards, warned = _guards(CONFIG, tmp_path)
    for n in range(2 * WINDOW):
        mean, sd = contrast(n)
        guards.watch(n, {"loss_seen": 1 / (n + 1), CONTRAST_MEAN: mean, CONTRAST_SD: sd})
    assert [text.split(":")[0] for text in warned] == (["generator collapsed to a constant"] if is_named else [])
    if is_named:
        assert re.search(r"standard deviation of 0\.00\d+ \(at most \d\.\d HU\)", warned[0])


def test_generator_training_logs_its_contrast(painters: tuple[Path, Path]) -> None:
    rows = read_metrics(painters[0].parent)
    assert all(row[CONTRAST_SD] > 0.003 for row in rows if CONTRAST_SD in row)
    assert any(CONTRAST_SD in row for row in rows)


def test_a_resumed_run_does_not_warn_again(tmp_path: Path) -> None:
    first, warned = _guards(CONFIG, tmp_path)
    for n in range(WINDOW - 10):
        first.watch(n, {"loss_seen": 1.0})
    second, _ = _guards(CONFIG, tmp_path)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for n in range(WINDOW - 10, WINDOW):
        second.watch(n, {"loss_seen": 1.0})
    assert warned == []
    assert {text.split(":")[0] for text in second.warnings} == {"frozen loss", "loss does not move"}
    third, again = _guards(CONFIG, tmp_path)
    third.load_state_dict(second.state_dict())
    for n in range(WINDOW, 3 * WINDOW):
        third.watch(n, {"loss_seen": 1.0})
    assert again == []
    assert third.warnings == second.warnings


def test_a_verdict_that_is_not_judged_is_kept_in_a_replay_file(tmp_path: Path, store: Store) -> None:
    stage = build_synthesis_stage(CONFIG, None, None)
    batch = _batch_at(0, _all_batches(CONFIG, store, stage))
    painted = [r.painted for r in batch.records if isinstance(r.painted, Painted)]
    assert painted
    write_replay(tmp_path / "r.json", Replay("segmenter", "", CONFIG, SOURCES, "", [ReplayStep(0, {}, batch.records)]))
    found = [r.painted for r in read_replay(tmp_path / "r.json").steps[0].records if r.painted is not None]
    assert [p.center_zyx for p in found] == [p.center_zyx for p in painted]
    assert all(math.isnan(p.proportion) for p in found)
