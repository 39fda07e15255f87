"""The sources compile for the GPUs we name, and nothing of CUDA is touched before a CUDA tensor arrives."""

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from ftengine import kernels
from ftengine.errors import ConfigError
from ftengine.kernels import _compile, _launch
from tests.kernels import nvrtc
from tests.kernels.support import REPOSITORY, missing

SOURCES = sorted(path.name for path in (REPOSITORY / "kernels").glob("*.cu"))
OPTIONS = {
    file: getattr(import_module(f"ftengine.kernels.{file.removesuffix('.cu')}"), "COMPILE_OPTIONS", ())
    for file in SOURCES
}
ARCHITECTURES = ("sm_75", "sm_80", "sm_90", "sm_120")  # CUDA 13's oldest, A100, H100, consumer Blackwell


@pytest.fixture(scope="module")
def nvrtc_library() -> Path:
    found = nvrtc.library()
    if found is None:
        missing(
            f"{nvrtc.PACKAGE} is not installed; want it to compile the kernels without a GPU. Install the dev extra."
        )
    return found


def test_each_kernel_has_its_files() -> None:
    names = [file.removesuffix(".cu") for file in SOURCES]
    functions = set(kernels.__all__) - {"for_each", "tumor_mask_and_box", "upload"}
    assert set(names) == functions
    for name in names:
        assert (REPOSITORY / "kernels" / f"{name}_ref.py").is_file()
        assert (REPOSITORY / "tests" / "kernels" / f"test_{name}.py").is_file()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("file", SOURCES)
def test_source_compiles_without_a_warning(nvrtc_library: Path, file: str, architecture: str) -> None:
    options = (*_compile.STANDARD_OPTIONS, *OPTIONS[file], f"--gpu-architecture={architecture}")
    num_bytes, log = nvrtc.compile_to_machine_code(nvrtc_library, _compile.source(file), options)
    assert log == ""
    assert num_bytes > 0


def test_compile_failure_shows_the_log(nvrtc_library: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.cu"
    broken.write_text("__global__ void kernel() { undeclared = 1; }\n", encoding="ascii")
    with pytest.raises(nvrtc.CompileError, match=r'broken\.cu\(1\): error: identifier "undeclared" is undefined'):
        nvrtc.compile_to_machine_code(nvrtc_library, broken, ("--gpu-architecture=sm_90",))


def test_import_brings_no_cupy() -> None:
    script = "import sys, ftengine.kernels; sys.exit('cupy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, check=False).returncode == 0


def test_import_under_the_bare_name_is_refused() -> None:
    result = subprocess.run(
        [sys.executable, "-c", "import kernels"], cwd=REPOSITORY, check=False, capture_output=True, text=True
    )
    assert "import ftengine.kernels, not kernels" in result.stderr


def test_missing_cupy_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(
        ConfigError,
        match=r"masked_blend\.cu: a CUDA tensor was given but CuPy cannot be imported .* Install ftengine\[cuda\]",
    ):
        _compile.compiled("masked_blend.cu", "blend_float32_uint8", 99)


def test_grid_covers_every_item_or_is_as_large_as_a_grid_can_be() -> None:
    assert _launch.blocks_for(1, 256) == 1
    assert _launch.blocks_for(256, 256) == 1
    assert _launch.blocks_for(257, 256) == 2
    assert _launch.blocks_for(2**45, 256) == 2**31 - 1


@pytest.mark.gpu
def test_kernel_is_compiled_once(cuda: object) -> None:
    first = _compile.compiled("masked_blend.cu", "blend_float32_uint8", 0)
    assert _compile.compiled("masked_blend.cu", "blend_float32_uint8", 0) is first
    assert _compile.compiled("masked_blend.cu", "blend_float32_uint8", 0, ("--fmad=false",)) is not first
