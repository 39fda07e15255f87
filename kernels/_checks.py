"""What the kernels demand of their arguments, checked before anything runs: afterwards a wrong pointer is a crash.

Each check raises KernelInputError in one form: where, what was given, what is wanted, the next step. None of them
reads a value of a CUDA tensor, since that would make the host wait for the device.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ftengine.errors import KernelInputError
from ftengine.geometry import IntZYX, int_zyx

MASK_DTYPES = (torch.uint8, torch.bool)
_BATCH_AXES = "batch z y x"
_NUMERALS = {1: "one axis", 2: "two axes", 3: "three axes", 4: "four axes", 5: "five axes"}


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.float32`` as ``float32``."""
    return str(dtype).removeprefix("torch.")


def require_tensor(
    where: str,
    name: str,
    tensor: object,
    dtypes: tuple[torch.dtype, ...],
    *,
    like: tuple[str, Tensor] | None = None,
    shape: tuple[int, ...] | None = None,
    device: torch.device | None = None,
    axes: str = _BATCH_AXES,
) -> None:
    """Check one batch [B, z, y, x]: type, dtype, axes, memory order, device.

    ``axes`` names the axes of a tensor that is no such batch. ``like`` names the tensor whose shape and device are wanted; ``shape`` and ``device`` say the same without a tensor.
    """
    if not isinstance(tensor, Tensor):
        raise KernelInputError(
            f"{where}: {name} is a {type(tensor).__name__}; want a torch tensor. Wrap it with torch.as_tensor."
        )
    wanted = " or ".join(dtype_name(dtype) for dtype in dtypes)
    if tensor.dtype not in dtypes:
        raise KernelInputError(
            f"{where}: {name} is {dtype_name(tensor.dtype)}; want {wanted}. "
            f"Convert it: {name}.to(torch.{dtype_name(dtypes[0])})."
        )
    if tensor.ndim != len(axes.split()):
        example = f" (a channel axis of 1: {name}[:, 0])" if axes == _BATCH_AXES else ""
        raise KernelInputError(
            f"{where}: {name} has shape {tuple(tensor.shape)}; want {_NUMERALS[len(axes.split())]}, {axes}. "
            f"Add or drop an axis{example}."
        )
    if like is not None:
        shape, device = tuple(like[1].shape), like[1].device
    origin = f"that of {like[0]}" if like is not None else axes
    if shape is not None and tuple(tensor.shape) != shape:
        raise KernelInputError(
            f"{where}: {name} has shape {tuple(tensor.shape)}; want {shape}, {origin}. "
            "Crop or broadcast it before the call."
        )
    require_device(where, name, tensor.device)
    if device is not None and tensor.device != device:
        raise KernelInputError(
            f"{where}: {name} is on {tensor.device}; want {device}, like the others. Move it: {name}.to('{device}')."
        )
    if not tensor.is_contiguous():
        raise KernelInputError(
            f"{where}: {name} has strides {tensor.stride()} for shape {tuple(tensor.shape)}; want z, y, x in memory "
            f"order. Call {name}.contiguous()."
        )


def require_device(where: str, name: str, device: torch.device) -> None:
    """A device that has a path: cpu or cuda."""
    if device.type not in {"cpu", "cuda"}:
        raise KernelInputError(f"{where}: {name} is on {device}; want cpu or cuda. Move it: {name}.to('cpu').")


def require_buffer(
    where: str,
    out: Tensor,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    device: torch.device,
    *,
    name: str = "out",
    axes: str = _BATCH_AXES,
) -> None:
    """Check the looks of an ``out`` tensor; ``require_apart`` looks at its memory, where addresses are known."""
    require_tensor(where, name, out, (dtype,), shape=shape, device=device, axes=axes)
    if out.requires_grad:
        raise KernelInputError(
            f"{where}: {name} requires a gradient; want a plain buffer. Pass {name}.detach(), or no out."
        )


def require_apart(
    where: str,
    out: Tensor,
    *,
    may_be: Sequence[tuple[str, Tensor]] = (),
    apart_from: Sequence[tuple[str, Tensor]] = (),
) -> None:
    """Check an ``out`` tensor's memory against that of the inputs.

    It may be one of ``may_be`` itself (the kernel reads a voxel before it writes it) but not overlap a part of one,
    and not overlap any of ``apart_from``.
    """
    memory = _byte_range(out)
    for name, tensor in may_be:
        if _overlap(memory, _byte_range(tensor)) and memory != _byte_range(tensor):
            raise KernelInputError(
                f"{where}: out overlaps a part of {name}; want {name} itself or separate memory. Pass a new buffer."
            )
    for name, tensor in apart_from:
        if _overlap(memory, _byte_range(tensor)):
            raise KernelInputError(f"{where}: out shares memory with {name}; want separate memory. Pass a new buffer.")


