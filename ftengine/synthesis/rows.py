"""Plain work on the patches of a batch, each function the same on both devices.

On a GPU it is torch's, without a host sync. On the CPU it is NumPy's, patch by patch in the threads of the kernels: torch would use threads of
its own, which spin for the next piece of work and so take the cores from the loader's other threads.
"""

from collections.abc import Sequence

import numpy as np
import torch

from ftengine.kernels import for_each, upload


def copied(batch: torch.Tensor) -> torch.Tensor:
    """A contiguous copy of a tensor whose first axis counts patches."""
    if batch.device.type == "cuda":
        return batch.clone(memory_format=torch.contiguous_format)
    result = torch.empty_like(batch, memory_format=torch.contiguous_format)
    to, given = result.numpy(), batch.detach().numpy()
    for_each(len(to), lambda i: np.copyto(to[i], given[i]))
    return result


def count_voxels(mask: torch.Tensor) -> torch.Tensor:
    """Voxels above 0 of each mask: int64 [R]. mask: uint8 [R, z, y, x] of 0 and 1."""
    if mask.device.type == "cuda":
        return mask.flatten(1).sum(1, dtype=torch.int64)
    counts, values = np.zeros(len(mask), dtype=np.int64), mask.numpy()

    def count(i: int) -> None:
        counts[i] = np.count_nonzero(values[i])

    for_each(len(mask), count)
    return torch.from_numpy(counts)


def voxels_of_value(label: torch.Tensor, values: Sequence[int]) -> torch.Tensor:
    """1 where a patch's label has its value, else 0: uint8 [R, z, y, x]. label: uint8 [R, z, y, x]; values: R label values."""
    wanted = np.array(values, dtype=np.uint8)
    if label.device.type == "cuda":
        return (label == upload(wanted, label.device).view(-1, 1, 1, 1)).contiguous().view(torch.uint8)
    result = torch.empty_like(label, memory_format=torch.contiguous_format)
    to, given = result.numpy().view(bool), label.numpy()
    for_each(len(wanted), lambda i: np.equal(given[i], wanted[i], out=to[i]))
    return result


def with_values(
    label: torch.Tensor, mask: torch.Tensor, box: torch.Tensor, values: Sequence[int], passed: torch.Tensor | None
) -> torch.Tensor:
    """A copy of the labels with each patch's value where its mask is 1, in patches that passed (None: in all).

    label, mask: uint8 [R, z, y, x]; box: int64 [R, 2, 3], outside of which the masks are 0; passed: bool [R].
    """
    chosen = np.array(values, dtype=np.uint8)
    if label.device.type == "cuda":
        kept = mask if passed is None else mask * passed.view(-1, 1, 1, 1)
        return torch.where(kept.view(torch.bool), upload(chosen, mask.device).view(-1, 1, 1, 1), label)
    result = torch.empty_like(label, memory_format=torch.contiguous_format)
    to, given, where = result.numpy(), label.numpy(), mask.numpy().view(bool)
    corners = box.numpy().tolist()
    verdicts = [True] * len(chosen) if passed is None else passed.numpy().tolist()

    def write(i: int) -> None:
        np.copyto(to[i], given[i])
        if verdicts[i]:
            (z0, y0, x0), (z1, y1, x1) = corners[i]
            place = (slice(z0, z1), slice(y0, y1), slice(x0, x1))
            np.copyto(to[i][place], chosen[i], where=where[i][place])

    for_each(len(chosen), write)
    return result


def mean_inside(
    values: torch.Tensor, mask: torch.Tensor, box: torch.Tensor, *, tanh_of: torch.Tensor | None = None
) -> torch.Tensor:
    """Mean of the values, or of their product with the tanh of others, where each patch's mask is 1: float32 [R]; 0 where it is 1 nowhere.

    values, tanh_of: float32 [R, z, y, x]; mask: uint8 [R, z, y, x], 0 outside box: int64 [R, 2, 3]. Summed in float64. Differentiable.
    """
    requires_grad = values.requires_grad or (tanh_of is not None and tanh_of.requires_grad)
    if values.device.type == "cuda" or requires_grad:
        picked = values if tanh_of is None else values * torch.tanh(tanh_of)
        inside = mask.view(torch.bool)
        total = torch.where(inside, picked, 0.0).flatten(1).sum(1, dtype=torch.float64)
        return (total / inside.flatten(1).sum(1).clamp(min=1)).to(torch.float32)
    means = np.zeros(len(mask), dtype=np.float32)
    given, masks, corners = values.numpy(), mask.numpy().view(bool), box.numpy()
    others = None if tanh_of is None else tanh_of.numpy()

    def average(i: int) -> None:
        (z0, y0, x0), (z1, y1, x1) = np.clip(corners[i], 0, masks.shape[1:]).tolist()
        place = (slice(z0, z1), slice(y0, y1), slice(x0, x1))
        inside = masks[i][place]
        picked = given[i][place][inside]
        if others is not None:
            picked = picked * np.tanh(others[i][place][inside])
        if picked.size:
            means[i] = picked.sum(dtype=np.float64) / picked.size

    for_each(len(means), average)
    return torch.from_numpy(means)
