"""NIfTI-1 and NIfTI-2: reading that trusts nothing, and atomic writing.

=======  ==========================================================================================
input    .nii or .nii.gz, told apart by their first bytes, not by their names
does     header through nibabel; voxels through a gzip stream (ISA-L) read to its end, so that its CRC and length are verified
output   ``RawImage`` in the file's own axis order
raises   CaseError for truncated, damaged, 4-D, coloured, unoriented or wrongly scaled files
=======  ==========================================================================================

SimpleITK is not used here: it reads the lost half of a truncated file, and NaN, as zeros without an error.
"""

import gzip
import io
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import nibabel as nib
import numpy as np
from isal import igzip, isal_zlib
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

from ftengine.errors import CaseError, FailureCode
from ftengine.geometry import Grid, grid_from_codes, grid_from_matrix, int_zyx, reverse_axes
from ftengine.volume.values import MAX_DEFLATE_RATIO, RawImage, read_failure, shown, stream_failure, volume_grid

GZIP_MAGIC = b"\x1f\x8b"
MAX_FORM_DISTANCE_MM = 1.0  # qform and sform further apart than this are worth a note
_NIFTI1_BYTES, _NIFTI2_BYTES = 348, 540
_READ_BYTES = 4 << 20
_MAX_OFFSET = 1 << 30  # extensions are small; a wild offset is a damaged header
_METRE, _MILLIMETRE, _MICRON = 1, 2, 3  # xyzt_units, lowest three bits
_UNIT_NAMES = {_METRE: "metres", _MICRON: "microns"}
# the package's own type information calls IsalError an instance
_DAMAGED = (EOFError, cast("type[Exception]", isal_zlib.IsalError), gzip.BadGzipFile)
_WRITABLE = frozenset(np.dtype(t) for t in (np.uint8, np.int16, np.uint16, np.int32, np.float32))
_COMPRESS_LEVEL = 1  # as nibabel; level 6 took 3.4 times as long for 2 % fewer bytes on a real CT


def is_nifti(first_bytes: bytes) -> bool:
    """Whether the (uncompressed) first 540 bytes are those of a single-file NIfTI-1 or NIfTI-2."""
    return first_bytes[344:348] == b"n+1\0" or first_bytes[4:8] == b"n+2\0"


def load_nifti(path: Path, *, assume_orientation: str | None = None) -> RawImage:
    """Read a NIfTI file whole.

    assume_orientation: where x, y and z run to ("RAS", "LPS"), used only where the file has neither sform nor qform.
    Raises CaseError for everything that cannot be trusted: cut or damaged streams, more than three axes, colour, no orientation, units
    that are not millimetres, sheared axes. NaN is left to ``values.to_hu``.
    """
    where = shown(path)
    with _opened(path) as (stream, compressed):
        return _load(stream, where, path, compressed=compressed, assume_orientation=assume_orientation)


def probe_nifti(path: Path, *, assume_orientation: str | None = None) -> Grid:
    """The grid of a NIfTI file from its header alone; raises CaseError as ``load_nifti`` does for headers."""
    where = shown(path)
    with _opened(path) as (stream, _):
        header, _ = _read_header(stream, where)
        return _checked_header(header, where, assume_orientation)[0]


@contextmanager
def _opened(path: Path) -> Iterator[tuple[IO[bytes], bool]]:
    """The uncompressed bytes of a file, and whether it is compressed; what goes wrong while reading becomes a CaseError."""
    where = shown(path)
    try:
        with path.open("rb") as file:
            compressed = file.read(2) == GZIP_MAGIC
            file.seek(0)
            yield (cast("IO[bytes]", igzip.IGzipFile(fileobj=file, mode="rb")) if compressed else file), compressed
    except _DAMAGED as error:
        raise stream_failure(where, error) from error
    except OSError as error:
        raise read_failure(where, error) from error


