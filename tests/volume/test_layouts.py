"""The layouts of data sets: one phantom scan in each of them, what auto takes, and lists that lie."""

import json
from collections.abc import Iterator
from errno import EACCES
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

from ftengine.errors import CaseError, ConfigError
from ftengine.volume.cases import Discovery, Source
from ftengine.volume.layouts.choose import choose, find_cases

REGION = {"background": 0, "liver": 1, "liver_tumor": 2}


def touch(folder: Path, *names: str) -> None:
    """Empty files: the layouts go by names and lists."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def write_json(folder: Path, document: Any, name: str = "dataset.json") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(document if isinstance(document, str) else json.dumps(document))
    return folder / name


def cases(found: Discovery) -> dict[str, tuple[str, str | None, str]]:
    """Case -> image, label, split, by file name."""
    return {s.case: (s.image.name, s.label.name if s.label else None, s.split) for s in found.sources}


def refused(folder: Path, match: str, **options: Any) -> str:
    """The one-line ConfigError of a layout."""
    with pytest.raises(ConfigError, match=match) as caught:
        find_cases([folder], dataset="x", **options)
    assert str(caught.value).isprintable()
    return str(caught.value)


# nnU-Net


def nnunet(folder: Path, document: Any = None, ending: str = ".nii.gz") -> Path:
    touch(folder, *(f"imagesTr/liver_{n:03d}_0000{ending}" for n in (1, 2)), f"imagesTs/liver_009_0000{ending}")
    touch(folder, *(f"labelsTr/liver_{n:03d}{ending}" for n in (1, 2)))
    if document is not None:
        write_json(folder, document)
    return folder


V2 = {
    "channel_names": {"0": "CT"},
    "labels": {"background": 0, "liver": 1, "liver tumour": 2},
    "numTraining": 2,
    "file_ending": ".nii.gz",
}
V1 = {
    "modality": {"0": "CT"},
    "labels": {"0": "background", "1": "liver", "2": "Liver-Tumor"},
    "numTraining": 2,
    "training": [
        {"image": f"./imagesTr/liver_{n:03d}.nii.gz", "label": f"./labelsTr/liver_{n:03d}.nii.gz"} for n in (1, 2)
    ],
    "test": ["./imagesTs/liver_009.nii.gz"],
}


@pytest.mark.parametrize("document", [None, V1, V2])
@pytest.mark.parametrize("layout", ["auto", "nnunet"])
def test_nnunet_v1_v2_and_without_a_description(tmp_path: Path, document: Any, layout: str) -> None:
    found = find_cases([nnunet(tmp_path, document)], layout=layout, dataset="x", region_labels=REGION)
    assert cases(found) == {
        "x/liver_001": ("liver_001_0000.nii.gz", "liver_001.nii.gz", "train"),
        "x/liver_002": ("liver_002_0000.nii.gz", "liver_002.nii.gz", "train"),
        "x/liver_009": ("liver_009_0000.nii.gz", None, "test"),
    }
    assert {s.label_map for s in found.sources} == {() if document is None else ((1, 1), (2, 2))}
    assert found.ignored == ()
    assert any("layout nnunet" in note for note in found.notes) == (layout == "auto")


def test_nnunet_names_are_mapped_to_the_region_and_the_user_overrides(tmp_path: Path) -> None:
    folder = nnunet(tmp_path, V2 | {"labels": {"background": 0, "liver": 5, "cancer": 7, "gut": 9}})
    text = refused(folder, r"labels 7 \('cancer'\), 9 \('gut'\) are not labels of the region", region_labels=REGION)
    assert "--label-map 7=LABEL" in text
    found = find_cases([folder], dataset="x", region_labels=REGION, label_map={7: 2, 9: 0})
    assert {s.label_map for s in found.sources} == {((5, 1), (7, 2), (9, 0))}
    found = find_cases([folder], dataset="x", region_labels=REGION, label_map={5: 0, 7: 2, 9: 0})
    assert {s.label_map for s in found.sources} == {((5, 0), (7, 2), (9, 0))}


def test_nnunet_regions_have_no_name_of_their_own(tmp_path: Path) -> None:
    folder = nnunet(tmp_path, V2 | {"labels": {"background": 0, "whole": [1, 2], "liver_tumor": [2]}})
    refused(folder, r"labels 1 \(of several names\), 2 \(of several names\)", region_labels=REGION)
    assert find_cases([folder], dataset="x", region_labels=REGION, label_map={1: 1, 2: 2}).sources


@pytest.mark.parametrize("channels", [{"0": "CT", "1": "PET"}, {"0": "T2"}, {}, "CT", {"0": 5}])
@pytest.mark.parametrize("key", ["channel_names", "modality"])
def test_only_the_ct_channel(tmp_path: Path, channels: Any, key: str) -> None:
    refused(nnunet(tmp_path, {"labels": {}, key: channels}), rf"dataset\.json: {key} .*want")


def test_images_of_other_channels_are_an_error(tmp_path: Path) -> None:
    nnunet(tmp_path, V2)
    touch(tmp_path, "imagesTr/liver_001_0001.nii.gz", "imagesTr/liver_002_0001.nii.gz")
    text = refused(tmp_path, "2 images of other channels than _0000, such as liver_001_0001.nii.gz")
    assert "the CT" in text


def test_nnunet_with_another_ending(tmp_path: Path) -> None:
    nnunet(tmp_path, V2 | {"file_ending": ".nrrd"}, ".nrrd")
    touch(tmp_path, "imagesTr/liver_001_0000.nii.gz", "imagesTr/notes.txt", "imagesTr/odd.nrrd", "labelsTr/lone.nrrd")
    found = find_cases([tmp_path], dataset="x")
    assert {image for image, _, _ in cases(found).values()} == {f"liver_{n}_0000.nrrd" for n in ("001", "002", "009")}
    assert {path.name: reason for path, reason in found.ignored} == {
        "liver_001_0000.nii.gz": "not an image",
        "notes.txt": "not an image",
        "odd.nrrd": "an image without the channel _0000",
        "lone.nrrd": "a label without its image",
    }
    refused(nnunet(tmp_path / "png", V2 | {"file_ending": ".png"}), r"file_ending is '\.png'; want one of \.nii\.gz")


def test_nnunet_two_files_of_one_case(tmp_path: Path) -> None:
    nnunet(tmp_path)
    touch(tmp_path, "imagesTr/liver_001_0000.nrrd")
    refused(tmp_path, "two images of case 'liver_001'")


def test_nnunet_missing_labels_and_images_fail_their_case_and_no_other(tmp_path: Path) -> None:
    nnunet(tmp_path, V1 | {"training": [*V1["training"], {"image": "./imagesTr/lost.nii.gz", "label": "x"}]})  # type: ignore[misc]
    (tmp_path / "labelsTr" / "liver_002.nii.gz").unlink()
    found = find_cases([tmp_path], dataset="x")
    assert cases(found)["x/liver_002"] == ("liver_002_0000.nii.gz", "liver_002.nii.gz", "train")
    assert cases(found)["x/lost"] == ("lost_0000.nii.gz", "lost.nii.gz", "train")
    assert [n for n in found.notes if "numTraining" in n] == [
        f"{tmp_path / 'dataset.json'} says numTraining 2; found 3 training cases"
    ]


def test_nnunet_without_any_label(tmp_path: Path) -> None:
    touch(tmp_path, "imagesTr/a_0000.nii.gz")
    refused(tmp_path, "imagesTr without labelsTr; want both")
    touch(tmp_path / "ts", "imagesTs/a_0000.nii.gz")
    assert cases(find_cases([tmp_path / "ts"], layout="nnunet", dataset="x")) == {
        "x/a": ("a_0000.nii.gz", None, "test")
    }


def test_nnunet_v2_with_a_table_of_cases(tmp_path: Path) -> None:
    table: dict[str, Any] = {"a": {"images": ["far/a.nii.gz"], "label": "far/a_seg.nii.gz"}}
    write_json(tmp_path, V2 | {"dataset": table})
    found = find_cases([tmp_path], dataset="x")
    assert cases(found) == {"x/a": ("a.nii.gz", "a_seg.nii.gz", "train")}
    assert "layout nnunet" in found.notes[0]
    table["b"] = {"images": ["b_0000.nii.gz", "b_0001.nii.gz"], "label": "b.nii.gz"}
    write_json(tmp_path, V2 | {"dataset": table})
    refused(tmp_path, r"dataset\['b'\] lists 2 images; want one, the CT")
    table["b"] = {"images": ["../b.nii.gz"], "label": "b.nii.gz"}
    write_json(tmp_path, V2 | {"dataset": table})
    refused(tmp_path, r"dataset\['b'\]: '\.\./b\.nii\.gz' leads out of")


# Medical Segmentation Decathlon

MSD = V1 | {"labels": {"0": "background", "1": "liver", "2": "liver_tumor"}}


def msd(folder: Path, document: Any = MSD) -> Path:
    touch(folder, *(f"{kind}/liver_{n:03d}.nii.gz" for n in (1, 2) for kind in ("imagesTr", "labelsTr")))
    touch(folder, "imagesTs/liver_009.nii.gz", "imagesTr/._liver_001.nii.gz")
    write_json(folder, document)
    return folder


@pytest.mark.parametrize("layout", ["auto", "msd"])
def test_msd_takes_its_lists(tmp_path: Path, layout: str) -> None:
    touch(tmp_path, "imagesTr/liver_005.nii.gz")
    found = find_cases([msd(tmp_path)], layout=layout, dataset="x", region_labels=REGION)
    assert cases(found) == {
        "x/liver_001": ("liver_001.nii.gz", "liver_001.nii.gz", "train"),
        "x/liver_002": ("liver_002.nii.gz", "liver_002.nii.gz", "train"),
        "x/liver_009": ("liver_009.nii.gz", None, "test"),
    }
    assert found.ignored == ((tmp_path / "imagesTr" / "liver_005.nii.gz", "not in the lists of dataset.json"),)
    by_file = find_cases([tmp_path / "dataset.json"], layout=layout, dataset="x", region_labels=REGION)
    assert by_file.sources == found.sources


def test_msd_entries_of_all_kinds(tmp_path: Path) -> None:
    msd(tmp_path, {"training": ["a.nii.gz", {"image": "sub/b.nii.gz"}], "test": [{"image": "imagesTs/c.nii.gz"}]})
    assert cases(find_cases([tmp_path], dataset="x")) == {
        "x/a": ("a.nii.gz", None, "train"),
        "x/sub/b": ("b.nii.gz", None, "train"),
        "x/c": ("c.nii.gz", None, "test"),
    }


def test_msd_missing_files_are_cases_that_fail_later(tmp_path: Path) -> None:
    msd(tmp_path)
    (tmp_path / "imagesTr" / "liver_001.nii.gz").unlink()
    assert len(find_cases([tmp_path], dataset="x").sources) == 3


def test_msd_of_another_modality(tmp_path: Path) -> None:
    refused(
        msd(tmp_path, MSD | {"modality": {"0": "FLAIR", "1": "T1w"}}), "modality names 2 channels; want one, the CT"
    )
    refused(msd(tmp_path, MSD | {"modality": {"0": "MRI"}}), "channel 0 is 'MRI'; want CT")


def test_an_image_listed_twice(tmp_path: Path) -> None:
    entry = MSD["training"][0]  # type: ignore[index]
    refused(msd(tmp_path, MSD | {"training": [entry, entry]}), r"liver_001\.nii\.gz is listed twice")


@pytest.mark.parametrize(
    ("entry", "match"),
    [
        ({"image": "../../etc/passwd"}, r"training\[0\]: '\.\./\.\./etc/passwd' leads out of"),
        ({"image": "imagesTr/../../x.nii.gz"}, "leads out of"),
        ({"image": "/etc/passwd"}, "'/etc/passwd' leads out of"),
        ({"image": "a\0.nii.gz"}, r"'a\\x00\.nii\.gz' holds a NUL"),
        ({"image": "a\n.nii.gz"}, "unprintable"),
        ({"image": "\ud800.nii.gz"}, "unprintable"),
        ({"image": "x" * 5000}, "too long for a path"),
        ({"image": "x" * 300 + ".nii.gz"}, "too long for a path"),
        ({"image": "."}, "is the folder itself"),
        ({"image": ""}, "is not a path"),
        ({"image": 7}, "7 is not a path"),
        ({"label": "a.nii.gz"}, "None is not a path"),
        ([[]], "is not a path"),
    ],
)
@pytest.mark.parametrize("layout", ["msd", "nnunet"])
def test_lists_that_lie(tmp_path: Path, entry: Any, match: str, layout: str) -> None:
    touch(tmp_path, "imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz")
    write_json(tmp_path, {"training": [entry]})
    text = refused(tmp_path, match, layout=layout)
    assert len(text) < 600


def test_a_label_that_leads_out(tmp_path: Path) -> None:
    write_json(tmp_path, {"training": [{"image": "a.nii.gz", "label": "../b.nii.gz"}]})
    refused(tmp_path, r"training\[0\]: '\.\./b\.nii\.gz' leads out of", layout="msd")


def test_a_path_that_goes_up_and_comes_back_is_inside(tmp_path: Path) -> None:
    write_json(tmp_path, {"training": [{"image": "imagesTr/../other/a.nii.gz"}, {"image": str(tmp_path / "b.nii.gz")}]})
    found = find_cases([tmp_path], layout="msd", dataset="x")
    assert [s.case for s in found.sources] == ["x/b", "x/other/a"]
    assert found.sources[1].image == tmp_path / "other" / "a.nii.gz"


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("not json", r"not valid JSON \(line 1: "),
        ("", "not valid JSON"),
        ("[1, 2]", "holds no JSON object"),
        ("[" * 100_000, "not valid JSON"),
        ('{"a":' * 100_000, "not valid JSON"),
        ('{"labels": {}, "labels": {}}', "the key 'labels' stands twice"),
        ('{"numTraining": ' + "9" * 10_000 + "}", "not valid JSON"),
        ('{"training": {"image": "a"}}', "training is not a list"),
        ('{"labels": [1]}', "labels is not a table"),
        ('{"labels": {"liver": 1.5}}', "labels has the entry 'liver': 1.5"),
        ('{"labels": {"liver": true}}', "labels has the entry"),
        ('{"labels": {"liver": []}}', "labels has the entry"),
        ('{"labels": {"liver": {"a": 1}}}', "labels has the entry"),
    ],
)
def test_a_description_that_cannot_be_read(tmp_path: Path, text: str, match: str) -> None:
    write_json(tmp_path, text)
    assert str(tmp_path / "dataset.json") in refused(tmp_path, match, layout="msd")


def test_a_description_of_bytes_or_far_too_large(tmp_path: Path) -> None:
    (tmp_path / "dataset.json").write_bytes(b"\xff\xfe\x00")
    refused(tmp_path, "not valid JSON")
    with (tmp_path / "dataset.json").open("wb") as file:
        file.truncate(65 << 20)  # sparse
    refused(tmp_path, r"68,157,440 bytes; want a list of at most")
    refused(tmp_path / "labelsTr", "no such file or folder", layout="msd")
    touch(tmp_path, "a.nii.gz")
    refused(tmp_path / "a.nii.gz", "not a folder; want that of a data set", layout="msd")
    (tmp_path / "none").mkdir()
    refused(tmp_path / "none", "cannot be read", layout="msd")


_KEYS = st.sampled_from(
    [
        "labels",
        "training",
        "test",
        "dataset",
        "channel_names",
        "modality",
        "file_ending",
        "numTraining",
        "image",
        "images",
        "label",
        "0",
    ]
)
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["CT", "a.nii.gz"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_KEYS | st.text(max_size=4), inner, max_size=5),
    max_leaves=20,
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(document=st.dictionaries(_KEYS, _JSON, max_size=6), layout=st.sampled_from(["auto", "msd", "nnunet"]))
def test_no_description_does_more_than_be_refused(tmp_path: Path, document: Any, layout: str) -> None:
    touch(tmp_path, "imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz")
    write_json(tmp_path, document)
    refusal, sources = "", tuple[Source, ...]()
    try:
        sources = find_cases([tmp_path], layout=layout, dataset="x", region_labels=REGION).sources
    except (ConfigError, CaseError) as error:
        refusal = str(error)
    assert refusal.isprintable()
    assert bool(refusal) != bool(sources)
    assert all(s.image.is_relative_to(tmp_path) and ".." not in s.image.parts for s in sources)


# what auto takes


def test_auto_says_what_it_chose(tmp_path: Path) -> None:
    msd(tmp_path / "m")
    nnunet(tmp_path / "n", V1)
    touch(tmp_path, "f/a.nii.gz", "f/clinical.csv")
    (tmp_path / "f" / "clinical.csv").write_text("patient,age\n1,60\n")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "list.tsv").write_text("case\timage\nq\ta.nii.gz\n")
    names = {name: choose(tmp_path / name).layout for name in "mnfc"}
    assert names == {"m": "msd", "n": "nnunet", "f": "folder", "c": "csv"}
    found = find_cases([tmp_path / name for name in "fc"], dataset="x")
    assert list(cases(found)) == ["x/a", "x/q"]
    assert found.notes == (
        f"{tmp_path / 'f'}: layout folder (images by their names)",
        f"{tmp_path / 'c'}: layout csv (list.tsv has a column image)",
    )
    assert found.ignored == ((tmp_path / "f" / "clinical.csv", "not an image"),)


def test_auto_refuses_what_may_be_several_things(tmp_path: Path) -> None:
    msd(tmp_path / "m")
    for name in ("one.csv", "two.csv"):
        (tmp_path / "m" / name).write_text("image\na.nii.gz\n")
    refused(tmp_path / "m", r"holds 2 manifests, such as one\.csv and two\.csv")
    (tmp_path / "m" / "two.csv").unlink()
    text = refused(tmp_path / "m", r"may have the layout msd \(.*\) or csv \(one\.csv has a column image\)")
    assert "--layout msd or csv" in text
    assert len(find_cases([tmp_path / "m"], layout="csv", dataset="x").sources) == 1
    assert len(find_cases([tmp_path / "m"], layout="msd", dataset="x").sources) == 3
    refused(tmp_path / "m", "want auto, folder, nnunet, msd, dicom, csv", layout="bids")


def test_auto_does_not_take_the_labels_of_data_sets_below_for_images(tmp_path: Path) -> None:
    msd(tmp_path / "all" / "Task03")
    refused(tmp_path / "all", "holds a data set of its own in .*Task03, whose labels would be taken for images")


def test_options_that_do_not_fit_a_layout(tmp_path: Path) -> None:
    msd(tmp_path / "m")
    labels = tmp_path / "m" / "labelsTr"
    refused(tmp_path / "m", "has the layout msd, which names its own labels", labels=labels)
    refused(tmp_path / "m", "paired with a label, but its layout is msd", layout="msd", pairs={tmp_path / "m": labels})
    (tmp_path / "list.csv").write_text("image\na.nii.gz\n")
    refused(tmp_path / "list.csv", "is a manifest; name organ labels in its column", organ_labels=labels)
    refused(tmp_path / "m", "given for the organ labels too", layout="folder", labels=labels, organ_labels=labels)
    refused(tmp_path / "m", "organ labels folder .*: not a folder", organ_labels=tmp_path / "absent")


def test_links_to_one_scan_are_cases_of_their_own_in_a_list_and_a_source_named_twice_is_one(tmp_path: Path) -> None:
    nnunet(tmp_path / "n")
    (tmp_path / "n" / "imagesTr" / "second_0000.nii.gz").symlink_to("liver_001_0000.nii.gz")
    found = find_cases([tmp_path / "n", tmp_path / "n"], dataset="x")
    assert list(cases(found)) == ["x/liver_001", "x/liver_002", "x/liver_009", "x/second"]


# two folders of labels


def test_organ_labels_pair_by_the_same_relative_paths(tmp_path: Path) -> None:
    touch(tmp_path, "ct/p/a_ct.nii.gz", "ct/p/b.nii.gz", "ct/p/a_seg.nii.gz", "organs/p/a.nii.gz")
    found = find_cases([tmp_path / "ct"], dataset="x", organ_labels=tmp_path / "organs", organ_label_map={5: 1})
    first, second = found.sources
    assert (first.label, first.organ_label) == (
        tmp_path / "ct" / "p" / "a_seg.nii.gz",
        tmp_path / "organs" / "p" / "a.nii.gz",
    )
    assert (second.label, second.organ_label) == (None, None)
    assert first.organ_label_map == ((5, 1),)
    assert (first.label_files, first.organ_label_files) == ((first.label,), (first.organ_label,))
    touch(tmp_path, "else/q.nii.gz")
    refused(tmp_path / "ct", "organ labels folder .*: no file fits any of 2 images", organ_labels=tmp_path / "else")


def test_organ_labels_for_the_layouts_with_lists(tmp_path: Path) -> None:
    touch(tmp_path, "organs/liver_001.nii.gz", "organs/liver_009_seg.nii.gz")
    for folder in (nnunet(tmp_path / "n"), msd(tmp_path / "m")):
        found = find_cases([folder], dataset="x", organ_labels=tmp_path / "organs")
        assert [s.organ_label.name if s.organ_label else None for s in found.sources] == [
            "liver_001.nii.gz",
            None,
            "liver_009_seg.nii.gz",
        ]


def test_a_folder_of_organ_labels_inside_the_source_holds_no_cases(tmp_path: Path) -> None:
    touch(tmp_path, "a.nii.gz", "labels/a.nii.gz", "organs/a.nii.gz")
    found = find_cases([tmp_path], dataset="x", labels=tmp_path / "labels", organ_labels=tmp_path / "organs")
    assert [s.case for s in found.sources] == ["x/a"]


# folders that go on for ever


def test_a_hundred_levels_and_links_in_circles(tmp_path: Path) -> None:
    deep = tmp_path.joinpath("src", *["d"] * 100)
    touch(deep, "a.nii.gz")
    (deep / "up").symlink_to(tmp_path / "src")
    (deep / "self").symlink_to(deep / "self")
    (deep / "self.nii.gz").symlink_to(deep / "self.nii.gz")
    (deep / "self_seg.nii.gz").symlink_to(deep / "self_seg.nii.gz")
    found = find_cases([tmp_path / "src"], dataset="x")
    assert [s.case for s in found.sources] == [f"x/{'d/' * 100}{name}" for name in ("a", "self")]
    assert ("self", "not an image") in {(path.name, reason) for path, reason in found.ignored}


def test_a_lost_link_with_a_label_beside_it_is_a_case(tmp_path: Path) -> None:
    touch(tmp_path, "a_seg.nii.gz")
    (tmp_path / "a.nii.gz").symlink_to(tmp_path / "nowhere.nii.gz")
    (found,) = find_cases([tmp_path], dataset="x").sources
    assert found.label == tmp_path / "a_seg.nii.gz"


def test_a_folder_that_cannot_be_listed_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system's refusal stands in for permissions, which root does not feel."""
    msd(tmp_path / "m")
    nnunet(tmp_path / "n")
    touch(tmp_path, "d/a.dcm", "c/list.csv", "c/ct/a.dcm")
    (tmp_path / "c" / "list.csv").write_text("image\nct\n")
    whole = Path.iterdir

    def refuse(folder: Path) -> Iterator[Path]:
        if folder.name in ("imagesTr", "d", "ct"):
            raise PermissionError(EACCES, "Permission denied", str(folder))
        return whole(folder)

    monkeypatch.setattr(Path, "iterdir", refuse)
    for name, layout in (("m", "msd"), ("n", "nnunet"), ("d", "auto"), ("d", "csv")):
        refused(tmp_path / name, r"cannot be listed \(Permission denied\)", layout=layout)
    assert find_cases([tmp_path / "c"], dataset="x").sources[0].series_files == ()


def test_nothing_there_in_any_layout(tmp_path: Path) -> None:
    (tmp_path / "imagesTr").mkdir()
    write_json(tmp_path, {"training": []})
    (tmp_path / "list.csv").write_text("image\n")
    for layout in ("folder", "nnunet", "msd", "dicom", "csv"):
        with pytest.raises(CaseError, match="no CT found"):
            find_cases([tmp_path], layout=layout, dataset="x")
