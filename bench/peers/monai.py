"""MONAI: the usual chain in a PersistentDataset or a CacheDataset, four crops a volume (tutorials ``fast_training_tutorial``, ``swin_unetr_btcv``).

Everything up to the first random transform is cached, by PersistentDataset as a file of tensors, by CacheDataset in memory. Its cache hits
are checked: the sources that it knows are links, which are gone once the cache is filled.
"""

import shutil
import warnings
from pathlib import Path
from typing import Any

from monai.data.dataloader import DataLoader
from monai.data.dataset import CacheDataset, PersistentDataset
from monai.transforms.compose import Compose
from monai.transforms.croppad.dictionary import CropForegroundd, RandCropByPosNegLabeld, SpatialPadd
from monai.transforms.intensity.dictionary import RandScaleIntensityd, RandShiftIntensityd, ScaleIntensityRanged
from monai.transforms.io.dictionary import LoadImaged
from monai.transforms.spatial.dictionary import Orientationd, RandFlipd, RandRotate90d, Spacingd
from monai.transforms.utility.dictionary import EnsureChannelFirstd
from torch.utils.data import RandomSampler

from ftengine.bench.peers import Batches, Setup
from ftengine.config import Config

CROPS_A_VOLUME = 4
_KEYS = ["image", "label"]


def transforms(config: Config, setup: Setup) -> Any:
    """The chain: loading to windowing, crops, and in mode "augmented" our own random changes with our probabilities."""
    low, high = config.region.window_hu
    patch = setup.patch_zyx[::-1]
    steps: list[Any] = [
        LoadImaged(_KEYS),
        EnsureChannelFirstd(_KEYS),
        Orientationd(_KEYS, axcodes="RAS"),
        Spacingd(_KEYS, pixdim=config.region.spacing_mm_zyx[::-1], mode=("bilinear", "nearest")),
        ScaleIntensityRanged("image", a_min=low, a_max=high, b_min=0.0, b_max=1.0, clip=True),
        CropForegroundd(_KEYS, source_key="image", allow_smaller=True),
        SpatialPadd(_KEYS, patch),
        RandCropByPosNegLabeld(
            _KEYS, label_key="label", spatial_size=patch, pos=1, neg=1, num_samples=CROPS_A_VOLUME, image_key="image"
        ),
    ]
    return Compose(steps + (_augmentations(config) if setup.mode == "augmented" else []))


def _augmentations(config: Config) -> list[Any]:
    augment = config.augment
    flips = [RandFlipd(_KEYS, prob=augment.flip_probability, spatial_axis=axis) for axis in range(3)]
    return [
        *flips,
        RandRotate90d(_KEYS, prob=augment.rot90_probability, max_k=3),
        RandScaleIntensityd("image", factors=augment.scale_range, prob=augment.scale_probability),
        RandShiftIntensityd("image", offsets=augment.shift_range, prob=augment.shift_probability),
    ]


def batches(setup: Setup) -> Batches:
    """Endless batches; the cache is filled first."""
    warnings.simplefilter("ignore")  # its own deprecations
    if setup.batch_size % CROPS_A_VOLUME:
        raise ValueError(f"batch_size={setup.batch_size}: want a multiple of {CROPS_A_VOLUME}, its crops a volume")
    work = Path(setup.work) / f"{setup.mode}_{setup.workers}"
    links, cache = work / "links", work / "cache"
    items = [{key: str(_link(links, file)) for key, file in zip(_KEYS, pair, strict=True)} for pair in setup.pairs()]
    dataset = _filled(setup, items, transforms(Config.preset(setup.region), setup), cache)
    shutil.rmtree(links)
    sampler = RandomSampler(dataset, replacement=True, num_samples=1 << 24)  # no end of an epoch to wait at
    loader = DataLoader(
        dataset,
        batch_size=setup.batch_size // CROPS_A_VOLUME,
        sampler=sampler,
        num_workers=setup.workers,
        persistent_workers=setup.workers > 0,
    )
    for batch in loader:
        yield batch["image"], batch["label"]


def _link(folder: Path, file: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    link = folder / file.name
    if not link.exists():
        link.symlink_to(file.resolve())
    return link


def _filled(setup: Setup, items: list[dict[str, str]], chain: Any, cache: Path) -> Any:
    if setup.peer == "monai-cache":
        return CacheDataset(items, chain, cache_rate=1.0, num_workers=1, progress=False)
    shutil.rmtree(cache, ignore_errors=True)
    dataset = PersistentDataset(items, chain, cache_dir=cache)
    for number in range(len(items)):
        dataset[number]
    filled = len(list(cache.glob("*.pt")))
    if filled != len(items):
        raise AssertionError(f"PersistentDataset cached {filled} of {len(items)} volumes: nothing to time")
    return dataset
