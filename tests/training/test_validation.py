"""Validation while training: the figures of ``evaluate``, the best network, and going on after a break."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from ftengine.assemble import train_segmentation, train_synthesis
from ftengine.errors import ConfigError, DivergedError
from ftengine.evaluation.evaluate import evaluate_checkpoint
from ftengine.evaluation.metrics import summarize
from ftengine.evaluation.validator import build_validation
from ftengine.store import index
from ftengine.store.reader import Store, open_store
from ftengine.store.writer import Provenance, create_store, write_volume
from ftengine.training.checkpoint import load_checkpoint, load_segmenter, save_checkpoint
from ftengine.training.distributed import World
from ftengine.training.estimate import rehearse
from ftengine.training.networks import build_segmenter
from ftengine.training.run import read_metrics, read_validations
from ftengine.training.validation import Validation, validate
from tests.support import organ_volume, ras_grid_at, small_config

CPU = torch.device("cpu")
CONFIG = small_config(
    device="cpu",
    training__steps=8,
    training__checkpoint_every=3,
    training__validate_every=2,
    generator_training__steps=4,
    training__learning_rate=1e-2,
    training__warmup_steps=0,
    inference__overlap=0.0,
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Two annotated and one organ-labelled volume to train on, two annotated ones and a healthy one to validate on."""
    root = create_store(tmp_path_factory.mktemp("validation") / "store.zarr", CONFIG.region)
    shape, grid = (24, 24, 24), ras_grid_at((24, 24, 24))
    for number, (split, annotation) in enumerate(
        [
            ("train", "tumor"),
            ("train", "tumor"),
            ("train", "organ"),
            ("val", "tumor"),
            ("val", "tumor"),
            ("val", "organ"),
        ]
    ):
        image, label = organ_volume(shape, tumor=annotation == "tumor", seed=number)
        provenance = Provenance("made by a test", "", annotation=annotation, split=split)
        write_volume(root, f"{annotation[0]}/{number}", image, label, grid, grid, CONFIG.region, provenance)
    index.compact_index(root)
    return open_store(root)


