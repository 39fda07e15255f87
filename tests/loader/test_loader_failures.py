"""What goes wrong: bad volumes are skipped and counted, errors come at once with their origin, threads end, nothing hangs."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from ftengine.assemble import build_judge, build_loader, build_synthesis_stage
from ftengine.config import Config
from ftengine.errors import ConfigError, StoreError
from ftengine.loader.loader import Loader
from ftengine.store.reader import Store, open_store
from ftengine.types import Batch
from tests.support import make_store, small_config

CONFIG = small_config(training__batch_size=3, loader__patches_per_epoch=30)


def _threads() -> list[str]:
    names = [t.name for t in threading.enumerate() if t.name.startswith("ftengine")]
    return [name for name in names if not name.startswith("ftengine-kernels")]


def _take(loader: Loader, count: int) -> list[Batch]:
    batches: list[Batch] = []
    while len(batches) < count:
        for batch in loader:
            batches.append(batch)
            if len(batches) == count:
                break
    return batches


def _damaged(folder: Path, *cases: str, num_annotated: int = 5, config: Config = CONFIG) -> Store:
    store = make_store(folder, config, num_annotated=num_annotated, num_organs=0)
    for case in cases:
        (store.path / f"volumes/{case}/0/c/0/0/0").unlink()
    return open_store(store.path)


@pytest.mark.parametrize("crops", [1, 3])
def test_a_bad_volume_is_skipped_counted_and_named(tmp_path: Path, crops: int) -> None:
    config = CONFIG.with_overrides({"loader.max_bad_fraction": 0.5, "loader.crops_per_read": crops})
    store = _damaged(tmp_path, "a/2", config=config)
    with build_loader(config, store, mix="annotated") as loader:
        batches = _take(loader, 12)
        cases = [r.request.case for batch in batches for r in batch.records]
        failed = loader.failures.by_case()
    assert len(cases) == 36
    assert "a/2" not in cases
    assert set(failed) == {"a/2"}
    reads_of_it = {
        (r.epoch, r.index // 3 // crops, r.index % 3)
        for epoch in range(2)
        for step in range(10)
        for r in loader.plan.batch(epoch, step)
        if r.case == "a/2" and epoch * 10 + step < 12
    }
    assert failed["a/2"] >= len(reads_of_it) > 0  # batches ahead of the last one may have failed, too
    assert loader.failures.names() == f"a/2 ({failed['a/2']})"
    # what takes its place is a function of the address, too
    other = config.with_overrides({"loader.reader_threads": 5, "loader.reads_in_flight": 40})
    with build_loader(other, open_store(store.path), mix="annotated") as loader:
        again = _take(loader, 12)
    for a, b in zip(batches, again, strict=True):
        assert torch.equal(a.image, b.image)
        assert [r.request for r in a.records] == [r.request for r in b.records]


def test_too_many_bad_reads_stop_the_run(tmp_path: Path) -> None:
    store = _damaged(tmp_path, "a/1", "a/3")
    with build_loader(CONFIG.with_overrides({"loader.max_bad_fraction": 0.03}), store, mix="annotated") as loader:
        with pytest.raises(StoreError) as caught:
            _take(loader, 20)
    text = str(caught.value)
    assert "a chunk is missing or damaged" in text
    assert "So far 4 of" in text  # 3 of the first 100 are allowed
    assert "a/1 (" in text
    assert "a/3 (" in text
    assert caught.value.__notes__ == ["in the loader's thread ftengine-batches"]
    assert _threads() == []


class _Broken:
    name = "broken"

    def __init__(self) -> None:
        self.seen = 0

    def __call__(self, batch: Batch) -> Batch:
        self.seen += 1
        if self.seen == 3:
            raise ZeroDivisionError("in the stage")
        return batch


def test_an_error_comes_at_once_and_says_where(tmp_path: Path) -> None:
    """Two finished batches wait when the third fails: the consumer's next request raises, not the one behind them."""
    store = make_store(tmp_path, CONFIG)
    with build_loader(CONFIG, store, stages=(_Broken(),)) as loader:
        iterator = iter(loader)
        next(iterator)
        deadline = time.monotonic() + 10
        while loader._producer is not None and loader._producer._error is None and time.monotonic() < deadline:
            time.sleep(0.01)
        with pytest.raises(ZeroDivisionError) as caught:
            next(iterator)
        assert caught.value.__notes__ == [
            "at epoch 0, step 2 of the loader",
            "in the loader's thread ftengine-stages",
        ]
        assert _threads() == []
        assert loader.state_dict()["step"] == 1  # what was delivered


