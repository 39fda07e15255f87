"""Scoring in worker processes: what a case needs travels there, its scores come back, and a case that fails takes no other with it."""

import multiprocessing
import os
import signal
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ftengine.config import EvaluationConfig, RegionConfig
from ftengine.errors import CaseError, FailureCode
from ftengine.evaluation.metrics import CaseScore, FullScoring, score_case
from ftengine.evaluation.pairs import Pair
from ftengine.geometry import Grid, grid_offset_vox
from ftengine.store.worker_process import die_with_parent
from ftengine.volume.readers import MAX_LABEL_OFFSET_VOX, read_label
from ftengine.volume.values import shown

Outcome: TypeAlias = tuple[str, CaseScore | CaseError]


class Job(Protocol):
    """One case to score."""

    @property
    def case(self) -> str:
        """Its name."""
        ...

    def run(self) -> CaseScore:
        """Score it. Raises CaseError."""
        ...


@dataclass(frozen=True)
class ScoreFiles:
    """Two label files, read in the worker. label_map, predicted_map: value in the true or predicted file -> value of the region."""

    pair: Pair
    region: RegionConfig
    settings: EvaluationConfig
    label_map: Mapping[int, int]
    predicted_map: Mapping[int, int]

    @property
    def case(self) -> str:
        """Its name."""
        return self.pair.case

    def run(self) -> CaseScore:
        """Read both files and score them on the grid of the truth. Raises CaseError."""
        values = self.region.labels.values()
        truth, truth_grid = read_label(self.pair.truth, label_values=values, label_map=self.label_map)
        predicted, predicted_grid = read_label(
            self.pair.predicted,
            label_values=values,
            label_map=self.predicted_map,
            map_option="--predicted-label-map",
        )
        _refuse_other_grid(self.pair, predicted_grid, truth_grid)
        full = FullScoring(truth_grid.spacing_mm_zyx, self.region.tumor_values, self.settings)
        return score_case(self.case, predicted, truth, self.region.labels, full)


@dataclass(frozen=True)
class ScoreArrays:
    """Two label maps, uint8 [z, y, x] on one grid."""

    case: str
    predicted: NDArray[np.uint8]
    truth: NDArray[np.uint8]
    labels: Mapping[str, int]
    full: FullScoring

    def run(self) -> CaseScore:
        """Score them. Raises CaseError."""
        return score_case(self.case, self.predicted, self.truth, self.labels, self.full)


@dataclass(frozen=True)
class Unpredicted:
    """A case without a label map to score, and why."""

    case: str
    error: CaseError

    def run(self) -> CaseScore:
        """Always raises the CaseError."""
        raise self.error


def run_jobs(jobs: Iterable[Job], workers: int) -> Iterator[Outcome]:
    """Run all jobs and yield each case's name with its scores or its error, in the order in which they end.

    One worker is this process. A worker process that dies (out of memory) costs one case: what ran beside it is run again, each alone.
    jobs is asked for the next one only when a worker is about to be free.
    """
    waiting = iter(jobs)
    if workers == 1:
        yield from ((job.case, _outcome(job)) for job in waiting)
        return
    while True:
        unfinished: dict[str, Job] = {}
        yield from _run_until_broken(waiting, workers, unfinished)
        if not unfinished:
            return
        yield from ((job.case, _alone(job)) for job in unfinished.values())


def _run_until_broken(waiting: Iterator[Job], workers: int, unfinished: dict[str, Job]) -> Iterator[Outcome]:
    """Run jobs until none is left or a worker dies; ``unfinished`` then holds those that were begun and have no outcome."""
    running: dict[Future[CaseScore | CaseError], Job] = {}
    is_exhausted = False
    pool = _pool(workers)
    try:
        while running or not is_exhausted:
            while len(running) <= workers and not is_exhausted:  # one waits, so that no worker does
                job = next(waiting, None)
                if job is None:
                    is_exhausted = True
                else:
                    unfinished[job.case] = job
                    running[pool.submit(_outcome, job)] = job
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                outcome = future.result()
                job = running.pop(future)
                del unfinished[job.case]
                yield job.case, outcome
    except BrokenProcessPool:
        return
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _alone(job: Job) -> CaseScore | CaseError:
    """A job that was running when a worker died, in a process of its own: the one that dies again was the cause."""
    with _pool(1) as pool:
        try:
            return pool.submit(_outcome, job).result()
        except BrokenProcessPool:
            return CaseError(
                f"{job.case}: the process that scored it died, probably out of memory.",
                "Score with --workers 1 or on a machine with more memory; if it happens again, leave the case out.",
                code=FailureCode.WORKER_DIED,
            )


def _pool(workers: int) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")  # forking a process with threads is undefined
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=(os.getpid(),))


def _begin(parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    die_with_parent(parent)


def _outcome(job: Job) -> CaseScore | CaseError:
    try:
        return job.run()
    except CaseError as error:
        return error
    except MemoryError:
        return CaseError(
            f"{job.case}: out of memory while it was scored.",
            "Score with --workers 1 or on a machine with more memory, or leave the case out.",
            code=FailureCode.OUT_OF_MEMORY,
        )
    except Exception as error:  # noqa: BLE001  # one odd case must not end the scores of the others
        return CaseError(
            f"{job.case}: an unexpected {type(error).__name__} while it was scored ({' '.join(str(error).split())[:160]}).",
            "Please report it; leave the case out meanwhile.",
            code=FailureCode.INTERNAL,
        )


def _refuse_other_grid(pair: Pair, predicted: Grid, truth: Grid) -> None:
    """CaseError where the two grids, both RAS+, differ in shape or lie more than 0.1 voxel apart."""
    if predicted.shape_zyx == truth.shape_zyx:
        offset = grid_offset_vox(truth, predicted)
        if offset <= MAX_LABEL_OFFSET_VOX:
            return
        what = f"lies up to {offset:.2f} voxels off {shown(pair.truth)}; want at most {MAX_LABEL_OFFSET_VOX}"
    else:
        what = (
            f"has shape {predicted.shape_zyx} (z, y, x in RAS+) at {_mm(predicted)}, its truth {shown(pair.truth)} {truth.shape_zyx} at "
            f"{_mm(truth)}; want the same grid"
        )
    raise CaseError(
        f"{shown(pair.predicted)}: {what}.",
        "Check that the two belong together; then bring the prediction to the grid of its truth (ftengine predict writes each CT's own).",
        code=FailureCode.GRID_MISMATCH,
    )


def _mm(grid: Grid) -> str:
    return " x ".join(f"{side:.3g}" for side in grid.spacing_mm_zyx) + " mm"
