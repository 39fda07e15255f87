"""CutMix cuts image and label alike, by the batch's address; the released bug would be seen (reference 2.1 #7)."""

from dataclasses import replace
from itertools import count

import numpy as np
import pytest
import torch

from ftengine.config import Config
from ftengine.errors import ConfigError
from ftengine.training.cutmix import Cut, cutmix, draw_cut
from ftengine.types import Batch
from tests.training.support import hand_made

NUM_BATCHES = 300


def _batch(index: int, size: int = 4) -> Batch:
    """The label says which voxels of the image are above a half: it does so after CutMix too, if both are cut alike."""
    image = torch.rand((size, 1, 4, 20, 30), generator=torch.Generator().manual_seed(index))
    return hand_made(image, (image > 0.5).to(torch.uint8), first_index=size * index)


def _check_labels_fit_their_images() -> None:
    for index in range(NUM_BATCHES):
        mixed = cutmix(_batch(index), seed=3, probability=1.0)
        assert torch.equal(mixed.label.bool(), mixed.image > 0.5)


def test_image_and_label_are_cut_alike() -> None:
    _check_labels_fit_their_images()


def test_the_released_bug_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """There the axis is tossed anew for the label."""
    whole, calls = Cut.apply, count()

    def own_axis(cut: Cut, values: torch.Tensor) -> torch.Tensor:
        axis = (3, 4)[next(calls) % 2]
        return whole(replace(cut, axis=axis, own=min(cut.own, values.shape[axis])), values)

    monkeypatch.setattr(Cut, "apply", own_axis)
    with pytest.raises(AssertionError):
        _check_labels_fit_their_images()


def test_each_patch_keeps_its_first_slices_and_gets_the_rest_from_its_partner() -> None:
    batch = _batch(0)
    order = np.array([2, 0, 1, 3])
    mixed = Cut(axis=3, own=7, order=order).apply(batch.image)
    for row, partner in enumerate(order):
        assert torch.equal(mixed[row, :, :, :7], batch.image[row, :, :, :7])
        assert torch.equal(mixed[row, :, :, 7:], batch.image[partner, :, :, 7:])
    assert torch.equal(Cut(axis=4, own=0, order=order).apply(batch.image), batch.image[order.tolist()])
    assert torch.equal(Cut(axis=4, own=30, order=order).apply(batch.image), batch.image)


def test_the_cut_follows_from_the_address_alone() -> None:
    batch = _batch(5)
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002 - the global state that must not matter
    first = cutmix(batch, seed=3, probability=1.0)
    again = cutmix(batch, seed=3, probability=1.0)
    assert torch.equal(first.image, again.image)
    cuts = [draw_cut(_batch(n), seed=3, probability=1.0) for n in range(40)]
    assert len({(c.axis, c.own, tuple(c.order)) for c in cuts if c is not None}) > 30
    assert draw_cut(batch, seed=4, probability=1.0) != draw_cut(batch, seed=3, probability=1.0)


def test_axis_share_and_probability_are_those_asked_for() -> None:
    cuts = [draw_cut(_batch(n), seed=0, probability=0.4) for n in range(NUM_BATCHES)]
    drawn = [c for c in cuts if c is not None]
    # 300 draws: four deviations of a binomial
    assert abs(len(drawn) - 0.4 * NUM_BATCHES) < 4 * (NUM_BATCHES * 0.4 * 0.6) ** 0.5
    assert abs(sum(c.axis == 3 for c in drawn) - len(drawn) / 2) < 2 * len(drawn) ** 0.5
    # Beta(.2, .2) puts P(x < 1/30) = .268 on whole patches of the partner (30 slices), by the regularised incomplete beta function
    certain = [draw_cut(_batch(n), seed=1, probability=1.0) for n in range(NUM_BATCHES)]
    along_x = [c.own for c in certain if c is not None and c.axis == 4]
    share = sum(own == 0 for own in along_x) / len(along_x)
    assert abs(share - 0.268) < 4 * (0.268 * 0.732 / len(along_x)) ** 0.5


def test_off_by_default_and_without_a_partner_refused() -> None:
    batch = _batch(0)
    assert cutmix(batch, seed=0, probability=0.0) is batch
    assert Config.preset("abdomen").training.cutmix_probability == 0
    with pytest.raises(ConfigError, match="a patch has no partner"):
        Config.preset("abdomen").with_overrides({"training.cutmix_probability": 1.0, "training.batch_size": 1})
