"""The folder of a training run and its logs, what a run comes to, the learning rate, and stopping cleanly."""

import json
import math
import platform
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from ftengine import __version__
from ftengine.config import Config, GeneratorTrainingConfig, TrainingConfig
from ftengine.errors import ConfigError
from ftengine.files import write_json_whole
from ftengine.training.stall import StallReport
from ftengine.training.trackers import Trackers, check_trackers, open_trackers

CHECKPOINT, BEST, RESULT = "checkpoint.pt", "best.pt", "result.json"
Progress: TypeAlias = Callable[[int, dict[str, float]], None]  # steps done so far; figures of a logged step, else empty


def ignore_warning(_text: str) -> None:
    """What becomes of warnings where nobody shows them: the result of the run still holds them."""


@dataclass(frozen=True)
class Schedule:
    """How long a stage trains and how fast. steps: updates of the weights, each of ``accumulate`` batches."""

    steps: int
    learning_rate: float
    warmup_steps: int
    log_every: int
    checkpoint_every: int
    accumulate: int = 1
    keep_checkpoints: int = 1
    kind: Literal["cosine", "constant"] = "cosine"

    @classmethod
    def of(
        cls, settings: TrainingConfig | GeneratorTrainingConfig, *, kind: Literal["cosine", "constant"] = "cosine"
    ) -> "Schedule":
        """That of a stage's section of the configuration."""
        return cls(
            steps=settings.steps,
            learning_rate=settings.learning_rate,
            warmup_steps=settings.warmup_steps,
            log_every=settings.log_every,
            checkpoint_every=settings.checkpoint_every,
            accumulate=settings.accumulate,
            keep_checkpoints=settings.keep_checkpoints,
            kind=kind,
        )

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        if self.kind == "constant" and step >= self.warmup_steps:
            return self.learning_rate
        return learning_rate(step, base=self.learning_rate, warmup_steps=self.warmup_steps, steps=self.steps)


def learning_rate(step: int, *, base: float, warmup_steps: int, steps: int) -> float:
    """Linear warm-up from 0, then a cosine to 0, per step (Table A19; released code)."""
    if step < warmup_steps:
        return base * step / warmup_steps
    return base * 0.5 * (1.0 + math.cos(math.pi * (step - warmup_steps) / max(1, steps - warmup_steps)))


@dataclass(frozen=True)
class TrainingResult:
    """What a training run came to; ``losses`` are those of the logged steps.

    speed: the stall meter, of the steps since the last start or resume. quality: ``QualityGate.summary`` and mix:
    ``PatchLedger.summary``, of the whole run, empty where it paints nothing. warnings: texts that came up, of the whole run.
    bad_reads: failed reads of each volume that could not be read, since the last start or resume. init: what became of the initial
    weights, one line; empty without them. best: step and Dice of ``best.pt``, empty where nothing was validated. With several processes
    speed is that of this one, everything else that of all.
    """

    checkpoint: Path
    steps: int
    losses: list[float]
    speed: StallReport
    quality: dict[str, Any] = field(default_factory=dict)
    mix: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    bad_reads: dict[str, int] = field(default_factory=dict)
    init: str = ""
    interrupted: bool = False
    best: dict[str, float] = field(default_factory=dict)

    @property
    def stall(self) -> dict[str, float]:
        """The stall meter's plain figures, by name."""
        return self.speed.figures()

    def document(self) -> dict[str, Any]:
        """Plain JSON values: what ``result.json`` holds and ``--json`` prints; docs/stall-meter.md describes its keys."""
        return {
            "checkpoint": str(self.checkpoint),
            "steps": self.steps,
            "interrupted": self.interrupted,
            "losses": [x if math.isfinite(x) else None for x in self.losses],
            "stall": self.speed.document(),
            "quality": self.quality,
            "mix": self.mix,
            "warnings": self.warnings,
            "bad_reads": self.bad_reads,
            "init": self.init,
            "best": self.best,
        }


