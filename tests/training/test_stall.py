"""The stall meter: every second in one place, and the slow part named with what helps."""

import asyncio
import json
import re
import time

import pytest

from ftengine.assemble import build_loader, build_synthesis_stage
from ftengine.config import Config
from ftengine.loader.pipeline import PatchPipeline
from ftengine.loader.stages import BusyClock, Stage
from ftengine.store.async_reads import AsyncReads
from ftengine.store.reader import Store
from ftengine.training.stall import PREPARE, READS, TRAINING, StallMeter, StallReport, advice
from ftengine.types import Batch
from tests.support import make_store, small_config

CONFIG = small_config(loader__patches_per_epoch=8, loader__reads_in_flight=2)
STEPS = 12
SLOW_S = 0.06  # several times what the other parts take for a batch of two patches of 16^3


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(tmp_path_factory.mktemp("stall"), CONFIG)


class _Sleepy:
    """A stage that takes its time and changes nothing."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, batch: Batch) -> Batch:
        time.sleep(SLOW_S)
        return batch


def _measured(
    store: Store, *, config: Config = CONFIG, stages: tuple[Stage, ...] = (), step_s: float = 0.0
) -> StallReport:
    """Run steps that sleep, as the training loop runs them."""
    with build_loader(config, store, stages=stages) as loader:
        meter = StallMeter(loader)
        done = 0
        while done < STEPS:
            for _ in loader:
                meter.arrived()
                time.sleep(step_s)
                meter.stepped()
                done += 1
                if done == STEPS:
                    break
        return meter.report(config, config.training.batch_size)


def _adds_up(report: StallReport) -> None:
    assert report.num_steps == STEPS
    assert report.wall_s == pytest.approx(report.wait_s + report.compute_s + report.other_s)
    assert report.other_s < 0.2 * report.wall_s + 0.05
    for part in report.parts:
        assert 0 <= part.share <= 1.01, part
        assert part.level is None or 0 <= part.level <= report.capacities[str(part.queue)]


def test_a_slow_stage_is_named(store: Store) -> None:
    report = _measured(store, stages=(_Sleepy("denoise"),))
    _adds_up(report)
    assert report.slowest == "denoise"
    assert report.wait_fraction > 0.5
    assert "'denoise'" in report.sentence()
    share = {p.name: p.share for p in report.parts}
    assert share["denoise"] > 0.8
    assert list(share) == [READS, PREPARE, "denoise", TRAINING]
    assert [p.queue for p in report.parts] == [None, "reads", "prepared", "ready"]


def test_slow_synthesis_is_named_with_what_helps(store: Store) -> None:
    class SlowPainter:
        name = "synthesis + qc"

        def __init__(self) -> None:
            self._paint = build_synthesis_stage(CONFIG, None, None)

        def __call__(self, batch: Batch) -> Batch:
            time.sleep(SLOW_S)
            return self._paint(batch)

    report = _measured(store, stages=(SlowPainter(),))
    assert report.slowest == "synthesis + qc"
    assert "synthesis.fraction (now 1)" in report.advice
    assert "generator.width (now 4" in report.advice


def test_slow_reads_are_named_with_what_helps(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    patch = AsyncReads._patch

    async def late(self: AsyncReads, *arguments: object) -> object:
        await asyncio.sleep(SLOW_S)
        return await patch(self, *arguments)  # type: ignore[arg-type]  # passed on as they came

    monkeypatch.setattr(AsyncReads, "_patch", late)
    report = _measured(store)
    _adds_up(report)
    assert report.slowest == READS
    assert "loader.reads_in_flight (now 2)" in report.advice
    assert report.levels["reads"] < 1.5  # hardly ever one that waits


def test_slow_preparation_is_named_with_what_helps(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare = PatchPipeline.__call__

    def late(self: PatchPipeline, *arguments: object) -> object:
        time.sleep(SLOW_S)
        return prepare(self, *arguments)  # type: ignore[arg-type]  # passed on as they came

    monkeypatch.setattr(PatchPipeline, "__call__", late)
    report = _measured(store)
    assert report.slowest == PREPARE
    assert "cores" in report.advice


def test_slow_training_needs_nothing(store: Store) -> None:
    report = _measured(store, stages=(build_synthesis_stage(CONFIG, None, None),), step_s=2 * SLOW_S)
    _adds_up(report)
    assert report.slowest == TRAINING
    assert report.advice == "nothing to do: the training step itself sets the pace"
    assert report.levels["ready"] > 1
    assert report.wait_fraction < 0.01


def test_advice_names_keys_that_exist_with_their_values() -> None:
    config = Config.preset("abdomen")
    texts = [advice(part, 0.5, config) for part in (READS, PREPARE, "synthesis + qc", "stages on the device", TRAINING)]
    keys = set(re.findall(r"\b(loader|synthesis|generator|qc)\.(\w+)", " ".join(texts)))
    assert len(keys) >= 5
    for section, key in keys:
        now = getattr(getattr(config, section), key)
        assert f"{section}.{key}={now}" not in " ".join(texts)  # never what is set already
    assert f"loader.reads_in_flight (now {config.loader.reads_in_flight})" in texts[0]
    assert "synthesis.box=auto (now full)" in texts[2]
    boxed = config.with_overrides({"synthesis.box": "auto", "synthesis.precision": "fp32", "qc.retries": 3})
    redrawn = advice("synthesis + qc", 0.5, boxed, draws_a_patch=3.5)
    assert "synthesis.box" not in redrawn
    assert "synthesis.precision=auto (now fp32)" in redrawn
    assert redrawn.index("painted 3.5 times; qc.retries, now 3") < redrawn.index("synthesis.precision")
    assert all(advice(part, 0.001, config).startswith("nothing to do") for part in (READS, TRAINING))


class _Told:
    """A loader that says what a test tells it; the clock of the test moves by hand."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.last_wait_s = 0.0
        self.clock = BusyClock()
        self.level = 0

    def levels(self) -> dict[str, int]:
        return {"ready": self.level}

    def capacities(self) -> dict[str, int]:
        return {"ready": 2}

    def step(self, meter: StallMeter, wait_s: float, step_s: float, level: int) -> None:
        self.now_s += wait_s
        self.last_wait_s = wait_s
        meter.arrived()
        self.clock.add("denoise", step_s / 2)
        self.clock.add("wait for training", step_s / 4)
        self.now_s += step_s
        self.level = level
        meter.stepped()


