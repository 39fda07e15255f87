"""A bounded queue between two threads that can be closed from either side: nobody waits for the dead."""

import threading
from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")


class Closed(Exception):  # noqa: N818 - tells the end of the loader, not an error
    """The channel was closed while, or before, somebody waited at it."""


class Channel(Generic[T]):
    """At most ``capacity`` items in order. ``close`` wakes all who wait; what lies in it is dropped."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._items: deque[T] = deque()
        self._changed = threading.Condition()
        self._is_closed = False

    def __len__(self) -> int:
        return len(self._items)

    def put(self, item: T) -> None:
        """Add an item, after waiting for room. Raises Closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or len(self._items) < self.capacity)
            if self._is_closed:
                raise Closed
            self._items.append(item)
            self._changed.notify_all()

    def get(self) -> T:
        """Take the oldest item, after waiting for one. Raises Closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or len(self._items) > 0)
            if self._is_closed:
                raise Closed
            item = self._items.popleft()
            self._changed.notify_all()
            return item

    def close(self) -> None:
        """End it for both sides; again is fine."""
        with self._changed:
            self._is_closed = True
            self._items.clear()
            self._changed.notify_all()
