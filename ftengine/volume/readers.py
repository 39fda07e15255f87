"""One CT, with or without its label, from any supported file to a ``Volume``.

=======  ==========================================================================================
input    NIfTI, NRRD, MetaImage, or a folder of DICOM slices; the label, in one file or two, in any of the first three
does     picks the loader by the first bytes, turns image and labels to RAS+, compares their grids, lays tumours over organs
output   ``Volume``: RAS+ z y x, HU in -1024..30000, label in the region's values, notes on every repair
raises   CaseError (skip this case) and nothing else, whatever the file holds
=======  ==========================================================================================
"""

import gzip
import math
import zlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray

from ftengine.errors import CaseError, ConfigError, FailureCode
from ftengine.geometry import FloatZYX, Grid, IntZYX, grid_from_codes, grid_offset_vox, ras_grid, to_ras
from ftengine.types import Volume
from ftengine.volume.dicom import load_dicom, probe_dicom
from ftengine.volume.dicom_headers import looks_like_dicom
from ftengine.volume.itk import NRRD_MAGIC, is_metaimage, load_itk, probe_itk
from ftengine.volume.nifti import GZIP_MAGIC, is_nifti, load_nifti, probe_nifti
from ftengine.volume.resample import resample_label_onto
from ftengine.volume.values import MAX_HU, MIN_HU, RawImage, read_failure, shown, stream_failure, to_hu, to_label

MAX_LABEL_OFFSET_VOX = (
    0.1  # between image and label: rounding of headers explains less, and a tumour's edge survives it
)
AROUND_BODY_HU = -950  # emphysema, the darkest lung, begins here; the air around a patient is darker
SUPPORTED = "NIfTI (.nii, .nii.gz), NRRD (.nrrd, .nhdr), MetaImage (.mha, .mhd), or a folder of DICOM slices"
_SNIFFED_BYTES = 1024


@dataclass(frozen=True)
class ReadOptions:
    """What a user allows that a reader refuses otherwise; whatever is used is said in ``Volume.notes``.

    assume_orientation: where x, y and z run to ("RAS", "LPS"), used only for NIfTI and NRRD files whose header has no orientation.
    allow_gaps: missing or unevenly spaced DICOM slices are interpolated linearly between their neighbours.
    nan_hu: the HU that takes the place of NaN and infinity, -1024 to 30000; None refuses them.
    resample_labels: a label on another grid is brought to the image's by nearest neighbour.

    Raises ConfigError for an orientation or a HU that cannot be.
    """

    assume_orientation: str | None = None
    allow_gaps: bool = False
    nan_hu: float | None = None
    resample_labels: bool = False

    def __post_init__(self) -> None:
        if self.assume_orientation is not None:
            grid_from_codes((1, 1, 1), (1.0, 1.0, 1.0), self.assume_orientation)
        if self.nan_hu is not None and not MIN_HU <= self.nan_hu <= MAX_HU:
            raise ConfigError(f"--nan {self.nan_hu:g}: want a HU from {MIN_HU} (air) to {MAX_HU}.")


STRICT = ReadOptions()


@dataclass(frozen=True)
class Probe:
    """What a header says of a volume: its shape and spacing as they will be after turning to RAS+."""

    shape_zyx: IntZYX
    spacing_mm_zyx: FloatZYX


