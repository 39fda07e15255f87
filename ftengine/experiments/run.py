"""Running an experiment: find its stores, cut its plan into units, do those that are missing, collect what is done."""

import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from typing_extensions import override

from ftengine.errors import ConfigError
from ftengine.experiments import collect
from ftengine.experiments.folder import LOCK, PLAN, failure_of, is_done, note_failure, only_one, read_result, write_unit
from ftengine.experiments.plan import Plan, choose
from ftengine.experiments.schedule import Crew, Job, Outcome, Watcher, run_jobs
from ftengine.experiments.stores import (
    draw_phantoms,
    find_stores,
    keep_paths,
    known_stores,
    make_subset,
    open_stores,
    tasks_with_stores,
)
from ftengine.experiments.units import Unit, Work, cut
from ftengine.files import write_text_whole
from ftengine.store.reader import Store

_WORKER = "ftengine.experiments.worker"
_TRAININGS = ("segmenter", "generator", "student", "calibration")  # kinds that read rows of their own


@dataclass(frozen=True)
class Resources:
    """jobs: units at a time, each a process of ``threads`` CPU threads on ``device``. stop_after_s: begin nothing that would not be done."""

    jobs: int = 1
    threads: int = 1
    device: str = "auto"
    stop_after_s: float | None = None


@dataclass
class Status:
    """What is done of the chosen units, what failed and why, and what is missing; seconds: mean of the done ones by kind."""

    units: dict[str, Unit]
    done: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    steps: dict[str, int] = field(default_factory=dict)

    @property
    def num_open(self) -> int:
        """Units without a result."""
        return len(self.failed) + len(self.missing)

    @property
    def open_steps(self) -> int:
        """Training steps of all units without a result."""
        return sum(self.steps.get(key, 0) for key in (*self.failed, *self.missing))

    def seconds_left(self, jobs: int) -> float | None:
        """Time that the rest takes, if units go on taking as long as those of their kind; None where a kind has none yet."""
        kinds = Counter(self.units[key].kind for key in (*self.failed, *self.missing))
        if any(kind not in self.seconds for kind in kinds):
            return None
        return sum(self.seconds[kind] * number for kind, number in kinds.items()) / jobs

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "done": self.done,
            "failed": self.failed,
            "missing": self.missing,
            "titles": {key: unit.title for key, unit in self.units.items()},
            "mean_seconds": self.seconds,
            "open_steps": self.open_steps,
        }


@dataclass(frozen=True)
class Experiment:
    """A plan with its stores, cut up. chosen: the units asked for. everything: those of the whole plan, as far as its stores are known."""

    plan: Plan
    folder: Path
    stores: Mapping[str, Store]
    paths: Mapping[str, str]
    chosen: Work
    everything: Work

    def status(self) -> Status:
        """What is done of the chosen units."""
        status = Status(self.chosen.units, steps={k: _num_steps(u) for k, u in self.chosen.units.items()})
        seconds: dict[str, list[float]] = {}
        for key, unit in self.chosen.units.items():
            error = failure_of(self.folder, key)
            if is_done(self.folder, key):
                status.done.append(key)
                result = read_result(self.folder, key)
                if not result["resumed"]:
                    seconds.setdefault(unit.kind, []).append(result["seconds"])
            elif error is not None:
                status.failed[key] = error
            else:
                status.missing.append(key)
        status.seconds = {kind: statistics.fmean(values) for kind, values in seconds.items()}
        return status


@contextmanager
def opened(
    plan: Plan,
    folder: Path,
    *,
    given: Mapping[str, str],
    tasks: Sequence[str] = (),
    methods: Sequence[str] = (),
    folds: Sequence[int] = (),
    writes: bool = True,
    known_only: bool = False,
) -> Iterator[Experiment]:
    """An experiment whose stores are found and whose plan is cut. writes: false leaves the folder as it is; phantoms are drawn elsewhere.
    known_only: without ``tasks``, only those whose stores are known, and only what these hold.

    Raises ConfigError where a store, data set or name is missing, or the folder holds something else; StoreError where a store is damaged.
    """
    folder = folder.resolve()
    _check_folder(folder)
    known = tasks_with_stores(plan, known_stores(plan, folder, given))
    choice = choose(plan, tasks=tasks or (known if known_only else ()), methods=methods, folds=folds)
    find_stores(plan, choice.tasks, folder, given)
    paths = find_stores(plan, known, folder, given)
    with tempfile.TemporaryDirectory(prefix="ftengine-experiment-") as scratch:
        stores = open_stores(plan, draw_phantoms(plan, folder, paths, None if writes else Path(scratch)))
        chosen = cut(plan, choice, stores, leave_out=known_only)
        everything = cut(plan, replace(choose(plan), tasks=tuple(known)), stores, leave_out=True)
        yield Experiment(plan, folder, stores, paths, chosen, everything)


