"""The values that stages hand to one another."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ftengine.geometry import Box, FloatZYX, Grid, IntZYX

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Volume:
    """One CT as read from a file, RAS+, z y x, at its native spacing.

    image_hu: int16 or float32 HU (float32 only where the source holds fractions); never below -1024, never NaN.
    label: uint8 on the same grid in the region's own values, or None without a label file.
    native: the grid of the file itself, before it was turned to RAS+ (predictions go back to it).
    notes: what the reader repaired or noticed, one sentence each; shown in the conversion summary.
    """

    image_hu: NDArray[np.int16] | NDArray[np.float32]
    label: NDArray[np.uint8] | None
    grid: Grid
    native: Grid
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Patch:
    """One box read from the store; outside the volume the image is -1024 and the label 0.

    image: int16 HU [z, y, x]. label: uint8 [z, y, x], all 0 for a volume without a label.
    """

    case: str
    box: Box
    image: NDArray[np.int16]
    label: NDArray[np.uint8]


@dataclass(frozen=True)
class TumorCrop:
    """A connected component of a tumour class, cut out of a volume with a margin; outside the volume -1024 HU and label 0.

    value: its label value. image_hu: int16, label: uint8 in the region's values, mask: uint8, 1 on the component; all [z, y, x].
    origin_zyx: first voxel of the crop in its volume, margin included; negative where the margin reaches out of it.
    """

    case: str
    value: int
    image_hu: NDArray[np.int16]
    label: NDArray[np.uint8]
    mask: NDArray[np.uint8]
    origin_zyx: IntZYX


@dataclass(frozen=True)
class Augmentation:
    """What happens to a patch after the crop, drawn beforehand: transpose y/x, then flip, then scale and shift of [0, 1] values."""

    transpose_yx: bool = False
    flip_zyx: tuple[bool, bool, bool] = (False, False, False)
    intensity_scale: float = 1.0
    intensity_shift: float = 0.0


@dataclass(frozen=True)
class PatchRequest:
    """The address of one patch and everything that was drawn for it: enough to make it again."""

    epoch: int
    index: int
    row: int  # row of the volume in the store's index
    case: str
    dataset: str
    annotated: bool  # tumours of this volume are labelled
    box: Box
    augmentation: Augmentation
    read: Box  # what is read for it, perhaps for other patches too; ``box`` lies in it


@dataclass(frozen=True)
class Painted:
    """What the synthesis did to one patch of a batch."""

    organ: str
    size_class: str  # of the first tumour; shape realistic and copy-paste: by its volume before the organ cuts it
    center_zyx: tuple[IntZYX, ...]
    radii_vox_zyx: tuple[FloatZYX, ...]  # of each tumour's main ellipsoid; copy-paste: half its extent
    num_voxels: int  # voxels of the mask M
    proportion: float  # P of Eq. 4; NaN where no judge was asked
    passed: bool  # the patch went to training painted; else it went back to the original (Eq. 5)
    num_draws: int = 1


@dataclass
class PatchRecord:
    """Where a patch of a batch came from and what became of it."""

    request: PatchRequest
    painted: Painted | None = None
    # voxels of each label value, counted before anything ran on a device
    label_voxels: tuple[int, ...] | None = None


@dataclass
class Batch:
    """What the training loop gets.

    image: float32 [B, 1, z, y, x], HU windowed to [0, 1] (painting may leave that range: Eq. 1 does not clip).
    label: uint8 [B, 1, z, y, x].
    """

    image: "torch.Tensor"
    label: "torch.Tensor"
    records: list[PatchRecord] = field(default_factory=list)
