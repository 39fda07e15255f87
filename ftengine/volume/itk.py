"""NRRD and MetaImage through SimpleITK, after a check that every byte of voxels is there.

=======  ==========================================================================================
input    .nrrd, .nhdr (detached data), .mha, .mhd (detached data)
does     reads the text header itself to find the voxels, verifies their length and their gzip or zlib checksum, then lets SimpleITK read
output   ``RawImage`` in the file's own axis order; ITK turns every NRRD ``space`` into LPS
raises   CaseError for missing or damaged data, vectors, more than three axes, and NRRD files without an orientation
=======  ==========================================================================================

The check is needed: SimpleITK reads a MetaImage with one flipped byte in its compressed voxels without an error (half of the
voxels were wrong in our trial), and ignores the checksum behind a gzip NRRD.
"""

import gzip
import zlib
from pathlib import Path, PurePath
from typing import IO, Any

import numpy as np
import SimpleITK as sitk

from ftengine.errors import CaseError
from ftengine.geometry import Grid, grid_from_codes, grid_from_sitk
from ftengine.volume.values import RawImage, shown, volume_grid

NRRD_MAGIC = b"NRRD000"
_READ_BYTES = 1 << 16  # compressed; at most 64 MB once inflated
_MAX_HEADER_BYTES = 1 << 16
_BYTES = {
    getattr(sitk, f"sitk{kind}"): num_bytes
    for kind, num_bytes in {"Int8": 1, "UInt8": 1, "Int16": 2, "UInt16": 2, "Int32": 4, "UInt32": 4, "Int64": 8, "UInt64": 8, "Float32": 4, "Float64": 8}.items()
}


def is_metaimage(first_bytes: bytes) -> bool:
    """Whether the first bytes are a MetaImage text header."""
    return any(line.split(b"=")[0].strip() == b"NDims" for line in first_bytes.split(b"\n")[:20])


def load_itk(path: Path, *, assume_orientation: str | None = None) -> RawImage:
    """Read a NRRD or MetaImage file whole.

    assume_orientation: where x, y and z run to ("RAS", "LPS"), used only for a NRRD file without a ``space``.
    """
    where = shown(path)
    reader, grid, squeeze, notes = _open(path, where, assume_orientation)
    _check_payload(path, where, int(np.prod(grid.shape_zyx, dtype=np.int64)) * _BYTES[reader.GetPixelID()])
    try:
        image = reader.Execute()
    except RuntimeError as error:  # the only exception of SimpleITK; its text spans lines and names source files, so it is not shown
        raise CaseError(f"{where}: SimpleITK cannot decode the voxels; the file is damaged or incomplete. Write or copy it again.") from error
    if squeeze:
        image = image[:, :, :, 0]
    return RawImage(sitk.GetArrayFromImage(image), grid, notes=tuple(notes))


def probe_itk(path: Path, *, assume_orientation: str | None = None) -> Grid:
    """The grid of a NRRD or MetaImage file from its header alone; raises CaseError as ``load_itk`` does for headers."""
    return _open(path, shown(path), assume_orientation)[1]


def _open(path: Path, where: str, assume_orientation: str | None) -> tuple[Any, Grid, bool, list[str]]:
    """A SimpleITK reader with its header read, the grid, whether a fourth axis of length 1 is to be dropped, and notes."""
    fields, is_nrrd, _ = _text_header(path, where)
    reader = sitk.ImageFileReader()
    reader.SetImageIO("NrrdImageIO" if is_nrrd else "MetaImageIO")  # by content: ITK itself goes by the name
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise CaseError(f"{where}: SimpleITK cannot read the header; it is damaged or incomplete. Write the file again or leave the case out.") from error
    notes: list[str] = []
    size = reader.GetSize()
    if reader.GetNumberOfComponents() != 1:
        raise CaseError(f"{where}: {reader.GetNumberOfComponents()} numbers a voxel (colour, vector or phases); want one. Split the file, one volume each.")
    if reader.GetPixelID() not in _BYTES:
        raise CaseError(f"{where}: complex or unknown voxels; want one real number a voxel. This is not a CT in HU: leave it out.")
    for axis, length in enumerate(size[3:], start=4):
        if length != 1:
            raise CaseError(f"{where}: {len(size)}-D: axis {axis} has {length} entries; want one 3-D volume. Split the file, one volume each.")
    squeeze = len(size) == 4
    if squeeze:
        notes.append("4-D with a single entry on the fourth axis: read as 3-D")
    elif len(size) != 3:
        raise CaseError(f"{where}: not a volume: {len(size)} axes; want three. Leave it out, or give the whole series.")
    grid = grid_from_sitk(reader)
    if is_nrrd and "space" not in fields and "space dimension" not in fields:
        if assume_orientation is None:
            raise CaseError(
                f"{where}: a NRRD file without 'space': left and right are unknown; want an orientation. "
                "Repair the header, or state it (assume orientation RAS or LPS) if you know it."
            )
        grid = grid_from_codes(grid.shape_zyx, grid.spacing_mm_zyx, assume_orientation)
        notes.append(f"no orientation in the header: {assume_orientation.upper()} assumed, as asked")
    return reader, volume_grid(grid, where), squeeze, notes


