"""One CT and its label from any file: what all formats share, labels, refusals, and every real CT at hand."""

import math
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from numpy.typing import NDArray

from ftengine.errors import CaseError, ConfigError
from ftengine.geometry import Grid, grid_from_codes, grid_from_matrix, grid_offset_vox, to_ras
from ftengine.types import Volume
from ftengine.volume.discover import discover, discover_all
from ftengine.volume.readers import ReadOptions, probe, read_label, read_volume
from tests.recipes import ct_array, grid_of, save_itk, save_nifti, save_nrrd_in_ras, save_series

LABELS = (0, 1, 2)
ALL_CODES = ["RAS", "LPS", "LAS", "PIR", "SRA", "ILP", "AIL"]


def save(path: Path, array: NDArray[Any], grid: Grid) -> Path:
    if ".nii" in path.name:
        return save_nifti(path, array, grid.matrix)
    if path.name.startswith("ras"):
        return save_nrrd_in_ras(path, array, grid)
    return save_itk(path, array, grid, compress=True)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    codes=st.permutations(("RL", "AP", "SI")).flatmap(lambda p: st.tuples(*[st.sampled_from(pair) for pair in p])),
    spacing=st.tuples(*[st.sampled_from([0.5, 0.75, 1.25, 2.0, 5.0])] * 3),
    marker=st.tuples(st.integers(0, 4), st.integers(0, 5), st.integers(0, 6)),
    origin=st.tuples(*[st.integers(-200, 200)] * 3),
)
def test_row_29_a_marker_lands_at_the_same_place_in_every_format(
    tmp_path: Path,
    codes: tuple[str, str, str],
    spacing: tuple[float, float, float],
    marker: tuple[int, int, int],
    origin: tuple[int, int, int],
) -> None:
    matrix = grid_from_codes((5, 6, 7), spacing, "".join(codes)).matrix
    matrix[:3, 3] = origin
    grid = grid_from_matrix((5, 6, 7), matrix)
    array = np.full((5, 6, 7), -1000, dtype=np.int16)
    array[marker] = 777
    z, y, x = marker
    wanted_mm = (matrix @ (x, y, z, 1))[:3]
    for name in ("a.nii", "a.nii.gz", "a.nrrd", "ras.nrrd", "a.mha"):
        volume = read_volume(save(tmp_path / name, array, grid))
        (found,) = np.argwhere(volume.image_hu == 777)
        np.testing.assert_allclose((volume.grid.matrix @ (*found[::-1], 1))[:3], wanted_mm, atol=1e-3)
        assert volume.grid.is_ras
        assert volume.image_hu.flags.c_contiguous
        assert grid_offset_vox(volume.native, grid) < 1e-4
        assert probe(tmp_path / name).shape_zyx == volume.image_hu.shape


def test_row_29_dicom_lands_where_its_nifti_twin_lands(tmp_path: Path) -> None:
    save_series(tmp_path / "ct")
    from_dicom = read_volume(tmp_path / "ct")
    save_nifti(tmp_path / "twin.nii.gz", from_dicom.image_hu[::-1, ::-1], flipped(from_dicom.grid, (0, 1)).matrix)
    twin = read_volume(tmp_path / "twin.nii.gz")
    np.testing.assert_array_equal(twin.image_hu, from_dicom.image_hu)
    assert grid_offset_vox(twin.grid, from_dicom.grid) < 1e-4


def flipped(grid: Grid, axes: tuple[int, ...]) -> Grid:
    """The grid of an array after flipping these z, y, x axes."""
    matrix = grid.matrix
    for axis in axes:
        matrix[:3, 3] += matrix[:3, 2 - axis] * (grid.shape_zyx[axis] - 1)
        matrix[:3, 2 - axis] *= -1
    return grid_from_matrix(grid.shape_zyx, matrix)


def pair(folder: Path, label: NDArray[Any], affine: NDArray[np.float64] | None = None) -> tuple[Path, Path]:
    """An image of ``ct_array`` with a label beside it, as written."""
    image = save_nifti(folder / "a.nii.gz", ct_array())
    return image, save_nifti(folder / "a_seg.nii.gz", label, affine)


