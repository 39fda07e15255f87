"""Who converts: this process, processes of this machine, or a Dask cluster. One scheduling loop serves all three.

``run_tasks`` hands out tasks while their estimated memory fits, and yields outcomes as they come. A worker that dies takes one case with
it, which is named; the rest goes on. Workers commit their own volumes: nothing of a volume travels back.
"""

import logging
import multiprocessing
import os
import signal
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any, TypeAlias

from typing_extensions import override

from ftengine.errors import CaseError, ConfigError, FailureCode, StoreError
from ftengine.store.case import CaseOutcome, Task, convert_case, failed
from ftengine.store.worker_process import serve

Done: TypeAlias = tuple[Task, CaseOutcome]
_JOIN_S = 5.0


class Workers(ABC):
    """A number of slots that convert tasks."""

    slots: int

    @abstractmethod
    def submit(self, task: Task) -> None:
        """Start a task; called only while fewer than ``slots`` are running."""

    @abstractmethod
    def wait(self) -> Done:
        """Block until a running task ends. Raises StoreError where a worker could not write the store."""

    @abstractmethod
    def close(self) -> None:
        """End all workers at once; what they were doing is lost, and what they committed stays."""


def run_tasks(
    tasks: Iterable[Task],
    workers: Workers,
    *,
    memory_bytes: int | None,
    need_bytes: Callable[[Task], int],
    on_start: Callable[[Task], None],
) -> Iterator[Done]:
    """Run all tasks and yield each with its outcome, in the order in which they end.

    memory_bytes: never start a task whose estimate does not fit beside those running; one that is larger than the whole runs alone.
    """
    waiting = iter(tasks)
    following = next(waiting, None)
    running: dict[str, int] = {}
    while following is not None or running:
        while following is not None and len(running) < workers.slots:
            need = need_bytes(following) if memory_bytes is not None else 0
            if running and memory_bytes is not None and sum(running.values()) + need > memory_bytes:
                break
            running[following.source.case] = need
            on_start(following)
            workers.submit(following)
            following = next(waiting, None)
        task, outcome = workers.wait()
        del running[task.source.case]
        yield task, outcome


class ThisProcess(Workers):
    """No parallelism: a task runs when it is waited for."""

    slots = 1

    def __init__(self) -> None:
        self._task: Task | None = None

    @override
    def submit(self, task: Task) -> None:
        self._task = task

    @override
    def wait(self) -> Done:
        if self._task is None:
            raise RuntimeError("wait without a task")
        task, self._task = self._task, None
        return task, convert_case(task)

    @override
    def close(self) -> None:
        self._task = None


@dataclass
class _Worker:
    process: SpawnProcess
    pipe: Connection
    task: Task | None = None


class Processes(Workers):
    """Processes of this machine, each with one task at a time; one that dies is replaced."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self._context = multiprocessing.get_context("spawn")  # forking a process with threads is undefined
        self._workers: list[_Worker] = []

    @override
    def submit(self, task: Task) -> None:
        worker = next((w for w in self._workers if w.task is None), None) or self._start()
        worker.task = task
        worker.pipe.send(task)

    @override
    def wait(self) -> Done:
        busy = [w for w in self._workers if w.task is not None]
        ready = wait([w.pipe for w in busy])  # a dead worker's pipe is ready, too
        worker = next(w for w in busy if w.pipe in ready)
        task, worker.task = worker.task, None
        if task is None:
            raise RuntimeError("a worker without a task answered")
        try:
            answer = worker.pipe.recv()
        except (EOFError, OSError):
            worker.process.join()
            self._workers.remove(worker)
            return task, _died(task, worker.process.exitcode)
        if isinstance(answer, StoreError):
            raise answer
        return task, answer

    @override
    def close(self) -> None:
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.process.join(_JOIN_S)
            worker.pipe.close()
        self._workers.clear()

    def _start(self) -> _Worker:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=serve, args=(theirs, os.getpid()), name="ftengine-convert")
        process.start()
        theirs.close()
        worker = _Worker(process, ours)
        self._workers.append(worker)
        return worker


def answer_tasks(pipe: Connection) -> None:
    """What a worker process does: tasks in, outcomes out, until the pipe closes."""
    one_thread()
    while True:
        try:
            task = pipe.recv()
        except EOFError:
            return
        try:
            answer: CaseOutcome | StoreError = convert_case(task)
        except StoreError as error:
            answer = error
        pipe.send(answer)


def one_thread() -> None:
    """One worker, one core: several of them would only get into each other's way."""
    import SimpleITK as sitk

    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)


