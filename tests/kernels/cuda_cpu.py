"""Run a ``.cu`` file on the CPU: ``CpuModule`` stands in for ``cupy.RawModule``, g++ and ``cuda_cpu.h`` for the GPU."""

import ctypes
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Launcher: TypeAlias = Callable[..., None]

THREAD_ORDERS = ("forward", "reverse", "shuffled")

_HEADER = Path(__file__).with_name("cuda_cpu.h")
_KERNEL = re.compile(r'extern\s+"C"\s+__global__\s+(?:__launch_bounds__\([^)]*\)\s+)?void\s+(\w+)\s*\(')
_DYNAMIC_SHARED = re.compile(r"extern\s+__shared__\s+(\w+)\s+(\w+)\[\];")
_FLAGS = (
    "-std=c++17",
    "-O2",
    "-ffp-contract=off",  # as NVRTC's --fmad=false: one rounding an operation
    "-fsanitize=undefined",  # an index outside a __shared__ array, an overflow, a bad shift: the process traps
    "-fsanitize-undefined-trap-on-error",
    "-Wall",
    "-Wno-sign-compare",  # threadIdx.x is unsigned, our counts are not
    "-Wno-unused-function",
    "-Wno-unknown-pragmas",  # unroll
    "-Werror",
    "-shared",
    "-fPIC",
)
_MAX_THREADS_PER_BLOCK = 1024
_MAX_SHARED_BYTES = 48 << 10


class LaunchError(RuntimeError):
    """A launch that a GPU would refuse, or a kernel that it would not finish."""


def compiler() -> str | None:
    """Path of g++, or None where there is none."""
    return shutil.which("g++")


class CpuModule:
    """The kernels of one file, compiled into ``folder``; used as a RawModule is.

    ``get_function(name)(grid, block, args, shared_mem=0)``: args are NumPy scalars of the parameters' own types,
    pointers as uint64 addresses, structs as structured scalars. The threads of each block run in ``order``, one of
    THREAD_ORDERS.
    """

    def __init__(self, source: Path, folder: Path, *, order: str = "forward") -> None:
        text = source.read_text(encoding="ascii")
        self.names = _KERNEL.findall(text)
        self._order = order
        library = folder / f"{source.stem}.so"
        if not library.exists():
            _compile(text, self.names, library)
        self._library = ctypes.CDLL(str(library))

    def get_function(self, name: str) -> Launcher:
        """The kernel ``name``, to be called as a RawKernel is."""
        if name not in self.names:
            raise LaunchError(f"no kernel {name}; the file has {', '.join(self.names)}")
        signature = self._library[f"signature_{name}"]
        signature.restype = ctypes.c_char_p
        types = signature().decode().split()
        start = self._library[f"launch_{name}"]
        start.restype = ctypes.c_char_p

        def launch(
            grid: tuple[int, ...], block: tuple[int, ...], args: tuple[np.generic, ...], shared_mem: int = 0
        ) -> None:
            num_threads = int(np.prod(block))
            if not 0 < num_threads <= _MAX_THREADS_PER_BLOCK or int(np.prod(grid)) < 1:
                raise LaunchError(
                    f"{name}: grid {grid} of blocks {block}; want at least one block of at least one and at most "
                    f"{_MAX_THREADS_PER_BLOCK} threads"
                )
            if shared_mem > _MAX_SHARED_BYTES:
                raise LaunchError(f"{name}: {shared_mem} bytes of shared memory; every device has {_MAX_SHARED_BYTES}")
            storage = _pack(name, types, args)
            addresses = (ctypes.c_void_p * len(storage))(*(ctypes.addressof(value) for value in storage))
            order = np.ascontiguousarray(_thread_order(self._order, num_threads), dtype=np.int32)
            error = start(
                _three(grid), _three(block), ctypes.c_void_p(order.ctypes.data), ctypes.c_size_t(shared_mem), addresses
            )
            if error:
                raise LaunchError(f"{name}: {error.decode()}")

        return launch


def _compile(text: str, names: list[str], library: Path) -> None:
    """Compile a file's text with an exported launcher for each of its kernels."""
    gxx = compiler()
    assert gxx is not None, "callers skip without g++"
    body = _DYNAMIC_SHARED.sub(r"\1* const \2 = cuda_cpu::dynamic_shared<\1>();", text)
    unit = "\n".join([f'#include "{_HEADER}"', body, *(f"CUDA_CPU_EXPORT({name})" for name in names)])
    command = [gxx, *_FLAGS, "-x", "c++", "-", "-o", str(library)]
    result = subprocess.run(command, input=unit, text=True, capture_output=True, check=False)
    if result.returncode != 0:
        raise LaunchError(f"g++ refuses {library.stem}.cu:\n{result.stderr}")


def _pack(name: str, types: list[str], args: tuple[object, ...]) -> list[Any]:
    """Each argument in memory of its own; refused unless its type is the parameter's, which a GPU would not notice."""
    if len(args) != len(types):
        raise LaunchError(f"{name}: {len(args)} arguments for {len(types)} parameters")
    storage = []
    for index, (wanted, value) in enumerate(zip(types, args, strict=True)):
        if not isinstance(value, np.generic):
            raise LaunchError(f"{name}: argument {index} is {type(value).__name__}, the parameter {wanted}")
        given = f"{value.dtype.kind}{value.dtype.itemsize}"
        if given != ("u8" if wanted == "P8" else wanted):
            raise LaunchError(f"{name}: argument {index} is {given}, the parameter {wanted}")
        storage.append(ctypes.create_string_buffer(value.tobytes(), value.dtype.itemsize))
    return storage


def _thread_order(order: str, num_threads: int) -> NDArray[np.int64]:
    threads = np.arange(num_threads)
    match order:
        case "forward":
            return threads
        case "reverse":
            return threads[::-1]
        case "shuffled":
            return np.random.default_rng(0).permutation(threads)
    raise ValueError(order)


def _three(lengths: tuple[int, ...]) -> Any:
    return (ctypes.c_uint * 3)(*(*lengths, 1, 1)[:3])
