"""Predict whole volumes by sliding windows: what validation, evaluation, pseudo labels and ``ftengine predict`` have in common."""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ftengine.config import Config
from ftengine.errors import ConfigError
from ftengine.prediction.sliding_windows import OnWindows, slabs_of
from ftengine.store.reader import Store


def check_trained_for(store: Store, config: Config, checkpoint: str | Path) -> None:
    """ConfigError where a checkpoint's ``config`` has other labels or another spacing than the store."""
    if store.labels != config.region.labels or store.spacing_mm_zyx != config.region.spacing_mm_zyx:
        raise ConfigError(
            f"{checkpoint}: was trained for labels {config.region.labels} at {config.region.spacing_mm_zyx} mm; {store.location} has "
            f"{store.labels} at {store.spacing_mm_zyx} mm. Use it on a store of the same region."
        )


def predict_volume(
    network: nn.Module,
    image_hu: NDArray[np.int16],
    config: Config,
    device: torch.device,
    *,
    case: str = "volume",
    on_windows: OnWindows = lambda _done, _total: None,
) -> NDArray[np.uint8]:
    """Label map uint8 [z, y, x] of a volume int16 HU [z, y, x] that is RAS+ at the region's spacing.

    Sliding windows of the patch size with ``config.inference`` (``sliding_windows.slabs_of``); the class of the highest mean score.
    case: its name in errors. Raises CaseError where scores are NaN or infinite, MemoryLimitError where a call does not fit the device.
    """
    labels = np.empty(image_hu.shape, dtype=np.uint8)
    for slab in slabs_of(image_hu, network, config, device, case=case, on_windows=on_windows):
        finished = slab.labels
        labels[slab.first_z : slab.first_z + len(finished)] = finished
    return labels
