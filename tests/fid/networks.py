"""Weights of feature networks that a test can make: every number a function of its name, its shape and its place."""

import hashlib
from collections.abc import Mapping

import numpy as np
import torch


def made_weights(shapes: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """float32 weights for a state dict of these shapes: He-normal kernels, norms near the identity, from NumPy's own generator."""
    return {name: _made(name, tuple(tensor.shape)) for name, tensor in shapes.items()}


def _made(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
    rng = np.random.default_rng(seed)
    if name.endswith("num_batches_tracked"):
        return torch.zeros(shape, dtype=torch.int64)
    if len(shape) > 1:
        drawn = rng.standard_normal(shape) * np.sqrt(2.0 / np.prod(shape[1:]))
    elif name.endswith(("running_var", "weight")):
        drawn = rng.uniform(0.8, 1.2, shape)
    else:
        drawn = rng.uniform(-0.1, 0.1, shape)
    return torch.from_numpy(drawn.astype(np.float32))
