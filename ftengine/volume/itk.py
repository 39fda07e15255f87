"""NRRD and MetaImage: the header through SimpleITK, the voxels by ourselves.

=======  ==========================================================================================
input    .nrrd, .nhdr (detached data), .mha, .mhd (detached data); raw or compressed with gzip or zlib
does     SimpleITK reads the header and turns every NRRD ``space`` into LPS; the voxels are decompressed here, checksum and length verified
output   ``RawImage`` in the file's own axis order
raises   CaseError for missing or damaged data, vectors, more than three axes, and NRRD files without an orientation
=======  ==========================================================================================

SimpleITK's own decoding is not used. Of a compressed MetaImage with one flipped byte, with a wrong CompressedDataSize, or without
that optional field, it returned partly wrong voxels without an error; behind a gzip NRRD it ignores a lost checksum.
"""

import gzip
import math
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import IO, Any, cast

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from ftengine.errors import CaseError, FailureCode
from ftengine.geometry import Grid, grid_from_codes, grid_from_sitk
from ftengine.volume.values import MAX_DEFLATE_RATIO, RawImage, read_failure, shown, stream_failure, volume_grid

NRRD_MAGIC = b"NRRD000"
_READ_BYTES = 1 << 16  # compressed; at most 64 MB once inflated
_MAX_HEADER_BYTES = 1 << 16
# the spaces that ITK turns into LPS; "scanner-xyz" and the like do not say where left is
_NRRD_SPACES = ("right-anterior-superior", "ras", "left-anterior-superior", "las", "left-posterior-superior", "lps")
_DTYPES = {
    getattr(sitk, f"sitk{name}"): np.dtype(name.lower())
    for name in ("Int8", "UInt8", "Int16", "UInt16", "Int32", "UInt32", "Int64", "UInt64", "Float32", "Float64")
}


def is_metaimage(first_bytes: bytes) -> bool:
    """Whether the first bytes are a MetaImage text header."""
    return any(line.split(b"=")[0].strip() == b"NDims" for line in first_bytes.split(b"\n")[:20])


def load_itk(path: Path, *, assume_orientation: str | None = None) -> RawImage:
    """Read a NRRD or MetaImage file whole.

    assume_orientation: where x, y and z run to ("RAS", "LPS"), used only for a NRRD file without a ``space``.
    """
    where = shown(path)
    grid, dtype, notes = _checked_header(path, where, assume_orientation)
    return RawImage(_read_voxels(path, where, grid, dtype, notes), grid, notes=tuple(notes))


def probe_itk(path: Path, *, assume_orientation: str | None = None) -> Grid:
    """The grid of a NRRD or MetaImage file from its header alone; raises CaseError as ``load_itk`` does for headers."""
    return _checked_header(path, shown(path), assume_orientation)[0]


def data_files(path: Path) -> tuple[Path, ...]:
    """The file, and the detached file of its voxels if it names one: everything that decides what is read. Never raises CaseError."""
    try:
        fields, is_nrrd, _ = _text_header(path, shown(path))
    except CaseError:
        return (path,)  # reading it will say what is wrong
    name = fields.get("datafile", "LOCAL") if is_nrrd else fields["elementdatafile"]
    return (path,) if name.upper() == "LOCAL" or not _is_inside(name) else (path, path.parent / name)


def _is_inside(name: str) -> bool:
    """Whether a data file's name stays in the header's own folder: a header must not pull any file of the machine into a store."""
    return "\0" not in name and not PurePath(name).is_absolute() and ".." not in PurePath(name).parts


