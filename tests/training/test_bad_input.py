"""What training is given and must refuse: one line that says where, what and what to do; the right exit code; and nothing left behind."""

import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

from ftengine.assemble import train_segmentation, train_synthesis
from ftengine.config import Config
from ftengine.store import index
from ftengine.store.reader import Store, open_store
from ftengine.store.writer import Provenance, create_store, write_volume
from ftengine.training.checkpoint import load_checkpoint, save_checkpoint
from ftengine.training.networks import build_generator, build_segmenter
from tests.cli.test_cli import _error
from tests.support import make_store, organ_volume, ras_grid_at, small_config

CONFIG = small_config(training__steps=2, generator_training__steps=2, device="cpu")


@dataclass(frozen=True)
class World:
    """What a user has: a store, both trained networks, a configuration, and a folder to make bad input in."""

    store: Path
    segmenter: Path
    generator: Path
    config: Path
    folder: Path

    @property
    def out(self) -> Path:
        """Where the run would go."""
        return self.folder / "run"

    def seg(self, *arguments: object) -> list[object]:
        return ["train", "seg", self.store, "--out", self.out, "--config", self.config, *arguments]

    def synth(self, baseline: Path) -> list[object]:
        return ["train", "synth", self.store, "--out", self.out, "--config", self.config, "--baseline", baseline]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Path, Path]:
    folder = tmp_path_factory.mktemp("trained")
    store = make_store(folder, CONFIG)
    segmenter = train_segmentation(CONFIG, store.path, folder / "s").checkpoint
    return store, segmenter, train_synthesis(CONFIG, store.path, folder / "g", baseline=segmenter).checkpoint


@pytest.fixture
def world(trained: tuple[Store, Path, Path], tmp_path: Path) -> World:
    config = tmp_path / "c.yaml"
    config.write_text(CONFIG.to_yaml())
    return World(trained[0].path, trained[1], trained[2], config, tmp_path)


Case = tuple[list[object], int, str]  # a command line, its exit code, what its message must hold


def _label_table_without_the_tumour(world: World) -> Case:
    world.config.write_text(CONFIG.to_yaml().replace("    liver_tumor: 2\n", ""))
    return world.seg(), 2, r"c\.yaml: region: organs\.liver names label values \[2\] that labels does not list"


def _store_without_tumours(world: World) -> Store:
    root = create_store(world.folder / "healthy.zarr", CONFIG.region)
    for number in range(2):
        image, label = organ_volume((40, 44, 48), tumor=False, seed=number)
        grid = ras_grid_at((40, 44, 48))
        write_volume(
            root,
            f"h/{number}",
            image,
            label,
            grid,
            grid,
            CONFIG.region,
            Provenance("", "", annotation="tumor", split="train"),
        )
    index.compact_index(root)
    return open_store(root)


def _labelled_set_without_tumours(world: World) -> Case:
    store = _store_without_tumours(world)
    arguments = ["train", "seg", store.path, "--out", world.out, "--config", world.config]
    return (
        arguments,
        2,
        r"healthy\.zarr: none of the 2 volumes of this run holds a voxel of liver_tumor: the network would learn.*--label-map",
    )


def _generator_on_a_set_without_tumours(world: World) -> Case:
    store = _store_without_tumours(world)
    arguments = [
        "train",
        "synth",
        store.path,
        "--out",
        world.out,
        "--config",
        world.config,
        "--baseline",
        world.segmenter,
    ]
    return arguments, 2, r"healthy\.zarr: none of the 2 volumes.*the classifier would never see a real one"


def _no_labelled_set_at_all(world: World) -> Case:
    store = make_store(world.folder, CONFIG, num_annotated=0)
    arguments = ["train", "seg", store.path, "--out", world.out, "--config", world.config]
    return (
        arguments,
        2,
        r"store\.zarr: no volume to draw from \(tumours annotated: 0, organs only: 2.*--annotated tumor",
    )


