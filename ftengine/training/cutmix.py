"""CutMix over the patches of a batch (off by default; the released code always does it).

The released code tosses the coin for the axis once for the image and once more for the label, so that in a third of its batches the two
are cut along different axes (reference 2.1 #7). Here one draw decides for both.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ftengine.rng import Purpose, patch_rng
from ftengine.types import Batch

BETA = 0.2  # both parameters of the Beta distribution (released)
_AXES = (3, 4)  # y and x of [B, 1, z, y, x]


@dataclass(frozen=True)
class Cut:
    """What is drawn for a batch: along ``axis`` of [B, 1, z, y, x] patch i keeps its first ``own`` slices, the rest come from ``order[i]``."""

    axis: int
    own: int
    order: NDArray[np.int64]

    def apply(self, values: torch.Tensor) -> torch.Tensor:
        """A new tensor [B, 1, z, y, x], cut and joined."""
        own, other = values.narrow(self.axis, 0, self.own), values[self.order.tolist()]
        rest = other.narrow(self.axis, self.own, values.shape[self.axis] - self.own)
        return torch.cat([own, rest], dim=self.axis)


def draw_cut(batch: Batch, *, seed: int, probability: float) -> Cut | None:
    """The cut of a batch, a function of the address of its first patch; None where it stays as it is.

    own = floor(Beta(.2, .2) * size) slices along y or x, by a coin.
    """
    if probability == 0.0:
        return None
    request = batch.records[0].request
    rng = patch_rng(seed, Purpose.CUTMIX, epoch=request.epoch, index=request.index)
    if rng.random() >= probability:
        return None
    axis = _AXES[int(rng.integers(len(_AXES)))]
    own = int(rng.beta(BETA, BETA) * batch.image.shape[axis])
    return Cut(axis, own, rng.permutation(len(batch.image)))


def cutmix(batch: Batch, *, seed: int, probability: float) -> Batch:
    """The batch with its patches cut and joined, image and label alike. Partners are patches of the same batch, so of the same process."""
    cut = draw_cut(batch, seed=seed, probability=probability)
    return batch if cut is None else Batch(cut.apply(batch.image), cut.apply(batch.label), batch.records)