def _died(task: Task, exit_code: int | None) -> CaseOutcome:
    killed = exit_code is not None and exit_code < 0
    how = f"by signal {-exit_code}" if killed and exit_code is not None else f"with exit code {exit_code}"
    memory = killed and exit_code == -signal.SIGKILL
    error = CaseError(
        f"{task.source.image}: the worker process died {how}{', probably out of memory' if memory else ''}.",
        "Convert with fewer --workers or a smaller --memory; if it happens again, leave the case out.",
        code=FailureCode.WORKER_DIED,
    )
    return failed(task.source, error)


class DaskWorkers(Workers):
    """The workers of a dask.distributed cluster, which must see the source files and the store under the same names."""

    def __init__(self, client: Any, *, slots: int | None = None) -> None:
        """``client``: a connected ``distributed.Client``. slots: tasks in flight; None: two for each of its threads."""
        from distributed import as_completed

        self._client = client
        threads = sum(client.nthreads().values())
        if not threads:
            raise ConfigError(f"{client.scheduler.address}: the Dask cluster has no worker; start some first.")
        self.slots = slots or 2 * threads  # one waiting for each that runs
        self._running: dict[str, tuple[Task, Any]] = {}
        self._pending = as_completed()

    @override
    def submit(self, task: Task) -> None:
        future = self._client.submit(_on_cluster, task, pure=False)
        self._running[future.key] = (task, future)
        self._pending.add(future)

    @override
    def wait(self) -> Done:
        future = next(self._pending)
        task, _ = self._running.pop(future.key)
        error = future.exception()
        if error is None:
            answer = future.result()
            if isinstance(answer, StoreError):
                raise answer
            return task, answer
        if type(error).__name__ != "KilledWorker":
            raise error
        return task, failed(
            task.source,
            CaseError(
                f"{task.source.image}: every cluster worker that took it died, probably out of memory.",
                "Give the workers more memory, or leave the case out.",
                code=FailureCode.WORKER_DIED,
            ),
        )

    @override
    def close(self) -> None:
        self._client.cancel([future for _, future in self._running.values()])


def _on_cluster(task: Task) -> CaseOutcome | StoreError:
    """An error of the store comes back as a value: the cluster would try the task again elsewhere."""
    one_thread()
    try:
        return convert_case(task)
    except StoreError as error:
        return error


@contextmanager
def open_workers(*, workers: int = 1, dask: str | None = None) -> Iterator[Workers]:
    """The workers that the command line asks for: ``workers`` processes, or ``dask``: an address, or ``local:N``.

    One worker is this process. Raises ConfigError for an address without a cluster, or where dask is not installed.
    """
    if dask is None:
        here: Workers = ThisProcess() if workers == 1 else Processes(workers)
        try:
            yield here
        finally:
            here.close()
        return
    with _cluster(dask) as client:
        far = DaskWorkers(client)
        try:
            yield far
        finally:
            far.close()


@contextmanager
def _environment_kept() -> Iterator[None]:
    """Restore the environment: a local cluster leaves OMP_NUM_THREADS=1 behind, and whatever is started later computes in other threads."""
    before = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def _cluster(address: str) -> Iterator[Any]:
    try:
        from distributed import Client, LocalCluster
    except ImportError as error:
        raise ConfigError(f"--dask {address}: dask is not installed. Install ftengine[cluster].") from error
    if address.startswith("local:"):
        count = address.removeprefix("local:")
        if not count.isdecimal() or int(count) < 1:
            raise ConfigError(f"--dask {address}: want local:N with N of 1 or more, or a scheduler's address.")
        options: dict[str, Any] = {"dashboard_address": None, "silence_logs": logging.CRITICAL}
        with (
            _environment_kept(),
            LocalCluster(n_workers=int(count), threads_per_worker=1, host="127.0.0.1", **options) as cluster,
            Client(cluster) as client,
        ):
            yield client
        return
    try:
        with Client(address, timeout=10) as client:
            yield client
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--dask {address}: no Dask scheduler answers ({type(error).__name__}). Check the address, or use local:N."
        ) from error
