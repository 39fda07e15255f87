"""The registry against Tables A11 and A17 as printed, and what a wrong YAML file is told."""

from pathlib import Path

import pytest

from ftengine.config import Config
from ftengine.datasets.registry import REGIONS, Registry, load_registry, read_entry
from ftengine.datasets.subsets import get_subset, load_subsets
from ftengine.errors import ConfigError

REGISTRY = load_registry()
# Table A17, "with annotated tumors", and the volumes that it prints
ANNOTATED = {
    "lits": 131,
    "hcc-tace": 104,
    "ircad": 22,
    "msd07": 281,
    "panorama": 2238,
    "qubiq": 40,
    "kits23": 489,
    "kipa": 70,
    "msd06": 63,
    "rider": 59,
    "cv19-20": 199,
}


def test_table_a17() -> None:
    entries = REGISTRY.entries.values()
    assert len(entries) == 33
    assert {e.name: e.volumes for e in entries if e.tumor is not None} == ANNOTATED
    assert sum(ANNOTATED.values()) == 3_696  # section 2: 3,696 volumes contain annotated tumours
    assert sum(e.volumes or 0 for e in entries) == 161_310
    assert [e.name for e in entries if e.region == "both"] == ["colonography", "mela"]


def test_table_a11() -> None:
    subsets = load_subsets()
    sums = {name: subset.num_volumes for name, subset in subsets.items()}
    assert sums == {
        "0.7K": 1_137,
        "8K": 8_662,
        "13K": 13_857,
        "20K": 19_571,
        "6K": 6_836,
        "56K": 56_954,
        "140K": 141_784,
    }
    assert (subsets["20K"].printed_total, subsets["140K"].printed_total) == (19_571, 141_784)
    assert [len(subsets[name].volumes) for name in ("0.7K", "8K", "13K", "20K")] == [7, 17, 18, 23]
    assert [len(subsets[name].volumes) for name in ("6K", "56K", "140K")] == [8, 9, 10]


def test_table_a11_against_table_a17() -> None:
    """The two tables differ by MELA in both regions, by TCIA-Covid in no scale, and by three volumes of RIDER; by nothing else."""
    in_scales = load_subsets()["20K"].volumes, load_subsets()["140K"].volumes
    for volumes in in_scales:
        for name, count in volumes.items():
            assert REGISTRY.get(name).volumes == (59 if name == "rider" else count)
    assert set(in_scales[0]) & set(in_scales[1]) == {"mela"}
    assert set(REGISTRY.entries) - set(in_scales[0]) - set(in_scales[1]) == {"tcia-covid"}
    assert sum(sum(v.values()) for v in in_scales) - 770 + 722 + 3 == 161_310


@pytest.mark.parametrize("subset", load_subsets().values(), ids=lambda s: str(s.name))
def test_a_scale_holds_data_sets_of_its_region(subset: object) -> None:
    scale = get_subset(subset.name)  # type: ignore[attr-defined]  # a Subset
    assert all(scale.region in REGISTRY.get(name).regions for name in scale.volumes)


@pytest.mark.parametrize("entry", REGISTRY.entries.values(), ids=lambda e: str(e.name))
def test_labels_and_overlaps_are_known_names(entry: object) -> None:
    found = REGISTRY.get(entry.name)  # type: ignore[attr-defined]  # a DatasetEntry
    labels = {name for region in found.regions for name in Config.preset(region).region.labels}
    used = set((found.label_map or {}).values()) | {n for o in found.organ_labels for n in o.label_map.values()}
    assert used <= labels
    assert set(found.overlaps) <= set(REGISTRY.entries) - {found.name}
    assert found.link is not None
    assert found.link.startswith(("https://", "http://"))
    assert found.notes or found.label_map is not None  # what is not known is said
    if found.tumor is not None and found.label_map is not None:
        assert found.tumor in found.label_map.values()
    if found.tumor is None and found.label_map is not None:
        assert not {n for n in found.label_map.values() if n.endswith("tumor") or n == "lesion"}


