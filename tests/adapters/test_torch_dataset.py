"""``PatchDataset`` gives what the loader gives, patch by patch, through torch's own DataLoader; resumes between any two patches."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, default_collate
from torchdata.stateful_dataloader import StatefulDataLoader

from ftengine.adapters.torch_dataset import PatchDataset
from ftengine.assemble import build_loader, build_synthesis_stage
from ftengine.errors import ConfigError
from ftengine.store.reader import Store
from ftengine.types import Batch
from tests.support import make_store, small_config

CONFIG = small_config(training__batch_size=3, loader__patches_per_epoch=9, device="cpu")

Sample = dict[str, Any]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(tmp_path_factory.mktemp("adapters"), CONFIG)


def _batches(store: Store, epochs: int = 1) -> list[Batch]:
    """What the loader itself gives, painted with the fixed contrast."""
    with build_loader(CONFIG, store, stages=(build_synthesis_stage(CONFIG, None, None),)) as loader:
        return [batch for _ in range(epochs) for batch in loader]


def _same(a: Sample, b: Sample) -> bool:
    """Bit for bit; NaN equals NaN."""
    return a.keys() == b.keys() and all(
        torch.equal(torch.nan_to_num(a[k]), torch.nan_to_num(b[k]))
        if isinstance(a[k], torch.Tensor)
        else repr(a[k]) == repr(b[k])
        for k in a
    )


def _all_same(a: list[Sample], b: list[Sample]) -> bool:
    return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))


def test_batches_are_the_loaders(store: Store) -> None:
    expected = _batches(store)
    with PatchDataset(store, CONFIG, batches=True, paint=True) as dataset:
        got = list(DataLoader(dataset, batch_size=None))
        assert len(dataset) == len(got) == len(expected) == 3
    for sample, batch in zip(got, expected, strict=True):
        assert torch.equal(sample["image"], batch.image)
        assert torch.equal(sample["label"], batch.label)
        assert sample["case"] == [r.request.case for r in batch.records]
        assert sample["index"].tolist() == [r.request.index for r in batch.records]
        assert sample["painted"].tolist() == [r.painted is not None for r in batch.records]
        assert sample["passed"].tolist() == [r.painted is not None and r.painted.passed for r in batch.records]
    assert any(sample["painted"].any() for sample in got)


def test_patches_are_those_of_the_batches(store: Store) -> None:
    expected = _batches(store)
    with PatchDataset(store, CONFIG, paint=True) as dataset:
        patches = list(dataset)
        assert len(dataset) == len(patches) == 9
    for number, patch in enumerate(patches):
        batch, slot = expected[number // 3], number % 3
        assert torch.equal(patch["image"], batch.image[slot])
        assert torch.equal(patch["label"], batch.label[slot])
        assert (patch["image"].dtype, patch["label"].dtype) == (torch.float32, torch.uint8)
        assert patch["image"].shape == (1, 16, 16, 16)
        assert (patch["case"], patch["index"]) == (batch.records[slot].request.case, number)


def test_a_batch_is_what_torch_collates_of_its_patches(store: Store) -> None:
    with PatchDataset(store, CONFIG, paint=True) as a, PatchDataset(store, CONFIG, paint=True, batches=True) as b:
        patches, batches = list(a), list(b)
    assert _all_same([default_collate(patches[3 * i : 3 * i + 3]) for i in range(3)], batches)


def test_torch_makes_batches_of_any_size(store: Store) -> None:
    with PatchDataset(store, CONFIG, paint=True) as a, PatchDataset(store, CONFIG, paint=True) as b:
        patches, batches = list(a), list(DataLoader(b, batch_size=4))
    assert [len(batch["case"]) for batch in batches] == [4, 4, 1]
    assert _all_same([default_collate(patches[i : i + 4]) for i in (0, 4, 8)], batches)


def test_iterating_again_gives_the_next_epoch(store: Store) -> None:
    with PatchDataset(store, CONFIG, paint=True) as dataset:
        epochs = [[p["epoch"] for p in dataset] for _ in range(3)]
    assert epochs == [[0] * 9, [1] * 9, [2] * 9]


@pytest.mark.parametrize("delivered", [1, 3, 4])
def test_iterating_goes_on_behind_a_break(store: Store, delivered: int) -> None:
    with PatchDataset(store, CONFIG, paint=True) as whole, PatchDataset(store, CONFIG, paint=True) as parts:
        first = []
        for patch in parts:
            first.append(patch)
            if len(first) == delivered:
                break
        assert _all_same(first + list(parts), list(whole))


@pytest.mark.parametrize("delivered", [0, 1, 3, 5, 9, 11])
def test_a_state_resumes_between_any_two_patches(store: Store, delivered: int) -> None:
    with PatchDataset(store, CONFIG, paint=True) as dataset:
        everything = [*dataset, *dataset]
    with PatchDataset(store, CONFIG, paint=True) as first:
        _take(first, delivered)
        state = json.loads(json.dumps(first.state_dict()))
    with PatchDataset(store, CONFIG, paint=True) as second:
        second.load_state_dict(state)
        assert second.state_dict() == state
        assert _all_same(_take(second, 18 - delivered), everything[delivered:])


def _take(dataset: PatchDataset, count: int) -> list[Sample]:
    patches: list[Sample] = []
    while len(patches) < count:
        for patch in dataset:
            patches.append(patch)
            if len(patches) == count:
                break
    return patches


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")  # torchdata 0.11 calls it
@pytest.mark.parametrize("delivered", [1, 2, 3])
def test_torchdata_saves_and_resumes(store: Store, delivered: int) -> None:
    with PatchDataset(store, CONFIG, paint=True) as dataset:
        everything = [batch for _ in range(2) for batch in StatefulDataLoader(dataset, batch_size=4)]
    with PatchDataset(store, CONFIG, paint=True) as dataset:
        loader = StatefulDataLoader(dataset, batch_size=4)
        batches = iter(loader)
        for _ in range(delivered):
            next(batches)
        state = loader.state_dict()
    with PatchDataset(store, CONFIG, paint=True) as dataset:
        loader = StatefulDataLoader(dataset, batch_size=4)
        loader.load_state_dict(state)
        rest = list(loader)
        rest += list(loader)
    assert _all_same(rest, everything[delivered : delivered + len(rest)])
    assert len(rest) == 6 - delivered


def test_a_state_of_patches_is_refused_by_batches(store: Store) -> None:
    with PatchDataset(store, CONFIG) as patches, PatchDataset(store, CONFIG, batches=True) as batches:
        _take(patches, 2)
        with pytest.raises(ConfigError, match="behind patch 2 of a batch"):
            batches.load_state_dict(patches.state_dict())
        with pytest.raises(ConfigError, match="version 99"):
            batches.load_state_dict(batches.state_dict() | {"version": 99})
        state = batches.state_dict()
        with pytest.raises(ConfigError, match="seed: was 5, is 0"):
            batches.load_state_dict(
                state | {"loader": state["loader"] | {"plan": state["loader"]["plan"] | {"seed": 5}}}
            )


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_are_refused_with_the_reason(store: Store, context: str) -> None:
    with PatchDataset(store, CONFIG) as dataset:
        with pytest.raises(ConfigError, match="num_workers=0"):
            next(iter(DataLoader(dataset, batch_size=None, num_workers=1, multiprocessing_context=context)))


def test_generator_and_judge_come_from_their_checkpoints(store: Store, painters: tuple[Path, Path]) -> None:
    generator, judge = painters
    with PatchDataset(store, CONFIG, generator=generator, judge=judge) as dataset:
        patches = list(dataset)
    painted = [p for p in patches if p["painted"]]
    assert painted
    assert all(0 <= p["proportion"] <= 1 for p in painted)
    assert {p["passed"] for p in painted} <= {p["proportion"] >= 0.5 for p in painted}
    with PatchDataset(store, CONFIG, paint=True) as fixed:
        assert not _all_same(patches, list(fixed))


def test_without_painting_only_annotated_volumes_are_drawn(store: Store) -> None:
    with PatchDataset(store.path) as dataset:
        assert dataset.config.region.name == "abdomen"
    with PatchDataset(store, CONFIG) as dataset:
        patches = list(dataset)
    assert {p["case"][0] for p in patches} == {"a"}
    assert not any(p["painted"] for p in patches)


def test_arguments_that_cannot_be_are_refused(store: Store, painters: tuple[Path, Path]) -> None:
    with pytest.raises(ConfigError, match="without painting"):
        PatchDataset(store, CONFIG, judge=painters[1])
    with pytest.raises(ConfigError, match="without painting"):
        PatchDataset(store, CONFIG, paint=False, generator=painters[0])
    with pytest.raises(ConfigError, match="rank=1 with world_size=None"):
        PatchDataset(store, CONFIG, rank=1)
    with pytest.raises(ConfigError, match="no volume in split 'test'"):
        len(PatchDataset(store, CONFIG, split="test"))


_RANK = """
import json, sys
import torch.distributed as dist
from ftengine.adapters.torch_dataset import PatchDataset
from ftengine.config import Config
from ftengine.errors import ConfigError