def _checked_header(path: Path, where: str, assume_orientation: str | None) -> tuple[Grid, np.dtype[Any], list[str]]:
    """Grid, dtype (native byte order) and notes of a header, or a CaseError."""
    fields, is_nrrd, _ = _text_header(path, where)
    for key in () if is_nrrd else ("dimsize", "elementtype"):
        if key not in fields:
            raise CaseError(
                f"{where}: a MetaImage header without {key!r}; want all its fields.",
                "Write the file again.",
                code=FailureCode.DAMAGED_HEADER,
            )
    stated = fields.get("spacings" if is_nrrd else "elementspacing", "")
    if any(not _is_positive(text) for text in stated.split()[:3]):  # ITK turns a negative one into a flip
        raise CaseError(
            f"{where}: a spacing in the header is zero, negative or not a number; want three positive ones in millimetres.",
            "Repair the header or leave the case out.",
            code=FailureCode.BAD_SPACING,
        )
    _voxel_file(path, where, fields, is_nrrd=is_nrrd)  # ITK opens it for the header of a NRRD already
    reader = sitk.ImageFileReader()
    reader.SetImageIO("NrrdImageIO" if is_nrrd else "MetaImageIO")  # by content: ITK itself goes by the name
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise CaseError(
            f"{where}: SimpleITK cannot read the header; it is damaged or incomplete.",
            "Write the file again or leave the case out.",
            code=FailureCode.DAMAGED_HEADER,
        ) from error
    notes: list[str] = []
    size = reader.GetSize()
    if reader.GetNumberOfComponents() != 1:
        raise CaseError(
            f"{where}: {reader.GetNumberOfComponents()} numbers a voxel (colour, vector or phases); want one.",
            "Split the file, one volume each.",
            code=FailureCode.NOT_GREY,
        )
    if reader.GetPixelID() not in _DTYPES:
        raise CaseError(
            f"{where}: complex or unknown voxels; want one real number a voxel.",
            "This is not a CT in HU: leave it out.",
            code=FailureCode.NOT_GREY,
        )
    for axis, length in enumerate(size[3:], start=4):
        if length != 1:
            raise CaseError(
                f"{where}: {len(size)}-D: axis {axis} has {length} entries; want one 3-D volume.",
                "Split the file, one volume each.",
                code=FailureCode.SEVERAL_PHASES,
            )
    if len(size) > 3:
        notes.append(f"{len(size)}-D with single entries behind the third axis: read as 3-D")
    elif len(size) < 3:
        raise CaseError(
            f"{where}: not a volume: {len(size)} axes; want three.",
            "Leave it out, or give the whole series.",
            code=FailureCode.NOT_A_VOLUME,
        )
    grid = grid_from_sitk(reader)
    oriented = fields.get("space", "").lower() in _NRRD_SPACES and "spacedirections" in fields
    if is_nrrd and not oriented:
        if assume_orientation is None:
            raise CaseError(
                f"{where}: a NRRD file without an anatomical 'space' and 'space directions': left and right are unknown; want an orientation.",
                "Repair the header, or state it (assume orientation RAS or LPS) if you know it.",
                code=FailureCode.NO_ORIENTATION,
            )
        grid = grid_from_codes(grid.shape_zyx, grid.spacing_mm_zyx, assume_orientation)
        notes.append(f"no orientation in the header: {assume_orientation.upper()} assumed, as asked")
    if not is_nrrd and not {"transformmatrix", "rotation", "orientation"} & set(fields):
        notes.append("no TransformMatrix: the axes are taken as left, posterior, superior, MetaImage's default")
    return volume_grid(grid, where), _DTYPES[reader.GetPixelID()], notes


