"""Bad input: one line with the path, what was found, what was wanted and the next step; the right exit code; nothing half written."""

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from numpy.typing import NDArray

from ftengine.store.reader import open_store
from tests.cli.test_cli import _error, _run
from tests.support import make_store, small_config

SHAPE = (20, 22, 24)  # x, y, z of the files


def _nifti(path: Path, array: NDArray[Any], affine: NDArray[np.float64] | None = None) -> Path:
    nibabel.save(nibabel.Nifti1Image(array, np.diag([3.0, 3.0, 3.0, 1.0]) if affine is None else affine), path)
    return path


def _ct() -> NDArray[np.int16]:
    return np.random.default_rng(0).integers(-1000, 400, SHAPE).astype(np.int16)


def _truncated(folder: Path) -> str:
    file = _nifti(folder / "cut.nii.gz", _ct())
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    return "cut.nii.gz"


def _label_of_another_shape(folder: Path) -> str:
    _nifti(folder / "a_ct.nii.gz", _ct())
    _nifti(folder / "a_label.nii.gz", np.zeros((20, 22, 23), dtype=np.uint8))
    return "a_label.nii.gz"


def _nan(folder: Path) -> str:
    array = _ct().astype(np.float32)
    array[3, 4, 5] = np.nan
    _nifti(folder / "nan.nii.gz", array)
    return "nan.nii.gz"


def _zero_spacing(folder: Path) -> str:
    """nibabel will not write it, so the header's bytes are changed: pixdim[3] and the third column of the sform."""
    file = _nifti(folder / "zero.nii.gz", _ct())
    data = bytearray(gzip.decompress(file.read_bytes()))
    data[76 + 12 : 76 + 16] = np.float32(0).tobytes()
    for row in range(3):
        data[280 + 16 * row + 8 : 280 + 16 * row + 12] = np.float32(0).tobytes()
    file.write_bytes(gzip.compress(bytes(data)))
    return "zero.nii.gz"


def _foreign_label_values(folder: Path) -> str:
    _nifti(folder / "a_ct.nii.gz", _ct())
    label = np.zeros(SHAPE, dtype=np.uint8)
    label[0, 0, :5] = 77
    _nifti(folder / "a_seg.nii.gz", label)
    return "a_seg.nii.gz"


@pytest.mark.parametrize("harm", [_truncated, _label_of_another_shape, _nan, _zero_spacing, _foreign_label_values])
def test_a_bad_file_is_named_with_the_reason_and_nothing_is_stored(harm: Callable[[Path], str], tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    name = harm(tmp_path / "src")
    done = _run("convert", tmp_path / "src", tmp_path / "s.zarr", "--region", "demo", "--json", code=4)
    (case,) = json.loads(done.stdout)["cases"]
    assert case["status"] == "failed"
    assert name in case["reason"]
    assert "\n" not in case["reason"]
    assert "Traceback" not in done.stderr
    store = open_store(tmp_path / "s.zarr")
    assert len(store) == 0
    assert [p.name for p in (store.path / "volumes").rglob("*") if p.is_file()] == ["zarr.json"]


def test_a_missing_file(tmp_path: Path) -> None:
    line = _error("convert", tmp_path / "none.nii.gz", tmp_path / "s.zarr", code=2)
    assert "none.nii.gz" in line
    assert not (tmp_path / "s.zarr").exists()


def test_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    line = _error("convert", tmp_path / "src", tmp_path / "s.zarr", code=4)
    assert "src: no CT found; want NIfTI" in line
    assert not (tmp_path / "s.zarr").exists()


def test_an_unknown_set_key(tmp_path: Path) -> None:
    store = make_store(tmp_path, small_config()).path
    line = _error("train", "seg", store, "--out", tmp_path / "run", "--set", "loader.reader_treads=2", code=2)
    assert "Did you mean loader.reader_threads?" in line
    assert not (tmp_path / "run").exists()


def test_a_store_of_a_future_format(tmp_path: Path) -> None:
    store = make_store(tmp_path, small_config()).path
    document = json.loads((store / "zarr.json").read_text())
    document["attributes"]["ftengine"]["format"] = 7
    (store / "zarr.json").write_text(json.dumps(document))
    for command in (
        ("store", "info", store),
        ("train", "seg", store, "--out", tmp_path / "run"),
        ("preview", store, "--out", tmp_path / "p"),
    ):
        assert "store format 7; this version of ftengine reads format 1" in _error(*command, code=3)
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "p").exists()


def test_a_damaged_store_while_training(tmp_path: Path) -> None:
    config = small_config(training__steps=50)
    (tmp_path / "c.yaml").write_text(config.to_yaml())
    store = make_store(tmp_path, config).path
    shutil.rmtree(store / "volumes/a/1/0/c")
    line = _error("train", "seg", store, "--out", tmp_path / "run", "--config", tmp_path / "c.yaml", "-q", code=3)
    assert "volumes/a/1" in line
    assert "Convert this case again" in line