def require_output(
    where: str,
    out: Tensor | None,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    device: torch.device,
    *,
    may_be: Sequence[tuple[str, Tensor]] = (),
    apart_from: Sequence[tuple[str, Tensor]] = (),
) -> Tensor:
    """``out`` after checks, or a new tensor where it is None."""
    if out is None:
        return torch.empty(shape, dtype=dtype, device=device)
    require_buffer(where, out, dtype, shape, device)
    require_apart(where, out, may_be=may_be, apart_from=apart_from)
    return out


def _byte_range(tensor: Tensor) -> tuple[int, int]:
    """First address of a contiguous tensor and the first behind it."""
    return tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size()


def _overlap(a: tuple[int, int], b: tuple[int, int]) -> bool:
    return max(a[0], b[0]) < min(a[1], b[1])


def refuse_gradient(where: str, name: str, tensor: Tensor | None, reason: str) -> None:
    """Refuse a tensor that expects a gradient which this kernel would silently not give."""
    if tensor is not None and torch.is_grad_enabled() and tensor.requires_grad:
        raise KernelInputError(
            f"{where}: {name} requires a gradient; {reason}. Pass {name}.detach() or call under torch.no_grad()."
        )


def require_shape_zyx(where: str, shape_zyx: Sequence[int]) -> IntZYX:
    """Three positive lengths."""
    if len(shape_zyx) != 3 or min(shape_zyx) < 1:
        raise KernelInputError(
            f"{where}: shape_zyx={tuple(shape_zyx)}; want three positive lengths z, y, x. Leave the batch axis out."
        )
    return int_zyx(shape_zyx)


def host_floats(where: str, name: str, value: Any) -> NDArray[np.float64]:
    """Small numbers that decide the launch, as float64: from a CPU tensor, an array or nested sequences; all finite."""
    array = _host_array(where, name, value)
    if array.dtype.kind not in "iuf":
        raise KernelInputError(f"{where}: {name} holds {array.dtype}; want real numbers. Convert it before the call.")
    if not np.isfinite(array).all():
        raise KernelInputError(f"{where}: {name} holds NaN or infinity; want finite numbers. Check how it was drawn.")
    return array.astype(np.float64)


def host_integers(where: str, name: str, value: Any) -> NDArray[np.int64]:
    """The same for integers; numbers that happen to be whole are refused, since rounding is the caller's decision."""
    array = _host_array(where, name, value)
    if array.dtype.kind not in "iu":
        raise KernelInputError(f"{where}: {name} holds {array.dtype}; want integers. Round it before the call.")
    return array.astype(np.int64)


def small_table(where: str, name: str, value: Any, dtype: torch.dtype, device: torch.device | None) -> Tensor:
    """A small table as a tensor without a gradient, of int64 or float64: what an operator takes.

    From nested sequences, arrays or CPU tensors; or, where ``device`` names the result's, from a tensor there (integers
    then as int64). Values of tensors are not looked at: that is the operator's business.
    """
    if not isinstance(value, Tensor):
        return torch.from_numpy((host_integers if dtype == torch.int64 else host_floats)(where, name, value))
    if value.device.type != "cpu":
        if device is None:
            raise KernelInputError(
                f"{where}: {name} is on {value.device}; want it on the host, where it decides the launch (reading it "
                "back would stall the device). Draw it on the CPU, or move it once with .cpu()."
            )
        if value.device != device:
            raise KernelInputError(
                f"{where}: {name} is on {value.device}; want {device}, as the result, or the host. Draw it there."
            )
    if dtype == torch.int64:
        if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
            raise KernelInputError(
                f"{where}: {name} holds {dtype_name(value.dtype)}; want integers. Round it before the call."
            )
    elif value.is_complex() or value.dtype == torch.bool:
        raise KernelInputError(
            f"{where}: {name} holds {dtype_name(value.dtype)}; want real numbers. Convert it before the call."
        )
    value = value.detach() if value.requires_grad else value
    return value if value.dtype == dtype else value.to(dtype)


def _host_array(where: str, name: str, value: Any) -> NDArray[Any]:
    if isinstance(value, Tensor):
        if value.device.type != "cpu":
            raise KernelInputError(
                f"{where}: {name} is on {value.device}; want it on the host, where it decides the launch (reading it "
                "back would stall the device). Draw it on the CPU, or move it once with .cpu()."
            )
        value = value.detach()
        value = value.to(torch.float64).numpy() if value.is_floating_point() else value.numpy()  # NumPy has no bfloat16
    try:
        return np.asarray(value)
    except ValueError as error:
        raise KernelInputError(
            f"{where}: {name} is not a regular array ({error}); want rows of numbers. Check its nesting."
        ) from error
