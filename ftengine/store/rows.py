"""The rows of an opened store: which there are, in what order, and their columns as somebody asks for them.

=======  ==========================================================================================
input    a location: ``index.parquet`` and what came since, ``index.d``
does     reads case names at once, every other column when it is asked for; keeps the compacted file open
output   Arrow columns in the order of the cases, single values, row numbers, ``ChunkLists``
raises   StoreError naming the file that cannot be read
=======  ==========================================================================================

At 161,310 volumes the lists of inner chunks are nearly all of the index, and only the plan reads them (``chunk_lists``).
"""

import contextlib
import hashlib
import threading
import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ftengine.errors import StoreError
from ftengine.store import index
from ftengine.store.chunk_lists import LIST_COLUMNS, ChunkLists
from ftengine.store.location import Location

_ATTEMPTS, _PAUSE_S = 20, 0.05  # a compaction folds and unlinks row files while they are being read
_READ_BYTES = 4 << 20
_SMALL_BYTES = 64 << 20  # lists of chunks up to this size are simply kept in memory
_LEAST_BYTES_A_VALUE = 2  # of the lists' columns: int32, uint16


class Rows:
    """All rows of a store as they stood when it was opened, ordered by case. Safe to use from many threads.

    A row file beats the compacted index, and a row beats a withdrawal of its case.
    """

    def __init__(self, location: Location) -> None:
        self.location = location
        self._reading = threading.RLock()  # two reads of one Parquet file at once can wait for each other for ever
        for attempt in range(_ATTEMPTS):
            try:
                self._open()
                break
            except FileNotFoundError as error:
                # folded into the compacted index and unlinked between listing and reading: list again
                if attempt == _ATTEMPTS - 1:
                    raise StoreError(
                        f"{location}: files of its index vanish while they are read ({error}). Wait until the conversion into it ends."
                    ) from error
                time.sleep(_PAUSE_S)
        self._columns: dict[str, Any] = {"case": self.cases}

    def _open(self) -> None:
        # listed before the compacted index is opened: what a compaction folds in is seen in one of the two
        withdrawn, row_files = index.row_files(self.location)
        self._compacted: Any = self._open_compacted()
        recent = [index.read_row_file(self.location, key) for key in row_files]
        self._recent = pa.concat_tables(recent) if recent else _no_rows(index.SCHEMA)
        cases = pa.concat_arrays([*self._read_compacted(["case"]).column("case").chunks, pa.nulls(0, pa.string())])
        self._order: Any = None  # None: the compacted file is in order and all there is
        if self._recent.num_rows or withdrawn or not _is_ascending(cases):
            self._order = self._merged_order(cases.to_pylist(), set(withdrawn))
            cases = pa.concat_arrays([cases, *self._recent.column("case").chunks]).take(self._order)
        self.cases = cases
        # the names as bytes in a row, and where each begins: a value of an Arrow array is an object of its own, ten times as slow
        _, starts, text = (b"" if buffer is None else buffer for buffer in cases.buffers())
        self._starts, self._text = memoryview(starts).cast("i")[cases.offset :], memoryview(text)

    def _merged_order(self, compacted: list[str], withdrawn: set[str]) -> Any:
        """Which rows of compacted and recent ones, one behind the other, in which order."""
        latest = {
            case: row
            for row, case in enumerate([*compacted, *self._recent.column("case").to_pylist()])
            if row >= len(compacted) or not withdrawn or index.row_key(case, withdrawn=True) not in withdrawn
        }
        order = np.array([latest[case] for case in sorted(latest)], dtype=np.int64)
        return pa.Array.from_buffers(
            pa.int64(), len(order), [None, pa.py_buffer(order)]
        )  # pa.array would import pandas

    def _open_compacted(self) -> Any:
        if not self.location.exists(index.COMPACTED):
            return None
        file = self.location.local_path(index.COMPACTED)
        with index.readable(self.location, index.COMPACTED):
            # an open file keeps its content when a compaction replaces it; a bucket's object does not, so that one is fetched whole
            source = (
                pa.BufferReader(self.location.read_bytes(index.COMPACTED)) if file is None else pa.OSFile(str(file))
            )
            self._source = source
            parquet = pq.ParquetFile(source)
            index.check_columns(self.location, index.COMPACTED, parquet.schema_arrow.names)
        return parquet

    def _read_compacted(self, names: list[str]) -> Any:
        schema = pa.schema([index.SCHEMA.field(name) for name in names])
        if self._compacted is None:
            return _no_rows(schema)
        with self._reading, index.readable(self.location, index.COMPACTED):
            return self._compacted.read(columns=names).select(names).cast(schema)

    def __len__(self) -> int:
        return len(self.cases)

    def case(self, row: int) -> str:
        """The case of a row."""
        return str(self._text[self._starts[row] : self._starts[row + 1]], "utf-8")

    def number(self, case: str) -> int | None:
        """The row of a case; None for one that is not there."""
        row = bisect_left(range(len(self)), case, key=self.case)  # Arrow's strings and Python's have one order
        return row if row < len(self) and self.case(row) == case else None

    def column(self, name: str) -> Any:
        """A column as a ``pyarrow.ChunkedArray``, read the first time; the lists of chunks are large (``chunk_lists``)."""
        with self._reading:
            if name not in self._columns:
                self._columns[name] = self._ordered([name]).column(name)
            return self._columns[name]

    def select(self, names: Sequence[str]) -> Any:
        """A table of some columns."""
        return pa.Table.from_arrays([self.column(name) for name in names], names=list(names))

    @cached_property
    def table(self) -> Any:
        """All columns of all rows."""
        return self._ordered(index.SCHEMA.names)

    def row(self, number: int) -> dict[str, Any]:
        """All columns of one row as plain values."""
        place = number if self._order is None else int(self._order[number].as_py())
        in_file = 0 if self._compacted is None else self._compacted.metadata.num_rows
        if self._compacted is None or place >= in_file:
            return dict(self._recent.slice(place - in_file, 1).to_pylist()[0])
        group = 0
        while place >= (rows := self._compacted.metadata.row_group(group).num_rows):
            place, group = place - rows, group + 1
        return dict(self._row_group(group).slice(place, 1).to_pylist()[0])

    @cached_property
    def _row_group(self) -> Any:
        @lru_cache(maxsize=1)  # cases are visited in order
        def read(group: int) -> Any:
            with self._reading, index.readable(self.location, index.COMPACTED):
                return (
                    self._compacted.read_row_group(group, columns=index.SCHEMA.names)
                    .select(index.SCHEMA.names)
                    .cast(index.SCHEMA)
                )

        return read

    @cached_property
    def chunk_lists(self) -> ChunkLists:
        """Where the labels of each row lie, ready for drawing: in memory, or of a large store in a file of the temporary folder."""
        order = None if self._order is None else self._order.to_numpy()
        names: list[str] = list(LIST_COLUMNS)
        if self._list_bytes() > _SMALL_BYTES:
            with self._reading, contextlib.suppress(OSError):  # no room, no folder: then in memory
                return ChunkLists.mapped(self._digest(), self._list_batches(), order)
        return ChunkLists.in_memory(pa.concat_tables([self._read_compacted(names), self._recent.select(names)]), order)

    def _list_bytes(self) -> int:
        """Size of the lists of the compacted rows in memory, about.

        In the file a list that repeats an earlier one takes nothing: counted by its values, too.
        """
        if self._compacted is None:
            return 0
        total = 0
        for number in range(self._compacted.metadata.num_row_groups):
            group = self._compacted.metadata.row_group(number)
            columns = [group.column(i) for i in range(group.num_columns)]
            total += sum(
                max(c.total_uncompressed_size, _LEAST_BYTES_A_VALUE * c.num_values)
                for c in columns
                if c.path_in_schema.split(".")[0] in LIST_COLUMNS
            )
        return total

    def _list_batches(self) -> Iterator[Any]:
        names = list(LIST_COLUMNS)
        with index.readable(self.location, index.COMPACTED):
            yield from self._compacted.iter_batches(batch_size=index.ROW_GROUP, columns=names)
        yield from self._recent.select(names).combine_chunks().to_batches()

    def _digest(self) -> str:
        """SHA-256 of what the lists are made from."""
        digest = hashlib.sha256()
        size_bytes = self._source.size()
        for start in range(0, size_bytes, _READ_BYTES):
            digest.update(self._source.read_at(min(_READ_BYTES, size_bytes - start), start))
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, self._recent.select(list(LIST_COLUMNS)).schema) as writer:
            writer.write_table(self._recent.select(list(LIST_COLUMNS)))
        digest.update(sink.getvalue())
        return digest.hexdigest()[:32]

    def _ordered(self, names: list[str]) -> Any:
        """Columns of all rows in their order."""
        stored = self._read_compacted(names)
        if self._order is None:
            return stored
        return pa.concat_tables([stored, self._recent.select(names)]).take(self._order)


def _no_rows(schema: Any) -> Any:
    """An empty table; ``schema.empty_table()`` imports pandas where it is installed: most of a second."""
    return pa.Table.from_batches([], schema=schema)


def _is_ascending(cases: Any) -> bool:
    if len(cases) < 2:
        return True
    return bool(pc.call_function("all", [pc.call_function("less", [cases[:-1], cases[1:]])]).as_py())
