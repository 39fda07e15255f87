"""The stall meter: how long training waited for data, which part of the way is the slowest, and what would make it faster."""

import os
import statistics
import time
from array import array
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from ftengine.config import Config
from ftengine.loader.nvtx import nvtx_range
from ftengine.loader.stages import BusyClock

TRAINING = "training"
READS, PREPARE, DEVICE = "reads", "prepare", "stages on the device"
_WAIT = "wait for "  # how the loader's clock names times without work
_WAITED_FOR_READS = "wait for reads"  # by the thread that prepares
_WAITED_FOR_STAGES = "wait for stages"  # by the same thread, with a prepared batch in its hands
_WAITED_FOR_DEVICE = "wait for the device"  # by the thread of the stages, whose kernels are at work
_NOTICEABLE = 0.01  # a smaller share of waiting is not worth a change
_MANY_DRAWS = 1.2  # from which redraws are worth a word
_READS_BIND = 0.1  # share of the time that the next part waits for reads, from which they set the pace


class MeteredLoader(Protocol):
    """What the meter asks of a loader. Its threads may work on while it is asked."""

    last_wait_s: float
    clock: BusyClock

    def levels(self) -> dict[str, int]:
        """How full each queue is, by name, in the order in which data pass them."""
        ...

    def capacities(self) -> dict[str, int]:
        """How much each queue of ``levels`` can hold."""
        ...


@dataclass(frozen=True)
class Part:
    """A part of the way from the store to the weights.

    busy_s: seconds of the host's clock in which it worked, for reads in which at least one was under way; share: of the time that
    training took. queue: name of the queue it takes from, None where it has none of its own; level: the mean fill of that queue.
    """

    name: str
    busy_s: float
    share: float
    queue: str | None
    level: float | None


@dataclass(frozen=True)
class StallReport:
    """The figures of a run, from its first batch to its last step; start-up and saving are apart and in no other figure.

    wall_s = wait_s + compute_s + other_s: waiting for batches, training steps, and what lies between steps (logs, progress). waits: how
    long threads of the loader stood still, by reason. levels: mean fill of each queue at the ends of steps; capacities: their bounds.
    """

    num_steps: int
    batch_size: int
    wall_s: float
    wait_s: float
    compute_s: float
    save_s: float
    start_s: float
    median_wait_s: float
    max_wait_s: float
    median_step_s: float
    parts: tuple[Part, ...]
    waits: dict[str, float]
    levels: dict[str, float]
    capacities: dict[str, int]
    slowest: str
    advice: str

    @property
    def other_s(self) -> float:
        """Time between steps that was neither waiting nor saving."""
        return max(0.0, self.wall_s - self.wait_s - self.compute_s)

    @property
    def wait_fraction(self) -> float:
        """Share of the time that training waited for data."""
        return self.wait_s / self.wall_s if self.wall_s > 0 else 0.0

    def figures(self) -> dict[str, float]:
        """The plain numbers, by name."""
        return {
            "wait_fraction": self.wait_fraction,
            "median_wait_s": self.median_wait_s,
            "max_wait_s": self.max_wait_s,
            "median_step_s": self.median_step_s,
            "patches_per_s": self.batch_size * self.num_steps / self.wall_s if self.wall_s > 0 else 0.0,
            "wall_s": self.wall_s,
            "wait_s": self.wait_s,
            "compute_s": self.compute_s,
            "other_s": self.other_s,
            "save_s": self.save_s,
            "loader_start_s": self.start_s,
            "num_steps": float(self.num_steps),
        }

    def document(self) -> dict[str, Any]:
        """All of it as plain JSON values (docs/stall-meter.md)."""
        return {
            **self.figures(),
            "slowest": self.slowest,
            "advice": self.advice,
            "sentence": self.sentence(),
            "stages": [
                {"name": p.name, "busy_s": p.busy_s, "share": p.share, "queue": p.queue, "mean_level": p.level}
                for p in self.parts
            ],
            "waits_s": self.waits,
            "queues": {
                name: {"mean_level": level, "capacity": self.capacities[name]} for name, level in self.levels.items()
            },
        }

    def sentence(self) -> str:
        """What the figures come to."""
        return (
            f"training waited {self.wait_fraction:.1%} of the time ({self.wait_s:.1f} s of {self.wall_s:.1f} s; start-up {self.start_s:.1f} s and "
            f"saving {self.save_s:.1f} s are apart); the slowest stage is {self.slowest}; {self.advice}"
        )


@dataclass
class _Lap:
    """What was measured since some moment: the whole run, or since the last log line."""

    num_steps: int = 0
    wall_s: float = 0.0
    wait_s: float = 0.0
    compute_s: float = 0.0
    busy_s: dict[str, float] = field(default_factory=dict)
    levels: dict[str, int] = field(default_factory=dict)  # sums over steps