def label_array(dtype: str = "u1") -> NDArray[Any]:
    return np.random.default_rng(1).integers(0, 3, (6, 8, 10)).astype(dtype)


@pytest.mark.parametrize("dtype", ["u1", "i2", "u2", "i4", "i8", "f4", "f8"])
def test_a_label_of_any_dtype(tmp_path: Path, dtype: str) -> None:
    image, label = pair(tmp_path, label_array(dtype))
    volume = read_volume(image, label, label_values=LABELS)
    assert volume.label is not None
    assert volume.label.dtype == np.uint8
    assert volume.label.flags.c_contiguous
    np.testing.assert_array_equal(volume.label, label_array()[:, ::-1, ::-1])


@pytest.mark.parametrize("codes", ALL_CODES)
@pytest.mark.parametrize("name", ["l.nii.gz", "l.nrrd", "l.mha"])
def test_a_label_in_another_order_and_format_on_the_same_grid(tmp_path: Path, codes: str, name: str) -> None:
    """As the LAS label of the DICOM series among the real data."""
    image = save_nifti(tmp_path / "a.nii.gz", ct_array())
    volume = read_volume(image)
    wanted = label_array()[:, ::-1, ::-1].astype(np.uint8)
    shape = [0, 0, 0]
    matrix = grid_from_codes((4, 4, 4), (1.0, 1.0, 1.0), codes).matrix[:3, :3]
    order = [2 - int(np.argmax(np.abs(matrix[2 - axis]))) for axis in range(3)]  # the label's axis for each RAS+ axis
    for axis, where in enumerate(order):
        shape[where] = wanted.shape[axis]
    stored = np.zeros(shape, dtype=np.uint8)
    spacing = [0.0, 0.0, 0.0]
    for axis, where in enumerate(order):
        spacing[where] = volume.grid.spacing_mm_zyx[axis]
    grid = grid_from_codes((shape[0], shape[1], shape[2]), (spacing[0], spacing[1], spacing[2]), codes)
    moved = grid.matrix
    moved[:3, 3] += volume.grid.matrix[:3, 3] - to_ras(stored, grid)[1].matrix[:3, 3]
    grid = grid_from_matrix(grid.shape_zyx, moved)
    turned = wanted.transpose([order.index(i) for i in range(3)])
    for axis, where in enumerate(order):
        if matrix[2 - axis, 2 - where] < 0:
            turned = np.flip(turned, where)
    label = save(tmp_path / name, np.ascontiguousarray(turned), grid)
    result = read_volume(image, label, label_values=LABELS)
    np.testing.assert_array_equal(result.label, wanted)


def refused_pair(image: Path, label: Path, match: str, **options: dict[int, int]) -> str:
    with pytest.raises(CaseError, match=match) as caught:
        read_volume(image, label, label_values=LABELS, label_map=options.get("label_map"))
    assert label.name in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_row_25_another_shape(tmp_path: Path) -> None:
    text = refused_pair(
        *pair(tmp_path, label_array()[:5]), r"label of shape \(5, 8, 10\) .* for an image of shape \(6, 8, 10\)"
    )
    assert "a.nii.gz" in text


@pytest.mark.parametrize(("shift_mm", "fine"), [(0.0, True), (0.09, True), (0.11, False), (5.0, False)])
def test_row_25_another_place(tmp_path: Path, shift_mm: float, fine: bool) -> None:
    affine = grid_of((6, 8, 10)).matrix
    affine[0, 3] = shift_mm  # voxels of 1 mm
    image, label = pair(tmp_path, label_array(), affine)
    if fine:
        assert read_volume(image, label, label_values=LABELS).label is not None
    else:
        refused_pair(image, label, f"up to {shift_mm:.2f} voxels off its image")


def test_row_25_a_label_flipped_in_its_header_only(tmp_path: Path) -> None:
    refused_pair(*pair(tmp_path, label_array(), np.diag([1.0, -1.0, 2.0, 1.0])), "voxels off its image")


