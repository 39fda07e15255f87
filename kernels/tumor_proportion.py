"""The judge's agreement with a synthetic tumour: FreeTumor's Eq. 4, from its predictions or straight from its logits."""

from collections.abc import Iterable
from typing import Any

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ftengine.errors import KernelInputError
from ftengine.kernels import _launch
from ftengine.kernels._checks import (
    MASK_DTYPES,
    dtype_name,
    require_apart,
    require_buffer,
    require_tensor,
)
from ftengine.kernels._ops import register
from ftengine.kernels._threads import for_each

_NAME = "tumor_proportion"
_FILE = "tumor_proportion.cu"
_THREADS = 256  # THREADS of the kernel
_VOXELS_PER_THREAD = 32
_LOGIT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_INFINITY_BITS = {torch.float16: 0x7C00, torch.bfloat16: 0x7F80}
_INTEGER_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def tumor_proportion(
    predicted: Tensor, mask: Tensor, *, tumor_classes: Any = None, out: Tensor | None = None
) -> Tensor:
    """Part of each sample's tumour voxels that is predicted as tumour.

    predicted: [B, z, y, x] bool or uint8, where exactly 1 means predicted as tumour (a label map is not a prediction);
        or, with ``tumor_classes``, logits [B, classes, z, y, x] float32, float16, bfloat16 or float64, where a voxel
        is predicted as tumour if its most probable class is one of the tumour's. Of equal logits the lowest class
        wins and NaN counts as the largest, as in ``torch.argmax`` and ``numpy.argmax``. C-contiguous, cpu or cuda.
    mask: [B, z, y, x] on the same device, uint8, bool or float32; the tumour is where it is exactly 1. A soft mask
        must be hardened by the caller (``mask > 0.5``): its edge would not count.
    tumor_classes: which classes count. A list, tuple, range or set of integers: these, for all samples. A tensor or
        array: for each sample its own, either integers [B], one class each, on the host, or bool [B, classes], any
        number each, on the host or on the logits' device.
    out: float32 [B] on the same device, or None; memory of its own.

    Returns ``out`` or a new tensor: hits / voxels, counted in 64 bit integers, the quotient rounded from float64; the
    same bits on both paths. A sample with an empty mask gives 0. Without a gradient. Logits are read only inside the
    mask, and nothing of their size is made; on CUDA two counters a sample are allocated, and without a table on the
    device one of B x classes bytes. A CUDA graph needs a table on the device: its capture would keep the address of a
    copy on the host that is gone at replay.
    Raises KernelInputError, before any launch, for wrong types, dtypes, shapes, devices or memory order, for classes
    outside 0 to classes - 1 and for a sample without a class (not looked for in a table on the device, where it gives 0).
    Source: FreeTumor, Eq. 4, per sample; the comparison with the threshold T (Eq. 5) is the caller's.
    """
    if tumor_classes is None:
        given: object = predicted
        if isinstance(given, Tensor) and given.dtype in _LOGIT_DTYPES:
            raise KernelInputError(
                f"{_NAME}: predicted is {dtype_name(predicted.dtype)}; want uint8 or bool, or logits with tumor_classes. "
                "Say which classes are tumours: tumor_classes=[2]."
            )
        require_tensor(_NAME, "predicted", predicted, MASK_DTYPES)
        like, classes = ("predicted", predicted), None
    else:
        require_tensor(_NAME, "logits", predicted, _LOGIT_DTYPES, axes="batch class z y x")
        if predicted.shape[1] == 0:
            raise KernelInputError(
                f"{_NAME}: logits has shape {tuple(predicted.shape)}, no class; want at least one. "
                "Check the segmenter's output."
            )
        like, classes = ("one class of logits", predicted[:, 0]), _classes_of(tumor_classes, predicted)
    require_tensor(_NAME, "mask", mask, (*MASK_DTYPES, torch.float32), like=like)
    predicted, mask = predicted.detach(), mask.detach()
    if out is None:
        proportion: Tensor = _proportion(predicted, mask, classes)
        return proportion
    require_buffer(_NAME, out, torch.float32, (predicted.shape[0],), predicted.device, axes="batch")
    _proportion_out(predicted, mask, classes, out)
    return out


