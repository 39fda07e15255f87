"""Runs jobs in worker processes, as many at a time as asked; what is done already is left out, so that the same call goes on.

A worker process (``experiments.worker.serve``) takes jobs as lines of JSON and keeps its imports from one to the next. When the process that
runs the schedule ends in any way, its workers see the end of their input, save and end, too.
"""

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# how a process ends inside a job that was asked to stop: it has saved its run, or had nothing to save
_STOPPED_CODES = (0, -signal.SIGINT, -signal.SIGTERM)
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")


@dataclass(frozen=True)
class Job:
    """key: its name among all. kind: jobs of one kind take about as long. needs: keys that must be done before. payload: for the worker."""

    key: str
    kind: str
    title: str
    needs: tuple[str, ...]
    payload: Mapping[str, Any]


@dataclass(frozen=True)
class Crew:
    """The worker processes: what to start, how many of them, with how many CPU threads each; logs: folder; keep_fds: files they inherit."""

    command: Sequence[str]
    logs: Path
    num_workers: int = 1
    threads: int = 1
    keep_fds: tuple[int, ...] = ()


@dataclass
class Outcome:
    """What a call did: keys of jobs done now, of failed ones with their reasons, and how many are left."""

    done: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    num_left: int = 0


class Watcher:
    """Told of what happens, from several threads but one call at a time; this one says nothing."""

    def started(self, job: Job) -> None:
        """A job has begun."""

    def advanced(self, job: Job, fraction: float, text: str) -> None:
        """A running job has come to ``fraction`` of its work."""

    def ended(self, job: Job, seconds: float, error: str | None) -> None:
        """A job has ended."""

    def stopped(self, job: Job) -> None:
        """A running job was asked to stop; it has neither failed nor ended."""


class _StoppedError(Exception):
    """A worker process was asked to stop inside a job."""


def run_jobs(
    jobs: Sequence[Job],
    crew: Crew,
    *,
    is_done: Callable[[str], bool],
    stop_after_s: float | None = None,
    watcher: Watcher | None = None,
) -> Outcome:
    """Do the jobs that are not done yet, each once its needs are done, in the given order as far as needs allow.

    stop_after_s: begin no job that, taking as long as the longest of its kind so far, would not be done by then. A failed job keeps
    those from running that need it, and nothing else. On an interrupt the processes save their runs and end.
    """
    todo = [job for job in jobs if not is_done(job.key)]
    board = _Board(todo, is_done, stop_after_s, watcher or Watcher())
    workers = [_Worker(crew, number) for number in range(min(crew.num_workers, max(1, len(todo))))]
    with ThreadPoolExecutor(len(workers)) as pool:
        # futures, as an interrupt of Thread.join can take a thread for ended that is not (CPython 90882)
        runners = [pool.submit(_serve, board, worker) for worker in workers]
        try:
            for runner in runners:
                runner.result()
        except BaseException:
            board.close()
            raise
        finally:
            for worker in workers:
                worker.stop()
            wait(runners)
            for worker in workers:
                worker.close()
    board.outcome.num_left = sum(not is_done(job.key) for job in todo)
    return board.outcome


