"""A DICOM series: every header is checked before SimpleITK decodes, and what it decoded is checked against the headers.

=======  ==========================================================================================
input    a folder of single-frame CT slices (or the files of one series), compressed or not
does     headers by pydicom -> group by series, orientation, size and pixel spacing -> sort along the slice normal -> check gaps,
         duplicates, tilt and completeness -> decode slice by slice through SimpleITK (GDCM) -> compare size, spacing, direction
output   ``RawImage`` in HU, z y x = slice (along the normal), row, column
raises   CaseError that names files, never header text: headers hold patients' data
=======  ==========================================================================================

SimpleITK's own series reader is not used. It drops a truncated slice, stacks a localizer, straightens a tilted gantry and
stretches the spacing over a missing slice, all without an error.
"""

import math
import struct
import tempfile
import warnings
import zlib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import SimpleITK as sitk
from numpy.typing import NDArray
from pydicom.errors import BytesLengthException, InvalidDicomError

from ftengine.errors import CaseError, FailureCode
from ftengine.geometry import Grid, grid_from_lps
from ftengine.volume.values import MIN_AXIS_VOXELS, MIN_HU, HuStack, RawImage, read_failure, refusal, shown, volume_grid

# between neighbouring slices, against the median gap: what rounded positions in headers explain
GAP_TOLERANCE_MM, GAP_TOLERANCE = 0.02, 0.01
# of a slice's position against the regular grid, in slices: the tolerance that labels have, too; accepted with a note
POSITION_TOLERANCE_VOX = 0.1
DUPLICATE_MM = 0.01
# sideways shift over the whole stack, in pixels, before it counts as a tilted gantry
DRIFT_TOLERANCE_VOX = 0.5
# where gaps may be filled: at most this many places a real slice, so that most of a volume was measured (a wild position would ask for thousands)
MAX_FILLED_RATIO = 2.0
_DIRECTION_TOLERANCE = 1e-3

_DICOM_MAGIC = b"DICM"
_PREAMBLE_BYTES = 128
_META_START = b"\x02\x00\x00\x00UL\x04\x00"  # file meta information where the preamble was lost
_GROUP_8 = b"\x08\x00"
_PIXEL_DATA, _PIXEL_DATA_BIG_ENDIAN = b"\xe0\x7f\x10\x00", b"\x7f\xe0\x00\x10"
_ITEM, _SEQUENCE_END = b"\xfe\xff\x00\xe0", b"\xfe\xff\xdd\xe0"
_UNDEFINED_LENGTH = 0xFFFFFFFF
_CT = "1.2.840.10008.5.1.4.1.1.2"
_CT_MULTIFRAME = ("1.2.840.10008.5.1.4.1.1.2.1", "1.2.840.10008.5.1.4.1.1.2.2")  # enhanced, legacy converted
_UNCOMPRESSED = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2")
_DEFLATED = "1.2.840.10008.1.2.1.99"
_IMPLICIT = "1.2.840.10008.1.2"
_BIG_ENDIAN = "1.2.840.10008.1.2.2"
_TAGS = [
    "SOPClassUID", "Modality", "ImageType", "SeriesInstanceUID", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "Rows", "Columns",
    "NumberOfFrames", "SamplesPerPixel", "BitsAllocated", "PhotometricInterpretation", "RescaleSlope", "RescaleIntercept",
]  # fmt: skip
# what is no CT slice, by the start of its SOP class; the texts are ours, since a header's words are not to be shown
_OTHER_KINDS = {
    "1.2.840.10008.1.3.10": "a DICOMDIR",
    "1.2.840.10008.5.1.4.1.1.7": "a screen save (secondary capture)",
    "1.2.840.10008.5.1.4.1.1.88.": "a structured report (of the dose, say)",
    "1.2.840.10008.5.1.4.1.1.481.": "radiotherapy data (contours, plans, doses)",
    "1.2.840.10008.5.1.4.1.1.66": "a segmentation or registration",
    "1.2.840.10008.5.1.4.1.1.104.": "an encapsulated document",
}
_MODALITIES = frozenset({"CR", "DX", "MG", "MR", "NM", "PT", "PX", "RF", "US", "XA"})
# what pydicom raises for damaged bytes, found by cutting and flipping them; it documents no list
_PARSE_ERRORS = (
    InvalidDicomError, BytesLengthException, EOFError, OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError,
    NotImplementedError, RecursionError, struct.error, zlib.error,
)  # fmt: skip