def test_row_25_another_spacing(tmp_path: Path) -> None:
    refused_pair(*pair(tmp_path, label_array(), np.diag([-1.1, -1.0, 2.0, 1.0])), "voxels off its image")


def test_row_26_rounded_floats_are_labels_and_fractions_are_not(tmp_path: Path) -> None:
    noise = np.random.default_rng(2).uniform(-9e-4, 9e-4, (6, 8, 10))
    image, label = pair(tmp_path, label_array("f8") + noise)
    np.testing.assert_array_equal(read_volume(image, label, label_values=LABELS).label, label_array()[:, ::-1, ::-1])
    broken = label_array("f4").copy()
    broken[4, 0, 0] = 1.5
    refused_pair(*pair(tmp_path, broken), "slice 4 of the label holds 1.5, which is not a whole number")
    broken[4, 0, 0] = np.nan
    refused_pair(*pair(tmp_path, broken), "slice 4 of the label holds nan")


def test_row_26_foreign_values_are_listed_with_a_hint(tmp_path: Path) -> None:
    label = label_array("i4").copy()
    label[0, 0, :4] = 255
    label[1, 0, :2] = -7
    text = refused_pair(
        *pair(tmp_path, label),
        r"label values -7 \(2 voxels\), 255 \(4 voxels\) are not labels of the region; want 0, 1, 2",
    )
    assert "--label-map -7=VALUE" in text
    volume = read_volume(
        tmp_path / "a.nii.gz", tmp_path / "a_seg.nii.gz", label_values=LABELS, label_map={255: 1, -7: 0}
    )
    assert volume.label is not None
    np.testing.assert_array_equal(volume.label[0, -1, -4:], 1)
    np.testing.assert_array_equal(volume.label[1, -1, -2:], 0)


def test_row_26_many_foreign_values_make_a_short_message(tmp_path: Path) -> None:
    text = refused_pair(*pair(tmp_path, ct_array()), "and [0-9]+ more are not labels")
    assert len(text) < 700


def test_row_26_wild_values(tmp_path: Path) -> None:
    label = label_array("i8").copy()
    label[0, 0, 0], label[0, 0, 1] = 2**40, -(2**40)
    refused_pair(*pair(tmp_path, label), rf"label values -{2**40} \(1 voxels\), {2**40} \(1 voxels\)")
    volume = read_volume(
        tmp_path / "a.nii.gz", tmp_path / "a_seg.nii.gz", label_values=LABELS, label_map={2**40: 0, -(2**40): 2}
    )
    assert volume.label is not None
    assert volume.label[0, -1, -2] == 2


def test_a_map_permutes_and_does_not_chain(tmp_path: Path) -> None:
    image, label = pair(tmp_path, label_array())
    volume = read_volume(image, label, label_values=LABELS, label_map={1: 2, 2: 1})
    np.testing.assert_array_equal(volume.label, np.array([0, 2, 1])[label_array()[:, ::-1, ::-1]])
    refused_pair(image, label, "label values 2", label_map={2: 9})


def test_without_a_region_a_label_may_hold_any_byte(tmp_path: Path) -> None:
    label = label_array("i2").copy()
    label[0, 0, 0] = 255
    assert read_volume(*pair(tmp_path, label)).label is not None
    label[0, 0, 0] = 256
    with pytest.raises(CaseError, match=r"256 \(1 voxels\).*want 0 to 255"):
        read_volume(*pair(tmp_path, label))


def test_labels_that_cannot_be_read(tmp_path: Path) -> None:
    image, label = pair(tmp_path, label_array())
    label.unlink()
    refused_pair(image, label, "does not exist")
    save_series(tmp_path / "seg")
    refused_pair(image, tmp_path / "seg", "a label in DICOM")


def test_row_30_spaces_unicode_and_line_breaks_in_names(tmp_path: Path) -> None:
    image = save_nifti(tmp_path / "Bauch übersicht 1.nii.gz", ct_array())
    assert read_volume(image).image_hu.shape == (6, 8, 10)
    with pytest.raises(CaseError, match=r"line\\nbreak\.nii\.gz: does not exist") as caught:
        read_volume(tmp_path / "line\nbreak.nii.gz")
    assert "\n" not in str(caught.value)
    with pytest.raises(CaseError, match="cannot be read"):
        read_volume(Path("nul\0.nii.gz"))


