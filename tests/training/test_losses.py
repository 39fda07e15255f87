"""Eq. 2 to Eq. 5: against float64 numpy, and by hand."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ftengine.config import QualityConfig
from ftengine.quality.judge import SegmenterJudge
from ftengine.training.losses import PAINTED, REAL, classified_as_loss, segmentation_loss, tumor_seen_loss
from tests.support import small_config


def _softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    e = np.exp(logits - logits.max(1, keepdims=True))
    return np.asarray(e / e.sum(1, keepdims=True))


def _case() -> tuple[NDArray[np.float64], NDArray[np.uint8]]:
    rng = np.random.default_rng(0)
    mask = (rng.random((3, 4, 5, 6)) < 0.3).astype(np.uint8)
    mask[2] = 0  # nothing painted there
    return rng.normal(0, 2, (3, 7, 4, 5, 6)), mask


def test_eq_2_is_the_mean_over_m_per_sample() -> None:
    logits, mask = _case()
    p = _softmax(logits)
    expected = np.mean([(1 - p[i, value])[mask[i] == 1].mean() for i, value in enumerate((2, 6))])
    ours = tumor_seen_loss(torch.from_numpy(logits), torch.from_numpy(mask), [2, 6, 4]).mean()
    np.testing.assert_allclose(float(ours), expected, rtol=1e-12)


def test_eq_2_is_zero_when_everything_is_seen_and_has_no_gradient_outside_m() -> None:
    mask = torch.zeros((1, 2, 2, 2), dtype=torch.uint8)
    mask[0, 0] = 1
    logits = torch.zeros((1, 3, 2, 2, 2), requires_grad=True)
    loss = tumor_seen_loss(logits, mask, [2]).mean()
    loss.backward()
    assert abs(float(loss.detach()) - 2 / 3) < 4 * np.finfo(np.float32).eps
    assert logits.grad is not None
    assert (logits.grad[0, :, 1] == 0).all()
    sure = torch.zeros((1, 3, 2, 2, 2))
    sure[:, 2] = 100
    assert float(tumor_seen_loss(sure, mask, [2]).mean()) == 0


def test_l_cls_is_the_cross_entropy_on_the_mask() -> None:
    logits, mask = _case()
    logits = logits[:, :3]
    for target in (REAL, PAINTED):
        expected = np.mean([-np.log(_softmax(logits)[i, target])[mask[i] == 1].mean() for i in range(2)])
        ours = classified_as_loss(torch.from_numpy(logits), torch.from_numpy(mask), target).mean()
        np.testing.assert_allclose(float(ours), expected, rtol=1e-12)


def test_an_empty_mask_gives_zero_not_nan() -> None:
    logits = torch.randn((2, 3, 2, 2, 2), generator=torch.Generator().manual_seed(0))
    assert float(classified_as_loss(logits, torch.zeros((2, 2, 2, 2), dtype=torch.uint8), REAL).mean()) == 0


def test_segmentation_loss_falls_for_the_right_answer() -> None:
    label = torch.zeros((1, 1, 4, 4, 4), dtype=torch.uint8)
    label[..., 2:] = 1
    right = torch.nn.functional.one_hot(label[:, 0].long(), 3).movedim(-1, 1).float() * 20
    wrong = right.flip(-1)
    loss = segmentation_loss()
    assert float(loss(right, label)) < 0.35  # the class that is not there keeps its smooth Dice term
    assert float(loss(wrong, label)) > 5


# ---- by hand: S gives p = 0.8 or 0.5 for the tumour, over two samples with masks of one and three voxels


def _by_hand() -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax probabilities of class 2 of three: sample 0 has .8 on its one voxel, sample 1 has .5, .5 and .8 on its three."""
    probability = torch.tensor([[0.1, 0.1, 0.8], [0.25, 0.25, 0.5]])
    voxels = torch.stack([probability[[0, 1, 1, 1]], probability[[1, 1, 0, 1]]])  # [B, 4, classes]
    mask = torch.tensor([[1, 0, 0, 0], [1, 1, 1, 0]], dtype=torch.uint8)
    return voxels.log().movedim(-1, 1).reshape(2, 3, 1, 1, 4), mask.reshape(2, 1, 1, 4)