def _classes_of(tumor_classes: Any, logits: Tensor) -> Tensor:
    """What the operator takes: bool [B, classes], or int64 [1 or B, n] on the host, the classes of all or of each."""
    batch, num_classes = logits.shape[:2]
    if isinstance(tumor_classes, np.ndarray):
        if tumor_classes.dtype.kind not in "biu":
            raise KernelInputError(
                f"{_NAME}: tumor_classes holds {tumor_classes.dtype}; want integers or bool. Convert it before the call."
            )
        tumor_classes = torch.from_numpy(np.ascontiguousarray(tumor_classes))
    if not isinstance(tumor_classes, Tensor):
        return _classes_of_all(tumor_classes)
    if tumor_classes.dtype == torch.bool:
        wanted: tuple[int, ...] = (batch, num_classes)
        devices = {torch.device("cpu"), logits.device}
        meaning, place = "a sample, a class", f"the host or {logits.device}"
    elif tumor_classes.dtype in _INTEGER_DTYPES:
        wanted, devices = (batch,), {torch.device("cpu")}
        meaning, place = "one class a sample", "the host, where it is checked"
    else:
        raise KernelInputError(
            f"{_NAME}: tumor_classes is {dtype_name(tumor_classes.dtype)}; want int64 or bool. Convert it before the call."
        )
    if tuple(tumor_classes.shape) != wanted:
        raise KernelInputError(
            f"{_NAME}: tumor_classes has shape {tuple(tumor_classes.shape)}; want {wanted}, {meaning}. "
            "Give classes that hold for all samples as a list."
        )
    if tumor_classes.device not in devices:
        raise KernelInputError(
            f"{_NAME}: tumor_classes is on {tumor_classes.device}; want {place}. Keep it there, or give a bool table."
        )
    if tumor_classes.dtype == torch.bool:
        return tumor_classes.contiguous()
    return tumor_classes.to(torch.int64).view(batch, 1)


def _classes_of_all(tumor_classes: object) -> Tensor:
    values = list(tumor_classes) if isinstance(tumor_classes, Iterable) else None
    if values is None or not all(isinstance(c, int | np.integer) and not isinstance(c, bool) for c in values):
        raise KernelInputError(
            f"{_NAME}: tumor_classes is {tumor_classes!r}; want class indices, such as [2, 4]. "
            "Give a table of bool as an array or tensor."
        )
    if not values:
        raise KernelInputError(f"{_NAME}: tumor_classes is empty; want at least one class. Name the tumour's class.")
    return torch.tensor([[int(c) for c in values]], dtype=torch.int64)


def _table_of(classes: Tensor, batch: int, num_classes: int) -> NDArray[np.bool_]:
    """[B, classes] from what lies on the host, after a look at its values."""
    table: NDArray[np.bool_]
    if classes.dtype == torch.bool:
        table = classes.numpy()
        without = np.flatnonzero(~table.any(axis=1))
        if without.size:
            raise KernelInputError(
                f"{_NAME}: tumor_classes has no class for sample {without[0]}; want at least one. Leave the sample out."
            )
        return table
    values = classes.numpy()
    wrong = values[(values < 0) | (values >= num_classes)]
    if wrong.size:
        raise KernelInputError(
            f"{_NAME}: tumor_classes holds {wrong[0]}; want 0 to {num_classes - 1}, the classes of the logits. "
            "Check which region the segmenter was trained on."
        )
    table = np.zeros((batch, num_classes), dtype=np.bool_)
    np.put_along_axis(table, np.broadcast_to(values, (batch, values.shape[1])), True, axis=1)
    return table


def _run_out(predicted: Tensor, mask: Tensor, classes: Tensor | None, out: Tensor) -> None:
    apart_from = [("logits" if classes is not None else "predicted", predicted), ("mask", mask)]
    require_apart(_NAME, out, apart_from=apart_from)
    table = None
    if classes is not None and classes.device.type == "cpu":
        table = _table_of(classes, *predicted.shape[:2])
    if _launch.uses_kernel(predicted):
        on_device = classes if table is None else _launch.upload(table.view(np.uint8), predicted.device)
        _proportion_by_kernel(predicted, mask, on_device, out)
        return
    proportions = out.numpy()
    inside, flat = mask.flatten(1).numpy(), predicted.flatten(1 if table is None else 2)
    if flat.dtype not in _INFINITY_BITS:
        values, infinity = flat.numpy(), None
    else:
        values, infinity = flat.view(torch.int16).numpy(), _INFINITY_BITS[flat.dtype]

    def judge(b: int) -> None:
        if table is None:
            proportions[b] = _proportion_of_predicted(values[b], inside[b])
        else:
            proportions[b] = _proportion_of_logits(values[b], inside[b], table[b], infinity)

    for_each(len(out), judge)


