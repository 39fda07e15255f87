"""A DICOM series: every header is checked before SimpleITK decodes, and what it decoded is checked against the headers.

=======  ==========================================================================================
input    a folder of single-frame CT slices (or the files of one series), compressed or not
does     headers checked and grouped (``dicom_headers``) -> sort along the slice normal -> check gaps, duplicates, tilt and completeness
         -> decode slice by slice through SimpleITK (GDCM) -> compare size, spacing, direction
output   ``RawImage`` in HU, z y x = slice (along the normal), row, column
raises   CaseError that names files, never header text: headers hold patients' data
=======  ==========================================================================================

SimpleITK's own series reader is not used. It drops a truncated slice, stacks a localizer, straightens a tilted gantry and
stretches the spacing over a missing slice, all without an error.
"""

import math
import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from ftengine.errors import CaseError, FailureCode
from ftengine.geometry import Grid, grid_from_lps
from ftengine.volume.dicom_headers import DICOM_MAGIC, PREAMBLE_BYTES, SliceHeader, slice_normal, sort_out
from ftengine.volume.values import MIN_AXIS_VOXELS, MIN_HU, HuStack, RawImage, read_failure, shown, volume_grid

# between neighbouring slices, against the median gap: what rounded positions in headers explain
GAP_TOLERANCE_MM, GAP_TOLERANCE = 0.02, 0.01
# of a slice's position against the regular grid, in slices: the tolerance that labels have, too; accepted with a note
POSITION_TOLERANCE_VOX = 0.1
DUPLICATE_MM = 0.01
# sideways shift over the whole stack, in pixels, before it counts as a tilted gantry
DRIFT_TOLERANCE_VOX = 0.5
# where gaps may be filled: at most this many places a real slice, so that most of a volume was measured (a wild position would ask for thousands)
MAX_FILLED_RATIO = 2.0


@dataclass(frozen=True)
class _Stack:
    """The slices of one series along their normal. places: where each lies on the grid, in slices; None where slice i lies at i."""

    slices: list[SliceHeader]
    grid: Grid
    notes: list[str]
    places: NDArray[np.float64] | None


