"""NIfTI files, whole and broken; numbers in names are rows of the project's list of real CT failures."""

import gzip
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray

from ftengine.errors import CaseError, ConfigError
from ftengine.geometry import Grid, grid_from_codes, grid_offset_vox
from ftengine.volume.nifti import write_nifti
from ftengine.volume.readers import ReadOptions, probe, read_volume
from tests.recipes import ct_array, cut, flip_byte, grid_of, patch_nifti, save_nifti

LPS = np.diag([-1.0, -1.0, 2.0, 1.0])


def refused(path: Path, match: str) -> str:
    with pytest.raises(CaseError, match=match) as caught:
        read_volume(path)
    text = str(caught.value)
    assert (caught.value.reason[-1], caught.value.advice[-1]) == (".", ".")
    assert path.name in text
    assert "\n" not in text
    return text


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "A.NII.GZ"])
@pytest.mark.parametrize("version", [1, 2])
def test_a_whole_file_is_read_as_written(tmp_path: Path, name: str, version: int) -> None:
    array = ct_array()
    volume = read_volume(save_nifti(tmp_path / name, array, version=version))
    np.testing.assert_array_equal(volume.image_hu, array[:, ::-1, ::-1])  # LPS in the file, RAS+ in memory
    assert volume.image_hu.dtype == np.int16
    assert volume.image_hu.flags.c_contiguous
    assert volume.grid.is_ras
    assert volume.native == grid_of((6, 8, 10))
    assert volume.label is None
    assert volume.notes == ()


@pytest.mark.parametrize("dtype", ["u1", "i2", ">i2", "u2", "i4", "i8", "f4", "f8"])
def test_every_stored_dtype_gives_the_same_hu(tmp_path: Path, dtype: str) -> None:
    array = np.clip(ct_array(), 0, 255) if dtype == "u1" else ct_array() + 1000 if dtype == "u2" else ct_array()
    volume = read_volume(save_nifti(tmp_path / "a.nii.gz", array.astype(dtype)))
    assert volume.image_hu.dtype == np.int16
    np.testing.assert_array_equal(volume.image_hu, array[:, ::-1, ::-1])


def test_slope_and_intercept_are_applied_exactly(tmp_path: Path) -> None:
    array = ct_array()
    stored = ((array.astype(np.int32) + 1200) * 2).astype(np.uint16)
    volume = read_volume(save_nifti(tmp_path / "a.nii.gz", stored, slope=0.5, intercept=-1200.0))
    assert volume.image_hu.dtype == np.int16
    np.testing.assert_array_equal(volume.image_hu, array[:, ::-1, ::-1])


def test_row_12_fractions_stay_float(tmp_path: Path) -> None:
    volume = read_volume(save_nifti(tmp_path / "a.nii.gz", ct_array() * np.float32(0.5)))
    assert volume.image_hu.dtype == np.float32
    np.testing.assert_array_equal(volume.image_hu, ct_array()[:, ::-1, ::-1] * np.float32(0.5))
    assert "fractions" in volume.notes[0]


def test_row_12_numbers_within_a_thousandth_of_an_integer_are_integers(tmp_path: Path) -> None:
    volume = read_volume(save_nifti(tmp_path / "a.nii.gz", ct_array() + np.float32(4e-4)))
    assert volume.image_hu.dtype == np.int16
    np.testing.assert_array_equal(volume.image_hu, ct_array()[:, ::-1, ::-1])


def test_row_13_unsigned_with_negative_intercept(tmp_path: Path) -> None:
    stored = (ct_array().astype(np.int32) + 1024).astype(np.uint16)
    volume = read_volume(save_nifti(tmp_path / "a.nii.gz", stored, slope=1.0, intercept=-1024.0))
    np.testing.assert_array_equal(volume.image_hu, ct_array()[:, ::-1, ::-1])


@pytest.mark.parametrize("dtype", ["i2", "i4", "f4"])
def test_row_14_padding_becomes_air(tmp_path: Path, dtype: str) -> None:
    array = ct_array().astype(dtype)
    array[0, 0, :3] = (-3024, -2000, -1025)
    array[0, 0, 3] = -1024
    volume = read_volume(save_nifti(tmp_path / "a.nii.gz", array))
    np.testing.assert_array_equal(volume.image_hu[0, -1, -4:], -1024)
    assert volume.notes == ("3 voxels below -1024 HU (padding) set to -1024",)