def test_start_and_saving_are_apart() -> None:
    loader = _Told()
    loader.clock.add("denoise", 77.0)  # before the first batch: start-up
    meter = StallMeter(loader, now=lambda: loader.now_s)
    loader.step(meter, 5.0, 1.0, 0)
    loader.step(meter, 0.25, 0.75, 1)
    with meter.saving():
        loader.now_s += 40.0
        loader.clock.add("denoise", 30.0)
    loader.step(meter, 0.5, 1.5, 2)
    loader.now_s += 0.5  # a log line
    line = meter.take_line()
    assert line["wait_s"] == pytest.approx(0.75 / 3)
    assert line["step_s"] == pytest.approx(4.5 / 3)  # with the time between steps
    assert line["loader/wait_fraction"] == pytest.approx(0.75 / 4.5)
    assert line["loader/level/ready"] == pytest.approx(1.0)
    assert line["loader/busy/denoise"] == pytest.approx(1.625 / 4.5)
    assert line["loader/waits/training"] == pytest.approx(0.8125 / 4.5)
    loader.step(meter, 0.0, 2.0, 2)
    assert meter.take_line()["step_s"] == pytest.approx(2.0)
    assert meter.take_line() == {}
    report = meter.report(CONFIG, batch_size=2)
    assert (report.start_s, report.save_s, report.wall_s) == pytest.approx((5.0, 40.0, 6.5))
    assert (report.wait_s, report.compute_s, report.other_s) == pytest.approx((0.75, 5.25, 0.5))
    assert report.figures()["patches_per_s"] == pytest.approx(2 * 4 / 6.5)
    assert (report.median_wait_s, report.max_wait_s) == pytest.approx((0.125, 0.5))
    assert report.levels == {"ready": 5 / 4}
    assert report.slowest == TRAINING  # it waits 12 %, and is busy for longer than the stage
    assert "loader.queue_batches (now 2)" in report.advice
    assert "11.5% of the time (0.8 s of 6.5 s; start-up 5.0 s and saving 40.0 s are apart)" in report.sentence()
    assert json.loads(json.dumps(report.document(), allow_nan=False))["stages"][0]["busy_s"] == pytest.approx(2.625)


def test_the_work_of_stages_on_a_device_counts_with_theirs() -> None:
    """On a GPU the host waits for kernels of the stages: their thread is at work, if not on the host."""
    loader = _Told()
    meter = StallMeter(loader, now=lambda: loader.now_s)
    for _ in range(10):
        loader.step(meter, 0.4, 0.6, 0)
        loader.clock.add("prepare", 0.65)
        loader.clock.add("wait for the device", 0.55)
    report = meter.report(CONFIG, batch_size=2)
    assert (
        report.slowest == "stages on the device"
    )  # 0.3 s on the host and 0.55 s there, more than any one of the others
    assert "synthesis.fraction" in report.advice


def test_a_run_without_steps_has_a_report() -> None:
    meter = StallMeter(_Told())
    with meter.saving():
        pass
    report = meter.report(CONFIG, batch_size=2)
    assert (report.num_steps, report.wall_s, report.wait_fraction) == (0, 0.0, 0.0)
    assert report.slowest == TRAINING
    json.dumps(report.document(), allow_nan=False)
