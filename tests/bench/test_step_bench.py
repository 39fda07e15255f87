"""The bench of the training step runs whole at toy size, measures what it says, and refuses to time what is not painted."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ftengine.assemble import build_loader
from ftengine.bench import step
from ftengine.bench.phantoms import write_store
from ftengine.config import Config
from ftengine.errors import ConfigError
from ftengine.store.reader import open_store
from ftengine.training.networks import build_generator
from ftengine.types import Batch, PatchRecord

TINY = ["region.patch_zyx=[24,24,24]", "network.channels=[4,8]", "generator.width=1"]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The convolutions are so small that a second thread costs more than it gives."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("step") / "s.zarr"
    return write_store(folder, Config.preset("abdomen").region, [(40, 48, 64), (48, 48, 48)], with_tumors=False)


def test_step_bench_runs(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = step.run(
        size="small", device="cpu", store=store, rounds=2, steps=1, warm=1, assignments=TINY, as_json=True
    )
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(document))
    names = list(document["candidates"])
    assert names[:2] == [step.READY, step.PLAIN]
    assert any("training thread" in name for name in names)
    for name, candidate in document["candidates"].items():
        assert len(candidate["step_s"]) == len(candidate["idle_s"]) == len(candidate["wait_s"]) == 2
        assert len(candidate["ratios_by_round"]) == 2
        assert all(idle <= whole for idle, whole in zip(candidate["idle_s"], candidate["step_s"], strict=True))
        assert (candidate["painted_share"] > 0) == ("G 1" in name)
    assert document["candidates"][step.READY]["step_of_ready"] == 1.0
    painted = next(c for name, c in document["candidates"].items() if "painted and judged" in name)
    assert painted["busy_s_a_step"]["synthesis + qc"] > 0
    assert 0 < document["thresholds"][1] < 1
    assert "| our loader |" in step.as_text(document)


def test_a_wait_is_seen_as_the_wait_it_is() -> None:
    class Slow(step.Candidate):
        def batches(self) -> Iterator[Batch]:
            while True:
                time.sleep(0.03)
                yield from self.ready

    class Quick(step.Trainer):
        def __init__(self) -> None:
            """Needs no network."""

        def step(self, batch: Batch) -> torch.Tensor:
            time.sleep(0.01)
            return batch.image

    batch = Batch(torch.zeros(1, 1, 2, 2, 2), torch.zeros(1, 1, 2, 2, 2, dtype=torch.uint8), list[PatchRecord]())
    samples = step.Samples()
    step.run_block(Slow(ready=[batch]), Quick(), step.HostClock(), samples, steps=4, warm=2)
    assert min(samples.wait_s) >= 0.03
    assert min(samples.idle_s) >= 0.03
    assert min(samples.step_s) >= 0.04
    assert max(samples.cpu_s) < 0.03


def test_every_patch_is_eligible_and_half_of_the_painted_pass(store: Path) -> None:
    config = (
        Config.preset("abdomen")
        .with_overrides({**step.EVERY_PATCH_ELIGIBLE, **step.SIZES["small"], "device": "cpu"})
        .with_assignments(TINY)
    )
    device = torch.device("cpu")
    ready = step.ready_batches(build_loader(config, open_store(store)), device)
    segmenter = step.random_judge(config, ready, device)
    with torch.no_grad():
        mean = torch.stack([segmenter(b.image).mean(dim=(0, 2, 3, 4)) for b in ready]).mean(dim=0)
    assert mean.abs().max() < 1e-3
    generator = build_generator(config).eval()
    threshold, proportions = step.median_proportion(config, generator, segmenter, ready)
    assert len(proportions) == len(ready)
    assert min(proportions) < threshold < max(proportions)


def test_what_painted_nothing_is_not_timed() -> None:
    painting = step.Candidate(stage=lambda batch: batch)  # type: ignore[arg-type]  # a stage has a name; not asked for here
    with pytest.raises(AssertionError, match="0 of 3 patches were painted"):
        step.check_painted("x", painting, step.Samples(patches=3))


def test_a_batch_of_one_value_is_not_timed() -> None:
    empty = Batch(torch.zeros(1, 1, 4, 4, 4), torch.ones(1, 1, 4, 4, 4, dtype=torch.uint8), [])
    with pytest.raises(AssertionError, match="nothing to time"):
        step.check_batch(empty, torch.device("cpu"))


def test_variants_are_read_and_checked() -> None:
    config = Config.preset("abdomen")
    given = [["soft", "synthesis.edge_sigma_mm=1.2", "qc.retries=1"]]
    assert step.parse_variants(given, config) == {"soft": {"synthesis.edge_sigma_mm": 1.2, "qc.retries": 1}}
    assert step.parse_variants(None, config) is None
    with pytest.raises(ConfigError, match="no such key"):
        step.parse_variants([["x", "synthesis.nothing=1"]], config)


def test_a_store_is_made_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(step.SHAPES_ZYX, "small", (24, 32, 32))
    arguments = ["--size", "small", "--store", str(tmp_path / "s.zarr"), "--make-store"]
    step.main(arguments)
    first = (tmp_path / "s.zarr" / "index.parquet").stat().st_mtime_ns
    step.main(arguments)
    assert (tmp_path / "s.zarr" / "index.parquet").stat().st_mtime_ns == first
    assert "MB" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="want --store"):
        step.main(["--make-store"])
