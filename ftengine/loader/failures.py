"""Reads that failed: skipped, counted, named; more of them than allowed stop the run."""

from collections import Counter
from threading import Lock

from ftengine.errors import StoreError

_AT_LEAST = 100  # reads of which the allowed share is taken: one bad volume of the first three is no reason to stop
_NAMED = 5


class Failures:
    """Counts the reads of a loader's life. Safe to use from many threads."""

    def __init__(self, max_bad_fraction: float) -> None:
        self._max_bad_fraction = max_bad_fraction
        self._bad: Counter[str] = Counter()
        self._num_reads = 0
        self._lock = Lock()

    def good(self) -> None:
        """Count a read that went well."""
        with self._lock:
            self._num_reads += 1

    def bad(self, case: str, error: StoreError) -> None:
        """Count a read of ``case`` that failed. Raises StoreError, from ``error``, once too many have."""
        with self._lock:
            self._num_reads += 1
            self._bad[case] += 1
            num_bad, num_reads = self._bad.total(), self._num_reads
            allowed = self._max_bad_fraction * max(_AT_LEAST, num_reads)
        if num_bad > allowed:
            raise StoreError(
                f"{error} So far {num_bad} of {num_reads} reads failed (loader.max_bad_fraction={self._max_bad_fraction:g} of at least "
                f"{_AT_LEAST}): {self.names()}. 'ftengine store verify' lists every damaged volume."
            ) from error

    @property
    def num_bad(self) -> int:
        """Reads that failed."""
        return self._bad.total()

    @property
    def num_reads(self) -> int:
        """All reads."""
        return self._num_reads

    def by_case(self) -> dict[str, int]:
        """Failed reads of each case."""
        with self._lock:
            return dict(self._bad)

    def names(self) -> str:
        """The worst cases in one line."""
        worst = self._bad.most_common(_NAMED)
        more = f" and {len(self._bad) - _NAMED} more" if len(self._bad) > _NAMED else ""
        return ", ".join(f"{case} ({count})" for case, count in worst) + more
