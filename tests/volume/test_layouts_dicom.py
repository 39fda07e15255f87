"""A tree of DICOM studies: which series are cases, what they are called, and what is passed over with its reason."""

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom.uid import generate_uid

from ftengine.errors import CaseError
from ftengine.volume.cases import Discovery
from ftengine.volume.discover import discover_all
from ftengine.volume.layouts.choose import find_cases
from ftengine.volume.layouts.dicom_tree import NOT_AXIAL, SCOUT, SECONDARY, STUB
from ftengine.volume.readers import read_volume
from tests.recipes import CANARIES, cut, edit_slice, save_nifti, save_series, save_slice, stored_slice

SECONDARY_CAPTURE, REPORT, RTSTRUCT = (
    "1.2.840.10008.5.1.4.1.1.7",
    "1.2.840.10008.5.1.4.1.1.88.67",
    "1.2.840.10008.5.1.4.1.1.481.3",
)
CORONAL = [1, 0, 0, 0, 0, -1]


def tree(root: Path, **options: Any) -> Discovery:
    return find_cases([root], layout=options.pop("layout", "dicom"), dataset="x", **options)


def sizes(found: Discovery) -> dict[str, int]:
    return {s.case: len(s.series_files) for s in found.sources}


def reasons(found: Discovery) -> dict[str, int]:
    return dict(Counter(reason for _, reason in found.ignored))


def hu(source: Any) -> Any:
    return read_volume(source.image, series_files=source.series_files).image_hu


