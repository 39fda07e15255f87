"""The index: one row a volume, in Parquet. It is the commit record, and all that the plan needs to know of a volume."""

import fcntl
import hashlib
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias
from zlib import crc32

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ftengine.errors import StoreError
from ftengine.geometry import IntZYX
from ftengine.rng import Purpose, patch_rng
from ftengine.store.layout import CHUNK, chunks_per_axis

Table: TypeAlias = Any  # pyarrow.Table; the package has no type information

ANNOTATIONS = ("tumor", "organ", "none")  # tumours labelled; organs only; no label at all
HU_PERCENTILES = (0.5, 5.0, 25.0, 50.0, 75.0, 95.0, 99.5)
MIN_BODY_VOXELS = (
    256  # an inner chunk with fewer background voxels inside the window's range is not worth a negative patch
)

_CHUNKS = pa.struct(
    [
        ("value", pa.uint8()),  # label value
        ("chunk", pa.list_(pa.int32())),  # inner chunks that hold it, C-order ids
        ("voxels", pa.list_(pa.int32())),  # how many of its voxels
        ("anchor", pa.list_(pa.uint16())),  # one of them, drawn at random: C-order place in the chunk's 32^3
    ]
)
SCHEMA = pa.schema(
    [
        ("case", pa.string()),
        ("dataset", pa.string()),
        ("path", pa.string()),
        ("shape_zyx", pa.list_(pa.int32())),
        ("spacing_mm_zyx", pa.list_(pa.float64())),
        ("affine_ras", pa.list_(pa.float64())),  # of the stored grid; geometry.Grid
        ("source", pa.string()),  # name below the converted folder, never a header
        ("source_sha256", pa.string()),
        ("label_source", pa.string()),
        ("label_sha256", pa.string()),
        ("organ_label_source", pa.string()),  # the file of the organs, where they came in a second one
        ("organ_label_sha256", pa.string()),
        ("label_provenance", pa.string()),  # JSON: what made a pseudo label (tool, version, weights), "" for files
        ("source_stat", pa.string()),  # digest of name, size and time of change of all these files
        ("native_shape_zyx", pa.list_(pa.int32())),
        ("native_affine_ras", pa.list_(pa.float64())),
        ("region", pa.string()),
        ("annotation", pa.string()),
        ("split", pa.string()),
        ("fold", pa.int8()),
        ("class_voxels", pa.list_(pa.int64())),  # by label value
        ("class_chunks", pa.list_(_CHUNKS)),  # label values above 0
        (
            "body_chunks",
            pa.binary(),
        ),  # bit i: chunk i holds at least MIN_BODY_VOXELS of label 0 above the window's low end
        ("num_tumors", pa.int32()),
        ("tumor_values", pa.list_(pa.uint8())),
        ("tumor_diameters_mm", pa.list_(pa.float32())),  # longest axial diameter
        ("hu_percentiles", pa.list_(pa.float32())),  # 0.5 5 25 50 75 95 99.5
        ("stored_bytes", pa.int64()),
        ("conversion", pa.string()),  # JSON of the options that shaped this row: another one converts again
        ("notes", pa.list_(pa.string())),
        ("engine_version", pa.string()),
    ]
)


@dataclass(frozen=True)
class ClassChunks:
    """Where one label value lies in a volume."""

    chunk: NDArray[np.int32]
    voxels: NDArray[np.int32]
    anchor: NDArray[np.uint16]