def _text_header(path: Path, where: str) -> tuple[dict[str, str], bool, int]:
    """The fields of a NRRD or MetaImage header (lower case, without spaces), whether it is NRRD, and the length of the header in bytes."""
    try:
        with path.open("rb") as file:
            head = file.read(_MAX_HEADER_BYTES)
    except OSError as error:
        raise read_failure(where, error) from error
    is_nrrd = head.startswith(NRRD_MAGIC)
    if not is_nrrd and not is_metaimage(head):
        raise CaseError(
            f"{where}: neither NRRD nor MetaImage by its first bytes.",
            "Write the file again or leave the case out.",
            code=FailureCode.NOT_AN_IMAGE,
        )
    fields: dict[str, str] = {}
    position = 0
    while position < len(head):
        end = head.find(b"\n", position)
        end = len(head) if end < 0 else end
        line = head[position:end].rstrip(b"\r").decode("utf-8", errors="replace")
        position = end + 1
        if is_nrrd and not line:
            return fields, is_nrrd, position
        key, separator, value = line.partition(": " if is_nrrd else "=")
        if separator and not line.startswith("#"):
            fields[key.strip().lower().replace(" ", "")] = value.strip()
        if not is_nrrd and "elementdatafile" in fields:
            return fields, is_nrrd, position
    if is_nrrd and "datafile" in fields:
        return fields, is_nrrd, len(head)  # the header of a detached file may end with the file
    raise CaseError(
        f"{where}: the header has no end within {_MAX_HEADER_BYTES:,} bytes; want where the voxels are.",
        "Write the file again.",
        code=FailureCode.DAMAGED_HEADER,
    )


def _read_voxels(path: Path, where: str, grid: Grid, dtype: np.dtype[Any], notes: list[str]) -> NDArray[Any]:
    """The voxels z, y, x; CaseError unless the file that holds them is there, is whole and has a right checksum."""
    fields, is_nrrd, header_bytes = _text_header(path, where)
    data = _voxel_file(path, where, fields, is_nrrd=is_nrrd)
    header_bytes = header_bytes if data == path else 0
    compression, big_endian = _encoding(fields, where, is_nrrd=is_nrrd)
    lines = _whole_number(fields, "lineskip", where)
    skip = _whole_number(fields, "byteskip" if is_nrrd else "headersize", where)
    num_bytes = math.prod(grid.shape_zyx) * dtype.itemsize
    try:
        with data.open("rb") as file:
            size_bytes = data.stat().st_size
            if num_bytes > size_bytes * (MAX_DEFLATE_RATIO if compression else 1):
                raise CaseError(
                    f"{shown(data)}: cut short: the header promises {num_bytes:,} bytes of voxels, the file has "
                    f"{size_bytes:,} bytes.",
                    "Copy or write it again.",
                    code=FailureCode.TRUNCATED,
                )
            if is_nrrd:
                file.seek(header_bytes)
                for _ in range(lines):
                    file.readline()
            else:
                file.seek(skip if skip > 0 else header_bytes)  # HeaderSize counts from the start of the data file
            if skip < 0:  # the voxels are the last bytes, whatever stands before them
                if compression:
                    raise CaseError(
                        f"{where}: compressed voxels at an unknown place (skip of -1).",
                        "Write the file again.",
                        code=FailureCode.UNSUPPORTED_ENCODING,
                    )
                file.seek(size_bytes - num_bytes)
            voxels = np.empty(grid.shape_zyx, dtype=dtype.newbyteorder(">" if big_endian else "<"))
            got, surplus = _fill(voxels, _blocks(file, compression), skip if is_nrrd and skip > 0 else 0)
    except (zlib.error, EOFError, gzip.BadGzipFile) as error:
        raise stream_failure(shown(data), error, "compressed stream of voxels") from error
    except OSError as error:
        raise read_failure(
            shown(data), error, f"It holds the voxels of {shown(path)}: put it beside its header."
        ) from error
    if got < num_bytes:
        raise CaseError(
            f"{shown(data)}: cut short: {got:,} of {num_bytes:,} bytes of voxels.",
            "Copy or write it again.",
            code=FailureCode.TRUNCATED,
        )
    if surplus:
        notes.append(f"{surplus:,} bytes behind the voxels were ignored")
    return voxels if voxels.dtype.isnative else voxels.astype(dtype)


