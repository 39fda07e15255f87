"""Where a prediction goes and how it is committed: whole or not at all, with a record that tells whether it is up to date.

Of a case NAME there are ``NAME.nii.gz`` or ``NAME.seg.dcm``, on request the folder ``NAME_probabilities``, and the record ``NAME.json``.
All are made in the folder ``.NAME.partial`` beside them. Then what was there before goes, the record is put in place, and last the results.
A case is complete where its record fits what is asked and every result has the bytes that the record says: a crash at any moment leaves
either that, or a case that is predicted again.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ftengine.config import RegionConfig
from ftengine.errors import CaseError, FailureCode
from ftengine.files import sha256_of_files, sync, write_json_whole
from ftengine.geometry import Grid, IntZYX, from_ras, ras_grid
from ftengine.volume.nifti import write_nifti

FORMAT = 1
EXTENSIONS = {"nifti": ".nii.gz", "dicom-seg": ".seg.dcm"}


@dataclass(frozen=True)
class Places:
    """The files of one case below an output folder. probabilities: the folder of them, None where none are asked for."""

    label: Path
    record: Path
    probabilities: Path | None
    partial: Path
    possible: tuple[Path, ...]  # results of this case in any format

    @property
    def results(self) -> tuple[Path, ...]:
        """What is made, the record aside."""
        return (self.label,) if self.probabilities is None else (self.label, self.probabilities)


def places_of(out: Path, stem: str, file_format: str, *, with_probabilities: bool) -> Places:
    """Where the results of a case go."""
    base = out / stem
    probabilities = base.with_name(f"{base.name}_probabilities")
    labels = {name: base.with_name(base.name + extension) for name, extension in EXTENSIONS.items()}
    return Places(
        labels[file_format],
        base.with_name(f"{base.name}.json"),
        probabilities if with_probabilities else None,
        base.with_name(f".{base.name}.partial"),
        (*labels.values(), probabilities),
    )


def read_record(places: Places, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """The record of a case that is complete and was made from the same checkpoint, settings and voxels; else None."""
    record = _record(places)
    if record is None or any(record.get(key) != value for key, value in identity.items()):
        return None
    return record if _has_its_files(places, record) else None


def check_replaceable(places: Places) -> None:
    """CaseError where ``commit`` would remove a file that no prediction wrote, or that was changed since: perhaps somebody's corrections."""
    record = _record(places)
    foreign = [places.record] if record is None and places.record.exists() else []
    for path in (*foreign, *_in_the_way(places, record)):
        if record is None or record["files"].get(path.name) != _digest(path):
            raise CaseError(
                f"{path}: is there and is not, or no longer, what ftengine predict wrote.",
                "Move it away if it is somebody's work; --overwrite replaces it.",
                code=FailureCode.DUPLICATE_NAME,
            )


@contextmanager
def partial_folder(places: Places) -> Iterator[Path]:
    """An empty folder beside the results, gone when the block is left, also by an interruption: of the block, or of the lines here."""
    try:
        try:
            shutil.rmtree(places.partial, ignore_errors=True)  # of a run that was killed
            places.partial.mkdir(parents=True)
            yield places.partial
        finally:
            shutil.rmtree(places.partial, ignore_errors=True)
    except KeyboardInterrupt:
        shutil.rmtree(places.partial, ignore_errors=True)  # what the line above was interrupted in
        raise


def commit(places: Places, record: Mapping[str, Any]) -> None:
    """Move the results of the partial folder, which have their final names, into place behind their record.

    What an earlier prediction of the case left goes, in whatever format it was.
    """
    made = [places.partial / path.name for path in places.results]
    written = places.partial / places.record.name
    document = {"format": FORMAT, **record, "files": {path.name: _digest(path) for path in made}}
    write_json_whole(written, document)
    for path in _in_the_way(places, _record(places)):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    written.replace(places.record)
    for path, place in zip(made, places.results, strict=True):
        path.rename(place)
    sync(places.record.parent)


def _record(places: Places) -> dict[str, Any] | None:
    try:
        record = json.loads(places.record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    is_ours = isinstance(record, dict) and record.get("format") == FORMAT and isinstance(record.get("files"), dict)
    return record if is_ours else None


def _in_the_way(places: Places, record: Mapping[str, Any] | None) -> list[Path]:
    """What is there where results go, and other results of an earlier prediction."""
    known = {} if record is None else record["files"]
    return [p for p in places.possible if p.exists() and (p in places.results or p.name in known)]


def _has_its_files(places: Places, record: Mapping[str, Any]) -> bool:
    return all(path.exists() and record["files"].get(path.name) == _digest(path) for path in places.results)


def _digest(path: Path) -> str:
    """SHA-256 of a file, or of the names and contents in a folder."""
    if not path.is_dir():
        return sha256_of_files(path)
    entries = (f"{file.name}\0{sha256_of_files(file)}\0" for file in sorted(path.iterdir()))
    return hashlib.sha256("".join(entries).encode()).hexdigest()


class ProbabilityFiles:
    """Probabilities, one NIfTI file a class, written slice by slice: ``VALUE_NAME.nii.gz``, float32 with the precision of float16.

    NIfTI has no float16, and the bits that rounding to it clears compress to nothing. Slices come in RAS+ order and wait as float16 on the
    disk; one class after another is turned to the file's own axis order at the end.
    """

    def __init__(self, folder: Path, region: RegionConfig) -> None:
        """folder: is made. It holds the waiting slices too, until ``finish``."""
        folder.mkdir(parents=True)
        names = sorted(region.labels, key=region.labels.__getitem__)
        self._files = [
            folder / f"{region.labels[name]}_{re.sub(r'[^A-Za-z0-9.-]', '_', name)}.nii.gz" for name in names
        ]
        self._waiting = [file.with_suffix(".float16").open("wb") for file in self._files]

    def add(self, probabilities: NDArray[np.float32]) -> None:
        """The next slice, [classes, y, x]."""
        for stream, of_class in zip(self._waiting, probabilities.astype(np.float16), strict=True):
            stream.write(np.ascontiguousarray(of_class).data)

    def finish(self, native: Grid) -> None:
        """Write the files on ``native``; the slices were those of its RAS+ form."""
        shape_zyx: IntZYX = ras_grid(native).shape_zyx
        for file, stream in zip(self._files, self._waiting, strict=True):
            stream.close()
            waiting = Path(stream.name)
            values = np.fromfile(waiting, dtype=np.float16).reshape(shape_zyx)
            write_nifti(file, from_ras(values, native).astype(np.float32), native)
            waiting.unlink()

    def close(self) -> None:
        """Close what is open, after an interruption too."""
        for stream in self._waiting:
            stream.close()
