"""Folders against the registry: counted, paired, named; on real files with real headers."""

from pathlib import Path

import numpy as np
import pytest

from ftengine.config import Config
from ftengine.datasets.check import check_folder, find_dataset
from ftengine.datasets.registry import DatasetEntry, Registry, load_registry
from ftengine.errors import CaseError, ConfigError
from ftengine.volume.nifti import write_nifti
from tests.support import ras_grid_at

SHAPE = (4, 5, 6)


def _image(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_nifti(file, np.zeros(SHAPE, dtype=np.int16), ras_grid_at(SHAPE))


def _registry(**changes: object) -> Registry:
    """The shipped registry, with fewer volumes expected of some."""
    known = load_registry()
    entries = [
        e.model_copy(update={"volumes": changes.get(e.name.replace("-", "_"), e.volumes)})
        for e in known.entries.values()
    ]
    return Registry(entries)


@pytest.fixture
def lits(tmp_path: Path) -> Path:
    for number in range(3):
        _image(tmp_path / "LITS17" / "batch" / f"volume-{number}.nii")
        _image(tmp_path / "LITS17" / "batch" / f"segmentation-{number}.nii")
    return tmp_path / "LITS17"


def test_patterns_pair_what_names_do_not(lits: Path) -> None:
    result = check_folder(lits, _registry(lits=3))
    assert (result.dataset, result.found, result.expected) == ("lits", 3, 3)
    assert result.problems == ()
    assert result.exit_code == 0
    assert result.fits[0].name == "lits"
    cases = find_dataset(lits, load_registry().get("lits"), region=Config.preset("abdomen").region)
    assert [c.case for c in cases] == [f"lits/batch/volume-{n}" for n in range(3)]
    assert [c.label for c in cases] == [lits / "batch" / f"segmentation-{n}.nii" for n in range(3)]
    assert cases[0].label_map == ((1, 1), (2, 2))


def test_what_is_missing_is_told(lits: Path) -> None:
    (lits / "batch" / "segmentation-1.nii").unlink()
    (lits / "batch" / "volume-2.nii").write_bytes(b"no header at all")
    result = check_folder(lits, load_registry(), dataset="LiTS")
    assert result.exit_code == 1
    assert result.without_label == ("lits/batch/volume-1",)
    assert list(result.unreadable) == ["lits/batch/volume-2"]
    assert result.problems[0] == "3 volumes found, 131 expected"
    assert len(result.problems) == 3


def test_the_same_names_in_the_decathlon_are_told_apart_by_folder_or_number(tmp_path: Path) -> None:
    for folder in ("Task09_Spleen", "unnamed"):
        for number in range(2):
            _image(tmp_path / folder / "imagesTr" / f"x_{number}.nii.gz")
            _image(tmp_path / folder / "labelsTr" / f"x_{number}.nii.gz")
        _image(tmp_path / folder / "imagesTs" / "x_9.nii.gz")
    assert check_folder(tmp_path / "Task09_Spleen", _registry(msd09=2)).dataset == "msd09"
    by_number = check_folder(tmp_path / "unnamed", _registry(msd10=2))
    assert (by_number.dataset, by_number.problems) == ("msd10", ())
    two = check_folder(tmp_path / "unnamed", _registry(msd09=2, msd10=2))
    assert two.dataset is None
    assert two.problems == ("fits msd09, msd10 alike; name one with --dataset",)


def test_organ_labels_in_files_of_their_own(tmp_path: Path) -> None:
    entry = load_registry().get("totalsegmentator")
    for case in ("s0000", "s0001"):
        _image(tmp_path / "t" / case / "ct.nii.gz")
        for organ in ("liver", "pancreas", "kidney_left", "kidney_right", "spleen"):
            _image(tmp_path / "t" / case / "segmentations" / f"{organ}.nii.gz")
    (tmp_path / "t" / "s0001" / "segmentations" / "liver.nii.gz").unlink()
    result = check_folder(tmp_path / "t", _registry(totalsegmentator=2), dataset=entry.name)
    assert result.found == 2
    assert result.without_organs == ("totalsegmentator/s0001/ct",)
    assert result.problems == ("1 volumes without all organ labels, such as totalsegmentator/s0001/ct",)


def test_labels_in_a_folder_of_their_own(tmp_path: Path) -> None:
    for number in range(2):
        _image(tmp_path / "AbdomenCT-1K" / "images" / f"Case_{number}_0000.nii.gz")
        _image(tmp_path / "Mask" / "images" / f"Case_{number}.nii.gz")
    folder = tmp_path / "AbdomenCT-1K"
    assert len(check_folder(folder, load_registry()).without_label) == 2
    result = check_folder(folder, _registry(abdomenct_1k=2), labels=tmp_path / "Mask")
    assert (result.dataset, result.without_label, result.problems) == ("abdomenct-1k", (), ())


def test_a_folder_of_nothing_known(tmp_path: Path) -> None:
    _image(tmp_path / "x" / "a_ct.nii.gz")
    result = check_folder(tmp_path / "x", load_registry())
    assert (result.dataset, result.fits, result.found) == (None, (), 1)
    assert "fits no entry" in result.problems[0]
    wrong = check_folder(tmp_path / "x", load_registry(), dataset="kits23")
    assert "no volume of kits23 found (want files named {id}/imaging" in wrong.problems[0]
    with pytest.raises(CaseError, match="holds no volume of kits23"):
        find_dataset(tmp_path / "x", load_registry().get("kits23"))
    with pytest.raises(ConfigError, match="is not a folder"):
        check_folder(tmp_path / "nowhere", load_registry())


def test_progress_counts_every_image(lits: Path) -> None:
    totals: list[int] = []
    seen: list[str] = []
    check_folder(lits, load_registry(), dataset="lits", on_start=totals.append, on_case=seen.append)
    assert (totals, len(seen)) == ([3], 3)


@pytest.mark.data
def test_real_dicom_series_count_as_volumes(data_dir: Path) -> None:
    entry = DatasetEntry(name="mine", title="mine", region="chest", layout="dicom", volumes=1)
    result = check_folder(data_dir / "totalseg_dicom", Registry([entry]), dataset="mine")
    assert result.found >= 1
    assert result.found == sum(c.startswith("mine/") for c in result.without_label)
    assert not result.unreadable
