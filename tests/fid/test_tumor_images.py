"""Pictures of tumours: cut where they lie, real and painted ones in the same way."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.ndimage as ndi

from ftengine.assemble import SynthesisStage, build_loader, build_synthesis_stage
from ftengine.config import Config
from ftengine.errors import ConfigError
from ftengine.fid.tumor_images import (
    CropRule,
    PaintedTumors,
    TumorImage,
    painted_tumors,
    patch_around,
    real_tumors,
    square_around,
)
from ftengine.geometry import Box, FloatZYX, IntZYX, int_zyx
from ftengine.store import index
from ftengine.store.reader import Store, open_store
from ftengine.store.writer import Provenance, create_store, write_volume
from ftengine.types import Batch
from tests.support import make_store, ras_grid_at, small_config

NO_CHANGE = {f"augment__{k}_probability": 0.0 for k in ("flip", "rot90", "scale", "shift")}
CONFIG = small_config(**NO_CHANGE, synthesis__synthesizer="constant", synthesis__contrast_factor=(1.0, 1.0), synthesis__edge_sigma_mm=0.0)  # fmt: skip
LOW, HIGH = CONFIG.region.window_hu


def _square(extent: Box, _shape: IntZYX, spacing: FloatZYX) -> Box:
    return square_around(extent, 6.0, spacing)


def test_the_square_is_one_in_mm() -> None:
    extent = Box((4, 10, 20), (3, 5, 4))
    # 20 x 4 mm: a side of 20 + 2 * 7 mm, in voxels of 4 x 1 mm
    assert square_around(extent, 7.0, (5.0, 4.0, 1.0)) == Box((4, 8, 5), (3, 8, 34))
    assert square_around(Box((0, 0, 0), (1, 1, 1)), 0.0, (1.0, 1.0, 1.0)) == Box((0, 0, 0), (1, 1, 1))


def test_the_patch_is_moved_into_the_volume() -> None:
    patch = (16, 16, 16)
    assert patch_around(Box((18, 0, 30), (4, 4, 2)), patch, (40, 40, 32)) == Box((12, 0, 16), patch)
    assert patch_around(Box((1, 1, 1), (2, 2, 2)), patch, (10, 40, 16)) == Box((-3, 0, 0), patch)


def _image(mask: np.ndarray, extent: Box) -> TumorImage:
    box = Box((5, 6, 7), int_zyx(mask.shape))
    place = Box(int_zyx(o + b for o, b in zip(extent.origin_zyx, box.origin_zyx, strict=True)), extent.shape_zyx)
    return TumorImage("c", "liver", 1.0, np.zeros(mask.shape, dtype=np.float32), mask, box, place)


def test_slices_and_what_is_covered() -> None:
    mask = np.zeros((9, 8, 8), dtype=bool)
    mask[2, 3, 3] = mask[3, 3:5, 3:6] = mask[4, 3, 3] = True
    tumor = _image(mask, Box((2, 3, 3), (3, 2, 3)))
    assert tumor.slices("all") == slice(2, 5)
    assert tumor.slices("largest") == slice(3, 4)
    covered = tumor.covered(3.0, (3.0, 1.5, 6.0))  # 1, 2 and 0 voxels (half a voxel is rounded to the even number)
    assert [(int(w.min()), int(w.max()) + 1) for w in np.nonzero(covered)] == [(1, 6), (1, 7), (3, 6)]
    assert covered.sum() == 5 * 6 * 3
    beyond = _image(mask, Box((-2, 0, 0), (20, 3, 3))).covered(0.0, (1.0, 1.0, 1.0))
    assert beyond.sum() == 9 * 3 * 3


@pytest.mark.parametrize(
    ("keys", "text"), [({"slices": "most"}, "all or largest"), ({"margin_mm": -1.0}, "margin_mm=-1")]
)
def test_a_rule_that_is_none(keys: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        CropRule(**keys)


def test_real_tumors_lie_where_they_are(tmp_path: Path) -> None:
    """Voxels that hold their own place: two tumours, one at the border of the volume, and a speck."""
    shape = (40, 44, 48)
    image = np.arange(np.prod(shape), dtype=np.int64).reshape(shape) % 400 - 170
    label = np.ones(shape, dtype=np.uint8)
    label[10:13, 20:24, 30:32] = 2
    label[38:40, 0:3, 45:48] = 2
    label[30, 40, 5] = 2
    root = create_store(tmp_path / "s.zarr", CONFIG.region)
    grid = ras_grid_at(shape)
    write_volume(
        root, "a/v", image.astype(np.int16), label, grid, grid, CONFIG.region, Provenance("t", "", annotation="tumor")
    )
    index.compact_index(root)
    store = open_store(tmp_path / "s.zarr")
    middle, corner = sorted(real_tumors(store, [0], "liver", CONFIG.region, _square), key=lambda t: -int(t.mask.sum()))
    window = np.clip((image - LOW) / (HIGH - LOW), 0, 1)
    # 4 voxels of 3 mm and 6 mm on both ends: 8 voxels
    np.testing.assert_allclose(middle.image, window[10:13, 18:26, 27:35], atol=1e-6)
    assert np.argwhere(middle.mask).min(axis=0).tolist() == [0, 2, 3]
    assert middle.mask.sum() == 24
    assert (middle.box, middle.extent) == (Box((10, 18, 27), (3, 8, 8)), Box((10, 20, 30), (3, 4, 2)))
    assert middle.diameter_mm == pytest.approx((6 / np.pi * 24 * 27) ** (1 / 3))
    assert corner.image.shape == (2, 7, 7)
    np.testing.assert_allclose(corner.image[:, 2:, :5], window[38:, 0:5, 43:], atol=1e-6)
    assert corner.image[:, :2].max() == corner.image[:, :, 5:].max() == 0.0  # air beyond the volume


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(tmp_path_factory.mktemp("images"), CONFIG)


def _painted(config: Config, store: Store) -> list[tuple[Batch, Batch]]:
    chosen = config.with_overrides({"loader.annotated_fraction": 0.0, "loader.positive_fraction": 1.0, "loader.patches_per_epoch": 40})  # fmt: skip
    stage: SynthesisStage = build_synthesis_stage(chosen, None, None, with_gate=False)
    with build_loader(chosen, store) as loader:
        return [(batch, stage(batch)) for batch in loader]


def test_painted_tumors_lie_in_their_volume(store: Store) -> None:
    """Outside the mask the picture is that of the volume, beyond the patch too; inside it is what was painted."""
    num_found = num_cut = num_beyond = 0
    for before, after in _painted(CONFIG, store):
        painted = painted_tumors(store, before, after, CONFIG.region, _square)
        num_cut += len(painted.cut)
        patches = [(r.request.case, r.request.box) for r in after.records]
        for tumor in painted.tumors:
            num_found += 1
            window = _window(store, tumor.case, tumor.box)
            np.testing.assert_allclose(tumor.image[~tumor.mask], window[~tumor.mask], atol=1e-6)
            assert np.all(tumor.image[tumor.mask] < window[tumor.mask])  # the fixed contrast is darker
            assert ndi.label(tumor.mask, structure=np.ones((3, 3, 3)))[1] == 1
            held = np.argwhere(tumor.mask) + tumor.box.origin_zyx
            assert Box(int_zyx(held.min(0)), int_zyx(np.ptp(held, axis=0) + 1)) == tumor.extent
            own = [box for case, box in patches if case == tumor.case and _holds(box, tumor.extent)]
            assert own
            num_beyond += not any(_holds(box, tumor.box) for box in own)
    assert num_found > 5
    assert num_cut > 0
    assert num_beyond > 0


def _window(store: Store, case: str, box: Box) -> np.ndarray:
    hu = store.read(case, box.origin_zyx, box.shape_zyx).image.astype(np.float64)
    return np.clip((hu - LOW) / (HIGH - LOW), 0, 1)


def _holds(outer: Box, inner: Box) -> bool:
    ends = zip(outer.origin_zyx, inner.origin_zyx, inner.end_zyx, outer.end_zyx, strict=True)
    return all(a <= b and c <= d for a, b, c, d in ends)


def test_changed_patches_are_refused(store: Store) -> None:
    flipped = CONFIG.with_overrides({"augment.flip_probability": 1.0})
    painted = _painted(flipped, store)
    before, after = next((b, a) for b, a in painted if any(r.painted for r in a.records))
    with pytest.raises(ConfigError, match="flipped, turned or changed"):
        painted_tumors(store, before, after, CONFIG.region, _square)


def test_only_what_is_wanted_is_read(store: Store) -> None:
    asked: list[tuple[str, float]] = []

    def wants(organ: str, diameter_mm: float) -> bool:
        asked.append((organ, diameter_mm))
        return False

    for before, after in _painted(CONFIG, store):
        painted = painted_tumors(store, before, after, CONFIG.region, _square, wants=wants)
        assert painted == PaintedTumors((), ())
    assert {organ for organ, _ in asked} == {"liver"}
    assert all(d > 0 for _, d in asked)