def _judge_of_other_classes(world: World) -> Case:
    other = Config.preset("chest").with_overrides(
        {"network.name": "unet", "network.channels": (4, 8), "region.patch_zyx": (16, 16, 16)}
    )
    judge = world.folder / "chest.pt"
    save_checkpoint(judge, "segmenter", other, {"model": build_segmenter(other).state_dict(), "step": 1})
    return (
        world.seg("--synth", world.generator, "--judge", judge),
        2,
        r"chest\.pt: was trained with region\.name=chest; this run has",
    )


def _generator_of_other_classes(world: World) -> Case:
    other = small_config(region__window_hu=(-100.0, 100.0))
    generator = world.folder / "other.pt"
    save_checkpoint(generator, "generator", other, {"model": build_generator(other).state_dict(), "step": 1})
    return (
        world.seg("--synth", generator),
        2,
        r"other\.pt: was trained with region\.window_hu=\(-100\.0, 100\.0\); this run has",
    )


def _weights_of_another_network(world: World) -> Case:
    arguments = world.seg("--init", world.segmenter, "--set", "network.channels=[6, 12]")
    return (
        arguments,
        2,
        r"checkpoint\.pt: holds the weights of another network: network\.channels was \(4, 8\), this run has \(6, 12\)\. Use the configuration",
    )


def _network_of_the_other_stage(world: World) -> Case:
    return (
        world.seg("--synth", world.segmenter),
        2,
        r"checkpoint\.pt: holds a segmenter; want a generator\. Give the file of the other",
    )


def _changed(world: World, name: str, **values: Any) -> Path:
    document = torch.load(world.segmenter, weights_only=True)
    torch.save({**document, **values}, world.folder / name)
    return world.folder / name


def _newer_format(world: World) -> Case:
    file = _changed(world, "new.pt", format=2, engine_version="7.1.0")
    return (
        world.synth(file),
        2,
        r"new\.pt: has checkpoint format 2 of ftengine 7\.1\.0.*Install ftengine 7\.1\.0 or newer",
    )


def _newer_engine(world: World) -> Case:
    config = torch.load(world.segmenter, weights_only=True)["config"]
    file = _changed(world, "new.pt", engine_version="7.1.0", config={**config, "telepathy": 1})
    return (
        world.synth(file),
        2,
        r"new\.pt: was written by ftengine 7\.1\.0, and this is .*telepathy.*Install ftengine 7\.1\.0 or newer",
    )


