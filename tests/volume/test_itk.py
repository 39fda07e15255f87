"""NRRD and MetaImage, whole and broken; numbers in names are rows of the project's list of real CT failures."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from ftengine.errors import CaseError
from ftengine.geometry import grid_from_codes, grid_offset_vox
from ftengine.volume.itk import data_files, load_itk
from ftengine.volume.readers import ReadOptions, probe, read_volume
from tests.recipes import ct_array, cut, flip_byte, grid_of, save_itk, save_nrrd_in_ras, sitk_image

FORMATS = ["a.nrrd", "a.nhdr", "a.mha", "a.mhd"]


def refused(path: Path, match: str) -> None:
    with pytest.raises(CaseError, match=match) as caught:
        read_volume(path)
    assert path.stem in str(caught.value)
    assert "\n" not in str(caught.value)


def replaced(path: Path, old: bytes, new: bytes) -> Path:
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new, 1))
    return path


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_a_whole_file_is_read_as_written(tmp_path: Path, name: str, compress: bool) -> None:
    volume = read_volume(save_itk(tmp_path / name, ct_array(), compress=compress))
    np.testing.assert_array_equal(volume.image_hu, ct_array()[:, ::-1, ::-1])
    assert volume.image_hu.dtype == np.int16
    assert volume.image_hu.flags.c_contiguous
    assert grid_offset_vox(volume.native, grid_of((6, 8, 10))) < 1e-9
    assert volume.notes == ()


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", ["u1", "i1", "i2", "u2", "i4", "u4", "i8", "f4", "f8"])
def test_our_decoding_equals_simpleitk_s_on_whole_files(tmp_path: Path, name: str, dtype: str, compress: bool) -> None:
    array = ct_array().astype(dtype)
    path = save_itk(tmp_path / name, array, grid_from_codes((6, 8, 10), (2.0, 0.75, 1.25), "PIR"), compress=compress)
    raw = load_itk(path)
    assert raw.values.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(raw.values, sitk.GetArrayFromImage(sitk.ReadImage(str(path))))


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [("a.nrrd", b"endian: little", b"endian: big"), ("a.mha", b"OrderMSB = False", b"OrderMSB = True")],
)
def test_big_endian_voxels(tmp_path: Path, name: str, old: bytes, new: bytes) -> None:
    swapped = ct_array().byteswap()
    volume = read_volume(replaced(save_itk(tmp_path / name, swapped), old, new))
    np.testing.assert_array_equal(volume.image_hu, ct_array()[:, ::-1, ::-1])


@pytest.mark.parametrize("space", ["right-anterior-superior", "RAS"])
def test_row_29_a_nrrd_in_ras_lies_where_its_twin_in_lps_lies(tmp_path: Path, space: str) -> None:
    grid = grid_from_codes((6, 8, 10), (2.0, 0.75, 1.25), "PIR")
    in_lps = read_volume(save_itk(tmp_path / "lps.nrrd", ct_array(), grid))
    in_ras = read_volume(save_nrrd_in_ras(tmp_path / "ras.nrrd", ct_array(), grid, space=space))
    np.testing.assert_array_equal(in_ras.image_hu, in_lps.image_hu)
    assert grid_offset_vox(in_ras.grid, in_lps.grid) < 1e-9


@pytest.mark.parametrize("change", [{"space": ""}, {"space": "scanner-xyz"}, {"space": "3D-right-handed"}])
def test_row_27_a_nrrd_that_does_not_say_where_left_is(tmp_path: Path, change: dict[str, str]) -> None:
    grid = grid_from_codes((6, 8, 10), (2.0, 0.75, 1.25), "RAS")
    if change["space"] == "":
        change |= {"space_directions": "", "space_origin": "", "spacings": "1.25 0.75 2.0"}
    path = save_nrrd_in_ras(tmp_path / "a.nrrd", ct_array(), grid, **change)
    refused(path, "left and right are unknown")
    volume = read_volume(path, options=ReadOptions(assume_orientation="RAS"))
    np.testing.assert_array_equal(volume.image_hu, ct_array())
    assert volume.grid.spacing_mm_zyx == (2.0, 0.75, 1.25)
    assert "RAS assumed" in volume.notes[0]


def test_a_metaimage_without_directions_has_the_default_of_its_format(tmp_path: Path) -> None:
    path = save_itk(tmp_path / "a.mha", ct_array())
    path.write_bytes(re.sub(rb"TransformMatrix.*\n", b"", path.read_bytes()))
    volume = read_volume(path)
    np.testing.assert_array_equal(volume.image_hu, ct_array()[:, ::-1, ::-1])
    assert "no TransformMatrix" in volume.notes[0]


@pytest.mark.parametrize("num_bytes", [1, 100, 400])
@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("name", ["a.nrrd", "a.mha"])
def test_row_21_cut_short(tmp_path: Path, name: str, compress: bool, num_bytes: int) -> None:
    path = save_itk(tmp_path / name, ct_array(), compress=compress)
    cut(path, num_bytes)
    refused(path, "cut short")


@pytest.mark.parametrize("name", FORMATS)
def test_row_21_one_flipped_byte_in_compressed_voxels(tmp_path: Path, name: str) -> None:
    path = save_itk(tmp_path / name, ct_array((20, 20, 20)), compress=True)
    data = data_files(path)[-1]
    flip_byte(data, data.stat().st_size // 2)
    refused(path, "damaged")


@pytest.mark.parametrize("change", [lambda _: b"", lambda size: b"CompressedDataSize = %d\n" % (size - 200)])
def test_a_wrong_compressed_size_cannot_mislead_us(tmp_path: Path, change: Callable[[int], bytes]) -> None:
    path = save_itk(tmp_path / "a.mha", ct_array(), compress=True)
    line = re.search(rb"CompressedDataSize = (\d+)\n", path.read_bytes())
    assert line is not None
    replaced(path, line[0], change(int(line[1])))
    np.testing.assert_array_equal(read_volume(path).image_hu, ct_array()[:, ::-1, ::-1])


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("name", ["a.nhdr", "a.mhd"])
def test_detached_voxels_missing_cut_or_elsewhere(tmp_path: Path, name: str, compress: bool) -> None:
    path = save_itk(tmp_path / name, ct_array(), compress=compress)
    header, data = data_files(path)
    assert header == path
    (tmp_path / "sub").mkdir()
    moved = (tmp_path / "sub" / name, tmp_path / data.name)
    moved[0].write_bytes(path.read_bytes().replace(data.name.encode(), b"../" + data.name.encode()))
    refused(moved[0], "outside its own folder")
    moved[0].write_bytes(path.read_bytes().replace(data.name.encode(), str(data).encode()))
    refused(moved[0], "outside its own folder")
    assert data_files(moved[0]) == (moved[0],)
    cut(data, 2)
    refused(path, "cut short")
    data.unlink()
    refused(path, "are missing")


@pytest.mark.parametrize("name", ["a.nhdr", "a.mhd"])
def test_voxels_spread_over_files(tmp_path: Path, name: str) -> None:
    path = save_itk(tmp_path / name, ct_array())
    replaced(path, data_files(path)[1].name.encode(), b"LIST")
    refused(path, "several files")


def test_voxels_behind_skipped_bytes_and_lines(tmp_path: Path) -> None:
    grid = grid_of((6, 8, 10))
    wanted = read_volume(save_nrrd_in_ras(tmp_path / "a.nrrd", ct_array(), grid)).image_hu
    voxels = ct_array().tobytes()
    (tmp_path / "v.raw").write_bytes(b"a line\nanother\nxyz" + voxels)
    text = {"data_file": "v.raw", "line_skip": "2", "byte_skip": "3"}
    np.testing.assert_array_equal(
        read_volume(save_nrrd_in_ras(tmp_path / "b.nhdr", ct_array(), grid, **text)).image_hu, wanted
    )
    text = {"data_file": "v.raw", "byte_skip": "-1"}
    np.testing.assert_array_equal(
        read_volume(save_nrrd_in_ras(tmp_path / "c.nhdr", ct_array(), grid, **text)).image_hu, wanted
    )
    refused(
        save_nrrd_in_ras(tmp_path / "d.nhdr", ct_array(), grid, data_file="v.raw", line_skip="two"),
        "not a whole number|cannot read the header",
    )
    meta = save_itk(tmp_path / "m.mhd", ct_array())
    replaced(meta, b"ElementDataFile = m.raw", b"HeaderSize = 18\nElementDataFile = v.raw")
    np.testing.assert_array_equal(read_volume(meta).image_hu, wanted)


@pytest.mark.parametrize("name", ["a.nrrd", "a.mha"])
def test_row_23_nan(tmp_path: Path, name: str) -> None:
    array = ct_array().astype(np.float32)
    array[2, 1, 0] = np.nan
    refused(save_itk(tmp_path / name, array), "slice 2 holds NaN")


@pytest.mark.parametrize("name", ["a.nrrd", "a.mha"])
def test_row_24_four_axes_and_vectors(tmp_path: Path, name: str) -> None:
    image = sitk_image(ct_array(), grid_of((6, 8, 10)))
    path = tmp_path / name
    sitk.WriteImage(sitk.JoinSeries([image, image]), str(path))
    refused(path, "4-D: axis 4 has 2 entries")
    sitk.WriteImage(sitk.JoinSeries([image]), str(path))
    single = read_volume(
        path, options=ReadOptions(assume_orientation="LPS")
    )  # ITK writes no anatomical space for four axes into a NRRD
    np.testing.assert_array_equal(single.image_hu, ct_array()[:, ::-1, ::-1])
    assert "4-D" in single.notes[0]
    sitk.WriteImage(sitk.Compose(image, image), str(path))
    refused(path, "2 numbers a voxel")
    sitk.WriteImage(image[:, :, 0], str(path))
    refused(path, "not a volume")


@pytest.mark.parametrize("name", ["a.nrrd", "a.mha"])
def test_row_9_and_28_stubs_and_spacings(tmp_path: Path, name: str) -> None:
    refused(save_itk(tmp_path / name, ct_array((3, 8, 10))), "not a volume")
    refused(save_itk(tmp_path / name, ct_array(), grid_from_codes((6, 8, 10), (2e-3, 1e-3, 1e-3), "LPS")), "spacing")


@pytest.mark.parametrize("name", ["a.nrrd", "a.mha"])
def test_row_20_sheared(tmp_path: Path, name: str) -> None:
    grid = grid_of((6, 8, 10))
    path = save_nrrd_in_ras(tmp_path / name, ct_array(), grid, space_directions="(1,0,0) (0,1,0) (0,0.5,2)")
    if name == "a.mha":
        save_itk(path, ct_array())
        replaced(path, b"TransformMatrix = 1 0 0 0 1 0 0 0 1", b"TransformMatrix = 1 0 0 0 1 0 0 0.5 1")
    refused(path, "sheared")


@pytest.mark.parametrize(
    ("name", "old", "new", "match"),
    [
        ("a.nrrd", b"encoding: raw", b"encoding: ascii", "encoding"),
        ("a.nrrd", b"sizes: 10 8 6", b"sizes: 10 8", "cannot read the header"),
        ("a.nrrd", b"sizes: 10 8 6", b"sizes: 10000 8000 6000", "cut short: the header promises"),
        ("a.mha", b"BinaryData = True", b"BinaryData = False", "as text"),
        ("a.mha", b"DimSize = 10 8 6\n", b"", "without 'dimsize'"),
        ("a.mha", b"ElementDataFile = LOCAL\n", b"", "no end"),
        ("a.mha", b"MET_SHORT", b"MET_NOTHING", "cannot read the header|unknown voxels"),
    ],
)
def test_damaged_headers(tmp_path: Path, name: str, old: bytes, new: bytes, match: str) -> None:
    path = save_itk(tmp_path / name, ct_array())
    content = path.read_bytes()
    assert old in content
    # without an end of the header, what follows it must not be taken for one
    path.write_bytes(content.replace(old, new, 1)[: len(content) if b"LOCAL" not in old else 300])
    refused(path, match)


@pytest.mark.parametrize(("written", "named"), [("a.nrrd", "b.mha"), ("a.mha", "b.nrrd"), ("a.nrrd", "b.nii.gz")])
def test_row_22_the_content_counts_not_the_name(tmp_path: Path, written: str, named: str) -> None:
    path = save_itk(tmp_path / written, ct_array()).rename(tmp_path / named)
    np.testing.assert_array_equal(read_volume(path).image_hu, ct_array()[:, ::-1, ::-1])


@pytest.mark.parametrize("name", FORMATS)
def test_probe_reads_no_voxels(tmp_path: Path, name: str) -> None:
    path = save_itk(tmp_path / name, ct_array(), grid_from_codes((6, 8, 10), (2.0, 0.75, 1.25), "PIR"), compress=True)
    cut(data_files(path)[-1], 100)
    info = probe(path)
    assert info.shape_zyx == (8, 10, 6)
    assert info.spacing_mm_zyx == pytest.approx((0.75, 1.25, 2.0))
