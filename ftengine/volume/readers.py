"""One CT, with or without its label, from any supported file to a ``Volume``.

=======  ==========================================================================================
input    NIfTI, NRRD, MetaImage, or a folder of DICOM slices; the label, in one file or two, in any of the first three
does     picks the loader by the first bytes, turns image and labels to RAS+, compares their grids, lays tumours over organs
output   ``Volume``: RAS+ z y x, HU in -1024..30000, label in the region's values, notes on every repair
raises   CaseError (skip this case) and nothing else, whatever the file holds
=======  ==========================================================================================
"""

import gzip
import zlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray

from ftengine.errors import CaseError
from ftengine.geometry import FloatZYX, Grid, IntZYX, grid_offset_vox, ras_grid, to_ras
from ftengine.types import Volume
from ftengine.volume.dicom import load_dicom, looks_like_dicom, probe_dicom
from ftengine.volume.itk import NRRD_MAGIC, is_metaimage, load_itk, probe_itk
from ftengine.volume.nifti import GZIP_MAGIC, is_nifti, load_nifti, probe_nifti
from ftengine.volume.values import RawImage, shown, to_hu, to_label

MAX_LABEL_OFFSET_VOX = (
    0.1  # between image and label: rounding of headers explains less, and a tumour's edge survives it
)
SUPPORTED = "NIfTI (.nii, .nii.gz), NRRD (.nrrd, .nhdr), MetaImage (.mha, .mhd), or a folder of DICOM slices"
_SNIFFED_BYTES = 1024


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
    assume_orientation: str | None = None,
) -> Volume:
    """Read one CT and, if given, its label, from one file or from two.

    image: a file, or a folder that holds one DICOM series. label: a file on the same grid; another axis order, flip or format is fine.
    label_values: the labels of the region, all that may occur after ``label_map`` (file value -> region value; values that it does not
    name stay); None allows 0 to 255. organ_label: a second file, on the same grid, with a map of its own: its values lie under those of
    ``label``, so that wherever ``label`` is not background it wins. tumor_values: the tumours among the region's labels, counted inside and
    outside the organs of ``organ_label`` in a note; None counts all that ``label`` holds. series_files: which files of a DICOM folder to read (``Source.files``). assume_orientation: where the
    file's x, y and z run to ("RAS", "LPS"), used only for NIfTI and NRRD files whose header has no orientation.

    Returns RAS+ z, y, x, C-contiguous: int16 HU (float32 only where the file holds fractions), clipped to -1024..30000 before anything
    else is computed; label uint8 or None; ``native`` the grid of the file. Raises CaseError, one line, for everything that would train
    on wrong anatomy: damaged, cut, sheared, unoriented, gapped, multi-phase, NaN, a label on another grid or with foreign values.
    """
    raw = _load(image, series_files, assume_orientation)
    hu, notes = to_hu(raw, shown(image))
    notes = [*raw.notes, *notes]
    turned, grid = to_ras(hu, raw.grid)
    image_hu = cast("NDArray[np.int16] | NDArray[np.float32]", turned)
    native = raw.grid
    del raw, hu, turned  # the native copy is as large as the volume
    layers: list[NDArray[np.uint8]] = []
    for path, mapping, name, option in (
        (organ_label, organ_label_map, "organ label", "--organ-label-map"),
        (label, label_map, "label", "--label-map"),
    ):
        if path is not None:
            raw_label = _label_on(grid, path, image, assume_orientation)
            values = to_label(raw_label, shown(path), label_values=label_values, label_map=mapping, map_option=option)
            layers.append(to_ras(values, raw_label.grid)[0])
            notes += [f"{name}: {note}" for note in raw_label.notes]
    if len(layers) == 2:
        notes.append(_lay_over(layers[0], layers.pop(), tumor_values))
    return Volume(image_hu, layers[0] if layers else None, grid, native, tuple(notes))


def _label_on(grid: Grid, label: Path, image: Path, assume_orientation: str | None) -> RawImage:
    """A label file as stored, or a CaseError where it does not lie on the image's RAS+ grid."""
    where = shown(label)
    raw = _load_label(label, assume_orientation)
    label_grid = ras_grid(raw.grid)
    if label_grid.shape_zyx != grid.shape_zyx:
        raise CaseError(
            f"{where}: label of shape {label_grid.shape_zyx} (z, y, x in RAS+) for an image of shape {grid.shape_zyx}, {shown(image)}; want the same "
            "grid. Resample the label to the image or leave the case out."
        )
    offset = grid_offset_vox(grid, label_grid)
    if offset > MAX_LABEL_OFFSET_VOX:
        raise CaseError(
            f"{where}: the label lies up to {offset:.2f} voxels off its image {shown(image)}; want at most {MAX_LABEL_OFFSET_VOX}. "
            "Resample the label to the image's grid or leave the case out."
        )
    return raw


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
    label: Path, *, label_values: Collection[int] | None = None, label_map: Mapping[int, int] | None = None
) -> tuple[NDArray[np.uint8], Grid]:
    """A label file alone, turned to RAS+: uint8 [z, y, x] and its grid. Values and errors as in ``read_volume``."""
    raw = _load_label(label, None)
    return to_ras(to_label(raw, shown(label), label_values=label_values, label_map=label_map), raw.grid)


def probe(image: Path, *, series_files: Collection[Path] = (), assume_orientation: str | None = None) -> Probe:
    """Shape and spacing from headers alone, for a listing without reading voxels; raises CaseError as ``read_volume`` does for headers."""
    kind = _kind(image)
    if kind == "dicom":
        grid = probe_dicom(image, series_files)
    elif kind == "nifti":
        grid = probe_nifti(image, assume_orientation=assume_orientation)
    else:
        grid = probe_itk(image, assume_orientation=assume_orientation)
    grid = ras_grid(grid)
    return Probe(grid.shape_zyx, grid.spacing_mm_zyx)


def _load(image: Path, series_files: Collection[Path], assume_orientation: str | None) -> RawImage:
    kind = _kind(image)
    if kind == "dicom":
        return load_dicom(image, series_files)
    if kind == "nifti":
        return load_nifti(image, assume_orientation=assume_orientation)
    return load_itk(image, assume_orientation=assume_orientation)


def _load_label(label: Path, assume_orientation: str | None) -> RawImage:
    kind = _kind(label)
    if kind == "dicom":
        raise CaseError(
            f"{shown(label)}: a label in DICOM; want NIfTI, NRRD or MetaImage. Convert it (DICOM SEG: dcmqi; RTSTRUCT: plastimatch)."
        )
    if kind == "nifti":
        return load_nifti(label, assume_orientation=assume_orientation)
    return load_itk(label, assume_orientation=assume_orientation)


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
        raise CaseError(
            f"{where}: the gzip stream is cut short or damaged; want a whole file. Copy or download it again."
        ) from error
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL in it
        reason = (
            "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be read ({type(error).__name__})"
        )
        raise CaseError(f"{where}: {reason}; want {SUPPORTED}. Check the path.") from error
    if not first:
        raise CaseError(f"{where}: an empty file; want {SUPPORTED}. Copy or download it again.")
    if is_nifti(first):
        return "nifti"
    if first.startswith(NRRD_MAGIC) or is_metaimage(first):
        return "itk"
    if looks_like_dicom(path):
        return "dicom"
    raise CaseError(f"{where}: not an image by its first bytes; want {SUPPORTED}. Convert it or leave the case out.")
