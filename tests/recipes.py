"""Inputs for tests: small CT volumes in every supported format, whole or broken in a named way.

Written with nibabel, pydicom and SimpleITK directly, never with ``ftengine``, so that a mistake in a reader cannot hide in a writer.
"""

import gzip
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import SimpleITK as sitk
from numpy.typing import NDArray
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import UID, ExplicitVRLittleEndian, RLELossless, generate_uid

from ftengine.geometry import Grid, sitk_frame

CT_STORAGE = "1.2.840.10008.5.1.4.1.1.2"
JPEG_LS_LOSSLESS = "1.2.840.10008.1.2.4.80"
CANARIES = {  # planted in headers; none of it may reach an error, a note or a name
    "PatientName": "Canary^Jane",
    "PatientID": "CANARY-4711",
    "PatientBirthDate": "19010203",
    "StudyDate": "19990909",
    "InstitutionName": "Canary Hospital",
    "AccessionNumber": "CANARYACC",
    "SeriesDescription": "Canary series",
    "StudyDescription": "Canary study",
}


def ct_array(shape_zyx: tuple[int, int, int] = (6, 8, 10), *, seed: int = 0) -> NDArray[np.int16]:
    """HU from -1000 to 999, every voxel drawn on its own, the first one air."""
    array = np.random.default_rng(seed).integers(-1000, 1000, shape_zyx).astype(np.int16)
    array[0, 0, 0] = -1000
    return array


def grid_of(shape_zyx: tuple[int, int, int], affine_ras: NDArray[np.float64] | None = None) -> Grid:
    """A grid of 2 x 1 x 1 mm (z, y, x), LPS, unless an affine says otherwise."""
    affine = np.diag([-1.0, -1.0, 2.0, 1.0]) if affine_ras is None else affine_ras
    return Grid(shape_zyx, tuple(float(v) for v in affine.ravel()))


def save_nifti(
    path: Path,
    array: NDArray[Any],
    affine_ras: NDArray[np.float64] | None = None,
    *,
    sform: int | None = None,
    qform: int | None = None,
    slope: float | None = None,
    intercept: float = 0.0,
    units: str = "mm",
    version: int = 1,
) -> Path:
    """Write ``array`` (z, y, x, then any further axis) as stored numbers; ``slope`` and ``intercept`` go into the header only.

    sform, qform: the codes to leave in the header (both 1 without them).
    """
    affine = np.diag([-1.0, -1.0, 2.0, 1.0]) if affine_ras is None else affine_ras
    data = array.transpose(2, 1, 0, *range(3, array.ndim)) if array.ndim >= 3 else array.T
    kind = nib.Nifti1Image if version == 1 else nib.Nifti2Image
    image = kind(data, affine, dtype=array.dtype)
    image.set_sform(affine, code=1 if sform is None else sform)
    image.set_qform(affine, code=1 if qform is None else qform, strip_shears=True)
    image.header.set_xyzt_units(units)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nib.save(image, path)
    if slope is not None:
        patch_nifti(path, {"scl_slope": slope, "scl_inter": intercept})
    return path


def patch_nifti(path: Path, fields: Mapping[str, Any]) -> None:
    """Change header fields of a NIfTI file and nothing else."""
    packed = path.read_bytes()
    raw = gzip.decompress(packed) if packed[:2] == b"\x1f\x8b" else packed
    header = nib.Nifti1Header(binaryblock=raw[:348], check=False)
    for name, value in fields.items():
        header[name] = value
    changed = header.binaryblock + raw[348:]
    path.write_bytes(gzip.compress(changed) if packed[:2] == b"\x1f\x8b" else changed)


def sitk_image(array: NDArray[Any], grid: Grid) -> Any:
    """A SimpleITK image of an array z, y, x on a grid."""
    image = sitk.GetImageFromArray(array)
    frame = sitk_frame(grid)
    image.SetOrigin(frame["origin"])
    image.SetSpacing(frame["spacing"])
    image.SetDirection(frame["direction"])
    return image


def save_itk(path: Path, array: NDArray[Any], grid: Grid | None = None, *, compress: bool = False) -> Path:
    """Write NRRD or MetaImage, by the extension, through SimpleITK (LPS)."""
    z, y, x = array.shape
    sitk.WriteImage(sitk_image(array, grid or grid_of((z, y, x))), str(path), compress)
    return path


def save_nrrd_in_ras(path: Path, array: NDArray[np.int16], grid: Grid, **replace: str) -> Path:
    """Write a NRRD by hand whose space is right-anterior-superior; ``replace`` changes header fields ('' drops one)."""
    matrix = grid.matrix
    fields = {
        "type": "short",
        "dimension": "3",
        "space": "right-anterior-superior",
        "sizes": " ".join(str(n) for n in reversed(array.shape)),
        "space directions": " ".join("({!r},{!r},{!r})".format(*(float(v) for v in matrix[:3, i])) for i in range(3)),
        "kinds": "domain domain domain",
        "endian": "little",
        "encoding": "raw",
        "space origin": "({!r},{!r},{!r})".format(*(float(v) for v in matrix[:3, 3])),
    }
    fields |= {key.replace("_", " "): value for key, value in replace.items()}
    text = "NRRD0004\n" + "".join(f"{key}: {value}\n" for key, value in fields.items() if value)
    path.write_bytes(text.encode() + b"\n" + array.astype("<i2").tobytes())
    return path


def save_slice(
    path: Path, stored: NDArray[Any], *, position: Sequence[float], series: str, **tags: Any
) -> pydicom.Dataset:
    """Write one CT slice with canaries in its header. ``tags`` change or (None) drop elements; intercept -1024 unless given."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = tags.pop("storage", CT_STORAGE)
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    data.Modality, data.SeriesInstanceUID, data.StudyInstanceUID = "CT", series, "1.2.3"
    data.InstanceNumber, data.SliceThickness = 1, 5
    data.ImagePositionPatient, data.ImageOrientationPatient = [float(v) for v in position], [1, 0, 0, 0, 1, 0]
    data.PixelSpacing = [1.5, 1.25]
    data.Rows, data.Columns = stored.shape
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated = data.BitsStored = 8 * stored.dtype.itemsize
    data.HighBit = data.BitsStored - 1
    data.PixelRepresentation = int(stored.dtype.kind == "i")
    data.RescaleSlope, data.RescaleIntercept = 1, -1024
    data.PixelData = stored.tobytes()
    for keyword, value in CANARIES.items():
        setattr(data, keyword, value)
    for keyword, value in tags.items():
        if value is None:
            delattr(data, keyword)
        else:
            setattr(data, keyword, value)
    data.save_as(path, enforce_file_format=True)
    return data


def stored_slice(index: int, shape_yx: tuple[int, int] = (16, 12)) -> NDArray[np.uint16]:
    """Stored numbers of slice ``index``: each slice differs, each pixel of a slice differs, the first is air at intercept -1024."""
    pixels = np.arange(shape_yx[0] * shape_yx[1], dtype=np.uint16).reshape(shape_yx) + np.uint16(1000 + 300 * index)
    pixels[0, 0] = 24
    return pixels


def save_series(
    folder: Path, num_slices: int = 6, *, skip: Sequence[int] = (), gap_mm: float = 2.0, prefix: str = "", **tags: Any
) -> list[Path]:
    """Write a CT series ``<prefix>000.dcm`` ...: slice i at z = i * gap_mm with ``stored_slice(i)``; the indices in ``skip`` are missing."""
    folder.mkdir(parents=True, exist_ok=True)
    series = tags.pop("series", generate_uid())
    paths = []
    for index in range(num_slices):
        if index not in skip:
            paths.append(folder / f"{prefix}{index:03d}.dcm")
            save_slice(paths[-1], stored_slice(index), position=(-20.0, -30.0, gap_mm * index), series=series, **tags)
    return paths


def edit_slice(path: Path, **tags: Any) -> None:
    """Change (or, with None, drop) elements of a DICOM file."""
    data = pydicom.dcmread(path)
    for keyword, value in tags.items():
        if value is None:
            delattr(data, keyword)
        else:
            setattr(data, keyword, value)
    data.save_as(path, enforce_file_format=True)


def compress_slice(path: Path, syntax: str) -> None:
    """Recode a slice of ``save_series``: "RLE", "JPEG2000" or "JPEG" (lossless, process 14), as other software writes it."""
    data = pydicom.dcmread(path)
    if syntax == "RLE":
        data.compress(RLELossless, encoding_plugin="pydicom")
    else:
        coded = path.with_suffix(".coded")
        writer = sitk.ImageFileWriter()
        writer.SetImageIO("GDCMImageIO")
        writer.SetFileName(str(coded))
        writer.UseCompressionOn()
        writer.SetCompressor(syntax)
        writer.Execute(sitk.GetImageFromArray(data.pixel_array[None]))
        source = pydicom.dcmread(coded)
        coded.unlink()
        data.file_meta.TransferSyntaxUID = source.file_meta.TransferSyntaxUID
        data.PixelData = source.PixelData
        data["PixelData"].VR = "OB"
        data["PixelData"].is_undefined_length = True
    data.save_as(path, enforce_file_format=True)


def make_constant_jpeg_ls(path: Path) -> None:
    """Replace a slice's pixels by zeros in JPEG-LS lossless. Zeros need nothing but the run mode of ITU-T T.87, annex A.7."""
    data = pydicom.dcmread(path)
    order = [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 9, 10, 11, 12, 13, 14, 15]
    bits, run_index = "", 0
    for _ in range(data.Rows):
        left = data.Columns
        while left >= 1 << order[run_index]:
            left -= 1 << order[run_index]
            bits += "1"
            run_index = min(run_index + 1, 31)
        bits += "1" if left else ""  # the end of the line stops a run early
    scan = bytearray()
    while bits:
        width = 7 if scan and scan[-1] == 0xFF else 8  # after 0xFF a zero bit is stuffed in
        scan.append(int(bits[:width].ljust(width, "0"), 2))
        bits = bits[width:]
    if scan[-1] == 0xFF:
        scan.append(0)
    frame = (
        b"\xff\xf7\x00\x0b\x10"
        + int(data.Rows).to_bytes(2, "big")
        + int(data.Columns).to_bytes(2, "big")
        + b"\x01\x01\x11\x00"
    )
    start = b"\xff\xda\x00\x08\x01\x01\x00\x00\x00\x00"
    data.PixelData = encapsulate([b"\xff\xd8" + frame + start + bytes(scan) + b"\xff\xd9"])
    data["PixelData"].VR = "OB"
    data["PixelData"].is_undefined_length = True
    data.file_meta.TransferSyntaxUID = UID(JPEG_LS_LOSSLESS)
    data.save_as(path, enforce_file_format=True)


def cut(path: Path, num_bytes: int) -> None:
    """Drop the last bytes of a file."""
    path.write_bytes(path.read_bytes()[:-num_bytes])


def flip_byte(path: Path, position: int) -> None:
    """Invert one byte of a file."""
    content = bytearray(path.read_bytes())
    content[position] ^= 0xFF
    path.write_bytes(content)