@pytest.fixture(scope="module")
def whole(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    train_segmentation(CONFIG, store.path, out, split="train", val_split="val")
    return out


def test_the_best_network_is_kept_and_its_score_is_that_of_evaluate(whole: Path, store: Store) -> None:
    validations = read_validations(whole)
    assert [v["step"] for v in validations] == [2, 4, 6, 8]
    best = max(validations, key=lambda v: v["dice"])
    document = load_checkpoint(whole / "best.pt", "segmenter")
    assert document["best"] == {"step": best["step"], "dice": best["dice"]}
    assert load_checkpoint(whole / "checkpoint.pt")["best"] == document["best"]
    evaluated = evaluate_checkpoint(whole / "best.pt", store, device=CPU, split="val")
    assert summarize(evaluated.cases)["liver_tumor"]["dice"] == pytest.approx(best["dice"], abs=1e-12)
    assert best["dice/liver_tumor"] == best["dice"]
    load_segmenter(whole / "best.pt")


def test_training_goes_on_as_without_validation(whole: Path, store: Store, tmp_path: Path) -> None:
    config = CONFIG.with_overrides({"training.validate_every": None})
    result = train_segmentation(config, store.path, tmp_path / "run", split="train")
    assert not result.best
    assert not (tmp_path / "run" / "best.pt").exists()
    assert result.losses == [row["loss"] for row in read_metrics(whole)]


def test_a_broken_run_has_the_same_best_and_validates_no_step_twice(whole: Path, store: Store, tmp_path: Path) -> None:
    def stop(done: int, _values: dict[str, float]) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_segmentation(CONFIG, store.path, tmp_path / "run", split="train", val_split="val", on_step=stop)
    result = train_segmentation(CONFIG, store.path, tmp_path / "run", split="train", val_split="val", resume=True)
    assert read_validations(tmp_path / "run") == read_validations(whole)
    assert result.best == load_checkpoint(whole / "best.pt")["best"]
    ours, theirs = (load_checkpoint(folder / "best.pt")["model"] for folder in (tmp_path / "run", whole))
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


def test_without_an_interval_it_comes_with_each_checkpoint_and_at_the_end(store: Store, tmp_path: Path) -> None:
    config = CONFIG.with_overrides({"training.validate_every": None, "training.ema_decay": 0.9})
    train_segmentation(config, store.path, tmp_path / "run", split="train", val_split="val")
    assert [v["step"] for v in read_validations(tmp_path / "run")] == [3, 6, 8]
    average, saved = load_checkpoint(tmp_path / "run" / "checkpoint.pt"), load_checkpoint(tmp_path / "run" / "best.pt")
    assert average["learners"]["segmenter"]["ema_updates"] == 8
    assert set(saved["model"]) == set(average["model"])


def test_by_epochs(store: Store, tmp_path: Path) -> None:
    config = CONFIG.with_overrides({"training.validate_unit": "epochs"})  # an epoch is one batch of two volumes
    train_segmentation(config, store.path, tmp_path / "run", split="train", val_split="val")
    assert [v["step"] for v in read_validations(tmp_path / "run")] == [2, 4, 6, 8]


def test_by_epochs_with_steps_that_reach_over_their_ends(store: Store, tmp_path: Path) -> None:
    config = CONFIG.with_overrides(
        {
            "training.validate_unit": "epochs",
            "training.accumulate": 2,
            "loader.patches_per_epoch": 6,
            "training.steps": 6,
        }
    )  # an epoch is three batches, a step two: epochs end in steps 2, 3, 5 and 6
    every = config.with_overrides({"training.validate_every": 1})
    train_segmentation(every, store.path, tmp_path / "run", split="train", val_split="val")
    assert [v["step"] for v in read_validations(tmp_path / "run")] == [2, 3, 5, 6]
    train_segmentation(every, store.path, tmp_path / "run", split="train", val_split="val", resume=True)
    assert [v["step"] for v in read_validations(tmp_path / "run")] == [2, 3, 5, 6]  # what is done is not done again
    best = load_checkpoint(tmp_path / "run" / "best.pt")
    assert best["identity"]["--split"] == "train"


def test_what_cannot_be_validated_on_is_refused(store: Store, tmp_path: Path) -> None:
    for split in (None, "val"):
        with pytest.raises(ConfigError, match="training would see these volumes too"):
            train_segmentation(CONFIG, store.path, tmp_path / "run", split=split, val_split="val")
    with pytest.raises(ConfigError, match="no volumes to validate on"):
        train_segmentation(CONFIG, store.path, tmp_path / "run", split="train")
    with pytest.raises(ConfigError, match="holds no tumour-annotated volume"):
        train_segmentation(CONFIG, store.path, tmp_path / "run", split="train", val_split="test")
    assert not (tmp_path / "run").exists()


def test_scores_are_means_over_the_volumes_that_hold_a_class() -> None:
    scores = {"a": {"x": 0.2, "y": 1.0}, "b": {"x": 0.6}, "c": {}}
    network = nn.Linear(1, 1).train()

    def score(given: nn.Module, case: str) -> dict[str, float]:
        assert not given.training
        return scores[case]

    figures = validate(Validation(list(scores), score), network, World())
    assert figures == pytest.approx({"dice/x": 0.4, "dice/y": 1.0, "dice": 0.7})
    assert network.training
    assert validate(Validation(["c"], score), network, World()) == {"dice": 0.0}


def test_the_volumes_are_shared_out_and_put_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of three processes scores its own; all have the same figures, to the last bit."""
    values = {str(n): {"x": 0.1 * n} for n in range(7)}
    asked: dict[int, list[str]] = {}
    shares: list[dict[str, dict[str, float]]] = []

    def gather(_world: World, item: dict[str, dict[str, float]]) -> list[dict[str, dict[str, float]]]:
        shares.append(item)
        return shares

    monkeypatch.setattr(World, "gather", gather)

    def score_as(rank: int) -> dict[str, float]:
        def score(_network: nn.Module, case: str) -> dict[str, float]:
            asked.setdefault(rank, []).append(case)
            return values[case]

        return validate(Validation(list(values), score), nn.Linear(1, 1), World(rank, 3))

    with pytest.raises(KeyError):
        score_as(0)  # the shares of the others are missing
    with pytest.raises(KeyError):
        score_as(1)
    together = score_as(2)
    monkeypatch.undo()
    alone = validate(Validation(list(values), lambda _n, case: values[case]), nn.Linear(1, 1), World())
    assert together == alone
    assert asked == {0: ["0", "3", "6"], 1: ["1", "4"], 2: ["2", "5"]}


def test_a_fold_can_be_validated_on(store: Store) -> None:
    with pytest.raises(ConfigError, match="no volume is in it"):
        build_validation(CONFIG, store, device=CPU, fold=3)


def test_pictures_show_the_same_patches_every_few_steps(whole: Path, store: Store, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = CONFIG.with_overrides({"generator_training.pictures_every": 2, "generator_training.num_pictures": 1})
    run = tmp_path / "g"
    train_synthesis(config, store.path, run, baseline=whole / "best.pt", split="train", val_split="val")
    files = sorted(str(p.relative_to(run)) for p in (run / "pictures").rglob("*.png"))
    assert files == ["pictures/step-0000002/sheet-000.png", "pictures/step-0000004/sheet-000.png"]
    board = EventAccumulator(str(run / "tensorboard"), size_guidance={"histograms": 0, "images": 0})  # all
    board.Reload()
    assert [event.step for event in board.Images("painted/0")] == [2, 4]
    histograms = board.Histograms("qc/p")
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    painted = [row for row in logged if "qc/pass_rate" in row]
    assert [h.step for h in histograms] == [row["step"] for row in painted] != []
    for row in painted:
        assert sum(row[f"qc/p_tenth/{n}"] for n in range(1, 11)) == pytest.approx(1)


@pytest.mark.parametrize(
    ("held_out", "validate_every"),
    [
        ({"split": "train", "val_split": "val"}, 1),
        ({"split": "train", "val_split": "val"}, None),
        ({"split": "train"}, None),
    ],
)
def test_a_rehearsal_does_not_validate(
    store: Store, monkeypatch: pytest.MonkeyPatch, held_out: dict[str, str], validate_every: int | None
) -> None:
    monkeypatch.setattr("ftengine.training.trainer.validate", _refuse)
    config = CONFIG.with_overrides({"training.validate_every": validate_every})
    found = rehearse("segmenter", config, partial(train_segmentation, store_path=store.path, **held_out))  # type: ignore[arg-type]  # texts alone
    assert found.step_s is not None


@pytest.mark.parametrize(
    ("held_out", "text"),
    [
        ({"split": "train", "val_split": "nowhere"}, "split 'nowhere' holds no tumour-annotated volume"),
        ({"split": "train", "val_split": "train"}, "training would see these volumes too"),
        ({"split": "train"}, "no volumes to validate on"),
    ],
)
def test_a_rehearsal_refuses_what_the_run_would(
    store: Store, tmp_path: Path, held_out: dict[str, str], text: str
) -> None:
    config = CONFIG.with_overrides({"training.validate_every": 1})
    train = partial(train_segmentation, store_path=store.path, **held_out)  # type: ignore[arg-type]  # texts alone
    with pytest.raises(ConfigError, match=text):
        train_segmentation(config, store.path, tmp_path / "run", **held_out)  # type: ignore[arg-type]  # texts alone
    with pytest.raises(ConfigError, match=text):
        rehearse("segmenter", config, train)


def test_a_rehearsal_does_not_draw(store: Store, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ftengine.pictures.preview.preview", _refuse)
    config = CONFIG.with_overrides({"generator_training.pictures_every": 1})
    train = partial(train_synthesis, store_path=store.path, baseline=whole / "best.pt", split="train")
    assert rehearse("generator", config, partial(train, val_split="val")).step_s is not None
    with pytest.raises(ConfigError, match="no volume in split 'nowhere'"):  # not at the first picture of a run
        rehearse("generator", config, partial(train, val_split="nowhere"))


def _refuse(*_: object, **__: object) -> None:
    raise AssertionError("a rehearsal trains only")


@pytest.mark.parametrize("workers", [1, 2])
def test_scores_that_are_no_numbers_are_not_taken_for_background(store: Store, tmp_path: Path, workers: int) -> None:
    network = build_segmenter(CONFIG)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.fill_(torch.nan)
    save_checkpoint(tmp_path / "nan.pt", "segmenter", CONFIG, {"model": network.state_dict()})
    evaluated = evaluate_checkpoint(tmp_path / "nan.pt", store, device=CPU, split="val", workers=workers)
    assert (evaluated.cases, evaluated.exit_code) == ([], 4)
    assert list(evaluated.failed) == ["t/3", "t/4"]
    assert "t/3: the network gives NaN or infinity" in evaluated.failed["t/3"]
    with pytest.raises(DivergedError, match="validation: t/3: the network gives NaN"):
        validate(build_validation(CONFIG, store, device=CPU, split="val"), network, World())
