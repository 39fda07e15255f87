"""Keep a store tidy: fold row files into the index, remove what killed conversions left behind."""

from dataclasses import dataclass

from ftengine.store import index
from ftengine.store.location import Location
from ftengine.store.reader import Store, open_store
from ftengine.store.relabel import LABELS

_VOLUMES = "volumes"


@dataclass(frozen=True)
class Compaction:
    """Rows of the index, files of ``index.d`` folded into it, and folders without a row that were removed (or would be)."""

    num_rows: int
    num_row_files: int
    orphans: tuple[str, ...]


def compact_store(location: Location, *, dry_run: bool = False) -> Compaction:
    """Fold ``index.d`` into ``index.parquet`` and remove volumes without a row, half-written files and scratch folders.

    Readers may go on. Raises StoreError where the store is none, or where somebody is converting into it.
    """
    store = open_store(location)  # refuses what is not a store before anything is removed
    num_row_files = len(location.keys(index.ROW_FOLDER))
    if dry_run:
        return Compaction(len(store), num_row_files, tuple(_orphans(store)))
    with location.only_writer():
        location.clear_scratch()
        num_rows = index.compact_index(location)
        orphans = _orphans(open_store(location))
        for keys in orphans.values():
            for key in keys:
                location.delete(key)
        for key in location.keys("", recursive=False) + location.keys(index.ROW_FOLDER):
            if key.endswith(".partial"):
                location.delete(key)
        location.prune(_VOLUMES)
    return Compaction(num_rows, num_row_files, tuple(orphans))


def _orphans(store: Store) -> dict[str, list[str]]:
    """Files below ``volumes`` that belong to no row and to no folder on the way to one, by the outermost folder that holds only such.

    File by file: case names may hold a folder ``0`` themselves, so that no name tells where a volume ends. A label image of a volume whose
    row knows of none is one, too: a pseudo label that was not committed.
    """
    location = store.location
    volumes = {f"{_VOLUMES}/{case}" for case in store.cases}
    unlabelled = {f"{_VOLUMES}/{case}/{LABELS}" for case in store.cases if not store.has_label(case)}
    on_the_way = {above for volume in volumes for above in _above(volume)} | {_VOLUMES}
    orphans: dict[str, list[str]] = {}
    for key in location.keys(_VOLUMES, recursive=True):
        above = _above(key)
        if key.endswith(".partial") and key.rsplit("/", maxsplit=1)[-1].startswith("."):  # no part of a case name does
            orphans.setdefault(key.removeprefix(f"{_VOLUMES}/"), []).append(key)
            continue
        label = next((folder for folder in above if folder in unlabelled), None)
        if label is not None:
            orphans.setdefault(label.removeprefix(f"{_VOLUMES}/"), []).append(key)
            continue
        is_group = key.endswith("/zarr.json") and above[-1] in on_the_way
        if is_group or not volumes.isdisjoint(above):
            continue
        outermost = next((folder for folder in above if folder not in on_the_way), key)
        orphans.setdefault(outermost.removeprefix(f"{_VOLUMES}/"), []).append(key)
    return orphans


def _above(key: str) -> list[str]:
    """Every folder above a key, from the outermost."""
    parts = key.split("/")
    return ["/".join(parts[:length]) for length in range(1, len(parts))]
