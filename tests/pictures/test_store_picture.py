"""The picture of a store: every volume and tumour of the index is in it."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.patches import Patch, Rectangle

from ftengine.errors import ConfigError
from ftengine.geometry import grid_from_matrix
from ftengine.pictures.store_picture import draw_store, native_spacing_mm, store_figure
from ftengine.store.reader import open_store
from ftengine.store.writer import Provenance, create_store, write_volume
from tests.support import coordinate_volume, make_store, organ_volume, ras_grid_at, small_config

CONFIG = small_config()
SHAPE = (20, 22, 24)


def _extent(bar: Patch) -> tuple[float, float]:
    """Width and height of a bar."""
    assert isinstance(bar, Rectangle)
    return bar.get_width(), bar.get_height()


def test_every_volume_and_tumour_is_counted(tmp_path: Path) -> None:
    store = make_store(tmp_path, CONFIG, num_annotated=3, num_organs=2, shape_zyx=SHAPE)
    spacing, hu, voxels, diameters, datasets = store_figure(store).axes
    assert [np.asarray(p.get_path().vertices)[:, 1].max() for p in spacing.patches[:2]] == [5, 5]  # all at 3 mm
    assert len(hu.lines) == 7 * 6  # whiskers, caps, median and ends of seven percentiles
    assert [t.get_text() for t in voxels.get_yticklabels()] == ["liver_tumor\n3 volumes", "liver\n5 volumes"]
    assert sum(_extent(bar)[1] for bar in diameters.patches) == 3
    assert sum(_extent(bar)[0] for bar in datasets.patches) == 5
    assert {t.get_text() for t in datasets.get_yticklabels()} == {"a", "o"}


def test_the_title_says_what_the_store_is(tmp_path: Path) -> None:
    store = make_store(tmp_path, CONFIG, num_annotated=1, num_organs=1, shape_zyx=SHAPE)
    title = store_figure(store).get_suptitle()
    assert title.startswith(
        "store.zarr: 2 volumes, abdomen, 3 x 3 x 3 mm (z, y, x)\n1 tumours annotated, 1 organs only; "
    )


def test_spacing_follows_the_patient_whatever_the_axis_order(tmp_path: Path) -> None:
    root = create_store(tmp_path / "s.zarr", CONFIG.region)
    # voxel axes x, y, z of this file run to the feet, to the right and to the front
    sagittal = np.array([[0, -0.7, 0, 0], [0, 0, 0.8, 0], [-5.0, 0, 0, 0], [0, 0, 0, 1.0]])
    native = grid_from_matrix((8, 8, 8), sagittal)
    write_volume(
        root,
        "d/x",
        coordinate_volume((8, 8, 8)),
        None,
        ras_grid_at((8, 8, 8)),
        native,
        CONFIG.region,
        Provenance("x", ""),
    )
    np.testing.assert_allclose(native_spacing_mm(open_store(root).index), [[5.0, 0.8, 0.7]])


def test_odd_stores_are_drawn(tmp_path: Path) -> None:
    """No label at all, names that matplotlib would take for formulas, more data sets than bars."""
    root = create_store(tmp_path / "a$^$b.zarr", CONFIG.region)
    image, _ = organ_volume((8, 8, 8), tumor=False, seed=0)
    with pytest.raises(ConfigError, match="holds no volume to draw"):
        store_figure(open_store(root))
    for number in range(30):
        grid = ras_grid_at((8, 8, 8))
        write_volume(root, f"$x_{number}$/case", image, None, grid, grid, CONFIG.region, Provenance("x", ""))
    draw_store(open_store(root), tmp_path / "out" / "picture.png")
    assert (tmp_path / "out" / "picture.png").read_bytes()[:4] == b"\x89PNG"
    figure = store_figure(open_store(root))
    assert [t.get_text() for t in figure.axes[4].get_yticklabels()][-1] == "6 more"
    assert figure.axes[3].texts[0].get_text() == "no annotated tumours"


def test_equal_stores_give_equal_bytes(tmp_path: Path) -> None:
    store = make_store(tmp_path, CONFIG, num_annotated=1, num_organs=0, shape_zyx=SHAPE)
    for name in ("1.png", "2.png"):
        draw_store(store, tmp_path / name)
    assert (tmp_path / "1.png").read_bytes() == (tmp_path / "2.png").read_bytes()