def read_volume(
    image: Path,
    label: Path | None = None,
    *,
    label_values: Collection[int] | None = None,
    label_map: Mapping[int, int] | None = None,
    organ_label: Path | None = None,
    organ_label_map: Mapping[int, int] | None = None,
    tumor_values: Collection[int] | None = None,
    series_files: Collection[Path] = (),
    options: ReadOptions = STRICT,
) -> Volume:
    """Read one CT and, if given, its label, from one file or from two.

    image: a file, or a folder that holds one DICOM series. label: a file on the same grid; another axis order, flip or format is fine.
    label_values: the labels of the region, all that may occur after ``label_map`` (file value -> region value; values that it does not
    name stay); None allows 0 to 255. organ_label: a second file, on the same grid, with a map of its own: its values lie under those of
    ``label``, so that wherever ``label`` is not background it wins. tumor_values: the tumours among the region's labels, counted inside and
    outside the organs of ``organ_label`` in a note; None counts all that ``label`` holds. series_files: which files of a DICOM folder to
    read (``Source.files``).

    Returns RAS+ z, y, x, C-contiguous: int16 HU (float32 only where the file holds fractions), clipped to -1024..30000 before anything
    else is computed; label uint8 or None; ``native`` the grid of the file. Raises CaseError, one line, for everything that would train
    on wrong anatomy: damaged, cut, sheared, unoriented, gapped, multi-phase, NaN, a label on another grid or with foreign values; some
    of it gives way to ``options``.
    """
    raw = _load(image, series_files, options)
    hu, notes = to_hu(raw, shown(image), nan_hu=options.nan_hu)
    notes = list(dict.fromkeys([*raw.notes, *notes]))  # a DICOM series was HU already and brings the same remarks
    turned, grid = to_ras(hu, raw.grid)
    image_hu = cast("NDArray[np.int16] | NDArray[np.float32]", turned)
    native = raw.grid
    del raw, hu, turned  # the native copy is as large as the volume
    volume = Volume(image_hu, None, grid, native, tuple(notes))
    layers: list[NDArray[np.uint8]] = []
    for path, mapping, name in ((organ_label, organ_label_map, "organ label"), (label, label_map, "label")):
        if path is not None:
            values, label_notes = read_label_for(
                volume, path, shown(image), name=name, label_values=label_values, label_map=mapping, options=options
            )
            layers.append(values)
            notes += label_notes
    if len(layers) == 2:
        notes.append(_lay_over(layers[0], layers.pop(), tumor_values))
    return replace(volume, label=layers[0] if layers else None, notes=tuple(notes))


def read_label_for(
    volume: Volume,
    label: Path,
    image_name: str,
    *,
    name: str = "label",
    label_values: Collection[int] | None = None,
    label_map: Mapping[int, int] | None = None,
    options: ReadOptions = STRICT,
) -> tuple[NDArray[np.uint8], list[str]]:
    """A label file on the grid of ``volume`` (RAS+ z, y, x, uint8), and notes. Values and errors as in ``read_volume``.

    A label on another grid (more than 0.1 voxel off) is refused, or with ``options.resample_labels`` brought over by nearest neighbour;
    then a note says how much of it is left and lies on something other than air. One that does not meet the image at all is refused.
    name: "label" or "organ label", as notes and advice call it.
    """
    where = shown(label)
    raw = _load_label(label, options)
    label_grid = ras_grid(raw.grid)
    same_shape = label_grid.shape_zyx == volume.grid.shape_zyx
    offset = grid_offset_vox(volume.grid, label_grid) if same_shape else math.inf
    if offset > MAX_LABEL_OFFSET_VOX and not options.resample_labels:
        raise CaseError(
            f"{where}: the label lies up to {offset:.2f} voxels off its image {image_name}; want at most {MAX_LABEL_OFFSET_VOX}."
            if same_shape
            else f"{where}: label of shape {label_grid.shape_zyx} (z, y, x in RAS+) for an image of shape {volume.grid.shape_zyx}, {image_name}; "
            "want the same grid.",
            "Check that the two belong together; then bring the label to the image's grid with --resample-labels, or leave the case out.",
            code=FailureCode.GRID_MISMATCH,
        )
    map_option = f"--{name.replace(' ', '-')}-map"
    stored = to_label(raw, where, label_values=label_values, label_map=label_map, map_option=map_option)
    values = to_ras(stored, raw.grid)[0]
    notes = [f"{name}: {note}" for note in raw.notes]
    if offset <= MAX_LABEL_OFFSET_VOX:
        return values, notes
    moved = resample_label_onto(values, label_grid, volume.grid)
    before_ml, after_ml = (
        float(np.count_nonzero(v)) * math.prod(g.spacing_mm_zyx) / 1000
        for v, g in ((values, label_grid), (moved, volume.grid))
    )
    if before_ml and not after_ml:
        raise CaseError(
            f"{where}: none of the labelled {before_ml:.3g} ml lies in the image {image_name}; want a label of this image.",
            "Check that the two belong together, or leave the case out.",
            code=FailureCode.GRID_MISMATCH,
        )
    labelled_hu = volume.image_hu[moved > 0]
    inside = np.count_nonzero(labelled_hu > AROUND_BODY_HU) / labelled_hu.size if labelled_hu.size else 1.0
    notes.append(
        f"{name}: resampled onto the image's grid by nearest neighbour, as asked: {before_ml:.3g} ml labelled before, {after_ml:.3g} ml after, "
        f"{100 * inside:.0f} % of it inside the body (above {AROUND_BODY_HU} HU)"
    )
    return moved, notes


