"""Lungs by lungmask (Hofmanninger et al. 2020): a 2-D U-Net that goes through axial slices.

Weights by path (``unet_r231-d5d2fc3d.pth`` and its siblings, from the project's releases); nothing is downloaded. Written for and tested with
lungmask 0.2.22.
"""

import logging
import warnings
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ftengine.errors import ConfigError
from ftengine.geometry import FloatZYX
from ftengine.organs.labeler import class_values, describe, missing_package, weights_hash
from ftengine.store.reader import Store


class LungmaskLabeler:
    """lungmask with one set of weights; both lungs, or all lobes, become ``lung``."""

    def __init__(self, weights: Path, store: Store, device: torch.device) -> None:
        """Raises ConfigError for a store without lungs, a missing package, or a file that is not its network's weights."""
        values = class_values("lungmask", store)
        if not weights.is_file():
            raise ConfigError(f"{weights}: no such file; want the weights of lungmask, such as unet_r231-d5d2fc3d.pth.")
        try:
            with warnings.catch_warnings():  # it silences warnings for the whole process when it is imported
                from lungmask import LMInferer
        except Exception as error:  # a part of it that does not fit raises errors of any kind
            raise missing_package("lungmask", "organs-lungmask", error) from error
        logging.getLogger("lungmask").setLevel(logging.WARNING)  # it logs to stdout, where our results go
        try:
            self._inferer = LMInferer(modelpath=str(weights), force_cpu=True, tqdm_disable=True)
        except Exception as error:
            raise ConfigError(
                f"{weights}: is not a weights file of lungmask ({' '.join(str(error).split())[:160] or type(error).__name__}). "
                "Download unet_r231-d5d2fc3d.pth from its releases."
            ) from error
        self._inferer.device = device  # it knows only "the GPU" or the CPU
        self._inferer.model.to(device)
        self._value_of = np.zeros(256, dtype=np.uint8)
        for number, value in values.items():
            self._value_of[int(number)] = value
        self.provenance = describe("lungmask", version("lungmask"), weights_hash(weights), values, {})

    def __call__(self, image_hu: NDArray[np.int16], spacing_mm_zyx: FloatZYX) -> NDArray[np.uint8]:
        """The lungs of a volume. lungmask wants LPS: seen from it, RAS+ is turned by 180 degrees in the axial plane."""
        found = self._inferer.apply(np.ascontiguousarray(image_hu[:, ::-1, ::-1]))
        lungs: NDArray[np.uint8] = self._value_of[found[:, ::-1, ::-1]]
        return lungs
