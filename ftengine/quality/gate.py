"""The gate: counts verdicts by organ, size class and data set; warns, then stops a run in which almost nothing passes."""

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

from ftengine.config import QualityConfig
from ftengine.errors import RejectionError
from ftengine.types import Painted

_TENTHS = 10


@dataclass
class Tally:
    """Painted and accepted patches of one kind; draws counts redraws too. passed_at_draw: how many passed at draw 1, 2, ..."""

    painted: int = 0
    passed: int = 0
    draws: int = 0
    passed_at_draw: dict[int, int] = field(default_factory=dict)

    @property
    def pass_rate(self) -> float:
        """Share of painted patches that reached training painted; 0 before the first."""
        return self.passed / self.painted if self.painted else 0.0

    @property
    def draws_per_passed(self) -> float:
        """Draws that one accepted patch costs, those of rejected patches included; NaN before the first that passes."""
        return self.draws / self.passed if self.passed else math.nan

    def add(self, other: "Tally") -> None:
        """Count what ``other`` counted too."""
        self.painted += other.painted
        self.passed += other.passed
        self.draws += other.draws
        for draw, count in other.passed_at_draw.items():
            self.passed_at_draw[draw] = self.passed_at_draw.get(draw, 0) + count


@dataclass(frozen=True)
class _Verdict:
    """One patch of the window. proportion: P of Eq. 4, NaN where nobody judged."""

    organ: str
    size_class: str
    dataset: str
    proportion: float
    passed: bool

    @property
    def kind(self) -> tuple[str, str, str]:
        return self.organ, self.size_class, self.dataset


