"""Distances between two sets of feature vectors: Frechet (FID) and kernel (KID).

FID is the squared 2-Wasserstein distance of the Gaussians that have the sets' means and covariances (Heusel et al. 2017, Eq. 6). Of few
samples it is too large, by about a constant over their number; KID (Binkowski et al. 2018, section 4) has no such bias.
"""

import numpy as np
from numpy.typing import NDArray

from ftengine.errors import ConfigError

ADVISED_SAMPLES = 2048  # the published FIDs are of 2048 features and tens of thousands of samples
Features = NDArray[np.floating]


def frechet_distance(a: Features, b: Features) -> float:
    """FID of two sets of features [N, D] and [M, D]: ``|mean a - mean b|^2 + tr(A + B - 2 (A B)^(1/2))``, at least 0.

    A and B are the covariances, divided by N - 1 and M - 1. The trace of the root is the sum of the singular values of ``Ra Rb^T``, where
    ``A = Ra^T Ra`` and ``B = Rb^T Rb``: no covariance is formed, no matrix root is taken and nothing is added to a diagonal, so that sets
    of fewer samples than features are as exact as others. In float64. Raises ConfigError for sets that do not fit each other, fewer than two samples, or
    features that are not finite.
    """
    x, y = _checked(a, b)
    mean_x, mean_y = x.mean(axis=0), y.mean(axis=0)
    root_x, root_y = _root(x - mean_x), _root(y - mean_y)
    shared = np.linalg.svd(root_x @ root_y.T, compute_uv=False).sum()
    spread = np.square(root_x).sum() + np.square(root_y).sum() - 2.0 * shared
    return float(np.square(mean_x - mean_y).sum() + max(spread, 0.0))


def kernel_distance(a: Features, b: Features) -> float:
    """KID of two sets of features [N, D] and [M, D]: the unbiased squared MMD with the kernel ``(x . y / D + 1)^3``; can be below 0.

    Over all pairs of different samples; published values are means over random subsets, which have the same expectation. In float64.
    Raises ConfigError as ``frechet_distance`` does.
    """
    x, y = _checked(a, b)
    within_x, within_y = _kernel(x, x), _kernel(y, y)
    n, m = len(x), len(y)
    mean_x = (within_x.sum() - np.trace(within_x)) / (n * (n - 1))
    mean_y = (within_y.sum() - np.trace(within_y)) / (m * (m - 1))
    return float(mean_x + mean_y - 2.0 * _kernel(x, y).mean())


def sample_advice(num_real: int, num_painted: int, num_features: int) -> str | None:
    """What a reader of an FID of so few samples should know; None where there are enough."""
    least = min(num_real, num_painted)
    if least > num_features and least >= ADVISED_SAMPLES:
        return None
    few = f"FID of {num_real} real and {num_painted} synthetic samples"
    if least <= num_features:
        return (
            f"{few} with {num_features} features: the covariances do not have full rank and the FID is too large. Compare it only with FIDs "
            "of equally many samples, and read KID, which has no such bias."
        )
    return (
        f"{few}: with fewer than {ADVISED_SAMPLES} it is too large. Compare it only with FIDs of equally many samples, and read KID, which "
        "has no such bias."
    )


def _root(centred: NDArray[np.float64]) -> NDArray[np.float64]:
    """R [min(N, D), D] with ``R^T R`` the covariance of centred samples [N, D]."""
    scaled = centred / np.sqrt(len(centred) - 1)
    if len(scaled) <= scaled.shape[1]:
        return scaled
    return np.asarray(np.linalg.qr(scaled, mode="r"), dtype=np.float64)


def _kernel(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    values: NDArray[np.float64] = (x @ y.T / x.shape[1] + 1.0) ** 3
    return values


def _checked(a: Features, b: Features) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ConfigError(f"features have the shapes {a.shape} and {b.shape}; want [N, D] and [M, D] of one network.")
    if len(a) < 2 or len(b) < 2:
        raise ConfigError(
            f"{len(a)} and {len(b)} samples; want at least 2 of each. Take more volumes, or all slices of a tumour."
        )
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ConfigError(
            "a feature is NaN or infinite; want finite numbers. Check the weights of the feature network."
        )
    return x, y
