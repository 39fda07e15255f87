"""Lay tumours of the bank into patches: masks, values and boxes. Same result on both devices.

On a GPU the centres stay on the device: the host uploads the tumours' voxels from pinned memory, once a batch and number of tumours, and
their places are computed there. On the CPU they are copied by slices.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ftengine.geometry import IntZYX, int_zyx
from ftengine.kernels import for_each, upload
from ftengine.synthesis.bank import PastedTumor


@dataclass(frozen=True)
class Pasted:
    """mask: uint8 [R, z, y, x], cut to the organ. values: float32 [R, z, y, x], what the crops hold where they lie, else 0.

    box: int64 [R, 2, 3] around the masks before the organ cut them, within the patch; all 0 where the mask lies outside of it.
    """

    mask: torch.Tensor
    values: torch.Tensor
    box: torch.Tensor


def paste_tumors(
    tumors: Sequence[Sequence[PastedTumor]],
    centers: torch.Tensor,
    organ: torch.Tensor,
    window_hu: tuple[float, float],
    *,
    relative: bool,
) -> Pasted:
    """Paste the tumours of R patches; of overlapping ones the later lies on top.

    centers: int64 [R, N, 3], the voxel of each tumour's middle; organ: uint8 [R, z, y, x], both on one device. values are windowed HU in
    [0, 1], or, ``relative``, their difference to the windowed mean of the organ around the tumour they were cut from.
    """
    values = [[_unit_values(t, window_hu, relative=relative) for t in row] for row in tumors]
    paste = _paste_on_gpu if organ.device.type == "cuda" else _paste_on_cpu
    mask, painted = paste(tumors, values, centers, organ)
    return Pasted(mask, painted, _boxes(tumors, centers, int_zyx(organ.shape[1:])))


def _unit_values(tumor: PastedTumor, window_hu: tuple[float, float], *, relative: bool) -> NDArray[np.float32]:
    low, high = window_hu
    unit: NDArray[np.float32] = np.clip((tumor.image_hu.astype(np.float32) - low) / (high - low), 0.0, 1.0)
    if relative:
        unit -= np.float32(min(max((tumor.tumor.surround_hu - low) / (high - low), 0.0), 1.0))
    return unit


def _boxes(tumors: Sequence[Sequence[PastedTumor]], centers: torch.Tensor, patch_zyx: IntZYX) -> torch.Tensor:
    """Around the masks of each patch; a patch with fewer tumours repeats its first, which changes no union."""
    most = centers.shape[1]
    extents = np.array(
        [[row[n if n < len(row) else 0].extent_vox for n in range(most)] for row in tumors], dtype=np.int64
    )
    slots = np.array([[n if n < len(row) else 0 for n in range(most)] for row in tumors], dtype=np.int64)
    device = centers.device
    middle = centers.gather(1, upload(slots, device).unsqueeze(2).expand(-1, -1, 3))
    corners = middle.unsqueeze(2) + upload(extents, device)
    last = upload(np.array(patch_zyx, dtype=np.int64), device)
    low = torch.minimum(corners[:, :, 0].amin(1).clamp(min=0), last)
    high = torch.minimum(corners[:, :, 1].amax(1).clamp(min=0), last)
    return torch.stack([low, high], dim=1)


def _paste_on_cpu(
    tumors: Sequence[Sequence[PastedTumor]],
    values: Sequence[Sequence[NDArray[np.float32]]],
    centers: torch.Tensor,
    organ: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    mask, painted = torch.zeros_like(organ), torch.zeros(organ.shape)
    to_mask, to_painted, places, organs = mask.numpy(), painted.numpy(), centers.numpy(), organ.numpy()

    def paste(row: int) -> None:
        pasted_to = []
        for n, (tumor, unit) in enumerate(zip(tumors[row], values[row], strict=True)):
            begin = [int(c) - m for c, m in zip(places[row, n], tumor.middle, strict=True)]
            first = [max(b, 0) for b in begin]
            end = [min(b + k, size) for b, k, size in zip(begin, unit.shape, organs.shape[1:], strict=True)]
            if any(e <= f for f, e in zip(first, end, strict=True)):
                continue
            there = tuple(slice(f, e) for f, e in zip(first, end, strict=True))
            here = tuple(slice(f - b, e - b) for f, e, b in zip(first, end, begin, strict=True))
            own, below = tumor.mask[here], to_mask[row][there]
            np.copyto(to_painted[row][there], unit[here], where=own.astype(bool) | (below == 0))
            np.maximum(below, own, out=below)
            pasted_to.append(there)
        for there in pasted_to:  # not earlier: it says which voxels a tumour lies on
            to_mask[row][there] *= organs[row][there] > 0

    for_each(len(tumors), paste)
    return mask, painted


def _paste_on_gpu(
    tumors: Sequence[Sequence[PastedTumor]],
    values: Sequence[Sequence[NDArray[np.float32]]],
    centers: torch.Tensor,
    organ: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    device, shape = organ.device, organ.shape
    total = organ.numel()
    # one place more, for what lies outside of its patch
    mask = torch.zeros(total + 1, dtype=torch.uint8, device=device)
    painted = torch.zeros(total + 1, device=device)
    size = upload(np.array(shape[1:], dtype=np.int64), device)
    for n in range(max(map(len, tumors))):
        rows = [r for r, row in enumerate(tumors) if n < len(row)]
        parts = [_voxels(tumors[r][n], values[r][n]) for r in rows]
        patch = upload(np.repeat(np.array(rows, dtype=np.int64), [len(p[0]) for p in parts]), device)
        offset, own, unit = (upload(np.concatenate(part), device) for part in zip(*parts, strict=True))
        voxel = centers[:, n].index_select(0, patch) + offset
        is_inside = ((voxel >= 0) & (voxel < size)).all(1)
        place = ((patch * shape[1] + voxel[:, 0]) * shape[2] + voxel[:, 1]) * shape[3] + voxel[:, 2]
        place = torch.where(is_inside, place, total)
        below = mask[place]
        painted[place] = torch.where((own > 0) | (below == 0), unit, painted[place])
        mask[place] = torch.maximum(below, own)
    return mask[:total].view(shape) * (organ > 0), painted[:total].view(shape)


def _voxels(
    tumor: PastedTumor, unit: NDArray[np.float32]
) -> tuple[NDArray[np.int16], NDArray[np.uint8], NDArray[np.float32]]:
    """A crop as a list of voxels: int16 [K, 3] from the middle, the mask there, the value there."""
    offsets = np.indices(unit.shape, dtype=np.int16).reshape(3, -1).T - np.array(tumor.middle, dtype=np.int16)
    return offsets, tumor.mask.reshape(-1), unit.reshape(-1)
