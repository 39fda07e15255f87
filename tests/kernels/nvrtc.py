"""NVRTC, the compiler that CuPy uses, straight from its package: it needs no GPU."""

import ctypes
from importlib import metadata
from pathlib import Path

PACKAGE = "nvidia-cuda-nvrtc"


class CompileError(RuntimeError):
    """A kernel that does not compile; the message is the compiler's log."""


def library() -> Path | None:
    """The shared library of the installed package, or None."""
    try:
        files = metadata.files(PACKAGE) or []
    except metadata.PackageNotFoundError:
        return None
    found = [Path(str(file.locate())) for file in files if file.name.startswith("libnvrtc.so")]
    return found[0] if found else None


def compile_to_machine_code(nvrtc_library: Path, source: Path, options: tuple[str, ...]) -> tuple[int, str]:
    """Bytes of machine code, and the log (empty where there is no warning); CompileError with the log on failure."""
    nvrtc = ctypes.CDLL(str(nvrtc_library))
    program = ctypes.c_void_p()
    _check(nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.read_bytes(), source.name.encode(), 0, None, None))
    try:
        arguments = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        status = nvrtc.nvrtcCompileProgram(program, len(options), arguments)
        length = ctypes.c_size_t()
        _check(nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(length)))
        text = ctypes.create_string_buffer(length.value)
        _check(nvrtc.nvrtcGetProgramLog(program, text))
        log = text.value.decode().strip()
        if status != 0:
            raise CompileError(f"{source.name} with {' '.join(options)}:\n{log}")
        _check(nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(length)))
        return length.value, log
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _check(status: int) -> None:
    if status != 0:
        raise CompileError(f"NVRTC answers {status}")
