"""The released code's texture and blend, for users of the released weights; every difference to the paper is in reference 1.6."""

import threading
from dataclasses import dataclass

import numpy as np
import scipy.ndimage as ndi
import torch
import torch.nn.functional as nnf
from numpy.typing import NDArray

from ftengine.geometry import IntZYX
from ftengine.rng import Purpose, patch_rng

FIELD_SHAPE_ZYX: IntZYX = (320, 300, 420)  # reference 1.5: 420 x 300 x 320 in x, y, z
ABDOMEN_SIGMAS = ((3.0, 4.0),)
CHEST_SIGMAS = tuple((a, b) for a in (3.0, 6.0, 9.0, 12.0, 15.0) for b in (4.0, 7.0))


def noise_field(
    seed: int, number: int, sigma_a: float, sigma_b: float, shape_zyx: IntZYX = FIELD_SHAPE_ZYX
) -> NDArray[np.float32]:
    """One texture field, float32 [z, y, x] in [0, 1].

    Uniform noise, Gaussian sigma_a, stretched to [base, base + scale], used as Bernoulli probabilities, Gaussian sigma_b, scaled so
    that the mean of the values above 0.12 is u0, clipped. Seconds at the full shape: make it once. Source: reference 1.5.
    """
    rng = patch_rng(seed, Purpose.TEXTURE_FIELD, index=number)
    smooth = ndi.gaussian_filter(rng.random(shape_zyx, dtype=np.float32), sigma_a)
    scale, base = rng.uniform(0.19, 0.21), rng.uniform(0.04, 0.06)
    low, high = float(smooth.min()), float(smooth.max())
    probability = (smooth - low) / (high - low) * scale + base
    spots = ndi.gaussian_filter((rng.random(shape_zyx, dtype=np.float32) < probability).astype(np.float32), sigma_b)
    beta = rng.uniform(0.5, 0.55) / float(spots[spots > 0.12].mean())
    return np.clip(spots * np.float32(beta), 0.0, 1.0)


@dataclass
class TextureFields:
    """The region's texture fields, each made on first use and kept."""

    seed: int
    sigmas: tuple[tuple[float, float], ...]
    shape_zyx: IntZYX = FIELD_SHAPE_ZYX

    def __post_init__(self) -> None:
        self._made: dict[int, torch.Tensor] = {}
        self._lock = threading.Lock()

    def crop(self, draw: tuple[float, float, float, float], patch_zyx: IntZYX) -> torch.Tensor:
        """A random crop, float32 [z, y, x] on the CPU; ``draw`` (uniform in [0, 1)) picks the field and the corner."""
        number = int(draw[0] * len(self.sigmas))
        with self._lock:
            if number not in self._made:
                shape = tuple(max(n, p) for n, p in zip(self.shape_zyx, patch_zyx, strict=True))
                field = noise_field(self.seed, number, *self.sigmas[number], (shape[0], shape[1], shape[2]))
                self._made[number] = torch.from_numpy(field)
            field_tensor = self._made[number]
        z, y, x = (int(d * (n - p + 1)) for d, n, p in zip(draw[1:], field_tensor.shape, patch_zyx, strict=True))
        return field_tensor[z : z + patch_zyx[0], y : y + patch_zyx[1], x : x + patch_zyx[2]]


def released_blend(
    x: torch.Tensor,
    difference: torch.Tensor,
    organ: torch.Tensor,
    texture: torch.Tensor,
    soft_mask: torch.Tensor,
    *,
    sign: float,
) -> torch.Tensor:
    """``x + sign * soft_mask * blur(difference * organ) * texture`` inside the organ, ``x`` elsewhere; differentiable in difference.

    All float32 [B, z, y, x]; difference is the activated output of G (tanh in the abdomen, sigmoid in the chest). blur is the 7^3
    Gaussian of standard deviation 1, zero outside the patch. sign is -1 in the abdomen, +1 in the chest. Source: reference 1.6.
    """
    smooth = _blur7(difference * organ)
    return torch.where(organ > 0, x + sign * soft_mask * smooth * texture, x)


def _blur7(x: torch.Tensor) -> torch.Tensor:
    taps = torch.exp(-0.5 * torch.arange(-3, 4, dtype=torch.float64) ** 2)
    taps = (taps / taps.sum()).to(x)
    blurred = x.unsqueeze(1)
    for axis in range(3):
        shape, padding = [1, 1, 1], [0, 0, 0]
        shape[axis], padding[axis] = 7, 3
        blurred = nnf.conv3d(blurred, taps.view(1, 1, *shape), padding=padding)
    return blurred.squeeze(1)
