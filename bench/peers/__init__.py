"""Loaders of other projects over the same phantoms, each with the settings that its own documentation recommends.

A peer is a module with ``batches(setup) -> Iterator[(image, label)]``: image float32 and label of an integer or float type, both
[B, 1, ...] with the setup's patch and batch. It prepares what it reads (cache, preprocessed files) below ``setup.work`` before the first
batch. Each runs in a process of its own (``process.py``).
"""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, TypeAlias

from ftengine.geometry import IntZYX, int_zyx

for _name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
    os.environ.setdefault(_name, os.devnull)  # nnU-Net prints where one is not set; nothing is read there

Mode = Literal["crops", "augmented"]
Batches: TypeAlias = Iterator[tuple[Any, Any]]

# name on the command line -> (module, numbers of workers that are tried; the fastest is kept)
PEERS: dict[str, tuple[str, tuple[int, ...]]] = {
    "monai-persistent": ("monai", (2, 0)),
    "monai-cache": ("monai", (2, 0)),
    "nnunet": ("nnunet", (2, 0)),
    "torchio": ("torchio", (2, 0)),
}


@dataclass(frozen=True)
class Setup:
    """What a peer is to deliver, and from what."""

    peer: str
    mode: Mode
    sources: str  # folder of NAME_ct.nii.gz and NAME_label.nii.gz at the region's spacing
    work: str  # folder of the peer's own
    patch_zyx: IntZYX
    batch_size: int
    workers: int
    region: str = "abdomen"

    def to_json(self) -> str:
        """For the command line of the peer's process."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Setup":
        """What ``to_json`` wrote."""
        values = json.loads(text)
        return cls(**{**values, "patch_zyx": int_zyx(values["patch_zyx"])})

    def pairs(self) -> list[tuple[Path, Path]]:
        """Image and label files, sorted."""
        images = sorted(Path(self.sources).glob("*_ct.nii.gz"))
        return [(image, image.with_name(image.name.replace("_ct.", "_label."))) for image in images]


def batches_of(setup: Setup) -> Batches:
    """The batches of a peer; ImportError where its packages are missing (extra ``peers``)."""
    module, _ = PEERS[setup.peer]
    batches: Batches = import_module(f"ftengine.bench.peers.{module}").batches(setup)
    return batches