def run_experiment(
    experiment: Experiment, resources: Resources, *, watcher: Watcher | None = None
) -> tuple[Outcome, collect.Results]:
    """Do the chosen units that are missing, failed ones again, then collect everything that is done into the folder's tables.

    Raises ConfigError where another process runs this experiment, and what ``run_jobs`` raises.
    """
    folder = experiment.folder
    folder.mkdir(parents=True, exist_ok=True)
    with only_one(folder) as lock:
        _keep(experiment)
        for key, unit in experiment.chosen.units.items():
            if not is_done(folder, key):
                write_unit(folder, unit.document())
        for key in _subsets_needed(experiment):
            rows = experiment.chosen.rows[key]
            make_subset(folder, experiment.stores[rows.store], rows)
        jobs = [Job(u.key, u.kind, u.title, u.needs, {"key": u.key}) for u in experiment.chosen.units.values()]
        crew = Crew(
            [sys.executable, "-m", _WORKER, str(folder), resources.device, "--lock", str(lock)],
            folder / "logs",
            resources.jobs,
            resources.threads,
            keep_fds=(lock,),
        )
        outcome = run_jobs(
            jobs,
            crew,
            is_done=lambda key: is_done(folder, key),
            stop_after_s=resources.stop_after_s,
            watcher=_Noting(folder, watcher or Watcher()),
        )
        results = collect.collect(folder)
        collect.write_results(folder, results)
    return outcome, results


class _Noting(Watcher):
    """Writes down why units failed, and passes everything on."""

    def __init__(self, folder: Path, inner: Watcher) -> None:
        self._folder, self._inner = folder, inner

    @override
    def started(self, job: Job) -> None:
        self._inner.started(job)

    @override
    def advanced(self, job: Job, fraction: float, text: str) -> None:
        self._inner.advanced(job, fraction, text)

    @override
    def ended(self, job: Job, seconds: float, error: str | None) -> None:
        note_failure(self._folder, job.key, error)
        self._inner.ended(job, seconds, error)

    @override
    def stopped(self, job: Job) -> None:
        note_failure(self._folder, job.key, None)
        self._inner.stopped(job)


def _check_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder}: is a file; want a folder for the experiment.")
    # a first call that was killed early leaves stores alone
    if (
        folder.is_dir()
        and not (folder / PLAN).exists()
        and any(p.name not in {"stores", LOCK} for p in folder.iterdir())
    ):
        raise ConfigError(f"{folder}: is not empty and holds no experiment; choose another --out.")


def _keep(experiment: Experiment) -> None:
    """What the folder must know of its plan."""
    plan = yaml.safe_dump(experiment.plan.model_dump(mode="json", exclude_defaults=True), sort_keys=False)
    write_text_whole(experiment.folder / PLAN, plan)
    keep_paths(experiment.folder, experiment.paths)
    collect.keep_scores(experiment.folder, experiment.everything.scores)


def _subsets_needed(experiment: Experiment) -> list[str]:
    """Keys of the rows that units without a result read."""
    units = experiment.chosen.units
    needed = [u.spec["store"] for k, u in units.items() if u.kind in _TRAININGS and not is_done(experiment.folder, k)]
    return list(dict.fromkeys(needed))


def _num_steps(unit: Unit) -> int:
    """Training steps of a unit."""
    if unit.kind in {"segmenter", "student"}:
        return int(unit.spec["config"]["training"]["steps"])
    return int(unit.spec["config"]["generator_training"]["steps"]) if unit.kind == "generator" else 0
