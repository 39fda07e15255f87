"""``synthesizer: syntumor``: handcrafted tumours after the prose on SyntheticTumors (reference 1.4 to 1.6); written from that alone.

Inside the organ ``x - Gs(M) D T / W``: D drawn in HU, W the window's width, T a crop of a noise field, Gs a Gaussian blur of the mask. Lengths
are in mm: SyntheticTumors works in voxels of 1 mm. Two differences: D is subtracted behind the window instead of before it, which differs
only for voxels that leave the window; and T's fields are smaller than the released ones, so that all ten take 164 MB at patches of 96^3.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch

from ftengine.geometry import FloatZYX, IntZYX, int_zyx
from ftengine.kernels import upload
from ftengine.synthesis.released import CHEST_SIGMAS, TextureFields

FIELD_MARGIN_VOX = 64  # a field is as much longer than a patch: room for random crops
SIGMAS_MM = CHEST_SIGMAS  # the ten pairs of reference 1.5


def noise_fields(seed: int, patch_zyx: IntZYX, spacing_mm_zyx: FloatZYX) -> TextureFields:
    """The ten noise fields for patches of this size, each made when it is first used.

    The fields are isotropic in voxels; their lengths are in mm by the geometric mean of the spacing.
    """
    voxel_mm = math.prod(spacing_mm_zyx) ** (1.0 / 3.0)
    sigmas = tuple((a / voxel_mm, b / voxel_mm) for a, b in SIGMAS_MM)
    return TextureFields(seed, sigmas, int_zyx(n + FIELD_MARGIN_VOX for n in patch_zyx))


def syntumor_texture(fields: torch.Tensor, contrasts_hu: Sequence[float], width_hu: float) -> torch.Tensor:
    """``D T / W``, what is subtracted where the mask is 1: written into ``fields``, float32 [R, z, y, x] in [0, 1]."""
    depth = np.array([c / width_hu for c in contrasts_hu], dtype=np.float32)
    return fields.mul_(upload(depth, fields.device).view(-1, 1, 1, 1))