class StallMeter:
    """Measures a run: call ``arrived`` when a batch has come, ``stepped`` when its step is done, and save inside ``saving``.

    The clock starts when the first batch has come: its wait, in which the loader starts, is ``start_s``. From then on every second is in
    one place: waiting for a batch, a step, between steps, or saving.

    On a GPU the host queues work and goes on, so the time of one step is not what the device took for it; a step whose loss is read
    waits for all steps before it. Figures are therefore taken over all steps since the last one that was read (a log line), or over
    the whole run, which ends with one: there waiting and computing add up to the time that passed.
    """

    def __init__(self, loader: MeteredLoader, *, now: Callable[[], float] = time.perf_counter) -> None:
        self._loader, self._now = loader, now
        self.start_s, self.save_s = 0.0, 0.0
        self._waits, self._steps = array("d"), array("d")
        self._step_began = 0.0
        self._run, self._line = _Lap(), _Lap()
        self._mark: float | None = None  # up to when the time has been added
        self._busy: dict[str, float] = {}

    def arrived(self) -> None:
        """A batch has come; how long training waited for it is the loader's ``last_wait_s``."""
        now = self._now()
        if self._mark is None:
            self.start_s = self._loader.last_wait_s
            self._mark, self._busy = now, self._loader.clock.seconds()
            self._waits.append(0.0)
        else:
            self._waits.append(self._loader.last_wait_s)
        self._step_began = now

    def stepped(self) -> None:
        """The step on the batch that came last is done."""
        compute_s = self._now() - self._step_began
        self._steps.append(compute_s)
        self._add_time()
        levels = self._loader.levels()
        for lap in (self._run, self._line):
            lap.num_steps += 1
            lap.wait_s += self._waits[-1]
            lap.compute_s += compute_s
            for name, level in levels.items():
                lap.levels[name] = lap.levels.get(name, 0) + level

    @contextmanager
    def saving(self, what: str = "save") -> Iterator[None]:
        """Time inside the block is saving (or validating), not training; what the loader does meanwhile is not counted either.

        ``what``: its name in a profile.
        """
        self._add_time()
        began = self._now()
        try:
            with nvtx_range(what):
                yield
        finally:
            now = self._now()
            self.save_s += now - began
            if self._mark is not None:
                self._mark, self._busy = now, self._loader.clock.seconds()

    def take_line(self) -> dict[str, float]:
        """Figures of the steps since the last call: means of a step, shares of the time, mean levels of the queues."""
        self._add_time()
        lap, self._line = self._line, _Lap()
        if not lap.num_steps or lap.wall_s <= 0:
            return {}
        return {
            "wait_s": lap.wait_s / lap.num_steps,
            "step_s": lap.wall_s / lap.num_steps,
            "loader/wait_fraction": lap.wait_s / lap.wall_s,
            **{f"loader/level/{name}": level / lap.num_steps for name, level in lap.levels.items()},
            **{_scalar(name): seconds / lap.wall_s for name, seconds in lap.busy_s.items()},
            "loader/save_s": self.save_s,
        }

    def report(self, config: Config, batch_size: int, *, draws_a_patch: float = 1.0) -> StallReport:
        """The figures so far, what is the slowest part, and what to do about it. draws_a_patch: how often a patch was painted, in the mean."""
        run = self._run
        steps = run.num_steps
        levels = {name: total / steps for name, total in run.levels.items()} if steps else {}
        waits = {name: s for name, s in run.busy_s.items() if name.startswith(_WAIT)}
        parts = _parts(run, levels)
        fraction = run.wait_s / run.wall_s if run.wall_s > 0 else 0.0
        slowest = _slowest(parts, waits, run.wall_s, fraction)
        return StallReport(
            num_steps=steps,
            batch_size=batch_size,
            wall_s=run.wall_s,
            wait_s=run.wait_s,
            compute_s=run.compute_s,
            save_s=self.save_s,
            start_s=self.start_s,
            median_wait_s=statistics.median(self._waits) if steps else 0.0,
            max_wait_s=max(self._waits, default=0.0),
            median_step_s=statistics.median(self._steps) if steps else 0.0,
            parts=parts,
            waits=waits,
            levels=levels,
            capacities={name: self._loader.capacities()[name] for name in levels},
            slowest=slowest,
            advice=advice(slowest, fraction, config, draws_a_patch=draws_a_patch),
        )

    def _add_time(self) -> None:
        if self._mark is None:
            return
        now, busy = self._now(), self._loader.clock.seconds()
        for lap in (self._run, self._line):
            lap.wall_s += now - self._mark
            for name, seconds in busy.items():
                lap.busy_s[name] = lap.busy_s.get(name, 0.0) + seconds - self._busy.get(name, 0.0)
        self._mark, self._busy = now, busy


