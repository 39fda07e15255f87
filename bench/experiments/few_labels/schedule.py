"""The units as jobs of ``ftengine.experiments.schedule``, which runs them in worker processes."""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from typing_extensions import override

from ftengine.bench.experiments.few_labels.units import Unit, is_done, result_file
from ftengine.experiments.schedule import Crew, Job, Outcome, Watcher, run_jobs

_WORKER = "ftengine.bench.experiments.few_labels.worker"


def run_units(
    folder: Path,
    units: Sequence[Unit],
    *,
    jobs: int,
    device: str = "auto",
    threads: int = 1,
    stop_after_s: float | None = None,
    say: Callable[[str], None] = lambda _text: None,
) -> Outcome:
    """Do the units that have no result yet in ``jobs`` processes of ``threads`` threads each, as ``run_jobs``; by slug, ``say`` gets a line a unit."""
    crew = Crew([sys.executable, "-m", _WORKER, str(folder), device], folder / "logs", jobs, threads)
    work = [Job(u.slug, u.kind, u.slug, tuple(n.slug for n in u.needs), asdict(u)) for u in units]
    watcher = _Lines(sum(not is_done(folder, unit) for unit in units), say)
    return run_jobs(
        work,
        crew,
        is_done=lambda slug: result_file(folder, slug).is_file(),
        stop_after_s=stop_after_s,
        watcher=watcher,
    )


class _Lines(Watcher):
    def __init__(self, num: int, say: Callable[[str], None]) -> None:
        self._num, self._say, self._num_ended, self._started = num, say, 0, time.monotonic()

    @override
    def ended(self, job: Job, seconds: float, error: str | None) -> None:
        self._num_ended += 1
        text = f"{seconds:.0f} s" if error is None else f"failed: {error}"
        self._say(
            f"[{self._num_ended}/{self._num}] {job.title}: {text}  ({time.monotonic() - self._started:.0f} s in all)"
        )
