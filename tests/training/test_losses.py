"""Eq. 2 and L_cls of Eq. 3 against float64 numpy, per sample."""

import numpy as np
import torch
from numpy.typing import NDArray

from ftengine.training.losses import PAINTED, REAL, classified_as_loss, segmentation_loss, tumor_seen_loss


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
