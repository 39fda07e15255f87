"""Shape realistic: volumes of the organ's law, lobes that hang together, millimetres at any spacing, painted inside the organ."""

import math

import numpy as np
import pytest
import scipy.ndimage as ndi
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ftengine.bench.shapes import whole_mask
from ftengine.config import POOLED_SHAPE, Config, RealisticShapeConfig, SynthesisConfig
from ftengine.evaluation.shape_measures import measure_shape
from ftengine.synthesis.engine import Address, Synthesizer
from ftengine.synthesis.shape import TumorDraw, draw_patch, shape_law, size_class_of, union_volume

REGION = Config.preset("abdomen").region
CONFIG = SynthesisConfig(shape="realistic")
MM = (1.0, 1.0, 1.0)


def _draw(
    index: int, organ: str = "kidney", config: SynthesisConfig = CONFIG, spacing: tuple[float, float, float] = MM
) -> TumorDraw:
    found = draw_patch([organ], config, spacing, seed=4, epoch=1, index=index)
    assert found is not None
    return found.tumors[0]


def _law(**changes: object) -> SynthesisConfig:
    """A configuration whose kidney has the shipped law with some fields changed."""
    law = CONFIG.realistic_shapes["kidney"].model_dump() | changes
    return SynthesisConfig.model_validate({"shape": "realistic", "realistic_shapes": {"kidney": law}})


def _drawn_radius_mm(tumor: TumorDraw, spacing: tuple[float, float, float] = MM) -> float:
    centers = np.array([e.offset_vox_zyx for e in tumor.ellipsoids]) * spacing
    radii = np.array([e.radii_vox_zyx for e in tumor.ellipsoids]) * spacing
    return (3 * union_volume(centers, radii) / (4 * math.pi)) ** (1 / 3)


@given(st.integers(0, 2**40), st.sampled_from(["kidney", "pancreas", "liver"]))
@settings(max_examples=30, deadline=None)
def test_a_draw_is_a_function_of_its_address(index: int, organ: str) -> None:
    assert repr(_draw(index, organ)) == repr(_draw(index, organ))
    assert repr(_draw(index, organ)) != repr(_draw(index + 1, organ))


@given(st.integers(0, 10_000), st.floats(0.5, 3), st.floats(0.5, 3), st.floats(0.5, 5))
@settings(max_examples=40, deadline=None)
def test_a_tumor_has_the_same_millimetres_at_any_spacing(index: int, x: float, y: float, z: float) -> None:
    at_one, other = _draw(index), _draw(index, spacing=(z, y, x))
    assert other.size_class == at_one.size_class
    assert len(other.lobes) == len(at_one.lobes)
    for a, b in zip(at_one.ellipsoids, other.ellipsoids, strict=True):
        np.testing.assert_allclose(np.array(b.radii_vox_zyx) * (z, y, x), a.radii_vox_zyx)
        # centres lie on voxels: each is off by at most half a voxel
        offset_mm = np.array(b.offset_vox_zyx) * (z, y, x)
        assert np.all(np.abs(offset_mm - a.offset_vox_zyx) <= (np.array((z, y, x)) + 1) / 2 + 1e-9)
        spacing_of = {0: x, 1: y, 2: z}
        for plane, axes in enumerate(((0, 1), (1, 2), (0, 2))):
            for component, axis in enumerate(axes):
                np.testing.assert_allclose(b.warp[plane, component] * spacing_of[axis], a.warp[plane, component])


def test_volumes_follow_the_organs_law() -> None:
    for organ in ("kidney", "pancreas"):
        law = shape_law(organ, CONFIG)
        radii = np.array([_drawn_radius_mm(_draw(i, organ)) for i in range(400)])
        logs = np.log(4 / 3 * math.pi * radii**3 / 1000)
        # the standard error of a normal median is 1.25 sigma / sqrt(n); offsets on whole voxels move a volume by a few percent
        assert abs(np.median(logs) - math.log(law.volume_ml)) < 4 * 1.25 * law.volume_log_sigma / 20 + 0.05
        assert abs(logs.std() - law.volume_log_sigma) < 0.2 * law.volume_log_sigma
        low, high = np.log(law.volume_range_ml)
        assert low - 0.25 < logs.min() < logs.max() < high + 0.25


def test_a_law_without_spread_draws_its_volume_and_its_mask_has_it() -> None:
    config = _law(volume_ml=30.0, volume_range_ml=(30.0, 30.0), volume_log_sigma=0.0, warp_sigma=(0.0, 0.0))
    for index in range(10):
        tumor = _draw(index, config=config)
        assert tumor.size_class == "medium"  # a ball of 19.3 mm
        # the grid of the union counts within 2 %, voxels of 1 mm and centres on voxels add theirs
        assert whole_mask(tumor).sum() / 1000 == pytest.approx(30.0, rel=0.06)


def test_no_lobes_and_no_warp_is_an_ellipsoid() -> None:
    config = _law(lobes=0.0, warp_sigma=(0.0, 0.0), volume_ml=30.0, volume_range_ml=(30.0, 30.0))
    for index in range(5):
        tumor = _draw(index, config=config)
        assert tumor.lobes == ()
        assert measure_shape(whole_mask(tumor).astype(bool), MM).roughness == pytest.approx(0, abs=0.03)


def test_the_number_of_lobes_grows_with_the_radius() -> None:
    means = []
    for volume in (4 / 3 * math.pi * 10**3 / 1000, 4 / 3 * math.pi * 40**3 / 1000):
        config = _law(lobes=3.0, lobes_power=1.0, volume_ml=volume, volume_range_ml=(volume, volume))
        means.append(np.mean([len(_draw(i, config=config).lobes) for i in range(300)]))
    # Poisson means of 1.5 and 6, within 4 standard errors
    assert means[0] == pytest.approx(1.5, abs=4 * math.sqrt(1.5 / 300))
    assert means[1] == pytest.approx(6.0, abs=4 * math.sqrt(6.0 / 300))


