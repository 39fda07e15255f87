"""Interleaved timing: every candidate once a round, all samples kept."""

import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Row:
    """One thing measured: all samples, in seconds for one call."""

    name: str
    samples_s: list[float] = field(default_factory=list)

    @property
    def median_s(self) -> float:
        """The figure to quote."""
        return statistics.median(self.samples_s)


def interleave(candidates: Mapping[str, Callable[[], object]], *, rounds: int) -> list[Row]:
    """Time each candidate once a round after one warm-up call each, so that a slow minute of the machine hits all alike."""
    for call in candidates.values():
        call()
    rows = {name: Row(name) for name in candidates}
    for _ in range(rounds):
        for name, call in candidates.items():
            started = time.perf_counter()
            call()
            rows[name].samples_s.append(time.perf_counter() - started)
    return list(rows.values())


def peak_bytes() -> int:
    """Most memory that this process has had resident. Not ``ru_maxrss``: that one starts with the peak of the parent process."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split("VmHWM:", maxsplit=1)[1].split(maxsplit=1)[0]) * 1024


def environment() -> dict[str, Any]:
    """What a result file must say of the machine and the code."""
    root = Path(__file__).resolve().parents[1]
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],  # noqa: S607 - the developer's own git
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    import os

    import torch

    return {
        "commit": commit.stdout.strip() or "not a checkout",
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def as_table(title: str, rows: list[Row], baseline: str) -> str:
    """A Markdown table of medians and ratios to ``baseline``."""
    base = next(r.median_s for r in rows if r.name == baseline)
    lines = [
        f"### {title}",
        "",
        "| what | median ms | min ms | max ms | times faster than " + baseline + " |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        low, high = min(row.samples_s), max(row.samples_s)
        lines.append(
            f"| {row.name} | {row.median_s * 1e3:.2f} | {low * 1e3:.2f} | {high * 1e3:.2f} | {base / row.median_s:.2f} |"
        )
    return "\n".join(lines)


def report(title: str, rows: list[Row], baseline: str, *, as_json: bool, extra: Mapping[str, Any]) -> dict[str, Any]:
    """Print one result as a table or JSON and return it."""
    import json

    document = {
        "title": title,
        "environment": environment(),
        **extra,
        "rows": [{"name": r.name, "median_s": r.median_s, "samples_s": r.samples_s} for r in rows],
    }
    print(json.dumps(document, indent=2) if as_json else as_table(title, rows, baseline))
    return document
