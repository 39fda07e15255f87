"""What happens to a batch between the DALI graph and training, and the clocks that tell which part is slow."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Protocol

from ftengine.types import Batch


class Stage(Protocol):
    """A step on whole batches, on the batch's device; the result may be the batch given, changed in place."""

    name: str

    def __call__(self, batch: Batch) -> Batch:
        """Process one batch."""
        ...


class BusyClock:
    """Seconds that each part of the loader has worked, added up over threads."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._lock = Lock()

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Add the time spent inside the block to ``name``."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - started)

    def add(self, name: str, seconds: float) -> None:
        """Add seconds to ``name``."""
        with self._lock:
            self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    def seconds(self) -> dict[str, float]:
        """A copy of all sums so far."""
        with self._lock:
            return dict(self._seconds)
