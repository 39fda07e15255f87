"""A light store: chosen rows of another store's index, dealt into folds; no voxel is copied.

OUT holds ``zarr.json``, the attributes of STORE and the path to it (``volumes_of``), and an index of its own. Every command that reads a
store works on it; the two must keep their places to one another.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ftengine.datasets.registry import Registry, load_registry, plain_name
from ftengine.datasets.subsets import Subset, get_subset
from ftengine.errors import ConfigError
from ftengine.store import index
from ftengine.store.folds import NO_FOLD, assign_folds, rows_in
from ftengine.store.location import Location, locate
from ftengine.store.reader import Store


@dataclass(frozen=True)
class SubsetReport:
    """What a subset holds.

    groups: volumes by (data set, annotation, split). folds: volumes by fold, empty without folds. expected: data set -> (volumes found,
    volumes of Table A11) for a scale of the paper, else empty.
    """

    store: str
    out: str
    groups: dict[tuple[str, str, str], int]
    folds: dict[int, int]
    expected: dict[str, tuple[int, int]]
    is_written: bool

    @property
    def num_volumes(self) -> int:
        """Rows chosen."""
        return sum(self.groups.values())

    def to_json(self) -> dict[str, Any]:
        """Plain values for ``--json``."""
        return {
            "store": self.store,
            "out": self.out,
            "num_volumes": self.num_volumes,
            "groups": [
                {"dataset": d, "annotation": a, "split": s, "volumes": n} for (d, a, s), n in self.groups.items()
            ],
            "folds": {str(fold): count for fold, count in self.folds.items()},
            "expected": {name: {"found": f, "expected": e} for name, (f, e) in self.expected.items()},
            "written": self.is_written,
        }


def make_subset(
    store: Store,
    out: str | Path,
    *,
    subset: str | None = None,
    datasets: Sequence[str] = (),
    cases: Sequence[str] | None = None,
    split: str | None = None,
    num_folds: int = 0,
    seed: int = 0,
    dry_run: bool = False,
) -> SubsetReport:
    """Write a subset of ``store`` into ``out``: the volumes that every given choice allows.

    subset: a scale of Table A11. datasets: names in the store, or of the registry. cases, split: as in the index. num_folds: deal the
    chosen volumes into folds (column ``fold``) by ``seed``; 0 keeps the folds that they have. A subset of a subset points at the store
    that holds the volumes. Raises ConfigError where a name is not there, nothing is left, or ``out`` is not empty.
    """
    place = locate(out)
    _check_place(store, place)
    scale = None if subset is None else get_subset(subset)
    if scale is not None and scale.region != store.region:
        raise ConfigError(
            f"--subset {scale.name}: is a scale of the {scale.region}; {store.location} holds the {store.region}. Choose another scale or store."
        )
    used = rows_in(store.select(["split", "fold"]), split=split)
    column: list[str] = store.column("dataset").to_pylist()
    registry = load_registry()
    entry_of = {name: entry.name if (entry := registry.find(name)) else name for name in set(column)}
    if scale is not None:
        used &= np.isin(column, [name for name, entry in entry_of.items() if entry in scale.volumes])
    if datasets:
        used &= np.isin(column, _named(store, datasets, entry_of, registry))
    if cases is not None:
        if unknown := sorted(set(cases) - set(store.cases)):
            raise ConfigError(
                f"--cases: {len(unknown)} of {len(cases)} cases are not in {store.location}, such as {unknown[0]!r}; "
                f"'ftengine store info {store.location} --cases' lists what is."
            )
        used &= np.isin(store.cases, cases)
    rows = np.flatnonzero(used)
    if not len(rows):
        raise ConfigError(
            f"{store.location}: no volume is left for the subset; it holds the data sets {', '.join(sorted(set(column))) or '(none)'}. "
            "Ask for less, or convert more."
        )
    table = store.index.take(pa.array(rows))
    if num_folds:
        table = _with_folds(table, num_folds, seed)
    if not dry_run:
        write_subset(store, place, table)
    folds = Counter(int(n) for n in table.column("fold").to_numpy() if n != NO_FOLD)
    keys = zip(*(table.column(name).to_pylist() for name in ("dataset", "annotation", "split")), strict=True)
    groups = dict(sorted(Counter((str(d), str(a), str(s)) for d, a, s in keys).items()))
    return SubsetReport(
        str(store.location),
        str(place),
        groups,
        dict(sorted(folds.items())),
        _expected(scale, groups, entry_of),
        not dry_run,
    )


def read_case_list(file: Path) -> list[str]:
    """Case names of a text file, one a line; empty lines and lines that start with ``#`` do not count. Raises ConfigError without any."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: is not UTF-8 text; want case names, one a line.") from error
    names = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not names:
        raise ConfigError(
            f"{file}: holds no case name; want one a line, as 'ftengine store info STORE --cases' lists them."
        )
    return names


def _check_place(store: Store, place: Location) -> None:
    if not place.is_empty():
        raise ConfigError(f"{place}: exists and is not empty. Choose a new folder for the subset.")
    for inside in (store.location, store.volumes):
        if place.is_inside(inside):
            raise ConfigError(f"{place}: lies inside the store {inside}. Choose a folder beside it.")


def _named(store: Store, wanted: Sequence[str], entry_of: Mapping[str, str], registry: Registry) -> list[str]:
    """The store's own names for the data sets asked for; ConfigError for one that it does not hold."""
    found = []
    for name in wanted:
        entry = registry.find(name)
        same = [
            own
            for own, its_entry in entry_of.items()
            if plain_name(own) == plain_name(name) or (entry is not None and its_entry == entry.name)
        ]
        if not same:
            raise ConfigError(
                f"--dataset {name}: {store.location} holds no such data set; it holds {', '.join(sorted(entry_of)) or 'none'}."
            )
        found += same
    return found


def _with_folds(table: index.Table, num_folds: int, seed: int) -> index.Table:
    names = (table.column(name).to_pylist() for name in ("case", "dataset", "annotation"))
    folds: NDArray[np.int8] = assign_folds(*names, num_folds=num_folds, seed=seed)
    return table.set_column(table.column_names.index("fold"), "fold", pa.array(folds))


def _expected(
    scale: Subset | None, groups: Mapping[tuple[str, str, str], int], entry_of: Mapping[str, str]
) -> dict[str, tuple[int, int]]:
    if scale is None:
        return {}
    found: Counter[str] = Counter()
    for (dataset, _, _), count in groups.items():
        found[entry_of[dataset]] += count
    return {name: (found[name], count) for name, count in scale.volumes.items()}


def write_subset(store: Store, place: Location, table: index.Table) -> None:
    """Write a subset of these rows, of the columns of ``store``'s index.

    The index first: a folder without zarr.json is no store, so one cut short is never opened with rows missing.
    """
    index.write_index(place, table)
    document = json.loads(store.location.read_bytes("zarr.json"))
    document["attributes"]["ftengine"]["volumes_of"] = store.volumes.seen_from(place)
    place.write_bytes("zarr.json", json.dumps(document, indent=2).encode())
