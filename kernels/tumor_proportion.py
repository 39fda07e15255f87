"""The judge's agreement with a synthetic tumour: FreeTumor's Eq. 4."""

import numpy as np
import torch
from torch import Tensor

from ftengine.kernels import _launch
from ftengine.kernels._checks import MASK_DTYPES, require_tensor

_NAME = "tumor_proportion"
_FILE = "tumor_proportion.cu"
_THREADS = 256  # THREADS of the kernel
_VOXELS_PER_THREAD = 32


def tumor_proportion(predicted: Tensor, mask: Tensor) -> Tensor:
    """Part of each sample's tumour voxels that is predicted as tumour.

    predicted: [B, z, y, x] bool or uint8, C-contiguous, cpu or cuda; exactly 1 means predicted as tumour (compare the
        argmax with the tumour's class first: a label map is not a prediction).
    mask: the same shape and device, uint8, bool or float32; the tumour is where it is exactly 1. A soft mask must be
        hardened by the caller (``mask > 0.5``): its edge would not count.

    Returns float32 [B] on the same device: hits / voxels, counted in 64 bit integers, the quotient rounded from
    float64; the same bits on both paths. A sample with an empty mask gives 0. Not differentiable.
    Raises KernelInputError, before any launch, for wrong types, dtypes, shapes, devices or memory order.
    Source: FreeTumor, Eq. 4, per sample; the comparison with the threshold T (Eq. 5) is the caller's.
    """
    require_tensor(_NAME, "predicted", predicted, MASK_DTYPES)
    require_tensor(_NAME, "mask", mask, (torch.uint8, torch.bool, torch.float32), like=("predicted", predicted))
    if _launch.uses_kernel(predicted):
        return _proportion_by_kernel(predicted, mask)
    proportion = torch.zeros(len(predicted), dtype=torch.float32)
    for b, (predicted_here, mask_here) in enumerate(zip(predicted.numpy(), mask.detach().numpy(), strict=True)):
        tumor = mask_here == 1
        num_voxels = np.count_nonzero(tumor)
        if num_voxels:
            proportion[b] = np.count_nonzero(tumor & (predicted_here == 1)) / num_voxels
    return proportion


def _proportion_by_kernel(predicted: Tensor, mask: Tensor) -> Tensor:
    batch = len(predicted)
    proportion = torch.zeros(batch, dtype=torch.float32, device=predicted.device)
    if predicted.numel() == 0:
        return proportion
    num_voxels = predicted.numel() // batch
    counts = torch.zeros((batch, 2), dtype=torch.int64, device=predicted.device)
    blocks_per_sample = _launch.blocks_for(num_voxels, _THREADS * _VOXELS_PER_THREAD)
    suffix = "float32" if mask.dtype == torch.float32 else "uint8"
    _launch.launch(
        _FILE,
        f"count_hits_{suffix}",
        (batch * blocks_per_sample,),
        (_THREADS,),
        (*(_launch.pointer(t) for t in (counts, predicted, mask)), np.int64(num_voxels), np.int32(blocks_per_sample)),
        predicted.device,
    )
    _launch.launch(
        _FILE,
        "divide_counts",
        (_launch.blocks_for(batch, _THREADS),),
        (_THREADS,),
        (_launch.pointer(proportion), _launch.pointer(counts), np.int64(batch)),
        predicted.device,
    )
    return proportion