store, config, meeting, rank = sys.argv[1:]
config = Config.from_file(config)
early = PatchDataset(store, config)
next(iter(early))
dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=int(rank), world_size=2)
dataset = PatchDataset(store, config)
indices = [patch["index"] for patch in dataset]
try:
    next(iter(early))
except ConfigError as error:
    refused = str(error)
for each in (early, dataset):
    each.close()
dist.destroy_process_group()
print(json.dumps({"indices": indices, "refused": refused}))
"""


def test_ranks_of_a_process_group_draw_different_patches(store: Store, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(CONFIG.to_yaml())
    arguments = [str(store.path), str(tmp_path / "config.yaml"), str(tmp_path / "meeting")]
    ranks = [
        subprocess.Popen([sys.executable, "-c", _RANK, *arguments, str(rank)], stdout=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    reports = [json.loads(process.communicate(timeout=300)[0].splitlines()[-1]) for process in ranks]
    drawn = [set(report["indices"]) for report in reports]
    assert drawn[0].isdisjoint(drawn[1])
    assert drawn[0] | drawn[1] == set(range(len(drawn[0]) + len(drawn[1])))
    for rank, report in enumerate(reports):
        assert f"torch.distributed now says ({rank}, 2)" in report["refused"]


def test_a_rank_may_be_given(store: Store) -> None:
    indices = []
    for rank in (0, 1):
        with PatchDataset(store, CONFIG, rank=rank, world_size=2) as dataset:
            indices.append([patch["index"] for patch in dataset])
    assert sorted(indices[0] + indices[1]) == list(range(len(indices[0]) * 2))
    assert indices[0] != indices[1]
