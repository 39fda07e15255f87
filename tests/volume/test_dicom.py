"""DICOM series, whole and broken; numbers in names are rows of the project's list of real CT failures."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian, ImplicitVRLittleEndian, generate_uid

from ftengine.errors import CaseError
from ftengine.volume.readers import ReadOptions, probe, read_volume
from tests.recipes import (
    CANARIES,
    compress_slice,
    cut,
    edit_slice,
    make_constant_jpeg_ls,
    save_series,
    save_slice,
    stored_slice,
)


def wanted_hu(num_slices: int = 6) -> NDArray[np.int16]:
    """What ``save_series`` holds, RAS+: rows run to the back and columns to the left in the file."""
    stored = np.stack([stored_slice(i) for i in range(num_slices)]).astype(np.int16)
    return np.asarray(stored - 1024)[:, ::-1, ::-1]


def refused(folder: Path, match: str) -> str:
    with pytest.raises(CaseError, match=match) as caught:
        read_volume(folder)
    text = str(caught.value)
    assert (caught.value.reason[-1], caught.value.advice[-1]) == (".", ".")
    assert folder.name in text
    assert "\n" not in text
    assert "anary" not in text.lower().replace(str(folder).lower(), "")
    return text


def test_a_whole_series(tmp_path: Path) -> None:
    save_series(tmp_path / "ct")
    volume = read_volume(tmp_path / "ct")
    np.testing.assert_array_equal(volume.image_hu, wanted_hu())
    assert volume.image_hu.dtype == np.int16
    assert volume.grid.spacing_mm_zyx == (2.0, 1.5, 1.25)  # never SliceThickness, which says 5
    np.testing.assert_allclose(volume.native.matrix[:3, 3], (20, 30, 0))
    assert volume.notes == ()


def test_row_1_missing_slice(tmp_path: Path) -> None:
    save_series(tmp_path / "ct", 8, skip=(3,))
    refused(tmp_path / "ct", r"1 slice missing: 4\.000 mm between 002\.dcm and 004\.dcm, 2\.000 mm elsewhere")
    save_series(tmp_path / "more", 12, skip=(3, 7, 8))
    refused(tmp_path / "more", "3 slices missing")


def test_row_2_duplicate_position(tmp_path: Path) -> None:
    series = generate_uid()
    save_series(tmp_path / "ct", series=series)
    twin = tmp_path / "ct" / "twin.dcm"
    save_slice(twin, stored_slice(2), position=(-20, -30, 4), series=series)
    volume = read_volume(tmp_path / "ct")
    np.testing.assert_array_equal(volume.image_hu, wanted_hu())
    assert volume.notes == ("1 duplicate slices (same position, same pixels) dropped",)
    assert probe(tmp_path / "ct").shape_zyx == (6, 16, 12)
    save_slice(twin, stored_slice(3), position=(-20, -30, 4), series=series)
    refused(tmp_path / "ct", r"002\.dcm and twin\.dcm lie at the same position with different pixels")


def test_row_2_all_slices_twice_with_other_pixels_are_two_phases(tmp_path: Path) -> None:
    series = generate_uid()
    save_series(tmp_path / "ct", series=series)
    save_series(tmp_path / "ct", series=series, prefix="b", RescaleIntercept=-1000)
    refused(tmp_path / "ct", "Several phases")


def test_row_3_localizer_in_the_series(tmp_path: Path) -> None:
    series = generate_uid()
    save_series(tmp_path / "ct", series=series)
    scout = tmp_path / "ct" / "scout.dcm"
    save_slice(scout, stored_slice(0), position=(0, 0, 0), series=series, ImageOrientationPatient=[0, 1, 0, 0, 0, -1])
    volume = read_volume(tmp_path / "ct")
    np.testing.assert_array_equal(volume.image_hu, wanted_hu())
    assert volume.notes == ("1 slices of localizers or stubs left out",)


def test_row_4_gantry_tilt(tmp_path: Path) -> None:
    for index, path in enumerate(save_series(tmp_path / "ct")):
        edit_slice(path, ImagePositionPatient=[-20, -30 + 0.5 * index, 2 * index], GantryDetectorTilt=0)
    refused(tmp_path / "ct", r"shift sideways by 0\.5 mm a slice \(14\.0 degrees\)")


def test_row_4_the_tilt_in_the_header_is_not_believed(tmp_path: Path) -> None:
    save_series(tmp_path / "ct", GantryDetectorTilt=14)
    np.testing.assert_array_equal(read_volume(tmp_path / "ct").image_hu, wanted_hu())


@pytest.mark.parametrize("degrees", [5, 12, 60])
def test_an_oblique_series_is_straight(tmp_path: Path, degrees: float) -> None:
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    for index, path in enumerate(save_series(tmp_path / "ct")):
        edit_slice(
            path,
            ImageOrientationPatient=[1, 0, 0, 0, round(c, 6), round(s, 6)],
            ImagePositionPatient=[-20, round(-30 - 2 * index * s, 6), round(2 * index * c, 6)],
        )
    volume = read_volume(tmp_path / "ct")
    np.testing.assert_allclose(sorted(volume.grid.spacing_mm_zyx), (1.25, 1.5, 2.0), atol=1e-5)
    # the voxel of slice 3, row 5, column 7 lies at IPP + 7 * 1.25 along the row + 5 * 1.5 down the column
    value = int(stored_slice(3)[5, 7]) - 1024
    (z,), (y,), (x,) = np.nonzero(volume.image_hu == value)
    lps = np.array([-20 + 7 * 1.25, -30 - 6 * s + 5 * 1.5 * c, 6 * c + 5 * 1.5 * s])
    ras = volume.grid.matrix @ np.array([x, y, z, 1])
    np.testing.assert_allclose(ras[:3], lps * (-1, -1, 1), atol=1e-4)


def test_row_5_variable_spacing(tmp_path: Path) -> None:
    positions = [0.0, 2.5, 5.0, 7.5, 15.0, 19.0, 23.3]
    for index, path in enumerate(save_series(tmp_path / "ct", len(positions))):
        edit_slice(path, ImagePositionPatient=[-20, -30, positions[index]])
    refused(tmp_path / "ct", r"uneven slice spacing: 2\.500 to 7\.500 mm")


@pytest.mark.parametrize(("decimals", "num_notes"), [(2, 0), (1, 1)])
def test_row_5_rounded_positions_are_even(tmp_path: Path, decimals: int, num_notes: int) -> None:
    for index, path in enumerate(save_series(tmp_path / "ct", 9)):
        edit_slice(path, ImagePositionPatient=[-20, -30, round(0.625 * index, decimals)])
    volume = read_volume(tmp_path / "ct")
    assert volume.grid.spacing_mm_zyx[0] == pytest.approx(0.625, abs=0.01)
    assert len(volume.notes) == num_notes
    assert all("taken as even" in note for note in volume.notes)


def test_row_6_several_series_in_one_folder(tmp_path: Path) -> None:
    first = save_series(tmp_path / "ct")
    second = save_series(tmp_path / "ct", 5, prefix="b")
    refused(tmp_path / "ct", "2 series of 6, 5 slices in one folder")
    np.testing.assert_array_equal(read_volume(tmp_path / "ct", series_files=first).image_hu, wanted_hu())
    assert read_volume(tmp_path / "ct", series_files=second).image_hu.shape == (5, 16, 12)
    assert probe(tmp_path / "ct", series_files=second).shape_zyx == (5, 16, 12)


@pytest.mark.parametrize("which", [0, 2, 5])
@pytest.mark.parametrize("num_bytes", [1, 300])
def test_row_7_truncated_slice(tmp_path: Path, which: int, num_bytes: int) -> None:
    cut(save_series(tmp_path / "ct")[which], num_bytes)
    refused(tmp_path / "ct", rf"00{which}\.dcm is cut short: {384 - num_bytes} of 384 bytes")


@pytest.mark.parametrize("keep", [10, 135, 200, 400, 500, 600, 700, 800])
def test_row_7_truncated_header(tmp_path: Path, keep: int) -> None:
    path = save_series(tmp_path / "ct")[5]
    path.write_bytes(path.read_bytes()[:keep])
    refused(tmp_path / "ct", r"005\.dcm ")


@pytest.mark.parametrize("syntax", ["RLE", "JPEG2000", "JPEG"])
@pytest.mark.parametrize("num_bytes", [2, 9, 60])
def test_row_7_truncated_compressed_slice(tmp_path: Path, syntax: str, num_bytes: int) -> None:
    path = save_series(tmp_path / "ct")[5]
    compress_slice(path, syntax)
    cut(path, num_bytes)
    refused(tmp_path / "ct", r"005\.dcm is cut short")


@pytest.mark.parametrize("keyword", ["ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "Rows"])
def test_row_8_missing_geometry(tmp_path: Path, keyword: str) -> None:
    edit_slice(save_series(tmp_path / "ct")[2], **{keyword: None})
    refused(tmp_path / "ct", rf"002\.dcm has no usable {keyword}")


@pytest.mark.parametrize("keyword", ["RescaleSlope", "RescaleIntercept"])
def test_numbers_without_a_scale_are_not_hu(tmp_path: Path, keyword: str) -> None:
    edit_slice(save_series(tmp_path / "ct")[0], **{keyword: None})
    refused(tmp_path / "ct", r"000\.dcm has no usable RescaleSlope and RescaleIntercept")


@pytest.mark.parametrize("num_slices", [1, 2, 3])
def test_row_9_stubs_are_not_volumes(tmp_path: Path, num_slices: int) -> None:
    paths = save_series(tmp_path / "ct", num_slices)
    refused(tmp_path / "ct", f"not a volume: {num_slices} CT slice")
    with pytest.raises(CaseError, match="not a volume: 1 CT slice; "):
        read_volume(paths[0])


def test_row_10_order_is_by_position(tmp_path: Path) -> None:
    paths = save_series(tmp_path / "ct")
    for index, path in enumerate(paths):
        edit_slice(path, InstanceNumber=10 - index)
    renamed = [path.rename(path.with_name(f"{9 - i}.dcm")) for i, path in enumerate(paths)]
    assert renamed
    np.testing.assert_array_equal(read_volume(tmp_path / "ct").image_hu, wanted_hu())


def test_row_11_intercept_by_slice(tmp_path: Path) -> None:
    for path in save_series(tmp_path / "ct")[3:]:
        edit_slice(path, RescaleIntercept=-1000)
    wanted = wanted_hu().copy()
    wanted[3:] += 24
    np.testing.assert_array_equal(read_volume(tmp_path / "ct").image_hu, wanted)


@pytest.mark.parametrize("which", [slice(None), slice(4, None)])
def test_row_12_slope_of_a_half(tmp_path: Path, which: slice) -> None:
    stored = np.stack([stored_slice(i) for i in range(6)]).astype(np.float32)
    wanted = stored - 1024
    wanted[which] = stored[which] * 0.5 - 1024
    for path in save_series(tmp_path / "ct")[
        which
    ]:  # a fraction in a late slice must not be lost to the type of the first
        edit_slice(path, RescaleSlope=0.5)
    volume = read_volume(tmp_path / "ct")
    assert volume.image_hu.dtype == np.float32
    np.testing.assert_array_equal(volume.image_hu, wanted[:, ::-1, ::-1])
    assert any("fractions" in note for note in volume.notes)


def test_rows_14_and_15_padding_and_metal(tmp_path: Path) -> None:
    series = generate_uid()
    (tmp_path / "ct").mkdir()
    for index in range(6):
        signed = stored_slice(index).astype(np.int16)
        signed[0, 0] = -2000
        save_slice(
            tmp_path / "ct" / f"{index}.dcm", signed, position=(0, 0, 2 * index), series=series, PixelPaddingValue=-2000
        )
    volume = read_volume(tmp_path / "ct")
    assert volume.image_hu.min() == -1024
    assert volume.notes == ("6 voxels below -1024 HU (padding) set to -1024",)
    bright = stored_slice(3)
    bright[4, 4] = 65535
    save_slice(tmp_path / "ct" / "3.dcm", bright, position=(0, 0, 6), series=series)
    volume = read_volume(tmp_path / "ct")
    assert volume.image_hu.max() == 30000
    assert "1 voxels above 30000 HU set to 30000" in volume.notes


@pytest.mark.parametrize("syntax", ["RLE", "JPEG2000", "JPEG"])
def test_row_16_compressed_lossless(tmp_path: Path, syntax: str) -> None:
    for path in save_series(tmp_path / "ct"):
        compress_slice(path, syntax)
    np.testing.assert_array_equal(read_volume(tmp_path / "ct").image_hu, wanted_hu())


def test_row_16_jpeg_ls(tmp_path: Path) -> None:
    for path in save_series(tmp_path / "ct", RescaleIntercept=-900):
        make_constant_jpeg_ls(path)
    np.testing.assert_array_equal(read_volume(tmp_path / "ct").image_hu, np.full((6, 16, 12), -900))


def test_row_16_pixels_that_do_not_decode(tmp_path: Path) -> None:
    path = save_series(tmp_path / "ct")[3]
    compress_slice(path, "JPEG2000")
    data = pydicom.dcmread(path)
    data.PixelData = data.PixelData[:16] + bytes(len(data.PixelData) - 24) + data.PixelData[-8:]
    data.save_as(path)
    refused(tmp_path / "ct", r"003\.dcm cannot be decoded")


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRBigEndian])
def test_other_uncompressed_syntaxes(tmp_path: Path, syntax: str) -> None:
    for path in save_series(tmp_path / "ct"):
        data = pydicom.dcmread(path)
        if syntax == ExplicitVRBigEndian:
            data.PixelData = np.frombuffer(data.PixelData, "<u2").byteswap().tobytes()
        data.file_meta.TransferSyntaxUID = UID(syntax)
        pydicom.dcmwrite(path, data, enforce_file_format=True)
    np.testing.assert_array_equal(read_volume(tmp_path / "ct").image_hu, wanted_hu())
    cut(tmp_path / "ct" / "004.dcm", 2)
    refused(tmp_path / "ct", r"004\.dcm is cut short: 382 of 384 bytes")


def test_the_deflated_syntax(tmp_path: Path) -> None:
    for path in save_series(tmp_path / "ct"):
        data = pydicom.dcmread(path)
        data.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
        pydicom.dcmwrite(path, data, enforce_file_format=True)
    np.testing.assert_array_equal(read_volume(tmp_path / "ct").image_hu, wanted_hu())
    cut(tmp_path / "ct" / "005.dcm", 20)
    refused(tmp_path / "ct", r"005\.dcm cannot be read")


def test_row_17_no_preamble(tmp_path: Path) -> None:
    for path in save_series(tmp_path / "ct")[:2]:
        path.write_bytes(path.read_bytes()[132:])
    volume = read_volume(tmp_path / "ct")
    np.testing.assert_array_equal(volume.image_hu, wanted_hu())
    assert volume.notes == ("2 files have no DICM preamble; read all the same",)


def test_row_17_a_bare_data_set_is_named(tmp_path: Path) -> None:
    path = save_series(tmp_path / "ct")[4]
    content = path.read_bytes()
    bare = path.with_name("bare")
    bare.write_bytes(content[content.index(b"\x08\x00\x16\x00UI") :])
    path.unlink()
    refused(tmp_path / "ct", "bare is not a DICOM file")


def test_row_18_junk_is_ignored_with_a_count(tmp_path: Path) -> None:
    save_series(tmp_path / "ct")
    (tmp_path / "ct" / ".DS_Store").write_bytes(b"x" * 99)
    (tmp_path / "ct" / "notes.txt").write_text("hello")
    (tmp_path / "ct" / "DICOMDIR").write_bytes(b"y" * 999)
    save_slice(
        tmp_path / "ct" / "rt.dcm",
        stored_slice(0),
        position=(0, 0, 0),
        series=generate_uid(),
        storage="1.2.840.10008.5.1.4.1.1.481.3",
        Modality="RTSTRUCT",
    )
    volume = read_volume(tmp_path / "ct")
    np.testing.assert_array_equal(volume.image_hu, wanted_hu())
    assert volume.notes == ("3 files of the folder ignored: 1 DICOM without a CT slice, 2 not DICOM",)


def test_row_18_a_broken_slice_of_another_series_harms_only_that_series(tmp_path: Path) -> None:
    save_series(tmp_path / "ct")
    save_slice(
        tmp_path / "ct" / "zz.dcm",
        stored_slice(0),
        position=(0, 0, 0),
        series=generate_uid(),
        ImagePositionPatient=None,
    )
    volume = read_volume(tmp_path / "ct")
    np.testing.assert_array_equal(volume.image_hu, wanted_hu())
    assert volume.notes == ("1 unusable CT files of other series left out",)


def test_folders_without_ct(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "no CT slice")
    save_series(tmp_path / "mr", Modality="MR", storage="1.2.840.10008.5.1.4.1.1.4")
    refused(tmp_path / "mr", "no CT slice: 6 DICOM files of another kind")


@pytest.mark.parametrize(
    ("tags", "match"),
    [
        ({"NumberOfFrames": 3}, "multi-frame"),
        ({"storage": "1.2.840.10008.5.1.4.1.1.2.1"}, "multi-frame"),
        ({"PhotometricInterpretation": "MONOCHROME1"}, "MONOCHROME2"),
        ({"ImageOrientationPatient": [1, 0, 0, 1, 0, 0]}, "not two orthogonal directions"),
        ({"RescaleSlope": 0}, "no usable RescaleSlope"),
        ({"PixelSpacing": [1e-3, 1e-3]}, "spacing"),
    ],
)
def test_headers_that_cannot_be_used(tmp_path: Path, tags: dict[str, Any], match: str) -> None:
    save_series(tmp_path / "ct", **tags)
    refused(tmp_path / "ct", match)


def test_files_of_a_series_that_vanished(tmp_path: Path) -> None:
    paths = save_series(tmp_path / "ct")
    paths[3].unlink()
    with pytest.raises(CaseError, match=r"003\.dcm does not exist"):
        read_volume(tmp_path / "ct", series_files=paths)


def test_ct_written_as_secondary_capture_is_still_ct(tmp_path: Path) -> None:
    save_series(tmp_path / "ct", storage="1.2.840.10008.5.1.4.1.1.7")
    np.testing.assert_array_equal(read_volume(tmp_path / "ct").image_hu, wanted_hu())


def test_nothing_of_a_header_reaches_a_message(tmp_path: Path) -> None:
    """The canaries of ``save_series`` in whole files, and raw text in places that are parsed."""
    paths = save_series(tmp_path / "ct")
    content = paths[2].read_bytes()
    paths[2].write_bytes(content.replace(b"-20.0\\-30.0\\4.0", b"Canary\\Ja\\Doe  "))
    assert paths[2].read_bytes() != content
    text = refused(tmp_path / "ct", "no usable ImagePositionPatient")
    assert "Doe" not in text
    cut(paths[1], 5)
    refused(tmp_path / "ct", r"001\.dcm")
    assert set(CANARIES) <= {element.keyword for element in pydicom.dcmread(paths[0])}


def test_row_1_gaps_are_filled_on_request(tmp_path: Path) -> None:
    """``save_series`` brightens by 300 a slice: a slice between two others is their mean, whatever the number that is missing."""
    save_series(tmp_path / "ct", 8, skip=(3, 5))
    volume = read_volume(tmp_path / "ct", options=ReadOptions(allow_gaps=True))
    np.testing.assert_array_equal(volume.image_hu, wanted_hu(8))
    assert volume.image_hu.dtype == np.int16
    assert volume.grid.spacing_mm_zyx == (2.0, 1.5, 1.25)
    assert volume.notes == (
        "2 of 8 slices interpolated between their neighbours, which are up to 4.000 mm apart, as asked; spacing 2.000 mm",
    )
    assert probe(tmp_path / "ct", options=ReadOptions(allow_gaps=True)).shape_zyx == (8, 16, 12)


def test_row_1_wide_gaps_are_filled_linearly(tmp_path: Path) -> None:
    save_series(tmp_path / "ct", 12, skip=(4, 5, 6, 7))
    volume = read_volume(tmp_path / "ct", options=ReadOptions(allow_gaps=True))
    np.testing.assert_array_equal(volume.image_hu[:, :-1], wanted_hu(12)[:, :-1])  # linear, as the slices are
    assert "4 of 12 slices" in volume.notes[0]


def test_row_1_padding_does_not_darken_what_is_interpolated(tmp_path: Path) -> None:
    series = generate_uid()
    (tmp_path / "ct").mkdir()
    for index in (0, 1, 2, 4, 5):
        stored = np.full((16, 12), -2000 if index == 4 else 1024, dtype=np.int16)
        save_slice(tmp_path / "ct" / f"{index}.dcm", stored, position=(0, 0, 2 * index), series=series)
    volume = read_volume(tmp_path / "ct", options=ReadOptions(allow_gaps=True))
    assert volume.image_hu[:, 0, 0].tolist() == [0, 0, 0, -512, -1024, 0]


def test_row_5_uneven_slices_are_resampled_on_request(tmp_path: Path) -> None:
    positions = [0.0, 2.0, 4.0, 5.0, 8.0, 10.0, 12.0]
    for index, path in enumerate(save_series(tmp_path / "ct", len(positions))):
        edit_slice(path, ImagePositionPatient=[-20, -30, positions[index]])
    volume = read_volume(tmp_path / "ct", options=ReadOptions(allow_gaps=True))
    assert volume.grid.spacing_mm_zyx[0] == 2.0
    # at z = 6 the slices at 5 (number 3) and 8 (number 4) are mixed 2 : 1; the slice at 5 itself has no place of its own
    mixed = np.rint((2 * wanted_hu(7)[3].astype(float) + wanted_hu(7)[4]) / 3)
    np.testing.assert_array_equal(volume.image_hu[3], mixed)
    np.testing.assert_array_equal(volume.image_hu[[0, 1, 2, 4, 5, 6]], wanted_hu(7)[[0, 1, 2, 4, 5, 6]])


def test_row_1_a_wild_position_is_not_filled(tmp_path: Path) -> None:
    edit_slice(save_series(tmp_path / "ct")[5], ImagePositionPatient=[-20, -30, 20000])
    with pytest.raises(CaseError, match="more than half of the slices would be invented") as caught:
        read_volume(tmp_path / "ct", options=ReadOptions(allow_gaps=True))
    assert caught.value.code == "missing-slices"


def test_row_4_a_tilt_is_refused_with_gaps_allowed_too(tmp_path: Path) -> None:
    for index, path in enumerate(save_series(tmp_path / "ct", 8, skip=(3,))):
        place = index + (index > 2)
        edit_slice(path, ImagePositionPatient=[-20, -30 + 0.5 * place, 2 * place])
    with pytest.raises(CaseError, match=r"0\.5 mm a slice \(14\.0 degrees\)") as caught:
        read_volume(tmp_path / "ct", options=ReadOptions(allow_gaps=True))
    assert caught.value.code == "gantry-tilt"


def test_an_unreadable_slice_is_not_taken_for_junk(tmp_path: Path) -> None:
    """Without an extension only its content would say that it is a slice; a link that leads nowhere cannot be opened, even by root."""
    paths = [path.rename(path.with_suffix("")) for path in save_series(tmp_path / "ct")]
    paths[5].rename(tmp_path / "away")
    paths[5].symlink_to(paths[5])
    with pytest.raises(CaseError, match="005 cannot be read") as caught:
        read_volume(tmp_path / "ct", series_files=paths)
    assert caught.value.code == "unreadable"
