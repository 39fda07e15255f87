"""What both training stages share: the run's folder, its log, the stall meter, the learning rate, and stopping cleanly."""

import json
import math
import platform
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, TypeAlias

import torch
from torch.utils.tensorboard.writer import SummaryWriter

from ftengine import __version__
from ftengine.config import Config
from ftengine.errors import ConfigError
from ftengine.loader.loader import Loader
from ftengine.types import Batch

CHECKPOINT = "checkpoint.pt"
Progress: TypeAlias = Callable[[int, dict[str, float]], None]  # steps done so far; figures of a logged step, else empty


def learning_rate(step: int, *, base: float, warmup_steps: int, steps: int) -> float:
    """Linear warm-up from 0, then a cosine to 0, per step (Table A19; released code)."""
    if step < warmup_steps:
        return base * step / warmup_steps
    return base * 0.5 * (1.0 + math.cos(math.pi * (step - warmup_steps) / max(1, steps - warmup_steps)))


@dataclass
class StallMeter:
    """How long each step waited for data, against how long it took. The first batch, which starts the loader, is kept apart."""

    wait_s: list[float] = field(default_factory=list)
    step_s: list[float] = field(default_factory=list)
    start_s: float = 0.0

    def record(self, wait_s: float, step_s: float) -> None:
        """Add one step; ``step_s`` includes ``wait_s``."""
        if not self.step_s and not self.start_s:
            self.start_s = wait_s
            wait_s, step_s = 0.0, step_s - wait_s
        self.wait_s.append(wait_s)
        self.step_s.append(step_s)

    @property
    def wait_fraction(self) -> float:
        """Share of the training time that was spent waiting for data, start-up left out."""
        total = sum(self.step_s)
        return sum(self.wait_s) / total if total > 0 else 0.0

    def summary(self, batch_size: int) -> dict[str, float]:
        """Plain figures for reports."""
        total = sum(self.step_s)
        return {
            "wait_fraction": self.wait_fraction,
            "median_wait_s": statistics.median(self.wait_s) if self.wait_s else 0.0,
            "median_step_s": statistics.median(self.step_s) if self.step_s else 0.0,
            "patches_per_s": batch_size * len(self.step_s) / total if total > 0 else 0.0,
            "loader_start_s": self.start_s,
        }


@dataclass(frozen=True)
class TrainingResult:
    """What a training run came to; ``losses`` are those of the logged steps."""

    checkpoint: Path
    steps: int
    losses: list[float]
    stall: dict[str, float]
    busy_s: dict[str, float]
    quality: dict[str, Any] = field(default_factory=dict)
    interrupted: bool = False


def check_identity(saved: Mapping[str, str], given: Mapping[str, str]) -> None:
    """ConfigError where a resumed run is given other files or volumes than it began with; names the first difference and its flag."""
    for key, value in given.items():
        if saved.get(key, "") != value:
            raise ConfigError(
                f"the run began with {key}={saved.get(key) or 'nothing'} and would go on with {value or 'nothing'}; "
                "give the same options with --resume, or start a new run."
            )


class Run:
    """The folder of a training run: ``config.yaml``, ``run.json``, ``metrics.jsonl``, ``tensorboard/``, ``checkpoint.pt``."""

    def __init__(self, folder: str | Path, config: Config, *, resume: bool) -> None:
        """Raises ConfigError where a run lies there already and ``resume`` is false, or none lies there and it is true."""
        self.folder = Path(folder)
        self.checkpoint = self.folder / CHECKPOINT
        if resume and not self.checkpoint.exists():
            raise ConfigError(
                f"{self.checkpoint}: there is nothing to resume. Start without --resume, or give the folder of a started run."
            )
        if not resume and self.checkpoint.exists():
            raise ConfigError(f"{self.folder}: holds a run already. Go on with --resume or choose another --out.")
        self._config = config
        self._metrics = self.folder / "metrics.jsonl"
        self._board: SummaryWriter | None = None

    def begin(self, first_step: int) -> None:
        """Write what describes the run, and drop logged steps from ``first_step`` on, which a killed run logged after its last checkpoint.

        Called once everything that could refuse the run has been checked, so that a refused run changes nothing.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "config.yaml").write_text(self._config.to_yaml(), encoding="utf-8")
        document = {"config": self._config.model_dump(mode="json"), "versions": versions()}
        (self.folder / "run.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        lines = self._metrics.read_text(encoding="utf-8").splitlines() if self._metrics.exists() else []
        kept = [line for line in lines if line.strip() and json.loads(line)["step"] < first_step]
        self._metrics.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        self._board = SummaryWriter(str(self.folder / "tensorboard"))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write one line to ``metrics.jsonl`` and the same scalars to TensorBoard."""
        with self._metrics.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"step": step, **values}) + "\n")
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush the logs."""
        if self._board is not None:
            self._board.close()


def read_metrics(folder: str | Path) -> list[dict[str, float]]:
    """The logged steps of a run, in order."""
    path = Path(folder) / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def versions() -> dict[str, str]:
    """What made a result: our version and those of Python and the packages that compute."""
    import monai
    import numpy as np

    return {
        "ftengine": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "monai": str(monai.__version__),
        "numpy": np.__version__,
        "machine": platform.machine(),
    }


def run_steps(
    run: Run,
    loader: Loader,
    *,
    first_step: int,
    steps: int,
    log_every: int,
    checkpoint_every: int,
    train_step: Callable[[Batch, int], Callable[[], dict[str, float]]],
    save: Callable[[int], None],
    on_step: Progress,
) -> tuple[int, StallMeter]:
    """Run training steps ``first_step`` to ``steps``; returns how many are done in all, and the stall meter.

    ``train_step(batch, step)`` does one step and returns a function that gives its figures, which is called for logged steps only, so
    that other steps need not wait for the device. ``save`` is called every ``checkpoint_every`` steps and at the end. SIGINT and SIGTERM
    finish the step and save.
    """
    meter = StallMeter()
    step = first_step
    try:
        with stopping_on_signals() as stop:
            while step < steps and not stop:
                for batch in loader:
                    started = time.perf_counter() - loader.last_wait_s
                    figures = train_step(batch, step)
                    saved = (
                        step + 1
                    ) % checkpoint_every == 0  # logged too: figures() refuses a diverged run before it is saved
                    logged = (step + 1) % log_every == 0 or saved or step + 1 == steps
                    values = figures() if logged else {}
                    meter.record(loader.last_wait_s, time.perf_counter() - started)
                    if logged:
                        timing = {
                            "wait_s": meter.wait_s[-1],
                            "step_s": meter.step_s[-1],
                            "queue_level": float(loader.queue_level()),
                        }
                        values = {name: v for name, v in {**values, **timing}.items() if math.isfinite(v)}
                        run.log(step, values)
                    step += 1
                    on_step(step, values)
                    if saved and step < steps:
                        save(step)
                    if step >= steps or stop:
                        break
            save(step)
    finally:
        loader.close()
        run.close()
    return step, meter


class StopRequest:
    """Whether somebody asked the run to stop."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __bool__(self) -> bool:
        return self.signal is not None


@contextmanager
def stopping_on_signals() -> Iterator[StopRequest]:
    """Inside the block, SIGINT and SIGTERM only set the request, so that a step is finished and saved; a second SIGINT interrupts."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request  # signals can be handled in the main thread only
        return

    def handle(number: int, _frame: FrameType | None) -> None:
        if request.signal == signal.SIGINT == number:
            raise KeyboardInterrupt
        request.signal = number

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
