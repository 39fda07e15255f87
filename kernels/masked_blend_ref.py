"""FreeTumor's Eq. 1 and its gradients as printed, in float64."""

import numpy as np
from numpy.typing import ArrayLike, NDArray


def masked_blend_ref(x: ArrayLike, g: ArrayLike, texture: ArrayLike, mask: ArrayLike) -> NDArray[np.float64]:
    """``(1 - M) x + M (x - tanh(g) texture)`` where M is not 0, x where it is."""
    x, g, texture, mask = (np.asarray(a, dtype=np.float64) for a in (x, g, texture, mask))
    with np.errstate(invalid="ignore"):  # g and texture may be anything outside the mask
        painted = (1 - mask) * x + mask * (x - np.tanh(g) * texture)
    return np.where(mask == 0, x, painted)


def masked_blend_gradients_ref(
    grad_out: ArrayLike, g: ArrayLike, texture: ArrayLike, mask: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Gradients of x, g and texture for the gradient of the result."""
    grad_out, g, texture, mask = (np.asarray(a, dtype=np.float64) for a in (grad_out, g, texture, mask))
    with np.errstate(invalid="ignore"):
        grad_g = (
            -mask * texture / np.cosh(np.clip(g, -350, 350)) ** 2 * grad_out
        )  # beyond 350 the factor is 0 in float64 anyway
        grad_texture = -mask * np.tanh(g) * grad_out
    return grad_out, np.where(mask == 0, 0.0, grad_g), np.where(mask == 0, 0.0, grad_texture)
