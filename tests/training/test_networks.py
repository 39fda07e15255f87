"""The networks have the paper's sizes, and the U-Net computes what the released one computes."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from ftengine.config import Config
from ftengine.errors import ConfigError
from ftengine.training.networks import build_classifier, build_generator, build_segmenter, count_parameters
from tests.support import small_config


def test_released_width_has_the_released_parameters() -> None:
    config = Config.preset("abdomen").with_overrides({"generator.width": 32})
    assert count_parameters(build_generator(config)) == 19_073_795
    assert count_parameters(build_classifier(config)) == 19_073_795


def test_default_segmenter_is_the_papers_swinunetr() -> None:
    assert count_parameters(build_segmenter(Config.preset("abdomen"))) == 72_762_313


def _released_order(network: torch.nn.Module) -> list[torch.Tensor | None]:
    """Our tensors in the order of the released state dict; None for buffers that ours does not have (running mean and variance)."""
    ordered: list[torch.Tensor | None] = []

    def add_blocks(block: torch.nn.Module) -> None:
        convolution_and_norm = [m for m in block.children() if not isinstance(m, torch.nn.ReLU)]
        for layer in convolution_and_norm:
            ordered.extend([layer.weight, layer.bias])  # type: ignore[list-item]  # parameters
            if isinstance(layer, torch.nn.InstanceNorm3d):
                ordered.extend([None, None, None])  # running mean, running variance, num_batches_tracked

    for block in network.encoder:  # type: ignore[union-attr]  # a ModuleList
        add_blocks(block)
    for up, block in zip(network.upsample, network.decoder, strict=True):  # type: ignore[arg-type]  # ModuleLists
        ordered.extend([up.weight, up.bias])
        add_blocks(block)
    ordered.extend([network.head.weight, network.head.bias])  # type: ignore[union-attr,list-item]  # a convolution
    return ordered


def test_unet_computes_what_the_released_one_computes() -> None:
    """Golden output of the released network with weights by formula (shared vectors' README)."""
    folder = Path(os.environ.get("FTENGINE_TEST_VECTORS", Path(__file__).parents[3] / "shared" / "vectors"))
    file = folder / "unet_abdomen.npz"
    if not file.exists():
        if os.environ.get("CI") == "true":
            pytest.fail(f"{file} is missing")
        pytest.skip("no golden vectors: set FTENGINE_TEST_VECTORS")
    golden = np.load(file)
    network = build_generator(Config.preset("abdomen").with_overrides({"generator.width": 32}))
    a, b = float(golden["a"]), float(golden["b"])
    norms = {id(m.weight) for m in network.modules() if isinstance(m, torch.nn.InstanceNorm3d)}
    with torch.no_grad():
        for i, tensor in enumerate(_released_order(network)):
            if tensor is None:
                continue
            t = np.sin(a * np.arange(tensor.numel()) + b * i)
            if id(tensor) in norms:
                values = 1 + 0.2 * t
            elif tensor.ndim == 1:
                values = 0.1 * t
            else:
                values = t * np.sqrt(2 / (tensor.numel() / tensor.shape[0]))
            tensor.copy_(torch.from_numpy(values.astype(np.float32).reshape(tuple(tensor.shape))))
        y = network(torch.from_numpy(golden["x"])[None, None])[0].numpy()
    np.testing.assert_allclose(y, golden["y"], rtol=0, atol=2e-4 * np.abs(golden["y"]).max())


def test_a_batch_gives_what_its_members_give() -> None:
    network = build_generator(small_config()).eval()
    x = torch.rand(3, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = network(x)
        alone = torch.cat([network(x[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(whole, alone, rtol=0, atol=1e-6)


def test_weights_follow_the_seed_and_leave_the_global_state_alone() -> None:
    before = torch.random.get_rng_state()
    first, second = (build_segmenter(small_config(seed=5)).state_dict() for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(first[k], second[k]) for k in first)
    other = build_segmenter(small_config(seed=6)).state_dict()
    assert any(not torch.equal(first[k], other[k]) for k in first)


def test_the_first_tumors_are_faint() -> None:
    generator = build_generator(Config.preset("demo"))
    with torch.no_grad():
        contrast = torch.tanh(generator(torch.rand(1, 1, 16, 16, 16)))
    assert float(contrast.abs().mean()) < 0.5


def test_a_patch_that_does_not_fit_the_network_is_named() -> None:
    with pytest.raises(ConfigError, match="network swinunetr wants multiples of 32"):
        build_segmenter(Config.preset("abdomen").with_overrides({"region.patch_zyx": (48, 48, 48)}))


def test_a_patch_too_small_for_swinunetr_or_odd_for_the_generator_is_named() -> None:
    with pytest.raises(ConfigError, match="at least 64 voxels on some axis"):
        build_segmenter(Config.preset("abdomen").with_overrides({"region.patch_zyx": (32, 32, 32)}))
    with pytest.raises(ConfigError, match="the generator wants multiples of 8"):
        build_generator(Config.preset("demo").with_overrides({"region.patch_zyx": (36, 36, 36)}))