def test_eq_2_by_hand() -> None:
    logits, mask = _by_hand()
    total = tumor_seen_loss(logits, mask, [2, 2])
    # sample 0: 1 - .8 = .2; sample 1: (.5 + .5 + .2) / 3 = .4
    torch.testing.assert_close(total.total, torch.tensor(0.2 + 0.4))
    torch.testing.assert_close(total.mean(), torch.tensor(0.3))
    pooled = tumor_seen_loss(logits, mask, [2, 2], form="released", all_tumor_values=[2])
    # over the four voxels: (.2 + .5 + .5 + .2) / 4
    torch.testing.assert_close(pooled.mean(), torch.tensor(1.4 / 4))
    any_tumor = tumor_seen_loss(logits, mask, [2, 2], form="released", all_tumor_values=[1, 2])
    # .9, .75, .75, .9 in place of .8, .5, .5, .8
    torch.testing.assert_close(any_tumor.mean(), torch.tensor((0.1 + 0.25 + 0.25 + 0.1) / 4))


def test_l_cls_of_eq_3_by_hand() -> None:
    logits, mask = _by_hand()
    of_paint = classified_as_loss(logits, mask, PAINTED).mean()
    expected = (-np.log(0.8) + (-2 * np.log(0.5) - np.log(0.8)) / 3) / 2
    torch.testing.assert_close(of_paint, torch.tensor(expected, dtype=torch.float32))
    as_real = classified_as_loss(logits, mask, REAL).mean()  # .1; .25, .25, .1
    expected = (-np.log(0.1) + (-2 * np.log(0.25) - np.log(0.1)) / 3) / 2
    torch.testing.assert_close(as_real, torch.tensor(expected, dtype=torch.float32))
    linear = classified_as_loss(logits, mask, REAL, form="released").mean()
    torch.testing.assert_close(linear, torch.tensor((0.9 + 0.75 + 0.75 + 0.9) / 4))


def test_totals_add_up_over_parts_of_any_size() -> None:
    logits, mask = (torch.from_numpy(a) for a in _case())
    for form in ("paper", "released"):
        whole = tumor_seen_loss(logits, mask, [2, 6, 4], form=form, all_tumor_values=[2, 4, 6])
        parts = [
            tumor_seen_loss(logits[a:b], mask[a:b], [2, 6, 4][a:b], form=form, all_tumor_values=[2, 4, 6])
            for a, b in ((0, 1), (1, 3))
        ]
        torch.testing.assert_close(sum(p.total for p in parts), whole.total)
        torch.testing.assert_close(sum(p.count for p in parts), whole.count)


def test_eq_4_and_eq_5_by_hand() -> None:
    """P is the share of M that S takes for that tumour; P >= T passes, with equality."""
    logits, mask = _by_hand()
    region = small_config().region
    for threshold, passed in ((0.5, [True, True]), (1.0, [True, True]), (None, [True, True])):
        judge = SegmenterJudge(lambda x: x, QualityConfig(threshold=threshold), region)
        proportion, verdict = judge.verdict(logits, mask, [2, 2])
        assert proportion.tolist() == [1.0, 1.0]  # class 2 is the most probable everywhere
        assert verdict.tolist() == passed
    logits[1, 1, 0, 0, :2] = 5.0  # on two voxels of the three of sample 1 S says liver
    for threshold, passed in ((1 / 3, [True, True]), (0.34, [True, False])):
        judge = SegmenterJudge(lambda x: x, QualityConfig(threshold=threshold), region)
        proportion, verdict = judge.verdict(logits, mask, [2, 2])
        assert proportion.tolist() == pytest.approx([1.0, 1 / 3])
        assert verdict.tolist() == passed
