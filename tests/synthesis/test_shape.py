"""What is drawn: a function of the address, in millimetres, by the configured weights."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftengine.config import Config, SynthesisConfig
from ftengine.synthesis.shape import PatchDraw, count_labels, draw_patch, organs_in_patch

REGION = Config.preset("abdomen").region
CONFIG = SynthesisConfig()


def _draw(
    index: int,
    config: SynthesisConfig = CONFIG,
    *,
    spacing: tuple[float, float, float] = (1.5, 1.5, 1.5),
    draw: int = 0,
) -> PatchDraw:
    found = draw_patch(["liver", "kidney"], config, spacing, seed=1, epoch=2, index=index, draw=draw)
    assert found is not None
    return found


def _same(a: PatchDraw, b: PatchDraw) -> bool:
    return repr(a) == repr(b)


@given(st.integers(0, 10_000))
@settings(max_examples=30)
def test_a_draw_is_a_function_of_its_address(index: int) -> None:
    assert _same(_draw(index), _draw(index))
    assert not _same(_draw(index), _draw(index + 1))


def test_a_redraw_keeps_the_organ_and_changes_the_tumor() -> None:
    for index in range(20):
        first, second = _draw(index), _draw(index, draw=1)
        assert first.organ == second.organ
        assert first.tumors[0].radii_vox_zyx != second.tumors[0].radii_vox_zyx


@given(st.integers(0, 10_000), st.floats(0.5, 3), st.floats(0.5, 3), st.floats(0.5, 5))
@settings(max_examples=40)
def test_a_tumor_has_the_same_millimetres_at_any_spacing(index: int, x: float, y: float, z: float) -> None:
    at_one, other = _draw(index, spacing=(1, 1, 1)).tumors[0], _draw(index, spacing=(z, y, x)).tumors[0]
    np.testing.assert_allclose(np.array(other.radii_vox_zyx) * (z, y, x), at_one.radii_vox_zyx)
    spacing_of = {0: x, 1: y, 2: z}
    for plane, axes in enumerate(((0, 1), (1, 2), (0, 2))):
        for component, axis in enumerate(axes):
            np.testing.assert_allclose(other.warp[plane, component] * spacing_of[axis], at_one.warp[plane, component])


def test_sizes_follow_weights_and_ranges() -> None:
    config = CONFIG.model_copy(update={"size_weights": {"tiny": 1.0, "large": 3.0}})
    drawn = [_draw(i, config).tumors[0] for i in range(800)]
    assert abs(np.mean([t.size_class == "large" for t in drawn]) - 0.75) < 4 * np.sqrt(0.75 * 0.25 / 800)
    for tumor in drawn:
        low, high = config.sizes[tumor.size_class].radius_mm
        assert all(low / 1.5 <= r <= high / 1.5 for r in tumor.radii_vox_zyx)


def test_the_released_variant_draws_whole_voxels() -> None:
    config = CONFIG.model_copy(update={"variant": "released"})
    drawn = [_draw(i, config, spacing=(5.0, 1.25, 1.25)).tumors[0] for i in range(300)]
    for tumor in drawn:
        low, high = {"tiny": (3, 5), "small": (6, 10), "medium": (12, 20), "large": (24, 40)}[tumor.size_class]
        assert all(r == int(r) and low <= r <= high for r in tumor.radii_vox_zyx)


@pytest.mark.parametrize("fraction", [0.0, 0.3, 1.0])
def test_the_asked_fraction_is_painted(fraction: float) -> None:
    config = CONFIG.model_copy(update={"fraction": fraction})
    drawn = [draw_patch(["liver"], config, (1.5, 1.5, 1.5), seed=0, epoch=0, index=i) for i in range(600)]
    assert abs(np.mean([d is not None for d in drawn]) - fraction) <= 4 * np.sqrt(fraction * (1 - fraction) / 600)


def test_several_tumors_and_all_organs_are_drawn() -> None:
    config = CONFIG.model_copy(update={"num_tumors": 3})
    drawn = [_draw(i, config) for i in range(60)]
    assert all(len(d.tumors) == 3 for d in drawn)
    assert {d.organ for d in drawn} == {"liver", "kidney"}


def test_eligible_is_an_organ_without_any_tumor() -> None:
    label = np.zeros((8, 8, 8), dtype=np.uint8)
    assert organs_in_patch(count_labels(label), REGION, 1) == []
    label[0] = 1
    label[1, 0] = 5
    assert organs_in_patch(count_labels(label), REGION, 1) == ["liver", "kidney"]
    assert organs_in_patch(count_labels(label), REGION, 9) == ["liver"]
    label[7, 7, 7] = 4  # a pancreas tumour somewhere in the patch
    assert organs_in_patch(count_labels(label), REGION, 1) == []
    assert draw_patch([], CONFIG, (1.5, 1.5, 1.5), seed=0, epoch=0, index=0) is None
