"""Centres lie in the eroded organ, or in the organ where it is too thin."""

import numpy as np
import scipy.ndimage as ndi
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ftengine.synthesis.center import choose_center, choose_center_released

ORGANS = st.tuples(st.integers(0, 2**32), st.floats(0.02, 0.9), st.tuples(*(st.integers(3, 14),) * 3))


def _organ(case: tuple[int, float, tuple[int, int, int]]) -> NDArray[np.bool_]:
    seed, level, shape = case
    smooth = ndi.gaussian_filter(np.random.default_rng(seed).random(shape), 1.5)
    organ = smooth >= np.quantile(smooth, level)
    return np.asarray(organ)


@given(case=ORGANS, draw=st.floats(0, 1, exclude_max=True), margin=st.integers(0, 3))
@settings(max_examples=100, deadline=None)
def test_center_is_a_voxel_of_the_eroded_organ(
    case: tuple[int, float, tuple[int, int, int]], draw: float, margin: int
) -> None:
    organ = _organ(case)
    eroded = ndi.binary_erosion(organ, np.ones((2 * margin + 1,) * 3, dtype=bool), border_value=1) if margin else organ
    center = choose_center(organ, margin * 1.5, (1.5, 1.5, 1.5), draw)
    assert organ[center]
    if eroded.any():
        assert eroded[center]


def test_every_voxel_of_the_eroded_organ_is_drawn_equally_often() -> None:
    organ = np.zeros((9, 9, 9), dtype=bool)
    organ[2:7, 2:7, 2:7] = True
    centers = [choose_center(organ, 1.0, (1.0, 1.0, 1.0), (i + 0.5) / 27) for i in range(27)]
    assert sorted(centers) == [(z, y, x) for z in (3, 4, 5) for y in (3, 4, 5) for x in (3, 4, 5)]


def test_the_margin_is_in_millimetres_on_each_axis() -> None:
    organ = np.zeros((9, 21, 21), dtype=bool)
    organ[2:7, 5:16, 5:16] = True
    for draw in np.linspace(0, 0.999, 50):
        z, y, x = choose_center(organ, 5.0, (5.0, 1.25, 1.25), float(draw))
        assert 3 <= z <= 5
        assert 9 <= y <= 11
        assert 9 <= x <= 11


def test_a_thin_organ_uses_its_own_voxels() -> None:
    organ = np.zeros((5, 5, 5), dtype=bool)
    organ[2, 2, 1:4] = True
    assert {choose_center(organ, 3.0, (1.0, 1.0, 1.0), d) for d in (0.0, 0.4, 0.9)} == {(2, 2, 1), (2, 2, 2), (2, 2, 3)}


def test_the_released_law_stays_in_the_middle_and_falls_back_to_zero() -> None:
    organ = np.zeros((30, 20, 20), dtype=bool)
    organ[5:26, 4:16, 4:16] = True
    for a in np.linspace(0, 0.99, 7):
        z, y, x = choose_center_released(organ, (float(a), 0.5))
        assert 5 + 0.3 * 20 - 0.5 <= z <= 5 + 0.7 * 20 + 0.5
        assert organ[z, y - 2 : y + 3, x - 2 : x + 3].all()
    thin = np.zeros_like(organ)
    thin[5:26, 4:7, 4:7] = True
    assert choose_center_released(thin, (0.5, 0.5)) == (0, 0, 0)
    assert choose_center_released(np.zeros_like(organ), (0.5, 0.5)) == (0, 0, 0)
