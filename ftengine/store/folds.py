"""Folds and splits: which rows of an index a run uses, and how volumes are dealt into folds."""

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ftengine.errors import ConfigError
from ftengine.store.index import Table

if TYPE_CHECKING:
    from ftengine.store.reader import Store

NO_FOLD = -1
MAX_FOLDS = 100  # the column is int8


def assign_folds(
    cases: Sequence[str], datasets: Sequence[str], annotations: Sequence[str], *, num_folds: int, seed: int
) -> NDArray[np.int8]:
    """The fold of each volume, 0 to ``num_folds`` - 1, int8 in the order of ``cases``; a function of the seed and the names alone.

    Dealt by (data set, annotation): within each of them, and over all, folds differ by one volume at most. The order of the deal is that
    of a hash of seed and name, so the order of the rows does not matter. Raises ConfigError for a number of folds that is not 2 to 100.
    """
    if not 2 <= num_folds <= MAX_FOLDS:
        raise ConfigError(f"--folds {num_folds}: want 2 to {MAX_FOLDS}.")
    strata: dict[tuple[str, str], list[int]] = defaultdict(list)
    for row, key in enumerate(zip(datasets, annotations, strict=True)):
        strata[key].append(row)
    dealt = np.empty(len(cases), dtype=np.int8)
    turn = 0  # goes on over the strata: many small ones must not all begin with fold 0
    for key in sorted(strata):
        for row in sorted(strata[key], key=lambda r: _draw(seed, cases[r])):
            dealt[row] = turn % num_folds
            turn += 1
    return dealt


def _draw(seed: int, case: str) -> bytes:
    return hashlib.sha256(f"{seed}\0{case}".encode()).digest()


def rows_in(
    table: Table, *, split: str | None = None, fold: int | None = None, held_out_fold: int | None = None
) -> NDArray[np.bool_]:
    """Per row of an index: is it of this split, in this fold, and not in the held-out fold? None asks nothing.

    A volume without a fold (-1) is in no fold, so it is never held out. Raises ConfigError for a fold that no volume is in.
    """
    used = np.ones(table.num_rows, dtype=bool)
    if split is not None:
        used &= np.array(table.column("split").to_pylist(), dtype=str) == split
    if fold is None and held_out_fold is None:
        return used
    folds = table.column("fold").to_numpy()
    for wanted in {fold, held_out_fold} - {None}:
        if wanted not in folds or wanted == NO_FOLD:
            there = sorted({int(n) for n in folds} - {NO_FOLD})
            raise ConfigError(
                f"--fold {wanted}: no volume is in it (folds of this store: {', '.join(map(str, there)) or 'none'}). "
                "'ftengine store subset STORE OUT --folds 5' deals volumes into folds."
            )
    if fold is not None:
        used &= folds == fold
    if held_out_fold is not None:
        used &= folds != held_out_fold
    return used


def cases_of_kind(store: "Store", kind: str, split: str | None, fold: int | None) -> list[str]:
    """The volumes of a store whose annotation is ``kind`` (tumor, organ, none), of a split and of a fold."""
    used = rows_in(store.select(["split", "fold"]), split=split, fold=fold)
    rows = zip(store.cases, store.column("annotation").to_pylist(), used, strict=True)
    return [case for case, annotation, is_used in rows if is_used and annotation == kind]
