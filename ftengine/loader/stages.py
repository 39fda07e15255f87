"""What happens to a batch between the DALI graph and training, and the clocks that tell which part is slow."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Protocol

from ftengine.loader.nvtx import nvtx_range
from ftengine.types import Batch


class Stage(Protocol):
    """A step on whole batches, on the batch's device; the result may be the batch given, changed in place."""

    name: str

    def __call__(self, batch: Batch) -> Batch:
        """Process one batch."""
        ...


class BusyClock:
    """Seconds that each part of the loader has worked, added up over threads.

    Names that begin with "wait for " are times in which a thread of the loader stood still; all others are work.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._running: dict[object, tuple[str, float]] = {}
        self._lock = Lock()

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Add the time spent inside the block to ``name``; a profiler sees it as a range."""
        block = object()
        with nvtx_range(name):
            with self._lock:
                self._running[block] = name, time.perf_counter()
            try:
                yield
            finally:
                with self._lock:
                    _, started = self._running.pop(block)
                    self._add(name, time.perf_counter() - started)

    def add(self, name: str, seconds: float) -> None:
        """Add seconds to ``name``."""
        with self._lock:
            self._add(name, seconds)

    def seconds(self) -> dict[str, float]:
        """A copy of all sums so far; blocks that have not ended count up to now."""
        with self._lock:
            sums, now = dict(self._seconds), time.perf_counter()
            for name, started in self._running.values():
                sums[name] = sums.get(name, 0.0) + now - started
            return sums

    def _add(self, name: str, seconds: float) -> None:
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds
