"""The table of real CT failures, row by row, through the whole conversion: one case of each kind beside a good one.

The numbers are those of the project's list of thirty failures that public data sets and issue trackers show; rows without one are further
kinds of the same. A bad case fails with its code, a reason and an advice, and the good one beside it is converted all the same; what is to be
repaired is compared voxel by voxel with what was written.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from numpy.typing import NDArray
from pydicom.uid import generate_uid

from ftengine.config import Config
from ftengine.errors import FailureCode
from ftengine.store.case import ConvertOptions
from ftengine.store.convert import ConversionReport, convert_cases, read_failed
from ftengine.store.location import locate
from ftengine.store.reader import Store, open_store
from ftengine.volume.discover import discover
from ftengine.volume.readers import STRICT, ReadOptions
from tests.recipes import (
    compress_slice,
    cut,
    edit_slice,
    grid_of,
    make_constant_jpeg_ls,
    patch_nifti,
    save_itk,
    save_nifti,
    save_nrrd_in_ras,
    save_series,
    save_slice,
    sitk_image,
    stored_slice,
)

SPACING = (2.0, 1.5, 1.25)  # of the files and of the store: nothing is resampled, so that voxels can be compared
REGION = Config.preset("demo").with_overrides({"region.spacing_mm_zyx": SPACING, "region.patch_zyx": (8, 8, 8)}).region
LPS = np.diag([-1.25, -1.5, 2.0, 1.0])
# as written, in LPS; the store holds it turned to RAS+
HU = np.stack([stored_slice(i) for i in range(6)]).astype(np.int16) - np.int16(1024)
LABEL = (HU > 400).astype(np.uint8) + (HU > 900).astype(np.uint8)


def ras(array: NDArray[Any]) -> NDArray[Any]:
    return array[:, ::-1, ::-1]


@dataclass(frozen=True)
class Failure:
    code: FailureCode
    says: str  # of its reason or advice


@dataclass(frozen=True)
class Success:
    """hu: as written (LPS). note: part of the one note, "" for none. affine: of the stored voxels; None is not compared."""

    hu: NDArray[Any] = field(default_factory=lambda: HU)
    note: str = ""
    label: NDArray[Any] | None = None
    origin_ras: tuple[float, float, float] | None = None
    num_notes: int = 1


@dataclass(frozen=True)
class Row:
    number: int  # 0: not of the thirty
    name: str
    craft: Callable[[Path], object]  # writes the case ``bad`` into a folder
    wanted: Mapping[str, Failure | Success] | Failure | Success  # by case name below the data set; alone: of ``bad``
    options: ReadOptions = STRICT

    @property
    def cases(self) -> Mapping[str, Failure | Success]:
        return {"bad": self.wanted} if isinstance(self.wanted, Failure | Success) else self.wanted


def series(**tags: Any) -> Callable[[Path], list[Path]]:
    return lambda folder: save_series(folder / "bad", **tags)


def edited(change: Callable[[int, Path], object], **tags: Any) -> Callable[[Path], None]:
    """A series whose files are changed one by one."""

    def craft(folder: Path) -> None:
        for index, path in enumerate(save_series(folder / "bad", **tags)):
            change(index, path)

    return craft


def compressed(syntax: str) -> Callable[[Path], None]:
    return edited(lambda _, path: compress_slice(path, syntax))


def with_slice(stored: NDArray[Any], position: tuple[float, float, float], **tags: Any) -> Callable[[Path], None]:
    """A series and one more file of it."""

    def craft(folder: Path) -> None:
        uid = tags.pop("series", generate_uid())
        save_series(folder / "bad", series=uid)
        save_slice(folder / "bad" / "extra.dcm", stored, position=position, series=uid, **tags)

    return craft


def nifti(array: NDArray[Any] = HU, affine: NDArray[np.float64] = LPS, **options: Any) -> Callable[[Path], Path]:
    return lambda folder: save_nifti(folder / "bad.nii.gz", array, affine, **options)


def patched(**fields: Any) -> Callable[[Path], None]:
    return lambda folder: patch_nifti(nifti()(folder), fields)


def with_label(label: NDArray[Any], affine: NDArray[np.float64] = LPS) -> Callable[[Path], None]:
    def craft(folder: Path) -> None:
        nifti()(folder)
        save_nifti(folder / "bad_label.nii.gz", label, affine)

    return craft


def moved(*offset_mm: float) -> NDArray[np.float64]:
    affine = LPS.copy()
    affine[:3, 3] = offset_mm
    return affine


def changed(element: tuple[int, int], value: float) -> NDArray[np.float64]:
    affine = LPS.copy()
    affine[element] = value
    return affine


def with_value(value: float, dtype: str, *, place: tuple[int, int, int] = (3, 2, 1)) -> NDArray[Any]:
    array = HU.astype(dtype)
    array[place] = value
    return array


def position(index: int, z_mm: float, y_mm: float = 0.0) -> dict[str, list[float]]:
    return {"ImagePositionPatient": [-20.0, -30.0 + y_mm, z_mm]}


def two_series(folder: Path) -> None:
    save_series(folder / "bad")
    save_series(folder / "bad", 5, prefix="b")


def two_series_and_a_label(folder: Path) -> None:
    two_series(folder)
    save_nifti(folder / "bad_seg.nii.gz", LABEL, LPS)


def padded(folder: Path) -> None:
    uid = generate_uid()
    (folder / "bad").mkdir()
    for index in range(6):
        stored = stored_slice(index).astype(np.int16)
        stored[0, 0] = -2000
        save_slice(
            folder / "bad" / f"{index}.dcm",
            stored,
            position=(-20, -30, 2 * index),
            series=uid,
            PixelPaddingValue=-2000,
        )


def bright(index: int, path: Path) -> None:
    if index == 3:
        data = pydicom.dcmread(path)
        pixels = data.pixel_array.copy()
        pixels[4, 4] = 65535
        data.PixelData = pixels.tobytes()
        data.save_as(path)


def bare(index: int, path: Path) -> None:
    """No preamble, no mark, no file meta information: what some archives hand out."""
    if index == 4:
        content = path.read_bytes()
        path.with_name("bare").write_bytes(content[content.index(b"\x08\x00\x16\x00UI") :])
        path.unlink()


def with_junk(folder: Path) -> None:
    save_series(folder / "bad")
    (folder / "bad" / ".DS_Store").write_bytes(b"x" * 99)
    (folder / "bad" / "DICOMDIR").write_bytes(b"y" * 999)
    save_slice(
        folder / "bad" / "rt.dcm",
        stored_slice(0),
        position=(0, 0, 0),
        series=generate_uid(),
        storage="1.2.840.10008.5.1.4.1.1.481.3",
        Modality="RTSTRUCT",
    )


def two_forms(folder: Path) -> None:
    path = nifti()(folder)
    image: Any = nib.Nifti1Image.from_filename(path)
    image.set_sform(moved(10, -5, 3), code=2)
    nib.save(image, path)


def halved(folder: Path) -> None:
    path = nifti(np.random.default_rng(0).integers(-1000, 1000, (20, 20, 20)).astype(np.int16))(folder)
    cut(path, path.stat().st_size // 2)


def flipped_bit(folder: Path) -> None:
    path = nifti(np.random.default_rng(0).integers(-1000, 1000, (20, 20, 20)).astype(np.int16))(folder)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def plain_as_gz(folder: Path) -> None:
    save_nifti(folder / "plain.nii", HU, LPS).rename(folder / "bad.nii.gz")


def four_formats(folder: Path) -> None:
    grid = grid_of((6, 16, 12), LPS)
    save_nifti(folder / "nii.nii.gz", HU, LPS)
    save_itk(folder / "nrrd.nrrd", HU, grid)
    save_nrrd_in_ras(folder / "ras.nrrd", HU, grid)
    save_itk(folder / "mha.mha", HU, grid, compress=True)
    edited(lambda i, p: edit_slice(p, ImagePositionPatient=[0, 0, 2 * i]))(folder)


def odd_names(folder: Path) -> None:
    """The same file name in two folders, letters beyond ASCII, spaces, a folder that links to its own parent."""
    for below in ("a", "b", "Bauch übersicht 1"):
        (folder / below).mkdir()
        save_nifti(folder / below / "ct scan.nii.gz", HU, LPS)
    (folder / "a" / "loop").symlink_to(folder)


def link_to_itself(folder: Path) -> None:
    (folder / "bad.nii.gz").symlink_to(folder / "bad.nii.gz")


def lost_link(folder: Path) -> None:
    (folder / "bad.nii.gz").symlink_to(folder / "nowhere.nii.gz")


def metaimage(old: bytes, new: bytes) -> Callable[[Path], None]:
    def craft(folder: Path) -> None:
        path = save_itk(folder / "bad.mha", HU, grid_of((6, 16, 12), LPS))
        content = path.read_bytes()
        assert old in content
        path.write_bytes(content.replace(old, new))

    return craft


def detached(folder: Path) -> None:
    save_itk(folder / "bad.mhd", HU, grid_of((6, 16, 12), LPS))
    (folder / "bad.raw").unlink()


def data_file_elsewhere(folder: Path) -> None:
    path = save_itk(folder / "bad.mhd", HU, grid_of((6, 16, 12), LPS))
    path.write_bytes(path.read_bytes().replace(b"bad.raw", b"../good.raw"))


def vectors(folder: Path) -> None:
    image = sitk_image(HU, grid_of((6, 16, 12), LPS))
    sitk.WriteImage(sitk.Compose(image, image), str(folder / "bad.nrrd"))


def undecodable(index: int, path: Path) -> None:
    if index == 3:
        compress_slice(path, "JPEG2000")
        data = pydicom.dcmread(path)
        data.PixelData = data.PixelData[:16] + bytes(len(data.PixelData) - 24) + data.PixelData[-8:]
        data.save_as(path)


def all_slices_twice(folder: Path) -> None:
    uid = generate_uid()
    save_series(folder / "bad", series=uid)
    save_series(folder / "bad", series=uid, prefix="b", RescaleIntercept=-1000)


def dicom_label(folder: Path) -> None:
    nifti()(folder)
    (save_series(folder / "seg")[0]).rename(folder / "bad_seg.nii.gz")
    shutil.rmtree(folder / "seg")


def fractional(label: NDArray[Any]) -> NDArray[Any]:
    array = label.astype(np.float32)
    array[2, 2, 2] = 0.5
    return array


C = FailureCode
HALF_AS_THICK = np.array([[-1.25, 0, 0, 0], [0, -1.5, 0, 0], [0, 0, 1, -0.5], [0, 0, 0, 1]])
UNEVEN_Z = (0.0, 2.5, 5.0, 7.5, 15.0, 19.0)
FLOAT_LABEL = LABEL.astype(np.float32) * np.float32(1.0000001)
RGB = np.zeros(HU.shape, dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])

ROWS = [
    Row(1, "missing slice", series(skip=(3,)), Failure(C.MISSING_SLICES, "1 slice missing: 4.000 mm between 002.dcm")),
    Row(
        1,
        "missing slice filled",
        series(skip=(3,)),
        Success(note="1 of 6 slices interpolated"),  # slices brighten evenly: the mean of two neighbours is the lost one
        ReadOptions(allow_gaps=True),
    ),
    Row(
        2,
        "duplicate position, same pixels",
        with_slice(stored_slice(2), (-20, -30, 4)),
        Success(note="1 duplicate slices (same position, same pixels) dropped"),
    ),
    Row(
        2,
        "duplicate position, other pixels",
        with_slice(stored_slice(3), (-20, -30, 4)),
        Failure(C.DUPLICATE_SLICES, "002.dcm and extra.dcm lie at the same position with different pixels"),
    ),
    Row(
        3,
        "localizer in the series",
        with_slice(stored_slice(0), (0, 0, 0), ImageOrientationPatient=[0, 1, 0, 0, 0, -1]),
        Success(note="1 slices of localizers"),
    ),
    Row(
        4,
        "gantry tilt",
        edited(lambda i, p: edit_slice(p, **position(i, 2 * i, 0.5 * i), GantryDetectorTilt=0)),
        Failure(C.GANTRY_TILT, "0.5 mm a slice (14.0 degrees)"),
    ),
    Row(4, "tilt in the header alone", series(GantryDetectorTilt=14), Success()),
    Row(
        5,
        "variable spacing",
        edited(lambda i, p: edit_slice(p, **position(i, UNEVEN_Z[i]))),
        Failure(C.UNEVEN_SLICES, "uneven slice spacing: 2.500 to 7.500 mm"),
    ),
    Row(
        5,
        "spacing within tolerance",
        edited(lambda i, p: edit_slice(p, **position(i, 2 * i + 0.015 * (i == 2)))),
        Success(),
    ),
    Row(
        6,
        "several series in a folder",
        two_series,
        {"bad/series_1": Success(), "bad/series_2": Success(HU[:5])},
    ),
    Row(
        7,
        "truncated slice",
        edited(lambda i, p: cut(p, 300) if i == 5 else None),
        Failure(C.TRUNCATED, "005.dcm is cut short: 84 of 384 bytes"),
    ),
    Row(
        8,
        "no ImagePositionPatient",
        edited(lambda i, p: edit_slice(p, ImagePositionPatient=None)),
        Failure(C.NO_POSITION, "no usable ImagePositionPatient"),
    ),
    Row(9, "single slice", series(num_slices=1), Failure(C.NOT_A_VOLUME, "not a volume: 1 CT slice")),
    Row(9, "one slice in NIfTI", nifti(HU[:1]), Failure(C.NOT_A_VOLUME, "not a volume: shape (1, 16, 12)")),
    Row(
        10,
        "InstanceNumber against the position",
        edited(lambda i, p: edit_slice(p, InstanceNumber=10 - i)),
        Success(),
    ),
    Row(
        11,
        "intercept by slice",
        edited(lambda i, p: edit_slice(p, RescaleIntercept=-1000) if i >= 3 else None),
        Success(HU + np.int16(24) * (np.arange(6) >= 3)[:, None, None].astype(np.int16)),
    ),
    Row(
        12,
        "slope of a half",
        edited(lambda _, p: edit_slice(p, RescaleSlope=0.5)),
        Success(
            np.rint((HU.astype(float) + 1024) / 2 - 1024).astype(np.int16), "rounded half to even"
        ),
    ),
    Row(13, "unsigned with a negative intercept", series(PixelRepresentation=0), Success()),
    Row(
        13,
        "unsigned with a negative intercept in NIfTI",
        nifti((HU.astype(np.int32) + 1024).astype(np.uint16), slope=1.0, intercept=-1024.0),
        Success(),
    ),
    Row(
        14,
        "padding of -2000",
        padded,
        Success(
            np.where(np.arange(192).reshape(16, 12) == 0, np.int16(-1024), HU), "6 voxels below -1024 HU (padding)"
        ),
    ),
    Row(
        15,
        "values beyond int16",
        edited(bright),
        Success(with_value(30000, "i2", place=(3, 4, 4)), "1 voxels above 30000 HU set to 30000"),
    ),
    *(
        Row(16, f"compressed as {syntax}", compressed(syntax), Success())
        for syntax in ("RLE", "JPEG", "JPEG2000")
    ),
    Row(
        16,
        "compressed as JPEG-LS",
        edited(lambda _, p: make_constant_jpeg_ls(p), RescaleIntercept=-900),
        Success(np.full_like(HU, -900)),
    ),
    Row(16, "compression that does not decode", edited(undecodable), Failure(C.UNDECODABLE, "003.dcm cannot be decoded")),
    Row(
        17,
        "no DICM preamble",
        edited(lambda _, p: p.write_bytes(p.read_bytes()[132:])),
        Success(note="6 files have no DICM preamble"),
    ),
    Row(17, "a bare data set", edited(bare), Failure(C.NOT_AN_IMAGE, "bare is not a DICOM file")),
    Row(18, "junk beside the slices", with_junk, Success(note="2 files of the folder ignored: 1 DICOM without a CT slice, 1")),
    Row(
        19,
        "sform and qform differ",
        two_forms,
        Success(note="sform and qform differ by up to 11.6 mm", origin_ras=(10 - 11 * 1.25, -5 - 15 * 1.5, 3)),
    ),
    Row(20, "affine off by 2e-4", nifti(affine=changed((0, 1), 2e-4)), Success()),
    Row(20, "true shear", nifti(affine=changed((1, 2), 0.5)), Failure(C.SHEARED, "sheared by 14.0 degrees")),
    Row(21, "half a .nii.gz", halved, Failure(C.TRUNCATED, "cut short")),
    Row(21, "one flipped bit in a .nii.gz", flipped_bit, Failure(C.DAMAGED_DATA, "damaged")),
    Row(22, ".nii.gz that is not gzip", plain_as_gz, Success(note="not gzip-compressed, against its name")),
    Row(23, "NaN", nifti(with_value(np.nan, "f4")), Failure(C.NOT_FINITE, "--nan -1024")),
    Row(23, "infinity", nifti(with_value(np.inf, "f8")), Failure(C.NOT_FINITE, "NaN or infinity")),
    Row(
        23,
        "NaN replaced",
        nifti(with_value(np.nan, "f4")),
        Success(with_value(-1024, "i2"), "1 voxels of NaN or infinity set to -1024 HU"),
        ReadOptions(nan_hu=-1024),
    ),
    Row(24, "4-D with one entry", nifti(HU[..., None]), Success(note="read as 3-D")),
    Row(
        24,
        "4-D with two phases",
        nifti(np.stack([HU, HU], -1)),
        Failure(C.SEVERAL_PHASES, "axis 4 (time) has 2 entries"),
    ),
    Row(24, "colour", nifti(RGB), Failure(C.NOT_GREY, "RGB voxels")),
    Row(24, "vectors", vectors, Failure(C.NOT_GREY, "2 numbers a voxel")),
    Row(25, "label moved", with_label(LABEL, moved(0, 0, 5)), Failure(C.GRID_MISMATCH, "2.50 voxels off its image")),
    Row(25, "label moved by a twentieth", with_label(LABEL, moved(0, 0, 0.1)), Success(label=LABEL)),
    Row(25, "label of another shape", with_label(LABEL[:5]), Failure(C.GRID_MISMATCH, "--resample-labels")),
    Row(
        25,
        "label of another grid resampled",
        with_label(np.repeat(LABEL, 2, 0), HALF_AS_THICK),
        Success(note="inside the body", label=LABEL),
        ReadOptions(resample_labels=True),
    ),
    Row(26, "label of 1.0000001", with_label(FLOAT_LABEL), Success(label=LABEL)),
    Row(26, "label of 255", with_label(LABEL // 2 * 255), Failure(C.LABEL_VALUES, "Map each with --label-map 255=VALUE")),
    Row(26, "label of HU", with_label(HU), Failure(C.LABEL_VALUES, "more are not labels of the region")),
    Row(26, "label with a half", with_label(fractional(LABEL)), Failure(C.FRACTIONAL_LABEL, "holds 0.5")),
    Row(26, "label in DICOM", dicom_label, Failure(C.DICOM_LABEL, "a label in DICOM")),
    Row(27, "no qform, no sform", nifti(sform=0, qform=0), Failure(C.NO_ORIENTATION, "left and right are unknown")),
    Row(
        27,
        "no qform, no sform, LPS assumed",
        nifti(sform=0, qform=0),
        Success(note="LPS assumed, as asked"),
        ReadOptions(assume_orientation="LPS"),
    ),
    Row(
        28,
        "metres",
        nifti(affine=np.diag([-1.25e-3, -1.5e-3, 2e-3, 1]), units="meter"),
        Failure(C.WRONG_UNITS, "in metres"),
    ),
    Row(28, "microns", nifti(affine=np.diag([-1250, -1500, 2000, 1]), units="micron"), Failure(C.WRONG_UNITS, "microns")),
    Row(
        28,
        "metres that say millimetres",
        nifti(affine=np.diag([-1.25e-3, -1.5e-3, 2e-3, 1])),
        Failure(C.BAD_SPACING, "want 0.1 to 20.0 mm"),
    ),
    Row(
        29,
        "one scan in five formats",
        four_formats,
        {
            name: Success(origin_ras=(-11 * 1.25, -15 * 1.5, 0), num_notes=0)
            for name in ("nii", "nrrd", "ras", "mha", "bad")
        },
    ),
    Row(
        30,
        "one name in two folders, unicode, spaces, a loop",
        odd_names,
        {f"{below}/ct scan": Success() for below in ("a", "b", "Bauch übersicht 1")},
    ),
    Row(0, "link to itself", link_to_itself, Failure(C.UNREADABLE, "bad.nii.gz: cannot be read")),
    Row(0, "link to nothing", lost_link, Failure(C.MISSING_FILE, "bad.nii.gz: does not exist")),
    Row(0, "spacing of zero in the sform", patched(srow_z=[0, 0, 0, 0]), Failure(C.BAD_SPACING, "spacing_mm_zyx=(0.0")),
    Row(0, "spacing of zero in the pixdim", patched(pixdim=[1, 1.25, 1.5, 0, 1, 1, 1, 1], sform_code=0), Failure(C.BAD_SPACING, "(0.0, 1.5, 1.25)")),
    Row(0, "negative spacing in the pixdim", patched(pixdim=[1, 1.25, 1.5, -2, 1, 1, 1, 1], sform_code=0), Failure(C.BAD_SPACING, "negative spacing")),
    Row(0, "NaN spacing in the pixdim", patched(pixdim=[1, 1.25, 1.5, np.nan, 1, 1, 1, 1], sform_code=0), Failure(C.BAD_SPACING, "NaN")),
    Row(0, "NaN in the position", patched(srow_x=[-1.25, 0, 0, np.nan]), Failure(C.NO_POSITION, "NaN")),
    Row(0, "negative spacing in MetaImage", metaimage(b"ElementSpacing = 1.25 1.5 2", b"ElementSpacing = 1.25 -1.5 2"), Failure(C.BAD_SPACING, "negative")),
    Row(0, "NaN spacing in MetaImage", metaimage(b"ElementSpacing = 1.25 1.5 2", b"ElementSpacing = 1.25 nan 2"), Failure(C.BAD_SPACING, "not a number")),
    Row(0, "zero spacing in MetaImage", metaimage(b"ElementSpacing = 1.25 1.5 2", b"ElementSpacing = 1.25 1.5 0"), Failure(C.BAD_SPACING, "zero")),
    Row(0, "zero spacing in DICOM", series(PixelSpacing=[0, 1.25]), Failure(C.BAD_SPACING, "no usable PixelSpacing")),
    Row(0, "negative spacing in DICOM", series(PixelSpacing=[1.5, -1.25]), Failure(C.BAD_SPACING, "no usable PixelSpacing")),
    Row(0, "no direction in DICOM", series(ImageOrientationPatient=None), Failure(C.NO_ORIENTATION, "ImageOrientationPatient")),
    Row(0, "no scale in DICOM", series(RescaleSlope=None), Failure(C.NOT_HU, "not HU")),
    Row(0, "multi-frame DICOM", series(NumberOfFrames=3), Failure(C.MULTI_FRAME, "multi-frame")),
    Row(0, "all slices twice", all_slices_twice,
        Failure(C.SEVERAL_PHASES, "Several phases")),
    Row(0, "empty file", lambda f: (f / "bad.nii.gz").write_bytes(b""), Failure(C.EMPTY_FILE, "an empty file")),
    Row(0, "not an image", lambda f: (f / "bad.nii.gz").write_bytes(b"<html>404</html>"), Failure(C.NOT_AN_IMAGE, "not an image by its first bytes")),
    Row(0, "damaged header", patched(datatype=4711), Failure(C.DAMAGED_HEADER, "header is damaged")),
    Row(0, "voxels that are missing", detached, Failure(C.MISSING_FILE, "bad.raw: does not exist")),
    Row(0, "voxels of another folder", data_file_elsewhere, Failure(C.OUTSIDE_DATA_FILE, "outside its own folder")),
    Row(0, "voxels as text", metaimage(b"BinaryData = True", b"BinaryData = False"), Failure(C.UNSUPPORTED_ENCODING, "BinaryData")),
]  # fmt: skip


def run(row: Row, folder: Path, **changes: Any) -> tuple[ConversionReport, Store]:
    source = folder / "src"
    source.mkdir()
    save_nifti(source / "good.nii.gz", HU, LPS)
    row.craft(source)
    found = discover([source], dataset="d")
    report = convert_cases(found, folder / "s.zarr", REGION, options=ConvertOptions(reading=row.options), **changes)
    return report, open_store(folder / "s.zarr")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.number or 'extra'} {row.name}")
def test_row(row: Row, tmp_path: Path) -> None:
    report, store = run(row, tmp_path)
    outcomes = {o.case.removeprefix("d/"): o for o in report.outcomes}
    assert set(outcomes) == {"good", *row.cases}
    assert outcomes["good"].status == "converted"
    np.testing.assert_array_equal(store.read_volume("d/good").image, ras(HU))
    failing = [name for name, wanted in row.cases.items() if isinstance(wanted, Failure)]
    assert report.exit_code == (1 if failing else 0)
    assert set(store.cases) == {f"d/{name}" for name in outcomes if name not in failing}
    listed = {line["case"]: line for line in read_failed(locate(tmp_path / "s.zarr"))}
    assert set(listed) == {f"d/{name}" for name in failing}
    for name, wanted in row.cases.items():
        outcome = outcomes[name]
        if isinstance(wanted, Failure):
            assert (outcome.status, outcome.code) == ("failed", wanted.code), outcome.reason
            for sentence in (outcome.reason, outcome.advice):
                assert sentence.endswith(".")
                assert sentence.isprintable()
            assert "src/bad" in outcome.reason
            line = listed[f"d/{name}"]
            assert (line["code"], line["reason"], line["advice"]) == (wanted.code, outcome.reason, outcome.advice)
            assert "src/bad" in line["file"]
            assert wanted.says in f"{outcome.reason} {outcome.advice}"
            continue
        assert (outcome.status, outcome.code) == ("converted", ""), outcome.reason
        patch = store.read_volume(f"d/{name}")
        np.testing.assert_array_equal(patch.image, ras(wanted.hu))
        row_of = store.cases.index(f"d/{name}")
        native = np.array(store.index.column("native_affine_ras")[row_of].as_py()).reshape(4, 4)
        np.testing.assert_allclose(np.linalg.norm(native[:3, :3], axis=0)[::-1], SPACING, rtol=2e-3)
        if wanted.note:
            assert len(outcome.notes) == wanted.num_notes
            assert wanted.note in outcome.notes[0]
        else:
            assert outcome.notes == ()
        if wanted.label is not None:
            np.testing.assert_array_equal(patch.label, ras(wanted.label))
        if wanted.origin_ras is not None:
            affine = np.array(store.index.column("affine_ras")[row_of].as_py()).reshape(4, 4)
            np.testing.assert_allclose(affine[:3, 3], wanted.origin_ras, atol=1e-4)


def test_the_table_is_whole() -> None:
    assert {row.number for row in ROWS} == set(range(31))


def _refused(craft: Callable[[Path], None], folder: Path) -> tuple[str, str]:
    """(case, code) of the one case that fails beside a good one, which is converted."""
    (folder / "src").mkdir()
    craft(folder / "src")
    save_nifti(folder / "src" / "zz_good.nii.gz", HU, LPS)
    report = convert_cases(discover([folder / "src"], dataset="d"), folder / "s.zarr", REGION)
    assert report.exit_code == 1
    assert [o.case for o in report.outcomes if o.status == "converted"][-1] == "d/zz_good"
    (row,) = read_failed(locate(folder / "s.zarr"))
    assert row["reason"]
    assert row["advice"]
    return row["case"], row["code"]


def test_row_30_two_images_of_one_name_are_one_row(tmp_path: Path) -> None:
    def craft(folder: Path) -> None:
        save_nifti(folder / "bad.nii.gz", HU, LPS)
        save_itk(folder / "bad.nrrd", HU, grid_of((6, 16, 12), LPS))

    assert _refused(craft, tmp_path) == ("d/bad", "duplicate-name")


def test_two_labels_of_one_image_are_one_row(tmp_path: Path) -> None:
    def craft(folder: Path) -> None:
        for name in ("bad", "bad_seg", "bad_mask"):
            save_nifti(folder / f"{name}.nii.gz", HU, LPS)

    assert _refused(craft, tmp_path) == ("d/bad", "ambiguous-label")


def test_row_6_several_series_for_one_label(tmp_path: Path) -> None:
    """Each series is a case; neither is given a label that may be the other's."""
    (tmp_path / "src").mkdir()
    two_series_and_a_label(tmp_path / "src")
    save_nifti(tmp_path / "src" / "zz_good.nii.gz", HU, LPS)
    report = convert_cases(discover([tmp_path / "src"], dataset="d"), tmp_path / "s.zarr", REGION)
    assert [o.status for o in report.outcomes] == ["failed", "failed", "converted"]
    assert {o.code for o in report.outcomes[:2]} == {"ambiguous-label"}


