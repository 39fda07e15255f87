"""The work cut into units: each has one result file, written whole, and units that must be done before it."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from ftengine.bench.experiments.few_labels.arms import ARMS
from ftengine.bench.experiments.few_labels.protocol import SeedCounts
from ftengine.files import read_json, write_json_whole

Kind = Literal["data", "segmenter", "judge", "generator", "student"]


@dataclass(frozen=True)
class Unit:
    """kind: data; segmenter (S of a seed); judge (trained on the oracle's volumes); generator (name: recipe); student (name: arm)."""

    kind: Kind
    name: str = ""
    seed: int = 0

    @property
    def slug(self) -> str:
        """Its name as a file name."""
        parts = (self.kind, re.sub(r"[^A-Za-z0-9.]+", "_", self.name), "" if self.kind == "data" else str(self.seed))
        return "-".join(part for part in parts if part)

    @property
    def needs(self) -> tuple["Unit", ...]:
        """The units whose results it is made from."""
        data, segmenter = Unit("data"), Unit("segmenter", seed=self.seed)
        if self.kind == "data":
            return ()
        if self.kind in ("segmenter", "judge"):
            return (data,)
        if self.kind == "generator":
            return (segmenter,)
        arm = ARMS[self.name]
        needed = [segmenter]
        if arm.generator is not None:
            needed.append(Unit("generator", arm.generator, self.seed))
        if arm.judge == "many":
            needed.append(Unit("judge", seed=self.seed))
        return tuple(needed)


def plan(arms: Sequence[str], seeds: Sequence[int], counts: SeedCounts) -> list[Unit]:
    """All units of these arms in the order in which they should be done: seed by seed, arms that matter first, needs before uses."""
    students = [
        Unit("student", name, seed)
        for place, seed in enumerate(seeds)
        for name in sorted(arms, key=lambda n: not ARMS[n].matters)
        if place < (counts.matters if ARMS[name].matters else counts.others)
    ]
    return list(dict.fromkeys(needed for unit in students for needed in _with_needs(unit)))


def _with_needs(unit: Unit) -> Iterable[Unit]:
    for needed in unit.needs:
        yield from _with_needs(needed)
    yield unit


def result_file(folder: Path, slug: str) -> Path:
    """Where the result of the unit of this slug lies."""
    return folder / "units" / f"{slug}.json"


def run_folder(folder: Path, unit: Unit) -> Path:
    """Where a unit's training run lies."""
    return folder / "runs" / unit.slug


def is_done(folder: Path, unit: Unit) -> bool:
    """Whether the unit's result is there."""
    return result_file(folder, unit.slug).is_file()


def write_result(folder: Path, unit: Unit, result: dict[str, Any]) -> None:
    """Write a unit's result beside its place and move it there: a file that exists is whole."""
    write_json_whole(result_file(folder, unit.slug), {"unit": asdict(unit), **result})


def read_result(folder: Path, unit: Unit) -> dict[str, Any]:
    """The result of a unit that is done."""
    return read_json(result_file(folder, unit.slug))
