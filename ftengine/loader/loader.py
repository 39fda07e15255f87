"""The loader: reads issued ahead, the DALI graph, stages, each in a thread of its own, with bounded queues between.

::

    plan ─> AsyncReads ──────────> batches ───────────────> stages ────────────────> consumer
            thread ftengine-reads  thread ftengine-batches  thread ftengine-stages   the training loop
            and those that decode  DALI, prepare_patch      synthesis, QC
            loader.reads_in_flight               1 prepared batch       loader.queue_batches

On a GPU the two threads launch on streams of their own; a batch is handed over with an event behind its last kernel, and the stages'
thread gives it to the consumer when that event has come: a batch in the last queue is really there, so the wait that the consumer
measures is all there is, and no launch waits for the device.
"""

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ftengine.errors import ConfigError, StoreError
from ftengine.geometry import IntZYX, int_zyx
from ftengine.loader.channel import Channel, Closed
from ftengine.loader.counting import count_values
from ftengine.loader.failures import Failures
from ftengine.loader.pipeline import PatchPipeline
from ftengine.loader.plan import Plan
from ftengine.loader.stages import BusyClock, Stage
from ftengine.store.async_reads import AsyncReads
from ftengine.store.reader import Store
from ftengine.types import Batch, Patch, PatchRecord, PatchRequest

STATE_VERSION = 2
_PREPARED_BATCHES = 1  # between the two threads: the stages' thread works on another one
_ATTEMPTS = 10  # volumes tried for one patch