@dataclass(frozen=True)
class SliceHeader:
    """What the checks need of one file. With a ``problem`` (why the file cannot be used) the geometry may be missing.

    other: what the file is if it is readable but no CT slice, such as "DICOM of modality MR"; then nothing else is known of it.
    image_type: the values of ImageType, upper case; never shown.
    """

    path: Path
    series: str  # groups files; never shown
    problem: str = ""
    code: FailureCode = FailureCode.UNREADABLE  # of the problem
    has_preamble: bool = True
    orientation: tuple[float, ...] = ()  # LPS cosines of a row's and a column's direction
    position: tuple[float, ...] = ()  # LPS mm of the first pixel
    num_rows: int = 0
    num_columns: int = 0
    spacing_mm_yx: tuple[float, float] = (0.0, 0.0)
    other: str = ""
    image_type: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Stack:
    """The slices of one series along their normal. places: where each lies on the grid, in slices; None where slice i lies at i."""

    slices: list[SliceHeader]
    grid: Grid
    notes: list[str]
    places: NDArray[np.float64] | None


@dataclass(frozen=True)
class DicomFiles:
    """The files of a folder, sorted out.

    stacks: slices that belong together (series, orientation, size, pixel spacing), each in file name order.
    broken: CT slices that cannot be used. num_other: readable DICOM that is no CT slice. num_junk: not DICOM at all.
    """

    stacks: tuple[tuple[SliceHeader, ...], ...]
    broken: tuple[SliceHeader, ...]
    num_other: int
    num_junk: int

    @property
    def volumes(self) -> tuple[tuple[SliceHeader, ...], ...]:
        """The stacks with enough slices to be volumes."""
        return tuple(stack for stack in self.stacks if len(stack) >= MIN_AXIS_VOXELS)

    def with_broken(self, stack: Sequence[SliceHeader]) -> tuple[Path, ...]:
        """The files of a stack, and those broken ones that belong, or may belong, to it: reading them then refuses the series."""
        series = stack[0].series if stack else ""
        return tuple(sorted({h.path for h in stack} | {h.path for h in self.broken if h.series in ("", series)}))

    def notes(self, used: Sequence[SliceHeader]) -> list[str]:
        """What of the folder is left out when ``used`` is read."""
        notes = []
        if num_ignored := self.num_other + self.num_junk:
            notes.append(
                f"{num_ignored:,} files of the folder ignored: {self.num_other:,} DICOM without a CT slice, {self.num_junk:,} not DICOM"
            )
        stubs = sum(len(stack) for stack in self.stacks if len(stack) < MIN_AXIS_VOXELS and stack != tuple(used))
        if stubs:
            notes.append(f"{stubs:,} slices of localizers or stubs left out")
        series = used[0].series if used else ""
        if num_broken := sum(h.series not in ("", series) for h in self.broken):
            notes.append(f"{num_broken:,} unusable CT files of other series left out")
        return notes


def looks_like_dicom(path: Path) -> bool:
    """Whether a file is DICOM by its first bytes, or claims to be by its name (``.dcm``); False where it cannot be opened."""
    if path.suffix.lower() == ".dcm":
        return True
    try:
        with path.open("rb") as file:
            first = file.read(_PREAMBLE_BYTES + 4)
    except OSError:
        return False
    if first[_PREAMBLE_BYTES:] == _DICOM_MAGIC or first.startswith(_META_START):
        return True
    # a bare data set without any header: group 8, a small element, then a VR or a short length
    return first.startswith(_GROUP_8) and first[3:4] == b"\0" and (first[4:6].isupper() or first[6:8] == b"\0\0")


def may_be_dicom(path: Path) -> bool:
    """``looks_like_dicom``, or a file that cannot be opened: a series must not lose a slice without a word."""
    if looks_like_dicom(path):
        return True
    try:
        with path.open("rb"):
            return False
    except OSError:
        return True


def sort_out(files: Collection[Path]) -> DicomFiles:
    """Read the headers of ``files`` and group them; no file is refused here, see ``DicomFiles``."""
    headers = [read_slice_header(path) for path in sorted(files) if may_be_dicom(path)]
    slices = [h for h in headers if not h.other]
    return DicomFiles(
        stacked(h for h in slices if not h.problem),
        tuple(h for h in slices if h.problem),
        num_other=len(headers) - len(slices),
        num_junk=len(files) - len(headers),
    )


def stacked(headers: Iterable[SliceHeader]) -> tuple[tuple[SliceHeader, ...], ...]:
    """Usable slices in stacks of one series, size, orientation and pixel spacing, in the order in which they come."""
    stacks: list[list[SliceHeader]] = []
    by_series: dict[str, list[list[SliceHeader]]] = {}  # so that a tree of many series is not searched for each slice
    for header in headers:
        of_series = by_series.setdefault(header.series, [])
        home = next((stack for stack in of_series if _belongs(header, stack[0])), None)
        if home is None:
            of_series.append([header])
            stacks.append(of_series[-1])
        else:
            home.append(header)
    return tuple(tuple(s) for s in stacks)


