"""Runs units in worker processes, as many at a time as asked; what is done already is left out, so that the same call goes on."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ftengine.bench.experiments.few_labels.units import Unit, is_done

_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")


@dataclass
class Outcome:
    """What a call did: units done now, failed ones with their reasons, and how many are left."""

    done: list[Unit] = field(default_factory=list)
    failed: dict[Unit, str] = field(default_factory=dict)
    num_left: int = 0


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
    """Do the units that have no result yet, each once its needs are done, in ``jobs`` processes of ``threads`` threads each.

    stop_after_s: begin no unit that, taking as long as the longest of its kind so far, would not be done by then. A failed unit keeps
    those from running that need it, and nothing else. On an interrupt the processes save their runs and end.
    """
    todo = [unit for unit in units if not is_done(folder, unit)]
    board = _Board(folder, todo, stop_after_s, say)
    workers = [_Worker(folder, number, device, threads) for number in range(min(jobs, max(1, len(todo))))]
    runners = [threading.Thread(target=_serve, args=(board, worker)) for worker in workers]
    for runner in runners:
        runner.start()
    try:
        for runner in runners:
            while runner.is_alive():
                runner.join(timeout=0.5)
    except KeyboardInterrupt:
        board.close()
        raise
    finally:
        for worker in workers:
            worker.close()
        for runner in runners:
            runner.join()
    board.outcome.num_left = sum(not is_done(folder, unit) for unit in todo)
    return board.outcome


class _Board:
    """Which unit is next; shared by the threads that serve the workers."""

    def __init__(
        self, folder: Path, todo: Sequence[Unit], stop_after_s: float | None, say: Callable[[str], None]
    ) -> None:
        self._folder, self._todo, self._say = folder, list(todo), say
        self._num, self._started = len(todo), time.monotonic()
        self._deadline = None if stop_after_s is None else self._started + stop_after_s
        self._longest_s: dict[str, float] = {}
        self._num_running = 0
        self._changed = threading.Condition()
        self.outcome = Outcome()

    def take(self) -> Unit | None:
        """The next unit whose needs are done; waits while one may still become ready; None when there is nothing more to begin."""
        with self._changed:
            while True:
                unit = next((u for u in self._todo if self._is_ready(u)), None)
                if unit is not None:
                    self._todo.remove(unit)
                    self._num_running += 1
                    return unit
                if not self._num_running or not self._todo:
                    return None
                self._changed.wait()

    def ended(self, unit: Unit, seconds: float, error: str | None) -> None:
        """Note what became of a unit."""
        with self._changed:
            self._num_running -= 1
            if error is None:
                self.outcome.done.append(unit)
                self._longest_s[unit.kind] = max(seconds, self._longest_s.get(unit.kind, 0.0))
                text = f"{seconds:.0f} s"
            else:
                self.outcome.failed[unit] = error
                text = f"failed: {error}"
            num = len(self.outcome.done) + len(self.outcome.failed)
            self._say(f"[{num}/{self._num}] {unit.slug}: {text}  ({time.monotonic() - self._started:.0f} s in all)")
            self._changed.notify_all()

    def close(self) -> None:
        """Begin nothing more."""
        with self._changed:
            self._todo.clear()
            self._changed.notify_all()

    def _is_ready(self, unit: Unit) -> bool:
        if not all(is_done(self._folder, needed) for needed in unit.needs):
            return False
        expected_s = self._longest_s.get(unit.kind, 0.0)
        return self._deadline is None or time.monotonic() + expected_s < self._deadline


class _Worker:
    """A worker process, started when it gets its first unit and started anew where it has died."""

    def __init__(self, folder: Path, number: int, device: str, threads: int) -> None:
        self._folder, self._device = folder, device
        self._log = folder / "logs" / f"worker-{number}.log"
        self._environment = {**os.environ, **dict.fromkeys(_THREADS, str(threads))}
        self._process: subprocess.Popen[str] | None = None

    def do(self, unit: Unit) -> str | None:
        """Do one unit; the text of its error, if any."""
        process = self._running()
        assert process.stdin is not None  # noqa: S101 - both are pipes
        assert process.stdout is not None  # noqa: S101
        try:
            process.stdin.write(json.dumps(asdict(unit)) + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            code = process.wait()
            return f"its process ended with code {code}; see {self._log}"
        error: str | None = json.loads(answer)["error"]
        return error

    def _running(self) -> "subprocess.Popen[str]":
        if self._process is None or self._process.poll() is not None:
            self._log.parent.mkdir(parents=True, exist_ok=True)
            with self._log.open("a", encoding="utf-8") as log:
                self._process = subprocess.Popen(  # noqa: S603 - this package's own module
                    [sys.executable, "-m", "ftengine.bench.experiments.few_labels.worker", self._folder, self._device],
                    env=self._environment,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                )
        return self._process

    def close(self) -> None:
        """Ask the process to stop: between units it ends at once, inside one it saves its run first."""
        if self._process is None:
            return
        if self._process.poll() is None:
            self._process.terminate()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()


def _serve(board: _Board, worker: _Worker) -> None:
    while (unit := board.take()) is not None:
        started = time.monotonic()
        error = worker.do(unit)
        board.ended(unit, time.monotonic() - started, error)
