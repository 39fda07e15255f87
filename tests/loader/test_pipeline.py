"""The DALI graph equals numpy."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ftengine.config import AugmentConfig
from ftengine.geometry import Box
from ftengine.loader.pipeline import PatchPipeline
from ftengine.loader.plan import draw_augmentation
from ftengine.rng import Purpose, patch_rng
from ftengine.types import Augmentation, Patch
from tests.support import small_config

CONFIG = small_config(region__patch_zyx=(12, 20, 20), network__channels=(4, 8))
ALWAYS = AugmentConfig(flip_probability=0.5, rot90_probability=0.7, scale_probability=0.5, shift_probability=0.5)


def _patches(seed: int) -> list[Patch]:
    rng = np.random.default_rng(seed)
    shape = CONFIG.region.patch_zyx
    return [
        Patch(
            "c",
            Box((0, 0, 0), shape),
            rng.integers(-1024, 3000, shape).astype(np.int16),
            rng.integers(0, 3, shape).astype(np.uint8),
        )
        for _ in range(2)
    ]


def _expected(patch: Patch, a: Augmentation) -> tuple[NDArray[np.float64], NDArray[np.uint8]]:
    low, high = CONFIG.region.window_hu
    image, label = patch.image.astype(np.float64), patch.label
    if a.transpose_yx:
        image, label = image.transpose(0, 2, 1), label.transpose(0, 2, 1)
    axes = tuple(axis for axis in range(3) if a.flip_zyx[axis])
    unit = np.clip((np.flip(image, axes) - low) / (high - low), 0, 1)
    return np.clip(unit * a.intensity_scale + a.intensity_shift, 0, 1), np.flip(label, axes)


def _check(pipeline: PatchPipeline, rounds: int) -> None:
    kept = None
    for k in range(rounds):
        patches = _patches(k)
        augmentations = [
            draw_augmentation(patch_rng(0, Purpose.CROP_AND_AUGMENT, epoch=k, index=i), ALWAYS) for i in range(2)
        ]
        image, label = (t.cpu() for t in pipeline(patches, augmentations))
        assert (image.dtype, label.dtype) == (torch.float32, torch.uint8)
        assert image.shape == label.shape == (2, 1, *CONFIG.region.patch_zyx)
        for i in range(2):
            wanted_image, wanted_label = _expected(patches[i], augmentations[i])
            # HU over 425 is rounded at most four times in float32
            np.testing.assert_allclose(
                image[i, 0].numpy(), wanted_image, rtol=0, atol=float(4 * np.finfo(np.float32).eps * 3000 / 425)
            )
            np.testing.assert_array_equal(label[i, 0].numpy(), wanted_label)
        kept = kept or (image, image.clone())
    assert kept is not None
    assert torch.equal(*kept)  # a later run does not write into an earlier batch


def test_graph_equals_numpy_on_the_cpu() -> None:
    _check(PatchPipeline(CONFIG, 2), rounds=8)


@pytest.mark.gpu
def test_graph_equals_numpy_on_the_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    _check(PatchPipeline(CONFIG, 2, device_id=0), rounds=8)


def test_a_batch_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="want 2 of each"):
        PatchPipeline(CONFIG, 2)(_patches(0)[:1], [Augmentation()])