def test_the_same_file_given_twice_is_one_case(tmp_path: Path) -> None:
    path = save_nifti(tmp_path / "a.nii.gz", HU, LPS)
    found = discover([path, path, tmp_path], dataset="d")
    report = convert_cases(found, tmp_path / "s.zarr", REGION)
    assert [(o.case, o.status) for o in report.outcomes] == [("d/a", "converted")]


@pytest.fixture
def shared_folder() -> Iterator[Path]:
    """A folder that any user may enter (pytest's own is closed to others)."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o777)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("kind", ["file", "slice", "folder"])
def test_unreadable_permissions(kind: str, shared_folder: Path) -> None:
    """Root reads everything: the conversion runs as nobody, whom the system refuses."""
    source = shared_folder / "src"
    source.mkdir()
    save_nifti(source / "good.nii.gz", HU, LPS)
    locked = nifti()(source) if kind == "file" else save_series(source / "bad")[2]
    locked = locked.parent if kind == "folder" else locked
    for path in (source, *source.rglob("*")):
        path.chmod(0 if path == locked else 0o755)
    is_root = os.geteuid() == 0
    try:
        if is_root:
            os.seteuid(65534)
        report = convert_cases(discover([source], dataset="d"), shared_folder / "s.zarr", REGION)
    finally:
        if is_root:
            os.seteuid(0)
    bad, good = report.outcomes
    assert (bad.case, bad.code, good.status, report.exit_code) == ("d/bad", C.NO_PERMISSION, "converted", 1)
    assert locked.name in bad.reason
    assert bad.advice.endswith(".")
