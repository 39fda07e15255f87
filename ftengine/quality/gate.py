"""The gate: counts verdicts by organ and size, and stops a run in which almost nothing passes."""

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from threading import Lock

from ftengine.config import QualityConfig
from ftengine.errors import RejectionError
from ftengine.types import Painted


@dataclass
class Tally:
    """Painted and accepted patches of one kind; draws counts redraws too."""

    painted: int = 0
    passed: int = 0
    draws: int = 0

    @property
    def pass_rate(self) -> float:
        """Share of painted patches that reached training painted; 0 before the first."""
        return self.passed / self.painted if self.painted else 0.0


class QualityGate:
    """Counts what quality control decides; raises RejectionError once a full window passes below ``min_pass_rate``."""

    def __init__(self, config: QualityConfig) -> None:
        self._config = config
        self._recent: deque[bool] = deque(maxlen=config.window)
        self._proportions: deque[float] = deque(maxlen=config.window)
        self._tallies: dict[tuple[str, str], Tally] = {}
        self._lock = Lock()

    def record(self, painted: Painted) -> None:
        """Count one painted patch. Raises RejectionError naming rate, window, limit and what to try."""
        with self._lock:
            tally = self._tallies.setdefault((painted.organ, painted.size_class), Tally())
            tally.painted += 1
            tally.passed += painted.passed
            tally.draws += painted.num_draws
            self._recent.append(painted.passed)
            if not math.isnan(painted.proportion):  # NaN: nobody judged
                self._proportions.append(painted.proportion)
            full = len(self._recent) == self._config.window
            rate = sum(self._recent) / len(self._recent)
            if full and rate < self._config.min_pass_rate:
                raise RejectionError(self._message(rate))

    def total(self) -> Tally:
        """All kinds together."""
        with self._lock:
            return _add(self._tallies.values())

    def by_organ(self) -> dict[str, Tally]:
        """Tallies by organ."""
        return self._grouped(0)

    def by_size(self) -> dict[str, Tally]:
        """Tallies by size class."""
        return self._grouped(1)

    def _grouped(self, part: int) -> dict[str, Tally]:
        with self._lock:
            names = dict.fromkeys(key[part] for key in self._tallies)
            return {name: _add(t for key, t in self._tallies.items() if key[part] == name) for name in names}

    def _message(self, rate: float) -> str:
        ordered = sorted(self._proportions) or [math.nan]
        quartiles = ", ".join(f"{ordered[int(q * (len(ordered) - 1))]:.2f}" for q in (0.25, 0.5, 0.75))
        worst = min(self._tallies.items(), key=lambda item: item[1].pass_rate)
        return (
            f"quality control passed {rate:.1%} of the last {len(self._recent)} painted patches (limit qc.min_pass_rate="
            f"{self._config.min_pass_rate:.0%}); quartiles of P: {quartiles}; T={self._config.threshold}; worst: {'/'.join(worst[0])} at "
            f"{worst[1].pass_rate:.1%}. Training would see almost no tumour: lower qc.threshold, train the generator or the judge longer, "
            "or set qc.min_pass_rate lower if this is intended."
        )


def _add(tallies: Iterable[Tally]) -> Tally:
    total = Tally()
    for tally in tallies:
        total.painted += tally.painted
        total.passed += tally.passed
        total.draws += tally.draws
    return total
