"""Both stages on a GPU, in each precision."""

import math

import pytest
import torch

from ftengine.training.networks import build_classifier, build_generator, build_segmenter
from ftengine.training.segmentation import Segmentation
from ftengine.training.synthesis import Adversarial
from ftengine.types import Batch
from tests.support import small_config
from tests.training.support import hand_made

pytestmark = pytest.mark.gpu


@pytest.fixture
def cuda() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU")
    return torch.device("cuda", 0)


def _batch(device: torch.device) -> Batch:
    """Two healthy patches and one with a tumour."""
    label = torch.zeros((3, 1, 16, 16, 16), dtype=torch.uint8)
    label[:, :, 2:14, 2:14, 2:14] = 1
    label[2, :, 6:9, 6:9, 6:9] = 2
    image = torch.rand(label.shape, generator=torch.Generator().manual_seed(0))
    return hand_made(image.to(device), label.to(device))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_both_stages_step_and_are_near_the_cpu(cuda: torch.device, precision: str) -> None:
    config = small_config(training__precision=precision, generator_training__precision=precision)
    exact = small_config()
    losses: dict[str, dict[str, float]] = {}
    for device, settings in ((torch.device("cpu"), exact), (cuda, config)):
        segmentation = Segmentation(settings, build_segmenter(settings).to(device), device)
        generator, classifier = build_generator(settings).to(device), build_classifier(settings).to(device)
        adversarial = Adversarial(settings, generator, classifier, build_segmenter(settings).to(device), device)
        for stage in (segmentation, adversarial):
            stage.add(_batch(device))
            losses.setdefault(device.type, {}).update(stage.update(1e-3).figures())
        assert all(p.dtype == torch.float32 for p in adversarial.product.parameters())
    for name in ("loss", "loss_seen", "loss_fools", "loss_classifier"):
        assert math.isfinite(losses["cuda"][name])
        assert losses["cuda"][name] == pytest.approx(losses["cpu"][name], rel=0.05)
