"""How a kernel is started: on torch's current stream, over torch's memory, without waiting for the device."""

from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ftengine.kernels._compile import compiled

Argument: TypeAlias = np.generic

MAX_BLOCKS_X = 2**31 - 1  # limits of gridDim.x, and of gridDim.y and gridDim.z, on every device
MAX_BLOCKS_YZ = 65_535


def uses_kernel(tensor: Tensor) -> bool:
    """Whether this tensor takes the CUDA kernel; the CPU path serves the rest."""
    return tensor.is_cuda


def pointer(tensor: Tensor | None) -> np.uint64:
    """Address of a tensor as a kernel's argument; None is the null pointer."""
    return np.uint64(0) if tensor is None else np.uint64(tensor.data_ptr())


def blocks_for(num_items: int, items_per_block: int) -> int:
    """Blocks of a kernel that walks over its items in strides of the whole grid.

    Enough to do it in one step, at most what a grid holds.
    """
    return min(-(-num_items // items_per_block), MAX_BLOCKS_X)


def upload(array: NDArray[Any], device: torch.device) -> Tensor:
    """Copy a small table to the device without a host sync.

    Pageable memory would make the copy wait, so it goes through pinned memory; torch's pinned allocator keeps the
    buffer alive until the copy on the current stream is done.
    """
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


class _TorchStream:
    """A stream of torch's for CuPy, by the CUDA stream protocol."""

    def __init__(self, handle: int) -> None:
        self._handle = handle

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._handle  # version of the protocol, cudaStream_t


@lru_cache(maxsize=256)  # torch takes its streams from pools of 32
def _cupy_stream(handle: int) -> Any:
    import cupy

    return cupy.cuda.Stream.from_external(_TorchStream(handle))


def launch(
    file: str,
    name: str,
    grid: tuple[int, ...],
    block: tuple[int, ...],
    args: tuple[Argument, ...],
    device: torch.device,
    *,
    options: tuple[str, ...] = (),
    shared_bytes: int = 0,
) -> None:
    """Start ``name`` of ``file`` on torch's current stream of ``device``.

    ``args`` are NumPy scalars of exactly the parameters' types (``pointer`` for pointers): a bare Python number would
    be passed as 64 bit whatever the kernel declares.
    """
    kernel = compiled(file, name, device.index, options)
    import cupy  # after compiled(), which explains its absence

    with cupy.cuda.Device(device.index), _cupy_stream(torch.cuda.current_stream(device).cuda_stream):
        kernel(grid, block, args, shared_mem=shared_bytes)
