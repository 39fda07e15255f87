"""Batches are the same whatever the threads, timing and restarts; errors arrive; threads end."""

import gc
import json
import threading
import time
from pathlib import Path

import pytest
import torch

from ftengine.assemble import build_loader
from ftengine.errors import ConfigError, StoreError
from ftengine.loader.loader import Loader
from ftengine.store.reader import Store, open_store
from ftengine.types import Batch
from tests.support import host_syncs_forbidden, make_store, small_config

CONFIG = small_config(training__batch_size=3, loader__patches_per_epoch=9)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(tmp_path_factory.mktemp("loader"), CONFIG)


def _take(loader: Loader, count: int) -> list[Batch]:
    batches: list[Batch] = []
    while len(batches) < count:
        for batch in loader:
            batches.append(batch)
            if len(batches) == count:
                break
    return batches


def _equal(a: list[Batch], b: list[Batch]) -> bool:
    """Bit for bit; records by their text, in which a P that nobody judged (NaN) equals itself."""
    pairs = list(zip(a, b, strict=True))
    voxels = all(torch.equal(x.image, y.image) and torch.equal(x.label, y.label) for x, y in pairs)
    return voxels and all(repr(x.records) == repr(y.records) for x, y in pairs)


def test_two_runs_give_the_same_batches(store: Store) -> None:
    with build_loader(CONFIG, store) as a, build_loader(CONFIG, open_store(store.path)) as b:
        assert _equal(_take(a, 7), _take(b, 7))


@pytest.mark.parametrize(("threads", "in_flight", "queue"), [(1, 1, 1), (7, 40, 5)])
def test_reader_threads_change_nothing(store: Store, threads: int, in_flight: int, queue: int) -> None:
    other = CONFIG.with_overrides(
        {"loader.reader_threads": threads, "loader.reads_in_flight": in_flight, "loader.queue_batches": queue}
    )
    with build_loader(CONFIG, store) as a, build_loader(other, store) as b:
        assert _equal(_take(a, 5), _take(b, 5))


def test_another_seed_gives_other_batches(store: Store) -> None:
    with build_loader(CONFIG, store) as a, build_loader(CONFIG.with_overrides({"seed": 1}), store) as b:
        assert not _equal(_take(a, 2), _take(b, 2))


def test_batches_keep_their_contract(store: Store) -> None:
    with build_loader(CONFIG, store) as loader:
        assert len(loader) == 3
        for batch in loader:
            assert batch.image.shape == batch.label.shape == (3, 1, 16, 16, 16)
            assert (batch.image.dtype, batch.label.dtype) == (torch.float32, torch.uint8)
            assert 0 <= float(batch.image.min()) <= float(batch.image.max()) <= 1
            assert len(batch.records) == 3


@pytest.mark.parametrize("delivered", [0, 2, 3, 5])
@pytest.mark.parametrize("crops", [1, 2])
def test_a_saved_state_goes_on_with_the_next_batch(store: Store, delivered: int, crops: int) -> None:
    config = CONFIG.with_overrides({"loader.crops_per_read": crops})
    with build_loader(config, store) as loader:
        all_batches = _take(loader, 8)
    with build_loader(config, store) as first:
        _take(first, delivered)
        state = json.loads(json.dumps(first.state_dict()))
    with build_loader(config, store) as second:
        second.load_state_dict(state)
        assert _equal(_take(second, 8 - delivered), all_batches[delivered:])


def test_a_state_of_another_run_is_refused(store: Store) -> None:
    with build_loader(CONFIG, store) as loader:
        state = loader.state_dict()
    with build_loader(CONFIG.with_overrides({"seed": 9}), store) as other:
        with pytest.raises(ConfigError, match="seed: was 0, is 9"):
            other.load_state_dict(state)
        with pytest.raises(ConfigError, match="loader state has version 99"):
            other.load_state_dict(state | {"version": 99})
    for key, value in {
        "loader.positive_fraction": 0.1,
        "loader.crops_per_read": 2,
        "augment.flip_probability": 0.9,
    }.items():
        with build_loader(CONFIG.with_overrides({key: value}), store) as other:
            with pytest.raises(ConfigError, match=r"its data changed .*loader and augment sections"):
                other.load_state_dict(state)
    with build_loader(CONFIG, store, rank=1, world_size=2) as other:
        with pytest.raises(ConfigError, match="world_size: was 1, is 2"):
            other.load_state_dict(state)
    faster = CONFIG.with_overrides({"loader.reader_threads": 7, "loader.queue_batches": 5, "loader.reads_in_flight": 3})
    with build_loader(faster, store) as other:
        other.load_state_dict(state)


def test_ranks_resume_from_the_state_of_any_rank(store: Store) -> None:
    config = CONFIG.with_overrides({"loader.patches_per_epoch": 18})
    with build_loader(config, store, rank=0, world_size=2) as rank_0:
        _take(rank_0, 2)
        state = rank_0.state_dict()
    with (
        build_loader(config, store, rank=1, world_size=2) as unbroken,
        build_loader(config, store, rank=1, world_size=2) as resumed,
    ):
        resumed.load_state_dict(state)
        assert _equal(_take(unbroken, 5)[2:], _take(resumed, 3))