def _run(predicted: Tensor, mask: Tensor, classes: Tensor | None) -> Tensor:
    out = _fake(predicted, mask, classes)
    _run_out(predicted, mask, classes, out)
    return out


def _fake(predicted: Tensor, _mask: Tensor, _classes: Tensor | None) -> Tensor:
    return predicted.new_empty(predicted.shape[0], dtype=torch.float32)


def _proportion_by_kernel(predicted: Tensor, mask: Tensor, is_tumor: Tensor | None, out: Tensor) -> None:
    batch = len(out)
    if mask.numel() == 0:
        out.zero_()
        return
    num_voxels = mask.numel() // batch
    counts = torch.zeros((batch, 2), dtype=torch.int64, device=out.device)
    blocks_per_sample = _launch.blocks_for(num_voxels, _THREADS * _VOXELS_PER_THREAD)
    suffix = "float32" if mask.dtype == torch.float32 else "uint8"
    pointers = tuple(_launch.pointer(tensor) for tensor in (counts, predicted, mask))
    lengths = (np.int64(num_voxels), np.int32(blocks_per_sample))
    _launch.launch(
        _FILE,
        f"count_hits_{suffix}" if is_tumor is None else f"count_hits_{dtype_name(predicted.dtype)}_{suffix}",
        (batch * blocks_per_sample,),
        (_THREADS,),
        (*pointers, *lengths)
        if is_tumor is None
        else (*pointers, _launch.pointer(is_tumor), np.int64(predicted.shape[1]), *lengths),
        out.device,
    )
    _launch.launch(
        _FILE,
        "divide_counts",
        (_launch.blocks_for(batch, _THREADS),),
        (_THREADS,),
        (_launch.pointer(out), _launch.pointer(counts), np.int64(batch)),
        out.device,
    )


# ---- CPU path, one sample: NumPy finds the mask's voxels, few of many; numba looks at their logits ----


def _proportion_of_predicted(predicted: NDArray[Any], mask: NDArray[Any]) -> float:
    """Both [voxels]."""
    tumor = mask == 1
    num_voxels = np.count_nonzero(tumor)
    return np.count_nonzero(tumor & (predicted == 1)) / num_voxels if num_voxels else 0.0


def _proportion_of_logits(
    logits: NDArray[Any], mask: NDArray[Any], is_tumor: NDArray[np.bool_], infinity: int | None
) -> float:
    """logits: [classes, voxels], halves as int16 beside their infinity; mask: [voxels]; is_tumor: [classes]."""
    voxels = np.flatnonzero(mask == 1)
    if not voxels.size:
        return 0.0
    if infinity is None:
        return int(_hits_of_floats(logits, voxels, is_tumor)) / voxels.size
    return int(_hits_of_halves(logits, voxels, is_tumor, infinity)) / voxels.size


@numba.njit(nogil=True, cache=True)
def _hits_of_floats(logits: NDArray[Any], voxels: NDArray[np.int64], is_tumor: NDArray[np.bool_]) -> int:
    hits = 0
    for i in voxels:
        best, most_probable = logits[0, i], 0
        for c in range(1, logits.shape[0]):
            logit = logits[c, i]
            if logit > best or (np.isnan(logit) and not np.isnan(best)):
                best, most_probable = logit, c
        hits += is_tumor[most_probable]
    return hits


@numba.njit(nogil=True, cache=True)
def _hits_of_halves(
    logits: NDArray[np.int16], voxels: NDArray[np.int64], is_tumor: NDArray[np.bool_], infinity: int
) -> int:
    """Bits of sign and magnitude as integers that compare alike, NaN above all."""
    hits = 0
    for i in voxels:
        best, most_probable = np.int64(-0x8000), 0
        for c in range(logits.shape[0]):
            bits = np.int64(logits[c, i])
            logit = bits & 0x7FFF
            if logit > infinity:
                logit = np.int64(0x8000)
            elif bits < 0:
                logit = -logit
            if logit > best:
                best, most_probable = logit, c
        hits += is_tumor[most_probable]
    return hits


_proportion = register("tumor_proportion(Tensor predicted, Tensor mask, Tensor? classes) -> Tensor", _run, _fake)
_proportion_out = register(
    "tumor_proportion_out(Tensor predicted, Tensor mask, Tensor? classes, Tensor(a!) out) -> ()",
    _run_out,
    lambda _predicted, _mask, _classes, _out: None,
)
