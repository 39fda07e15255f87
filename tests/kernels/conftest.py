"""Where the kernels' tests run: on the CPU always, through g++ where it is, on the GPU where one is."""

import pytest
import torch

from tests.kernels import support
from tests.kernels.support import KernelsOnCpu


@pytest.fixture(scope="session")
def on_cpu(tmp_path_factory: pytest.TempPathFactory) -> KernelsOnCpu:
    """``with on_cpu(order):`` runs the CUDA kernels by g++; each file is compiled once a session."""
    return support.kernels_on_cpu(tmp_path_factory.mktemp("cuda_cpu"))


@pytest.fixture(scope="session")
def cuda() -> torch.device:
    """The GPU; its absence is no fault, not even in CI."""
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU that torch can use (torch.cuda.is_available() is False)")
    pytest.importorskip("cupy", reason="CuPy is not installed; want cupy-cuda13x beside the GPU")
    return torch.device("cuda", torch.cuda.current_device())
