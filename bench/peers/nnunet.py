"""nnU-Net v2: its blosc2 data set and its data loader, without augmentation or with the trainer's own (``nnUNetTrainer.get_dataloaders``).

Data are as its preprocessor leaves them: float32 normalised by the mean and spread of the labelled voxels (CT scheme), int16 labels, its own
choice of chunks, blocks and filter for the patch, positions of each class for the oversampling of foreground.
"""

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
from batchgenerators.dataloading.single_threaded_augmenter import SingleThreadedAugmenter
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, nnUNetDatasetBlosc2
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from numpy.typing import NDArray

from ftengine.bench.peers import Batches, Setup
from ftengine.config import Config
from ftengine.geometry import reverse_axes


def write_case(
    folder: Path,
    name: str,
    image: NDArray[Any],
    label: NDArray[Any],
    patch_zyx: tuple[int, int, int],
    values: list[int],
) -> None:
    """One case [z, y, x] in its format, with the types given."""
    data, seg = image[None], label[None]
    properties = {"class_locations": DefaultPreprocessor._sample_foreground_locations(seg, values)}
    blocks, chunks = comp_blosc2_params(data.shape, patch_zyx, data.itemsize)
    blocks_seg, chunks_seg = comp_blosc2_params(seg.shape, patch_zyx, seg.itemsize)
    nnUNetDatasetBlosc2.save_case(
        data,
        seg,
        properties,
        str(folder / name),
        chunks=chunks,
        blocks=blocks,
        chunks_seg=chunks_seg,
        blocks_seg=blocks_seg,
    )


def preprocess(setup: Setup) -> Path:
    """All sources in its format below the work folder; what is there is kept."""
    folder = Path(setup.work) / f"preprocessed_{'_'.join(map(str, setup.patch_zyx))}"
    done = folder.with_suffix(".done")
    if done.exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    values = [v for v in Config.preset(setup.region).region.labels.values() if v]
    for image_file, label_file in setup.pairs():
        image = reverse_axes(np.asarray(nib.load(image_file).dataobj)).astype(np.float32)  # type: ignore[attr-defined]
        label = reverse_axes(np.asarray(nib.load(label_file).dataobj)).astype(np.int16)  # type: ignore[attr-defined]
        inside = image[label > 0]
        low, high = np.percentile(inside, (0.5, 99.5))
        image = (np.clip(image, low, high) - inside.mean()) / inside.std()
        write_case(
            folder,
            image_file.name.removesuffix("_ct.nii.gz"),
            np.ascontiguousarray(image, dtype=np.float32),
            np.ascontiguousarray(label),
            setup.patch_zyx,
            values,
        )
    done.touch()
    return folder


def batches(setup: Setup) -> Batches:
    """Endless batches."""
    warnings.simplefilter("ignore")
    dataset = nnUNetDatasetBlosc2(str(preprocess(setup)))
    labels = LabelManager(dict(Config.preset(setup.region).region.labels), regions_class_order=None)
    read_size, transforms = list(setup.patch_zyx), None
    if setup.mode == "augmented":
        rotation, dummy_2d, read_size, mirror_axes = _augmentation_of(setup)
        transforms = nnUNetTrainer.get_training_transforms(
            np.array(setup.patch_zyx), rotation, None, mirror_axes, dummy_2d, use_mask_for_norm=[False]
        )
    loader = nnUNetDataLoader(
        dataset,
        setup.batch_size,
        read_size,
        list(setup.patch_zyx),
        labels,
        oversample_foreground_percent=0.33,  # the trainer's
        transforms=transforms,
    )
    augmenter: Any
    if setup.workers == 0:
        augmenter = SingleThreadedAugmenter(loader, None)
    else:
        augmenter = NonDetMultiThreadedAugmenter(
            data_loader=loader,
            transform=None,
            num_processes=setup.workers,
            num_cached=max(6, setup.workers // 2),
            seeds=None,
            pin_memory=False,
            wait_time=0.002,
        )
    while True:
        batch = next(augmenter)
        yield batch["data"], batch["target"]


def _augmentation_of(setup: Setup) -> Any:
    trainer = SimpleNamespace(
        configuration_manager=SimpleNamespace(patch_size=list(setup.patch_zyx)),
        print_to_log_file=lambda *_a, **_k: None,
    )
    return nnUNetTrainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size(trainer)
