"""A conversion: which cases are to be done, who does them, what became of them. One bad file never stops the others."""

import csv
import io
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ftengine.config import RegionConfig
from ftengine.errors import CaseError, ConfigError
from ftengine.geometry import IntZYX
from ftengine.store import index
from ftengine.store.case import (
    CaseOutcome,
    ConvertOptions,
    Known,
    Task,
    failed,
    hidden,
    source_stat,
    unwritable,
)
from ftengine.store.layout import check_case_name
from ftengine.store.location import Location, locate
from ftengine.store.rows import Rows
from ftengine.store.workers import open_workers, run_tasks
from ftengine.store.writer import CaseNames, create_store
from ftengine.volume.dicom import read_slice_header
from ftengine.volume.discover import Source
from ftengine.volume.readers import STRICT, Probe, ReadOptions, probe

Unchanged = Literal["stat", "hash"]
FAILED = "failed.csv"
FAILED_COLUMNS = ("case", "file", "code", "reason", "advice")
ROWS_PER_COMPACTION = 2_000  # so that opening a store never reads many thousand row files
# Peak of one case, measured on int16 CT with a label (bench/convert.py): the file's voxels twice, then both grids while resampling
_BYTES_PER_NATIVE_VOXEL, _BYTES_PER_STORED_VOXEL, _BYTES_OF_A_PROCESS = 8, 8, 300_000_000


@dataclass(frozen=True)
class Resources:
    """Who converts, and how much memory all of it may take. ``dask``: an address, or ``local:N``; else ``workers`` processes."""

    workers: int = 1
    dask: str | None = None
    memory_bytes: int | None = None  # None: no limit

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ConfigError(f"--workers {self.workers}: want at least 1.")


@dataclass
class ConversionReport:
    """All outcomes of one conversion."""

    store: str
    region: str
    outcomes: list[CaseOutcome] = field(default_factory=list)
    seconds: float = 0.0

    def count(self, status: str) -> int:
        """Number of cases with a status."""
        return sum(o.status == status for o in self.outcomes)

    @property
    def exit_code(self) -> int:
        """0 all usable, 1 some failed, 4 none usable."""
        if self.count("failed") == 0 and self.outcomes:
            return 0
        return 4 if self.count("failed") == len(self.outcomes) else 1

    def to_json(self) -> dict[str, Any]:
        """Plain values for ``--json``."""
        counts = {status: self.count(status) for status in ("converted", "skipped", "failed", "planned")}
        cases = [asdict(o) for o in self.outcomes]
        return {"store": self.store, "region": self.region, "seconds": self.seconds, **counts, "cases": cases}


def convert_cases(
    sources: Sequence[Source],
    store: str | Path | Location,
    region: RegionConfig,
    *,
    options: ConvertOptions | None = None,
    resources: Resources | None = None,
    unchanged: Unchanged = "stat",
    on_start: Callable[[str], None] = lambda _case: None,
    on_outcome: Callable[[CaseOutcome], None] = lambda _outcome: None,
) -> ConversionReport:
    """Convert sources into ``store``, made if it does not exist; a committed case that is up to date is skipped.

    Up to date: equal options, and files of equal name, size and time of change (``unchanged="stat"``) or equal content ("hash").
    A file that cannot be used is reported, here and in the store's ``failed.csv``, and the rest goes on. Killed or interrupted
    anywhere, the store is valid and the same call goes on. ``on_start`` and ``on_outcome`` are called for each case, for progress.
    Raises ConfigError and StoreError for the store itself.
    """
    started = time.perf_counter()
    options = options or ConvertOptions()
    if options.annotation not in ("auto", "tumor", "organ"):
        raise ConfigError(f"--annotated {options.annotation}: want auto, tumor or organ.")
    if unchanged not in ("stat", "hash"):
        raise ConfigError(f"--unchanged {unchanged}: want stat or hash.")
    report = ConversionReport(str(store), region.name)

    names = options.pseudonyms
    real = {source.case if names is None else names.case(source.case): source for source in sources}
    named = sources if names is None else [replace(source, case=names.case(source.case)) for source in sources]

    def note(outcome: CaseOutcome) -> None:
        outcome = hidden(outcome, real[outcome.case], names)
        report.outcomes.append(outcome)
        on_outcome(outcome)

    location = locate(store)
    try:
        create_store(location, region)
        with location.only_writer():
            location.clear_scratch()
            index.compact_index(location)
            try:
                _run(named, location, region, options, resources or Resources(), unchanged, on_start, note)
            finally:
                index.compact_index(location)
                _write_failed(location, report)
    except OSError as error:
        raise unwritable(location, error) from error
    report.outcomes.sort(key=lambda o: o.case)
    report.seconds = time.perf_counter() - started
    return report