def test_iteration_goes_on_behind_a_break(store: Store) -> None:
    with build_loader(CONFIG, store) as loader:
        whole = _take(loader, 3)
    with build_loader(CONFIG, store) as loader:
        first = next(iter(loader))
        rest = list(loader)
        assert _equal([first, *rest], whole)
        assert loader.epoch == 1


def _threads() -> list[str]:
    """The loader's; those that the kernels compute with stay for the life of the process, as OpenMP's do."""
    names = [t.name for t in threading.enumerate() if t.name.startswith("ftengine")]
    return [name for name in names if not name.startswith("ftengine-kernels")]


def test_no_thread_survives_close_or_a_forgotten_loader(store: Store) -> None:
    loader = build_loader(CONFIG, store)
    next(iter(loader))
    assert _threads()
    loader.close()
    assert _threads() == []
    forgotten = build_loader(CONFIG, store)
    next(iter(forgotten))
    del forgotten
    gc.collect()
    assert _threads() == []


def test_a_damaged_volume_reaches_the_consumer_with_its_name(tmp_path: Path) -> None:
    store = make_store(tmp_path, CONFIG, num_annotated=1, num_organs=0)
    (store.path / "volumes/a/0/0/c/0/0/0").unlink()
    with pytest.raises(StoreError, match="volumes/a/0"):
        next(iter(build_loader(CONFIG, open_store(store.path))))
    assert _threads() == []


class _Broken:
    name = "broken"

    def __call__(self, batch: Batch) -> Batch:
        raise ZeroDivisionError("in the stage")


def test_an_error_of_a_stage_reaches_the_consumer(store: Store) -> None:
    with pytest.raises(ZeroDivisionError, match="in the stage"):
        next(iter(build_loader(CONFIG, store, stages=(_Broken(),))))


class _Slow:
    name = "slow"

    def __call__(self, batch: Batch) -> Batch:
        time.sleep(0.05)
        return batch


def test_the_wait_for_data_is_measured(store: Store) -> None:
    with build_loader(CONFIG.with_overrides({"loader.queue_batches": 1}), store, stages=(_Slow(),)) as loader:
        _take(loader, 4)
        assert 0.01 < loader.last_wait_s < 5
        assert loader.clock.seconds()["slow"] >= 4 * 0.05
    with build_loader(CONFIG, store) as loader:
        next(iter(loader))
        deadline = time.monotonic() + 10
        while loader.levels() != loader.capacities() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert loader.queue_level() == 2  # never more than queue_batches
        assert loader.levels() == loader.capacities() == {"reads": 18, "prepared": 1, "ready": 2}
        next(iter(loader))
        assert loader.last_wait_s < 0.5


def test_label_voxels_are_counted_where_a_stage_asks_for_them(store: Store) -> None:
    class Look:
        name = "look"

        def __call__(self, batch: Batch) -> Batch:
            for record, label in zip(batch.records, batch.label, strict=True):
                assert record.label_voxels == tuple(torch.bincount(label.flatten().long()).tolist())
            return batch

    config = CONFIG.with_overrides({"loader.crops_per_read": 2})
    with build_loader(config, store, stages=(Look(),)) as loader:
        _take(loader, 4)
    with build_loader(config, store) as loader:
        assert _take(loader, 1)[0].records[0].label_voxels is None


@pytest.mark.gpu
def test_gpu_batches_are_those_of_the_cpu_and_no_launch_waits(store: Store) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    for crops in (1, 3):
        config = CONFIG.with_overrides({"loader.crops_per_read": crops})
        with build_loader(config.with_overrides({"device": "cpu"}), store) as loader:
            wanted = _take(loader, 7)
        with build_loader(config.with_overrides({"device": "cuda"}), store) as loader:
            got = _take(loader, 1)  # what is compiled and allocated for the first time may wait
            with host_syncs_forbidden():
                got += _take(loader, 6)
        for a, b in zip(wanted, got, strict=True):
            assert b.image.device.type == "cuda"
            assert torch.equal(a.image, b.image.cpu())
            assert torch.equal(a.label, b.label.cpu())


def test_a_store_of_another_region_is_refused(store: Store) -> None:
    from ftengine.config import Config

    with pytest.raises(ConfigError, match="holds region abdomen at"):
        build_loader(Config.preset("chest"), store)


def test_painted_batches_are_the_same_for_any_thread_count(store: Store) -> None:
    from ftengine.assemble import build_synthesis_stage

    other = CONFIG.with_overrides({"loader.reader_threads": 5, "loader.reads_in_flight": 30})
    with (
        build_loader(CONFIG, store, stages=(build_synthesis_stage(CONFIG, None, None),)) as a,
        build_loader(other, store, stages=(build_synthesis_stage(other, None, None),)) as b,
    ):
        first, second = _take(a, 6), _take(b, 6)
    assert _equal(first, second)
    assert any(r.painted is not None for batch in first for r in batch.records)