def mutated(content: bytes, seed: int) -> bytes:
    """A few bytes changed, lost or added, mostly in the header."""
    rng = random.Random(seed)
    result = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(max(1, min(len(result), 400)))
        kind = rng.random()
        if kind < 0.6 and result:
            result[place] = rng.choice([0, 255, 127, rng.randrange(256)])
        elif kind < 0.8:
            result = result[: rng.randrange(1, max(2, len(result)))]
        else:
            result[place : place + rng.randint(0, 3)] = bytes(rng.randrange(256) for _ in range(rng.randint(0, 3)))
    return bytes(result)


def write_dicom(path: Path) -> Path:
    return save_series(path.parent)[3]


WRITERS: dict[str, Callable[[Path], Path]] = {
    "a.nii": lambda p: save_nifti(p, ct_array()),
    "a.nii.gz": lambda p: save_nifti(p, ct_array()),
    "a.nrrd": lambda p: save_itk(p, ct_array()),
    "b.nrrd": lambda p: save_itk(p, ct_array(), compress=True),
    "a.mha": lambda p: save_itk(p, ct_array()),
    "b.mha": lambda p: save_itk(p, ct_array(), compress=True),
    "003.dcm": write_dicom,
}


@pytest.mark.parametrize("name", WRITERS)
def test_damaged_files_give_a_volume_or_a_case_error(tmp_path: Path, name: str) -> None:
    path = WRITERS[name](tmp_path / "case" / name if name.endswith("dcm") else tmp_path / name)
    source = path.parent if name.endswith("dcm") else path
    content = path.read_bytes()
    reasons = []
    for seed in range(60):
        path.write_bytes(mutated(content, seed))
        try:
            volume = read_volume(source)
        except CaseError as error:
            reasons.append(str(error))
        else:
            assert volume.image_hu.min() >= -1024
    assert len(reasons) > 5
    assert all(reason.isprintable() for reason in reasons)
    assert not any("Canary" in reason for reason in reasons)


# README of the data: single-, two- and three-slice items
STUBS = {"covid_2d", "dcmqi_liver3slice/ct-3slice"}
# paired by name with a label that belongs to another image (README: "fits example_ct_sm only")
FOREIGN_LABEL = {"totalseg_example/example"}


@pytest.mark.data
def test_every_real_ct_is_read_or_refused_for_a_known_reason(data_dir: Path) -> None:
    found = discover([data_dir], dataset="real")
    assert len(found) >= 15
    refused = {}
    for source in found:
        name = source.case.removeprefix("real/")
        try:
            volume = read_volume(source.image, source.label, series_files=source.series_files)
        except CaseError as error:
            refused[name] = str(error)
            continue
        assert volume.image_hu.dtype == np.int16, name
        assert volume.image_hu.min() >= -1024
        assert volume.image_hu.max() <= 30000
        assert volume.grid.is_ras
        assert probe(source.image, series_files=source.series_files).shape_zyx == volume.image_hu.shape
        assert volume.label is None or volume.label.shape == volume.image_hu.shape
    assert set(refused) == STUBS | FOREIGN_LABEL
    assert all("not a volume" in refused[name] for name in STUBS)
    assert "label of shape" in refused["totalseg_example/example"]
    # example_ct, refused for its label only, is read without one
    assert read_volume(data_dir / "totalseg_example" / "example_ct.nii.gz").image_hu.max() == 3382


@pytest.mark.data
def test_no_label_among_the_real_data_is_taken_for_a_ct(data_dir: Path) -> None:
    found = discover_all([data_dir], dataset="real")
    passed_over = {path.name for path, reason in found.ignored if reason == "a label by its name"}
    assert {
        "mask.nii.gz",
        "liver_seg.nrrd",
        "example_ct_sm_label_chest.nii.gz",
        "3DCT_lung_baseline_mask.mha",
    } <= passed_over


