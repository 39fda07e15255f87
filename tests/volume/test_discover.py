"""Which cases lie under a folder: names, pairs, DICOM series, and what must be decided by the user."""

import os
import re
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from pydicom.uid import generate_uid

from ftengine.errors import CaseError, ConfigError, FailureCode, FtengineError
from ftengine.volume.discover import Source, discover, discover_all, image_stem, is_label_name, parse_source
from ftengine.volume.readers import read_volume
from tests.recipes import CANARIES, ct_array, cut, save_itk, save_nifti, save_series, save_slice, stored_slice


def touch(folder: Path, *names: str) -> None:
    """Empty files: discovery goes by names and opens only what may be DICOM."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def cases(found: list[Source]) -> dict[str, str | None]:
    return {source.case: source.label.name if source.label else None for source in found}


def test_names_and_pairs_of_a_plain_folder(tmp_path: Path) -> None:
    touch(
        tmp_path,
        "a.nii.gz",
        "a_seg.nii.gz",
        "b_ct.nrrd",
        "b_label.mha",
        "c_image.nii",
        "c_mask.nii.gz",
        "d_0000.nii.gz",
        "sub/e.mhd",
        "sub/f/ct.nii.gz",
    )
    assert cases(discover([tmp_path], dataset="x")) == {
        "x/a": "a_seg.nii.gz",
        "x/b": "b_label.mha",
        "x/c": "c_mask.nii.gz",
        "x/d": None,
        "x/sub/e": None,
        "x/sub/f/ct": None,
    }


def test_the_longer_reading_of_a_name_pairs_too(tmp_path: Path) -> None:
    touch(tmp_path, "a_ct.nii.gz", "a_ct_seg.nii.gz", "STS_019_CT_image.nii.gz", "STS_019_CT_mask.nii.gz")
    assert cases(discover([tmp_path], dataset="x")) == {
        "x/a": "a_ct_seg.nii.gz",
        "x/STS_019_CT": "STS_019_CT_mask.nii.gz",
    }


def test_labels_are_never_cases_and_never_guessed(tmp_path: Path) -> None:
    touch(tmp_path, "a.nii.gz", "a_label_abdomen.nii.gz", "mask.nii.gz", "old_seg.nii.gz", "seg_old.nrrd")
    found = discover_all([tmp_path], dataset="x")
    assert cases(list(found.sources)) == {"x/a": None}
    assert {path.name for path, _ in found.ignored} == {
        "a_label_abdomen.nii.gz",
        "mask.nii.gz",
        "old_seg.nii.gz",
        "seg_old.nrrd",
    }


@pytest.mark.parametrize(
    ("stem", "wanted"),
    [
        ("a_seg", True),
        ("mask", True),
        ("A_LABEL_x", True),
        ("segment", False),
        ("a_unmasked", False),
        ("labelled", False),
    ],
)
def test_label_names(stem: str, wanted: bool) -> None:
    assert is_label_name(stem) is wanted


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("a.nii.gz", "a"), ("A.NII.GZ", "A"), ("a.b.nrrd", "a.b"), ("a.gz", None), (".nii.gz", None), ("a.txt", None)],
)
def test_stems(name: str, wanted: str | None) -> None:
    assert image_stem(name) == wanted


def test_a_folder_of_labels_pairs_by_relative_path(tmp_path: Path) -> None:
    touch(tmp_path / "images", "p1/a_0000.nii.gz", "p1/b_ct.nii.gz", "p2/a.nrrd", "p2/c.nii.gz", "p1/b_seg.nii.gz")
    touch(tmp_path / "labels", "p1/a.nii.gz", "p1/b_ct.nii.gz", "p2/a_seg.nii.gz")
    found = discover([tmp_path / "images"], labels=tmp_path / "labels", dataset="x")
    assert cases(found) == {"x/p1/a": "a.nii.gz", "x/p1/b": "b_ct.nii.gz", "x/p2/a": "a_seg.nii.gz", "x/p2/c": None}
    assert all(source.label is None or "labels" in source.label.parts for source in found)


def test_a_folder_of_labels_inside_the_source_holds_no_cases(tmp_path: Path) -> None:
    touch(tmp_path, "a.nii.gz", "labels/a.nii.gz")
    assert cases(discover([tmp_path], labels=tmp_path / "labels", dataset="x")) == {"x/a": "a.nii.gz"}


def test_the_source_itself_as_folder_of_labels(tmp_path: Path) -> None:
    touch(tmp_path, "a.nii.gz", "a_seg.nii.gz")
    assert cases(discover([tmp_path], labels=tmp_path, dataset="x")) == {"x/a": "a_seg.nii.gz"}


def test_a_folder_of_labels_that_fits_nothing(tmp_path: Path) -> None:
    touch(tmp_path, "images/a.nii.gz", "labels/b.nii.gz")
    with pytest.raises(ConfigError, match="no file fits any of 1 images"):
        discover([tmp_path / "images"], labels=tmp_path / "labels", dataset="x")
    with pytest.raises(ConfigError, match="not a folder"):
        discover([tmp_path / "images"], labels=tmp_path / "absent", dataset="x")


def test_single_files_and_globs(tmp_path: Path) -> None:
    touch(tmp_path, "a_ct.nii.gz", "a_seg.nii.gz", "README.md")
    assert cases(discover([tmp_path / "a_ct.nii.gz"], dataset="x")) == {"x/a": "a_seg.nii.gz"}
    everything = sorted(tmp_path.iterdir())  # as the shell expands folder/*
    assert cases(discover(everything, dataset="x")) == {"x/a": "a_seg.nii.gz"}
    assert cases(discover([tmp_path, tmp_path / "a_ct.nii.gz"], dataset="x")) == {"x/a": "a_seg.nii.gz"}


def test_explicit_pairs_win_and_may_name_anything(tmp_path: Path) -> None:
    touch(tmp_path, "a.nii.gz", "a_seg.nii.gz", "a_label_abdomen.nii.gz", "odd_mask_ct.nii.gz")
    pairs = {
        tmp_path / "a.nii.gz": tmp_path / "a_label_abdomen.nii.gz",
        tmp_path / "odd_mask_ct.nii.gz": tmp_path / "a_seg.nii.gz",
    }
    assert cases(discover([tmp_path], dataset="x", pairs=pairs)) == {
        "x/a": "a_label_abdomen.nii.gz",
        "x/odd_mask": "a_seg.nii.gz",
    }
    with pytest.raises(ConfigError, match="not among the sources"):
        discover([tmp_path / "odd_mask_ct.nii.gz"], dataset="x", pairs=pairs)
    with pytest.raises(ConfigError, match="no such file"):
        discover([tmp_path], dataset="x", pairs={tmp_path / "a.nii.gz": tmp_path / "absent.nii.gz"})


def test_parse_source(tmp_path: Path) -> None:
    touch(tmp_path, "a.nii.gz", "s.nii.gz", "a=b/c=d.nii.gz", "a=b/e=f.nii.gz")
    a, s = tmp_path / "a.nii.gz", tmp_path / "s.nii.gz"
    odd, other = tmp_path / "a=b" / "c=d.nii.gz", tmp_path / "a=b" / "e=f.nii.gz"
    assert parse_source(str(a)) == (a, None)
    assert parse_source(f"{a}={s}") == (a, s)
    assert parse_source(str(odd)) == (odd, None)
    assert parse_source(f"{odd}={other}") == (odd, other)
    assert parse_source("absent.nii.gz=seg.nii.gz") == (Path("absent.nii.gz"), Path("seg.nii.gz"))
    for text in ("=a", "a="):
        with pytest.raises(ConfigError, match="both sides"):
            parse_source(text)


def test_two_labels_for_one_image(tmp_path: Path) -> None:
    touch(tmp_path, "a.nii.gz", "a_seg.nii.gz", "a_mask.nii.gz")
    (found,) = discover([tmp_path], dataset="x")
    assert found.refusal is not None
    assert found.refusal.code is FailureCode.AMBIGUOUS_LABEL
    assert re.search(r"several labels fit by name.*a_mask.*a_seg|a_seg.*a_mask", found.refusal.reason)
    assert "IMAGE=LABEL" in found.refusal.advice
    pairs = {tmp_path / "a.nii.gz": tmp_path / "a_mask.nii.gz"}
    assert cases(discover([tmp_path], dataset="x", pairs=pairs)) == {"x/a": "a_mask.nii.gz"}


@pytest.mark.parametrize("names", [("a.nii.gz", "a.nrrd"), ("a.nii.gz", "a_ct.nii.gz"), ("a_ct.mha", "a_0000.nii")])
def test_row_30_two_images_of_one_name(tmp_path: Path, names: tuple[str, str]) -> None:
    touch(tmp_path, *names)
    (found,) = discover([tmp_path], dataset="x")
    assert found.refusal is not None
    assert found.refusal.code is FailureCode.DUPLICATE_NAME
    assert all(name in found.refusal.reason for name in names)


def test_row_30_one_name_in_two_folders(tmp_path: Path) -> None:
    touch(tmp_path, "one/a/ct.nii.gz", "one/b/ct.nii.gz", "two/a/ct.nii.gz")
    assert set(cases(discover([tmp_path / "one"], dataset="x"))) == {"x/a/ct", "x/b/ct"}
    both = discover([tmp_path / "one", tmp_path / "two"], dataset="x")
    assert {s.case: s.refusal is not None for s in both} == {"x/a/ct": True, "x/b/ct": False}


def test_a_case_inside_another(tmp_path: Path) -> None:
    touch(tmp_path, "a.nii.gz", "a/labels.nii.gz")
    outer, inner = discover([tmp_path], dataset="x")
    assert outer.refusal is None
    assert inner.refusal is not None
    assert "'x/a/labels'" in inner.refusal.reason
    assert "would lie inside case 'x/a'" in inner.refusal.reason


def test_row_30_unicode_and_spaces_stay(tmp_path: Path) -> None:
    touch(tmp_path, "Fall 1/u\u0308bersicht ct.nii.gz")
    (found,) = discover([tmp_path], dataset="x")
    assert found.case == "x/Fall 1/\u00fcbersicht ct"
    assert unicodedata.is_normalized("NFC", found.case)
    assert found.image.exists()


def test_row_30_the_same_name_composed_and_decomposed(tmp_path: Path) -> None:
    touch(tmp_path, "u\u0308.nii.gz", "\u00fc.nii.gz")
    if len(list(tmp_path.iterdir())) == 2:  # some file systems hold them to be one
        (found,) = discover([tmp_path], dataset="x")
        assert found.refusal is not None


@pytest.mark.parametrize("name", ["a\nb.nii.gz", "a\x1b[31m.nii.gz", "a\\b.nii.gz", os.fsdecode(b"a\xff.nii.gz")])
def test_row_30_names_that_cannot_be_cases(tmp_path: Path, name: str) -> None:
    touch(tmp_path, name)
    with pytest.raises(ConfigError, match="cannot be a case name") as caught:
        discover([tmp_path], dataset="x")
    assert str(caught.value).isprintable()
    str(caught.value).encode()


@pytest.mark.parametrize("dataset", ["", "a/b", "..", ".x", "a\0", "a\\b"])
def test_dataset_names(tmp_path: Path, dataset: str) -> None:
    touch(tmp_path, "a.nii.gz")
    with pytest.raises(ConfigError):
        discover([tmp_path], dataset=dataset)


def test_hidden_files_and_folders_are_passed_over(tmp_path: Path) -> None:
    touch(tmp_path, "a.nii.gz", "._a.nii.gz", ".git/b.nii.gz", ".DS_Store")
    assert cases(discover([tmp_path], dataset="x")) == {"x/a": None}


def test_row_30_links_are_followed_once(tmp_path: Path) -> None:
    touch(tmp_path, "data/z/a.nii.gz", "far/b.nii.gz")
    (tmp_path / "data" / "z" / "loop").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "b_link").symlink_to(tmp_path / "far")
    (tmp_path / "data" / "a_link").symlink_to(tmp_path / "data" / "z")
    (tmp_path / "data" / "lost.nii.gz").symlink_to(tmp_path / "nowhere.nii.gz")
    found = discover([tmp_path / "data"], dataset="x")
    assert cases(found) == {"x/b_link/b": None, "x/z/a": None, "x/lost": None}
    with pytest.raises(CaseError, match="does not exist"):
        read_volume(tmp_path / "data" / "lost.nii.gz")


def test_order_does_not_depend_on_the_file_system(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{n}/{m}.nii.gz" for n in "dacb" for m in "21"))
    names = [source.case for source in discover([tmp_path], dataset="x")]
    assert names == sorted(names)
    assert len(names) == 8


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="absent: no such file or folder; want NIfTI"):
        discover([tmp_path / "absent"], dataset="x")
    with pytest.raises(CaseError, match=r"no CT found; want NIfTI"):
        discover([tmp_path], dataset="x")
    touch(tmp_path, "notes.txt", "a_seg.nii.gz")
    with pytest.raises(
        CaseError, match=r"no CT found \(2 paths passed over, such as .*a_seg\.nii\.gz: a label by its name\)"
    ):
        discover([tmp_path], dataset="x")
    with pytest.raises(FtengineError, match="no source"):
        discover([], dataset="x")


def test_dicom_folders_with_and_without_extension(tmp_path: Path) -> None:
    save_series(tmp_path / "p1" / "ct")
    for path in save_series(tmp_path / "p2_ct"):
        path.rename(path.with_suffix(""))
    touch(tmp_path, "p1/ct_seg.nii.gz", "p2_seg.nrrd", "p2_ct/.DS_Store", "p2_ct/notes.txt")
    found = discover([tmp_path], dataset="x")
    assert cases(found) == {"x/p1/ct": "ct_seg.nii.gz", "x/p2": "p2_seg.nrrd"}
    assert [len(source.series_files) for source in found] == [6, 6]
    assert found[1].notes == ("1 files of the folder ignored: 0 DICOM without a CT slice, 1 not DICOM",)
    assert read_volume(found[0].image, series_files=found[0].series_files).image_hu.shape == (6, 16, 12)


def test_a_dicom_folder_as_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_series(tmp_path / "patient_ct")
    touch(tmp_path, "patient_seg.nii.gz")
    assert cases(discover([tmp_path / "patient_ct"], dataset="x")) == {"x/patient": "patient_seg.nii.gz"}
    monkeypatch.chdir(tmp_path / "patient_ct")
    assert cases(discover([Path()], dataset="x")) == {"x/patient": "patient_seg.nii.gz"}


def test_row_6_each_series_of_a_folder_is_a_case(tmp_path: Path) -> None:
    save_series(tmp_path / "ct", prefix="b")
    save_series(tmp_path / "ct", 5, prefix="a")
    first, second = discover([tmp_path], dataset="x")
    assert (first.case, len(first.series_files)) == ("x/ct/series_1", 5)
    assert (second.case, len(second.series_files)) == ("x/ct/series_2", 6)
    assert read_volume(second.image, series_files=second.series_files).image_hu.shape == (6, 16, 12)
    touch(tmp_path, "ct_seg.nii.gz")
    for found in discover([tmp_path], dataset="x"):
        assert "want one series a label" in str(found.refusal)


def test_row_3_a_localizer_is_no_case(tmp_path: Path) -> None:
    series = generate_uid()
    save_series(tmp_path / "ct", series=series)
    save_slice(
        tmp_path / "ct" / "scout.dcm",
        stored_slice(0),
        position=(0, 0, 0),
        series=series,
        ImageOrientationPatient=[0, 1, 0, 0, 0, -1],
    )
    (found,) = discover([tmp_path / "ct"], dataset="x")
    assert len(found.series_files) == 6
    assert found.notes == ("1 slices of localizers or stubs left out",)


@pytest.mark.parametrize("damage", ["scout", "truncated", "header"])
def test_unusable_dicom_is_a_case_that_reading_refuses(tmp_path: Path, damage: str) -> None:
    paths = save_series(tmp_path / "ct", 1 if damage == "scout" else 6)
    if damage != "scout":
        cut(paths[5], 100 if damage == "truncated" else paths[5].stat().st_size - 300)
    (found,) = discover([tmp_path], dataset="x")
    assert len(found.series_files) == len(paths)
    with pytest.raises(
        CaseError,
        match="not a volume: 1 CT slice" if damage == "scout" else r"005\.dcm is cut short|005\.dcm cannot be read",
    ):
        read_volume(found.image, series_files=found.series_files)


def test_row_18_dicom_without_ct_is_passed_over(tmp_path: Path) -> None:
    save_series(tmp_path / "mr", Modality="MR", storage="1.2.840.10008.5.1.4.1.1.4")
    touch(tmp_path, "a.nii.gz")
    found = discover_all([tmp_path], dataset="x")
    assert cases(list(found.sources)) == {"x/a": None}
    assert (tmp_path / "mr", "6 DICOM files without a CT slice") in found.ignored


def test_a_single_dicom_file(tmp_path: Path) -> None:
    (path,) = save_series(tmp_path, 1)
    (found,) = discover([path], dataset="x")
    assert found == Source("x/000", "x", path, None, (path,))


def test_nothing_of_a_header_reaches_a_name(tmp_path: Path) -> None:
    save_series(tmp_path / "ct")
    save_series(tmp_path / "ct", 5, prefix="a")
    text = repr(discover_all([tmp_path], dataset="x")).replace(str(tmp_path), "")
    assert not any(canary in text for canary in CANARIES.values())


@pytest.mark.parametrize("name", ["a.nhdr", "a.mhd"])
def test_the_files_of_a_source_include_detached_voxels(tmp_path: Path, name: str) -> None:
    save_itk(tmp_path / name, ct_array())
    save_nifti(tmp_path / "b.nii.gz", ct_array())
    first, second = discover([tmp_path], dataset="x")
    assert first.files == (tmp_path / name, tmp_path / "a.raw")
    assert second.files == (tmp_path / "b.nii.gz",)
    assert second.label_files == ()
    pairs = {tmp_path / "b.nii.gz": tmp_path / name}
    (paired,) = discover([tmp_path / "b.nii.gz"], dataset="x", pairs=pairs)
    assert paired.label_files == (tmp_path / name, tmp_path / "a.raw")


def test_discovery_of_many_files_stays_fast(tmp_path: Path) -> None:
    """2000 images in 100 folders; nothing but their names is looked at."""
    touch(tmp_path, *(f"{n // 20:03d}/{n:05d}.nii.gz" for n in range(2000)))
    assert len(discover([tmp_path], dataset="x")) == 2000
    assert np.all([s.label is None for s in discover([tmp_path / "000"], dataset="x")])


def test_a_label_beside_an_image_can_be_left_out(tmp_path: Path) -> None:
    for name in ("a_ct.nii.gz", "a_seg.nii.gz"):
        (tmp_path / name).touch()
    image, label = parse_source(f"{tmp_path / 'a_ct.nii.gz'}=-")
    assert label is not None
    assert discover([image], dataset="d")[0].label == tmp_path / "a_seg.nii.gz"
    assert discover([image], dataset="d", pairs={image: label})[0].label is None


def test_row_30_a_link_to_itself_beside_a_label_is_a_case_that_reading_refuses(tmp_path: Path) -> None:
    touch(tmp_path, "a_seg.nii.gz", "b.nii.gz")
    (tmp_path / "a.nii.gz").symlink_to(tmp_path / "a.nii.gz")
    found = discover([tmp_path], dataset="x")
    assert cases(found) == {"x/a": "a_seg.nii.gz", "x/b": None}
    with pytest.raises(CaseError, match="cannot be read"):
        read_volume(found[0].image)
