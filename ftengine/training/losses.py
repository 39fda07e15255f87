"""Losses of the two stages: DiceCE for segmentation, Eq. 2 and Eq. 3 for the generator and the classifier."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from monai.losses.dice import DiceCELoss
from torch import nn

REAL, PAINTED = 1, 2  # the classifier's classes; 0 is background and never a target
Form = Literal["paper", "released"]


@dataclass(frozen=True)
class Total:
    """A mean that is not yet divided: its parts can be added up over batches and processes before it is.

    total: sum over the samples (paper) or voxels (released) that count, with gradients. count: how many they are, without.
    """

    total: torch.Tensor
    count: torch.Tensor

    def mean(self) -> torch.Tensor:
        """The mean; 0 where nothing counts."""
        return self.total / self.count.clamp(min=1.0)


def segmentation_loss() -> nn.Module:
    """Dice (without background) plus cross entropy, weights 1:1, on softmax: logits [B, C, ...], label uint8 [B, 1, ...].

    Both are means over samples: Dice is taken for each sample and class, and all samples have equally many voxels. So the mean of this
    loss over equal parts of a batch is its value on the whole batch, and the same holds for gradients.
    """
    loss: nn.Module = DiceCELoss(softmax=True, to_onehot_y=True, include_background=False)
    return loss


def tumor_seen_loss(
    logits: torch.Tensor,
    mask: torch.Tensor,
    tumor_values: Sequence[int],
    *,
    form: Form = "paper",
    all_tumor_values: Sequence[int] = (),
) -> Total:
    """Eq. 2: mean over M of 1 - p, p = S's softmax probability of the painted organ's tumour class.

    logits: [B, C, z, y, x] of S; mask: uint8 [B, z, y, x]; tumor_values: of each sample. The mean is taken per sample, then over
    samples, so that a large tumour does not drown a tiny one; samples with an empty mask do not count. form released: pooled over all
    voxels, p summed over ``all_tumor_values`` (reference 1.6 #7).
    """
    probability = torch.softmax(logits, dim=1)
    if form == "released":
        return _pooled(1.0 - probability[:, list(all_tumor_values)].sum(1), mask)
    return _per_sample(1.0 - probability[list(range(len(tumor_values))), list(tumor_values)], mask)


def classified_as_loss(logits: torch.Tensor, mask: torch.Tensor, target: int, *, form: Form = "paper") -> Total:
    """L_cls of Eq. 3: cross entropy of C against ``target`` (REAL or PAINTED) on the voxels of ``mask``.

    logits: [B, 3, z, y, x] of C. G minimises it with REAL on painted voxels while C is frozen; C minimises it with the true targets.
    form released: 1 - p in place of -log p, pooled over all voxels (reference 1.6 #8).
    """
    if form == "released":
        return _pooled(1.0 - torch.softmax(logits, dim=1)[:, target], mask)
    return _per_sample(-torch.log_softmax(logits, dim=1)[:, target], mask)


def _per_sample(values: torch.Tensor, mask: torch.Tensor) -> Total:
    weights = mask.to(values.dtype)
    size = weights.flatten(1).sum(1)
    means = (values * weights).flatten(1).sum(1) / size.clamp(min=1.0)  # 0 where the mask is empty
    return Total(means.sum(), (size > 0).to(values.dtype).sum())


def _pooled(values: torch.Tensor, mask: torch.Tensor) -> Total:
    weights = mask.to(values.dtype)
    return Total((values * weights).sum(), weights.sum())
