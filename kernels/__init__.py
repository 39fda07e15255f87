"""Kernels of the synthesis: one public function each, CPU tensors take the CPU path, CUDA tensors the CUDA kernel."""

if __name__ != "ftengine.kernels":
    raise ImportError(f"import ftengine.kernels, not {__name__}: the folder is part of the package ftengine")