class QualityGate:
    """Counts what quality control decides.

    Once a full window passes below ``min_pass_rate``, ``take_warning`` has a text; RejectionError is raised after as many patches
    again during which the rate never rose to the limit. Where it rises in between, counting starts anew, and another warning comes at
    the earliest a window after the last.
    """

    def __init__(self, config: QualityConfig) -> None:
        self._config = config
        self._recent: deque[_Verdict] = deque(maxlen=config.window)
        self._num_below = 0  # patches since the rate fell below the limit
        self._since_warning = config.window
        self._warning: str | None = None
        self._tallies: dict[tuple[str, str, str], Tally] = {}
        self._lock = Lock()

    def record(self, painted: Painted, dataset: str) -> None:
        """Count one painted patch of a data set. Raises RejectionError naming rate, window, limit, the P's and what to try."""
        verdict = _Verdict(painted.organ, painted.size_class, dataset, painted.proportion, painted.passed)
        passed_at = {painted.num_draws: 1} if painted.passed else {}
        with self._lock:
            tally = self._tallies.setdefault(verdict.kind, Tally())
            tally.add(Tally(1, int(painted.passed), painted.num_draws, passed_at))
            self._recent.append(verdict)
            self._since_warning += 1
            if not self._is_below():
                self._num_below = 0
                return
            self._num_below += 1
            if self._num_below > self._config.window:
                raise RejectionError(
                    f"{self._finding()} It stayed below for a window after the warning. {_advice(self._recent, self._config)}"
                )
            if self._num_below == 1 and self._since_warning > self._config.window:
                self._since_warning = 0
                self._warning = f"{self._finding()} The run stops if the next {self._config.window} stay below. {_advice(self._recent, self._config)}"

    def take_warning(self) -> str | None:
        """The warning that has come up since the last call, if any."""
        with self._lock:
            text, self._warning = self._warning, None
            return text

    @property
    def below_min(self) -> bool:
        """Whether the window is full and passes below ``min_pass_rate``."""
        with self._lock:
            return self._is_below()

    @property
    def window_pass_rate(self) -> float:
        """Share of the last ``window`` painted patches that passed; NaN before the first."""
        with self._lock:
            return self._rate() if self._recent else math.nan

    def total(self) -> Tally:
        """All kinds together."""
        with self._lock:
            return _sum(self._tallies.values())

    def by_organ(self) -> dict[str, Tally]:
        """Tallies by organ."""
        return self._grouped(0)

    def by_size(self) -> dict[str, Tally]:
        """Tallies by size class."""
        return self._grouped(1)

    def by_dataset(self) -> dict[str, Tally]:
        """Tallies by the data set that the painted patch was read from."""
        return self._grouped(2)

    def figures(self) -> dict[str, float]:
        """Numbers for a log line, by name: pass rates since the start of the run, of the window, and what redraws cost."""
        total = self.total()
        kinds = {"organ": self.by_organ(), "size": self.by_size(), "dataset": self.by_dataset()}
        return {
            "qc/pass_rate": total.pass_rate,
            "qc/window_pass_rate": self.window_pass_rate,
            "qc/below_min": float(self.below_min),
            "qc/draws_per_passed": total.draws_per_passed,
            **{f"qc/passed_at_draw/{draw}": float(n) for draw, n in sorted(total.passed_at_draw.items())},
            **{f"qc/pass_rate/{kind}/{name}": t.pass_rate for kind, ts in kinds.items() for name, t in ts.items()},
        }

    def summary(self) -> dict[str, Any]:
        """The run's counts as plain values: the pass rate, and painted, passed and draws of each organ, size class, data set, and each
        size class of an organ.
        """
        total = self.total()
        with self._lock:
            by_both: dict[str, dict[str, Tally]] = {}
            for (organ, size, _), tally in self._tallies.items():
                by_both.setdefault(organ, {}).setdefault(size, Tally()).add(tally)

        def table(tallies: Mapping[str, Tally]) -> dict[str, dict[str, float]]:
            return {
                name: {"painted": t.painted, "passed": t.passed, "draws": t.draws, "pass_rate": t.pass_rate}
                for name, t in tallies.items()
            }

        return {
            "qc/pass_rate": total.pass_rate,
            "painted": total.painted,
            "passed": total.passed,
            "draws": total.draws,
            "draws_per_passed": total.draws_per_passed if total.passed else None,
            "passed_at_draw": {str(draw): n for draw, n in sorted(total.passed_at_draw.items())},
            "by_organ": table(self.by_organ()),
            "by_size": table(self.by_size()),
            "by_dataset": table(self.by_dataset()),
            "by_organ_and_size": {organ: table(sizes) for organ, sizes in by_both.items()},
        }

    def state_dict(self) -> dict[str, Any]:
        """All counts and the window: plain JSON values, and NaN where nobody judged."""
        with self._lock:
            return {
                "threshold": self._config.threshold,
                "tallies": [
                    [*kind, t.painted, t.passed, t.draws, list(t.passed_at_draw.items())]
                    for kind, t in self._tallies.items()
                ],
                "recent": [[*v.kind, v.proportion, v.passed] for v in self._recent],
                "num_below": self._num_below,
                "since_warning": self._since_warning,
            }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on counting where ``state`` was taken; with another ``qc.threshold`` since, the window begins anew."""
        with self._lock:
            self._tallies = {
                (organ, size, dataset): Tally(painted, passed, draws, dict(at_draw))
                for organ, size, dataset, painted, passed, draws, at_draw in state["tallies"]
            }
            self._recent.clear()
            self._num_below, self._since_warning, self._warning = 0, self._config.window, None
            if state["threshold"] == self._config.threshold:
                self._recent.extend(_Verdict(*v) for v in state["recent"])
                self._num_below, self._since_warning = state["num_below"], state["since_warning"]

    def _grouped(self, part: int) -> dict[str, Tally]:
        with self._lock:
            names = dict.fromkeys(kind[part] for kind in self._tallies)
            return {name: _sum(t for kind, t in self._tallies.items() if kind[part] == name) for name in names}

    def _rate(self) -> float:
        return sum(v.passed for v in self._recent) / len(self._recent)

    def _is_below(self) -> bool:
        return len(self._recent) == self._config.window and self._rate() < self._config.min_pass_rate

    def _finding(self) -> str:
        return (
            f"quality control passed {self._rate():.1%} of the last {len(self._recent)} painted patches (limit qc.min_pass_rate="
            f"{self._config.min_pass_rate:.0%}). {_spread(self._recent)}; T={self._config.threshold}, qc.retries={self._config.retries}; "
            f"worst: {_worst(self._recent)}."
        )


def _spread(verdicts: Iterable[_Verdict]) -> str:
    """The distribution of P in one line: quartiles, and how many lie in each tenth of 0 to 1."""
    ordered = sorted(v.proportion for v in verdicts if not math.isnan(v.proportion))
    if not ordered:
        return "P: nobody judged"
    quartiles = ", ".join(f"{ordered[int(q * (len(ordered) - 1))]:.2f}" for q in (0.25, 0.5, 0.75))
    counts = count_tenths(ordered)
    return (
        f"P: quartiles {quartiles}; patches in each tenth from 0 to 1: {' '.join(map(str, counts))} [{_bars(counts)}]"
    )


def count_tenths(proportions: Iterable[float]) -> list[int]:
    """How many P lie in each tenth of 0 to 1; 1 itself counts to the last."""
    counts = [0] * _TENTHS
    for p in proportions:
        counts[min(int(p * _TENTHS), _TENTHS - 1)] += 1
    return counts


def tenth_figures(proportions: Sequence[float]) -> dict[str, float]:
    """Numbers for a log line: the share of P in each tenth of 0 to 1; nothing without a P."""
    counts = count_tenths(proportions)
    return {f"qc/p_tenth/{n}": c / len(proportions) for n, c in enumerate(counts, start=1)} if proportions else {}


def _bars(counts: Sequence[int]) -> str:
    """One character a count, denser for more; a blank for none."""
    ink = ".:-=+*#%@"
    return "".join(ink[-(-c * len(ink) // max(counts)) - 1] if c else " " for c in counts)


def _worst(verdicts: Sequence[_Verdict] | deque[_Verdict]) -> str:
    """The organ, the size class and the data set with the lowest pass rates; of equal ones that with more patches."""
    parts: dict[str, Callable[[_Verdict], str]] = {
        "organ": lambda v: v.organ,
        "size": lambda v: v.size_class,
        "dataset": lambda v: v.dataset,
    }
    texts = []
    for part, name_of in parts.items():
        tallies: dict[str, Tally] = {}
        for verdict in verdicts:
            tallies.setdefault(name_of(verdict), Tally()).add(Tally(1, int(verdict.passed)))
        name, tally = min(tallies.items(), key=lambda item: (item[1].pass_rate, -item[1].painted))
        texts.append(f"{part} {name or '(none)'} {tally.passed} of {tally.painted}")
    return ", ".join(texts)


def _advice(verdicts: Iterable[_Verdict], config: QualityConfig) -> str:
    judged = sorted((v.proportion for v in verdicts if not math.isnan(v.proportion)), reverse=True)
    end = "If this is intended, set qc.min_pass_rate lower."
    if config.threshold is None or not judged:
        return (
            "Without a threshold only an empty mask fails: the organs in the patches leave no room for a tumour. Raise "
            f"synthesis.min_organ_voxels or paint smaller ones (synthesis.size_weights). {end}"
        )
    wanted = judged[max(0, math.ceil(config.min_pass_rate * len(judged)) - 1)]
    suggested = math.floor(wanted * 100) / 100
    if suggested == 0:
        return (
            "The judge sees next to nothing of them: look at them ('ftengine preview'), check that generator and judge were trained for this "
            f"region, and train the generator longer. {end}"
        )
    lower = (
        f"lower qc.threshold (at {suggested:.2f}, {config.min_pass_rate:.0%} of these would have passed)"
        if suggested < config.threshold
        else "lower qc.threshold"
    )
    return f"Train the generator or the judge longer, redraw more often (qc.retries), or {lower}. {end}"


def _sum(tallies: Iterable[Tally]) -> Tally:
    total = Tally()
    for tally in tallies:
        total.add(tally)
    return total