def load_dicom(image: Path, files: Collection[Path] = (), *, allow_gaps: bool = False) -> RawImage:
    """Read one CT series as HU.

    image: a folder (its sub-folders are not searched), or one file. files: which files of it to read; without them the folder must hold
    one series. allow_gaps: missing and unevenly spaced slices are resampled to even spacing, linearly between real slices (rounded half
    to even; real slices within 0.1 slice of their place are kept as they are), with a note; not where more than half would be invented.
    Raises CaseError naming the file and the numbers for everything that would move or invent anatomy.
    """
    where = shown(image)
    stack = _checked_stack(image, files, allow_gaps=allow_gaps)
    hu = HuStack(stack.grid.shape_zyx, where)
    decoded: dict[int, NDArray[Any]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for index in range(stack.grid.shape_zyx[0]):
            before, behind, weight = (index, index, 0.0) if stack.places is None else _neighbours(stack.places, index)
            needed = {before, behind}
            decoded = {
                i: decoded[i] if i in decoded else _decode(stack.slices[i], where, Path(scratch)) for i in needed
            }
            if before == behind:
                hu.put(index, decoded[before])
            else:  # padding becomes air first, or it would darken what lies beside it
                a, b = (np.maximum(decoded[i].astype(np.float64), MIN_HU) for i in (before, behind))
                hu.put(index, np.rint((1 - weight) * a + weight * b))
    values, hu_notes = hu.finish()
    return RawImage(values, stack.grid, notes=(*stack.notes, *hu_notes))


def _neighbours(places: NDArray[np.float64], index: int) -> tuple[int, int, float]:
    """The slices before and behind a place of the grid and the weight of the latter; twice the same slice where one lies there."""
    nearest = int(np.argmin(np.abs(places - index)))
    if abs(float(places[nearest]) - index) <= POSITION_TOLERANCE_VOX:
        return nearest, nearest, 0.0
    behind = int(np.searchsorted(places, index))
    return behind - 1, behind, float((index - places[behind - 1]) / (places[behind] - places[behind - 1]))


def probe_dicom(image: Path, files: Collection[Path] = (), *, allow_gaps: bool = False) -> Grid:
    """The grid of a series from its headers alone; raises CaseError as ``load_dicom`` does for headers."""
    return _checked_stack(image, files, allow_gaps=allow_gaps, compare_duplicates=False).grid


def ordered_slices(image: Path, files: Collection[Path] = ()) -> tuple[Path, ...]:
    """The files of a series in the order of the grid that ``load_dicom`` gives it, one a slice; raises CaseError as it does for headers."""
    return tuple(
        header.path for header in _checked_stack(image, files, allow_gaps=False, compare_duplicates=False).slices
    )


def _checked_stack(
    image: Path, files: Collection[Path], *, allow_gaps: bool, compare_duplicates: bool = True
) -> _Stack:
    """The slices of one series in order, checked, on their grid."""
    where = shown(image)
    if not files:
        try:
            files = (
                [p for p in image.iterdir() if p.is_file() and not p.name.startswith(".")]
                if image.is_dir()
                else [image]
            )
        except OSError as error:
            raise read_failure(where, error) from error
    found = sort_out(files)
    volumes = found.volumes
    if len(volumes) > 1:
        raise CaseError(
            f"{where}: {len(volumes)} series of {', '.join(str(len(v)) for v in volumes)} slices in one folder; want one.",
            "Convert the folder above it (each series becomes a case) or move each series to its own folder.",
            code=FailureCode.SEVERAL_SERIES,
        )
    by_length = sorted(found.stacks, key=len)
    stack = list(by_length[-1]) if by_length else []
    series = stack[0].series if stack else ""
    for header in found.broken:
        if not stack or header.series in ("", series):
            raise CaseError(
                f"{where}: {shown(Path(header.path.name))} {header.problem}; want whole CT slices.",
                "Replace the file or leave the case out.",
                code=header.code,
            )
    if not stack:
        raise CaseError(
            f"{where}: no CT slice: {found.num_other:,} DICOM files of another kind, {found.num_junk:,} files that are not DICOM; want the folder "
            "of a CT series.",
            "Give the folder that holds the slices or leave it out.",
            code=FailureCode.NO_CT,
        )
    if len(stack) < MIN_AXIS_VOXELS:
        raise CaseError(
            f"{where}: not a volume: {len(stack)} CT slice{'s' if len(stack) > 1 else ''}; want at least {MIN_AXIS_VOXELS}.",
            "A scout, single slice or stub: leave it out, or give the whole series.",
            code=FailureCode.NOT_A_VOLUME,
        )
    ordered, notes = _ordered(stack, where, compare_duplicates=compare_duplicates)
    rescued = sum(not h.has_preamble for h in ordered)
    if rescued:
        notes.append(f"{rescued:,} files have no DICM preamble; read all the same")
    grid, grid_notes, places = _regular_grid(ordered, where, allow_gaps=allow_gaps)
    return _Stack(ordered, volume_grid(grid, where), [*found.notes(stack), *notes, *grid_notes], places)


def _ordered(stack: list[SliceHeader], where: str, *, compare_duplicates: bool) -> tuple[list[SliceHeader], list[str]]:
    """The slices along their normal (never by InstanceNumber), equal twins dropped."""
    normal = slice_normal(stack[0])
    stack = sorted(stack, key=lambda h: (float(np.dot(h.position, normal)), h.path))
    kept = stack[:1]
    num_places = 1 + int((np.diff([float(np.dot(h.position, normal)) for h in stack]) >= DUPLICATE_MM).sum())
    code = FailureCode.SEVERAL_PHASES if len(stack) >= 2 * num_places else FailureCode.DUPLICATE_SLICES
    num_dropped = 0
    with tempfile.TemporaryDirectory() as scratch:
        for header in stack[1:]:
            if np.linalg.norm(np.subtract(header.position, kept[-1].position)) >= DUPLICATE_MM:
                kept.append(header)
                continue
            if compare_duplicates:
                a, b = (_decode(h, where, Path(scratch)) for h in (kept[-1], header))
                if not np.array_equal(a, b):
                    raise CaseError(
                        f"{where}: {shown(Path(kept[-1].path.name))} and {shown(Path(header.path.name))} lie at the same position with different pixels; "
                        "want one slice a position.",
                        "Several phases or reconstructions? Split the series, one volume each.",
                        code=code,
                    )
            num_dropped += 1
    return kept, [f"{num_dropped:,} duplicate slices (same position, same pixels) dropped"] if num_dropped else []


def _regular_grid(
    stack: list[SliceHeader], where: str, *, allow_gaps: bool
) -> tuple[Grid, list[str], NDArray[np.float64] | None]:
    """The grid of ordered slices, notes, and their places on it where gaps are to be filled; CaseError for gaps that are not allowed,
    uneven spacing and a tilted gantry."""
    first = stack[0]
    row, column = np.array(first.orientation).reshape(2, 3)
    normal = slice_normal(first)
    positions = np.array([h.position for h in stack])
    along = positions @ normal
    gaps = np.diff(along)
    if len(stack) < MIN_AXIS_VOXELS:
        raise CaseError(
            f"{where}: not a volume: {len(stack)} slices at different positions; want at least {MIN_AXIS_VOXELS}.",
            "Leave it out.",
            code=FailureCode.NOT_A_VOLUME,
        )
    typical = float(np.median(gaps))
    step = float((along[-1] - along[0]) / (len(stack) - 1))
    index: NDArray[np.float64] = np.arange(len(stack), dtype=np.float64)
    places = None
    num_places = len(stack)
    start = float(np.mean(along - step * index))
    notes = []
    if typical < DUPLICATE_MM or step < DUPLICATE_MM:
        raise CaseError(
            f"{where}: most slices lie at one position; want slices behind one another.",
            "Several phases? Split the series, one volume each.",
            code=FailureCode.SEVERAL_PHASES,
        )
    uneven = np.abs(gaps - typical)
    if uneven.max() > max(GAP_TOLERANCE_MM, GAP_TOLERANCE * typical):
        deviation_vox = float(np.abs(along - start - step * index).max() / step)
        if deviation_vox > POSITION_TOLERANCE_VOX:
            num_places = round(float(along[-1] - along[0]) / typical) + 1
            if not allow_gaps or num_places > MAX_FILLED_RATIO * len(stack):
                raise _gap_error(stack, gaps, typical, where, may_fill=not allow_gaps)
            step = float((along[-1] - along[0]) / (num_places - 1))
            index = places = np.asarray((along - along[0]) / step, dtype=np.float64)
            num_filled = sum(len({*_neighbours(places, i)[:2]}) > 1 for i in range(num_places))
            notes.append(
                f"{num_filled:,} of {num_places:,} slices interpolated between their neighbours, which are up to "
                f"{float(gaps.max()):.3f} mm apart, as asked; spacing {step:.3f} mm"
            )
        else:
            notes.append(
                f"slice positions deviate by up to {deviation_vox:.2f} of a slice from even spacing; taken as even"
            )

    spacing_y, spacing_x = first.spacing_mm_yx
    sideways = positions - positions[0] - np.outer(along - along[0], normal)
    drift = np.stack([sideways @ row / spacing_x, sideways @ column / spacing_y])
    if np.abs(drift).max() > DRIFT_TOLERANCE_VOX:
        shift_mm = float(np.linalg.norm(sideways[-1]) / (num_places - 1))
        raise CaseError(
            f"{where}: the slices are sheared: they shift sideways by {shift_mm:.3g} mm a slice ({math.degrees(math.atan2(shift_mm, step)):.1f} degrees), "
            "as from a tilted gantry; want slices straight behind one another.",
            "Resample the series to a straight grid first or leave the case out.",
            code=FailureCode.GANTRY_TILT,
        )
    matrix = np.eye(4)
    matrix[:3, 0], matrix[:3, 1], matrix[:3, 2] = row * spacing_x, column * spacing_y, normal * step
    matrix[:3, 3] = np.mean(positions - np.outer(index * step, normal), axis=0)
    return grid_from_lps((num_places, first.num_rows, first.num_columns), matrix), notes, places


def _gap_error(
    stack: list[SliceHeader], gaps: NDArray[np.float64], typical: float, where: str, *, may_fill: bool
) -> CaseError:
    worst = int(np.argmax(np.abs(gaps - typical)))
    before, behind = (shown(Path(stack[i].path.name)) for i in (worst, worst + 1))
    times = gaps / typical
    wide = times > 1.5
    if np.all(np.abs(times - np.rint(times)) < 0.1) and wide.any() and times.min() > 0.5:
        missing = int(np.rint(times[wide]).sum() - wide.sum())
        return CaseError(
            f"{where}: {missing} slice{'s' if missing > 1 else ''} missing: {gaps[worst]:.3f} mm between {before} and {behind}, {typical:.3f} mm elsewhere; "
            "want even spacing.",
            "Add the missing files, or fill the gaps from the neighbouring slices with --allow-gaps."
            if may_fill
            else "Add the missing files: more than half of the slices would be invented.",
            code=FailureCode.MISSING_SLICES,
        )
    return CaseError(
        f"{where}: uneven slice spacing: {gaps.min():.3f} to {gaps.max():.3f} mm (median {typical:.3f}, worst between {before} and {behind}); "
        "want even spacing.",
        "Resample to even spacing with --allow-gaps, or leave the case out."
        if may_fill
        else "Leave the case out: more than half of the slices would be invented.",
        code=FailureCode.UNEVEN_SLICES,
    )


def _decode(header: SliceHeader, where: str, scratch: Path) -> NDArray[Any]:
    """One slice [row, column] in HU through SimpleITK, compared with its header."""
    path = header.path
    name = shown(Path(path.name))
    try:
        if not header.has_preamble:  # SimpleITK refuses such a file; a copy with a preamble is the same data set
            copy = scratch / "slice.dcm"
            copy.write_bytes(bytes(PREAMBLE_BYTES) + DICOM_MAGIC + path.read_bytes())
            path = copy
        reader = sitk.ImageFileReader()
        reader.SetImageIO("GDCMImageIO")
        reader.SetFileName(str(path))
        image = reader.Execute()
    except RuntimeError as error:
        raise CaseError(
            f"{where}: the pixels of {name} cannot be decoded; the file is damaged or its compression is not supported.",
            "Replace it or leave the case out.",
            code=FailureCode.UNDECODABLE,
        ) from error
    except OSError as error:
        raise read_failure(f"{where}: {name}", error) from error
    size = (header.num_columns, header.num_rows, 1)
    spacing = header.spacing_mm_yx[::-1]
    direction = np.array(image.GetDirection()).reshape(image.GetDimension(), -1)
    same = (
        image.GetSize() == size
        and image.GetNumberOfComponentsPerPixel() == 1
        and np.allclose(image.GetSpacing()[:2], spacing, rtol=1e-3)
        and np.allclose(direction[:3, :2].T.ravel(), header.orientation, atol=1e-2)
        and np.allclose(image.GetOrigin(), header.position, atol=1e-2)
    )
    if not same:
        raise CaseError(
            f"{where}: SimpleITK reads {name} with another size, spacing or place than its header says; want agreement.",
            "Leave the case out, or convert it to NIfTI and check it.",
            code=FailureCode.HEADER_MISMATCH,
        )
    array: NDArray[Any] = sitk.GetArrayFromImage(image)
    return array[0]
