"""What a run will take, before its first step: memory without computing anything, time from a rehearsal.

``rehearse`` trains a few real steps in a folder that is thrown away.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from ftengine.config import Config
from ftengine.loader.loader import Loader
from ftengine.training.checkpoint import SECTION, Kind
from ftengine.training.distributed import world_of_environment
from ftengine.training.memory import memory_advice
from ftengine.training.run import TrainingResult, read_metrics
from ftengine.training.step_memory import StepMemory, gigabytes, step_memory

REHEARSED_STEPS = 3


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
        free = "" if m.free is None else f" of {gigabytes(m.free)} free on {self.device}"
        left_out = "painting and work space" if m.is_traced else "activations, which this network hides,"
        parts = ", ".join(
            f"{name} {gigabytes(getattr(m, name))}" for name in ("weights", "gradients", "optimizer", "activations")
        )
        lines = [
            f"{self.steps} steps of {self.patches_a_step} patches{self._parts()}: {self.epochs:.1f} epochs of {self.patches_per_epoch} from {self.num_volumes} volumes",
            f"memory of a step: {gigabytes(m.total)}{free} ({parts}), {left_out} not counted",
        ]
        if self.peak_bytes is not None:
            lines.append(f"measured peak on {self.device}: {gigabytes(self.peak_bytes)}, everything counted")
        if self.step_s is not None and self.total_s is not None:
            lines.append(
                f"time: {self.step_s:.3g} s a step, about {duration(self.total_s)} in all, without saving; training waited "
                f"{self.wait_fraction or 0.0:.0%} of it for data"
            )
        if self.checkpoint_bytes is not None:
            lines.append(f"a checkpoint takes {gigabytes(self.checkpoint_bytes)} on the disk")
        if not m.fits:
            lines += ["this does not fit. Try, in this order:", *self.advice]
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
        advice = memory_advice(kind, config, partial(step_memory, kind, device=device, segmenter=segmenter))
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

    rehearsal: all that a run is given is checked, and nothing is validated or drawn.
    """

    def __call__(
        self, config: Config, *, out: Path, rehearsal: bool, on_estimate: Callable[["Estimate"], None]
    ) -> TrainingResult:
        """Train."""
        ...


def rehearse(kind: Kind, config: Config, train: Train) -> Estimate:
    """The estimate with time, peak memory and size of a checkpoint, measured on a few real steps in a folder that is thrown away.

    Nothing is validated or drawn. Of several processes, which all call this, the first measures; the others return the plain estimate.
    Raises what training raises: a ConfigError where the run would be refused, a MemoryLimitError where a step does not fit.
    """
    section = SECTION[kind]
    keys = {"steps": REHEARSED_STEPS, "log_every": 1, "checkpoint_every": REHEARSED_STEPS, "warmup_steps": 0}
    silent: dict[str, object] = {"tracking.use": []}
    short = config.with_overrides({f"{section}.{name}": value for name, value in keys.items()} | silent)
    told: list[Estimate] = []

    def on_estimate(planned: Estimate) -> None:
        told.append(planned)
        if planned.device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats(planned.device)

    with tempfile.TemporaryDirectory(prefix="ftengine-rehearsal-") as folder:
        out = Path(folder) / "run"
        result = train(short, out=out, rehearsal=True, on_estimate=on_estimate)
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


def duration(seconds: float) -> str:
    """A time as people say it: two units at most."""
    whole = round(seconds)
    for unit, name, below, below_name in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= unit:
            rest = whole % unit // below
            return f"{whole // unit} {name} {rest} {below_name}" if rest else f"{whole // unit} {name}"
    return f"{whole} s"