def original(data_dir: Path) -> Volume:
    return read_volume(data_dir / "totalseg_example" / "example_ct_sm.nii.gz")


@pytest.mark.data
def test_the_pir_oddity_has_the_anatomy_and_hu_of_its_original(data_dir: Path) -> None:
    wanted = original(data_dir)
    turned = read_volume(data_dir / "oddities" / "example_ct_sm_PIR_uint16_slope.nii.gz")
    np.testing.assert_array_equal(turned.image_hu, wanted.image_hu)
    assert turned.image_hu.dtype == np.int16
    assert grid_offset_vox(wanted.grid, turned.grid) < 1e-3
    assert turned.native.shape_zyx != turned.grid.shape_zyx


@pytest.mark.data
def test_the_oblique_oddity_has_the_voxels_of_its_original_turned_by_12_degrees(data_dir: Path) -> None:
    wanted = original(data_dir)
    turned = read_volume(data_dir / "oddities" / "example_ct_sm_oblique12.nii.gz")
    np.testing.assert_array_equal(turned.image_hu, wanted.image_hu)
    np.testing.assert_allclose(turned.grid.spacing_mm_zyx, wanted.grid.spacing_mm_zyx, rtol=1e-5)
    a, b = (v.grid.matrix[:3, :3] / np.array(v.grid.spacing_mm_zyx[::-1]) for v in (wanted, turned))
    assert np.degrees(np.arccos((np.trace(a.T @ b) - 1) / 2)) == pytest.approx(12, abs=1e-3)


@pytest.mark.data
def test_the_label_of_the_real_dicom_series_fits_though_it_is_flipped(data_dir: Path) -> None:
    folder = data_dir / "totalseg_dicom"
    volume = read_volume(folder / "series", folder / "example_dicom_label_abdomen.nii.gz", label_values=range(7))
    assert volume.image_hu.shape == (20, 512, 512)
    assert volume.grid.spacing_mm_zyx == pytest.approx((2.0, 0.9765625, 0.9765625))
    assert volume.label is not None
    liver = volume.image_hu[volume.label == 1]
    assert liver.size == 366708
    assert 40 < np.median(liver) < 140  # liver tissue, so the flip is right
    with pytest.raises(CaseError, match="are not labels of the region"):
        read_volume(folder / "series", folder / "example_seg_dicom.nii.gz", label_values=range(7))