@pytest.mark.parametrize("layout", ["auto", "dicom"])
def test_each_axial_series_is_a_case_and_the_rest_is_passed_over_with_counts(tmp_path: Path, layout: str) -> None:
    save_series(tmp_path / "p1" / "study" / "ct", ImageType=["ORIGINAL", "PRIMARY", "AXIAL"])
    save_series(tmp_path / "p1" / "study" / "scout", 2, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    save_series(tmp_path / "p1" / "study" / "mpr", ImageType=["DERIVED", "SECONDARY", "REFORMATTED", "AVERAGE"])
    save_series(tmp_path / "p1" / "study" / "cor", ImageOrientationPatient=CORONAL)
    save_series(tmp_path / "p1" / "study" / "screen", 1, Modality="OT", storage=SECONDARY_CAPTURE)
    save_series(tmp_path / "p1" / "study" / "dose", 1, Modality="SR", storage=REPORT)
    save_series(tmp_path / "p2" / "pet", Modality="PT", storage="1.2.840.10008.5.1.4.1.1.128")
    save_series(tmp_path / "p2" / "plan", 1, Modality="RTSTRUCT", storage=RTSTRUCT)
    save_series(tmp_path / "p2" / "odd", 1, Modality="CANARYX", storage="1.2.3")
    save_series(tmp_path / "p2" / "stub", 3)
    save_series(tmp_path / "p2" / "ct_image", 5, ImageType=["DERIVED", "PRIMARY", "AXIAL"])
    (tmp_path / "p2" / "notes.txt").write_text("x")
    found = tree(tmp_path, layout=layout)
    assert sizes(found) == {"x/p1/study/ct": 6, "x/p2/ct": 5}
    assert reasons(found) == {
        SCOUT: 2,
        SECONDARY: 6,
        NOT_AXIAL: 6,
        STUB: 3,
        "a screen save (secondary capture)": 1,
        "a structured report (of the dose, say)": 1,
        "DICOM of modality PT": 6,
        "radiotherapy data (contours, plans, doses)": 1,
        "DICOM of another kind than CT": 1,
        "not DICOM": 1,
    }
    assert hu(found.sources[0]).shape == (6, 16, 12)
    text = repr(found).replace(str(tmp_path), "")
    assert not any(canary in text for canary in (*CANARIES.values(), "CANARYX"))


def test_a_series_spread_over_folders_is_put_together(tmp_path: Path) -> None:
    whole = save_series(tmp_path / "whole" / "ct", series=generate_uid())
    uid = generate_uid()
    for number, path in enumerate(save_series(tmp_path / "spread" / "s", series=uid)):
        place = tmp_path / "spread" / "s" / f"part{number % 3}"
        place.mkdir(exist_ok=True)
        path.rename(place / path.name)
    found = tree(tmp_path)
    assert sizes(found) == {"x/spread/s": 6, "x/whole/ct": 6}
    spread, straight = found.sources
    assert len(whole) == 6
    np.testing.assert_array_equal(hu(spread), hu(straight))


def test_series_mixed_in_folders_are_taken_apart(tmp_path: Path) -> None:
    first, second = generate_uid(), generate_uid()
    for index in range(8):  # slices of both in both folders
        for uid, name in ((first, "a"), (second, "b")):
            folder = tmp_path / "p" / f"d{index % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            save_slice(folder / f"{name}{index}", stored_slice(index), position=(0.0, 0.0, 2.0 * index), series=uid)
    found = tree(tmp_path)
    assert sizes(found) == {"x/p/series_1": 8, "x/p/series_2": 8}
    np.testing.assert_array_equal(hu(found.sources[0]), hu(found.sources[1]))


def test_a_series_above_another_is_numbered_so_that_none_lies_in_the_other(tmp_path: Path) -> None:
    save_series(tmp_path / "p" / "inner")
    for number, path in enumerate(save_series(tmp_path / "p" / "inner", 8, prefix="q")):
        place = tmp_path / "p" / f"d{number % 2}"
        place.mkdir(exist_ok=True)
        path.rename(place / path.name)
    assert sizes(tree(tmp_path)) == {"x/p/inner": 6, "x/p/series_1": 8}


def test_a_series_spread_over_the_whole_tree_is_named_by_it(tmp_path: Path) -> None:
    root = tmp_path / "patient_ct"
    for number, path in enumerate(save_series(root, 8)):
        (root / f"d{number % 2}").mkdir(exist_ok=True)
        path.rename(root / f"d{number % 2}" / path.name)
    save_series(root / "other", 5)
    assert sizes(tree(root)) == {"x/patient": 8, "x/other": 5}


def test_one_folder_of_slices_is_called_as_in_a_plain_folder(tmp_path: Path) -> None:
    save_series(tmp_path / "p1_ct")
    save_series(tmp_path / "p2" / "two", prefix="a")
    save_series(tmp_path / "p2" / "two", prefix="b")
    for source in (tmp_path, tmp_path / "p1_ct", tmp_path / "p2" / "two"):
        plain = discover_all([source], dataset="x").sources
        assert [(s.case, s.series_files) for s in tree(source).sources] == [(s.case, s.series_files) for s in plain]


def test_files_without_a_series_belong_to_their_folder(tmp_path: Path) -> None:
    save_series(tmp_path / "a", SeriesInstanceUID=None)
    save_series(tmp_path / "b", 5, SeriesInstanceUID=None)
    assert sizes(tree(tmp_path)) == {"x/a": 6, "x/b": 5}


def test_a_scout_inside_a_series_is_left_out_with_a_note(tmp_path: Path) -> None:
    uid = generate_uid()
    save_series(tmp_path / "ct", series=uid)
    save_series(tmp_path / "ct", 1, prefix="s", series=uid, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    save_series(tmp_path / "ct", 2, prefix="c", series=uid, ImageOrientationPatient=CORONAL)
    (source,) = tree(tmp_path).sources
    assert len(source.series_files) == 6
    assert source.notes == (
        f"2 files of the series left out: {NOT_AXIAL}",
        f"1 files of the series left out: {SCOUT}",
    )


def test_a_tilted_gantry_is_still_axial(tmp_path: Path) -> None:
    tilt = np.deg2rad(30)
    save_series(tmp_path / "ct", ImageOrientationPatient=[1, 0, 0, 0, float(np.cos(tilt)), float(np.sin(tilt))])
    assert sizes(tree(tmp_path)) == {"x/ct": 6}


@pytest.mark.parametrize("damage", ["pixels", "header", "two_folders"])
def test_a_damaged_slice_makes_its_series_fail_and_no_other(tmp_path: Path, damage: str) -> None:
    paths = save_series(tmp_path / "ct")
    save_series(tmp_path / "fine")
    if damage == "two_folders":
        (tmp_path / "more").mkdir()
        paths[5] = paths[5].rename(tmp_path / "more" / "005.dcm")
    cut(paths[5], paths[5].stat().st_size - 300 if damage == "header" else 100)
    found = tree(tmp_path)
    failing = [s for s in found.sources if paths[5] in s.series_files]
    assert len(failing) == 1
    with pytest.raises(CaseError, match=r"005\.dcm (is cut short|cannot be read)"):
        hu(failing[0])
    assert sum(hu(s).shape == (6, 16, 12) for s in found.sources if s not in failing) == 1


def test_a_folder_of_nothing_but_damage_is_one_case_that_fails(tmp_path: Path) -> None:
    for path in save_series(tmp_path / "bad", 3, prefix="a") + save_series(tmp_path / "bad", 3, prefix="b"):
        cut(path, 100)
    save_series(tmp_path / "multi", 2, NumberOfFrames=5)
    save_series(tmp_path / "good")
    found = tree(tmp_path)
    assert sizes(found) == {"x/bad": 6, "x/good": 6, "x/multi": 2}
    for source, match in zip(found.sources, ("is cut short", "", "multi-frame"), strict=True):
        if match:
            with pytest.raises(CaseError, match=match):
                hu(source)


def test_a_damaged_series_beside_a_good_one_is_passed_over(tmp_path: Path) -> None:
    save_series(tmp_path / "ct")
    (multi,) = save_series(tmp_path / "ct", 1, prefix="m", NumberOfFrames=5)
    found = tree(tmp_path)
    assert sizes(found) == {"x/ct": 6}
    assert found.ignored == ((multi, "a damaged CT file of a series without a whole stack"),)
    assert hu(found.sources[0]).shape == (6, 16, 12)


def test_a_series_short_of_slices_through_damage_fails_instead_of_vanishing(tmp_path: Path) -> None:
    for path in save_series(tmp_path / "ct")[3:]:
        cut(path, 100)
    found = tree(tmp_path)
    assert sizes(found) == {"x/ct": 6}
    with pytest.raises(CaseError, match="is cut short"):
        hu(found.sources[0])


def test_nothing_but_scouts_says_so(tmp_path: Path) -> None:
    save_series(tmp_path / "scout", 2, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    with pytest.raises(CaseError, match=r"no CT found \(2 paths passed over, .*a scout"):
        tree(tmp_path)


def test_labels_by_folder_by_series_and_beside(tmp_path: Path) -> None:
    save_series(tmp_path / "t" / "one")
    save_series(tmp_path / "t" / "two", prefix="a")
    save_series(tmp_path / "t" / "two", 5, prefix="b")
    for name in ("labels/one.nii.gz", "labels/two/series_2.nii.gz", "organs/one_seg.nii.gz"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = tree(tmp_path / "t", labels=tmp_path / "labels", organ_labels=tmp_path / "organs")
    assert {s.case: s.label and s.label.name for s in found.sources} == {
        "x/one": "one.nii.gz",
        "x/two/series_1": None,
        "x/two/series_2": "series_2.nii.gz",
    }
    assert found.sources[0].organ_label == tmp_path / "organs" / "one_seg.nii.gz"
    (tmp_path / "labels" / "two.nii.gz").touch()
    refused = {s.case: s.refusal for s in tree(tmp_path / "t", labels=tmp_path / "labels").sources if s.refusal}
    assert "want one series a label" in str(refused["x/two/series_1"])
    assert list(refused) == ["x/two/series_1"]  # the other one's label is stated by its number
    (tmp_path / "t" / "one_label.nii.gz").touch()
    found = tree(tmp_path / "t", layout="auto")  # a label is no image: nothing but DICOM
    assert found.sources[0].label == tmp_path / "t" / "one_label.nii.gz"


def test_other_images_beside_dicom_are_a_plain_folder_for_auto(tmp_path: Path) -> None:
    save_series(tmp_path / "ct")
    save_nifti(tmp_path / "b.nii.gz", stored_slice(0, (8, 8))[None].repeat(6, 0).astype(np.int16))
    assert sizes(tree(tmp_path, layout="auto")) == {"x/b": 0, "x/ct": 6}
    found = tree(tmp_path)
    assert sizes(found) == {"x/ct": 6}
    assert reasons(found) == {"an image that is not DICOM; --layout folder takes it": 1}


def test_links_in_circles_and_a_hundred_levels(tmp_path: Path) -> None:
    deep = tmp_path.joinpath("t", *["d"] * 100)
    save_series(deep)
    (deep / "up").symlink_to(tmp_path / "t")
    found = tree(tmp_path / "t")
    assert sizes(found) == {"x/" + "/".join(["d"] * 100): 6}


def test_a_file_that_cannot_be_opened_may_be_a_slice(tmp_path: Path) -> None:
    """A link to itself stands for it here: root opens everything else."""
    save_series(tmp_path / "ct")
    (tmp_path / "ct" / "lost").symlink_to(tmp_path / "ct" / "lost")
    assert sizes(tree(tmp_path)) == {"x/ct": 7}  # reading it names the lost one


def test_a_file_that_cannot_be_opened_far_from_dicom_is_no_slice(tmp_path: Path) -> None:
    save_series(tmp_path / "ct")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "lost").symlink_to(tmp_path / "other" / "lost")
    found = tree(tmp_path)
    assert sizes(found) == {"x/ct": 6}
    assert reasons(found) == {"not DICOM": 1}


def test_a_damaged_image_type_does_not_cost_the_slice(tmp_path: Path) -> None:
    for path in save_series(tmp_path / "ct"):
        edit_slice(path, ImageType="ORIGINAL")
    assert sizes(tree(tmp_path)) == {"x/ct": 6}


@pytest.mark.data
def test_the_real_series_scattered_over_a_tree(data_dir: Path, tmp_path: Path) -> None:
    whole = data_dir / "totalseg_dicom" / "series"
    files = sorted(whole.iterdir())
    for number, path in enumerate(files):
        place = tmp_path / "t" / "pat" / f"disk{number % 2}"
        place.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, place / f"IM{(7 * number) % len(files):04d}")
    scout = next((data_dir / "covid_2d").glob("*.dcm"))
    shutil.copyfile(scout, tmp_path / "t" / "pat" / "disk0" / "SCOUT")
    found = tree(tmp_path / "t", layout="auto")
    assert sizes(found) == {"x/pat": len(files)}
    assert reasons(found) == {STUB: 1}
    np.testing.assert_array_equal(hu(found.sources[0]), read_volume(whole).image_hu)


@pytest.mark.data
def test_the_real_folders_of_dicom(data_dir: Path) -> None:
    found = find_cases([data_dir / "totalseg_dicom"], dataset="x")  # its labels lie beside it
    assert "layout dicom" in found.notes[0]
    assert sizes(found) == {"x/series": 20}
    with pytest.raises(CaseError, match=r"no CT found .*fewer than 4 slices"):
        find_cases([data_dir / "covid_2d"], dataset="x")
