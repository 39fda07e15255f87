"""A MONAI pipeline over NIfTI files that paints tumours with ``RandTumorSynthesisd``; no store is needed.

    python docs/examples/monai_transform.py imagesTr labelsTr --preset abdomen --generator G.pt --judge S.pt

Images and labels are paired by their sorted names. Labels hold the region's values; for others give ``organs={name: (organ, tumour)}``.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from monai.data import CacheDataset, DataLoader
from monai.transforms import (
    Compose,
    EnsureChannelFirstd,
    LoadImaged,
    Orientationd,
    RandCropByPosNegLabeld,
    RandFlipd,
    ScaleIntensityRanged,
    Spacingd,
    SpatialPadd,
)

from ftengine import Config
from ftengine.adapters.monai_transform import RandTumorSynthesisd

KEYS = ("image", "label")


def pipeline(config: Config, generator: str | None = None, judge: str | None = None) -> Compose:
    """Load, resample, crop, flip, paint, window: the transforms of a training run."""
    region = config.region
    size_xyz = region.patch_zyx[::-1]
    low, high = region.window_hu
    return Compose(
        [
            LoadImaged(KEYS),
            EnsureChannelFirstd(KEYS),
            Orientationd(KEYS, axcodes="RAS", labels=None),
            Spacingd(KEYS, pixdim=region.spacing_mm_zyx[::-1], mode=("bilinear", "nearest")),
            SpatialPadd(KEYS, size_xyz, value=(-1024, 0)),
            RandCropByPosNegLabeld(KEYS, label_key="label", spatial_size=size_xyz, pos=1, neg=1, num_samples=2),
            RandFlipd(KEYS, prob=0.2, spatial_axis=0),
            # HU in, HU out: before the window, behind the crop
            RandTumorSynthesisd(KEYS, config=config, input="hu", generator=generator, judge=judge, prob=0.5),
            ScaleIntensityRanged("image", low, high, 0.0, 1.0, clip=True),
        ]
    )


def batches(
    files: list[dict[str, Path]],
    config: Config,
    *,
    generator: str | None = None,
    judge: str | None = None,
    seed: int = 0,
) -> Iterator[dict[str, Any]]:
    """One epoch of batches, two crops of one file each."""
    dataset = CacheDataset(files, pipeline(config, generator, judge), progress=False)
    # MONAI's loader seeds the transforms, here and in workers, from torch's generator
    yield from DataLoader(dataset, batch_size=1, generator=torch.Generator().manual_seed(seed))


def main() -> None:
    """Read the command line and show what was painted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path)
    parser.add_argument("labels", type=Path)
    parser.add_argument("--preset", default="abdomen")
    parser.add_argument("--generator")
    parser.add_argument("--judge")
    given = parser.parse_args()
    pairs = zip(sorted(given.images.glob("*.nii*")), sorted(given.labels.glob("*.nii*")), strict=True)
    files = [{"image": image, "label": label} for image, label in pairs]
    for batch in batches(files, Config.preset(given.preset), generator=given.generator, judge=given.judge):
        verdict = batch["synthesis"]
        print(tuple(batch["image"].shape), verdict["organ"], verdict["passed"].tolist(), verdict["proportion"].tolist())


if __name__ == "__main__":
    main()