def test_row_15_values_beyond_the_limit_are_clipped_and_counted(tmp_path: Path) -> None:
    array = (ct_array().astype(np.int32) + 1024).astype(np.uint16)
    array[0, 0, :2] = 65535
    array[0, 0, 2] = 3382 + 1024  # metal that real data hold stays
    volume = read_volume(save_nifti(tmp_path / "a.nii.gz", array, slope=1.0, intercept=-1024.0))
    np.testing.assert_array_equal(volume.image_hu[0, -1, -3:], (3382, 30000, 30000))
    assert volume.notes == ("2 voxels above 30000 HU set to 30000",)


def test_a_volume_without_air_is_noted(tmp_path: Path) -> None:
    volume = read_volume(save_nifti(tmp_path / "a.nii.gz", np.maximum(ct_array(), 0)))
    assert "no air" in volume.notes[0]


def test_row_19_sform_wins_and_a_distance_is_noted(tmp_path: Path) -> None:
    sform = LPS.copy()
    sform[:3, 3] = (10, -5, 3)
    path = save_nifti(tmp_path / "a.nii.gz", ct_array())
    image = nib.Nifti1Image.from_filename(path)
    image.set_sform(sform, code=2)
    nib.save(image, path)
    volume = read_volume(path)
    np.testing.assert_allclose(volume.native.matrix, sform)
    assert volume.notes == (f"sform and qform differ by up to {np.sqrt(134):.1f} mm; the sform is used",)


@pytest.mark.parametrize(("sform", "qform"), [(2, 0), (0, 1), (1, 1)])
def test_either_form_is_enough(tmp_path: Path, sform: int, qform: int) -> None:
    volume = read_volume(save_nifti(tmp_path / "a.nii.gz", ct_array(), sform=sform, qform=qform))
    assert grid_offset_vox(volume.native, grid_of((6, 8, 10))) < 1e-5
    assert volume.notes == ()


def test_row_20_cosines_off_by_rounding_are_repaired_and_a_shear_is_refused(tmp_path: Path) -> None:
    rounded, sheared = LPS.copy(), LPS.copy()
    rounded[0, 1], sheared[1, 2] = 2e-4, 0.5
    volume = read_volume(save_nifti(tmp_path / "round.nii.gz", ct_array(), rounded))
    directions = volume.grid.matrix[:3, :3] / np.array(volume.grid.spacing_mm_zyx[::-1])
    np.testing.assert_allclose(directions @ directions.T, np.eye(3), atol=1e-12)
    refused(save_nifti(tmp_path / "shear.nii.gz", ct_array(), sheared), "sheared")


@pytest.mark.parametrize("fraction", [0.02, 0.5, 0.95])
def test_row_21_truncated_gzip(tmp_path: Path, fraction: float) -> None:
    path = save_nifti(tmp_path / "a.nii.gz", ct_array((20, 20, 20)))
    cut(path, round(path.stat().st_size * fraction))
    refused(path, "cut short")


@pytest.mark.parametrize("num_bytes", [1, 4, 8])
def test_row_21_a_lost_checksum_is_noticed(tmp_path: Path, num_bytes: int) -> None:
    path = save_nifti(tmp_path / "a.nii.gz", ct_array())
    cut(path, num_bytes)
    refused(path, "cut short or damaged")


