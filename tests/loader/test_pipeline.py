"""Crops and augmentations equal numpy."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ftengine.config import AugmentConfig
from ftengine.geometry import Box, int_zyx
from ftengine.loader.pipeline import PatchPipeline
from ftengine.loader.plan import draw_augmentation
from ftengine.rng import Purpose, patch_rng
from ftengine.types import Patch, PatchRequest
from tests.support import small_config

PATCH = (12, 20, 20)
CONFIG = small_config(region__patch_zyx=PATCH, network__channels=(4, 8))
ALWAYS = AugmentConfig(flip_probability=0.5, rot90_probability=0.7, scale_probability=0.5, shift_probability=0.5)


READ = (14, 24, 20)  # of which a patch is cut


def _patches(seed: int) -> tuple[list[Patch], list[PatchRequest]]:
    rng = np.random.default_rng(seed)
    reads, requests = [], []
    for index in range(2):
        read = Box((5, -3, 7), READ)
        origin = tuple(
            o + int(rng.integers(0, n - p + 1)) for o, n, p in zip(read.origin_zyx, READ, PATCH, strict=True)
        )
        rng_of_patch = patch_rng(0, Purpose.CROP_AND_AUGMENT, epoch=seed, index=index)
        image, label = rng.integers(-1024, 3000, READ).astype(np.int16), rng.integers(0, 3, READ).astype(np.uint8)
        reads.append(Patch("c", read, image, label))
        box, augmentation = Box(int_zyx(origin), PATCH), draw_augmentation(rng_of_patch, ALWAYS)
        requests.append(PatchRequest(seed, index, 0, "c", "d", True, box, augmentation, read))
    return reads, requests


def _expected(read: Patch, request: PatchRequest) -> tuple[NDArray[np.float64], NDArray[np.uint8]]:
    (low, high), a = CONFIG.region.window_hu, request.augmentation
    z, y, x = (o - r for o, r in zip(request.box.origin_zyx, read.box.origin_zyx, strict=True))
    crop = (slice(z, z + PATCH[0]), slice(y, y + PATCH[1]), slice(x, x + PATCH[2]))
    image, label = read.image[crop].astype(np.float64), read.label[crop]
    if a.transpose_yx:
        image, label = image.transpose(0, 2, 1), label.transpose(0, 2, 1)
    axes = tuple(axis for axis in range(3) if a.flip_zyx[axis])
    unit = np.clip((np.flip(image, axes) - low) / (high - low), 0, 1)
    return np.clip(unit * a.intensity_scale + a.intensity_shift, 0, 1), np.flip(label, axes)


def _check(pipeline: PatchPipeline, rounds: int) -> None:
    kept = None
    for k in range(rounds):
        reads, requests = _patches(k)
        image, label = (t.cpu() for t in pipeline(reads, requests)[:2])
        assert (image.dtype, label.dtype) == (torch.float32, torch.uint8)
        assert image.shape == label.shape == (2, 1, *CONFIG.region.patch_zyx)
        for i in range(2):
            wanted_image, wanted_label = _expected(reads[i], requests[i])
            # HU over 425 is rounded at most four times in float32
            np.testing.assert_allclose(
                image[i, 0].numpy(), wanted_image, rtol=0, atol=float(4 * np.finfo(np.float32).eps * 3000 / 425)
            )
            np.testing.assert_array_equal(label[i, 0].numpy(), wanted_label)
        kept = kept or (image, image.clone())
    assert kept is not None
    assert torch.equal(*kept)  # a later run does not write into an earlier batch


def test_graph_equals_numpy_on_the_cpu() -> None:
    _check(PatchPipeline(CONFIG, 2, device=torch.device("cpu")), rounds=8)


@pytest.mark.gpu
def test_graph_equals_numpy_on_the_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    _check(PatchPipeline(CONFIG, 2, device=torch.device("cuda", 0)), rounds=8)


def test_a_batch_of_another_size_is_refused() -> None:
    reads, requests = _patches(0)
    with pytest.raises(ValueError, match="want 2 of each"):
        PatchPipeline(CONFIG, 2, device=torch.device("cpu"))(reads[:1], requests[:1])
