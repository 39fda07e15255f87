"""The estimate against what really happens, and what becomes of memory that runs out."""

import dataclasses
import math
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import saved_tensors_hooks

from ftengine.assemble import build_loader, train_segmentation, train_synthesis
from ftengine.config import Config
from ftengine.errors import MemoryLimitError
from ftengine.store.reader import Store
from ftengine.training import estimate as module
from ftengine.training import step_memory as memory_module
from ftengine.training.checkpoint import Kind
from ftengine.training.estimate import REHEARSED_STEPS, Estimate, duration, estimate, rehearse
from ftengine.training.losses import segmentation_loss
from ftengine.training.memory import is_out_of_memory, memory_advice
from ftengine.training.networks import build_classifier, build_generator, build_segmenter, count_parameters
from ftengine.training.run import read_metrics
from ftengine.training.step_memory import StepMemory, free_bytes, step_memory
from tests.support import make_store, small_config

CONFIG = small_config(training__steps=500, generator_training__steps=300, device="cpu")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(tmp_path_factory.mktemp("estimate"), CONFIG)


@pytest.mark.parametrize(("channels", "batch_size"), [((4, 8), 1), ((8, 16, 32), 3)])
def test_activations_are_those_that_autograd_really_keeps(channels: tuple[int, ...], batch_size: int) -> None:
    keys = {"network.channels": channels, "training.batch_size": batch_size, "region.patch_zyx": (32, 32, 32)}
    config = CONFIG.with_overrides(keys)
    network = build_segmenter(config)
    shape = (batch_size, 1, *config.region.patch_zyx)
    sizes: dict[int, int] = {}
    held = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        place = tensor.untyped_storage().data_ptr()  # oneDNN pads what it allocates: the tensors' own bytes count
        sizes[place] = max(sizes.get(place, 0), tensor.numel() * tensor.element_size())
        held.append(tensor)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        segmentation_loss()(network(torch.rand(shape)), torch.ones(shape, dtype=torch.uint8)).backward()
    found = step_memory("segmenter", config, device=CPU)
    weights = 4 * count_parameters(network)
    assert (found.weights, found.gradients, found.optimizer) == (weights, weights, 2 * weights)
    logits = 4 * config.region.num_classes * batch_size * 32**3
    assert found.activations == pytest.approx(sum(sizes.values()), abs=0.5 * logits + weights * batch_size)


def test_what_makes_a_step_smaller_makes_its_estimate_smaller() -> None:
    region = {"region.patch_zyx": (64, 64, 64), "network.name": "swinunetr", "network.feature_size": 12}
    config = CONFIG.with_overrides(region | {"network.checkpointing": False})
    whole = step_memory("segmenter", config, device=CPU).activations

    def with_(**keys: object) -> int:
        changed = config.with_overrides({name.replace("__", "."): value for name, value in keys.items()})
        return step_memory("segmenter", changed, device=CPU).activations

    assert with_(network__checkpointing=True) < 0.8 * whole
    assert with_(training__batch_size=1) == whole // 2


def test_the_generators_step_holds_g_and_s_and_c() -> None:
    found = step_memory("generator", CONFIG, device=CPU)
    wider = step_memory("generator", CONFIG.with_overrides({"generator.width": 8}), device=CPU)
    assert wider.activations > 1.5 * found.activations
    assert found.gradients == 4 * sum(
        count_parameters(network) for network in (build_generator(CONFIG), build_classifier(CONFIG))
    )
    assert found.weights == found.gradients + 4 * count_parameters(build_segmenter(CONFIG))


def test_the_estimate_counts_volumes_epochs_and_memory(store: Store) -> None:
    with build_loader(CONFIG, store, mix="annotated") as loader:
        found = estimate("segmenter", CONFIG, loader, device=CPU)
    assert (found.num_volumes, found.patches_per_epoch, found.epochs) == (2, 2, 500.0)
    assert found.memory.free is not None
    assert 0 < found.memory.free < 1e14
    assert found.memory.fits
    assert found.total_s is None
    assert len(found.lines()) == 2


