"""Which inner chunks of each volume hold which label, laid out so that a draw touches only its own row.

=======  ==========================================================================================
input    the columns ``LIST_COLUMNS`` of an index
does     keeps them in memory, or writes them once, uncompressed, into a file of the temporary folder and maps it
output   NumPy views of one row: no copy, no Python object for each of thousands of chunks
raises   StoreError for lists that contradict one another
=======  ==========================================================================================

The file is a cache: named after the digest of what it was made from, used by every process of this machine and user, deleted at will.
"""

import contextlib
import os
import stat
import tempfile
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ftengine.errors import StoreError
from ftengine.files import write_whole

LIST_COLUMNS = ("class_chunks", "body_chunks")


class Labelled(NamedTuple):
    """The chunks that hold the labels of one row: entries ``bounds[0]`` to ``bounds[-1]`` of arrays that hold other rows, too.

    bounds: class i of the row has entries ``bounds[i]`` to ``bounds[i + 1]``. chunk: C-order ids of inner chunks. voxels: how many of
    the class lie there. anchor: one of them, C-order place in the chunk.
    """

    bounds: list[int]
    chunk: NDArray[np.int32]
    voxels: NDArray[np.int32]
    anchor: NDArray[np.uint16]


class ChunkLists:
    """The lists of all rows of a store."""

    def __init__(self, batches: Sequence[Any], order: NDArray[np.int64] | None) -> None:
        """batches: record batches of ``LIST_COLUMNS``. order: which of their rows each row of the store is; None: the same."""
        self._batches = [b for b in batches if b.num_rows]
        self._views: list[_Views | None] = [None] * len(self._batches)
        self._starts = list(accumulate((b.num_rows for b in self._batches), initial=0))
        self._order = order

    @classmethod
    def in_memory(cls, table: Any, order: NDArray[np.int64] | None) -> "ChunkLists":
        """Lists that are small enough to be held by each process."""
        return cls(table.select(list(LIST_COLUMNS)).combine_chunks().to_batches(), order)

    @classmethod
    def mapped(cls, digest: str, batches: Iterable[Any], order: NDArray[np.int64] | None) -> "ChunkLists":
        """Lists in a file named after ``digest``, made of ``batches`` where it is not there yet. Raises OSError where it cannot be."""
        file = _cache_folder() / f"index-{digest}.arrow"
        with contextlib.suppress(OSError, pa.ArrowException):  # not there, or cut short by a full disk: made again
            return cls(_map(file), order)
        write_whole(file, lambda stream: _write(stream, batches), durable=False)
        return cls(_map(file), order)

    def labelled(self, row: int) -> Labelled | None:
        """The labelled chunks of a row; None for a volume without a label or with an empty one."""
        views, place = self._find(row)
        first, last = views.rows[place : place + 2].tolist()
        if first == last:
            return None
        return Labelled(views.classes[first : last + 1].tolist(), views.chunk, views.voxels, views.anchor)

    def body(self, row: int) -> NDArray[np.uint8]:
        """The packed bits of a row's ``body_chunks``."""
        views, place = self._find(row)
        first, last = views.body_rows[place : place + 2].tolist()
        return views.body[first:last]

    def _find(self, row: int) -> tuple["_Views", int]:
        stored = row if self._order is None else int(self._order[row])
        number = bisect_right(self._starts, stored) - 1
        views = self._views[number]
        if views is None:
            views = self._views[number] = _Views(self._batches[number])
        return views, stored - self._starts[number]


class _Views:
    """NumPy views of one record batch."""

    def __init__(self, batch: Any) -> None:
        classes = batch.column("class_chunks")
        chunk, voxels, anchor = (classes.values.field(name) for name in ("chunk", "voxels", "anchor"))
        self.rows = classes.offsets.to_numpy()
        self.classes = chunk.offsets.to_numpy()
        for other in (voxels, anchor):
            if not np.array_equal(other.offsets.to_numpy(), self.classes):
                raise StoreError(
                    "the index is damaged: lists of one class differ in length. Convert again into a new store."
                )
        self.chunk, self.voxels, self.anchor = (a.values.to_numpy(zero_copy_only=True) for a in (chunk, voxels, anchor))
        body = batch.column("body_chunks")
        _, offsets, data = body.buffers()
        self.body_rows = np.frombuffer(offsets, dtype=np.int32)[body.offset : body.offset + len(body) + 1]
        self.body = np.frombuffer(data if data is not None else b"", dtype=np.uint8)


def _cache_folder() -> Path:
    """A folder of the temporary folder that nobody else can write to."""
    folder = Path(tempfile.gettempdir()) / f"ftengine-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise PermissionError(f"{folder} belongs to somebody else")
    return folder


def _map(file: Path) -> list[Any]:
    with pa.memory_map(str(file)) as source:
        reader = pa.ipc.open_file(source)
        return [reader.get_batch(i) for i in range(reader.num_record_batches)]


def _write(stream: IO[bytes], batches: Iterable[Any]) -> None:
    writer = None
    for batch in batches:
        part = pa.record_batch({name: batch.column(name) for name in LIST_COLUMNS})
        writer = writer or pa.ipc.new_file(stream, part.schema)
        writer.write_batch(part)
    if writer is not None:
        writer.close()