class Loader:
    """Iterable over the batches of an epoch; batches are made ahead, across the end of an epoch too.

    ``iter(loader)`` yields the batches from the current position to the end of the epoch; the next ``iter`` starts the next epoch. After
    leaving a loop early, the next ``iter`` goes on behind the last batch delivered. Batches are a function of (seed, epoch, step, rank,
    world size) and of which volumes can be read: thread counts, timing and restarts change nothing. An error of any thread is raised in
    the consumer at the next batch it asks for. ``close`` ends all threads; a loader is also a context manager.
    """

    def __init__(self, store: Store, plan: Plan, stages: Sequence[Stage] = (), *, device: torch.device) -> None:
        self._store = store
        self.plan = plan
        self.stages = tuple(stages)
        self._device = device
        self.clock = BusyClock()
        self.failures = Failures(plan.config.loader.max_bad_fraction)
        self.last_wait_s = 0.0  # how long the consumer waited for the batch it got last: the stall meter
        self._epoch, self._step = 0, 0
        self._producer: _Producer | None = None
        self._finalizer: Any = None

    @property
    def epoch(self) -> int:
        """Epoch of the next batch."""
        return self._epoch

    @property
    def notes(self) -> tuple[str, ...]:
        """What the plan found in the store that a user should know, one sentence each."""
        return self.plan.notes

    def __len__(self) -> int:
        return self.plan.batches_per_epoch

    def __iter__(self) -> Iterator[Batch]:
        epoch = self._epoch
        while self._epoch == epoch:
            yield self._next()

    def _next(self) -> Batch:
        if self._producer is None:
            self._producer = _Producer(
                self._store,
                self.plan,
                self.stages,
                self._device,
                self.clock,
                self.failures,
                (self._epoch, self._step),
            )
            self._finalizer = weakref.finalize(self, self._producer.stop)
        started = time.perf_counter()
        try:
            batch = self._producer.get()
        except BaseException:
            self.close()
            raise
        self.last_wait_s = time.perf_counter() - started
        self._epoch, self._step = _after(self.plan, (self._epoch, self._step))
        return batch

    def queue_level(self) -> int:
        """Finished batches that wait for the consumer."""
        return self.levels()["ready"]

    def levels(self) -> dict[str, int]:
        """How full each queue is: reads that have come and wait for their batch, prepared batches, finished batches."""
        return dict.fromkeys(self.capacities(), 0) if self._producer is None else self._producer.levels()

    def capacities(self) -> dict[str, int]:
        """What each queue of ``levels`` holds at most."""
        settings = self.plan.config.loader
        reads = _batches_ahead(self.plan) // self.plan.crops_per_read * self.plan.batch_size
        return {"reads": reads, "prepared": _PREPARED_BATCHES, "ready": settings.queue_batches}

    def state_dict(self) -> dict[str, Any]:
        """Where the consumer stands: enough to deliver the same next batch in another process. Plain JSON values."""
        return {
            "version": STATE_VERSION,
            "epoch": self._epoch,
            "step": self._step,
            "plan": self.plan.fingerprint(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state`` was taken, by any rank of that run.

        Raises ConfigError if the plan is another one: other store, seed, batch or patch size, sampling, augmentation, world size.
        """
        if state.get("version") != STATE_VERSION:
            raise ConfigError(
                f"loader state has version {state.get('version')!r}; want {STATE_VERSION}. Start the run anew."
            )
        mine = self.plan.fingerprint()
        changed = [
            f"{key}: was {state['plan'].get(key)}, is {mine[key]}"
            for key in mine
            if state["plan"].get(key) != mine[key]
        ]
        if changed:
            raise ConfigError(
                f"the run cannot be resumed, its data changed ({'; '.join(changed)}). Restore them or start a new run."
            )
        self.close()
        self._epoch, self._step = int(state["epoch"]), int(state["step"])

    def close(self) -> None:
        """End all threads; the loader can be iterated again afterwards and goes on at the same position."""
        if self._producer is not None:
            self._producer.stop()
            self._producer = None
            self._finalizer.detach()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Read:
    """One read and its patch, once it has come: shared by the batches that take their crops from it."""

    def __init__(self, future: Future[Patch]) -> None:
        self.future = future
        self.attempt = 0  # which volume of those that are tried


class _Memory:
    """Memory for reads. On the CPU it is kept from batch to batch: new pages cost a third of a read; pinned memory torch keeps itself."""

    def __init__(self, *, pinned: bool) -> None:
        self._is_pinned = pinned
        self._free: dict[tuple[IntZYX, type[Any]], deque[NDArray[Any]]] = {}

    def take(self, shape_zyx: IntZYX, dtype: type[Any]) -> NDArray[Any]:
        """An array that holds anything; from any thread."""
        if self._is_pinned:
            return torch.empty(
                shape_zyx, dtype=torch.int16 if dtype is np.int16 else torch.uint8, pin_memory=True
            ).numpy()
        try:
            return self._free[shape_zyx, dtype].pop()
        except (KeyError, IndexError):
            return np.empty(shape_zyx, dtype)

    def give_back(self, patches: Sequence[Patch]) -> None:
        """Patches whose arrays nobody uses any more."""
        for patch in patches:
            for array in (patch.image, patch.label):
                key = (int_zyx(array.shape), array.dtype.type)
                self._free.setdefault(key, deque()).append(array)


@dataclass(frozen=True)
class _Asked:
    """A batch whose reads are under way."""

    position: tuple[int, int]
    indices: list[int]
    reads: list[_Read]


@dataclass(frozen=True)
class _Made:
    """A batch on its way, with what must outlive the device's work on it."""

    batch: Batch
    position: tuple[int, int]
    held: tuple[Any, ...] = ()
    done: torch.cuda.Event | None = None


class _Producer:
    """Makes batches ahead, in order. Knows nothing of the Loader's life, so that a forgotten loader can end it."""

    def __init__(
        self,
        store: Store,
        plan: Plan,
        stages: Sequence[Stage],
        device: torch.device,
        clock: BusyClock,
        failures: Failures,
        start: tuple[int, int],
    ) -> None:
        settings = plan.config.loader
        self._plan, self._stages, self._device, self._clock, self._failures = plan, stages, device, clock, failures
        self._next_position = start
        self._asked: tuple[_Asked, ...] = ()  # replaced, never changed: other threads look at it
        self._stopping = False
        self._error: BaseException | None = None
        self._memory = _Memory(pinned=device.type == "cuda")
        self._reads = AsyncReads(
            store,
            threads=settings.reader_threads,
            in_flight=settings.reads_in_flight,
            allocate=self._memory.take,
            measure=lambda: clock.measure("reads"),
        )
        self._prepared: Channel[_Made] = Channel(_PREPARED_BATCHES)
        self._ready: Channel[_Made] = Channel(settings.queue_batches)
        self._threads = [
            threading.Thread(target=self._run, args=(work,), name=f"ftengine-{name}", daemon=True)
            for name, work in (("batches", self._make_batches), ("stages", self._run_stages))
        ]
        for thread in self._threads:
            thread.start()

    def get(self) -> Batch:
        """The next batch; raises what a thread raised, as soon as it did."""
        try:
            made = self._ready.get()
        except Closed:
            if self._error is None:
                raise RuntimeError("the loader was closed while a batch was asked for") from None
            raise self._error from None
        if made.done is not None:
            _used_on(torch.cuda.current_stream(self._device), made.batch)
        return made.batch

    def levels(self) -> dict[str, int]:
        """Items in each queue."""
        reads = {id(read): read for asked in self._asked for read in asked.reads}
        arrived = sum(read.future.done() for read in reads.values())
        return {"reads": arrived, "prepared": len(self._prepared), "ready": len(self._ready)}

    def stop(self) -> None:
        """End all threads and wait for them."""
        self._stopping = True
        self._prepared.close()
        self._ready.close()
        self._reads.close()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()

    def _run(self, work: Callable[[], None]) -> None:
        try:
            with self._on_own_stream():
                work()
        except BaseException as error:  # noqa: BLE001 - handed to the consumer, whatever it is
            if not self._stopping and not isinstance(error, Closed) and self._error is None:
                error.add_note(f"in the loader's thread {threading.current_thread().name}")
                self._error = error
            self._prepared.close()
            self._ready.close()

    def _on_own_stream(self) -> AbstractContextManager[Any]:
        if self._device.type != "cuda":
            return nullcontext()
        torch.cuda.set_device(self._device)
        # before training's kernels, so that the queue stays full: the device does the same work in either order, and training does not wait
        return torch.cuda.stream(torch.cuda.Stream(self._device, priority=-1))

    def _event(self) -> torch.cuda.Event | None:
        """Recorded behind all work of this thread so far; None on the CPU, where work is done when its call returns."""
        if self._device.type != "cuda":
            return None
        event = torch.cuda.Event(blocking=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    # ---- thread ftengine-batches ----

    def _make_batches(self) -> None:
        plan = self._plan
        ahead = _batches_ahead(plan)
        self._ask(ahead)
        pipeline = PatchPipeline(plan.config, plan.batch_size, device=self._device)
        while True:
            asked = self._asked[0]
            with self._clock.measure("wait for reads"):
                requests, patches = self._collect(asked)
            self._asked = self._asked[1:]
            self._ask(ahead)
            with self._clock.measure("prepare"):
                counts = [None] * len(requests) if not self._stages else _label_voxels(patches, requests)
                prepared = pipeline(patches, requests)
                if self._device.type == "cpu" and plan.crops_per_read == 1:  # nothing reads them any more
                    self._memory.give_back(patches)
            records = [PatchRecord(r, label_voxels=n) for r, n in zip(requests, counts, strict=True)]
            done = self._event()
            batch = Batch(prepared.image, prepared.label, records)
            with self._clock.measure("wait for stages"):
                self._prepared.put(_Made(batch, asked.position, () if done is None else prepared.held, done))

    def _ask(self, batches_ahead: int) -> None:
        """Issue the reads of the next batches."""
        while len(self._asked) < batches_ahead:
            epoch, step = self._next_position
            requests = self._plan.batch(epoch, step)
            last = self._asked[-1] if self._asked else None
            if step % self._plan.crops_per_read and last is not None and last.position == (epoch, step - 1):
                reads = last.reads
            else:
                reads = [_Read(self._reads.submit(request.case, request.read)) for request in requests]
            self._asked = (*self._asked, _Asked((epoch, step), [r.index for r in requests], reads))
            self._next_position = _after(self._plan, (epoch, step))

    def _collect(self, asked: _Asked) -> tuple[list[PatchRequest], list[Patch]]:
        """Wait for the reads of a batch; one that fails is replaced by another volume of its kind."""
        requests, patches = [], []
        for index, read in zip(asked.indices, asked.reads, strict=True):
            while True:
                request = self._plan.request(asked.position[0], index, attempt=read.attempt)
                try:
                    patch = read.future.result()
                except StoreError as error:
                    self._failures.bad(request.case, error)
                    read.attempt += 1
                    if read.attempt == _ATTEMPTS:
                        raise
                    request = self._plan.request(asked.position[0], index, attempt=read.attempt)
                    read.future = self._reads.submit(request.case, request.read)
                else:
                    break
            self._failures.good()
            requests.append(request)
            patches.append(patch)
        return requests, patches

    # ---- thread ftengine-stages ----

    def _run_stages(self) -> None:
        while True:
            made = self._prepared.get()
            batch = made.batch
            if made.done is not None:
                stream = torch.cuda.current_stream(self._device)
                stream.wait_event(made.done)
                _used_on(stream, batch)
            for stage in self._stages:
                with self._clock.measure(stage.name), _said_where(made.position):
                    batch = stage(batch)
            done = self._event()
            if done is not None:
                with self._clock.measure("wait for the device"):
                    done.synchronize()
            with self._clock.measure("wait for training"):
                self._ready.put(_Made(batch, made.position, (), done))


def _after(plan: Plan, position: tuple[int, int]) -> tuple[int, int]:
    """The (epoch, step) that follows."""
    epoch, step = position
    return (epoch, step + 1) if step + 1 < plan.batches_per_epoch else (epoch + 1, 0)


def _batches_ahead(plan: Plan) -> int:
    return -(-plan.config.loader.reads_in_flight // plan.batch_size) * plan.crops_per_read


def _used_on(stream: torch.cuda.Stream, batch: Batch) -> None:
    """The memory of a batch is free for others only when ``stream`` is done with it, too."""
    batch.image.record_stream(stream)
    batch.label.record_stream(stream)


def _label_voxels(patches: Sequence[Patch], requests: Sequence[PatchRequest]) -> list[tuple[int, ...] | None]:
    """Voxels of each label value in each patch, from the label as it was read."""
    return [
        tuple(count_values(patch.label[request.box.moved(patch.box.origin_zyx).slices()]).tolist())
        for patch, request in zip(patches, requests, strict=True)
    ]


@contextmanager
def _said_where(position: tuple[int, int]) -> Iterator[None]:
    """An error inside says which batch it was."""
    try:
        yield
    except Exception as error:
        error.add_note(f"at epoch {position[0]}, step {position[1]} of the loader")
        raise