def _belongs(header: SliceHeader, first: SliceHeader) -> bool:
    return (
        header.series == first.series
        and (header.num_rows, header.num_columns) == (first.num_rows, first.num_columns)
        and bool(np.allclose(header.orientation, first.orientation, rtol=0, atol=_DIRECTION_TOLERANCE))
        and bool(np.allclose(header.spacing_mm_yx, first.spacing_mm_yx, rtol=1e-3, atol=0))
    )


def is_axial(header: SliceHeader) -> bool:
    """Whether a slice lies across the body's long axis, give or take 45 degrees (a tilted gantry is up to 30)."""
    return bool(np.abs(_normal(header)).argmax() == 2)


def read_slice_header(path: Path) -> SliceHeader:
    """The header of one file that looks like DICOM; ``other`` is set if it is no CT slice (a report, a contour set, another modality)."""
    try:
        with path.open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pydicom quotes header values in its warnings
            first = file.read(_PREAMBLE_BYTES + 4)
            has_preamble = first[_PREAMBLE_BYTES:] == _DICOM_MAGIC
            if not has_preamble and not first.startswith(_META_START):
                return SliceHeader(
                    path,
                    "",
                    "is not a DICOM file (no DICM mark and no file meta information)",
                    FailureCode.NOT_AN_IMAGE,
                )
            file.seek(0)
            header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=list(_TAGS), force=not has_preamble)
            syntax = str(header.file_meta.get("TransferSyntaxUID", ""))
            sop_class = str(header.get("SOPClassUID") or header.file_meta.get("MediaStorageSOPClassUID", ""))
            is_ct = str(header.get("Modality") or "") == "CT"
            has_place = "ImagePositionPatient" in header and "ImageOrientationPatient" in header
            if not sop_class and not is_ct and not has_place:
                return SliceHeader(path, "", "cannot be read (its DICOM header is cut short)", FailureCode.TRUNCATED)
            if sop_class not in (_CT, *_CT_MULTIFRAME) and not (is_ct and has_place):
                return SliceHeader(path, "", other=_other_kind(sop_class, str(header.get("Modality") or "")))
            series = str(header.get("SeriesInstanceUID") or "")
            if syntax != _DEFLATED and not _at_pixels(file, syntax):
                # the last value read may be cut, the series among them: this file may belong to any series
                return SliceHeader(path, "", "is cut short (no pixel data)", FailureCode.TRUNCATED, has_preamble)
            problem, code = _problem(header, sop_class)
            if not problem and syntax != _DEFLATED:
                problem, code = (
                    _pixel_problem(file, path.stat().st_size, syntax, header),
                    FailureCode.TRUNCATED,
                )
            image_type = _image_type(header)
            if problem:
                return SliceHeader(path, series, problem, code, has_preamble, image_type=image_type)
            row_mm, column_mm = _numbers(header, "PixelSpacing", 2)
            return SliceHeader(
                path,
                series,
                image_type=image_type,
                has_preamble=has_preamble,
                orientation=_numbers(header, "ImageOrientationPatient", 6),
                position=_numbers(header, "ImagePositionPatient", 3),
                num_rows=int(header.Rows),
                num_columns=int(header.Columns),
                spacing_mm_yx=(row_mm, column_mm),
            )
    except _PARSE_ERRORS as error:
        if isinstance(error, OSError) and error.errno is not None:  # pydicom raises OSErrors for damage, too
            return SliceHeader(path, "", *refusal(error))
        return SliceHeader(path, "", "cannot be read (damaged DICOM header)", FailureCode.DAMAGED_HEADER)


def _other_kind(sop_class: str, modality: str) -> str:
    known = next((text for start, text in _OTHER_KINDS.items() if sop_class.startswith(start)), "")
    return known or (f"DICOM of modality {modality}" if modality in _MODALITIES else "DICOM of another kind than CT")


def _image_type(header: Any) -> tuple[str, ...]:
    try:
        value = header.get("ImageType") or ()
    except _PARSE_ERRORS:  # it only helps to choose: damaged, it must not cost the slice
        return ()
    return tuple(str(v).upper() for v in ([value] if isinstance(value, str) else value))


def _numbers(header: Any, keyword: str, count: int) -> tuple[float, ...]:
    """A tag's finite numbers, or () where it is missing, of another length or not numeric."""
    try:
        value = header.get(keyword)
        values = tuple(float(v) for v in ([value] if count == 1 else value))
    except _PARSE_ERRORS:
        return ()
    return values if len(values) == count and all(math.isfinite(v) for v in values) else ()


