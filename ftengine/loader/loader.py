"""The loader: reader threads, a bounded number of reads ahead, the DALI graph, stages, a bounded queue of finished batches."""

import queue
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any
from zlib import crc32

from ftengine.errors import ConfigError
from ftengine.loader.pipeline import PatchPipeline
from ftengine.loader.plan import Plan
from ftengine.loader.stages import BusyClock, Stage
from ftengine.store.reader import Store
from ftengine.types import Batch, Patch, PatchRecord, PatchRequest

STATE_VERSION = 1
_POLL_S = 0.1  # how soon a blocked thread notices that it should stop


class Loader:
    """Iterable over the batches of an epoch; batches are made ahead, across the end of an epoch too.

    ``iter(loader)`` yields the batches from the current position to the end of the epoch; the next ``iter`` starts the next epoch. After
    leaving a loop early, the next ``iter`` goes on behind the last batch delivered. Batches are a function of (seed, epoch, step)
    alone: thread counts, timing and restarts change nothing. An error of any thread is raised in the consumer at the batch it
    concerns. ``close`` ends all threads; a loader is also a context manager.
    """

    def __init__(
        self,
        store: Store,
        plan: Plan,
        make_pipeline: Callable[[], PatchPipeline],
        stages: Sequence[Stage] = (),
    ) -> None:
        self._store = store
        self.plan = plan
        self._make_pipeline = make_pipeline
        self.stages = tuple(stages)
        self.clock = BusyClock()
        self.last_wait_s = 0.0  # how long the consumer waited for the batch it got last: the stall meter
        self._epoch, self._step = 0, 0
        self._producer: _Producer | None = None
        self._finalizer: Any = None

    @property
    def epoch(self) -> int:
        """Epoch of the next batch."""
        return self._epoch

    def __len__(self) -> int:
        return self.plan.batches_per_epoch

    def __iter__(self) -> Iterator[Batch]:
        epoch = self._epoch
        while self._epoch == epoch:
            yield self._next()

    def _next(self) -> Batch:
        if self._producer is None:
            self._producer = _Producer(
                self._store, self.plan, self._make_pipeline, self.stages, self.clock, (self._epoch, self._step)
            )
            self._finalizer = weakref.finalize(self, self._producer.stop)
        started = time.perf_counter()
        try:
            item = self._producer.get()
        except BaseException:
            self.close()
            raise
        self.last_wait_s = time.perf_counter() - started
        self._epoch, self._step = self.plan_position_after(self._epoch, self._step)
        return item

    def plan_position_after(self, epoch: int, step: int) -> tuple[int, int]:
        """The (epoch, step) that follows."""
        return (epoch, step + 1) if step + 1 < self.plan.batches_per_epoch else (epoch + 1, 0)

    def queue_level(self) -> int:
        """Finished batches that wait for the consumer."""
        return 0 if self._producer is None else self._producer.ready.qsize()

    def state_dict(self) -> dict[str, Any]:
        """Where the consumer stands: enough to deliver the same next batch in another process. Plain JSON values."""
        return {"version": STATE_VERSION, "epoch": self._epoch, "step": self._step, "plan": self._fingerprint()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state`` was taken. Raises ConfigError if the plan is another one (other store, seed, batch or patch size)."""
        if state.get("version") != STATE_VERSION:
            raise ConfigError(
                f"loader state has version {state.get('version')!r}; want {STATE_VERSION}. Start the run anew."
            )
        mine = self._fingerprint()
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

    def _fingerprint(self) -> dict[str, Any]:
        config = self.plan.config
        return {
            "seed": config.seed,
            "volumes": self.plan.num_volumes,
            "cases": crc32("\n".join(self._store.cases).encode()),
            "batch_size": self.plan.batch_size,
            "batches_per_epoch": self.plan.batches_per_epoch,
            "patch_zyx": list(config.region.patch_zyx),
        }


class _Producer:
    """Makes batches ahead, in order, in one thread of its own plus the reader threads. Knows nothing of the Loader's life."""

    def __init__(
        self,
        store: Store,
        plan: Plan,
        make_pipeline: Callable[[], PatchPipeline],
        stages: Sequence[Stage],
        clock: BusyClock,
        start: tuple[int, int],
    ) -> None:
        settings = plan.config.loader
        self.ready: queue.Queue[Batch | BaseException] = queue.Queue(maxsize=settings.queue_batches)
        self._store, self._plan, self._make_pipeline, self._stages, self._clock = (
            store,
            plan,
            make_pipeline,
            stages,
            clock,
        )
        self._batches_ahead = max(1, -(-settings.reads_in_flight // plan.batch_size))
        self._position = start
        self._stopping = threading.Event()
        self._readers = ThreadPoolExecutor(settings.reader_threads, thread_name_prefix="ftengine-read")
        self._thread = threading.Thread(target=self._run, name="ftengine-batches", daemon=True)
        self._thread.start()

    def get(self) -> Batch:
        """The next batch; raises what a thread raised while making it."""
        while True:
            try:
                item = self.ready.get(timeout=_POLL_S)
            except queue.Empty:
                if not self._thread.is_alive() and self.ready.empty():
                    raise RuntimeError("the loader's thread ended without a result or an error") from None
                continue
            if isinstance(item, BaseException):
                raise item
            return item

    def stop(self) -> None:
        """End all threads and wait for them."""
        self._stopping.set()
        self._readers.shutdown(wait=False, cancel_futures=True)
        if self._thread is not threading.current_thread():
            self._thread.join()
        self._readers.shutdown(wait=True)

    def _run(self) -> None:
        try:
            self._produce()
        except BaseException as error:  # noqa: BLE001 - handed to the consumer, whatever it is
            if not self._stopping.is_set():
                self._put(error)

    def _produce(self) -> None:
        pipeline = self._make_pipeline()
        pending: deque[tuple[list[PatchRequest], list[Future[Patch]]]] = deque()
        while not self._stopping.is_set():
            while len(pending) < self._batches_ahead:
                pending.append(self._issue_reads())
            requests, reads = pending.popleft()
            with self._clock.measure("wait for reads"):
                patches = [read.result() for read in reads]
            with self._clock.measure("dali"):
                image, label = pipeline(patches, [r.augmentation for r in requests])
            batch = Batch(image, label, [PatchRecord(r) for r in requests])
            for stage in self._stages:
                with self._clock.measure(stage.name):
                    batch = stage(batch)
            with self._clock.measure("wait for training"):
                self._put(batch)

    def _issue_reads(self) -> tuple[list[PatchRequest], list[Future[Patch]]]:
        epoch, step = self._position
        requests = self._plan.batch(epoch, step)
        self._position = (epoch, step + 1) if step + 1 < self._plan.batches_per_epoch else (epoch + 1, 0)
        return requests, [self._readers.submit(self._read, request) for request in requests]

    def _read(self, request: PatchRequest) -> Patch:
        with self._clock.measure("read (all threads)"):
            return self._store.read(request.case, request.box.origin_zyx, request.box.shape_zyx)

    def _put(self, item: Batch | BaseException) -> None:
        while not self._stopping.is_set():
            try:
                self.ready.put(item, timeout=_POLL_S)
            except queue.Full:
                continue
            return