@pytest.mark.parametrize("organ", ["kidney", "pancreas", "lung"])
def test_nearly_all_tumors_hang_together(organ: str) -> None:
    whole = 0
    for index in range(60):
        mask = whole_mask(_draw(index, organ, spacing=(3.0, 3.0, 3.0)))
        components, count = ndi.label(mask, np.ones((3, 3, 3)))
        whole += count > 0 and int(np.bincount(components.ravel())[1:].max()) > 0.95 * int(mask.sum())
    assert whole >= 54


def test_an_organ_without_a_law_has_the_pooled_one() -> None:
    assert shape_law("spleen", CONFIG) == CONFIG.realistic_shapes[POOLED_SHAPE]
    assert shape_law("kidney", CONFIG) != shape_law("spleen", CONFIG)
    assert repr(_draw(3, "spleen")) == repr(_draw(3, "liver"))


def test_the_size_class_is_that_of_the_drawn_volume() -> None:
    for index in range(60):
        tumor = _draw(index)
        radius = _drawn_radius_mm(tumor)
        near = {size_class_of(radius * factor, CONFIG.sizes) for factor in (0.97, 1.03)}
        assert tumor.size_class in near


def test_size_classes_meet_half_way() -> None:
    sizes = CONFIG.sizes
    radii = (1.0, 8.2, 8.3, 16.4, 16.6, 32.9, 33.1, 500.0)
    assert [size_class_of(r, sizes) for r in radii] == [
        "tiny", "tiny", "small", "small", "medium", "medium", "large", "large",
    ]  # fmt: skip
    assert size_class_of(3.0, {"only": sizes["large"]}) == "only"


@pytest.mark.parametrize("centers", [[[0, 0, 0]], [[0, 0, 0], [0, 0, 0]], [[0, 0, 0], [0, 0, 9]]])
def test_the_volume_of_a_union_is_counted_within_2_percent(centers: list[list[float]]) -> None:
    radii = np.tile([3.0, 4.0, 4.5], (len(centers), 1))
    wanted = 4 / 3 * math.pi * 3 * 4 * 4.5 * len(np.unique(centers, axis=0))  # apart, or the same
    assert union_volume(np.array(centers, dtype=float), radii) == pytest.approx(wanted, rel=0.02)


def _label() -> torch.Tensor:
    label = torch.zeros((4, 1, 40, 44, 48), dtype=torch.uint8)
    label[:2, 0, 2:38, 2:42, 2:46] = 5
    label[2, 0, 10:30, 20:23, 20:23] = 3
    label[3, 0, 2:38, 2:42, 2:46] = 1
    return label


def test_the_mask_is_the_union_of_all_ellipsoids_inside_the_organ() -> None:
    config = CONFIG.model_copy(update={"num_tumors": 2})
    synthesizer = Synthesizer(REGION, config, seed=9)
    label = _label()
    placement = synthesizer.place(label, synthesizer.draw(label, [Address(0, i) for i in range(4)]))
    assert any(t.lobes for d in placement.draws for t in d.tumors)
    for row, (draw, centers) in enumerate(zip(placement.draws, placement.centers.numpy(), strict=True)):
        wanted = np.zeros(label.shape[2:], dtype=bool)
        for tumor, center in zip(draw.tumors, centers, strict=True):
            mask = whole_mask(tumor)
            low = [int(n) for n in center - _tumor_center(tumor)]
            for z, y, x in np.argwhere(mask) + low:
                if 0 <= z < 40 and 0 <= y < 44 and 0 <= x < 48:
                    wanted[z, y, x] = True
        wanted &= placement.organ[row].numpy().astype(bool)
        np.testing.assert_array_equal(placement.mask[row].numpy().astype(bool), wanted)
        assert wanted.any()


def _tumor_center(tumor: TumorDraw) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    """Where ``whole_mask`` has the tumour's centre."""
    low = [np.array(e.offset_vox_zyx) - np.ceil(2 * np.array(e.radii_vox_zyx)).astype(int) for e in tumor.ellipsoids]
    return 1 - np.min(low, axis=0)


def test_a_batch_paints_what_its_members_paint_one_by_one() -> None:
    image, label = torch.full((4, 1, 40, 44, 48), 0.6), _label()
    synthesizer = Synthesizer(REGION, CONFIG, seed=9)
    addresses = [Address(0, i) for i in range(4)]
    whole = synthesizer.paint(image, label, addresses)
    assert all(p is not None and p.passed for p in whole.records())
    assert torch.equal(whole.image[whole.mask == 0], image[whole.mask == 0])
    for row in range(4):
        alone = synthesizer.paint(image[row : row + 1], label[row : row + 1], addresses[row : row + 1])
        assert torch.equal(alone.mask[0], whole.mask[row])


def test_a_law_is_checked() -> None:
    law = CONFIG.realistic_shapes["kidney"].model_dump()
    for changes, says in (
        ({"lobe_radius": (0.0, 0.5)}, "want 0 < low <= high"),
        ({"warp_sigma": (0.3, 0.1)}, "want 0 <= low <= high"),
        ({"volume_ml": 1e6}, "a median inside"),
        ({"axis_log_sigma_zyx": (-0.1, 0.1, 0.1)}, "at least 0"),
    ):
        with pytest.raises(ValueError, match=says):
            RealisticShapeConfig.model_validate(law | changes)
