"""``ftengine datasets``, ``store subset``, ``store info --picture`` and folds, as a user types them."""

import json
from pathlib import Path

import numpy as np
import pytest

from ftengine.datasets.registry import read_entry
from ftengine.store.reader import open_store
from ftengine.volume.nifti import write_nifti
from tests.cli.test_cli import _error, _run
from tests.support import make_store, ras_grid_at, small_config

CONFIG = small_config(training__steps=2)


@pytest.fixture(scope="module")
def store_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("cli"), CONFIG, num_annotated=4).path


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A registry folder with one data set, and two of its volumes."""
    (tmp_path / "registry").mkdir()
    (tmp_path / "registry" / "mine.yaml").write_text(
        "name: mine\ntitle: Mine\nregion: abdomen\ntumor: liver_tumor\nvolumes: 2\nimage: ct/{id}\nlabel: truth/{id}\n"
        "label_map: {1: liver_tumor}\n"
    )
    for name in ("a", "b"):
        for kind in ("ct", "truth"):
            (tmp_path / "src" / kind).mkdir(parents=True, exist_ok=True)
            write_nifti(
                tmp_path / "src" / kind / f"{name}.nii.gz", np.zeros((4, 4, 4), np.int16), ras_grid_at((4, 4, 4))
            )
    return tmp_path


def test_list_and_show(mine: Path, tmp_path: Path) -> None:
    assert "33 data sets, 161,310 volumes" in _run("datasets", "list").stdout
    chest = json.loads(_run("datasets", "list", "--region", "chest", "--json").stdout)
    assert len(chest) == 12
    assert {e["region"] for e in chest} == {"chest", "both"}
    own = json.loads(_run("datasets", "list", "--registry", mine / "registry", "--json").stdout)
    assert len(own) == 34
    assert "knee" in _error("datasets", "list", "--region", "knee", code=2)
    shown = json.loads(_run("datasets", "show", "LiTS", "--json").stdout)
    assert shown["label_map"] == {"1": "liver", "2": "liver_tumor"}
    assert "abdomenatlas" in shown["overlaps"]
    (tmp_path / "lits.yaml").write_text(_run("datasets", "show", "lits").stdout)
    assert read_entry(tmp_path / "lits.yaml").volumes == 131
    assert "Did you mean lits" in _error("datasets", "show", "litz", code=2)


def test_check(mine: Path) -> None:
    options = ("--registry", mine / "registry", "--dataset", "mine")
    document = json.loads(_run("datasets", "check", mine / "src", *options, "--json").stdout)
    assert (document["found"], document["expected"], document["problems"]) == (2, 2, [])
    assert "as expected" in _run("datasets", "check", mine / "src", *options).stdout
    (mine / "src" / "truth" / "b.nii.gz").unlink()
    done = _run("datasets", "check", mine / "src", *options, code=1)
    assert "mismatch: 1 volumes without a tumour label, such as mine/ct/b" in done.stdout
    done = _run("datasets", "check", mine / "src" / "ct", "--dataset", "ircad", code=1)
    assert "mismatch: no volume of ircad found (want DICOM series)" in done.stdout
    assert "is not a folder" in _error("datasets", "check", mine / "nowhere", code=2)


def test_subset_folds_train_and_evaluate(store_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "f.zarr"
    planned = json.loads(_run("store", "subset", store_path, out, "--folds", "2", "--dry-run", "--json").stdout)
    assert (planned["num_volumes"], planned["folds"], planned["written"]) == (6, {"0": 3, "1": 3}, False)
    assert not out.exists()
    assert "6 volumes, folds of 3 3; written to" in _run("store", "subset", store_path, out, "--folds", "2").stdout
    folded = open_store(out)
    fold_of = dict(zip(folded.cases, folded.index.column("fold").to_pylist(), strict=True))
    config = tmp_path / "small.yaml"
    config.write_text(CONFIG.to_yaml())
    _run("train", "seg", out, "--out", tmp_path / "run", "--config", config, "--fold", "1")
    refused = _error("train", "seg", out, "--out", tmp_path / "run", "--resume", "--fold", "0", code=2)
    assert "(fold: was 1, is 0)" in refused
    scored = json.loads(_run("evaluate", tmp_path / "run" / "checkpoint.pt", out, "--fold", "1", "--json").stdout)
    cases = {c["case"] for c in scored["cases"]}
    assert cases == {case for case, fold in fold_of.items() if fold == 1 and case.startswith("a/")}
    assert "--fold 7: no volume is in it" in _error(
        "train", "seg", out, "--out", tmp_path / "x", "--fold", "7", "--config", config, code=2
    )
    assert "is a subset of" in _error("convert", _nifti(tmp_path), out, "--region", "demo", "--config", config, code=2)
    assert "exists and is not empty" in _error("store", "subset", store_path, out, code=2)


def _nifti(folder: Path) -> Path:
    write_nifti(folder / "one.nii.gz", np.zeros((8, 8, 8), np.int16), ras_grid_at((8, 8, 8)))
    return folder / "one.nii.gz"


def test_subset_by_list_and_split(store_path: Path, tmp_path: Path) -> None:
    (tmp_path / "cases.txt").write_text("a/1\no/0\n")
    arguments = ("--cases", tmp_path / "cases.txt", "--split", "train", "--dataset", "a", "--json")
    assert json.loads(_run("store", "subset", store_path, tmp_path / "s.zarr", *arguments).stdout)["num_volumes"] == 1
    assert open_store(tmp_path / "s.zarr").cases == ["a/1"]
    assert "no volume is left" in _error("store", "subset", store_path, tmp_path / "t.zarr", "--subset", "20K", code=2)


def test_info_draws_a_picture(store_path: Path, tmp_path: Path) -> None:
    picture = tmp_path / "pictures" / "info.png"
    document = json.loads(_run("store", "info", store_path, "--picture", picture, "--json").stdout)
    assert document["num_volumes"] == 6
    assert picture.read_bytes()[:4] == b"\x89PNG"
