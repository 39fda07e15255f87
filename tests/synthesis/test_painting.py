"""Painting waits for nothing: what the host knows is not read back, verdicts stay on the device until ``records``."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ftengine.assemble import build_judge, build_synthesis_stage
from ftengine.config import Config
from ftengine.geometry import Box
from ftengine.synthesis.engine import Address, Synthesizer
from ftengine.synthesis.painting import Painting
from ftengine.synthesis.shape import count_labels
from ftengine.training.networks import build_generator, build_segmenter
from ftengine.types import Augmentation, Batch, PatchRecord, PatchRequest
from tests.kernels.support import KernelsOnCpu

SHAPE = (32, 40, 48)
CONFIG = Config.preset("abdomen").with_overrides(
    {
        "region.patch_zyx": SHAPE,
        "augment.rot90_probability": 0.0,
        "synthesis.size_weights": {"tiny": 0.5, "small": 0.5},
        "synthesis.edge_sigma_mm": 1.5,
        "synthesis.contrast_factor": (0.5, 2.0),
        "network.name": "unet",
        "network.channels": (4, 8, 8),
        "generator.width": 2,
        "generator.initial_scale": 1.0,
        "qc.threshold": 0.15,  # the liver fails, the kidney passes
    }
)
ADDRESSES = [Address(2, i) for i in range(4)]


def _batch() -> tuple[torch.Tensor, torch.Tensor]:
    """A liver, nothing, a kidney, a liver with a real tumour."""
    rng = np.random.default_rng(0)
    image = torch.from_numpy(rng.uniform(0.4, 0.8, (4, 1, *SHAPE)).astype(np.float32))
    label = torch.zeros((4, 1, *SHAPE), dtype=torch.uint8)
    label[0, 0, 4:28, 4:36, 4:44] = 1
    label[2, 0, 8:24, 8:30, 8:30] = 5
    label[3, 0, 4:28, 4:36, 4:44] = 1
    label[3, 0, 20:25, 20:25, 20:25] = 2
    return image, label


def _label_voxels(label: torch.Tensor) -> list[tuple[int, ...]]:
    return [count_labels(patch.numpy()) for patch in label]


def _synthesizer(config: Config = CONFIG, device: torch.device | str = "cpu", **options: Any) -> Synthesizer:
    """With a G and an S of random weights."""
    generator = build_generator(config).to(device).eval()
    segmenter = build_segmenter(config).to(device).eval()
    painters: dict[str, Any] = {"generator": generator, "judge": build_judge(config, segmenter)}
    return Synthesizer(config.region, config.synthesis, seed=3, **(painters | options))


def _assert_equal(first: Painting, second: Painting) -> None:
    assert torch.equal(first.image, second.image)
    assert torch.equal(first.label, second.label)
    assert torch.equal(first.mask, second.mask)
    assert first.records() == second.records()


class _Reads(TorchDispatchMode):
    """Counts what would make the host wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default}:
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@contextmanager
def _reads() -> Iterator[list[str]]:
    """The reads inside the block, by name; ``numpy`` is how kernels look at tables that lie on the host anyway."""
    with pytest.MonkeyPatch.context() as patch, _Reads() as mode:
        for name in ("cpu", "item", "tolist", "__bool__", "__int__", "__float__"):
            patch.setattr(torch.Tensor, name, _noting(name, mode.found))
        yield mode.found


def _noting(name: str, found: list[str]) -> Any:
    real = getattr(torch.Tensor, name)

    def read(tensor: torch.Tensor) -> Any:
        found.append(name)
        return real(tensor)

    return read


def test_nothing_is_read_back_before_the_records(on_cpu: KernelsOnCpu) -> None:
    image, label = _batch()
    wanted = _synthesizer().paint(image, label, ADDRESSES)
    synthesizer, voxels = _synthesizer(), _label_voxels(label)
    with on_cpu("forward"), _reads() as found:
        painting = synthesizer.paint(image, label, ADDRESSES, label_voxels=voxels)
        assert found == []
        records = painting.records()
        assert found == ["tolist"]
    assert records == wanted.records()
    assert torch.equal(painting.label, wanted.label)
    torch.testing.assert_close(painting.image, wanted.image, rtol=0, atol=1e-6)


def test_a_box_is_cropped_without_a_read(on_cpu: KernelsOnCpu) -> None:
    config = CONFIG.with_overrides(
        {"synthesis.box": "auto", "synthesis.box_least_vox": 32, "synthesis.size_weights": {"tiny": 1.0}}
        | {"synthesis.box_context_mm": 0.0}
    )
    image, label = _batch()
    synthesizer, voxels = _synthesizer(config), _label_voxels(label)
    with on_cpu("forward"), _reads() as found:
        synthesizer.paint(image, label, ADDRESSES, label_voxels=voxels)
        assert found == []


def test_known_counts_paint_what_the_label_would(monkeypatch: pytest.MonkeyPatch) -> None:
    image, label = _batch()
    voxels = _label_voxels(label)
    by_label = _synthesizer().paint(image, label, ADDRESSES)
    partly = _synthesizer().paint(image, label, ADDRESSES, label_voxels=[voxels[0], None, None, voxels[3]])
    _assert_equal(partly, by_label)
    monkeypatch.setattr("ftengine.synthesis.engine.count_labels", lambda _label: pytest.fail("the label was read"))
    _assert_equal(_synthesizer().paint(image, label, ADDRESSES, label_voxels=voxels), by_label)
    assert [r and r.passed for r in by_label.records()] == [False, None, True, None]


