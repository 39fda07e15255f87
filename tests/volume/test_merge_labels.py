"""Organs and tumours from two files: tumours win, each file has its own map and its own axis order, and what is odd is said."""

from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from numpy.typing import NDArray

from ftengine.errors import CaseError, ConfigError
from ftengine.geometry import grid_from_codes, grid_from_matrix, to_ras
from ftengine.volume.label_maps import map_by_name, parse_label_map
from ftengine.volume.readers import read_volume
from tests.recipes import ct_array, save_itk, save_nifti

SHAPE = (6, 8, 10)
VALUES = (0, 1, 2, 3, 4)  # 1 and 3 organs, 2 and 4 their tumours
TUMORS = (2, 4)
RAS = np.diag([1.0, 1.0, 2.0, 1.0])


def scene() -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Organs, and tumours: 8 voxels inside an organ, 4 outside."""
    organs, tumors = np.zeros(SHAPE, np.uint8), np.zeros(SHAPE, np.uint8)
    organs[1:5, 1:4, 1:9], organs[1:5, 5:7, 1:9] = 1, 3
    tumors[2:4, 2:4, 4:6] = 2
    tumors[0, 0, :4] = 4
    return organs, tumors


def merged(folder: Path, organs: NDArray[Any], tumors: NDArray[Any], **options: Any) -> tuple[Any, tuple[str, ...]]:
    image = save_nifti(folder / "a.nii.gz", ct_array(), RAS)
    paths = [save_nifti(folder / f"{name}.nii.gz", a, RAS) for name, a in (("organs", organs), ("tumors", tumors))]
    settled: dict[str, Any] = {"label_values": VALUES, "tumor_values": TUMORS} | options
    volume = read_volume(image, paths[1], organ_label=paths[0], **settled)
    return volume.label, volume.notes


def test_tumours_win_over_organs_and_are_counted_inside_and_outside(tmp_path: Path) -> None:
    organs, tumors = scene()
    label, notes = merged(tmp_path, organs, tumors)
    np.testing.assert_array_equal(label, np.where(tumors > 0, tumors, organs))
    assert label.dtype == np.uint8
    assert label.flags.c_contiguous
    assert "labels merged: 8 tumour voxels inside an organ of the organ label, 4 outside" in notes


def test_organs_of_the_first_file_stay_and_are_no_tumours(tmp_path: Path) -> None:
    organs, tumors = scene()
    tumors[1:5, 5:7, 1:3] = 1  # says liver where the organ file says pancreas
    label, notes = merged(tmp_path, organs, tumors)
    np.testing.assert_array_equal(label, np.where(tumors > 0, tumors, organs))
    assert (
        "labels merged: 8 tumour voxels inside an organ of the organ label, 4 outside; 16 other labelled voxels replace "
        "another organ's value" in notes
    )
    _, notes = merged(tmp_path, organs, tumors, tumor_values=None)
    assert "labels merged: 24 tumour voxels inside an organ of the organ label, 4 outside" in notes


def test_each_file_has_its_own_map(tmp_path: Path) -> None:
    organs, tumors = scene()
    files = np.array([0, 50, 0, 70, 0], np.uint8)[organs], np.array([0, 0, 1, 0, 3], np.uint8)[tumors]
    label, _ = merged(tmp_path, *files, label_map={1: 2, 3: 4}, organ_label_map={50: 1, 70: 3})
    np.testing.assert_array_equal(label, np.where(tumors > 0, tumors, organs))


@pytest.mark.parametrize(("which", "option"), [("organs", "--organ-label-map"), ("tumors", "--label-map")])
def test_unknown_values_are_listed_with_counts_and_the_option_of_their_file(
    tmp_path: Path, which: str, option: str
) -> None:
    organs, tumors = scene()
    odd = organs if which == "organs" else tumors
    odd[5, 0, :3], odd[5, 1, :2] = 9, 200
    with pytest.raises(CaseError, match=r"label values 9 \(3 voxels\), 200 \(2 voxels\) are not labels") as caught:
        merged(tmp_path, organs, tumors)
    assert f"{which}.nii.gz" in str(caught.value)
    assert f"Map each with {option} 9=VALUE" in str(caught.value)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    codes=st.permutations(("RL", "AP", "SI")).flatmap(lambda p: st.tuples(*[st.sampled_from(pair) for pair in p])),
    which=st.sampled_from(["organs", "tumors"]),
    extension=st.sampled_from([".nii.gz", ".nrrd", ".mha"]),
    seed=st.integers(0, 99),
)
def test_one_file_in_another_axis_order_gives_the_same_label(
    tmp_path: Path, codes: tuple[str, str, str], which: str, extension: str, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    arrays = {name: rng.integers(0, 5, SHAPE).astype(np.uint8) for name in ("organs", "tumors")}
    image = save_nifti(tmp_path / "a.nii.gz", ct_array(), RAS)
    paths = {}
    for name, array in arrays.items():
        turned, matrix = _turned(array, "".join(codes)) if name == which else (array, RAS)
        path = tmp_path / f"{name}{extension if name == which else '.nii'}"
        shape = (turned.shape[0], turned.shape[1], turned.shape[2])
        paths[name] = (
            save_nifti(path, turned, matrix)
            if ".nii" in path.name
            else save_itk(path, turned, grid_from_matrix(shape, matrix))
        )
    volume = read_volume(image, paths["tumors"], organ_label=paths["organs"], label_values=VALUES)
    np.testing.assert_array_equal(volume.label, np.where(arrays["tumors"] > 0, arrays["tumors"], arrays["organs"]))


def _turned(array: NDArray[np.uint8], codes: str) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """A RAS+ array z, y, x of 1 x 1 x 2 mm as it is stored in other axes, and its affine."""
    spacing = {"RL": 1.0, "AP": 1.0, "SI": 2.0}
    axis = {"RL": 2, "AP": 1, "SI": 0}
    pairs = [next(pair for pair in axis if code in pair) for code in codes]  # of the file's x, y, z
    stored = array.transpose([axis[pair] for pair in reversed(pairs)])
    flips = tuple(i for i, code in enumerate(reversed(codes)) if code in "LPI")
    stored = np.ascontiguousarray(np.flip(stored, flips))
    z, y, x = stored.shape
    grid = grid_from_codes((z, y, x), tuple(spacing[pair] for pair in reversed(pairs)), codes)  # type: ignore[arg-type]
    matrix = grid.matrix
    matrix[:3, 3] -= to_ras(stored, grid)[1].matrix[:3, 3]
    return stored, matrix


@pytest.mark.parametrize("which", ["organs", "tumors"])
def test_both_files_must_lie_on_the_images_grid(tmp_path: Path, which: str) -> None:
    organs, tumors = scene()
    image = save_nifti(tmp_path / "a.nii.gz", ct_array(), RAS)
    moved = RAS.copy()
    moved[0, 3] = 0.5
    for array, affine, match in (
        (organs, moved, "up to 0.50 voxels off its image"),
        (organs[:5], RAS, "label of shape"),
    ):
        files = {"organs": (organs, RAS), "tumors": (tumors, RAS), which: (array, affine)}
        paths = {name: save_nifti(tmp_path / f"{name}.nii.gz", *pair) for name, pair in files.items()}
        with pytest.raises(CaseError, match=match) as caught:
            read_volume(image, paths["tumors"], organ_label=paths["organs"], label_values=VALUES)
        assert f"{which}.nii.gz" in str(caught.value)


def test_an_organ_label_alone_is_the_label(tmp_path: Path) -> None:
    organs, _ = scene()
    image = save_nifti(tmp_path / "a.nii.gz", ct_array(), RAS)
    path = save_nifti(tmp_path / "o.nii.gz", organs * 5, RAS)
    volume = read_volume(image, organ_label=path, organ_label_map={5: 1, 15: 3}, label_values=VALUES)
    np.testing.assert_array_equal(volume.label, organs)
    assert not any("merged" in note for note in volume.notes)
    with pytest.raises(CaseError, match=r"absent\.nii\.gz: does not exist"):
        read_volume(image, path, organ_label=tmp_path / "absent.nii.gz", label_map={5: 1, 15: 3})


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_merging_equals_numpys_where(data: st.DataObject) -> None:
    """In place and slice by slice, against the plain formula on whole arrays."""
    from ftengine.volume.readers import _lay_over

    shape = data.draw(st.tuples(*[st.integers(1, 5)] * 3))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    organs, tumors = (rng.integers(0, 5, shape).astype(np.uint8) for _ in range(2))
    before = organs.copy()
    note = _lay_over(organs, tumors, TUMORS)
    np.testing.assert_array_equal(organs, np.where(tumors > 0, tumors, before))
    is_tumor = np.isin(tumors, TUMORS)
    assert f"{np.sum(is_tumor & (before > 0)):,} tumour voxels inside" in note
    assert f"{np.sum(is_tumor & (before == 0)):,} outside" in note


# maps

REGION = {"background": 0, "liver": 1, "liver_tumor": 2, "pancreas": 3}


def test_maps_name_values_or_labels_of_the_region() -> None:
    assert parse_label_map("1=liver, 2=liver_tumor,255=0,-3=background,7=3", REGION) == {
        1: 1,
        2: 2,
        255: 0,
        -3: 0,
        7: 3,
    }
    assert parse_label_map("4=Liver Tumour,5=LIVER-tumor", REGION) == {4: 2, 5: 2}
    assert parse_label_map("1=1,1=1", REGION) == {1: 1}


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("1=spleen", "cannot read '1=spleen'.*1 .liver., 2 .liver_tumor., 3 .pancreas."),
        ("liver=1", "with a whole number on the left"),
        ("1:1", "--label-map 1:1: "),
        ("1", "cannot read '1'"),
        ("", "cannot read ''"),
        ("1=1,", "cannot read ''"),
        ("1=4", "'1=4' names no label of the region"),
        ("1=-1", "'1=-1' names no label of the region"),
        ("1=1,1=2", "1 is mapped twice"),
        ("1=2=3", "cannot read '1=2=3'"),
    ],
)
def test_maps_that_cannot_be(text: str, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        parse_label_map(text, REGION)


def test_names_of_a_data_set_become_labels_of_the_region() -> None:
    names = {0: "background", 1: "Liver", 9: "liver tumour", 4: "pancreas", 5: "background"}
    assert map_by_name(names, REGION, {}, "x") == {1: 1, 9: 2, 4: 3, 5: 0}
    assert map_by_name(names, REGION, {4: 0}, "x") == {1: 1, 9: 2, 4: 0, 5: 0}
    assert map_by_name(names, None, {4: 0}, "x") == {4: 0}
    many = {n: f"organ {n}" for n in range(1, 105)}
    with pytest.raises(ConfigError, match=r"1 \('organ 1'\).* and 94 more are not labels .*--label-map 1=LABEL"):
        map_by_name(many, REGION, {}, "x")
