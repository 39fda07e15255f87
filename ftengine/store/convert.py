"""From files to a store: read, turn to RAS+, resample, write, commit; one bad file never stops the others."""

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from errno import EACCES, EISDIR, ELOOP, ENAMETOOLONG, ENOENT, ENOTDIR, EPERM
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from ftengine.config import RegionConfig
from ftengine.errors import CaseError, ConfigError
from ftengine.store import index
from ftengine.store.writer import Provenance, create_store, write_volume
from ftengine.volume.discover import Source
from ftengine.volume.itk import data_files
from ftengine.volume.readers import probe, read_volume
from ftengine.volume.resample import resample

Annotation = Literal["auto", "tumor", "organ"]
_UP_TO_DATE = ("source_sha256", "label_sha256", "organ_label_sha256", "conversion")
# of a path that cannot be read: missing, forbidden, a folder, below a file, a circle of links, too long a name
_OF_A_SOURCE = frozenset({ENOENT, EACCES, EPERM, EISDIR, ENOTDIR, ELOOP, ENAMETOOLONG})
ROWS_PER_COMPACTION = 500  # so that opening a store never reads many thousand row files


@dataclass(frozen=True)
class CaseOutcome:
    """What became of one source."""

    case: str
    status: Literal["converted", "skipped", "failed", "planned"]
    reason: str = ""  # why it failed or was skipped; empty for a converted case
    notes: tuple[str, ...] = ()
    shape_zyx: tuple[int, int, int] | None = None
    stored_bytes: int = 0
    seconds: float = 0.0


@dataclass
class ConversionReport:
    """All outcomes of one conversion."""

    store: str
    region: str
    outcomes: list[CaseOutcome] = field(default_factory=list)

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
        return {"store": self.store, "region": self.region, **counts, "cases": [asdict(o) for o in self.outcomes]}


def convert_cases(
    sources: Sequence[Source],
    store: str | Path,
    region: RegionConfig,
    *,
    annotation: Annotation = "auto",
    split: str = "",
    label_map: Mapping[int, int] | None = None,
    organ_label_map: Mapping[int, int] | None = None,
    assume_orientation: str | None = None,
    dry_run: bool = False,
    on_start: Callable[[str], None] = lambda _case: None,
    on_outcome: Callable[[CaseOutcome], None] = lambda _outcome: None,
) -> ConversionReport:
    """Convert sources into ``store``, made if it does not exist; a case committed from equal files with equal options is skipped.

    A file that cannot be used is reported and the rest goes on. Ctrl-C between or inside cases leaves a valid store.
    split, label_map, organ_label_map: for all sources; a source's own maps are added to them and win, its split counts where none is given.
    ``on_start`` and ``on_outcome`` are called for each case, for progress. Raises ConfigError and StoreError for the store itself.
    """
    report = ConversionReport(str(store), region.name)
    if dry_run:
        for source in sources:
            report.outcomes.append(_plan(source, region, assume_orientation))
            on_outcome(report.outcomes[-1])
        return report
    if annotation not in ("auto", "tumor", "organ"):
        raise ConfigError(f"--annotated {annotation}: want auto, tumor or organ.")
    root = create_store(store, region)
    options = {
        "annotation": annotation,
        "split": split,
        "label_map": sorted((label_map or {}).items()),
        "organ_label_map": sorted((organ_label_map or {}).items()),
        "orientation": assume_orientation,
    }
    with index.only_writer(root):
        known = _known_rows(root)
        try:
            for number, source in enumerate(sources, start=1):
                on_start(source.case)
                report.outcomes.append(_attempt(source, root, region, known, options))
                on_outcome(report.outcomes[-1])
                if number % ROWS_PER_COMPACTION == 0:
                    index.compact_index(root)
        finally:
            index.compact_index(root)
    return report