class Run:
    """The folder of a training run: ``config.yaml``, ``run.json``, ``checkpoint.pt``, ``best.pt``, ``pictures/``, and its logs.

    ``metrics.jsonl`` has a line for each logged step, ``validation.jsonl`` one for each validation and, in a run that paints,
    ``epochs.jsonl`` one for each epoch that has ended; ``tensorboard/`` has all of them, figures of epochs with the prefix ``epoch/``, those
    of validations with ``val/``. ``result.json`` is what ``TrainingResult.document`` says, written when
    training has returned, and not there while it goes on.
    """

    def __init__(self, folder: str | Path, config: Config, *, resume: bool, writes: bool = True) -> None:
        """``writes`` false: another process writes. Raises ConfigError where a run lies there already and ``resume`` is false."""
        self.folder = Path(folder)
        self.checkpoint = self.folder / CHECKPOINT
        self.best = self.folder / BEST
        self.pictures = self.folder / "pictures"
        self._writes = writes
        if not resume and self.checkpoint.exists():
            raise ConfigError(f"{self.folder}: holds a run already. Go on with --resume or choose another --out.")
        check_trackers(config)
        self.config = config
        self._metrics = self.folder / "metrics.jsonl"
        self._epochs = self.folder / "epochs.jsonl"
        self._validations = self.folder / "validation.jsonl"
        self._result = self.folder / RESULT
        self._trackers = Trackers([])

    def begin(self, first_step: int, details: Mapping[str, Any] | None = None) -> None:
        """Write what describes the run (``details`` goes to ``run.json``, too), and drop logged steps from ``first_step`` on, which a killed run logged after its last checkpoint.

        Called once everything that could refuse the run has been checked, so that a refused run changes nothing.
        """
        if not self._writes:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self._result.unlink(missing_ok=True)
        (self.folder / "config.yaml").write_text(self.config.to_yaml(), encoding="utf-8")
        document = {"config": self.config.model_dump(mode="json"), "versions": versions(), **(details or {})}
        (self.folder / "run.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        for file, last in (
            (self._metrics, first_step - 1),
            (self._epochs, first_step - 1),
            (self._validations, first_step),
        ):
            lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
            kept = [line for line in lines if line.strip() and json.loads(line)["step"] <= last]
            file.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        self._trackers = Trackers(open_trackers(self.folder, self.config))

    def log(self, step: int, values: Mapping[str, float], samples: Mapping[str, Sequence[float]] | None = None) -> None:
        """Write one line to ``metrics.jsonl`` and the same scalars to TensorBoard; ``samples`` become histograms there."""
        self._write(self._metrics, {"step": step, **values})
        self._show(step, values)
        for name, numbers in (samples or {}).items():
            self._trackers.histogram(step, name, numbers)

    def log_epoch(self, epoch: int, step: int, values: Mapping[str, float]) -> None:
        """Write one line to ``epochs.jsonl``, and the same scalars to TensorBoard; ``step`` is the epoch's last."""
        self._write(self._epochs, {"epoch": epoch, "step": step, **values})
        self._show(step, {f"epoch/{name}": value for name, value in values.items()})

    def log_validation(self, steps_done: int, values: Mapping[str, float]) -> None:
        """Write one line to ``validation.jsonl``, and the same scalars to TensorBoard."""
        self._write(self._validations, {"step": steps_done, **values})
        self._show(steps_done, {f"val/{name}": value for name, value in values.items()})

    def show_pictures(self, steps_done: int, files: Sequence[Path]) -> None:
        """Show PNG files where figures are shown."""
        for number, file in enumerate(files):
            self._trackers.image(steps_done, f"painted/{number}", _read_png(file))

    def end(self, result: TrainingResult) -> None:
        """Write ``result.json``: this training has ended, and what it came to."""
        if self._writes:
            write_json_whole(self._result, result.document())

    def _write(self, file: Path, document: Mapping[str, float]) -> None:
        if self._writes:
            with file.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(document) + "\n")

    def _show(self, step: int, values: Mapping[str, float]) -> None:
        self._trackers.scalars(step, values)

    def close(self) -> None:
        """Flush the logs."""
        self._trackers.close()


def read_metrics(folder: str | Path) -> list[dict[str, float]]:
    """The logged steps of a run, in order."""
    return _read_lines(Path(folder) / "metrics.jsonl")


def read_epochs(folder: str | Path) -> list[dict[str, float]]:
    """The epochs of a run that have ended, in order."""
    return _read_lines(Path(folder) / "epochs.jsonl")


def read_validations(folder: str | Path) -> list[dict[str, float]]:
    """The validations of a run, in order; ``step`` is how many steps were done."""
    return _read_lines(Path(folder) / "validation.jsonl")


def _read_png(path: Path) -> NDArray[np.uint8]:
    """A picture as uint8 [rows, columns, 3]."""
    from PIL import Image

    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def _read_lines(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def versions() -> dict[str, str]:
    """What made a result: our version and those of Python and the packages that compute."""
    import monai

    return {
        "ftengine": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "monai": str(monai.__version__),
        "numpy": np.__version__,
        "machine": platform.machine(),
    }


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