def locate_classes(label: NDArray[np.uint8], case: str) -> dict[int, ClassChunks]:
    """For each label value above 0: the inner chunks that hold it, with voxel counts and one random voxel each.

    The draw depends on the case's name alone, so that converting again gives the same row.
    """
    grid = chunks_per_axis((label.shape[0], label.shape[1], label.shape[2]))
    rng = patch_rng(0, Purpose.ANCHOR, index=crc32(case.encode()))
    found = {}
    for value in np.unique(label):
        if value == 0:
            continue
        z, y, x = np.unravel_index(rng.permutation(np.flatnonzero(label == value)), label.shape)
        ids = np.ravel_multi_index((z // CHUNK, y // CHUNK, x // CHUNK), grid)
        chunk, first, voxels = np.unique(ids, return_index=True, return_counts=True)
        anchor = np.ravel_multi_index((z[first] % CHUNK, y[first] % CHUNK, x[first] % CHUNK), (CHUNK, CHUNK, CHUNK))
        found[int(value)] = ClassChunks(chunk.astype(np.int32), voxels.astype(np.int32), anchor.astype(np.uint16))
    return found


def body_chunks(image_hu: NDArray[np.int16], label: NDArray[np.uint8] | None, low_hu: float) -> NDArray[np.bool_]:
    """Per inner chunk, flat in C order: does it hold enough background voxels of the body (HU above ``low_hu``, label 0)?"""
    body = image_hu > low_hu
    if label is not None:
        body &= label == 0
    padding = [(0, -n % CHUNK) for n in body.shape]
    nz, ny, nx = chunks_per_axis((body.shape[0], body.shape[1], body.shape[2]))
    blocks = np.pad(body, padding).reshape(nz, CHUNK, ny, CHUNK, nx, CHUNK)
    return (blocks.sum(axis=(1, 3, 5)) >= MIN_BODY_VOXELS).ravel()


def unpack_body_chunks(packed: bytes, shape_zyx: IntZYX) -> NDArray[np.int64]:
    """Ids of the chunks whose bit is set."""
    count = int(np.prod(chunks_per_axis(shape_zyx)))
    return np.flatnonzero(np.unpackbits(np.frombuffer(packed, dtype=np.uint8), count=count))


def read_index(root: Path) -> Table:
    """All rows of a local store: ``index.parquet`` and ``index.d``, ordered by case. Raises StoreError naming the bad file."""
    files = [p for p in (root / "index.parquet", *sorted((root / "index.d").glob("*.parquet"))) if p.exists()]
    tables = []
    for file in files:
        try:
            table = pq.read_table(file)
        except (pa.ArrowException, OSError) as error:
            raise StoreError(
                f"{file}: the index cannot be read ({' '.join(str(error).split())[:200]}). Convert again into a new store."
            ) from error
        missing = [name for name in SCHEMA.names if name not in table.column_names]
        if missing:
            raise StoreError(
                f"{file}: the index lacks the columns {missing}; the store was written by another version. Convert again."
            )
        tables.append(table.select(SCHEMA.names).cast(SCHEMA))
    if not tables:
        return SCHEMA.empty_table()
    merged = pa.concat_tables(tables)
    latest = {
        case: row for row, case in enumerate(merged.column("case").to_pylist())
    }  # a row file beats the compacted index
    return merged.take(pa.array([latest[case] for case in sorted(latest)], type=pa.int64()))


def append_row(root: Path, row: Mapping[str, Any]) -> None:
    """Commit one volume: write its row to ``index.d``, in a file named after the case, and make it durable before returning."""
    folder = root / "index.d"
    folder.mkdir(exist_ok=True)
    _write_table(pa.Table.from_pylist([dict(row)], schema=SCHEMA), _row_file(root, str(row["case"])))


def withdraw_row(root: Path, case: str) -> None:
    """Take back a row that ``append_row`` may have written and nobody has compacted."""
    file = _row_file(root, case)
    if file.exists():
        file.unlink()
        sync_folder(file.parent)


def drop_case(root: Path, case: str) -> None:
    """Withdraw a volume's row, wherever it stands, before its data are written again. Rewrites the compacted index where it is there."""
    withdraw_row(root, case)
    compacted = root / "index.parquet"
    if not compacted.exists():
        return
    table = pq.read_table(compacted)
    keep = [i for i, name in enumerate(table.column("case").to_pylist()) if name != case]
    if len(keep) < table.num_rows:
        _write_table(table.take(pa.array(keep, type=pa.int64())), compacted)


def _row_file(root: Path, case: str) -> Path:
    return root / "index.d" / f"{hashlib.sha256(case.encode()).hexdigest()[:32]}.parquet"


@contextmanager
def only_writer(root: Path) -> Iterator[None]:
    """Hold the store's writer lock; StoreError where another process on this machine holds it. Readers need no lock."""
    with (root / ".writer.lock").open("w", encoding="utf-8") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StoreError(
                f"{root}: another process is converting into this store; wait for it, or convert into another store."
            ) from error
        yield  # the lock goes with the file, also when the process is killed


def write_index(root: Path, table: Table) -> None:
    """Write a whole index at once, durable; for a store whose rows come from another one."""
    _write_table(table.cast(SCHEMA), root / "index.parquet")


def compact_index(root: Path) -> int:
    """Fold ``index.d`` into ``index.parquet``; returns the number of rows. Killed anywhere, no row is lost or doubled."""
    folded = sorted((root / "index.d").glob("*.parquet"))
    table = read_index(root)
    _write_table(table, root / "index.parquet")
    for file in folded:  # only the files that were read: rows written meanwhile stay
        file.unlink(missing_ok=True)
    return int(table.num_rows)


def _write_table(table: Table, path: Path) -> None:
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        pq.write_table(table, partial, compression="zstd")
        sync_file(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_file(path: Path) -> None:
    """Wait until a file's bytes are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(path: Path) -> None:
    """Wait until a folder's entries are on the disk."""
    sync_file(path)


def sync_tree(paths: Iterable[Path]) -> None:
    """Make whole trees durable: every file, then every folder from the leaves up."""
    for top in paths:
        entries = sorted(top.rglob("*"), key=lambda p: -len(p.parts))
        for entry in entries:
            sync_file(entry)
        sync_folder(top)