def _text_header(path: Path, where: str) -> tuple[dict[str, str], bool, int]:
    """The fields of a NRRD or MetaImage header (lower case, without spaces), whether it is NRRD, and the length of the header in bytes."""
    try:
        with path.open("rb") as file:
            head = file.read(_MAX_HEADER_BYTES)
    except OSError as error:
        raise CaseError(f"{where}: cannot be read ({error.strerror or type(error).__name__}). Check the file and its permissions.") from error
    is_nrrd = head.startswith(NRRD_MAGIC)
    if not is_nrrd and not is_metaimage(head):
        raise CaseError(f"{where}: neither NRRD nor MetaImage by its first bytes. Write the file again or leave the case out.")
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
    raise CaseError(f"{where}: the header has no end within {_MAX_HEADER_BYTES:,} bytes; want where the voxels are. Write the file again.")


def _check_payload(path: Path, where: str, num_bytes: int) -> None:
    """CaseError unless the file that holds the voxels is there, is whole, and (when compressed) has a right checksum."""
    fields, is_nrrd, header_bytes = _text_header(path, where)
    name = fields.get("datafile", "LOCAL") if is_nrrd else fields["elementdatafile"]
    if name.upper().startswith("LIST") or "%" in name:
        raise CaseError(f"{where}: its voxels are spread over several files; want one file. Write it again as one .nrrd, .mha or .nii.gz.")
    data = path
    if name.upper() != "LOCAL":
        # a header must not be able to pull any file of the machine into a store
        if PurePath(name).is_absolute() or ".." in PurePath(name).parts:
            raise CaseError(f"{where}: its data file lies outside its own folder; want it beside the header. Move both into one folder.")
        data = path.parent / name
        header_bytes = 0
    if is_nrrd:
        encoding = fields.get("encoding", "").lower()
        compression = "gzip" if encoding in ("gzip", "gz") else ""
        if encoding not in ("raw", "gzip", "gz"):
            raise CaseError(f"{where}: NRRD encoding other than raw and gzip; want one of these. Write the file again.")
        lines, skip = _whole_number(fields, "lineskip", where), _whole_number(fields, "byteskip", where)
    else:
        if fields.get("binarydata", "").lower()[:1] not in ("t", "1"):
            raise CaseError(f"{where}: a MetaImage with its voxels as text; want BinaryData = True. Write the file again.")
        compression = "zlib" if fields.get("compresseddata", "").lower()[:1] in ("t", "1") else ""
        lines, skip = 0, _whole_number(fields, "headersize", where)
    try:
        with data.open("rb") as file:
            file.seek(header_bytes)
            for _ in range(lines):
                file.readline()
            got = _inflated_bytes(file, compression) if compression else data.stat().st_size - file.tell()
            got -= max(skip, 0)  # -1 says: the voxels are the last bytes
    except (zlib.error, EOFError, gzip.BadGzipFile) as error:
        raise CaseError(f"{shown(data)}: the compressed voxels are cut short or damaged; want a whole file. Copy or write it again.") from error
    except OSError as error:
        raise CaseError(
            f"{where}: its voxels in {shown(data)} cannot be read ({error.strerror or type(error).__name__}). Put the data file beside its header."
        ) from error
    if got < num_bytes:
        raise CaseError(f"{shown(data)}: cut short: {max(got, 0):,} of {num_bytes:,} bytes of voxels. Copy or write it again.")


def _whole_number(fields: dict[str, str], key: str, where: str) -> int:
    """A header field as an integer, 0 where it is missing."""
    try:
        return int(fields.get(key, "0"))
    except ValueError as error:
        raise CaseError(f"{where}: header field {key!r} is not a whole number. Write the file again.") from error


def _inflated_bytes(file: IO[bytes], encoding: str) -> int:
    """Length of the decompressed rest of a file; raises zlib.error, EOFError or BadGzipFile for damage, a wrong checksum and a missing end."""
    total = 0
    if encoding == "gzip":
        with gzip.GzipFile(fileobj=file, mode="rb") as unzipped:
            while block := unzipped.read(_READ_BYTES):
                total += len(block)
        return total
    stream = zlib.decompressobj()
    while not stream.eof and (block := file.read(_READ_BYTES)):
        total += len(stream.decompress(block))
    if not stream.eof:
        raise EOFError("the zlib stream has no end")
    return total