@pytest.mark.data
def test_a_lost_slice_of_the_real_dicom_series_is_noticed(data_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(data_dir / "totalseg_dicom" / "series", tmp_path / "ct")
    (tmp_path / "ct" / "slice_007.dcm").unlink()
    with pytest.raises(CaseError, match="1 slice missing"):
        read_volume(tmp_path / "ct")


def test_read_label_turns_any_format_to_ras(tmp_path: Path) -> None:
    label = (ct_array() > 0).astype(np.uint8) * 2
    path = save_nifti(tmp_path / "a_seg.nii.gz", label)
    values, grid = read_label(path, label_values=(0, 2))
    assert values.dtype == np.uint8
    assert grid.is_ras
    volume = read_volume(save_nifti(tmp_path / "a_ct.nii.gz", ct_array()), path)
    np.testing.assert_array_equal(values, volume.label)
    with pytest.raises(CaseError, match="label values 2"):
        read_label(path, label_values=(0, 1))


@pytest.mark.parametrize("bad", [float("nan"), -1025.0, 40000.0, float("inf")])
def test_only_a_hu_may_replace_nan(bad: float) -> None:
    with pytest.raises(ConfigError, match="want a HU from -1024"):
        ReadOptions(nan_hu=bad)


@pytest.mark.parametrize("name", ["a.nii.gz", "a.nrrd"])
def test_row_23_nan_and_infinity_are_replaced_on_request(tmp_path: Path, name: str) -> None:
    array = ct_array().astype(np.float32)
    array[1, 2, 3], array[4, 5, 6] = np.nan, np.inf
    path = save_nifti(tmp_path / name, array) if name.endswith("gz") else save_itk(tmp_path / name, array)
    wanted = ct_array()
    wanted[1, 2, 3] = wanted[4, 5, 6] = -1024
    volume = read_volume(path, options=ReadOptions(nan_hu=-1024))
    np.testing.assert_array_equal(volume.image_hu, wanted[:, ::-1, ::-1])
    assert volume.image_hu.dtype == np.int16
    assert volume.notes == ("2 voxels of NaN or infinity set to -1024 HU, as asked",)


def test_row_25_a_label_on_another_grid_is_resampled_on_request(tmp_path: Path) -> None:
    """The label at half the spacing, one voxel block of the image each: every 2 x 2 x 2 block lands on the voxel that it covers."""
    label = label_array()
    image, _ = pair(tmp_path, label)
    fine = np.repeat(np.repeat(np.repeat(label, 2, 0), 2, 1), 2, 2)
    affine = np.diag([-0.5, -0.5, 1.0, 1.0])
    affine[:3, 3] = (0.25, 0.25, -0.5)  # the centre of the first small voxel
    path = save_nifti(tmp_path / "fine_seg.nii.gz", fine, affine)
    with pytest.raises(CaseError, match="--resample-labels"):
        read_volume(image, path)
    volume = read_volume(image, path, options=ReadOptions(resample_labels=True))
    np.testing.assert_array_equal(volume.label, label[:, ::-1, ::-1])
    (note,) = (n for n in volume.notes if n.startswith("label: resampled"))
    ml = np.count_nonzero(label) * 2.0 / 1000
    assert f"{ml:.3g} ml labelled before, {ml:.3g} ml after" in note
    inside = 100 * np.mean(ct_array()[label > 0] > -950)
    assert f"{inside:.0f} % of it inside the body" in note


def test_row_25_a_turned_label_lands_in_the_patient(tmp_path: Path) -> None:
    """A block drawn on a grid turned by 30 degrees: its centre and volume in mm stay within a voxel of the image."""
    image = save_nifti(tmp_path / "a_ct.nii.gz", ct_array((40, 60, 60)), np.diag([1.0, 1.0, 1.0, 1.0]))
    c, s = math.cos(math.pi / 6), math.sin(math.pi / 6)
    turned = np.array([[c, -s, 0, 20], [s, c, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])
    block = np.zeros((40, 50, 50), dtype=np.uint8)
    block[10:30, 15:35, 12:32] = 1
    label = save_nifti(tmp_path / "a_seg.nii.gz", block, turned)
    volume = read_volume(image, label, options=ReadOptions(resample_labels=True))
    assert volume.label is not None
    z, y, x = (float(v.mean()) for v in np.nonzero(volume.label))
    wanted = turned @ np.array([21.5, 24.5, 19.5, 1])
    np.testing.assert_allclose((volume.grid.matrix @ np.array([x, y, z, 1]))[:3], wanted[:3], atol=0.5)
    assert np.count_nonzero(volume.label) == pytest.approx(20 * 20 * 20, rel=0.02)


def test_row_25_a_label_that_misses_its_image_is_refused_even_on_request(tmp_path: Path) -> None:
    affine = np.diag([-1.0, -1.0, 2.0, 1.0])
    affine[:3, 3] = (500, 0, 0)
    image, _ = pair(tmp_path, label_array())
    far = save_nifti(tmp_path / "far_seg.nii.gz", label_array(), affine)
    with pytest.raises(CaseError, match="none of the labelled") as caught:
        read_volume(image, far, options=ReadOptions(resample_labels=True))
    assert caught.value.code == "grid-mismatch"


def test_options_that_are_not_needed_change_nothing(tmp_path: Path) -> None:
    image, label = pair(tmp_path, label_array())
    plain = read_volume(image, label)
    everything = ReadOptions("RAS", allow_gaps=True, nan_hu=-1024, resample_labels=True)
    allowed = read_volume(image, label, options=everything)
    np.testing.assert_array_equal(allowed.image_hu, plain.image_hu)
    np.testing.assert_array_equal(allowed.label, plain.label)
    assert allowed.notes == plain.notes
