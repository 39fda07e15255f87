"""The one training loop of both stages: batches, steps, logs, validation, checkpoints, resuming, several processes.

A stage is a ``Procedure``: what it does with a batch and with a step. Everything else is here.
"""

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from ftengine.config import Config
from ftengine.errors import ConfigError
from ftengine.loader.loader import Loader
from ftengine.loader.nvtx import nvtx_range
from ftengine.training.checkpoint import WEIGHTS, Kind, load_checkpoint, save_checkpoint, save_weights
from ftengine.training.distributed import ALONE, World
from ftengine.training.guards import Guards
from ftengine.training.init_weights import InitReport
from ftengine.training.ledger import PatchLedger
from ftengine.training.memory import explaining_memory
from ftengine.training.replay import NO_SOURCES, Sources
from ftengine.training.resume import Change, check_changes, loader_state, resume_notes, run_details
from ftengine.training.run import (
    CHECKPOINT,
    Progress,
    Run,
    Schedule,
    StopRequest,
    TrainingResult,
    ignore_warning,
    stopping_on_signals,
)
from ftengine.training.stall import StallMeter
from ftengine.training.validation import DICE, Validation, validate
from ftengine.types import Batch, PatchRecord

Pictures = Callable[[nn.Module, Path], Sequence[Path]]  # the network and a folder -> PNG files there


@dataclass(frozen=True)
class Done:
    """What came of a step. losses: of this process's patches, detached, of one element each, on the device.

    figures: what is logged, over all processes; called for logged steps only, so that others need not wait for the device.
    """

    losses: dict[str, torch.Tensor]
    figures: Callable[[], dict[str, float]]


class Procedure(Protocol):
    """A stage: what it does with a batch and with a step, and what it keeps. All processes call its methods alike."""

    kind: Kind
    main_loss: str  # name of the figure that stands for the run

    def add(self, batch: Batch) -> None:
        """Forward and backward of one batch of the step."""
        ...

    def update(self, rate: float) -> Done:
        """End the step: update the weights."""
        ...

    def samples(self) -> dict[str, list[float]]:
        """Numbers since the last call whose distribution is logged, by name; called after the figures of a logged step."""
        ...

    @property
    def product(self) -> nn.Module:
        """The network that the stage is for."""
        ...

    def spread(self) -> None:
        """Give every process the weights of rank 0."""
        ...

    def contents(self) -> dict[str, Any]:
        """What a checkpoint holds of it: "model", the weights of the product, and everything else to go on with."""
        ...

    def load_contents(self, document: Mapping[str, Any]) -> None:
        """Go on where ``contents`` was taken; the product holds its weights already."""
        ...


@dataclass(frozen=True)
class Frame:
    """Where a stage is trained and who watches, whichever stage it is.

    identity: what else decides the result, by option of the command line. allow: differences that a resumed run may have
    (``training.resume``). sources: where the patches come from, for replay files.
    """

    out: Path
    device: torch.device
    resume: bool = False
    on_step: Progress = lambda _step, _values: None
    warn: Callable[[str], None] = ignore_warning
    identity: Mapping[str, str] = field(default_factory=dict)
    allow: Collection[str] = ()
    sources: Sources = NO_SOURCES
    notes: Sequence[str] = ()  # to be told when the run begins
    world: World = ALONE

    def resumed(self, kind: Kind, config: Config, loader: Loader) -> "Resumed | None":
        """The checkpoint that the run goes on from; None for a new run. Raises ConfigError where it does not fit."""
        if not self.resume:
            return None
        path = self.out / CHECKPOINT
        if not path.exists():
            raise ConfigError(
                f"{path}: there is nothing to resume. Start without --resume, or give the folder of a started run."
            )
        document = load_checkpoint(path, kind)
        if "learners" not in document:
            raise ConfigError(
                f"{path}: was written by an older version, whose runs this one cannot go on with. Use it with --init in a new run, or resume "
                "with the version that began it."
            )
        changes = check_changes(
            path, document, kind=kind, config=config, loader=loader, identity=self.identity, allow=self.allow
        )
        return Resumed(path, document, changes)


@dataclass(frozen=True)
class Resumed:
    """Where a run goes on: its checkpoint, and what is allowed to differ from then on."""

    path: Path
    document: Mapping[str, Any]
    changes: tuple[Change, ...]


