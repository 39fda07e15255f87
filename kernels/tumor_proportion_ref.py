"""FreeTumor's Eq. 4, voxel by voxel."""

from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray


def tumor_proportion_ref(predicted: ArrayLike, mask: ArrayLike) -> NDArray[np.float64]:
    """Of the voxels with mask 1, the part with predicted 1; per sample of [B, z, y, x]; 0 for an empty mask."""
    proportions = []
    for predicted_here, mask_here in zip(np.asarray(predicted), np.asarray(mask), strict=True):
        tumor = [bool(p == 1) for p, m in zip(predicted_here.ravel(), mask_here.ravel(), strict=True) if m == 1]
        proportions.append(sum(tumor) / len(tumor) if tumor else 0.0)
    return np.array(proportions)


def tumor_proportion_of_logits_ref(
    logits: ArrayLike, mask: ArrayLike, tumor_classes: Sequence[Collection[int]]
) -> NDArray[np.float64]:
    """The same where ``numpy.argmax`` over the classes of [B, classes, z, y, x] is among the sample's tumour classes."""
    most_probable = np.argmax(np.asarray(logits, dtype=np.float64), axis=1)
    predicted = [np.isin(here, list(classes)) for here, classes in zip(most_probable, tumor_classes, strict=True)]
    return tumor_proportion_ref(np.array(predicted).reshape(most_probable.shape), mask)