def test_the_loader_goes_on_behind_an_error(tmp_path: Path) -> None:
    store = make_store(tmp_path, CONFIG)
    with build_loader(CONFIG, store) as plain:
        wanted = _take(plain, 6)
    with build_loader(CONFIG, store, stages=(_Broken(),)) as loader:
        got: list[Batch] = []
        while len(got) < 6:
            try:
                got += _take(loader, 1)
            except ZeroDivisionError:
                continue
    assert all(torch.equal(a.image, b.image) for a, b in zip(wanted, got, strict=True))


@pytest.mark.parametrize("taken", [0, 1, 3])
def test_stopping_early_blocks_nobody(tmp_path: Path, taken: int) -> None:
    """Queues full, reads under way, a thread that waits at every one of them."""
    config = CONFIG.with_overrides({"loader.reads_in_flight": 50, "loader.queue_batches": 1})
    loader = build_loader(config, make_store(tmp_path, config))
    _take(loader, taken)
    if taken:
        time.sleep(0.3)
    started = time.monotonic()
    loader.close()
    assert time.monotonic() - started < 5
    assert _threads() == []


_SCRIPT = """
import signal, sys, threading, time
from ftengine.assemble import build_judge, build_loader, build_synthesis_stage
from ftengine.store.reader import open_store
from tests.support import small_config

class Slow:
    name = "slow"
    def __call__(self, batch):
        time.sleep(0.2)
        return batch

def main():
    config = small_config(training__batch_size=2, loader__patches_per_epoch=1000)
    stages = (Slow(),) if sys.argv[2] == "slow" else ()
    loader = build_loader(config, open_store(sys.argv[1]), stages=stages)
    number = 0
    try:
        for batch in loader:
            number += 1
            if number == 3:
                print("running", flush=True)
            if sys.argv[2] == "forgotten" and number == 5:
                return
            time.sleep(0.01)
    except KeyboardInterrupt:
        loader.close()
        names = [t.name for t in threading.enumerate() if t.name.startswith("ftengine")]
        print("interrupted", [name for name in names if not name.startswith("ftengine-kernels")], flush=True)

main()
print("end", flush=True)
"""


@pytest.mark.parametrize("how", ["fast", "slow"])
def test_ctrl_c_ends_all_threads_within_5_seconds(tmp_path: Path, how: str) -> None:
    with _start(tmp_path, how) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "running\n"
        started = time.monotonic()
        process.send_signal(2)
        assert process.stdout.readline() == "interrupted []\n"
        assert time.monotonic() - started < 5
        rest, err = process.stdout.read(), process.stderr.read()
        assert (rest, process.wait(60)) == ("end\n", 0), err
    assert "Warning" not in err


def test_a_program_that_leaves_the_loop_ends(tmp_path: Path) -> None:
    with _start(tmp_path, "forgotten") as process:
        out, err = process.communicate(timeout=60)
    assert (out, process.returncode) == ("running\nend\n", 0), err
    assert "Warning" not in err


def _start(folder: Path, how: str) -> "subprocess.Popen[str]":
    """Under ``-X dev``: unclosed loops, futures that nobody looked at and the like are told on stderr."""
    store = make_store(folder, CONFIG)
    command = [sys.executable, "-X", "dev", "-W", "error", "-W", "ignore::DeprecationWarning", "-c", _SCRIPT]
    return subprocess.Popen([*command, str(store.path), how], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    ("part", "says"),
    [
        ("generator", "the generator gives 2 channels; region abdomen has the organs liver, want one channel each"),
        ("judge", r"the judge gives 2 classes; region abdomen has 3 label values \(background, liver, liver_tumor\)"),
    ],
)
def test_networks_of_another_region_are_refused_before_the_first_batch(tmp_path: Path, part: str, says: str) -> None:
    config = CONFIG.with_overrides({"loader.positive_fraction": 1.0, "augment.rot90_probability": 0.0})
    other = torch.nn.Conv3d(1, 2, 1)
    generator, judge = (other, None) if part == "generator" else (None, build_judge(config, other))
    stage = build_synthesis_stage(config, generator, judge)
    with build_loader(config, make_store(tmp_path, config), stages=(stage,)) as loader:
        with pytest.raises(ConfigError, match=says):
            next(iter(loader))