def _known_rows(root: Path) -> dict[str, tuple[str, ...]]:
    """What decides whether a committed case is up to date: hashes of its files and the options of its conversion."""
    rows = index.read_index(root)
    columns = [rows.column(name).to_pylist() for name in _UP_TO_DATE]
    return dict(zip(rows.column("case").to_pylist(), zip(*columns, strict=True), strict=True))


def _attempt(
    source: Source,
    root: Path,
    region: RegionConfig,
    known: Mapping[str, tuple[str, ...]],
    options: Mapping[str, Any],
) -> CaseOutcome:
    """Convert one source; what concerns this source alone becomes a failed outcome."""
    started = time.perf_counter()
    try:
        return _convert_one(source, root, region, known, options)
    except CaseError as error:
        reason = str(error)
    except OSError as error:
        if error.errno not in _OF_A_SOURCE:  # a full disk, say, concerns the store
            raise
        reason = f"{error.filename}: {error.strerror}. Check the path and its permissions."
    return CaseOutcome(source.case, "failed", reason=reason, seconds=time.perf_counter() - started)


def _plan(source: Source, region: RegionConfig, assume_orientation: str | None) -> CaseOutcome:
    try:
        info = probe(source.image, series_files=source.series_files, assume_orientation=assume_orientation)
    except CaseError as error:
        return CaseOutcome(source.case, "failed", reason=str(error))
    scale = np.array(info.spacing_mm_zyx) / np.array(region.spacing_mm_zyx)
    z, y, x = (max(1, round(n * s)) for n, s in zip(info.shape_zyx, scale, strict=True))
    return CaseOutcome(source.case, "planned", shape_zyx=(z, y, x), stored_bytes=z * y * x * 2)


def _convert_one(
    source: Source,
    root: Path,
    region: RegionConfig,
    known: Mapping[str, tuple[str, ...]],
    options: Mapping[str, Any],
) -> CaseOutcome:
    started = time.perf_counter()
    image_hash = _sha256(source.files)
    label_hash, organ_hash = (
        "" if path is None else _sha256(data_files(path)) for path in (source.label, source.organ_label)
    )
    own = {
        "split": options["split"] or source.split,
        "label_map": sorted({**dict(options["label_map"]), **dict(source.label_map)}.items()),
        "organ_label_map": sorted({**dict(options["organ_label_map"]), **dict(source.organ_label_map)}.items()),
    }
    options = {**options, **own}
    conversion = json.dumps({key: value for key, value in options.items() if key != "organ_label_map" or value})
    before = known.get(source.case)
    if before == (image_hash, label_hash, organ_hash, conversion):
        return CaseOutcome(source.case, "skipped", reason="already converted from the same files with the same options")
    volume = read_volume(
        source.image,
        source.label,
        series_files=source.series_files,
        label_values=region.labels.values(),
        label_map=dict(options["label_map"]),
        organ_label=source.organ_label,
        organ_label_map=dict(options["organ_label_map"]),
        tumor_values=region.tumor_values,
        assume_orientation=options["orientation"],
    )
    stored = resample(volume, region.spacing_mm_zyx)
    image = cast("NDArray[np.int16]", stored.image_hu)  # resample rounds to whole HU
    notes = (*source.notes, *stored.notes)
    if before is not None:
        notes = (*notes, "replaces the volume of this name that was converted from other files or with other options")
    provenance = Provenance(
        source=source.image.name,
        source_sha256=image_hash,
        label_source="" if source.label is None else source.label.name,
        label_sha256=label_hash,
        organ_label_source="" if source.organ_label is None else source.organ_label.name,
        organ_label_sha256=organ_hash,
        annotation=options["annotation"] if stored.label is not None else "auto",
        split=options["split"],
        conversion=conversion,
        notes=notes,
    )
    row = write_volume(
        root, source.case, image, stored.label, stored.grid, volume.native, region, provenance, is_new=before is None
    )
    z, y, x = image.shape
    return CaseOutcome(
        source.case, "converted", "", notes, (z, y, x), row["stored_bytes"], time.perf_counter() - started
    )


def _sha256(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