@pytest.mark.parametrize("entry", REGISTRY.entries.values(), ids=lambda e: str(e.name))
def test_an_entry_survives_yaml(entry: object, tmp_path: Path) -> None:
    found = REGISTRY.get(entry.name)  # type: ignore[attr-defined]  # a DatasetEntry
    file = tmp_path / f"{found.name}.yaml"
    file.write_text(found.to_yaml(), encoding="utf-8")
    assert read_entry(file) == found


def test_names_titles_and_aliases_find_an_entry() -> None:
    for name in ("msd07", "MSD07-Pancreas", "Task07_Pancreas", "task07 pancreas"):
        assert REGISTRY.get(name).name == "msd07"
    assert REGISTRY.find("mouse") is None
    with pytest.raises(ConfigError, match="Did you mean kits23"):
        REGISTRY.get("kits")
    with pytest.raises(ConfigError, match=r"want one of 0\.7K, 8K"):
        get_subset("9K")
    assert get_subset("0.7k").name == "0.7K"


def test_overlaps_are_said_from_both_sides() -> None:
    assert "luna16" in REGISTRY.overlaps("lidc")
    assert "lidc" in REGISTRY.overlaps("luna16")
    assert {"ircad", "abdomenct-1k", "abdomenatlas", "flare23"} <= set(REGISTRY.overlaps("lits"))


def test_label_values_follow_the_region() -> None:
    abdomen, demo = Config.preset("abdomen").region, Config.preset("demo").region
    assert REGISTRY.get("kits23").label_values(abdomen) == ((1, 5), (2, 6), (3, 5))
    assert REGISTRY.get("kits23").label_values(demo) == ((1, 0), (2, 0), (3, 0))  # the demo knows the liver only
    assert REGISTRY.get("lits").label_values(demo) == ((1, 1), (2, 2))
    with pytest.raises(ConfigError, match="its label values are not known"):
        REGISTRY.get("hcc-tace").label_values(abdomen)


MINE = "name: mine\ntitle: My hospital\nregion: chest\ntumor: lesion\nlabel_map: {1: lung, 7: lesion}\n"


def test_a_folder_adds_and_replaces_entries(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(MINE, encoding="utf-8")
    (tmp_path / "lits.yaml").write_text("name: lits\ntitle: LiTS\nregion: abdomen\nvolumes: 200\n", encoding="utf-8")
    registry = load_registry(tmp_path)
    assert len(registry.entries) == 34
    assert registry.get("my hospital").label_map == {1: "lung", 7: "lesion"}
    assert registry.get("lits").volumes == 200
    assert load_registry().get("lits").volumes == 131


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (MINE + "volume: 3\n", r"mine\.yaml: volume: there is no such key\. Did you mean volumes\?"),
        (MINE + "volumes: none\n", r"mine\.yaml: volumes: "),
        (MINE + "layout: zip\n", r"mine\.yaml: layout: "),
        (MINE.replace("lung", "liver"), r"mine\.yaml: label_map\.1='liver': want a label of the region"),
        (MINE.replace("tumor: lesion", "tumor: lung"), r"mine\.yaml: tumor='lung': want one of lesion"),
        (MINE.replace("name: mine", "name: other"), r"mine\.yaml: describes the data set 'other'"),
        (MINE + "image: images/ct\n", r"mine\.yaml: pattern 'images/ct': want \{id\}"),
        (MINE + "label: '{id}'\n", r"mine\.yaml: label without image"),
        (MINE + "aliases: [LUNA16]\n", r"'luna16' and 'mine' are both called 'luna16'"),
        ("- a list\n", r"mine\.yaml: want a mapping"),
        ("name: [\n", r"mine\.yaml: is not YAML"),
        ("name: !!python/object/apply:os.getcwd []\n", r"mine\.yaml: is not YAML"),
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message) as caught:
        load_registry(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_folder_without_yaml_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no"):
        load_registry(tmp_path)


def test_an_empty_registry_is_one() -> None:
    assert Registry([]).entries == {}
    assert REGIONS == ("abdomen", "chest")
