"""DICOM files by their headers alone: which are CT slices, which belong together, and why a file cannot be used.

=======  ==========================================================================================
input    files; nothing behind the header is decoded
does     pydicom reads a short list of tags; pixel data are checked for being whole by their length
output   ``SliceHeader``, ``DicomFiles``: slices grouped by series, orientation, size and pixel spacing
raises   nothing for a bad file: its header says what is wrong. Texts name files and tags, never what a tag holds
=======  ==========================================================================================
"""

import math
import struct
import warnings
import zlib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.errors import BytesLengthException, InvalidDicomError

from ftengine.errors import FailureCode
from ftengine.volume.values import MIN_AXIS_VOXELS, refusal

DICOM_MAGIC = b"DICM"
PREAMBLE_BYTES = 128
_DIRECTION_TOLERANCE = 1e-3
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
            first = file.read(PREAMBLE_BYTES + 4)
    except OSError:
        return False
    if first[PREAMBLE_BYTES:] == DICOM_MAGIC or first.startswith(_META_START):
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
    return bool(np.abs(slice_normal(header)).argmax() == 2)


def read_slice_header(path: Path) -> SliceHeader:
    """The header of one file that looks like DICOM; ``other`` is set if it is no CT slice (a report, a contour set, another modality)."""
    try:
        with path.open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pydicom quotes header values in its warnings
            first = file.read(PREAMBLE_BYTES + 4)
            has_preamble = first[PREAMBLE_BYTES:] == DICOM_MAGIC
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


def slice_normal(header: SliceHeader) -> NDArray[np.float64]:
    """The direction in which the slices of a stack follow one another, a unit vector in LPS."""
    row, column = np.array(header.orientation).reshape(2, 3)
    normal = np.cross(row, column)
    return np.asarray(normal / np.linalg.norm(normal), dtype=np.float64)
