"""Kernels: one public function each, CPU tensors take the CPU path, CUDA tensors the CUDA kernel.

Every function takes C-contiguous torch tensors indexed batch, z, y, x; checks them before anything runs
(KernelInputError); writes into ``out`` where one is given; and on CUDA runs on torch's current stream without waiting
for the device. ``texture_field`` alone is made from numbers, once, and takes the device as an argument.

::

    <name>.py       the public function: what it promises, its operator (``torch.ops.ftengine``), its CPU path, its launch
    <name>.cu       the CUDA kernel (plain CUDA C++, no header; CuPy compiles it when the first CUDA tensor arrives)
    <name>_ref.py   the same in NumPy, float64: slow, obvious, what the tests compare both with
"""

if __name__ != "ftengine.kernels":
    raise ImportError(f"import ftengine.kernels, not {__name__}: the folder is part of the package ftengine")

from ftengine.kernels._launch import upload
from ftengine.kernels._threads import for_each
from ftengine.kernels.choose_center import choose_center
from ftengine.kernels.gaussian_blur import gaussian_blur
from ftengine.kernels.masked_blend import masked_blend
from ftengine.kernels.prepare_patch import prepare_patch
from ftengine.kernels.texture_field import texture_field
from ftengine.kernels.tumor_mask import tumor_mask, tumor_mask_and_box
from ftengine.kernels.tumor_proportion import tumor_proportion
from ftengine.vml import settle

__all__ = [
    "choose_center",
    "for_each",
    "gaussian_blur",
    "masked_blend",
    "prepare_patch",
    "texture_field",
    "tumor_mask",
    "tumor_mask_and_box",
    "tumor_proportion",
    "upload",
]

settle()  # the CPU paths use torch from several threads
