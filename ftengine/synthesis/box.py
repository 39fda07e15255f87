"""``synthesis.box: auto``: G and S on boxes around tumours instead of whole patches, in few sizes and without a host sync.

The host knows a tumour's radii and the offsets of its lobes, the device alone its centre. So the host chooses how large a box is and
the device where it lies; crops are gathered by indices that are computed on the device.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ftengine.geometry import FloatZYX, IntZYX, int_zyx
from ftengine.kernels import upload
from ftengine.synthesis.shape import PatchDraw, TumorDraw

BUCKET_VOX = 32  # sides are multiples of it: what SwinUNETR wants, and few sizes for compiled networks


@dataclass(frozen=True)
class Regions:
    """Where the networks look, for the R patches of a placement: at whole patches, and at boxes grouped by size.

    whole: numbers from 0 to R - 1; each number is there or in one of ``boxes``.
    """

    whole: list[int]
    boxes: "list[TumorBoxes]"

    @property
    def order(self) -> list[int]:
        """All numbers, group after group."""
        return [*self.whole, *(i for boxes in self.boxes for i in boxes.members)]


@dataclass(frozen=True)
class TumorBoxes:
    """Boxes of one size in some patches. index: int64 [n, 1, 1, 1], [1, z, 1, 1] and so on, broadcast: patch, z, y, x of each voxel."""

    members: list[int]
    index: tuple[torch.Tensor, ...]

    def crop(self, batch: torch.Tensor) -> torch.Tensor:
        """[R, z, y, x] -> [n, box z, box y, box x]."""
        return batch[self.index]

    def paste(self, batch: torch.Tensor, values: torch.Tensor) -> None:
        """Write what ``crop`` would read."""
        batch[self.index] = values


def tumor_extent_vox(tumor: TumorDraw) -> tuple[IntZYX, IntZYX]:
    """First voxel and the one behind the last that a tumour can reach, counted from its centre, whatever its warps.

    An ellipsoid of radius r is rasterised in ceil(2 r) voxels to both sides of its centre and nowhere else (``kernels.tumor_mask``); a
    tumour of the bank has the extent of its mask.
    """
    if tumor.pasted is not None:
        return tumor.pasted.extent_vox
    offsets = np.array([e.offset_vox_zyx for e in tumor.ellipsoids])
    reach = np.ceil(2 * np.array([e.radii_vox_zyx for e in tumor.ellipsoids])).astype(np.int64)
    return int_zyx((offsets - reach).min(axis=0)), int_zyx((offsets + reach).max(axis=0))


def box_shape(draw: PatchDraw, patch_zyx: IntZYX, margin_vox_zyx: IntZYX, least_vox: int) -> IntZYX | None:
    """The box of a patch: a cube, cut to the patch; None where it would be the whole patch or there are several tumours.

    Its side is the tumour's longest extent and twice the margin there, rounded up to a multiple of 32, at least ``least_vox``. One side for all
    axes: a patch of 96 voxels has one size of boxes, one of 128 has two.
    """
    tumor, *others = draw.tumors
    if others:
        return None
    low, high = tumor_extent_vox(tumor)
    wanted = max(b - a + 2 * m for a, b, m in zip(low, high, margin_vox_zyx, strict=True))
    side = max(least_vox, -(-wanted // BUCKET_VOX) * BUCKET_VOX)
    shape = int_zyx(min(side, n) for n in patch_zyx)
    return None if shape == patch_zyx else shape


def choose_regions(
    draws: Sequence[PatchDraw], shapes: Sequence[IntZYX | None], centers: torch.Tensor, patch_zyx: IntZYX
) -> Regions:
    """Group patches by the size of their boxes and lay the boxes around the tumours.

    shapes: of each patch's box, as ``box_shape`` gives it. centers: int64 [R, N, 3], the tumours' voxels, on the batch's device.

    A box holds the mask: before it is moved into the patch it starts half of what is left over before the tumour's first voxel, and so
    it ends behind the last one; moved inwards, it ends at the patch's border, behind which no mask is. For the same reason at least the
    margin lies between the mask and each side of the box that is not the patch's own.
    """
    members: dict[IntZYX | None, list[int]] = {}
    for i, shape in enumerate(shapes):
        members.setdefault(shape, []).append(i)
    whole = members.pop(None, [])
    boxes = [
        _boxes(chosen, [draws[i].tumors[0] for i in chosen], centers, patch_zyx, shape)
        for shape, chosen in members.items()
        if shape is not None
    ]
    return Regions(whole, boxes)


def _boxes(
    members: list[int], tumors: Sequence[TumorDraw], centers: torch.Tensor, patch_zyx: IntZYX, shape_zyx: IntZYX
) -> TumorBoxes:
    starts = []
    for tumor in tumors:
        low, high = np.array(tumor_extent_vox(tumor))
        starts.append(low - (np.array(shape_zyx) - (high - low)) // 2)
    device = centers.device
    which = upload(np.array(members, dtype=np.int64), device)
    last = upload(np.array(patch_zyx, dtype=np.int64) - np.array(shape_zyx, dtype=np.int64), device)
    first = (centers.index_select(0, which)[:, 0] + upload(np.array(starts, dtype=np.int64), device)).clamp(min=0)
    first = torch.minimum(first, last)
    axes = []
    for axis, length in enumerate(shape_zyx):
        along = [1, 1, 1, 1]
        along[axis + 1] = length
        axes.append(first[:, axis].view(-1, 1, 1, 1) + torch.arange(length, device=device).view(along))
    return TumorBoxes(members, (which.view(-1, 1, 1, 1), *axes))


def margin_for(context_mm: float, edge_reach_vox_zyx: Sequence[int], spacing_mm_zyx: FloatZYX) -> IntZYX:
    """Voxels between a mask and the side of its box: what the networks see around it, and how far its soft edge reaches."""
    return int_zyx(
        math.ceil(context_mm / s) + reach for s, reach in zip(spacing_mm_zyx, edge_reach_vox_zyx, strict=True)
    )
