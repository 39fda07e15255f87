"""What ``prepare_patch`` must give, by DALI's own operators: int16 HU and uint8 label in, augmented float32 image in [0, 1] and label out."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, math
from nvidia.dali.pipeline import pipeline_def
from nvidia.dali.types import DALIDataType
from torch.utils.dlpack import from_dlpack

from ftengine.config import Config
from ftengine.types import Augmentation, Patch


class DaliGraph:
    """Turns patches into a batch: transpose, flip, window, scale and shift of the intensity, in this order."""

    def __init__(self, config: Config, batch_size: int, *, device_id: int | None = None, num_threads: int = 2) -> None:
        self._batch_size = batch_size
        self._device_id = device_id
        low, high = config.region.window_hu
        self._pipeline = _graph(
            low,
            high,
            on_gpu=device_id is not None,
            batch_size=batch_size,
            device_id=device_id,
            num_threads=num_threads,
            prefetch_queue_depth=1,  # inputs are fed just before they are run; the loader's own queue holds the batches ahead
            exec_dynamic=True,
        )
        self._pipeline.build()

    def __call__(
        self, patches: Sequence[Patch], augmentations: Sequence[Augmentation]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run one batch. Returns image float32 [B, 1, z, y, x] in [0, 1] and label uint8 [B, 1, z, y, x], on the pipeline's device."""
        if not len(patches) == len(augmentations) == self._batch_size:
            raise ValueError(
                f"got {len(patches)} patches and {len(augmentations)} augmentations; want {self._batch_size} of each"
            )
        flips = np.array([a.flip_zyx for a in augmentations], dtype=np.int32)
        image, label = self._pipeline.run(
            image=[p.image[..., None] for p in patches],
            label=[p.label[..., None] for p in patches],
            transpose=[np.array(a.transpose_yx) for a in augmentations],
            flip_z=list(flips[:, 0]),
            flip_y=list(flips[:, 1]),
            flip_x=list(flips[:, 2]),
            scale=[np.float32(a.intensity_scale) for a in augmentations],
            shift=[np.float32(a.intensity_shift) for a in augmentations],
        )
        return _to_torch(image), _to_torch(label)


@pipeline_def(enable_conditionals=True)
def _graph(low_hu: float, high_hu: float, *, on_gpu: bool) -> tuple[Any, Any]:
    image = fn.external_source(
        name="image", layout="DHWC", dtype=DALIDataType.INT16, ndim=4
    )  # a channel: flip refuses DHW
    label = fn.external_source(name="label", layout="DHWC", dtype=DALIDataType.UINT8, ndim=4)
    transpose = fn.external_source(name="transpose", dtype=DALIDataType.BOOL, ndim=0)
    flip_z = fn.external_source(name="flip_z", dtype=DALIDataType.INT32, ndim=0)
    flip_y = fn.external_source(name="flip_y", dtype=DALIDataType.INT32, ndim=0)
    flip_x = fn.external_source(name="flip_x", dtype=DALIDataType.INT32, ndim=0)
    scale = fn.external_source(name="scale", dtype=DALIDataType.FLOAT, ndim=0)
    shift = fn.external_source(name="shift", dtype=DALIDataType.FLOAT, ndim=0)
    if on_gpu:
        image, label = image.gpu(), label.gpu()
    if transpose:  # pyright: ignore[reportGeneralTypeIssues]  # the decorator rewrites the branch for each sample
        image = fn.transpose(image, perm=[0, 2, 1, 3], transpose_layout=False)
        label = fn.transpose(label, perm=[0, 2, 1, 3], transpose_layout=False)
    image = fn.flip(image, depthwise=flip_z, vertical=flip_y, horizontal=flip_x)
    label = fn.flip(label, depthwise=flip_z, vertical=flip_y, horizontal=flip_x)
    unit = math.clamp((fn.cast(image, dtype=DALIDataType.FLOAT) - low_hu) * (1.0 / (high_hu - low_hu)), 0.0, 1.0)
    # clipped once more, as every batch lies in [0, 1]; the released code does not clip after scale and shift
    return math.clamp(unit * scale + shift, 0.0, 1.0), label


def _to_torch(batch: Any) -> torch.Tensor:
    """A DALI batch of equal samples [z, y, x, 1] as one tensor [B, 1, z, y, x] of its own memory: DALI reuses its buffers."""
    dense = from_dlpack(batch.as_tensor())
    return dense.movedim(-1, 1).clone(memory_format=torch.contiguous_format)
