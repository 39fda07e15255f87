"""Losses of the two stages: DiceCE for segmentation, Eq. 2 and Eq. 3 for the generator and the classifier."""

import torch
from monai.losses.dice import DiceCELoss
from torch import nn

REAL, PAINTED = 1, 2  # the classifier's classes; 0 is background and never a target


def segmentation_loss() -> nn.Module:
    """Dice (without background) plus cross entropy, weights 1:1, on softmax: logits [B, C, ...], label uint8 [B, 1, ...]."""
    loss: nn.Module = DiceCELoss(softmax=True, to_onehot_y=True, include_background=False)
    return loss


def tumor_seen_loss(logits: torch.Tensor, mask: torch.Tensor, tumor_values: list[int]) -> torch.Tensor:
    """Eq. 2: mean over M of 1 - p, p = S's softmax probability of the painted organ's tumour class.

    logits: [B, C, z, y, x] of S; mask: uint8 [B, z, y, x]. The mean is taken per sample, then over samples, so that a large tumour does
    not drown a tiny one; samples with an empty mask do not count. The released code pools over the batch and counts all tumour classes.
    """
    probability = torch.softmax(logits, dim=1)[list(range(len(tumor_values))), tumor_values]
    return _mean_inside(1.0 - probability, mask)


def classified_as_loss(logits: torch.Tensor, mask: torch.Tensor, target: int) -> torch.Tensor:
    """L_cls of Eq. 3: cross entropy of C against ``target`` (REAL or PAINTED) on the voxels of ``mask``.

    logits: [B, 3, z, y, x] of C. G minimises it with REAL on painted voxels while C is frozen; C minimises it with the true targets.
    The released code uses linear probabilities in its place (reference 1.6 #8).
    """
    return _mean_inside(-torch.log_softmax(logits, dim=1)[:, target], mask)


def _mean_inside(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    weights = mask.to(values.dtype)
    size = weights.flatten(1).sum(1)
    per_sample = (values * weights).flatten(1).sum(1) / size.clamp(min=1.0)
    used = (size > 0).to(values.dtype)
    return (per_sample * used).sum() / used.sum().clamp(min=1.0)