def test_row_21_one_flipped_byte_is_noticed(tmp_path: Path) -> None:
    path = save_nifti(tmp_path / "a.nii.gz", ct_array((20, 20, 20)))
    flip_byte(path, path.stat().st_size // 2)
    refused(path, "cut short or damaged")


def test_row_21_truncated_without_gzip(tmp_path: Path) -> None:
    path = save_nifti(tmp_path / "a.nii", ct_array())
    cut(path, 1)
    refused(path, "cut short: the header promises 960 bytes of voxels|cut short: 959 of 960 bytes")


def test_a_header_that_promises_terabytes_allocates_nothing(tmp_path: Path) -> None:
    path = save_nifti(tmp_path / "a.nii.gz", ct_array())
    patch_nifti(path, {"dim": [3, 30000, 30000, 30000, 1, 1, 1, 1]})
    refused(path, "cut short: the header promises")


def test_several_gzip_members_are_one_file(tmp_path: Path) -> None:
    path = save_nifti(tmp_path / "a.nii", ct_array())
    raw = path.read_bytes()
    members = tmp_path / "b.nii.gz"
    members.write_bytes(gzip.compress(raw[:700]) + gzip.compress(raw[700:]))
    np.testing.assert_array_equal(read_volume(members).image_hu, read_volume(path).image_hu)


@pytest.mark.parametrize(
    ("written", "named", "word"), [("a.nii", "b.nii.gz", "is not gzip"), ("a.nii.gz", "b.nii", "is gzip")]
)
def test_row_22_the_content_counts_not_the_name(tmp_path: Path, written: str, named: str, word: str) -> None:
    source = save_nifti(tmp_path / written, ct_array())
    volume = read_volume(source.rename(tmp_path / named))
    np.testing.assert_array_equal(volume.image_hu, ct_array()[:, ::-1, ::-1])
    assert word in volume.notes[0]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_row_23_nan_and_infinity(tmp_path: Path, value: float, dtype: str) -> None:
    array = ct_array().astype(dtype)
    array[3, 2, 1] = value
    refused(save_nifti(tmp_path / "a.nii.gz", array), "slice 3 holds NaN or infinity")


def test_row_24_four_axes(tmp_path: Path) -> None:
    array = ct_array()
    single = read_volume(save_nifti(tmp_path / "one.nii.gz", array[..., None]))
    np.testing.assert_array_equal(single.image_hu, array[:, ::-1, ::-1])
    assert "4-D" in single.notes[0]
    refused(save_nifti(tmp_path / "two.nii.gz", np.stack([array, array], -1)), r"axis 4 \(time\) has 2 entries")
    refused(
        save_nifti(tmp_path / "vector.nii.gz", np.stack([array] * 3, -1)[:, :, :, None]),
        r"axis 5 \(vector\) has 3 entries",
    )


def test_row_24_colour_and_complex(tmp_path: Path) -> None:
    refused(
        save_nifti(tmp_path / "rgb.nii.gz", np.zeros((6, 8, 10), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])), "RGB"
    )
    refused(save_nifti(tmp_path / "complex.nii.gz", ct_array().astype(np.complex64)), "complex")


def test_row_27_without_an_orientation(tmp_path: Path) -> None:
    path = save_nifti(tmp_path / "a.nii.gz", ct_array(), sform=0, qform=0)
    refused(path, "neither sform nor qform")
    volume = read_volume(path, options=ReadOptions(assume_orientation="LPS"))
    np.testing.assert_array_equal(volume.image_hu, ct_array()[:, ::-1, ::-1])
    assert volume.grid.spacing_mm_zyx == (2.0, 1.0, 1.0)
    assert volume.notes == ("no orientation in the header: LPS assumed, as asked",)
    np.testing.assert_array_equal(read_volume(path, options=ReadOptions(assume_orientation="ras")).image_hu, ct_array())
    with pytest.raises(ConfigError, match="three letters"):
        read_volume(path, options=ReadOptions(assume_orientation="XYZ"))


def test_row_27_an_assumption_never_overrides_a_header(tmp_path: Path) -> None:
    path = save_nifti(tmp_path / "a.nii.gz", ct_array())
    np.testing.assert_array_equal(
        read_volume(path, options=ReadOptions(assume_orientation="RAS")).image_hu, ct_array()[:, ::-1, ::-1]
    )


@pytest.mark.parametrize(
    ("units", "scale", "word"),
    [("micron", 1.0, "microns"), ("meter", 1e-3, "metres"), ("mm", 1e-3, "spacing"), ("mm", 1e3, "spacing")],
)
def test_row_28_units(tmp_path: Path, units: str, scale: float, word: str) -> None:
    refused(save_nifti(tmp_path / "a.nii.gz", ct_array(), np.diag([-scale, -scale, 2 * scale, 1.0]), units=units), word)


@pytest.mark.parametrize("shape", [(1, 8, 10), (3, 8, 10), (6, 8, 2)])
def test_row_9_stubs_are_not_volumes(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    refused(save_nifti(tmp_path / "a.nii.gz", ct_array(shape)), "not a volume")


def test_two_axes_are_not_a_volume(tmp_path: Path) -> None:
    refused(save_nifti(tmp_path / "a.nii.gz", ct_array()[0]), "not a volume")


@pytest.mark.parametrize(
    "content", [b"", b"not an image", gzip.compress(b"not an image"), b"\x1f\x8bbroken", bytes(400)]
)
def test_files_that_are_not_nifti(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.nii.gz"
    path.write_bytes(content)
    refused(path, "empty file|not an image|gzip stream")


def test_missing_and_unreadable_files(tmp_path: Path) -> None:
    refused(tmp_path / "absent.nii.gz", "does not exist")
    path = save_nifti(tmp_path / "locked.nii.gz", ct_array())
    path.chmod(0)
    if not os.access(path, os.R_OK):  # root reads everything
        refused(path, "cannot be read")


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"datatype": 4711}, "damaged"),
        ({"vox_offset": 7.0}, "puts the voxels at byte 7"),
        ({"vox_offset": np.nan}, "puts the voxels"),
        ({"dim": [3, 10, 8, -6, 1, 1, 1, 1]}, "not a volume|damaged"),
        ({"srow_x": [np.nan, 0, 0, 0]}, "NaN"),
        ({"scl_slope": np.inf}, "damaged"),
        ({"scl_slope": 1.0, "scl_inter": np.inf}, "damaged"),
    ],
)
def test_damaged_headers(tmp_path: Path, fields: dict[str, object], match: str) -> None:
    path = save_nifti(tmp_path / "a.nii", ct_array())
    patch_nifti(path, fields)
    refused(path, match)


