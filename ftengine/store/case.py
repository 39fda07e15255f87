"""One case from its files to its committed row: what every worker runs, in this process, another one, or on a cluster.

=======  ==========================================================================================
input    ``Task``: where the files lie, the store, the region, the options; plain values that can travel
does     hashes, reads, resamples, writes and commits; catches what concerns this case alone
output   ``CaseOutcome``
raises   StoreError where the store itself cannot be written: the run stops, what is committed stays
=======  ==========================================================================================
"""

import errno
import hashlib
import json
import time
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, cast

import numpy as np
from numpy.typing import NDArray

from ftengine.config import RegionConfig
from ftengine.errors import CaseError, FailureCode, FtengineError, StoreError
from ftengine.files import sha256_of_files
from ftengine.geometry import FloatZYX
from ftengine.store.location import Location, locate
from ftengine.store.writer import Provenance, write_volume
from ftengine.types import Volume
from ftengine.volume.discover import Source
from ftengine.volume.pseudonyms import Pseudonyms
from ftengine.volume.readers import STRICT, ReadOptions, read_volume
from ftengine.volume.resample import resample
from ftengine.volume.values import read_failure, shown

Annotation = Literal["auto", "tumor", "organ"]
Status = Literal["converted", "skipped", "failed", "planned"]
REPLACED = "replaces the volume of this name that was converted from other files or with other options"


@dataclass(frozen=True)
class ConvertOptions:
    """What of the command line shapes a row; another value converts a case again."""

    annotation: Annotation = "auto"
    split: str = ""  # in place of what the source says
    label_map: tuple[tuple[int, int], ...] = ()  # behind the source's own
    organ_label_map: tuple[tuple[int, int], ...] = ()  # likewise
    reading: ReadOptions = STRICT
    pseudonyms: Pseudonyms | None = None  # in place of names of files in the row; the caller renames the cases

    def text(self, source: Source) -> str:
        """The options that a row was made with, as JSON for the index."""
        return json.dumps(
            {
                "annotation": self.annotation,
                "split": self.split or source.split,
                "label_map": sorted(self.maps(source).items()),
                "organ_label_map": sorted(self.organ_maps(source).items()),
                "reading": asdict(self.reading),
            }
        )

    @classmethod
    def of_row(cls, conversion: str) -> "ConvertOptions":
        """The options that ``text`` wrote into a row."""
        values = json.loads(conversion) if conversion else {}
        return cls(
            annotation=values.get("annotation", "auto"),
            split=values.get("split", ""),
            label_map=tuple((int(a), int(b)) for a, b in values.get("label_map", ())),
            organ_label_map=tuple((int(a), int(b)) for a, b in values.get("organ_label_map", ())),
            reading=ReadOptions(**values.get("reading", {})),
        )

    def file_name(self, path: Path | None) -> str:
        """A file's name as the index may hold it; "" for none."""
        if path is None:
            return ""
        return path.name if self.pseudonyms is None else self.pseudonyms.file(path.name)

    def maps(self, source: Source) -> dict[int, int]:
        """Value in the label file -> value in the region."""
        return dict(source.label_map) | dict(self.label_map)

    def organ_maps(self, source: Source) -> dict[int, int]:
        """Value in the organ label file -> value in the region."""
        return dict(source.organ_label_map) | dict(self.organ_label_map)


@dataclass(frozen=True)
class Known:
    """What the index says of a committed case: enough to tell whether it is up to date."""

    hashes: tuple[str, str, str]  # image, label, organ label
    stat: str
    conversion: str


@dataclass(frozen=True)
class Task:
    """One case to convert. committed: the row that the store holds of it, if any."""

    source: Source
    store: str
    region: RegionConfig
    options: ConvertOptions
    committed: Known | None = None


@dataclass(frozen=True)
class CaseOutcome:
    """What became of one source. reason, advice, code: why it failed; reason also why it was skipped."""

    case: str
    status: Status
    reason: str = ""
    advice: str = ""
    code: str = ""
    file: str = ""  # of a failed case
    notes: tuple[str, ...] = ()
    shape_zyx: tuple[int, int, int] | None = None
    source_bytes: int = 0
    stored_bytes: int = 0
    seconds: float = 0.0


def convert_case(task: Task) -> CaseOutcome:
    """Convert and commit one case. Raises StoreError where the store cannot be written; all else is an outcome."""
    started = time.perf_counter()
    try:
        outcome = _convert(task)
    except CaseError as error:
        outcome = failed(task.source, error)
    return replace(outcome, seconds=time.perf_counter() - started)


def failed(source: Source, error: CaseError) -> CaseOutcome:
    """The outcome of a case that cannot be used."""
    return CaseOutcome(
        source.case,
        "failed",
        reason=error.reason,
        advice=error.advice,
        code=error.code.value,
        file=str(source.image),
        source_bytes=_size_bytes(source),
    )