def _run(
    sources: Sequence[Source],
    location: Location,
    region: RegionConfig,
    options: ConvertOptions,
    resources: Resources,
    unchanged: Unchanged,
    on_start: Callable[[str], None],
    note: Callable[[CaseOutcome], None],
) -> None:
    known = known_rows(location)
    names = CaseNames(known)
    tasks = []
    for source in sources:
        committed = known.get(source.case)
        try:
            if source.refusal is not None:
                raise source.refusal
            check_case_name(source.case)
            if committed is None:
                names.refuse_nested(source.case, location)
        except CaseError as error:
            note(failed(source, error))
            continue
        if unchanged == "stat" and committed is not None and _is_up_to_date(source, committed, options):
            note(CaseOutcome(source.case, "skipped", reason="already converted, by name, size and time of its files"))
        else:
            tasks.append(Task(source, str(location), region, options, committed))
    with open_workers(workers=min(resources.workers, max(1, len(tasks))), dask=resources.dask) as workers:
        done = run_tasks(
            tasks,
            workers,
            memory_bytes=resources.memory_bytes,
            need_bytes=lambda task: case_bytes(task.source, region, options.reading),
            on_start=lambda task: on_start(task.source.case),
        )
        for number, (_, outcome) in enumerate(done, start=1):
            note(outcome)
            if number % ROWS_PER_COMPACTION == 0:
                index.compact_index(location)


def _is_up_to_date(source: Source, committed: Known, options: ConvertOptions) -> bool:
    try:
        return (committed.stat, committed.conversion) == (source_stat(source), options.text(source))
    except OSError:
        return False  # reading it will say what is wrong


def known_rows(location: Location) -> dict[str, Known]:
    """What the index says of each committed case."""
    rows = Rows(location)
    hashes = [rows.column(n).to_pylist() for n in ("source_sha256", "label_sha256", "organ_label_sha256")]
    facts = zip(*hashes, rows.column("source_stat").to_pylist(), rows.column("conversion").to_pylist(), strict=True)
    cases = rows.column("case").to_pylist()
    return {case: Known((a, b, c), stat, how) for case, (a, b, c, stat, how) in zip(cases, facts, strict=True)}


def stored_shape(info: Probe, region: RegionConfig) -> IntZYX:
    """Voxels of a volume at the region's spacing."""
    scale = np.array(info.spacing_mm_zyx) / np.array(region.spacing_mm_zyx)
    z, y, x = (max(1, round(n * s)) for n, s in zip(info.shape_zyx, scale, strict=True))
    return z, y, x


def case_bytes(source: Source, region: RegionConfig, reading: ReadOptions = STRICT) -> int:
    """The most memory that converting a case takes, from its header; a header that cannot be read needs none."""
    if source.series_files:
        header = read_slice_header(source.series_files[0])
        native = len(source.series_files) * header.num_rows * header.num_columns
        return _BYTES_OF_A_PROCESS + (_BYTES_PER_NATIVE_VOXEL + _BYTES_PER_STORED_VOXEL) * native
    try:
        info = probe(source.image, options=reading)
    except CaseError:
        return _BYTES_OF_A_PROCESS
    native, stored = math.prod(info.shape_zyx), math.prod(stored_shape(info, region))
    return _BYTES_OF_A_PROCESS + _BYTES_PER_NATIVE_VOXEL * native + _BYTES_PER_STORED_VOXEL * stored


def _write_failed(location: Location, report: ConversionReport) -> None:
    """List the cases that cannot be used in ``failed.csv``: those of this run, and earlier ones that were not tried again."""
    tried = {o.case for o in report.outcomes}
    rows = [[o.case, o.file, o.code, o.reason, o.advice] for o in report.outcomes if o.status == "failed"]
    rows += [[row[name] for name in FAILED_COLUMNS] for row in read_failed(location) if row["case"] not in tried]
    if not rows and not location.exists(FAILED):
        return
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(FAILED_COLUMNS)
    writer.writerows([_plain(cell) for cell in row] for row in sorted(rows))
    location.write_bytes(FAILED, text.getvalue().encode("utf-8", "backslashreplace"))


def read_failed(location: Location) -> list[dict[str, str]]:
    """The rows of ``failed.csv``; none where there is no such file."""
    if not location.exists(FAILED):
        return []
    return list(csv.DictReader(io.StringIO(location.read_bytes(FAILED).decode("utf-8"))))


def _plain(cell: str) -> str:
    """A cell that a spreadsheet takes for text: file names are foreign input."""
    return f"'{cell}" if cell[:1] in ("=", "+", "-", "@", "\t", "\r") else cell
