"""nnU-Net v2 trained on a store of ftengine, with tumours painted online: a trainer that replaces nnU-Net's loaders.

nnU-Net finds it by a variable of its own (version 2.8 or newer; older ones want this file inside nnunetv2/training/nnUNetTrainer):

    export nnUNet_extTrainer=docs/examples FTENGINE_STORE=abdomen.zarr
    nnUNetv2_train DATASET 3d_fullres 0 -tr FtengineTrainer

Everything else is nnU-Net's: network, loss, deep supervision, schedule, checkpoints, prediction. Three things must agree with the store,
and are checked: the spacing (``nnUNetv2_plan_experiment -overwrite_target_spacing``), the patch size and the labels. The reader of the
data set must turn images to RAS+, as the store has them: "overwrite_image_reader_writer": "NibabelIOWithReorient" in dataset.json.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch.nn.functional import interpolate

from ftengine import Config
from ftengine.adapters.torch_dataset import PatchDataset

VALIDATION_FOLD = 0  # of the store: held out of training


class FtengineTrainer(nnUNetTrainer):
    """nnU-Net's trainer with batches of a store; FTENGINE_STORE names it, FTENGINE_CONFIG a configuration (default: the store's preset)."""

    def get_dataloaders(self) -> tuple[Iterator[dict[str, Any]], Iterator[dict[str, Any]]]:
        """Batches for training, painted, without the store's fold 0; and for validation, as nnU-Net's own loaders make them."""
        self.configure_rotation_dummyDA_mirroring_and_inital_patch_size()  # sets which axes prediction may mirror
        training = PatchDataset(
            os.environ["FTENGINE_STORE"],
            self._config(),
            batches=True,
            paint=True,
            generator=os.environ.get("FTENGINE_GENERATOR"),
            judge=os.environ.get("FTENGINE_JUDGE"),
            held_out_fold=VALIDATION_FOLD,
        )
        self._check(training)
        _, validation = super().get_dataloaders()
        return self._endless(training), validation

    def _config(self) -> Config | None:
        if "FTENGINE_CONFIG" not in os.environ:
            return None
        config = Config.from_file(Path(os.environ["FTENGINE_CONFIG"]))
        return config.with_overrides({"training.batch_size": self.batch_size, "device": str(self.device)})

    def _check(self, dataset: PatchDataset) -> None:
        region, plan = dataset.config.region, self.configuration_manager
        pairs = {
            "spacing, mm, z y x": (tuple(plan.spacing), region.spacing_mm_zyx),
            "patch size, z y x": (tuple(plan.patch_size), region.patch_zyx),
            "labels": (self.dataset_json["labels"], region.labels),
        }
        wrong = [f"{name}: {have} in nnU-Net's plans, {want} in the store's configuration" for name, (have, want) in pairs.items() if have != want]
        if wrong:
            raise ValueError("; ".join(wrong))

    def _endless(self, dataset: PatchDataset) -> Iterator[dict[str, Any]]:
        while True:
            for batch in dataset:
                yield {
                    "data": self._normalized(batch["image"], dataset.config.region.window_hu),
                    "target": self._targets(batch["label"]),
                    "keys": batch["case"],
                }

    def _normalized(self, image: torch.Tensor, window_hu: tuple[float, float]) -> torch.Tensor:
        """From [0, 1] back to HU and to nnU-Net's CT normalisation, so that ``nnUNetv2_predict`` shows the network what training showed it."""
        low, high = window_hu
        found = self.plans_manager.foreground_intensity_properties_per_channel["0"]
        hu = (image * (high - low) + low).clamp(found["percentile_00_5"], found["percentile_99_5"])
        return (hu - found["mean"]) / max(found["std"], 1e-8)

    def _targets(self, label: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
        """The label, or with deep supervision one for each output of the network, by nearest neighbour."""
        scales = self._get_deep_supervision_scales()
        target = label.float()
        if scales is None:
            return target
        shape = label.shape[2:]
        return [interpolate(target, [round(n * s) for n, s in zip(shape, scale, strict=True)], mode="nearest-exact") for scale in scales]
