"""``ftengine convert --source``: a data set of the registry brings its file names and its label map."""

import json
from pathlib import Path

import numpy as np

from ftengine.store.reader import open_store
from ftengine.volume.nifti import write_nifti
from tests.cli.test_cli import _error, _run
from tests.support import organ_volume, ras_grid_at

SHAPE = (20, 22, 24)


def _kits(folder: Path) -> None:
    """Two cases as KiTS lays them out: imaging and segmentation in a folder each; 1 kidney, 2 tumour, 3 cyst."""
    for number in range(2):
        image, label = organ_volume(SHAPE, tumor=True, seed=number)
        label[8, 8, 8] = 3
        (folder / f"case_0000{number}").mkdir(parents=True)
        write_nifti(folder / f"case_0000{number}" / "imaging.nii.gz", image, ras_grid_at(SHAPE))
        write_nifti(folder / f"case_0000{number}" / "segmentation.nii.gz", label, ras_grid_at(SHAPE))


def test_a_source_brings_its_names_and_its_label_map(tmp_path: Path) -> None:
    _kits(tmp_path / "kits23")
    done = _run("convert", tmp_path / "kits23", tmp_path / "s.zarr", "--source", "kits23", "--json")
    assert json.loads(done.stdout)["converted"] == 2
    store = open_store(tmp_path / "s.zarr")
    assert [case.split("/")[0] for case in store.cases] == ["kits23", "kits23"]
    names = {name for name, value in store.labels.items() if store.row(store.cases[0])["class_voxels"][value]}
    assert names == {"background", "kidney", "kidney_tumor"}  # the cyst counts as tumour, as the entry says
    assert "ftengine" in json.loads((tmp_path / "s.zarr" / "zarr.json").read_text())["attributes"]
    again = _run("convert", tmp_path / "kits23", tmp_path / "s.zarr", "--source", "kits23", "--json")
    assert json.loads(again.stdout)["skipped"] == 2
    verified = _run("store", "verify", tmp_path / "s.zarr", "--json")
    assert json.loads(verified.stdout)["sound"] == 2


def test_a_name_and_a_map_of_the_command_line_win(tmp_path: Path) -> None:
    _kits(tmp_path / "src")
    arguments = ("--source", "kits23", "--dataset", "mine", "--label-map", "3=kidney")
    _run("convert", tmp_path / "src", tmp_path / "s.zarr", *arguments)
    store = open_store(tmp_path / "s.zarr")
    assert {case.split("/")[0] for case in store.cases} == {"mine"}
    label = store.read_volume(store.cases[0]).label
    assert set(np.unique(label)) == {0, store.labels["kidney"], store.labels["kidney_tumor"]}


def test_what_does_not_go_with_a_source_is_one_line(tmp_path: Path) -> None:
    _kits(tmp_path / "src")
    source = (tmp_path / "src", tmp_path / "s.zarr", "--source")
    assert "Did you mean kits23" in _error("convert", *source, "kits32", code=2)
    assert "want no --layout" in _error("convert", *source, "kits23", "--layout", "folder", code=2)
    assert "holds no volume of lits" in _error("convert", *source, "lits", code=4)
