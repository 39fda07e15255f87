"""Organs by TotalSegmentator (Wasserthal et al. 2023): nnU-Nets, task "total".

Weights by path: the folder that holds ``Dataset291_...`` and so on, which TotalSegmentator calls TOTALSEG_WEIGHTS_PATH. The models at 1.5 mm are
used where they are all there, else the one at 3 mm; nothing is downloaded. Its usage statistics are switched off, and its
settings in the home folder are left alone. nnU-Net runs code that is stored in its checkpoints: give it weights of a source you trust.
Written for TotalSegmentator 2.18 and tried with it on networks of its layout whose weights were drawn at random, never on the trained ones.
"""

import atexit
import contextlib
import io
import json
import os
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from numpy.typing import NDArray

from ftengine.errors import ConfigError
from ftengine.geometry import FloatZYX, reverse_axes
from ftengine.organs.labeler import class_values, describe, missing_package, weights_hash
from ftengine.store.reader import Store

# Numbers of its models: five parts at 1.5 mm with the rough one that crops for them, or all classes at 3 mm
_FULL, _FAST = (291, 292, 293, 294, 295, 298), (297,)


class TotalSegmentatorLabeler:
    """Task "total" with one folder of weights; lobes become ``lung``, left and right kidney ``kidney``."""

    def __init__(self, weights: Path, store: Store, device: torch.device) -> None:
        """Raises ConfigError for an organ that it does not know, a missing package, or a folder without its models."""
        self._values = class_values("totalsegmentator", store)
        if not weights.is_dir():
            raise ConfigError(f"{weights}: no such folder; want the one with the models of TotalSegmentator.")
        home = Path(tempfile.mkdtemp(prefix="ftengine-totalsegmentator-"))
        atexit.register(shutil.rmtree, home, ignore_errors=True)
        settings = {
            "totalseg_id": "ftengine",
            "send_usage_stats": False,
            "prediction_counter": 0,
            "statistics_disclaimer_shown": True,
        }
        (home / "config.json").write_text(json.dumps(settings), encoding="utf-8")
        # before the import: nnU-Net reads its folders once
        os.environ["TOTALSEG_HOME_DIR"] = str(home)
        os.environ["TOTALSEG_WEIGHTS_PATH"] = str(weights.resolve())
        try:
            from totalsegmentator.map_tasks_config import TASK_ID_WEIGHTS_CONFIGS as CONFIGS
            from totalsegmentator.map_to_binary import class_map
            from totalsegmentator.python_api import totalsegmentator
        except Exception as error:  # it imports much; a part that does not fit raises errors of any kind
            raise missing_package("totalsegmentator", "organs-totalsegmentator", error) from error
        self._run = totalsegmentator
        self._number_of = {name: number for number, name in class_map["total"].items()}
        folders = {number: weights / str(CONFIGS[number]["foldername"]) for number in (*_FULL, *_FAST)}
        used = next((kind for kind in (_FULL, _FAST) if all(folders[n].is_dir() for n in kind)), None)
        if used is None:
            wanted = [folders[n].name for n in _FULL]
            raise ConfigError(
                f"{weights}: lacks models of TotalSegmentator; want {', '.join(wanted)}, or {folders[297].name} alone for 3 mm. "
                "Download them with 'totalseg_download_weights -t total' on a machine that may."
            )
        self._fast = used == _FAST
        self._device = "cpu" if device.type == "cpu" else f"gpu:{device.index or 0}"
        files = [f for n in used for f in folders[n].rglob("*") if f.suffix in (".pth", ".json") and f.is_file()]
        task = {"task": "total", "fast": self._fast}
        self.provenance = describe(
            "totalsegmentator", version("totalsegmentator"), weights_hash(weights, files), self._values, task
        )

    def __call__(self, image_hu: NDArray[np.int16], spacing_mm_zyx: FloatZYX) -> NDArray[np.uint8]:
        """The organs of a volume: handed over and taken back as a NIfTI image whose axes are x, y, z, RAS+."""
        affine = np.diag([*reversed(spacing_mm_zyx), 1.0])
        image = nib.Nifti1Image(np.ascontiguousarray(reverse_axes(image_hu)), affine)
        with contextlib.redirect_stdout(io.StringIO()):  # our results go there
            found = self._run(
                image,
                ml=True,
                task="total",
                fast=self._fast,
                # crops to the organs and leaves out models that know none of them; the 3 mm model is one pass over everything anyway
                roi_subset=None if self._fast else sorted(self._values),
                device=self._device,
                quiet=True,
                skip_saving=True,
            )
        classes = reverse_axes(np.asarray(found.dataobj))
        organs = np.zeros(image_hu.shape, dtype=np.uint8)
        for name, value in self._values.items():
            organs[classes == self._number_of[name]] = value
        return organs
