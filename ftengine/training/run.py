"""What both training stages share: the run's folder, its logs, the loop over steps, the learning rate, and stopping cleanly."""

import json
import math
import platform
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from ftengine import __version__
from ftengine.config import Config
from ftengine.errors import ConfigError
from ftengine.loader.loader import Loader
from ftengine.loader.nvtx import nvtx_range
from ftengine.training.guards import Guards
from ftengine.training.ledger import PatchLedger
from ftengine.training.stall import StallMeter, StallReport
from ftengine.training.trackers import Trackers, check_trackers, open_trackers
from ftengine.types import Batch

CHECKPOINT = "checkpoint.pt"
Progress: TypeAlias = Callable[[int, dict[str, float]], None]  # steps done so far; figures of a logged step, else empty


def ignore_warning(_text: str) -> None:
    """What becomes of warnings where nobody shows them: the result of the run still holds them."""


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
    bad_reads: failed reads of each volume that could not be read, since the last start or resume.
    """

    checkpoint: Path
    steps: int
    losses: list[float]
    speed: StallReport
    quality: dict[str, Any] = field(default_factory=dict)
    mix: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    bad_reads: dict[str, int] = field(default_factory=dict)
    interrupted: bool = False

    @property
    def stall(self) -> dict[str, float]:
        """The stall meter's plain figures, by name."""
        return self.speed.figures()


class Run:
    """The folder of a training run: ``config.yaml``, ``run.json``, ``checkpoint.pt``, and its logs.

    ``metrics.jsonl`` has a line for each logged step and, in a run that paints, ``epochs.jsonl`` one for each epoch that has ended;
    ``tensorboard/`` has both, figures of epochs with the prefix ``epoch/``.
    """

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
        check_trackers(config)
        self.config = config
        self._metrics = self.folder / "metrics.jsonl"
        self._epochs = self.folder / "epochs.jsonl"
        self._trackers = Trackers([])

    def begin(self, first_step: int, details: Mapping[str, Any] | None = None) -> None:
        """Write what describes the run (``details`` goes to ``run.json``, too), and drop logged steps from ``first_step`` on, which a killed run logged after its last checkpoint.

        Called once everything that could refuse the run has been checked, so that a refused run changes nothing.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "config.yaml").write_text(self.config.to_yaml(), encoding="utf-8")
        document = {"config": self.config.model_dump(mode="json"), "versions": versions(), **(details or {})}
        (self.folder / "run.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        for file in (self._metrics, self._epochs):
            lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
            kept = [line for line in lines if line.strip() and json.loads(line)["step"] < first_step]
            file.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        self._trackers = Trackers(open_trackers(self.folder, self.config))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write one line to ``metrics.jsonl`` and the same scalars to TensorBoard."""
        self._write(self._metrics, {"step": step, **values})
        self._show(step, values)

    def log_epoch(self, epoch: int, step: int, values: Mapping[str, float]) -> None:
        """Write one line to ``epochs.jsonl``, and the same scalars to TensorBoard; ``step`` is the epoch's last."""
        self._write(self._epochs, {"epoch": epoch, "step": step, **values})
        self._show(step, {f"epoch/{name}": value for name, value in values.items()})

    def _write(self, file: Path, document: Mapping[str, float]) -> None:
        with file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(document) + "\n")

    def _show(self, step: int, values: Mapping[str, float]) -> None:
        self._trackers.scalars(step, values)

    def show_image(self, step: int, name: str, picture: NDArray[np.uint8]) -> None:
        """Show a picture, uint8 [rows, columns, 3], where figures are shown."""
        self._trackers.image(step, name, picture)

    def close(self) -> None:
        """Flush the logs."""
        self._trackers.close()


def read_metrics(folder: str | Path) -> list[dict[str, float]]:
    """The logged steps of a run, in order."""
    return _read_lines(Path(folder) / "metrics.jsonl")


def read_epochs(folder: str | Path) -> list[dict[str, float]]:
    """The epochs of a run that have ended, in order."""
    return _read_lines(Path(folder) / "epochs.jsonl")


def _read_lines(path: Path) -> list[dict[str, float]]:
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
    ledger: PatchLedger | None = None,
    warn: Callable[[str], None] = ignore_warning,
    guards: Guards | None = None,
) -> tuple[int, StallReport]:
    """Run training steps ``first_step`` to ``steps``; returns how many are done in all, and what the stall meter says.

    ``train_step(batch, step)`` does one step and returns a function that gives its figures, which is called for logged steps only, so
    that other steps need not wait for the device. ``save`` is called every ``checkpoint_every`` steps and at the end. ``ledger`` counts
    each batch before its step and may stop the run with RejectionError; ``warn`` gets its warnings when they come up, the loader's
    notes, and the names of volumes that could not be read; ``guards`` looks at every logged line. SIGINT and SIGTERM finish the step and save.
    """
    meter = StallMeter(loader)
    step = first_step
    bad_cases: set[str] = set()
    for note in loader.notes:
        warn(note)
    try:
        with stopping_on_signals() as stop:
            while step < steps and not stop:
                epoch = loader.epoch
                for batch in _arriving(loader):
                    meter.arrived()
                    warning = None if ledger is None else ledger.count(batch)
                    if warning is not None:
                        warn(warning)
                    for case in sorted(loader.failures.by_case().keys() - bad_cases):
                        bad_cases.add(case)
                        warn(f"{case} could not be read and is skipped; 'ftengine store verify' says why")
                    saved = (
                        step + 1
                    ) % checkpoint_every == 0  # logged too: figures() refuses a diverged run before it is saved
                    logged = (step + 1) % log_every == 0 or saved or step + 1 == steps
                    with nvtx_range("training step"):
                        figures = train_step(batch, step)
                        values = figures() if logged else {}
                    meter.stepped()
                    if logged:
                        values |= meter.take_line() | ({} if ledger is None else ledger.take_line())
                        values["loader/bad_reads"] = float(loader.failures.num_bad)
                        values["epoch"] = float(epoch)
                        values = _finite(values)
                        run.log(step, values)
                        if guards is not None:
                            guards.watch(step, values)
                    if ledger is not None and loader.epoch != epoch:
                        run.log_epoch(epoch, step, _finite(ledger.take_epoch()))
                    step += 1
                    on_step(step, values)
                    if saved and step < steps:
                        with meter.saving():
                            save(step)
                    if step >= steps or stop:
                        break
            with meter.saving():
                save(step)
            report = meter.report(
                run.config, loader.plan.batch_size, draws_a_patch=1.0 if ledger is None else ledger.draws_a_patch
            )
    finally:
        loader.close()
        run.close()
    return step, report


def _arriving(loader: Loader) -> Iterator[Batch]:
    """The batches to the end of the epoch; a profiler sees the time in which training waits for one."""
    batches = iter(loader)
    while True:
        with nvtx_range("wait for data"):
            batch = next(batches, None)
        if batch is None:
            return
        yield batch


def _finite(values: Mapping[str, float]) -> dict[str, float]:
    """What has a value: JSON knows no NaN."""
    return {name: value for name, value in values.items() if math.isfinite(value)}


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
