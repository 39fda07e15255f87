"""A training patch from a padded read of the store, in one pass: crop, turn, flip, window, scale and shift.

All turns of the axial plane are a transpose of y and x, then flips. ``numpy.rot90(patch, k, axes=(-2, -1))`` is

===  ============  ==========================
k    transpose_yx  flip_zyx
===  ============  ==========================
0    False         (False, False, False)
1    True          (False, True, False)
2    False         (False, True, True)
3    True          (False, False, True)
===  ============  ==========================

Flips before the turn act on the other axis behind a transpose: exchange those of y and x for k = 1 and 3, then
combine (exclusive or) with the table.

In float32 the result equals that of DALI's own operators on the CPU bit by bit: both round after each operation.
"""

import math
from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ftengine.errors import KernelInputError
from ftengine.geometry import IntZYX
from ftengine.kernels import _launch
from ftengine.kernels._checks import (
    dtype_name,
    host_floats,
    host_integers,
    refuse_gradient,
    require_apart,
    require_buffer,
    require_shape_zyx,
    require_tensor,
)
from ftengine.kernels._ops import register
from ftengine.kernels._threads import for_each

COMPILE_OPTIONS = ("--fmad=false",)  # the same rounding as on the CPU

_NAME = "prepare_patch"
_FILE = "prepare_patch.cu"
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_TILE, _ROWS = 32, 8  # of the kernel
_AXES = "zyx"
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def prepare_patch(
    image: Tensor,
    label: Tensor,
    *,
    shape_zyx: Sequence[int],
    window_hu: Sequence[float],
    origin_zyx: Any = None,
    transpose_yx: Any = None,
    flip_zyx: Any = None,
    scale: Any = None,
    shift: Any = None,
    dtype: torch.dtype = torch.float32,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Crop, transpose, flip, window to [0, 1], scale and shift: padded reads [B, Z, Y, X] -> patches [B, z, y, x].

    image: [B, Z, Y, X] int16 HU; label: the same shape and device, uint8. C-contiguous, cpu or cuda.
    shape_zyx: z, y, x of the result, the same for all samples.
    window_hu: the HU that become 0 and 1, low below high; what lies outside is clipped.
    origin_zyx: [B, 3] integers, first voxel of each sample's crop in its read; None: 0. The crop is taken before
        the transpose: for a transposed sample it has z, x, y voxels on the axes of the read.
    transpose_yx: [B] bool, exchange y and x; None: no. flip_zyx: [B, 3] bool, turn z, y, x round, after the transpose;
        None: no. The module's docstring has the table of the quarter turns.
    scale, shift: [B] real numbers, used as float32: the windowed value times scale plus shift, clipped to [0, 1] once
        more; None: 1 and 0.
    dtype: of the resulting image: float32, float16 or bfloat16, rounded to the nearest, ties to even.
    out: (image, label) of the results' shape, dtypes and device, or None; memory of their own.

    The parameters are nested sequences, NumPy arrays or tensors on the host, or tensors on the image's device: int64
    for origin_zyx, bool, float32. On the host their values are checked. On a GPU they are not (that would stall it):
    there a crop that leaves its read is moved to the nearest place inside, NaN gives NaN, and because a transpose is not
    known both orientations of the crop must fit the read. A CUDA graph needs all of them on the device, or None.
    Returns ``out`` or new tensors: image [B, z, y, x] of ``dtype`` in [0, 1], label uint8 [B, z, y, x]. The same bits
    on both paths, and for float32 those of DALI's own operators on the CPU: float32, each operation rounded,
    (HU - low) * (1 / (high - low)) with the reciprocal taken in float64. On CUDA only the parameters that lie on the
    host are copied, through one small buffer. Not differentiable.
    Raises KernelInputError, before any launch, for wrong types, dtypes, shapes, devices or memory order, a crop outside
    its read, numbers that are not finite, a window of no width, and a scale or shift that wants a gradient.
    Source: the order of FreeTumor's released augmentations; the released code does not clip after scale and shift.
    """
    require_tensor(_NAME, "image", image, (torch.int16,))
    require_tensor(_NAME, "label", label, (torch.uint8,), like=("image", image))
    shape = require_shape_zyx(_NAME, shape_zyx)
    low_hu, high_hu = _checked_window(window_hu)
    if dtype not in _DTYPES:
        wanted = " or ".join(dtype_name(known) for known in _DTYPES)
        raise KernelInputError(f"{_NAME}: dtype is {dtype}; want {wanted}. Convert the result instead.")
    batch, device = image.shape[0], image.device
    parameters = (
        _parameter("origin_zyx", origin_zyx, torch.int64, (batch, 3), device),
        _parameter("transpose_yx", transpose_yx, torch.bool, (batch,), device),
        _parameter("flip_zyx", flip_zyx, torch.bool, (batch, 3), device),
        _parameter("scale", scale, torch.float32, (batch,), device),
        _parameter("shift", shift, torch.float32, (batch,), device),
    )
    _require_room(image, shape, parameters[1])
    if out is None:
        patch: tuple[Tensor, Tensor] = _prepare(image, label, shape, low_hu, high_hu, *parameters, dtype)
        return patch
    given: object = out
    if not isinstance(given, tuple) or len(given) != 2:
        raise KernelInputError(
            f"{_NAME}: out is a {type(given).__name__}; want a tuple of two tensors, image and label."
        )
    require_buffer(_NAME, out[0], dtype, (batch, *shape), device, name="out[0]")
    require_buffer(_NAME, out[1], torch.uint8, (batch, *shape), device, name="out[1]")
    _prepare_out(image, label, shape, low_hu, high_hu, *parameters, *out)
    return out


def _checked_window(window_hu: Sequence[float]) -> tuple[float, float]:
    low, high = (float(hu) for hu in window_hu) if len(window_hu) == 2 else (0.0, 0.0)
    # a width of 1e-30 HU has a reciprocal that float32 holds
    if not (math.isfinite(low) and math.isfinite(high) and high - low > 1e-30):
        raise KernelInputError(
            f"{_NAME}: window_hu={tuple(window_hu)}; want two finite HU, the lower one first. Check region.window_hu."
        )
    return low, high


def _parameter(
    name: str, value: Any, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device
) -> Tensor | None:
    """A parameter as the operator takes it: of one dtype, on the host or on the image's device."""
    if value is None:
        return None
    if not isinstance(value, Tensor):
        value = torch.from_numpy(_host_array(name, value, dtype))
    refuse_gradient(_NAME, name, value, "the intensity is not differentiated")
    if value.device.type == "cpu":
        kinds = {torch.bool: (torch.bool,), torch.int64: _INTEGERS, torch.float32: _FLOATS}[dtype]
    elif value.device == device:
        kinds = (dtype,)
    else:
        raise KernelInputError(
            f"{_NAME}: {name} is on {value.device}; want the host or {device}. Move it: {name}.cpu()."
        )
    if value.dtype not in kinds:
        raise KernelInputError(
            f"{_NAME}: {name} is {dtype_name(value.dtype)}; want {dtype_name(dtype)}. "
            f"Convert it: {name}.to(torch.{dtype_name(dtype)})."
        )
    if tuple(value.shape) != shape:
        wanted = "a value a sample" if len(shape) == 1 else "z y x of each sample"
        raise KernelInputError(
            f"{_NAME}: {name} has shape {tuple(value.shape)}; want {shape}, {wanted}. Give it for every sample."
        )
    return value.detach().to(dtype).contiguous()


def _host_array(name: str, value: Any, dtype: torch.dtype) -> NDArray[Any]:
    if dtype == torch.int64:
        return host_integers(_NAME, name, value)
    if dtype == torch.float32:
        return host_floats(_NAME, name, value)
    array = np.asarray(value)
    if array.size == 0:
        return array.astype(np.bool_)  # an empty list is of float64
    if array.dtype != np.bool_:
        raise KernelInputError(f"{_NAME}: {name} holds {array.dtype}; want bool. Compare it with 0 before the call.")
    return array


def _is_unseen(parameter: Tensor | None) -> bool:
    """Whether a parameter's values cannot be looked at without a wait for the device."""
    return parameter is not None and parameter.device.type != "cpu"


def _require_room(image: Tensor, shape: IntZYX, transpose: Tensor | None) -> None:
    """What the shapes alone tell; each sample's own crop is looked at in the operator, where values are known."""
    z, y, x = shape
    _, read_z, read_y, read_x = image.shape
    straight, turned = read_y >= y and read_x >= x, read_y >= x and read_x >= y
    also = ""
    if transpose is None:
        fits = straight
    elif _is_unseen(transpose):
        fits, also = straight and turned, ", and with y and x exchanged, as transpose_yx is on the device"
    else:
        fits = straight or turned
    if read_z < z or not fits:
        raise KernelInputError(
            f"{_NAME}: shape_zyx={shape}, and a read has {(read_z, read_y, read_x)} voxels; want a crop inside it{also}. "
            "Read a larger box, padded where the volume ends."
        )


def _require_crops_inside(
    read: IntZYX, batch: int, shape: IntZYX, origin: Tensor | None, transpose: Tensor | None
) -> None:
    """Look at the crops whose place is known on the host; one that may be transposed must fit in both orientations."""
    z, y, x = shape
    lengths = np.full((batch, 3), (z, y, x), dtype=np.int64)
    if _is_unseen(transpose):
        lengths[:, 1:] = max(y, x)
    elif transpose is not None:
        lengths[transpose.numpy()] = (z, x, y)
    first = np.zeros((batch, 3), dtype=np.int64)
    if origin is not None and not _is_unseen(origin):
        first = origin.numpy()
    wrong = np.argwhere((first < 0) | (first > np.array(read) - lengths))
    if wrong.size:
        b, axis = wrong[0]
        start, length = int(first[b, axis]), int(lengths[b, axis])
        raise KernelInputError(
            f"{_NAME}: sample {b} is cropped from {start} to {start + length} on {_AXES[axis]} of the read, which has "
            f"{read[axis]} voxels there; want a crop inside it (before the transpose, where y and x are exchanged). "
            "Check origin_zyx, or read a larger box, padded where the volume ends."
        )


def _require_finite(name: str, value: Tensor | None) -> None:
    if value is not None and not _is_unseen(value) and not np.isfinite(value.numpy()).all():
        raise KernelInputError(
            f"{_NAME}: {name} holds NaN or infinity (in float32); want finite numbers. Check how it was drawn."
        )


def _run_out(
    image: Tensor,
    label: Tensor,
    shape: Sequence[int],
    low_hu: float,
    high_hu: float,
    origin: Tensor | None,
    transpose: Tensor | None,
    flip: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    out_image: Tensor,
    out_label: Tensor,
) -> None:
    z, y, x = shape
    _, read_z, read_y, read_x = image.shape
    _require_crops_inside((read_z, read_y, read_x), len(image), (z, y, x), origin, transpose)
    _require_finite("scale", scale)
    _require_finite("shift", shift)
    inputs = [("image", image), ("label", label)]
    require_apart(_NAME, out_image, apart_from=inputs)
    require_apart(_NAME, out_label, apart_from=[*inputs, ("out[0]", out_image)])
    if len(image) == 0:
        return
    low, per_hu = np.float32(low_hu), np.float32(1.0 / (high_hu - low_hu))
    if _launch.uses_kernel(image):
        on_device = _on_device((origin, transpose, flip, scale, shift), image.device)
        _launch_kernel(image, label, low, per_hu, on_device, out_image, out_label)
        return
    origins = _values(origin, (len(image), 3), 0, np.int64)
    turned = _values(transpose, (len(image),), 0, np.bool_)
    flips = _values(flip, (len(image), 3), 0, np.bool_)
    scales, shifts = _values(scale, (len(image),), 1, np.float32), _values(shift, (len(image),), 0, np.float32)
    from_image, from_label, to_label = image.numpy(), label.numpy(), out_label.numpy()
    halves, is_bfloat16 = out_image.dtype != torch.float32, out_image.dtype == torch.bfloat16
    to_image = (out_image.view(torch.uint16) if halves else out_image).numpy()

    def prepare(b: int) -> None:
        where = (to_image[b], to_label[b], from_image[b], from_label[b], origins[b], turned[b], flips[b])
        if halves:
            _prepare_half(*where, low, per_hu, scales[b], shifts[b], is_bfloat16)
        else:
            _prepare_float32(*where, low, per_hu, scales[b], shifts[b])

    for_each(len(image), prepare)


def _run(
    image: Tensor,
    label: Tensor,
    shape: Sequence[int],
    low_hu: float,
    high_hu: float,
    origin: Tensor | None,
    transpose: Tensor | None,
    flip: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    out = _empty(image, label, shape, dtype)
    _run_out(image, label, shape, low_hu, high_hu, origin, transpose, flip, scale, shift, *out)
    return out


def _empty(image: Tensor, label: Tensor, shape: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    size = (image.shape[0], *shape)
    return image.new_empty(size, dtype=dtype), label.new_empty(size)


def _on_device(parameters: Sequence[Tensor | None], device: torch.device) -> list[Tensor | None]:
    """The same parameters on the image's device; those on the host travel in one copy, widest first for alignment."""
    result = list(parameters)
    on_host = [(k, p) for k, p in enumerate(parameters) if p is not None and p.device != device]
    if device.type == "cpu" or not on_host:
        return result
    on_host.sort(key=lambda item: -item[1].element_size())
    parts = [np.frombuffer(p.numpy().tobytes(), dtype=np.uint8) for _, p in on_host]
    buffer, first = _launch.upload(np.concatenate(parts), device), 0
    for (k, p), part in zip(on_host, parts, strict=True):
        result[k] = buffer[first : first + len(part)].view(p.dtype).view(p.shape)
        first += len(part)
    return result


def _launch_kernel(
    image: Tensor,
    label: Tensor,
    low: np.float32,
    per_hu: np.float32,
    parameters: Sequence[Tensor | None],
    out_image: Tensor,
    out_label: Tensor,
) -> None:
    """parameters: origin, transpose, flip, scale and shift, each on the image's device or None."""
    batch, z, y, x = out_image.shape
    _launch.launch(
        _FILE,
        f"prepare_patch_{dtype_name(out_image.dtype)}",
        (-(-y // _TILE) * -(-x // _TILE), min(z, _launch.MAX_BLOCKS_YZ), min(batch, _launch.MAX_BLOCKS_YZ)),
        (_TILE, _ROWS),
        (
            *(_launch.pointer(tensor) for tensor in (out_image, out_label, image, label, *parameters)),
            low,
            per_hu,
            *(np.int64(n) for n in (*out_image.shape, *image.shape[1:])),
        ),
        image.device,
        options=COMPILE_OPTIONS,
    )


# ---- CPU path, one sample: planes of HU are put in the result's order, then computed, both loops without a branch ----

_CPU_TILE = 32  # rows of 64 bytes on both sides stay in the first cache


def _values(parameter: Tensor | None, shape: tuple[int, ...], default: int, dtype: Any) -> NDArray[Any]:
    return np.full(shape, default, dtype=dtype) if parameter is None else parameter.numpy()


@numba.njit(nogil=True, cache=True)
def _turn(
    turned: NDArray[Any], plane: NDArray[Any], first_y: int, first_x: int, transpose: bool, flip_y: bool, flip_x: bool
) -> None:
    """The crop of a plane [Y, X] that begins at first_y, first_x, in the order of the result [y, x].

    Indices are unsigned, so that numba does not ask at each voxel whether one counts from the end.
    """
    ny, nx = turned.shape
    if not transpose:
        for y in range(ny):
            row = plane[first_y + (ny - 1 - y if flip_y else y)]
            if flip_x:
                last = first_x + nx - 1
                for x in range(nx):
                    turned[y, x] = row[np.uint64(last - x)]
            else:
                for x in range(nx):
                    turned[y, x] = row[np.uint64(first_x + x)]
        return
    for tile_x in range(0, nx, _CPU_TILE):
        width = min(_CPU_TILE, nx - tile_x)
        for tile_y in range(0, ny, _CPU_TILE):
            for y in range(tile_y, min(tile_y + _CPU_TILE, ny)):
                from_x = np.uint64(first_x + (ny - 1 - y if flip_y else y))
                part = turned[y, tile_x : tile_x + width]
                if flip_x:
                    last = first_y + nx - 1 - tile_x
                    for x in range(width):
                        part[x] = plane[np.uint64(last - x), from_x]
                else:
                    first = first_y + tile_x
                    for x in range(width):
                        part[x] = plane[np.uint64(first + x), from_x]


@numba.njit(nogil=True, cache=True)
def _window(
    unit: NDArray[np.float32],
    hu: NDArray[np.int16],
    low: np.float32,
    per_hu: np.float32,
    scale: np.float32,
    shift: np.float32,
) -> None:
    """Both [y, x]; comparisons as DALI's, which keep a -0."""
    zero, one = np.float32(0), np.float32(1)
    for y in range(hu.shape[0]):
        for x in range(hu.shape[1]):
            value = (np.float32(hu[y, x]) - low) * per_hu
            value = zero if value < zero else value
            value = one if value > one else value
            value = value * scale + shift
            value = zero if value < zero else value
            unit[y, x] = one if value > one else value


@numba.njit(nogil=True, cache=True)
def _prepare_float32(
    to_image: NDArray[np.float32],
    to_label: NDArray[np.uint8],
    from_image: NDArray[np.int16],
    from_label: NDArray[np.uint8],
    origin: NDArray[np.int64],
    transpose: bool,
    flip: NDArray[np.bool_],
    low: np.float32,
    per_hu: np.float32,
    scale: np.float32,
    shift: np.float32,
) -> None:
    nz = len(to_image)
    hu = np.empty(to_image.shape[1:], dtype=np.int16)
    for z in range(nz):
        from_z = origin[0] + (nz - 1 - z if flip[0] else z)
        _turn(hu, from_image[from_z], origin[1], origin[2], transpose, flip[1], flip[2])
        _window(to_image[z], hu, low, per_hu, scale, shift)
        _turn(to_label[z], from_label[from_z], origin[1], origin[2], transpose, flip[1], flip[2])


@numba.njit(nogil=True, cache=True)
def _prepare_half(
    to_image: NDArray[np.uint16],
    to_label: NDArray[np.uint8],
    from_image: NDArray[np.int16],
    from_label: NDArray[np.uint8],
    origin: NDArray[np.int64],
    transpose: bool,
    flip: NDArray[np.bool_],
    low: np.float32,
    per_hu: np.float32,
    scale: np.float32,
    shift: np.float32,
    is_bfloat16: bool,
) -> None:
    nz = len(to_image)
    hu = np.empty(to_image.shape[1:], dtype=np.int16)
    unit = np.empty(to_image.shape[1:], dtype=np.float32)
    for z in range(nz):
        from_z = origin[0] + (nz - 1 - z if flip[0] else z)
        _turn(hu, from_image[from_z], origin[1], origin[2], transpose, flip[1], flip[2])
        _window(unit, hu, low, per_hu, scale, shift)
        _round(to_image[z], unit, unit.view(np.uint32), is_bfloat16)
        _turn(to_label[z], from_label[from_z], origin[1], origin[2], transpose, flip[1], flip[2])


@numba.njit(nogil=True, cache=True)
def _round(half: NDArray[np.uint16], unit: NDArray[np.float32], bits: NDArray[np.uint32], is_bfloat16: bool) -> None:
    """Values in [0, 1] or -0, to the nearest, ties to even; ``bits`` is ``unit``'s memory."""
    for y in range(half.shape[0]):
        if is_bfloat16:
            for x in range(half.shape[1]):
                b = bits[y, x]
                half[y, x] = np.uint16((b + np.uint32(0x7FFF) + ((b >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))
            continue
        for x in range(half.shape[1]):
            b = bits[y, x]
            sign = (b >> np.uint32(16)) & np.uint32(0x8000)
            # below 2^-14 steps are 2^-24, as in float32 between 1/2 and 1: times 2^24 the nearest whole number
            small = np.uint32(np.rint(unit[y, x] * np.float32(2**24)))
            large = (b - np.uint32(0x38000000) + np.uint32(0xFFF) + ((b >> np.uint32(13)) & np.uint32(1))) >> np.uint32(
                13
            )
            half[y, x] = np.uint16(sign + small) if unit[y, x] < np.float32(2**-14) else np.uint16(large)


_SCHEMA = (
    "(Tensor image, Tensor label, SymInt[] shape_zyx, float low_hu, float high_hu, Tensor? origin_zyx, "
    "Tensor? transpose_yx, Tensor? flip_zyx, Tensor? scale, Tensor? shift, "
)
_prepare = register(
    f"prepare_patch{_SCHEMA}ScalarType dtype) -> (Tensor, Tensor)",
    _run,
    lambda image, label, shape, *rest: _empty(image, label, shape, rest[-1]),
)
_prepare_out = register(
    f"prepare_patch_out{_SCHEMA}Tensor(a!) out_image, Tensor(b!) out_label) -> ()", _run_out, lambda *_arguments: None
)