def _load(stream: IO[bytes], where: str, path: Path, *, compressed: bool, assume_orientation: str | None) -> RawImage:
    header, consumed = _read_header(stream, where)
    grid, dtype, slope, intercept, notes = _checked_header(header, where, assume_orientation)
    if compressed != path.name.lower().endswith(".gz"):
        notes.append(
            f"the file is {'gzip-compressed' if compressed else 'not gzip-compressed'}, against its name; read by its content"
        )

    offset = float(header["vox_offset"])
    lowest = consumed + 4  # four bytes say whether extensions follow
    if offset == 0:
        offset = lowest  # some tools leave it open
    if not lowest <= offset <= _MAX_OFFSET:
        raise CaseError(
            f"{where}: the header puts the voxels at byte {offset:g}; want {lowest} or more.",
            "Write the file again.",
            code=FailureCode.DAMAGED_HEADER,
        )
    num_bytes = math.prod(grid.shape_zyx) * dtype.itemsize
    size_bytes = path.stat().st_size
    if num_bytes > size_bytes * (MAX_DEFLATE_RATIO if compressed else 1):
        raise CaseError(
            f"{where}: cut short: the header promises {num_bytes:,} bytes of voxels, the file has {size_bytes:,} bytes.",
            "Copy or download it again.",
            code=FailureCode.TRUNCATED,
        )
    _skip(stream, int(offset) - consumed)
    x, y, z = reversed(grid.shape_zyx)
    voxels = np.empty((x, y, z), dtype=dtype, order="F")
    got = _read_into(stream, reverse_axes(voxels).data.cast("B"))
    if got != num_bytes:
        raise CaseError(
            f"{where}: cut short: {got:,} of {num_bytes:,} bytes of voxels.",
            "Copy or download it again.",
            code=FailureCode.TRUNCATED,
        )
    surplus = 0
    while more := stream.read(_READ_BYTES):  # to the end: gzip checks its CRC and length only there
        surplus += len(more)
    if surplus:
        notes.append(f"{surplus:,} bytes behind the voxels were ignored")
    return RawImage(reverse_axes(voxels), grid, slope, intercept, tuple(notes))


def _read_header(stream: IO[bytes], where: str) -> tuple[Any, int]:
    """The nibabel header and the number of its bytes, which are now consumed."""
    first = stream.read(_NIFTI1_BYTES)
    if first[4:8] == b"n+2\0":
        first += stream.read(_NIFTI2_BYTES - len(first))
        if len(first) == _NIFTI2_BYTES:
            return nib.Nifti2Header(binaryblock=first, check=False), _NIFTI2_BYTES
    elif first[344:348] == b"n+1\0":
        return nib.Nifti1Header(binaryblock=first, check=False), _NIFTI1_BYTES
    raise CaseError(
        f"{where}: not a NIfTI file by its first bytes; want single-file NIfTI-1 or NIfTI-2.",
        "Convert it or leave the case out.",
        code=FailureCode.NOT_AN_IMAGE,
    )


def _checked_header(
    header: Any, where: str, assume_orientation: str | None
) -> tuple[Grid, np.dtype[Any], float, float, list[str]]:
    """Grid, dtype, slope, intercept and notes of a header, or a CaseError."""
    notes: list[str] = []
    try:
        shape: tuple[int, ...] = tuple(int(n) for n in header.get_data_shape())
        dtype = np.dtype(header.get_data_dtype())
        slope, intercept = header.get_slope_inter()
        if np.isinf(header["scl_slope"]):  # 0 and NaN mean "no scaling"; nibabel takes infinity for that, too
            raise HeaderDataError("scl_slope")
    except (HeaderDataError, KeyError, ValueError, OverflowError) as error:
        raise CaseError(
            f"{where}: the NIfTI header is damaged (shape, data type or scaling).",
            "Write the file again or leave the case out.",
            code=FailureCode.DAMAGED_HEADER,
        ) from error
    if dtype.names is not None or dtype.kind not in "iuf" or dtype.itemsize > 8:
        raise CaseError(
            f"{where}: {'RGB' if dtype.names is not None else 'complex or unknown'} voxels; want one real number a voxel.",
            "This is not a CT in HU: leave it out.",
            code=FailureCode.NOT_GREY,
        )
    for axis, length in enumerate(shape[3:], start=4):
        if length != 1:
            raise CaseError(
                f"{where}: {len(shape)}-D: axis {axis} ({'time' if axis == 4 else 'vector'}) has {length} entries; want one 3-D volume.",
                "Split the file, one volume each.",
                code=FailureCode.SEVERAL_PHASES,
            )
    if len(shape) > 3:
        notes.append(f"{len(shape)}-D with single entries behind the third axis: read as 3-D")
    shape_zyx = int_zyx(reversed((*shape[:3], 1, 1, 1)[:3]))

    grid, form_notes = _oriented(header, shape_zyx, where, assume_orientation)
    unit = int(header["xyzt_units"]) & 7
    if unit in _UNIT_NAMES:
        raise CaseError(
            f"{where}: the header gives its spacing {tuple(round(s, 6) for s in grid.spacing_mm_zyx)} in {_UNIT_NAMES[unit]}; want millimetres.",
            "Repair the header (pixdim, sform, qform and xyzt_units) or leave the case out.",
            code=FailureCode.WRONG_UNITS,
        )
    return (
        volume_grid(grid, where),
        dtype,
        1.0 if slope is None else float(slope),
        0.0 if intercept is None else float(intercept),
        notes + form_notes,
    )


