"""Conversion and scale benches run whole at toy size, check what they compare, and report every sample."""

import json
from pathlib import Path

import numpy as np
import pytest

from ftengine.bench import convert, scale
from ftengine.config import Config
from ftengine.store.reader import open_store


def test_convert_bench_runs(capsys: pytest.CaptureFixture[str]) -> None:
    document = convert.run(
        shapes_zyx=((30, 64, 64),),
        spacing_mm_zyx=(5.0, 3.0, 3.0),
        rounds=1,
        large_slices=20,
        large_shape_yx=(64, 64),
        num_small=10,
        worker_repeat=2,
        as_json=True,
    )
    printed = json.loads(capsys.readouterr().out)
    assert printed["modes"].keys() == {"one core", "default threads"}
    for mode in document["modes"].values():
        assert [len(row["samples_s"]) for row in mode["rows"]] == [1, 1]
        assert mode["equal"]["hu_share"] >= convert.SAME_SHARE
        assert mode["times_smaller"] > 1
        assert all(seconds >= 0 for stage, seconds in mode["split_s"].items() if stage != "rest")
        assert sum(mode["split_s"].values()) > 0
    assert document["memory"].keys() == {"shrinks", "worst"}
    assert all(part["peak_gb"] > part["imports_gb"] > 0 for part in document["memory"].values())
    assert document["many"]["late_mb"] > 0
    assert document["two_workers"]["volumes"] == 2
    assert "Two workers" in convert._as_text(document)


def test_a_conversion_that_differs_is_not_timed(tmp_path: Path) -> None:
    region = Config.preset("abdomen").region
    pairs = convert.write_volumes(tmp_path, [(30, 64, 64)], (5.0, 3.0, 3.0))
    convert.convert_by_us(convert.sources_of(pairs), tmp_path / "s.zarr", region)
    assert convert.check_equal(pairs, tmp_path / "s.zarr", region)["label_share"] > convert.SAME_LABEL_SHARE
    (tmp_path / "other").mkdir()
    other = convert.write_volumes(tmp_path / "other", [(30, 64, 66)], (5.0, 3.0, 2.9))
    convert.convert_by_us(convert.sources_of(other), tmp_path / "t.zarr", region)
    with pytest.raises(AssertionError, match="not lossless"):
        convert.check_equal(pairs, tmp_path / "t.zarr", region)


def test_scale_bench_runs(capsys: pytest.CaptureFixture[str]) -> None:
    document = scale.run(
        num_volumes=300,
        example_shapes=((40, 48, 64), (33, 64, 40)),
        draws=50,
        rounds=1,
        costs=(0.05, 3.5e5),
        as_json=True,
    )
    printed = json.loads(capsys.readouterr().out)
    assert printed["num_volumes"] == 300
    assert set(scale.LIMITS) <= document.keys()
    assert document["draw_us"] > 0
    assert document["open_mb"] >= document["imports_mb"] > 0
    for row in document["conversion"]:
        assert row["hours"][2] == pytest.approx(row["hours"][1] / (2 * scale.PARALLEL_EFFICIENCY))
    assert "| open_s |" in scale._as_text(document)


def test_synthetic_rows_are_as_an_index_must_be(tmp_path: Path) -> None:
    scale.synthetic_index(tmp_path / "s.zarr", scale.example_rows(tmp_path, [(40, 48, 64), (33, 64, 40)]), 40)
    store = open_store(tmp_path / "s.zarr")
    assert len(store) == 40
    assert store.cases == sorted(store.cases)
    for row in store.index.to_pylist():
        for entry in row["class_chunks"]:
            assert len(entry["chunk"]) == len(entry["voxels"]) == len(entry["anchor"]) > 0
            assert 0 < min(entry["voxels"]) <= max(entry["voxels"]) <= 32**3
            assert max(entry["anchor"]) < 32**3
            assert max(entry["chunk"]) < np.prod([-(-n // 32) for n in row["shape_zyx"]])