def test_a_damaged_qform_gives_way_to_the_sform(tmp_path: Path) -> None:
    path = save_nifti(tmp_path / "a.nii", ct_array())
    patch_nifti(path, {"quatern_b": 7.0, "quatern_c": 7.0})
    assert "qform is damaged" in read_volume(path).notes[0]
    patch_nifti(path, {"sform_code": 0})
    refused(path, "qform is damaged and there is no sform")


def test_an_offset_of_zero_means_behind_the_header(tmp_path: Path) -> None:
    path = save_nifti(tmp_path / "a.nii", ct_array())
    patch_nifti(path, {"vox_offset": 0})
    np.testing.assert_array_equal(read_volume(path).image_hu, ct_array()[:, ::-1, ::-1])


def test_bytes_behind_the_voxels_are_noted(tmp_path: Path) -> None:
    path = save_nifti(tmp_path / "a.nii", ct_array())
    path.write_bytes(path.read_bytes() + b"tail")
    assert read_volume(path).notes == ("4 bytes behind the voxels were ignored",)


def test_probe_reads_no_voxels(tmp_path: Path) -> None:
    path = save_nifti(tmp_path / "a.nii.gz", ct_array((40, 30, 20)))
    cut(path, path.stat().st_size // 2)
    info = probe(path)
    assert info.shape_zyx == (40, 30, 20)
    assert info.spacing_mm_zyx == (2.0, 1.0, 1.0)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize("dtype", ["u1", "i2", "u2", "i4", "f4"])
@pytest.mark.parametrize("codes", ["RAS", "LPS", "PIR"])
def test_written_volumes_come_back_in_place(tmp_path: Path, name: str, dtype: str, codes: str) -> None:
    array = np.abs(ct_array()).astype(dtype)
    grid = grid_from_codes((6, 8, 10), (2.0, 0.75, 1.25), codes)
    path = tmp_path / "below" / name
    write_nifti(path, array, grid)
    image = nib.Nifti1Image.from_filename(path)
    np.testing.assert_array_equal(np.asanyarray(image.dataobj).transpose(), array)
    assert image.get_data_dtype() == np.dtype(dtype)
    for affine, code, wanted in ((*image.get_sform(coded=True), 2), (*image.get_qform(coded=True), 1)):
        np.testing.assert_allclose(affine, grid.matrix, atol=1e-6)
        assert code == wanted
    assert image.header.get_xyzt_units()[0] == "mm"
    assert [p.name for p in path.parent.iterdir()] == [name]


def test_a_written_file_holds_no_name_and_no_time(tmp_path: Path) -> None:
    first, second = tmp_path / "Doe_Jane.nii.gz", tmp_path / "b.nii.gz"
    for path in (first, second):
        write_nifti(path, ct_array(), grid_of((6, 8, 10)))
    assert first.read_bytes() == second.read_bytes()
    assert first.read_bytes()[3] == 0  # no gzip flag: no name
    header = nib.Nifti1Image.from_filename(first).header
    assert all(not header[field].tobytes().strip(b"\0") for field in ("descrip", "aux_file", "db_name", "intent_name"))


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.nii.gz"
    write_nifti(path, ct_array(), grid_of((6, 8, 10)))
    before = path.read_bytes()

    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space"):
        write_nifti(path, ct_array(seed=1), grid_of((6, 8, 10)))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("array", "grid"),
    [
        (ct_array(), grid_of((6, 8, 9))),
        (ct_array().astype(np.int64), grid_of((6, 8, 10))),
        (ct_array().astype(bool), grid_of((6, 8, 10))),
    ],
)
def test_what_cannot_be_written(tmp_path: Path, array: NDArray[np.int16], grid: Grid) -> None:
    with pytest.raises(ValueError, match=r"a\.nii\.gz"):
        write_nifti(tmp_path / "a.nii.gz", array, grid)
