"""Compiled CUDA kernels: one CuPy module per file, device and set of options, made when it is first needed."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

from ftengine.errors import ConfigError

Kernel: TypeAlias = Callable[..., None]

STANDARD_OPTIONS = ("-std=c++17",)
_FOLDER = Path(__file__).parent


def source(file: str) -> Path:
    """Path of a kernel's source, which lies beside this module also in an installed wheel."""
    return _FOLDER / file


@cache
def _module(file: str, device_index: int, options: tuple[str, ...]) -> Any:
    try:
        import cupy  # only a CUDA tensor brings anyone here: machines without a GPU need no CuPy
    except ImportError as error:
        raise ConfigError(
            f"{file}: a CUDA tensor was given but CuPy cannot be imported ({error}); want cupy-cuda13x. "
            "Install ftengine[cuda], or keep the tensors on the CPU."
        ) from error
    with cupy.cuda.Device(device_index):
        return cupy.RawModule(code=source(file).read_text(encoding="ascii"), options=STANDARD_OPTIONS + options)


@cache
def compiled(file: str, name: str, device_index: int, options: tuple[str, ...] = ()) -> Kernel:
    """The ``extern "C"`` kernel ``name`` of ``file``, compiled for one device.

    ``options`` are NVRTC options beside the language standard; they are part of the key, so two option sets never
    share code. Raises ConfigError where CuPy is missing.
    """
    kernel: Kernel = _module(file, device_index, options).get_function(name)
    return kernel