def _voxel_file(path: Path, where: str, fields: Mapping[str, str], *, is_nrrd: bool) -> Path:
    """The file that holds the voxels: ``path`` itself or one beside it; CaseError for several, missing or far ones."""
    name = fields.get("datafile", "LOCAL") if is_nrrd else fields["elementdatafile"]
    if name.upper().startswith("LIST") or "%" in name:
        raise CaseError(
            f"{where}: its voxels are spread over several files; want one file.",
            "Write it again as one .nrrd, .mha or .nii.gz.",
            code=FailureCode.UNSUPPORTED_ENCODING,
        )
    if name.upper() == "LOCAL":
        return path
    if not _is_inside(name):
        raise CaseError(
            f"{where}: its data file lies outside its own folder; want it beside the header.",
            "Move both into one folder.",
            code=FailureCode.OUTSIDE_DATA_FILE,
        )
    data = path.parent / name
    if not data.is_file():
        raise CaseError(
            f"{where}: its voxels in {shown(data)} are missing.",
            "Put the data file beside its header.",
            code=FailureCode.MISSING_FILE,
        )
    return data


def _encoding(fields: Mapping[str, str], where: str, *, is_nrrd: bool) -> tuple[str, bool]:
    """How the voxels are compressed ("", "gzip" or "zlib") and whether they are big-endian."""
    if is_nrrd:
        encoding = fields.get("encoding", "").lower()
        if encoding not in ("raw", "gzip", "gz"):
            raise CaseError(
                f"{where}: NRRD encoding other than raw and gzip; want one of these.",
                "Write the file again.",
                code=FailureCode.UNSUPPORTED_ENCODING,
            )
        return "" if encoding == "raw" else "gzip", fields.get("endian", "").lower() == "big"
    if not _is_true(fields.get("binarydata", "")):
        raise CaseError(
            f"{where}: a MetaImage with its voxels as text; want BinaryData = True.",
            "Write the file again.",
            code=FailureCode.UNSUPPORTED_ENCODING,
        )
    big_endian = fields.get("binarydatabyteordermsb", fields.get("elementbyteordermsb", ""))
    return "zlib" if _is_true(fields.get("compresseddata", "")) else "", _is_true(big_endian)


def _is_positive(text: str) -> bool:
    try:
        return float(text) > 0
    except ValueError:
        return False


def _is_true(text: str) -> bool:
    return text[:1] in ("T", "t", "1")


def _fill(voxels: NDArray[Any], blocks: Iterator[bytes], skip: int) -> tuple[int, int]:
    """Fill the array from a stream of blocks after ``skip`` bytes: (bytes put in, bytes left over). Runs the stream to its end."""
    target = voxels.data.cast("B")
    got = surplus = 0
    for block in blocks:
        dropped = min(skip, len(block))
        skip -= dropped
        used = min(len(block) - dropped, len(target) - got)
        target[got : got + used] = block[dropped : dropped + used]
        got += used
        surplus += len(block) - dropped - used
    return got, surplus


def _whole_number(fields: Mapping[str, str], key: str, where: str) -> int:
    """A header field as an integer, 0 where it is missing."""
    try:
        return int(fields.get(key, "0"))
    except ValueError as error:
        raise CaseError(
            f"{where}: header field {key!r} is not a whole number.",
            "Write the file again.",
            code=FailureCode.DAMAGED_HEADER,
        ) from error


def _blocks(file: IO[bytes], compression: str) -> Iterator[bytes]:
    """The rest of a file, decompressed; raises zlib.error, EOFError or BadGzipFile for damage, a wrong checksum and a missing end."""
    if compression == "zlib":
        stream = zlib.decompressobj()
        while not stream.eof and (block := file.read(_READ_BYTES)):
            yield stream.decompress(block)
        if not stream.eof:
            raise EOFError("the zlib stream has no end")
        return
    source: IO[bytes] = cast("IO[bytes]", gzip.GzipFile(fileobj=file, mode="rb")) if compression == "gzip" else file
    while block := source.read(_READ_BYTES):
        yield block
