"""The index: one row a volume, in Parquet. It is the commit record, and all that the plan needs to know of a volume."""

import hashlib
from collections.abc import Collection, Iterator, Mapping
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
from ftengine.store.location import Location, locate
from ftengine.volume.labels import value_extents

Table: TypeAlias = Any  # pyarrow.Table; the package has no type information

COMPACTED = "index.parquet"
ROW_FOLDER = "index.d"  # what came since the last compaction: a file a row, and an empty one for a withdrawn case
ROW_GROUP = 4096  # rows: what is decoded to look at one of them
_ROW, _WITHDRAWN = ".parquet", ".withdrawn"

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
    nz, ny, nx = chunks_per_axis((label.shape[0], label.shape[1], label.shape[2]))
    rng = patch_rng(0, Purpose.ANCHOR, index=crc32(case.encode()))
    found = {}
    for value, extent in value_extents(label).items():
        inside = np.nonzero(label[extent.box] == value)
        z, y, x = ((i + start).astype(np.int32) for i, start in zip(inside, extent.origin_zyx, strict=True))
        ids = ((z // CHUNK) * ny + y // CHUNK) * nx + x // CHUNK
        order = rng.permutation(np.arange(len(ids), dtype=np.int32))[::-1]
        first = np.zeros(nz * ny * nx, dtype=np.int32)
        first[ids[order]] = order  # the last assignment of a chunk stays: its first voxel in the drawn order
        voxels = np.bincount(ids, minlength=nz * ny * nx)
        chunk = np.flatnonzero(voxels)
        drawn = first[chunk]
        anchor = ((z[drawn] % CHUNK) * CHUNK + y[drawn] % CHUNK) * CHUNK + x[drawn] % CHUNK
        found[value] = ClassChunks(chunk.astype(np.int32), voxels[chunk].astype(np.int32), anchor.astype(np.uint16))
    return found


def body_chunks(image_hu: NDArray[np.int16], label: NDArray[np.uint8] | None, low_hu: float) -> NDArray[np.bool_]:
    """Per inner chunk, flat in C order: does it hold enough background voxels of the body (HU above ``low_hu``, label 0)?"""
    body = image_hu > low_hu
    if label is not None:
        body &= label == 0
    # slices first, in bytes (at most CHUNK of them): the other axes then start from a thirty-second of the volume
    y_starts, x_starts = (np.arange(0, n, CHUNK) for n in body.shape[1:])
    voxels = [
        np.add.reduceat(
            np.add.reduceat(body[z : z + CHUNK].sum(axis=0, dtype=np.uint8), y_starts, axis=0, dtype=np.int32),
            x_starts,
            axis=1,
        )
        for z in range(0, body.shape[0], CHUNK)
    ]
    return (np.stack(voxels) >= MIN_BODY_VOXELS).ravel()


def hu_percentiles(image_hu: NDArray[np.int16]) -> NDArray[np.float64]:
    """``HU_PERCENTILES`` of every second voxel of every second row and slice: ``np.percentile``, by counting instead of sorting."""
    values = image_hu[::2, ::2, ::2].ravel()
    counts = np.roll(np.bincount(values.view(np.uint16), minlength=1 << 16), 1 << 15)  # of -32768, -32767, ...
    place = (values.size - 1) * np.true_divide(HU_PERCENTILES, 100)
    below = np.floor(place).astype(np.int64)
    ranks = np.minimum([below, below + 1], values.size - 1)
    low, high = np.cumsum(counts).searchsorted(ranks, side="right") - (1 << 15)
    weight = place - below
    return np.where(weight < 0.5, low + (high - low) * weight, high - (high - low) * (1 - weight))


def unpack_body_chunks(packed: bytes, shape_zyx: IntZYX) -> NDArray[np.int64]:
    """Ids of the chunks whose bit is set."""
    count = int(np.prod(chunks_per_axis(shape_zyx)))
    return np.flatnonzero(np.unpackbits(np.frombuffer(packed, dtype=np.uint8), count=count))


def read_index(location: Location) -> Table:
    """All rows and columns of a store, ordered by case. Raises StoreError naming the bad file. ``rows.Rows`` reads less."""
    from ftengine.store.rows import Rows  # it is built on this module

    return Rows(location).table


def read_row_file(location: Location, key: str) -> Table:
    """One file of ``index.d``. Raises FileNotFoundError where a compaction has just folded it in, StoreError where it is damaged."""
    with readable(location, key):
        table = pq.read_table(pa.BufferReader(location.read_bytes(key)))
        check_columns(location, key, table.column_names)
        return table.select(SCHEMA.names).cast(SCHEMA)


@contextmanager
def readable(location: Location, key: str) -> Iterator[None]:
    """What goes wrong while an index file is read becomes a StoreError that names it; a missing file stays FileNotFoundError."""
    try:
        yield
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError) as error:
        raise StoreError(
            f"{location.child(key)}: the index cannot be read ({' '.join(str(error).split())[:200]}). Convert again into a new store."
        ) from error


def check_columns(location: Location, key: str, names: Collection[str]) -> None:
    """StoreError where an index file lacks columns."""
    missing = [name for name in SCHEMA.names if name not in names]
    if missing:
        raise StoreError(
            f"{location.child(key)}: the index lacks the columns {missing}; the store was written by another version. Convert again."
        )


def append_row(location: Location, row: Mapping[str, Any]) -> None:
    """Commit one volume: write its row to ``index.d``, in a file named after the case, and make it durable before returning."""
    _write_table(pa.Table.from_pylist([dict(row)], schema=SCHEMA), location, row_key(str(row["case"])))


def withdraw_case(location: Location, case: str) -> None:
    """Take a volume out of the index, wherever its row stands, before its data are written again."""
    location.write_bytes(row_key(case, withdrawn=True), b"")
    withdraw_row(location, case)


def withdraw_row(location: Location, case: str) -> None:
    """Take back a row that ``append_row`` may have written and nobody has compacted."""
    location.delete(row_key(case))


def has_row_file(location: Location, case: str) -> bool:
    """Whether ``index.d`` holds a row of this case, which a worker that died may have written."""
    return location.exists(row_key(case))


def write_index(location: Location, table: Table) -> None:
    """Write a whole index at once, durable; for a store whose rows come from another one."""
    _write_table(table.cast(SCHEMA), location, COMPACTED)


def compact_index(location: "Location | Path") -> int:
    """Fold ``index.d`` into ``index.parquet``; returns the number of rows. Killed anywhere, no row is lost or doubled."""
    location = locate(location)
    withdrawn, rows = row_files(location)
    table = read_index(location)
    _write_table(table, location, COMPACTED)
    # only the files that were listed: rows written meanwhile stay. Withdrawals first: one that outlived its row's file would hide the
    # row that now stands in the compacted index
    for key in (*withdrawn, *rows):
        location.delete(key)
    return int(table.num_rows)


def row_files(location: Location) -> tuple[list[str], list[str]]:
    """Keys of withdrawals and of rows in ``index.d``."""
    keys = location.keys(ROW_FOLDER)
    return [k for k in keys if k.endswith(_WITHDRAWN)], [k for k in keys if k.endswith(_ROW)]


def row_key(case: str, *, withdrawn: bool = False) -> str:
    """Key of a case's row file, or of the file that withdraws its row."""
    return f"{ROW_FOLDER}/{hashlib.sha256(case.encode()).hexdigest()[:32]}{_WITHDRAWN if withdrawn else _ROW}"


def _write_table(table: Table, location: Location, key: str) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", row_group_size=ROW_GROUP)
    location.write_bytes(key, sink.getvalue().to_pybytes())