def _oriented(
    header: Any, shape_zyx: tuple[int, int, int], where: str, assume_orientation: str | None
) -> tuple[Grid, list[str]]:
    """The grid by sform, else by qform, else as assumed; and notes."""
    sform, _ = header.get_sform(coded=True)
    try:
        qform, _ = header.get_qform(coded=True)
    except (HeaderDataError, ValueError, FloatingPointError, np.linalg.LinAlgError) as error:
        if sform is None:
            negative = bool((np.asarray(header["pixdim"])[1:4] < 0).any())
            raise CaseError(
                f"{where}: the qform is damaged{' (a negative spacing)' if negative else ''} and there is no sform; want an orientation.",
                "Repair the header.",
                code=FailureCode.BAD_SPACING if negative else FailureCode.NO_ORIENTATION,
            ) from error
        return grid_from_matrix(shape_zyx, sform), ["the qform is damaged; the sform is used"]
    if sform is not None:
        grid = grid_from_matrix(shape_zyx, sform)
        apart = _distance_mm(grid, grid_from_matrix(shape_zyx, qform)) if qform is not None else 0.0
        if not apart <= MAX_FORM_DISTANCE_MM:  # NaN, from a damaged qform, is worth the note too
            return grid, [f"sform and qform differ by up to {apart:.1f} mm; the sform is used"]
        return grid, []
    if qform is not None:
        return grid_from_matrix(shape_zyx, qform), []
    if assume_orientation is None:
        raise CaseError(
            f"{where}: neither sform nor qform: left and right are unknown; want an orientation.",
            "Repair the header, or state it (assume orientation RAS or LPS) if you know it.",
            code=FailureCode.NO_ORIENTATION,
        )
    zooms = [abs(float(v)) for v in header.get_zooms()[:3]]
    x, y, z = (*zooms, 1.0, 1.0, 1.0)[:3]
    return grid_from_codes(shape_zyx, (z, y, x), assume_orientation), [
        f"no orientation in the header: {assume_orientation.upper()} assumed, as asked"
    ]


def _distance_mm(a: Grid, b: Grid) -> float:
    """Largest distance of equal corner voxels of two grids of one shape."""
    corners = np.array(
        [
            [x, y, z, 1.0]
            for x in (0, a.shape_zyx[2] - 1)
            for y in (0, a.shape_zyx[1] - 1)
            for z in (0, a.shape_zyx[0] - 1)
        ]
    )
    with np.errstate(all="ignore"):
        apart = (corners @ (a.matrix - b.matrix).T)[:, :3]
        return float(np.linalg.norm(apart, axis=1).max())


def _skip(stream: IO[bytes], num_bytes: int) -> None:
    while num_bytes > 0 and (chunk := stream.read(min(num_bytes, _READ_BYTES))):
        num_bytes -= len(chunk)


def _read_into(stream: IO[bytes], target: memoryview) -> int:
    """Fill the bytes of ``target``, in parts so that a compressed stream needs no second buffer of the volume's size; bytes got."""
    readinto = cast("io.BufferedIOBase", stream).readinto
    got = 0
    while got < len(target) and (count := readinto(target[got : got + _READ_BYTES])):
        got += count
    return got


def write_nifti(path: Path, array_zyx: NDArray[Any], grid: Grid) -> None:
    """Write a volume as NIfTI-1 (``.nii``, or ``.nii.gz`` compressed): whole or not at all.

    array_zyx: uint8, int16, uint16, int32 or float32 with the axes of ``grid``, which need not be RAS+: an array in a file's native
    order with that file's native grid is read back in place. sform (code 2) and qform (code 1) hold the same affine, units are mm, every
    text field is empty, and the gzip header names no file. Raises ValueError for another dtype or shape, OSError where the disk refuses.
    """
    if array_zyx.shape != grid.shape_zyx:
        raise ValueError(f"{path.name}: array of shape {array_zyx.shape} on a grid of {grid.shape_zyx}")
    if array_zyx.dtype not in _WRITABLE:
        raise ValueError(f"{path.name}: dtype {array_zyx.dtype}; want one of {sorted(str(d) for d in _WRITABLE)}")
    image = nib.Nifti1Image(reverse_axes(array_zyx), grid.matrix)
    image.set_sform(grid.matrix, code=2)
    image.set_qform(grid.matrix, code=1)
    image.header.set_xyzt_units("mm")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            if path.name.lower().endswith(".gz"):
                # no name and no time of day in the gzip header: equal volumes give equal bytes, and nothing leaks
                with gzip.GzipFile(
                    filename="", mode="wb", fileobj=file, mtime=0, compresslevel=_COMPRESS_LEVEL
                ) as stream:
                    image.to_stream(stream)
            else:
                image.to_stream(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