@dataclass(frozen=True)
class _Word:
    """What the processes tell each other at each batch."""

    stop: bool
    records: list[PatchRecord]
    bad_cases: frozenset[str]


class Trainer:
    """Trains a procedure from its first step, or the checkpoint's, to its last."""

    def __init__(
        self,
        config: Config,
        procedure: Procedure,
        loader: Loader,
        frame: Frame,
        schedule: Schedule,
        *,
        resumed: Resumed | None = None,
        ledger: PatchLedger | None = None,
        validation: Validation | None = None,
        pictures: Pictures | None = None,
        pictures_every: int | None = None,
        initial: InitReport | None = None,
    ) -> None:
        """resumed: of ``Frame.resumed``. ledger: counts each batch before its step and may stop the run with RejectionError. initial: what
        became of the weights that a new run starts from.

        Raises ConfigError where the run cannot be begun or gone on with; nothing has been written then.
        """
        self._config, self._procedure, self._loader = config, procedure, loader
        self._frame, self._schedule, self._world = frame, schedule, frame.world
        self._ledger, self._validation = ledger, validation
        self._pictures, self._pictures_every = pictures, pictures_every
        self._initial, self._resumed = initial, resumed
        self._run = Run(frame.out, config, resume=frame.resume, writes=self._world.is_main)
        self._step, self._losses, self._best = 0, list[float](), dict[str, float]()
        self._rng: list[dict[str, torch.Tensor | None]] | None = None
        self._validated_at = -1
        self._bad_cases: set[str] = set()
        self._said: list[str] = []  # since the last start or resume
        self._meter = StallMeter(loader)
        self._guards = Guards(
            procedure.kind,
            config,
            self._run.folder,
            checkpoint=self._run.checkpoint,
            sources=frame.sources,
            gate=None if ledger is None else ledger.gate,
            warn=frame.warn if self._world.is_main else ignore_warning,
            gather=self._world.gather,
            rank=self._world.rank,
            main_loss=procedure.main_loss,
        )
        if resumed is not None:
            self._load(resumed)

    def train(self) -> TrainingResult:
        """Run the steps that are left. SIGINT and SIGTERM, to any process, let all finish the same step and save.

        Raises DivergedError where a loss is no number, RejectionError, MemoryLimitError and SaveError.
        """
        with explaining_memory(self._procedure.kind, self._config, self._frame.out, self._frame.device):
            return self._train()

    def _train(self) -> TrainingResult:
        self._procedure.spread()
        resumed = self._resumed
        document, changes = (None, ()) if resumed is None else (resumed.document, resumed.changes)
        if self._world.is_main:
            details = run_details(self._run.folder, self._frame.identity, document, changes)
            details["kind"] = self._procedure.kind
            if self._initial is not None:
                details["init"] = self._initial.document()
            self._run.begin(self._step, details)
        self._say_what_began()
        try:
            with self._own_randomness(), stopping_on_signals() as stop:
                self._take_steps(stop)
                if self._step == self._schedule.steps and self._validated_at != self._step:
                    self._validate()
                self._save()
            report = self._meter.report(
                self._config,
                self._loader.plan.batch_size,
                draws_a_patch=1.0 if self._ledger is None else self._ledger.draws_a_patch,
            )
        finally:
            self._loader.close()
            self._run.close()
        if self._step == self._schedule.steps and self._world.is_main:
            weights = self._procedure.product.state_dict()
            path = self._run.folder / WEIGHTS
            save_weights(path, self._procedure.kind, self._config, weights, identity=self._identity)
        bad_reads = Counter[str]()
        for counts in self._world.gather(self._loader.failures.by_case()):
            bad_reads.update(counts)
        ledger = self._ledger
        result = TrainingResult(
            self._run.checkpoint,
            self._step,
            self._losses,
            report,
            quality={} if ledger is None else ledger.gate.summary(),
            mix={} if ledger is None else ledger.summary(),
            warnings=[*([] if ledger is None else ledger.warnings), *self._guards.warnings, *self._said],
            bad_reads=dict(bad_reads),
            interrupted=self._step < self._schedule.steps,
            best=self._best,
            init="" if self._initial is None else self._initial.line(),
        )
        self._run.end(result)
        return result

    def _say_what_began(self) -> None:
        initial = self._initial
        if initial is not None and (initial.skipped or initial.missing):
            self._warn(f"--init {initial.line()}")
        resumed = self._resumed
        notes = () if resumed is None else resume_notes(resumed.document, resumed.changes)
        for note in (*self._frame.notes, *notes, *self._loader.notes):
            self._warn(note)

    def _warn(self, text: str) -> None:
        """Say something once for all processes; the result holds it, too."""
        self._said.append(text)
        if self._world.is_main:
            self._frame.warn(text)

    @property
    def _identity(self) -> dict[str, str]:
        """What decides the result beside the configuration: as the run began, and as it goes on."""
        began = {} if self._resumed is None else self._resumed.document["identity"]
        return {**began, **self._frame.identity}

    # ---- the loop ----

    def _take_steps(self, stop: StopRequest) -> None:
        if self._step >= self._schedule.steps:
            return
        part, epoch_before = 0, self._loader.epoch
        for batch in self._arriving():
            self._meter.arrived()
            stopping = self._take_note(batch, stop)
            part += 1
            is_whole = part == self._schedule.accumulate
            self._guards.arrived(batch)
            with nvtx_range("training step"):
                self._procedure.add(batch)
                values = self._end_step() if is_whole else {}
            self._meter.stepped()
            epoch_ended = self._loader.epoch != batch.records[0].request.epoch
            if is_whole:
                part = 0
                self._log(values, batch.records[0].request.epoch)
                self._step += 1
            if epoch_ended and self._ledger is not None:
                last = self._step - is_whole
                self._run.log_epoch(batch.records[0].request.epoch, last, _finite(self._ledger.take_epoch()))
            if not is_whole:
                continue
            self._frame.on_step(self._step, values)
            self._between_steps(epoch_before)
            epoch_before = self._loader.epoch
            if self._step >= self._schedule.steps or (stopping if self._world.size > 1 else bool(stop)):
                return

    def _arriving(self) -> Iterator[Batch]:
        """Batches of one epoch after the other; a profiler sees the time in which training waits for one."""
        while True:
            batches = iter(self._loader)
            while True:
                with nvtx_range("wait for data"):
                    batch = next(batches, None)
                if batch is None:
                    break
                yield batch

    def _take_note(self, batch: Batch, stop: StopRequest) -> bool:
        """Count the batches of all processes and warn; returns whether any process was asked to stop."""
        records = [] if self._ledger is None else batch.records
        words = self._world.gather(_Word(bool(stop), records, frozenset(self._loader.failures.by_case())))
        if self._ledger is not None:
            together = sorted((r for word in words for r in word.records), key=lambda r: r.request.index)
            warning = self._ledger.count(Batch(batch.image, batch.label, together))
            if warning is not None and self._world.is_main:
                self._frame.warn(warning)
        bad_cases = {case for word in words for case in word.bad_cases}
        for case in sorted(bad_cases - self._bad_cases):
            self._warn(f"{case} could not be read and is skipped; 'ftengine store verify' says why")
        self._bad_cases |= bad_cases
        return any(word.stop for word in words)

    def _end_step(self) -> dict[str, float]:
        """Update the weights; the figures of a logged step, else nothing."""
        rate = self._schedule.rate(self._step)
        done = self._procedure.update(rate)
        self._guards.step(self._step, done.losses)
        if not self._is_logged():
            return {}
        self._guards.check()
        values = done.figures()
        self._losses.append(values.get(self._procedure.main_loss, math.nan))
        return values | {"learning_rate": rate}

    def _is_logged(self) -> bool:
        done = self._step + 1  # steps that are saved too: a diverged run is refused before it is saved
        schedule = self._schedule
        return done % schedule.log_every == 0 or done % schedule.checkpoint_every == 0 or done == schedule.steps

    def _log(self, values: dict[str, float], epoch: int) -> None:
        """Complete the figures of a logged step, write them, and look at them."""
        if not values:
            return
        values |= self._meter.take_line() | ({} if self._ledger is None else self._ledger.take_line())
        values["loader/bad_reads"] = float(sum(self._world.gather(self._loader.failures.num_bad)))
        values["epoch"] = float(epoch)
        kept = _finite(values)
        values.clear()
        values.update(kept)
        self._run.log(self._step, values, self._procedure.samples())
        self._guards.watch(self._step, values)

    def _between_steps(self, epoch_before: int) -> None:
        """Pictures, validation and a checkpoint, where they are due after ``self._step`` steps. epoch_before: at the end of the last one."""
        step, schedule = self._step, self._schedule
        if self._pictures is not None and self._pictures_every is not None and step % self._pictures_every == 0:
            self._draw()
        if self._is_validation_due(epoch_before):
            self._validate()
        if step % schedule.checkpoint_every == 0 and step < schedule.steps:
            self._save()

    # ---- validation and pictures ----

    def _is_validation_due(self, epoch_before: int) -> bool:
        every = self._config.training.validate_every
        if every is None:
            return self._step % self._schedule.checkpoint_every == 0
        if self._config.training.validate_unit == "epochs":
            return self._loader.epoch // every > epoch_before // every  # a step may reach over several epochs
        return self._step % every == 0

    def _validate(self) -> None:
        """Score the product, log it, and keep it in ``best.pt`` where it is the best so far."""
        if self._validation is None:
            return
        self._guards.check()
        with self._meter.saving("validate"):
            figures = validate(self._validation, self._procedure.product, self._world)
            self._validated_at = self._step
            self._run.log_validation(self._step, figures)
            if self._best and figures[DICE] <= self._best[DICE]:
                return
            self._best = {"step": self._step, DICE: figures[DICE]}
            if self._world.is_main:
                contents = {
                    "model": self._procedure.product.state_dict(),
                    "step": self._step,
                    "best": self._best,
                    "identity": self._identity,
                }
                save_checkpoint(self._run.best, self._procedure.kind, self._config, contents)

    def _draw(self) -> None:
        if self._pictures is not None and self._world.is_main:
            with self._meter.saving("pictures"):
                files = self._pictures(self._procedure.product, self._run.pictures / f"step-{self._step:07d}")
                self._run.show_pictures(self._step, files)

    # ---- state ----

    def _save(self) -> None:
        self._guards.check()  # a run that is stopped between two logged steps may have diverged
        with self._meter.saving():
            rng = self._world.gather(_rng_state(self._frame.device))
            if not self._world.is_main:
                return
            contents = {
                **self._procedure.contents(),
                "loader": self._loader.state_dict(),
                "step": self._step,
                "losses": self._losses,
                "best": self._best,
                "ledger": None if self._ledger is None else self._ledger.state_dict(),
                "guards": self._guards.state_dict(),
                "rng": rng,
                "validated_at": self._validated_at,
                "identity": self._identity,
            }
            keep = self._schedule.keep_checkpoints
            save_checkpoint(self._run.checkpoint, self._procedure.kind, self._config, contents, keep=keep)

    def _load(self, resumed: Resumed) -> None:
        document = resumed.document
        self._procedure.load_contents(document)
        if self._ledger is not None and document.get("ledger") is not None:  # a run may have begun without
            self._ledger.load_state_dict(document["ledger"])
        self._guards.load_state_dict(document.get("guards"))
        self._loader.load_state_dict(loader_state(document, self._loader, resumed.changes))
        self._step, self._losses, self._best = document["step"], list(document["losses"]), dict(document["best"])
        self._rng, self._validated_at = document["rng"], document["validated_at"]

    @contextmanager
    def _own_randomness(self) -> Iterator[None]:
        """Inside the block torch's global generators are the run's own, for networks that draw (drop-out): seeded, saved and resumed."""
        device, rank = self._frame.device, self._world.rank
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed((self._config.seed * 1_000_003 + rank) % 2**63)
            if self._rng is not None and rank < len(self._rng):
                _set_rng_state(self._rng[rank], device)
            yield


def _finite(values: Mapping[str, float]) -> dict[str, float]:
    """What has a value: JSON knows no NaN."""
    return {name: value for name, value in values.items() if math.isfinite(value)}


def _rng_state(device: torch.device) -> dict[str, torch.Tensor | None]:
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None}


def _set_rng_state(state: Mapping[str, torch.Tensor | None], device: torch.device) -> None:
    if state["cpu"] is not None:
        torch.set_rng_state(state["cpu"])
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
