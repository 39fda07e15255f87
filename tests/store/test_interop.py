"""One array, several readers: zarr-python, zarrs and tensorstore agree on every voxel; napari shows what the store says."""

import contextlib
import io
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ftengine.config import Config
from ftengine.store import layout
from ftengine.store.reader import open_store
from ftengine.store.writer import Provenance, create_store, write_volume
from tests.support import coordinate_volume, ras_grid_at

CONFIG = Config.preset("abdomen")


def _by_zarr(folder: Path) -> NDArray[Any]:
    return np.asarray(zarr.open_array(folder, mode="r")[:])


def _by_zarrs(folder: Path) -> NDArray[Any]:
    """zarrs, in Rust, in the place of zarr-python's own codecs."""
    import zarrs

    # strict: never fall back to zarr-python in silence, which would compare it with itself
    with zarr.config.set({"codec_pipeline": {"path": "zarrs.ZarrsCodecPipeline", "strict": True}}):
        array = zarr.open_array(folder, mode="r")
        assert isinstance(array._async_array.codec_pipeline, zarrs.ZarrsCodecPipeline)
        return np.asarray(array[:])


def _by_tensorstore(folder: Path) -> NDArray[Any]:
    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": str(folder)},
        "fill_missing_data_reads": False,
    }
    return np.asarray(tensorstore.open(spec, read=True, open=True).result().read().result())


@st.composite
def volumes(draw: st.DrawFn) -> tuple[NDArray[np.int16], NDArray[np.uint8]]:
    """An image and a label, 1 to 70 voxels an axis: all air, sparse or dense, over the whole range of their types."""
    shape = draw(st.tuples(*(st.integers(1, 70) for _ in range(3))))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    density = draw(st.sampled_from([0.0, 0.001, 1.0]))
    filled = rng.random(shape) < density
    image = np.where(filled, rng.integers(-(2**15), 2**15, shape), layout.AIR_HU).astype(np.int16)
    label = np.where(filled, rng.integers(0, CONFIG.region.num_classes, shape), 0).astype(np.uint8)
    return image, label


@given(volume=volumes())
@settings(max_examples=30, deadline=None)
def test_three_libraries_read_what_was_written(volume: tuple[NDArray[np.int16], NDArray[np.uint8]]) -> None:
    image, label = volume
    with tempfile.TemporaryDirectory() as name:
        root = create_store(Path(name) / "s.zarr", CONFIG.region)
        shape = (image.shape[0], image.shape[1], image.shape[2])
        grid = ras_grid_at(shape, 1.5)
        write_volume(root, "d/x", image, label, grid, grid, CONFIG.region, Provenance("x", "00"))
        folder = Path(name) / "s.zarr" / layout.volume_path("d/x")
        for array, written in (("0", image), ("labels/seg/0", label)):
            for read in (_by_zarr, _by_zarrs, _by_tensorstore):
                found = read(folder / array)
                assert found.dtype == written.dtype, read.__name__
                np.testing.assert_array_equal(found, written, err_msg=read.__name__)
        patch = open_store(root).read_volume("d/x")
        np.testing.assert_array_equal(patch.image, image)
        np.testing.assert_array_equal(patch.label, label)


@pytest.fixture
def napari_reader() -> Any:
    """The reader of napari-ome-zarr. Its 280 MB of a desktop viewer are no part of ``dev``; CI installs the extra and must run this."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of napari's own imports
        try:
            from napari_ome_zarr import napari_get_reader
        except ModuleNotFoundError:
            if os.environ.get("CI") == "true":
                raise
            pytest.skip("napari-ome-zarr is not installed: pip install 'ftengine[interop]'")
    return napari_get_reader


@pytest.mark.parametrize("region", ["abdomen", "chest"])
def test_napari_shows_spacing_window_and_colours(napari_reader: Any, tmp_path: Path, region: str) -> None:
    config = Config.preset(region)
    shape = (37, 70, 41)
    image = coordinate_volume(shape)
    label = (image % config.region.num_classes).astype(np.uint8)
    root = create_store(tmp_path / "s.zarr", config.region)
    grid = ras_grid_at(shape)
    write_volume(root, "d/sub/x", image, label, grid, grid, config.region, Provenance("x", "00"))
    folder = tmp_path / "s.zarr" / layout.volume_path("d/sub/x")

    with contextlib.redirect_stdout(io.StringIO()):  # the reader prints
        (shown, shown_kind), (labels, labels_kind) = (
            ((data, options), kind) for data, options, kind in napari_reader(str(folder))()
        )
    assert (shown_kind, labels_kind) == ("image", "labels")
    for (levels, options), written in ((shown, image), (labels, label)):
        (level,) = levels
        np.testing.assert_array_equal(np.asarray(level), written)
        assert options["scale"] == list(config.region.spacing_mm_zyx)
        assert options["units"] == ("millimeter",) * 3
        assert options["axis_labels"] == ("z", "y", "x")
        np.testing.assert_array_equal(options["affine"].affine_matrix, np.eye(4))  # nothing besides the scale
    assert shown[1]["contrast_limits"] == list(config.region.window_hu)
    names = {value: name for name, value in config.region.labels.items() if value}
    colors = labels[1]["colormap"]
    for value in names:
        np.testing.assert_allclose(colors[value], [c / 255 for c in (*layout.label_color(value), 255)])
    properties = labels[1]["properties"]
    assert dict(zip(properties["index"], properties["name"], strict=True)) == names
