"""nnU-Net v2 trained on a store of ftengine, with tumours painted online: a trainer with other loaders, all else is nnU-Net's.

nnU-Net 2.8 finds it by a variable (older versions want this file in nnunetv2/training/nnUNetTrainer):

    export nnUNet_extTrainer=docs/examples FTENGINE_STORE=train.zarr FTENGINE_VALIDATION_STORE=val.zarr
    nnUNetv2_train DATASET 3d_fullres 0 -tr FtengineTrainer

FTENGINE_GENERATOR and FTENGINE_JUDGE name checkpoints (without them: fixed contrast, every tumour is kept), FTENGINE_CONFIG a configuration
other than the store's preset. Batch size, patch size and device are nnU-Net's. Its plans must have the store's spacing
(``nnUNetv2_plan_experiment -overwrite_target_spacing``), its data set the store's labels, and in dataset.json
"overwrite_image_reader_writer": "NibabelIOWithReorient", which turns images to RAS+ as they lie in the store. Both are checked but the last.
The cases that nnU-Net predicts at the end are those of its own fold: keep them out of the training store.
"""

import os
from collections.abc import Iterator
from typing import Any

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch.nn.functional import interpolate

from ftengine import Config, Store, open_store
from ftengine.adapters.torch_dataset import PatchDataset
from ftengine.assemble import config_for_store

Batches = Iterator[dict[str, Any]]


class FtengineTrainer(nnUNetTrainer):
    """nnU-Net's trainer on batches of two stores."""

    def get_dataloaders(self) -> tuple[Batches, Batches]:
        """Painted batches for training and annotated ones for validation, in the form of nnU-Net's own loaders."""
        self.configure_rotation_dummyDA_mirroring_and_inital_patch_size()  # also sets which axes prediction may mirror
        store, validation_store = (open_store(os.environ[n]) for n in ("FTENGINE_STORE", "FTENGINE_VALIDATION_STORE"))
        config = self._config(store)
        painters = {name: os.environ.get(f"FTENGINE_{name.upper()}") for name in ("generator", "judge")}
        training = PatchDataset(store, config, batches=True, paint=True, **painters)
        validation = PatchDataset(validation_store, config, batches=True)
        return self._endless(training), self._endless(validation)

    def _config(self, store: Store) -> Config:
        """The configuration of the store, with what nnU-Net's plans decide."""
        named = os.environ.get("FTENGINE_CONFIG")
        config = config_for_store(store) if named is None else Config.from_file(named)
        plan, region = self.configuration_manager, config.region
        for what, planned, stored in (
            ("spacing in mm, z y x", tuple(plan.spacing), region.spacing_mm_zyx),
            ("labels", self.dataset_json["labels"], region.labels),
        ):
            if planned != stored:
                raise ValueError(f"{what}: nnU-Net has {planned}, the store {stored}; want the same")
        return config.with_overrides(
            {
                "region.patch_zyx": tuple(plan.patch_size),
                "training.batch_size": self.batch_size,
                "device": str(self.device),
            }
        )

    def _endless(self, dataset: PatchDataset) -> Batches:
        while True:
            for batch in dataset:
                yield {
                    "data": self._normalized(batch["image"], dataset.config.region.window_hu),
                    "target": self._targets(batch["label"]),
                    "keys": batch["case"],
                }

    def _normalized(self, image: torch.Tensor, window_hu: tuple[float, float]) -> torch.Tensor:
        """From [0, 1] to HU and nnU-Net's CT normalisation: what ``nnUNetv2_predict`` will show the network."""
        low, high = window_hu
        found = self.plans_manager.foreground_intensity_properties_per_channel["0"]
        hu = (image * (high - low) + low).clamp(found["percentile_00_5"], found["percentile_99_5"])
        return (hu - found["mean"]) / max(found["std"], 1e-8)

    def _targets(self, label: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
        """The label; with deep supervision one for each output of the network, by nearest neighbour."""
        target, scales = label.float(), self._get_deep_supervision_scales()
        if scales is None:
            return target
        sizes = [[round(n * s) for n, s in zip(label.shape[2:], scale, strict=True)] for scale in scales]
        return [interpolate(target, size, mode="nearest-exact") for size in sizes]