def _problem(header: Any, sop_class: str) -> tuple[str, FailureCode]:
    """Why a CT file cannot be a slice of a stack ('' where it can), and the code of that."""
    frames = _numbers(header, "NumberOfFrames", 1)
    if sop_class in _CT_MULTIFRAME or (frames and frames[0] > 1):
        return "is multi-frame DICOM, which is not supported (convert it to NIfTI)", FailureCode.MULTI_FRAME
    for keyword, count, code in (
        ("ImagePositionPatient", 3, FailureCode.NO_POSITION),
        ("ImageOrientationPatient", 6, FailureCode.NO_ORIENTATION),
        ("PixelSpacing", 2, FailureCode.BAD_SPACING),
        ("Rows", 1, FailureCode.DAMAGED_HEADER),
        ("Columns", 1, FailureCode.DAMAGED_HEADER),
    ):
        numbers = _numbers(header, keyword, count)
        if not numbers or (keyword == "PixelSpacing" and min(numbers) <= 0):
            return f"has no usable {keyword}", code
    if (
        not _numbers(header, "RescaleSlope", 1)
        or not _numbers(header, "RescaleIntercept", 1)
        or float(header.RescaleSlope) == 0
    ):
        return "has no usable RescaleSlope and RescaleIntercept, so that its numbers are not HU", FailureCode.NOT_HU
    if (_numbers(header, "SamplesPerPixel", 1) or (1.0,)) != (1.0,):
        return "has several samples a pixel (colour)", FailureCode.NOT_GREY
    if str(header.get("PhotometricInterpretation") or "") != "MONOCHROME2":
        return "is not MONOCHROME2 (GDCM would invert its numbers)", FailureCode.NOT_GREY
    row, column = np.array(_numbers(header, "ImageOrientationPatient", 6)).reshape(2, 3)
    if abs(np.linalg.norm(row) - 1) > 1e-2 or abs(np.linalg.norm(column) - 1) > 1e-2 or abs(float(row @ column)) > 1e-2:
        return "has an ImageOrientationPatient that is not two orthogonal directions", FailureCode.NO_ORIENTATION
    return "", FailureCode.UNREADABLE


def _at_pixels(file: Any, syntax: str) -> bool:
    """Whether ``file``, where pydicom stopped, stands at the tag of the pixel data."""
    here = file.tell()
    tag = file.read(4)
    file.seek(here)
    return bool(tag == (_PIXEL_DATA_BIG_ENDIAN if syntax == _BIG_ENDIAN else _PIXEL_DATA))


def _pixel_problem(file: Any, size_bytes: int, syntax: str, header: Any) -> str:
    """Why the pixel data cannot be whole, or ''; ``file`` stands at the tag of the pixel data."""
    big, implicit = syntax == _BIG_ENDIAN, syntax == _IMPLICIT
    start = file.read(8 if implicit else 12)
    if len(start) < (8 if implicit else 12):
        return "is cut short (no pixel data)"
    (length,) = struct.unpack(">I" if big else "<I", start[-4:])
    if length != _UNDEFINED_LENGTH:
        want = int(header.Rows) * int(header.Columns) * int(header.get("BitsAllocated", 16)) // 8
        got = min(length, size_bytes - file.tell())
        if syntax in _UNCOMPRESSED and got < want:
            return f"is cut short: {got:,} of {want:,} bytes of pixel data"
        return "" if got == length else f"is cut short: {got:,} of {length:,} bytes of pixel data"
    # encapsulated: a chain of items up to a delimiter; decoders fill the rest of a cut image with grey, so walk the chain
    while True:
        tag, size = file.read(4), file.read(4)
        if tag == _SEQUENCE_END and len(size) == 4:
            return ""
        if tag != _ITEM or len(size) < 4:
            return "is cut short (its compressed pixel data have no end)"
        file.seek(struct.unpack("<I", size)[0], 1)


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


def _normal(header: SliceHeader) -> NDArray[np.float64]:
    row, column = np.array(header.orientation).reshape(2, 3)
    normal = np.cross(row, column)
    return np.asarray(normal / np.linalg.norm(normal), dtype=np.float64)


def _ordered(stack: list[SliceHeader], where: str, *, compare_duplicates: bool) -> tuple[list[SliceHeader], list[str]]:
    """The slices along their normal (never by InstanceNumber), equal twins dropped."""
    normal = _normal(stack[0])
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
    normal = _normal(first)
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
            copy.write_bytes(bytes(_PREAMBLE_BYTES) + _DICOM_MAGIC + path.read_bytes())
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
