"""From reads to a batch: a DALI graph brings them to the device and crops them, our kernel does the rest in one pass.

One code for both devices: ``device=cpu`` runs all of it on the CPU, ``cuda:N`` on that GPU, on torch's current stream. Everything random
is drawn by the plan and comes in as numbers, so there is no state and no seed. ``kernels.prepare_patch`` gives the bits of DALI's own
transpose, flip, cast and clamp (``tests/kernels/dali_graph.py``) and takes a tenth of their time on a CPU.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from nvidia.dali import fn
from nvidia.dali.pipeline import pipeline_def
from nvidia.dali.types import DALIDataType
from torch.utils.dlpack import from_dlpack

from ftengine.config import Config
from ftengine.kernels import prepare_patch
from ftengine.types import Patch, PatchRequest


class Prepared(NamedTuple):
    """A batch on the device. image: float32 [B, 1, z, y, x] in [0, 1]; label: uint8 of the same shape.

    held: memory that the device may still read; keep it until the work on the stream is done.
    """

    image: torch.Tensor
    label: torch.Tensor
    held: tuple[Any, ...]


class PatchPipeline:
    """Turns reads into a batch: crop, transpose, flip, window, scale and shift of the intensity, in this order."""

    def __init__(self, config: Config, batch_size: int, *, device: torch.device, num_threads: int = 2) -> None:
        self._batch_size = batch_size
        self._patch_zyx = config.region.patch_zyx
        self._window_hu = config.region.window_hu
        self._device = device
        self._graph = _graph(
            self._patch_zyx,
            on_gpu=device.type == "cuda",
            batch_size=batch_size,
            device_id=(device.index or 0) if device.type == "cuda" else None,
            num_threads=num_threads,
            prefetch_queue_depth=1,  # inputs are fed just before they are run; the loader's own queue holds the batches ahead
            exec_dynamic=True,
        )
        self._graph.build()

    def __call__(self, reads: Sequence[Patch], requests: Sequence[PatchRequest]) -> Prepared:
        """Make one batch; on a GPU nothing waits for it. The reads' arrays must stay as they are until then.

        reads: what was read for ``requests``, C-contiguous. Raises ValueError for another number of them than the batch size.
        """
        if not len(reads) == len(requests) == self._batch_size:
            raise ValueError(f"got {len(reads)} reads and {len(requests)} requests; want {self._batch_size} of each")
        starts = [np.array(r.box.moved(r.read.origin_zyx).origin_zyx, dtype=np.int32) for r in requests]
        stream = torch.cuda.current_stream(self._device).cuda_stream if self._device.type == "cuda" else None
        outputs = self._graph.run(
            stream, image=[read.image for read in reads], label=[read.label for read in reads], start=starts
        )
        image, label = (from_dlpack(output.as_tensor()) for output in outputs)
        augmentations = [r.augmentation for r in requests]
        image, label = prepare_patch(
            image,
            label,
            shape_zyx=self._patch_zyx,
            window_hu=self._window_hu,
            transpose_yx=np.array([a.transpose_yx for a in augmentations]),
            flip_zyx=np.array([a.flip_zyx for a in augmentations]),
            scale=np.array([a.intensity_scale for a in augmentations], dtype=np.float32),
            shift=np.array([a.intensity_shift for a in augmentations], dtype=np.float32),
        )
        return Prepared(image.unsqueeze(1), label.unsqueeze(1), (outputs, tuple(reads)))


@pipeline_def
def _graph(patch_zyx: tuple[int, int, int], *, on_gpu: bool) -> tuple[Any, Any]:
    image = fn.external_source(name="image", layout="DHW", dtype=DALIDataType.INT16, ndim=3, no_copy=True)
    label = fn.external_source(name="label", layout="DHW", dtype=DALIDataType.UINT8, ndim=3, no_copy=True)
    start = fn.external_source(name="start", dtype=DALIDataType.INT32, ndim=1)
    if on_gpu:
        image, label = image.gpu(), label.gpu()
    image, label = (fn.slice(what, start=start, shape=patch_zyx, axes=(0, 1, 2)) for what in (image, label))
    return image, label