def _lay_over(organs: NDArray[np.uint8], tumors: NDArray[np.uint8], tumor_values: Collection[int] | None) -> str:
    """Write ``tumors`` over ``organs`` where they are not background, in place, both [z, y, x]; a note of what lay where.

    Slice by slice: no array of the volume's size is made.
    """
    counted = np.ones(256, dtype=bool) if tumor_values is None else np.isin(np.arange(256), list(tumor_values))
    counted[0] = False
    num_inside = num_outside = num_replaced = 0
    for below, above in zip(organs, tumors, strict=True):
        is_tumor = counted[above]
        inside = int(np.count_nonzero(is_tumor & (below != 0)))
        num_inside += inside
        num_outside += int(np.count_nonzero(is_tumor)) - inside
        wins = above != 0
        num_replaced += int(np.count_nonzero(wins & ~is_tumor & (below != 0) & (below != above)))
        np.copyto(below, above, where=wins)
    replaced = f"; {num_replaced:,} other labelled voxels replace another organ's value" if num_replaced else ""
    return f"labels merged: {num_inside:,} tumour voxels inside an organ of the organ label, {num_outside:,} outside{replaced}"


def read_label(
    label: Path,
    *,
    label_values: Collection[int] | None = None,
    label_map: Mapping[int, int] | None = None,
    map_option: str = "--label-map",
) -> tuple[NDArray[np.uint8], Grid]:
    """A label file alone, turned to RAS+: uint8 [z, y, x] and its grid. Values and errors as in ``read_volume``.

    map_option: the option that sets ``label_map``, for the error.
    """
    raw = _load_label(label, STRICT)
    values = to_label(raw, shown(label), label_values=label_values, label_map=label_map, map_option=map_option)
    return to_ras(values, raw.grid)


def probe(image: Path, *, series_files: Collection[Path] = (), options: ReadOptions = STRICT) -> Probe:
    """Shape and spacing from headers alone, for a listing without reading voxels; raises CaseError as ``read_volume`` does for headers."""
    kind = _kind(image)
    if kind == "dicom":
        grid = probe_dicom(image, series_files, allow_gaps=options.allow_gaps)
    elif kind == "nifti":
        grid = probe_nifti(image, assume_orientation=options.assume_orientation)
    else:
        grid = probe_itk(image, assume_orientation=options.assume_orientation)
    grid = ras_grid(grid)
    return Probe(grid.shape_zyx, grid.spacing_mm_zyx)


def _load(image: Path, series_files: Collection[Path], options: ReadOptions) -> RawImage:
    kind = _kind(image)
    if kind == "dicom":
        return load_dicom(image, series_files, allow_gaps=options.allow_gaps)
    if kind == "nifti":
        return load_nifti(image, assume_orientation=options.assume_orientation)
    return load_itk(image, assume_orientation=options.assume_orientation)


def _load_label(label: Path, options: ReadOptions) -> RawImage:
    kind = _kind(label)
    if kind == "dicom":
        raise CaseError(
            f"{shown(label)}: a label in DICOM; want NIfTI, NRRD or MetaImage.",
            "Convert it (DICOM SEG: dcmqi; RTSTRUCT: plastimatch).",
            code=FailureCode.DICOM_LABEL,
        )
    if kind == "nifti":
        return load_nifti(label, assume_orientation=options.assume_orientation)
    return load_itk(label, assume_orientation=options.assume_orientation)


def _kind(path: Path) -> str:
    """``dicom``, ``nifti`` or ``itk`` by what is there, not by the name; CaseError for anything else."""
    where = shown(path)
    try:
        if path.is_dir():
            return "dicom"
        with path.open("rb") as file:
            first = file.read(_SNIFFED_BYTES)
            if first[:2] == GZIP_MAGIC:
                file.seek(0)
                with gzip.GzipFile(fileobj=file, mode="rb") as unzipped:
                    first = unzipped.read(_SNIFFED_BYTES)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise stream_failure(where, error) from error
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL in it
        raise read_failure(where, error) from error
    if not first:
        raise CaseError(
            f"{where}: an empty file; want {SUPPORTED}.", "Copy or download it again.", code=FailureCode.EMPTY_FILE
        )
    if is_nifti(first):
        return "nifti"
    if first.startswith(NRRD_MAGIC) or is_metaimage(first):
        return "itk"
    if looks_like_dicom(path):
        return "dicom"
    raise CaseError(
        f"{where}: not an image by its first bytes; want {SUPPORTED}.",
        "Convert it or leave the case out.",
        code=FailureCode.NOT_AN_IMAGE,
    )
