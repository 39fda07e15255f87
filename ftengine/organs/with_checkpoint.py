"""Organs by a segmenter that ``ftengine train seg`` made: its sliding window, tumours folded into their organ."""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ftengine import __version__
from ftengine.errors import ConfigError
from ftengine.geometry import FloatZYX
from ftengine.organs.labeler import describe, weights_hash
from ftengine.prediction.infer import check_trained_for, predict_volume
from ftengine.store.reader import Store
from ftengine.training.checkpoint import load_segmenter


class CheckpointLabeler:
    """A segmenter of ours. A predicted tumour counts as its organ: a pseudo label says where organs are and no more."""

    def __init__(self, weights: Path, store: Store, device: torch.device) -> None:
        """Raises ConfigError for a file that is no segmenter, or one of another region, spacing, window or label table."""
        self._network, self._config = load_segmenter(weights)
        self._device = device
        region = self._config.region
        check_trained_for(store, self._config, weights)
        if (region.name, region.window_hu) != (store.region, store.window_hu):
            raise ConfigError(
                f"{weights}: was trained for region {region.name} with window {region.window_hu} HU; {store.location} has region "
                f"{store.region} with {store.window_hu}. Use a checkpoint of this region."
            )
        self._organ_of = np.arange(256, dtype=np.uint8)
        for organ in region.organs.values():
            self._organ_of[organ.tumor] = organ.organ
        names = {value: name for name, value in region.labels.items()}
        label_map = {names[value]: int(self._organ_of[value]) for value in names if value}
        self.provenance = describe(
            "checkpoint", __version__, weights_hash(weights), label_map, self._config.inference.model_dump(mode="json")
        )

    def __call__(self, image_hu: NDArray[np.int16], spacing_mm_zyx: FloatZYX) -> NDArray[np.uint8]:
        """The organs of a volume; the spacing is the store's, for which the network was checked."""
        predicted = predict_volume(self._network, image_hu, self._config, self._device)
        organs: NDArray[np.uint8] = self._organ_of[predicted]
        return organs
