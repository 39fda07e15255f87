"""What a run will take, before its first step: memory from the networks' own graphs without computing them, time from a rehearsal.

``step_memory`` runs forward on fake tensors (shapes without numbers) and adds up what autograd keeps, so it costs no memory and hardly
any time, and says for a GPU that is not there what it would need. ``rehearse`` trains a few real steps in a folder that is thrown away.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedFakeTensorException,
)
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call

from ftengine.config import Config
from ftengine.loader.loader import Loader
from ftengine.training.checkpoint import SECTION, Kind
from ftengine.training.distributed import world_of_environment
from ftengine.training.memory import memory_advice
from ftengine.training.networks import build_classifier, build_generator, build_segmenter
from ftengine.training.run import TrainingResult, read_metrics

_ADAM_STATES = 2  # tensors that Adam keeps for each weight
_SPARE = 0.9  # of the free memory: the rest is for the allocator's gaps and the kernels' work space
REHEARSED_STEPS = 3


@dataclass(frozen=True)
class StepMemory:
    """Bytes that a training step needs at its peak. activations: what the forward pass keeps for the backward pass, whole batch.

    is_traced: whether the network could be followed; where it looks at values it cannot, and activations are 0. Painting, which the loader's threads do on the same device, and the work space of convolutions come on top.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    activations_a_patch: int
    free: int | None
    is_traced: bool = True

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.activations

    @property
    def fits(self) -> bool:
        """Whether it fits what is free, with a tenth to spare; true where that is not known."""
        return self.free is None or self.total <= _SPARE * self.free

    @property
    def largest_batch(self) -> int:
        """The largest batch that fits; 0 where not even one patch does, or the weights alone do not. Only where ``free`` is known."""
        assert self.free is not None  # noqa: S101 - asked only where something does not fit
        if not self.activations_a_patch:
            return 0
        left = _SPARE * self.free - (self.total - self.activations)
        return max(0, int(left // self.activations_a_patch))


@dataclass(frozen=True)
class Estimate:
    """What a run will take. batch_size: of each process; a step is ``accumulate`` batches in each of ``world_size`` processes.

    step_s: seconds of such a step. It, wait_fraction, peak_bytes (on a GPU only) and checkpoint_bytes are measured by ``rehearse``, in the
    process that reports, else None. memory: of one process.
    """

    kind: Kind
    device: str
    steps: int
    batch_size: int
    accumulate: int
    world_size: int
    num_volumes: int
    patches_per_epoch: int
    memory: StepMemory
    step_s: float | None = None
    wait_fraction: float | None = None
    peak_bytes: int | None = None
    checkpoint_bytes: int | None = None
    advice: list[str] = field(default_factory=list)

    @property
    def total_s(self) -> float | None:
        """Seconds for the whole run, without saving and validation; None where no step was measured."""
        return None if self.step_s is None else self.step_s * self.steps

    @property
    def patches_a_step(self) -> int:
        """Patches that a step's gradients are of, in all processes together."""
        return self.batch_size * self.accumulate * self.world_size

    @property
    def epochs(self) -> float:
        """Passes through the epoch's patches."""
        return self.steps * self.patches_a_step / self.patches_per_epoch

    def document(self) -> dict[str, Any]:
        """All of it as plain JSON values; sizes in bytes, times in seconds."""
        m = self.memory
        return {
            "kind": self.kind,
            "device": self.device,
            "steps": self.steps,
            "batch_size": self.batch_size,
            "accumulate": self.accumulate,
            "world_size": self.world_size,
            "patches_a_step": self.patches_a_step,
            "num_volumes": self.num_volumes,
            "patches_per_epoch": self.patches_per_epoch,
            "epochs": self.epochs,
            "step_s": self.step_s,
            "total_s": self.total_s,
            "wait_fraction": self.wait_fraction,
            "memory": {
                "weights": m.weights,
                "gradients": m.gradients,
                "optimizer": m.optimizer,
                "activations": m.activations,
                "activations_a_patch": m.activations_a_patch,
                "total": m.total,
                "free": m.free,
                "fits": m.fits,
                "peak": self.peak_bytes,
            },
            "checkpoint_bytes": self.checkpoint_bytes,
            "advice": self.advice,
        }

    def lines(self) -> list[str]:
        """The same for people, one sentence a line."""
        m = self.memory
        free = "" if m.free is None else f" of {_gb(m.free)} free on {self.device}"
        left_out = "painting and work space" if m.is_traced else "activations, which this network hides,"
        parts = ", ".join(
            f"{name} {_gb(getattr(m, name))}" for name in ("weights", "gradients", "optimizer", "activations")
        )
        lines = [
            f"{self.steps} steps of {self.patches_a_step} patches{self._parts()}: {self.epochs:.1f} epochs of {self.patches_per_epoch} from {self.num_volumes} volumes",
            f"memory of a step: {_gb(m.total)}{free} ({parts}), {left_out} not counted",
        ]
        if self.peak_bytes is not None:
            lines.append(f"measured peak on {self.device}: {_gb(self.peak_bytes)}, everything counted")
        if self.step_s is not None and self.total_s is not None:
            lines.append(
                f"time: {self.step_s:.3g} s a step, about {duration(self.total_s)} in all, without saving; training waited "
                f"{self.wait_fraction or 0.0:.0%} of it for data"
            )
        if self.checkpoint_bytes is not None:
            lines.append(f"a checkpoint takes {_gb(self.checkpoint_bytes)} on the disk")
        if not m.fits:
            lines.append(f"this does not fit. Try, in this order: {'; '.join(self.advice)}")
        return lines

    def _parts(self) -> str:
        """How a step's patches come together, where it is more than one batch."""
        if self.patches_a_step == self.batch_size:
            return ""
        processes = f", {self.world_size} processes" if self.world_size > 1 else ""
        return f" ({self.accumulate} x {self.batch_size}{processes})"


def estimate(
    kind: Kind, config: Config, loader: Loader, *, device: torch.device, segmenter: nn.Module | None = None
) -> Estimate:
    """What a run will take, from its plan and networks; nothing is computed. segmenter: the frozen S of generator training."""
    settings = getattr(config, SECTION[kind])
    memory = step_memory(kind, config, device=device, segmenter=segmenter)
    advice = []
    if not memory.fits:
        advice = memory_advice(kind, config, fitting=memory.largest_batch)
    plan = loader.plan
    return Estimate(
        kind=kind,
        device=str(device),
        steps=settings.steps,
        batch_size=settings.batch_size,
        accumulate=settings.accumulate,
        world_size=plan.world_size,
        num_volumes=plan.num_volumes,
        patches_per_epoch=plan.batches_per_epoch * plan.batch_size * plan.world_size,
        memory=memory,
        advice=advice,
    )


class Train(Protocol):
    """Trains a configuration into a folder, with a run's own data and painters; tells its estimate before the first step.

    val_split: as of ``assemble.train_segmentation``.
    """

    def __call__(
        self, config: Config, *, out: Path, val_split: None, on_estimate: Callable[["Estimate"], None]
    ) -> TrainingResult:
        """Train."""
        ...


def rehearse(kind: Kind, config: Config, train: Train) -> Estimate:
    """The estimate with time, peak memory and size of a checkpoint, measured on a few real steps in a folder that is thrown away.

    Nothing is validated or drawn. Of several processes, which all call this, the first measures; the others return the plain estimate.
    Raises what training raises, a MemoryLimitError where a step does not fit.
    """
    section = SECTION[kind]
    keys = {"steps": REHEARSED_STEPS, "log_every": 1, "checkpoint_every": REHEARSED_STEPS, "warmup_steps": 0}
    silent: dict[str, object] = {
        "tracking.use": [],
        "training.validate_every": None,
        "generator_training.pictures_every": None,
    }
    short = config.with_overrides({f"{section}.{name}": value for name, value in keys.items()} | silent)
    told: list[Estimate] = []

    def on_estimate(planned: Estimate) -> None:
        told.append(planned)
        if planned.device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats(planned.device)

    with tempfile.TemporaryDirectory(prefix="ftengine-rehearsal-") as folder:
        out = Path(folder) / "run"
        result = train(short, out=out, val_split=None, on_estimate=on_estimate)
        planned = replace(told[0], steps=getattr(config, section).steps)
        if not world_of_environment().is_main:
            return planned
        last = read_metrics(out)[-1]  # the first steps allocate, compile and choose algorithms
        size = result.checkpoint.stat().st_size
    return replace(
        planned,
        step_s=last["step_s"] * planned.accumulate,
        wait_fraction=last["loader/wait_fraction"],
        peak_bytes=torch.cuda.max_memory_reserved(planned.device) if planned.device.startswith("cuda") else None,
        checkpoint_bytes=size,
    )


def step_memory(kind: Kind, config: Config, *, device: torch.device, segmenter: nn.Module | None = None) -> StepMemory:
    """Bytes of one training step, from the networks' graphs on fake tensors; nothing is computed or allocated."""
    settings = getattr(config, SECTION[kind])
    trained: list[nn.Module]
    frozen: list[nn.Module] = []
    if kind == "segmenter":
        network = build_segmenter(config)
        trained = [network]
        graph = partial(_segmentation_graph, network)
    else:
        generator, classifier = build_generator(config), build_classifier(config)
        judge = build_segmenter(config) if segmenter is None else segmenter
        trained, frozen = [generator, classifier], [judge]
        graph = partial(_generator_graph, generator, judge, classifier)
    a_patch = _kept_bytes(config, kind, device, graph)
    weights = sum(map(_weight_bytes, trained))
    return StepMemory(
        weights=weights
        + sum(map(_weight_bytes, frozen))
        + (0 if settings.ema_decay is None else _weight_bytes(trained[0])),
        gradients=weights,
        optimizer=(_ADAM_STATES + (kind == "segmenter" and config.training.amsgrad)) * weights,
        activations=(a_patch or 0) * settings.batch_size,
        activations_a_patch=a_patch or 0,
        free=free_bytes(device),
        is_traced=a_patch is not None,
    )


def free_bytes(device: torch.device) -> int | None:
    """Memory that is free for this process on a device: what torch holds and does not use counted as free; None where it is not known."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    limits = [value for value in (_meminfo(), _cgroup()) if value is not None]
    return min(limits, default=None)


def duration(seconds: float) -> str:
    """A time as people say it: two units at most."""
    whole = round(seconds)
    for unit, name, below, below_name in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= unit:
            rest = whole % unit // below
            return f"{whole // unit} {name} {rest} {below_name}" if rest else f"{whole // unit} {name}"
    return f"{whole} s"


def _kept_bytes(
    config: Config, kind: Kind, device: torch.device, forward: Callable[[torch.Tensor], torch.Tensor]
) -> int | None:
    """Bytes of the tensors that autograd keeps of one patch for the backward pass, each storage once; None where a network looks at values."""
    storages: dict[int, int] = {}
    held = []  # so that no storage's number is used twice

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage.nbytes()
        held.append(tensor)
        return tensor

    precision = getattr(config, SECTION[kind]).precision
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.zeros((1, 1, *config.region.patch_zyx), device=device)
        try:
            with (
                saved_tensors_hooks(keep, lambda tensor: tensor),
                torch.autocast(device.type, dtype, enabled=precision != "fp32"),
            ):
                forward(x)
        except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedFakeTensorException):
            return None
    return sum(storages.values())


def _segmentation_graph(network: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The network, and what the loss keeps: softmax, one-hot labels, log-softmax, labels as integers. The loss itself looks at values."""
    logits = _faked(network, x).float()
    probability = logits.softmax(1)
    labels = torch.zeros((len(logits), *logits.shape[2:]), dtype=torch.int64, device=logits.device)
    return (probability * torch.zeros_like(probability)).sum() + nn.functional.cross_entropy(logits, labels)


def _generator_graph(
    generator: nn.Module, segmenter: nn.Module, classifier: nn.Module, x: torch.Tensor
) -> torch.Tensor:
    """G's phase in short: Eq. 1 on the patch, then S and C on it."""
    painted = x - torch.tanh(_faked(generator, x)[:, :1]) * x
    seen, classified = _faked(segmenter, painted), _faked(classifier, painted)
    return seen.float().log_softmax(1).mean() + classified.float().log_softmax(1).mean()


def _faked(network: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The network on a fake tensor, with its weights faked beside it."""
    assert isinstance(x, FakeTensor)  # noqa: S101 - made by _kept_bytes
    named = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    faked = {name: x.fake_mode.from_tensor(tensor).to(x.device) for name, tensor in named.items()}
    result: torch.Tensor = functional_call(network, faked, (x,))
    return result


def _weight_bytes(network: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in network.parameters())


def _meminfo() -> int | None:
    lines = _lines(Path("/proc/meminfo"))
    found = [line.split() for line in lines if line.startswith("MemAvailable:")]
    return int(found[0][1]) * 1024 if found else None


def _cgroup() -> int | None:
    """What a container may still take (cgroup 2); None without a limit."""
    limit, used = (_lines(Path("/sys/fs/cgroup") / name) for name in ("memory.max", "memory.current"))
    if not limit or not used or limit[0] == "max":
        return None
    return max(0, int(limit[0]) - int(used[0]))


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").split("\n")
    except OSError:
        return []


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2g} MB" if size < 1e7 else f"{size / 1e6:.0f} MB"
