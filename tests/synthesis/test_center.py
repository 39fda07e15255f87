"""The margin is in millimetres; the released law. ``choose_center`` itself: tests/kernels/test_choose_center.py."""

import numpy as np
import torch

from ftengine.kernels import choose_center
from ftengine.synthesis.center import choose_center_released, margin_vox


def test_whole_voxels_of_a_margin() -> None:
    assert margin_vox(5.0, (5.0, 1.25, 2.0)) == (1, 4, 2)
    assert margin_vox(4.99, (5.0, 1.25, 2.0)) == (0, 3, 2)
    assert margin_vox(0.0, (5.0, 1.25, 2.0)) == (0, 0, 0)


def test_the_margin_is_in_millimetres_on_each_axis() -> None:
    organ = torch.zeros((1, 9, 21, 21), dtype=torch.bool)
    organ[0, 2:7, 5:16, 5:16] = True
    centers = choose_center(organ, margin_vox(5.0, (5.0, 1.25, 1.25)), np.linspace(0, 0.999, 50)[None])[0].tolist()
    assert len(centers) == 50
    for z, y, x in centers:
        assert 3 <= z <= 5
        assert 9 <= y <= 11
        assert 9 <= x <= 11


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
