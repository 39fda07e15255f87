"""The GPU, and the CUDA kernels run on the CPU, as the kernels' tests have them."""

from tests.kernels.conftest import cuda, on_cpu

__all__ = ["cuda", "on_cpu"]