class _Board:
    """Which job is next; shared by the threads that serve the workers."""

    def __init__(
        self, todo: Sequence[Job], is_done: Callable[[str], bool], stop_after_s: float | None, watcher: Watcher
    ) -> None:
        self._todo, self._is_done, self._watcher = list(todo), is_done, watcher
        self._deadline = None if stop_after_s is None else time.monotonic() + stop_after_s
        self._longest_s: dict[str, float] = {}
        self._num_running = 0
        self._is_closed = False
        self._changed = threading.Condition()
        self.outcome = Outcome()

    def take(self) -> Job | None:
        """The next job whose needs are done; waits while one may still become ready; None when there is nothing more to begin."""
        with self._changed:
            while True:
                job = next((j for j in self._todo if self._is_ready(j)), None)
                if job is not None:
                    self._todo.remove(job)
                    self._num_running += 1
                    self._watcher.started(job)
                    return job
                if not self._num_running or not self._todo:
                    return None
                self._changed.wait()

    def advanced(self, job: Job, fraction: float, text: str) -> None:
        """Pass on how far a job is."""
        with self._changed:
            self._watcher.advanced(job, fraction, text)

    def ended(self, job: Job, seconds: float, error: str | None) -> None:
        """Note what became of a job."""
        with self._changed:
            self._num_running -= 1
            if error is None:
                self.outcome.done.append(job.key)
                self._longest_s[job.kind] = max(seconds, self._longest_s.get(job.kind, 0.0))
            else:
                self.outcome.failed[job.key] = error
            self._watcher.ended(job, seconds, error)
            self._changed.notify_all()

    def stopped(self, job: Job) -> None:
        """Note that a job was asked to stop: a later call does it."""
        with self._changed:
            self._num_running -= 1
            self._watcher.stopped(job)
            self._changed.notify_all()

    @property
    def is_closed(self) -> bool:
        """Whether nothing more begins, so that a job whose process ends has not failed."""
        with self._changed:
            return self._is_closed

    def close(self) -> None:
        """Begin nothing more."""
        with self._changed:
            self._is_closed = True
            self._todo.clear()
            self._changed.notify_all()

    def _is_ready(self, job: Job) -> bool:
        if not all(self._is_done(needed) for needed in job.needs):
            return False
        expected_s = self._longest_s.get(job.kind, 0.0)
        return self._deadline is None or time.monotonic() + expected_s < self._deadline


class _Worker:
    """A worker process, started when it gets its first job and started anew where it has died."""

    def __init__(self, crew: Crew, number: int) -> None:
        self._crew = crew
        self._log = crew.logs / f"worker-{number}.log"
        self._environment = {**os.environ, **dict.fromkeys(_THREADS, str(crew.threads))}
        self._process: subprocess.Popen[str] | None = None
        self._is_stopped = False
        self._starting = threading.Lock()

    def do(self, job: Job, advanced: Callable[[float, str], None]) -> str | None:
        """Do one job; the text of its error, if any. Raises _StoppedError where its process was asked to stop."""
        process = self._running()
        assert process.stdin is not None  # noqa: S101 - both are pipes
        assert process.stdout is not None  # noqa: S101
        try:
            process.stdin.write(json.dumps(job.payload) + "\n")
            process.stdin.flush()
            while answer := process.stdout.readline():
                said = json.loads(answer)
                if "error" in said:
                    error: str | None = said["error"]
                    return error
                advanced(said["fraction"], said["text"])
        except BrokenPipeError:
            pass
        code = process.wait()
        self.close()
        if code in _STOPPED_CODES:
            raise _StoppedError
        return f"its process ended with code {code}; see {self._log}"

    def _running(self) -> "subprocess.Popen[str]":
        with self._starting:
            if self._is_stopped:
                raise _StoppedError
            if self._process is None:
                self._log.parent.mkdir(parents=True, exist_ok=True)
                with self._log.open("a", encoding="utf-8") as log:
                    self._process = subprocess.Popen(  # noqa: S603 - a module of this package
                        list(self._crew.command),
                        env=self._environment,
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=log,
                        text=True,
                        pass_fds=self._crew.keep_fds,
                    )
            return self._process

    def stop(self) -> None:
        """Ask the process to stop, and start no other: between jobs it ends at once, inside one it saves its run first."""
        with self._starting:
            self._is_stopped = True
            process = self._process
        if process is not None and process.poll() is None:
            process.terminate()
            process.wait()

    def close(self) -> None:
        """Let go of a process that has ended; a further job gets a new one."""
        process, self._process = self._process, None
        if process is not None:
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    with contextlib.suppress(BrokenPipeError):
                        stream.close()


def _serve(board: _Board, worker: _Worker) -> None:
    while (job := board.take()) is not None:
        started = time.monotonic()

        def advanced(fraction: float, text: str, job: Job = job) -> None:
            board.advanced(job, fraction, text)

        try:
            error = worker.do(job, advanced)
        except _StoppedError:
            board.stopped(job)
            continue
        if error is not None and board.is_closed:
            board.stopped(job)
        else:
            board.ended(job, time.monotonic() - started, error)