class _Counting:
    """Counts calls and patches of a network."""

    def __init__(self, network: Any) -> None:
        self.network, self.calls, self.patches = network, 0, 0

    def __call__(self, x: torch.Tensor, *args: Any) -> Any:
        self.calls += 1
        self.patches += len(x)
        return self.network(x, *args)


def _counting(config: Config) -> tuple[_Counting, _Counting]:
    return _Counting(build_generator(config).eval()), _Counting(build_judge(config, build_segmenter(config).eval()))


def test_networks_see_only_what_is_painted() -> None:
    image, label = _batch()
    generator, judge = _counting(CONFIG)
    synthesizer = _synthesizer(generator=generator, judge=judge)
    synthesizer.paint(image, label, ADDRESSES)
    assert (generator.calls, generator.patches) == (1, 2)
    assert (judge.calls, judge.patches) == (1, 2)
    untouched = synthesizer.paint(image[[1, 3]], label[[1, 3]], ADDRESSES[:2])
    assert (generator.calls, judge.calls) == (1, 1)
    assert torch.equal(untouched.image, image[[1, 3]])
    assert torch.equal(untouched.label, label[[1, 3]])
    assert not untouched.mask.any()
    assert untouched.records() == [None, None]


def test_one_evaluation_of_g_serves_several_tumors_and_all_retries() -> None:
    config = CONFIG.with_overrides({"synthesis.num_tumors": 3, "qc.threshold": 1.0})
    generator, judge = _counting(config)
    synthesizer = _synthesizer(config, generator=generator, judge=judge, retries=2)
    records = synthesizer.paint(*_batch(), ADDRESSES).records()
    assert (generator.calls, generator.patches) == (1, 2)
    assert (judge.calls, judge.patches) == (3, 6)
    assert [(r.num_draws, len(r.center_zyx)) for r in records if r is not None] == [(3, 3), (3, 3)]


def test_results_are_the_callers_own() -> None:
    """A second batch, painted with the same buffers, leaves the first as it was, and inputs too."""
    image, label = (t[[0, 2]].clone() for t in _batch())  # all painted: the shortest way
    given = image.clone(), label.clone()
    synthesizer = Synthesizer(CONFIG.region, CONFIG.synthesis, seed=3)
    first = synthesizer.paint(image, label, ADDRESSES[:2])
    kept = first.image.clone(), first.label.clone(), first.mask.clone()
    synthesizer.paint(image, label, ADDRESSES[2:])
    for now, before in zip((first.image, first.label, first.mask, image, label), (*kept, *given), strict=True):
        assert torch.equal(now, before)


def test_the_stage_takes_the_counts_of_the_records() -> None:
    image, label = _batch()
    config = CONFIG.with_overrides({"qc.min_pass_rate": 0.0})
    records = []
    for address, voxels in zip(ADDRESSES, [*_label_voxels(label)[:2], (32 * 40 * 48,), None], strict=True):
        whole = Box((0, 0, 0), SHAPE)
        request = PatchRequest(address.epoch, address.index, 0, "case", "set", False, whole, Augmentation(), whole)
        records.append(PatchRecord(request, label_voxels=voxels))
    stage = build_synthesis_stage(config, build_generator(config).eval(), None)
    batch = stage(Batch(image, label, records))
    # the liver; nothing; a kidney whose record says there is none; a tumour, counted from the label
    assert [r.painted is not None for r in batch.records] == [True, False, False, False]
    assert torch.equal(batch.image[1:], image[1:])
    assert not torch.equal(batch.image[0], image[0])
    assert stage.gate is not None
    assert stage.gate.total().painted == 1


@pytest.mark.gpu
@pytest.mark.parametrize("box", ["full", "auto"])
def test_on_a_gpu_nothing_waits_and_the_cpu_agrees(cuda: torch.device, box: str) -> None:
    config = CONFIG.with_overrides(
        {"synthesis.box": box, "synthesis.box_least_vox": 32, "synthesis.size_weights": {"tiny": 1.0}}
        | {"synthesis.box_context_mm": 0.0, "qc.threshold": 0.0}
    )
    image, label = _batch()
    voxels = _label_voxels(label)
    wanted = _synthesizer(config).paint(image, label, ADDRESSES)
    synthesizer = _synthesizer(config, cuda)
    batch = image.to(cuda), label.to(cuda)
    allow_tf32 = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        synthesizer.paint(*batch, ADDRESSES, label_voxels=voxels).records()  # compiles kernels, takes memory
        torch.cuda.set_sync_debug_mode("error")
        painting = synthesizer.paint(*batch, ADDRESSES, label_voxels=voxels)
        torch.cuda.set_sync_debug_mode("default")
        records = painting.records()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.backends.cudnn.allow_tf32 = allow_tf32
    assert torch.equal(painting.mask.cpu(), wanted.mask)
    assert torch.equal(painting.label.cpu(), wanted.label)  # threshold 0: all pass
    torch.testing.assert_close(painting.image.cpu(), wanted.image, rtol=0, atol=1e-4)
    for got, expected in zip(records, wanted.records(), strict=True):
        assert (got is None) == (expected is None)
        if got is not None and expected is not None:
            assert got.center_zyx == expected.center_zyx
            assert got.proportion == pytest.approx(
                expected.proportion, abs=0.02
            )  # a voxel near the border of two classes