class _Harm:
    """A pickle that would create a file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.folder / 'harm'}",)


def _malicious(world: World) -> Path:
    torch.save({"format": 1, "kind": "segmenter", "config": {}, "model": _Harm(world.folder)}, world.folder / "harm.pt")
    return world.folder / "harm.pt"


_REFUSED = r"harm\.pt: is not a checkpoint of ftengine or is damaged .*Nothing in it was run; want a file that 'ftengine train' wrote"


def _malicious_init(world: World) -> Case:
    return world.seg("--init", _malicious(world)), 2, r"harm\.pt: asks to run posix\.system, .*nothing of it was run"


def _malicious_baseline(world: World) -> Case:
    return world.synth(_malicious(world)), 2, _REFUSED


def _malicious_judge(world: World) -> Case:
    return world.seg("--synth", world.generator, "--judge", _malicious(world)), 2, _REFUSED


def _malicious_to_predict(world: World) -> Case:
    return ["predict", _malicious(world), world.config, "--out", world.out], 2, _REFUSED


def _no_such_file(world: World) -> Case:
    return (
        world.seg("--init", world.folder / "gone.pt"),
        2,
        r"gone\.pt: no such checkpoint or file of weights; want",
    )


def _nothing_to_resume(world: World) -> Case:
    return world.seg("--resume"), 2, r"run/checkpoint\.pt: there is nothing to resume\. Start without --resume"


def _tracker_that_is_missing(world: World) -> Case:
    return (
        world.seg("--set", "tracking.use=[carrier-pigeon]"),
        2,
        r"tracking\.use\.0: Input should be 'tensorboard', 'mlflow' or 'wandb'",
    )


def _dry_run_of_a_wrong_configuration(world: World) -> Case:
    return (
        world.seg("--synth", world.generator, "--dry-run", "--set", "training.steps=0"),
        2,
        r"training\.steps: .*greater than or equal to 1",
    )


@pytest.mark.parametrize(
    "make",
    [
        _label_table_without_the_tumour,
        _labelled_set_without_tumours,
        _generator_on_a_set_without_tumours,
        _no_labelled_set_at_all,
        _judge_of_other_classes,
        _generator_of_other_classes,
        _weights_of_another_network,
        _network_of_the_other_stage,
        _newer_format,
        _newer_engine,
        _malicious_init,
        _malicious_baseline,
        _malicious_judge,
        _malicious_to_predict,
        _no_such_file,
        _nothing_to_resume,
        _tracker_that_is_missing,
        _dry_run_of_a_wrong_configuration,
    ],
    ids=lambda make: make.__name__.strip("_"),
)
def test_bad_input_is_one_line_and_leaves_nothing(world: World, make: Callable[[World], Case]) -> None:
    arguments, code, wanted = make(world)
    before = _files(world.folder)
    text = _error(*arguments, code=code)
    assert re.search(wanted, text), text
    assert not world.out.exists()
    assert not (world.folder / "harm").exists()
    assert _files(world.folder) == before


def _files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# a run that is there already


@pytest.fixture
def run(world: World) -> Path:
    shutil.copytree(world.segmenter.parent, world.out)
    return world.out


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (
            ["--set", "training.learning_rate=0.5"],
            r"training\.learning_rate: was .*, is 0\.5.*--allow training\.learning_rate",
        ),
        (["--set", "augment.shift_range=0.5"], r"augment\.shift_range: was 0\.1, is 0\.5"),
        (["--set", "training.batch_size=3"], r"training\.batch_size: was 2, is 3"),
        (["--split", "train"], r"split: was nothing, is train.*--allow split"),
        (
            ["--set", "training.steps=4", "--set", "seed=1", "--allow", "seed"],
            r"\(training\.steps: was 2, is 4\).*: --allow training\.steps$",
        ),
    ],
)
def test_a_resume_that_would_be_another_run_changes_nothing(
    world: World, run: Path, options: list[str], wanted: str
) -> None:
    before = _files(run)
    text = _error("train", "seg", world.store, "--out", run, "--resume", *options, code=2)
    assert text.startswith(f"ftengine: error: {run}: --resume would go on with another run than the one that began (")
    assert re.search(wanted, text), text
    assert _files(run) == before


def test_a_run_is_never_begun_over(world: World, run: Path) -> None:
    before = _files(run)
    assert f"{run}: holds a run already. Go on with --resume or choose another --out." in _error(*world.seg(), code=2)
    assert _files(run) == before


def test_a_malicious_checkpoint_in_a_runs_folder_is_not_resumed(world: World, run: Path) -> None:
    shutil.move(_malicious(world), run / "checkpoint.pt")
    assert "Nothing in it was run" in _error("train", "seg", world.store, "--out", run, "--resume", code=2)
    assert not (world.folder / "harm").exists()


def test_out_of_memory_is_advice_and_the_command_line_says_it(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.nn.functional.conv3d

    def forward(x: torch.Tensor, *arguments: Any) -> torch.Tensor:
        if isinstance(x, FakeTensor):  # the estimate, which allocates nothing
            return real(x, *arguments)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr("torch.nn.functional.conv3d", forward)
    text = _error(*world.seg("--quiet", "--dry-run"), code=2)
    assert "does not fit the memory of this machine (CUDA out of memory. Tried to allocate 20.00 GiB.)" in text
    assert "training.batch_size=1 (now 2)" in text
    assert not world.out.exists()


def test_initial_weights_that_are_not_finite_are_refused(world: World) -> None:
    document = load_checkpoint(world.segmenter)
    for tensor in document["model"].values():
        tensor.fill_(np.nan)
    del document["sha256"]
    torch.save(document, world.folder / "nan.pt")
    text = _error(*world.seg("--init", world.folder / "nan.pt", "--quiet"), code=2)
    assert re.search(r"nan\.pt: fits network unet in 0 of 21 tensors \(.*: holds NaN or infinity", text)
    assert not world.out.exists()
