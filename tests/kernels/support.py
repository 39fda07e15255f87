"""What the kernels' tests share: where a kernel runs, golden vectors, random volumes, what to do without a tool."""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

import numpy as np
import pytest
import torch
from hypothesis import settings
from numpy.typing import NDArray

from ftengine.kernels import _compile, _launch
from tests.kernels.cuda_cpu import CpuModule, compiler

REPOSITORY = Path(__file__).resolve().parents[2]

# Properties run on the same examples every time: a failure found once is found by everyone.
PROPERTY = settings(max_examples=40, deadline=None, derandomize=True)
FEW = settings(PROPERTY, max_examples=12)  # where one example runs a kernel in several thread orders

EPS32 = 2.0**-24  # relative error of one float32 rounding
EPS64 = 2.0**-53

KernelsOnCpu: TypeAlias = Callable[[str], AbstractContextManager[None]]


def missing(reason: str) -> NoReturn:
    """Skip with the reason; in CI, where everything must be there, fail."""
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


def kernels_on_cpu(folder: Path) -> KernelsOnCpu:
    """A context where the public functions run their ``.cu`` on CPU tensors by g++, threads in the given order.

    Everything but CuPy and the stream is what a CUDA tensor meets: checks, tables, launch sizes, argument types,
    source.
    """
    if compiler() is None:
        missing("no g++ on this machine; want it to run the CUDA kernels on the CPU. Install g++.")

    @contextmanager
    def use(order: str) -> Iterator[None]:
        def launch(
            file: str,
            name: str,
            grid: tuple[int, ...],
            block: tuple[int, ...],
            args: tuple[np.generic, ...],
            device: torch.device,
            *,
            options: tuple[str, ...] = (),
            shared_bytes: int = 0,
        ) -> None:
            assert device.type == "cpu", "tensors on this path are CPU tensors that pose as CUDA tensors"
            assert all(option == "--fmad=false" for option in options), "cuda_cpu always compiles like this"
            CpuModule(_compile.source(file), folder, order=order).get_function(name)(
                grid, block, args, shared_mem=shared_bytes
            )

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_launch, "launch", launch)
            patch.setattr(_launch, "uses_kernel", lambda _tensor: True)
            yield

    return use


def vectors_file(name: str) -> Path:
    """A golden file of the released implementation: below FTENGINE_TEST_VECTORS, else beside the repository."""
    folder = Path(os.environ.get("FTENGINE_TEST_VECTORS", REPOSITORY.parent / "shared" / "vectors"))
    if not (folder / name).is_file():
        missing(f"{folder / name} is absent; want the golden vectors. Set FTENGINE_TEST_VECTORS to their folder.")
    return folder / name


def random_volumes(seed: int, *shape: int) -> torch.Tensor:
    """Normal float32 values."""
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape, dtype=np.float32))


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equality that tells -0 from 0 and lets NaN equal itself."""
    return bool(torch.equal(a.cpu().contiguous().view(torch.uint8), b.cpu().contiguous().view(torch.uint8)))


def as_array(tensor: torch.Tensor) -> NDArray[np.float64]:
    """Values as float64, from any device."""
    array: NDArray[np.float64] = tensor.detach().cpu().to(torch.float64).numpy()
    return array


def check_operator(operator: Any, arguments: tuple[Any, ...]) -> None:
    """torch's own checks of an operator: schema, aliasing, fake results, gradient formula, compiled with static and dynamic shapes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own compiler
        torch.library.opcheck(operator, arguments)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as torch.compile traces it, in one graph or not at all; run without a C++ or Triton compiler."""
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")


class Guarded:
    """An ``out`` tensor inside a larger buffer: tells whether something was written beside it."""

    def __init__(
        self, shape: tuple[int, ...], dtype: torch.dtype, *, device: torch.device | None = None, margin: int = 256
    ) -> None:
        count = int(np.prod(shape))
        self._buffer = torch.full((count + 2 * margin,), 77, dtype=dtype, device=device or torch.device("cpu"))
        self._margin = margin
        self.tensor = self._buffer[margin : margin + count].view(shape)

    def is_intact(self) -> bool:
        """Whether both margins still hold what they held."""
        return bool((self._buffer[: self._margin] == 77).all() and (self._buffer[-self._margin :] == 77).all())


def past_2_to_31_voxels(device: torch.device, bytes_per_voxel: int) -> tuple[int, int, int, int]:
    """A batch whose last voxels no 32 bit index reaches; skips where the GPU cannot hold the test's tensors."""
    shape = (2, 1024, 1024, 1032)
    free, _ = torch.cuda.mem_get_info(device)
    wanted = int(np.prod(shape)) * bytes_per_voxel
    if free < wanted:
        pytest.skip(f"{free >> 30} GiB of GPU memory are free; want {wanted >> 30} GiB for a batch past 2**31 voxels")
    return shape


def run_behind_a_late_copy(data: torch.Tensor, function: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """``function`` of a CUDA tensor that gets its values late, on a stream of its own, with host syncs forbidden.

    A stream of torch's does not wait for the default stream, so a kernel launched on the wrong one reads zeros. Call
    the function once before, so that nothing is compiled or allocated for the first time here.
    """
    late = torch.zeros_like(data)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream(data.device)
    with warnings.catch_warnings(), torch.cuda.stream(stream):
        warnings.simplefilter("ignore")  # torch warns that its sync detector is a prototype
        torch.cuda.set_sync_debug_mode("error")
        try:
            torch.cuda._sleep(100_000_000)  # cycles: tens of milliseconds
            late.copy_(data, non_blocking=True)
            result = function(late)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    stream.synchronize()
    return result
