"""TorchIO: SubjectsDataset, Queue and UniformSampler, as its guide to patch-based training has them.

Volumes are windowed and written as uncompressed float32 NIfTI beforehand, so that its workers only read and cut. Its transforms work on whole
volumes; it has no quarter turn, so mode "augmented" is flips, gamma and noise-free intensity changes with our probabilities.
"""

import warnings
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torchio as tio

from ftengine.bench.peers import Batches, Setup
from ftengine.config import Config

nib: Any = nibabel  # its own names are not declared
SAMPLES_A_VOLUME, QUEUE_LENGTH = 8, 64
_REPEATS = 256  # subjects are listed again and again: no end of an epoch to wait at


def preprocess(setup: Setup) -> list[tuple[Path, Path]]:
    """Windowed volumes below the work folder; what is there is kept."""
    folder = Path(setup.work) / "preprocessed"
    folder.mkdir(parents=True, exist_ok=True)
    low, high = Config.preset(setup.region).region.window_hu
    made = []
    for image_file, label_file in setup.pairs():
        image, label = (folder / f.name.removesuffix(".gz") for f in (image_file, label_file))
        if not label.exists():
            source: Any = nib.load(image_file)
            values = np.clip((np.asarray(source.dataobj, dtype=np.float32) - low) / (high - low), 0, 1)
            nib.save(nib.Nifti1Image(values, source.affine), image)
            of_label: Any = nib.load(label_file)
            nib.save(nib.Nifti1Image(np.asarray(of_label.dataobj, dtype=np.uint8), of_label.affine), label)
        made.append((image, label))
    return made


def batches(setup: Setup) -> Batches:
    """Endless batches."""
    warnings.simplefilter("ignore")
    augment = Config.preset(setup.region).augment
    changes = [
        tio.RandomFlip(axes=(0, 1, 2), flip_probability=augment.flip_probability),
        tio.RandomGamma(log_gamma=augment.scale_range, p=augment.scale_probability),
    ]
    subjects = [
        tio.Subject(image=tio.ScalarImage(image), label=tio.LabelMap(label)) for image, label in preprocess(setup)
    ] * _REPEATS
    dataset = tio.SubjectsDataset(subjects, transform=tio.Compose(changes) if setup.mode == "augmented" else None)
    queue = tio.Queue(
        dataset,
        max_length=QUEUE_LENGTH,
        samples_per_volume=SAMPLES_A_VOLUME,
        sampler=tio.UniformSampler(setup.patch_zyx[::-1]),
        num_workers=setup.workers,
    )
    while True:
        for batch in tio.SubjectsLoader(queue, batch_size=setup.batch_size, num_workers=0, drop_last=True):
            yield batch["image"]["data"], batch["label"]["data"]