def hidden(outcome: CaseOutcome, source: Source, pseudonyms: Pseudonyms | None) -> CaseOutcome:
    """The outcome of ``source`` (which has its real name) as it may be shown and stored."""
    if pseudonyms is None:
        return outcome
    paths = {source.image, *source.files, *source.label_files, *source.organ_label_files}
    paths |= {path for path in (source.label, source.organ_label) if path is not None}
    return replace(
        outcome,
        case=pseudonyms.case(source.case),
        file=pseudonyms.file(source.image.name) if outcome.file else "",
        reason=pseudonyms.hide(outcome.reason, source.case, paths),
        advice=pseudonyms.hide(outcome.advice, source.case, paths),
    )


def _convert(task: Task) -> CaseOutcome:
    source, known = task.source, task.committed
    conversion = task.options.text(source)
    try:
        stat = source_stat(source)
        hashes = source_hashes(source)
        if known is not None and (known.hashes, known.conversion) == (hashes, conversion):
            return CaseOutcome(source.case, "skipped", reason="already converted from the same files, by their content")
        region = task.region
        stored = prepare(source, task.options, region.spacing_mm_zyx, region.labels.values(), region.tumor_values)
    except OSError as error:
        raise read_failure(shown(Path(error.filename or source.image)), error) from error
    except MemoryError as error:
        raise CaseError(
            f"{source.image}: out of memory while reading or resampling.",
            "Convert with fewer --workers or a larger --memory, or leave the case out.",
            code=FailureCode.OUT_OF_MEMORY,
        ) from error
    except FtengineError:
        raise
    except Exception as error:  # one odd file must not end a conversion of many thousand
        raise CaseError(
            f"{source.image}: an unexpected {type(error).__name__} while reading.",
            "Please report it with the file's kind and origin; leave the case out meanwhile.",
            code=FailureCode.INTERNAL,
        ) from error
    notes = (*source.notes, *stored.notes, *((REPLACED,) if known is not None else ()))
    provenance = Provenance(
        source=task.options.file_name(source.image),
        source_sha256=hashes[0],
        label_source=task.options.file_name(source.label),
        label_sha256=hashes[1],
        organ_label_source=task.options.file_name(source.organ_label),
        organ_label_sha256=hashes[2],
        source_stat=stat,
        annotation=task.options.annotation if stored.label is not None else "auto",
        split=task.options.split or source.split,
        conversion=conversion,
        notes=notes,
    )
    image = cast("NDArray[np.int16]", stored.image_hu)  # resample rounds to whole HU
    committed = () if known is None else (source.case,)
    try:
        row = write_volume(
            task.store,
            source.case,
            image,
            stored.label,
            stored.grid,
            stored.native,
            task.region,
            provenance,
            committed=committed,
        )
    except OSError as error:
        raise unwritable(locate(task.store), error) from error
    z, y, x = image.shape
    return CaseOutcome(
        source.case,
        "converted",
        notes=notes,
        shape_zyx=(z, y, x),
        source_bytes=_size_bytes(source),
        stored_bytes=row["stored_bytes"],
    )


def prepare(
    source: Source,
    options: ConvertOptions,
    spacing_mm_zyx: FloatZYX,
    label_values: Collection[int],
    tumor_values: Collection[int] | None = None,
) -> Volume:
    """Read a case and bring it to a store's spacing: the voxels that the store holds of it. Raises CaseError, OSError.

    tumor_values: the tumours among ``label_values``, for the note on labels merged from two files (``read_volume``).
    """
    if source.refusal is not None:
        raise source.refusal
    volume = read_volume(
        source.image,
        source.label,
        series_files=source.series_files,
        label_values=label_values,
        label_map=options.maps(source),
        organ_label=source.organ_label,
        organ_label_map=options.organ_maps(source),
        tumor_values=tumor_values,
        options=options.reading,
    )
    return resample(volume, spacing_mm_zyx)


def unwritable(location: Location, error: OSError) -> StoreError:
    """What a full, broken or read-only disk means for a conversion."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    step = "Make room" if full else "Check the disk and its permissions"
    return StoreError(
        f"{location}: cannot be written ({error.strerror or error}); what is committed stays. {step}, then run the same command again."
    )


def source_hashes(source: Source) -> tuple[str, str, str]:
    """SHA-256 of the image's files, of the label's and of the organ label's; "" for a file that is not there."""
    return (
        sha256_of_files(*source.files),
        sha256_of_files(*source.label_files) if source.label is not None else "",
        sha256_of_files(*source.organ_label_files) if source.organ_label is not None else "",
    )


def source_stat(source: Source) -> str:
    """A digest of name, size and time of change of every file of a case: what tells at once that nothing has changed."""
    digest = hashlib.sha256()
    for file in (*source.files, *source.label_files, *source.organ_label_files):
        entry = file.stat()
        digest.update(f"{file.name}\0{entry.st_size}\0{entry.st_mtime_ns}\0".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:32]


def _size_bytes(source: Source) -> int:
    total = 0
    for file in (*source.files, *source.label_files, *source.organ_label_files):
        try:
            total += file.stat().st_size
        except OSError:
            continue  # a missing file has no bytes; why the case failed says the rest
    return total
