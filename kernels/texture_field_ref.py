"""The texture law of FreeTumor's released code in float64 and SciPy, for given uniform numbers; and Philox4x32-10 as published."""

from dataclasses import dataclass

import numpy as np
import scipy.ndimage as ndi
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class Texture:
    """A field and what it was made of, each float64 [z, y, x]."""

    probability: NDArray[np.float64]
    spots: NDArray[np.float64]
    field: NDArray[np.float64]


def texture_field_ref(
    noise: ArrayLike, coin: ArrayLike, sigma_a: float, sigma_b: float, scale: float, base: float, u0: float
) -> Texture:
    """The field for uniform numbers ``noise`` and ``coin`` [z, y, x] and the three drawn parameters."""
    smooth = ndi.gaussian_filter(np.asarray(noise, dtype=np.float64), sigma_a)
    low, high = smooth.min(), smooth.max()
    probability = np.full(smooth.shape, base) if low == high else (smooth - low) / (high - low) * scale + base
    spots = (np.asarray(coin, dtype=np.float64) < probability).astype(np.float64)
    return Texture(probability, spots, field_of_spots_ref(spots, sigma_b, u0))


def field_of_spots_ref(spots: ArrayLike, sigma_b: float, u0: float) -> NDArray[np.float64]:
    """The law's second half: blurred, scaled so that the mean of the values above 0.12 is u0, clipped."""
    blurred = ndi.gaussian_filter(np.asarray(spots, dtype=np.float64), sigma_b)
    bright = blurred[blurred > 0.12]
    return np.clip(blurred * (u0 / bright.mean() if bright.size else 1.0), 0, 1)


def philox4x32_ref(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10: four 32 bit words for a counter of four and a key of two. Source: Salmon et al., SC 2011."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c0, 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c2, 2**32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3