def _scalar(name: str) -> str:
    """The name in the logs of what the loader's clock calls ``name``."""
    return f"loader/waits/{name.removeprefix(_WAIT)}" if name.startswith(_WAIT) else f"loader/busy/{name}"


def _parts(run: _Lap, levels: Mapping[str, float]) -> tuple[Part, ...]:
    """The parts in the order of the data, each with the queue it takes from."""

    def part(name: str, busy_s: float, queue: str | None = None) -> Part:
        share = busy_s / run.wall_s if run.wall_s > 0 else 0.0
        return Part(name, busy_s, share, queue if queue in levels else None, levels.get(queue or ""))

    parts = [part(READS, run.busy_s[READS])] if READS in run.busy_s else []
    if PREPARE in run.busy_s:
        parts.append(part(PREPARE, run.busy_s[PREPARE], "reads"))
    stages = [name for name in run.busy_s if name not in {READS, PREPARE} and not name.startswith(_WAIT)]
    parts += [part(name, run.busy_s[name], "prepared" if name == stages[0] else None) for name in stages]
    if _WAITED_FOR_DEVICE in run.busy_s:
        parts.append(part(DEVICE, run.busy_s[_WAITED_FOR_DEVICE]))
    return (*parts, part(TRAINING, run.compute_s, "ready"))


def _slowest(parts: tuple[Part, ...], waits: Mapping[str, float], wall_s: float, wait_fraction: float) -> str:
    """The part that sets the pace: of the thread that works for the largest share of the time, what takes longest in it.

    Training sets it where it hardly ever waits. Reads set it where the thread that prepares stands still for them: then they never
    pause, but for the time in which that thread cannot hand on what it has.
    """
    if wall_s <= 0 or wait_fraction < _NOTICEABLE:
        return TRAINING
    threads: dict[str, list[Part]] = {READS: [], PREPARE: [], DEVICE: [], TRAINING: []}
    for part in parts:
        threads[part.name if part.name in threads else DEVICE].append(part)
    for_reads, for_stages = (waits.get(name, 0.0) / wall_s for name in (_WAITED_FOR_READS, _WAITED_FOR_STAGES))
    at_work = {name: sum(p.share for p in members) for name, members in threads.items()}
    at_work[READS] = 1.0 - for_stages if for_reads >= _READS_BIND else for_reads
    at_work[TRAINING] = 1.0 - wait_fraction
    slowest = max((name for name, members in threads.items() if members), key=lambda name: at_work[name])
    return max(threads[slowest], key=lambda part: part.share).name


def advice(slowest: str, wait_fraction: float, config: Config, *, draws_a_patch: float = 1.0) -> str:
    """What to do, as a part of a sentence; keys with their present values."""
    if wait_fraction < _NOTICEABLE:
        return "nothing to do: the training step itself sets the pace"
    settings = config.loader
    if slowest == TRAINING:
        return (
            f"batches come unevenly: to go faster raise loader.queue_batches (now {settings.queue_batches}) and loader.reads_in_flight "
            f"(now {settings.reads_in_flight})"
        )
    if slowest == READS:
        return (
            f"to go faster raise loader.reads_in_flight (now {settings.reads_in_flight}) and loader.reader_threads (now "
            f"{settings.reader_threads}, with {os.cpu_count()} cores here), or put the store closer: a disk of this machine in place of a network"
        )
    if slowest == PREPARE:
        cores = f"give this process more cores than the {os.cpu_count()} here"
        on_gpu = config.device != "cpu" and torch.cuda.is_available()
        return f"to go faster {cores}" if on_gpu else f"to go faster prepare patches on a GPU (device=cuda), or {cores}"
    if slowest == DEVICE or slowest.startswith("synthesis"):
        redraws = f"fewer redraws or a generator that convinces the judge (each patch is painted {draws_a_patch:.1f} times; qc.retries, now {config.qc.retries})"
        options = [
            *([redraws] if draws_a_patch >= _MANY_DRAWS else []),
            *_proposal(config, "synthesis.box", "auto", where="full"),
            *_proposal(config, "synthesis.precision", "auto", where="fp32"),
            f"a smaller generator.width (now {config.generator.width}; train G again)",
            f"a lower synthesis.fraction (now {config.synthesis.fraction:g})",
        ]
        return f"to go faster try, in this order: {', '.join(options)}"
    return f"to go faster make the stage {slowest!r} faster: it is not one of ftengine's"


def _proposal(config: Config, key: str, value: str, *, where: str) -> list[str]:
    """``key=value`` where the key is at ``where`` now."""
    section, name = key.split(".")
    now = getattr(getattr(config, section), name)
    return [f"{key}={value} (now {now})"] if now == where else []