def test_a_network_that_looks_at_values_is_trained_all_the_same(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Looks(torch.nn.Conv3d):
        def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - the name in torch
            return super().forward(input) * (2.0 if float(input.mean()) > 0 else 1.0)

    monkeypatch.setattr(memory_module, "build_segmenter", lambda _config: Looks(1, 3, 3, padding=1))
    told: list[Estimate] = []
    config = CONFIG.with_overrides({"training.steps": 1})
    train_segmentation(config, store.path, tmp_path / "run", on_estimate=told.append)
    assert not told[0].memory.is_traced
    assert "activations, which this network hides, not counted" in told[0].lines()[1]


def test_a_batch_that_does_not_fit_gets_the_one_that_would(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    config = CONFIG.with_overrides({"training.batch_size": 16, "network.channels": (16, 32)})
    needed = step_memory("segmenter", config, device=CPU)
    monkeypatch.setattr(memory_module, "free_bytes", lambda _device: int(needed.total * 0.5))
    with build_loader(config, store, mix="annotated") as loader:
        found = estimate("segmenter", config, loader, device=CPU)
    assert not found.memory.fits
    largest = found.memory.largest_batch
    assert 5 <= largest <= 7  # less than half: a tenth is spared, and the weights stay
    advised = "training.batch_size=4 (now 16) with training.accumulate=4 (now 1), as many patches a step"
    assert found.advice[0].startswith(f"Set {advised}: about ")  # the largest that divides 16
    assert found.lines()[-len(found.advice) - 1] == "this does not fit. Try, in this order:"
    assert found.lines()[-len(found.advice) :] == found.advice
    smaller = config.with_overrides({"training.batch_size": largest})
    assert step_memory("segmenter", smaller, device=CPU).fits
    assert not step_memory("segmenter", config.with_overrides({"training.batch_size": largest + 1}), device=CPU).fits


def test_a_step_is_all_batches_of_all_processes(store: Store) -> None:
    config = CONFIG.with_overrides({"training.batch_size": 1, "training.accumulate": 3})
    with build_loader(config, store, mix="annotated", rank=1, world_size=2) as loader:
        found = estimate("segmenter", config, loader, device=CPU)
    assert (found.patches_a_step, found.patches_per_epoch) == (6, 2)
    assert found.epochs == 500 * 6 / 2
    assert found.lines()[0] == "500 steps of 6 patches (3 x 1, 2 processes): 1500.0 epochs of 2 from 2 volumes"
    document = found.document()
    assert (document["batch_size"], document["accumulate"], document["world_size"]) == (1, 3, 2)


def test_the_time_of_a_step_is_that_of_all_its_batches(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stall meter, and so metrics.jsonl, has seconds of a batch."""
    logged: list[dict[str, float]] = []

    def spy(folder: Path) -> list[dict[str, float]]:
        logged[:] = read_metrics(folder)
        return logged

    monkeypatch.setattr(module, "read_metrics", spy)
    config = CONFIG.with_overrides({"training.accumulate": 4})
    found = rehearse("segmenter", config, partial(train_segmentation, store_path=store.path))
    assert len(logged) == REHEARSED_STEPS
    assert found.step_s is not None
    assert found.step_s == 4 * logged[-1]["step_s"]
    assert found.total_s == 500 * found.step_s


def test_where_the_weights_alone_do_not_fit_no_batch_does() -> None:
    hidden = StepMemory(10, 10, 20, 0, 0, 30, is_traced=False)
    assert not hidden.fits
    assert hidden.largest_batch == 0


@pytest.mark.parametrize(
    ("batch_size", "accumulate", "fitting", "want"),
    [(4, 1, 3, (2, 2)), (4, 1, 0, (1, 4)), (5, 1, 3, (1, 5)), (6, 2, 5, (4, 3)), (2, 3, 7, (1, 6))],
)
def test_advice_keeps_the_patches_of_a_step(
    batch_size: int, accumulate: int, fitting: int, want: tuple[int, int]
) -> None:
    config = CONFIG.with_overrides({"training.batch_size": batch_size, "training.accumulate": accumulate})
    size, batches = want
    assert size * batches == batch_size * accumulate
    told = memory_advice("segmenter", config, _measure(fitting))[0]
    assert told.startswith(
        f"Set training.batch_size={size} (now {batch_size}) with training.accumulate={batches} (now {accumulate}), as many patches a step: about "
    )
    assert ("alone is not enough" in told) == (fitting < size)


def _measure(fitting: int) -> Callable[[Config], StepMemory]:
    """As many patches of 100 MB fit, of patches of 16^3 voxels."""

    def measure(config: Config) -> StepMemory:
        a_patch = 10**8 * math.prod(config.region.patch_zyx) // 16**3
        return StepMemory(0, 0, 0, config.training.batch_size * a_patch, a_patch, round(10**8 * (fitting + 0.5) / 0.9))

    return measure


@pytest.mark.parametrize("kind", ["segmenter", "generator"])
def test_a_rehearsal_measures_real_steps_and_leaves_nothing(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Kind
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "tmp").mkdir()
    steps: list[int] = []

    def train(config: Config, *, out: Path, rehearsal: bool, on_estimate: object) -> object:
        assert rehearsal
        counted = {"on_estimate": on_estimate, "on_step": lambda step, _values: steps.append(step)}
        if kind == "segmenter":
            return train_segmentation(config, store.path, out, **counted)  # type: ignore[arg-type]  # as the command line does
        baseline = train_segmentation(
            CONFIG.with_overrides({"training.steps": 1}), store.path, tmp_path / "s"
        ).checkpoint
        return train_synthesis(config, store.path, out, baseline=baseline, **counted)  # type: ignore[arg-type]

    found = rehearse(kind, CONFIG, train)  # type: ignore[arg-type]
    assert steps == [1, 2, 3][:REHEARSED_STEPS]
    assert list((tmp_path / "tmp").iterdir()) == []
    assert found.steps == (500 if kind == "segmenter" else 300)
    assert found.step_s is not None
    assert found.total_s == found.step_s * found.steps
    assert 0 < found.step_s < 10
    assert found.checkpoint_bytes is not None
    assert found.checkpoint_bytes > 3 * found.memory.gradients  # weights, and two states of Adam
    assert found.peak_bytes is None
    assert "about " in found.lines()[2]
    assert found.document()["memory"]["fits"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "0 s"),
        (59.6, "1 min"),
        (61, "1 min 1 s"),
        (3600, "1 h"),
        (7384, "2 h 3 min"),
        (86400 * 3 + 3600 * 5, "3 d 5 h"),
    ],
)
def test_durations_have_two_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_limit_of_a_container_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = memory_module._lines

    def lines(path: Path) -> list[str]:
        shown = {"/sys/fs/cgroup/memory.max": ["1000000", ""], "/sys/fs/cgroup/memory.current": ["400000", ""]}
        return shown.get(str(path)) or real(path)

    monkeypatch.setattr(memory_module, "_lines", lines)
    assert free_bytes(CPU) == 600_000
    monkeypatch.setattr(memory_module, "_lines", lambda _path: [])
    assert free_bytes(CPU) is None
    assert StepMemory(1, 1, 2, 3, 3, None).fits


def test_an_estimate_says_so_where_the_free_memory_is_unknown() -> None:
    found = Estimate("segmenter", "cpu", 10, 2, 1, 1, 1, 2, StepMemory(10, 10, 20, 10**9, 10**9, None))
    assert "free" not in found.lines()[1]


@pytest.mark.gpu
@pytest.mark.parametrize("keys", [{}, {"training.precision": "bf16"}])
def test_the_estimate_is_what_a_gpu_takes(store: Store, tmp_path: Path, keys: dict[str, object]) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    shape = {"device": "cuda", "region.patch_zyx": (96, 96, 96), "network.channels": (16, 32, 64), "training.steps": 2}
    config = CONFIG.with_overrides(shape | keys)
    told: list[Estimate] = []
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    train_segmentation(config, store.path, tmp_path / "run", on_estimate=told.append)
    peak = torch.cuda.max_memory_allocated() - before
    # work space of convolutions and gradients on the way back come on top
    assert 0.8 * peak <= told[0].memory.total * 1.5
    assert told[0].memory.total <= 1.1 * peak


# memory that runs out


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
        MemoryError(),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."
        ),
    ],
)
def test_memory_that_runs_out_in_a_step_becomes_advice(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def forward(*_: object) -> None:
        raise error

    monkeypatch.setattr("torch.nn.functional.conv3d", forward)
    with pytest.raises(MemoryLimitError) as caught:
        train_segmentation(CONFIG, store.path, tmp_path / "run")
    text = str(caught.value)
    assert (
        f"{tmp_path / 'run'}: a step with training.batch_size=2 and patches of (16, 16, 16) voxels does not fit" in text
    )
    assert "training.batch_size=1 (now 2)" in text
    assert caught.value.__cause__ is error
    assert caught.value.exit_code == 2


def test_other_errors_stay_what_they_are(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("torch.nn.functional.conv3d", forward)
    with pytest.raises(RuntimeError, match="a bug"):
        train_segmentation(CONFIG, store.path, tmp_path / "run")
    assert not is_out_of_memory(ValueError("not enough memory"))


_LIMITED = """
import resource, sys
from ftengine.cli.main import run
import ftengine.assemble, ftengine.training.estimate
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv.pop(1)),) * 2)
sys.argv[0] = "ftengine"
run()
"""


def test_a_real_allocation_that_fails_is_one_line_with_advice(store: Store, tmp_path: Path) -> None:
    """A process that may map 3 GB more, and a first layer that wants 3.6."""
    keys = {"region.patch_zyx": (96, 96, 96), "network.channels": (64, 64), "training.batch_size": 16}
    (tmp_path / "c.yaml").write_text(CONFIG.with_overrides(keys).to_yaml())
    arguments = [
        "train",
        "seg",
        str(store.path),
        "--out",
        str(tmp_path / "run"),
        "--config",
        str(tmp_path / "c.yaml"),
        "--quiet",
    ]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _LIMITED, str(3_000_000_000), *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("ftengine: error: ")]
    assert len(errors) == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert "does not fit the memory of this machine" in errors[0]
    assert "Set training.batch_size=1 (now 16) with training.accumulate=16 (now 1)" in errors[0]
    assert "region.patch_zyx=" in errors[0]


def test_advice_names_what_is_not_done_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    config = Config.preset("abdomen").with_overrides({"network.checkpointing": False})
    proposals = memory_advice("segmenter", config, None)
    assert [p.split("=")[0] for p in proposals[:3]] == [
        "Set network.checkpointing",
        "Set training.batch_size",
        "Set training.precision",
    ]
    assert "training.batch_size=2 (now 4)" in proposals[1]  # nothing is known: half
    assert not any("about" in p for p in proposals)
    done = config.with_overrides(
        {"network.checkpointing": True, "training.precision": "bf16", "training.batch_size": 1}
    )
    assert [p.split("=")[0] for p in memory_advice("segmenter", done, None)] == [
        "Where it paints, set synthesis.box",
        "Make region.patch_zyx smaller (now [96, 96, 96]).",
    ]
    halved = f"Set generator.width={config.generator.width // 2} (now {config.generator.width})"
    assert any(p.startswith(halved) for p in memory_advice("generator", config, None))


def test_advice_names_the_largest_patch_that_fits() -> None:
    config = CONFIG.with_overrides({"region.patch_zyx": (32, 64, 64), "training.batch_size": 1})
    *_, told = memory_advice("segmenter", config, _measure(20))  # of 32
    assert told == "Set region.patch_zyx=[16, 48, 48] (now [32, 64, 64]): about 0.90 GB of 2.28 GB."
    *_, told = memory_advice("segmenter", config, _measure(0))
    assert told == "Make region.patch_zyx smaller (now [32, 64, 64])."
    swin = config.with_overrides(
        {"network.name": "swinunetr", "network.feature_size": 12, "region.patch_zyx": (96, 96, 96)}
    )
    now = step_memory("segmenter", swin, device=CPU)

    def measure(changed: Config) -> StepMemory:
        return dataclasses.replace(step_memory("segmenter", changed, device=CPU), free=round(now.total * 0.95))

    *_, told = memory_advice("segmenter", swin, measure)
    assert told.startswith("Set region.patch_zyx=[64, 64, 64] (now [96, 96, 96])")  # 80 is no multiple of 32


def test_a_batch_of_one_has_no_partner_for_cutmix() -> None:
    keys = {"training.cutmix_probability": 0.5, "training.batch_size": 4}
    assert "training.batch_size=2 (now 4)" in memory_advice("segmenter", CONFIG.with_overrides(keys), _measure(1))[0]
    least = CONFIG.with_overrides(keys | {"training.batch_size": 2})
    assert not any("batch_size" in p for p in memory_advice("segmenter", least, _measure(1)))


def test_what_a_step_took_beyond_the_estimate_counts(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step of 8 patches fails though the estimate says that 20 fit: what is not counted took the rest, and grows with the batch."""
    config = CONFIG.with_overrides({"training.batch_size": 8, "network.channels": (16, 32)})
    needed = step_memory("segmenter", config, device=CPU)
    budget = needed.total - needed.activations + 20 * needed.activations_a_patch
    monkeypatch.setattr("ftengine.training.memory.free_bytes", lambda _device: budget)
    real = torch.nn.functional.conv3d

    def forward(x: torch.Tensor, *arguments: Any) -> torch.Tensor:
        if isinstance(x, FakeTensor):
            return real(x, *arguments)
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("torch.nn.functional.conv3d", forward)
    with pytest.raises(MemoryLimitError) as caught:
        train_segmentation(config, store.path, tmp_path / "run")
    sentence = re.search(
        r"Set training\.batch_size=4 \(now 8\) .*?: about ([0-9.]+) (GB|MB) of ([0-9.]+) (GB|MB)\.", str(caught.value)
    )
    assert sentence is not None
    assert float(sentence[1]) < 0.65 * float(sentence[3])


def test_an_address_space_is_a_limit_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda _which: (10**9, 10**9))
    monkeypatch.setattr(memory_module, "_lines", lambda path: ["1000 1"] if path.name == "statm" else [])
    assert free_bytes(CPU) == 10**9 - 1000 * resource.getpagesize()
