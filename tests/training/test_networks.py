"""The networks have the published sizes, take what the region gives them, and say what does not fit."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ftengine.config import Config, NetworkConfig
from ftengine.errors import ConfigError
from ftengine.prediction.infer import predict_volume
from ftengine.synthesis.inference import Inference
from ftengine.training.checkpoint import load_segmenter, save_checkpoint
from ftengine.training.networks import (
    RepeatedPatchMerging,
    build_classifier,
    build_generator,
    build_segmenter,
    count_parameters,
)
from ftengine.training.nnunet_plan import plan_network
from tests.support import small_config

SMALL: dict[str, dict[str, Any]] = {
    "swinunetr": {"network.feature_size": 12, "region.patch_zyx": (64, 32, 32)},
    "unet": {"network.channels": (4, 8, 8), "region.patch_zyx": (16, 32, 32)},
    "dynunet": {"network.width": 4, "region.patch_zyx": (16, 32, 32)},
    "unetr": {"network.transformer_width": 24, "region.patch_zyx": (16, 32, 32)},
    "transunet": {
        "network.width": 2,
        "network.transformer_width": 24,
        "network.transformer_layers": 2,
        "region.patch_zyx": (16, 32, 32),
    },
}


def small_network(name: str, **overrides: Any) -> Config:
    return Config.preset("demo").with_overrides(
        {"network.name": name, "inference.overlap": 0.25, **SMALL[name], **overrides}
    )


def test_released_width_has_the_released_parameters() -> None:
    config = Config.preset("abdomen").with_overrides({"generator.width": 32})
    assert count_parameters(build_generator(config)) == 19_073_795
    assert count_parameters(build_classifier(config)) == 19_073_795
    chest = Config.preset("chest").with_overrides({"generator.width": 32})
    assert count_parameters(build_generator(chest)) == 19_073_665
    assert count_parameters(build_classifier(chest)) == 19_073_795


def test_default_segmenter_is_the_papers_swinunetr() -> None:
    assert count_parameters(build_segmenter(Config.preset("abdomen"))) == 72_762_313


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


# all segmenters


@pytest.mark.parametrize("name", SMALL)
def test_a_network_gives_a_logit_for_each_class_and_voxel(name: str, tmp_path: Path) -> None:
    config = small_network(name)
    network = build_segmenter(config).eval()
    twin = build_segmenter(config).state_dict()
    assert all(torch.equal(value, twin[key]) for key, value in network.state_dict().items())
    x = torch.rand(2, 1, *config.region.patch_zyx, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = network(x)
        alone = torch.cat([network(x[i : i + 1]) for i in range(2)])
    assert whole.shape == (2, config.region.num_classes, *config.region.patch_zyx)
    torch.testing.assert_close(whole, alone, rtol=0, atol=2e-5)
    file = tmp_path / "s.pt"
    save_checkpoint(file, "segmenter", config, {"model": network.state_dict()})
    loaded, trained = load_segmenter(file)
    assert trained == config
    as_painting = Inference(loaded, config.synthesis, torch.device("cpu"))
    assert torch.equal(as_painting(x), whole)


@pytest.mark.parametrize("name", SMALL)
def test_a_network_predicts_volumes_that_are_no_multiple_of_its_patch(name: str) -> None:
    config = small_network(name)
    z, y, x = config.region.patch_zyx
    image = np.random.default_rng(0).integers(-100, 200, (z - 3, y + 5, x)).astype(np.int16)
    label = predict_volume(build_segmenter(config), image, config, torch.device("cpu"))
    assert label.shape == image.shape
    assert label.max() < config.region.num_classes


@pytest.mark.parametrize("name", SMALL)
def test_every_trained_weight_of_a_network_gets_a_gradient(name: str) -> None:
    """DistributedDataParallel waits for each of them."""
    config = small_network(name)
    network = build_segmenter(config).train()
    network(torch.rand(1, 1, *config.region.patch_zyx)).square().mean().backward()
    assert [key for key, p in network.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize(
    ("name", "patch", "message"),
    [
        ("unet", (16, 16, 19), "network unet wants multiples of 2 on each axis"),
        ("dynunet", (36, 32, 32), r"network dynunet wants multiples of 8 on each axis"),
        ("dynunet", (8, 8, 8), "network dynunet wants a patch that can be halved twice"),
        ("unetr", (24, 32, 32), "network unetr wants multiples of 16 on each axis"),
        ("transunet", (24, 32, 32), "network transunet wants multiples of 16 on each axis"),
        ("transunet", (16, 16, 16), "network transunet wants at least 32 voxels on some axis"),
    ],
)
def test_a_patch_that_does_not_fit_is_named(name: str, patch: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_segmenter(small_network(name, **{"region.patch_zyx": patch, "augment.rot90_probability": 0}))


def test_unetr_names_a_size_that_it_was_not_built_for() -> None:
    network = build_segmenter(small_network("unetr"))
    with pytest.raises(ConfigError, match=r"was built for patches of \(16, 32, 32\) voxels and got \(32, 32, 32\)"):
        network(torch.zeros(1, 1, 32, 32, 32))


def test_transunet_takes_other_sizes_than_its_patch() -> None:
    network = build_segmenter(small_network("transunet")).eval()
    with torch.no_grad():
        assert network(torch.zeros(1, 1, 48, 32, 64)).shape[2:] == (48, 32, 64)


def test_transunet_looks_beyond_its_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies at one end changes the far end only by way of the transformer."""
    network = build_segmenter(
        small_network("transunet", **{"region.patch_zyx": (16, 16, 160), "augment.rot90_probability": 0})
    ).eval()
    x = torch.rand(1, 1, 16, 16, 160, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    network = network.double()
    for module in network.modules():  # instance norms reach everywhere, too
        if isinstance(module, torch.nn.InstanceNorm3d):
            monkeypatch.setattr(module, "forward", lambda y: y)
    other = x.clone()
    other[..., :8] = 1 - x[..., :8]
    with torch.no_grad():
        seen = (network(other) - network(x))[..., -8:].abs().max()
        for layer in network.transformer:  # type: ignore[union-attr]  # a ModuleList
            layer.forward = lambda tokens: tokens
        unseen = (network(other) - network(x))[..., -8:].abs().max()
    assert seen > 0
    assert unseen == 0


@pytest.mark.parametrize(
    ("patch", "spacing", "strides", "kernels"),
    [
        # the published plan of isotropic patches: halved down to 4 voxels
        ((128, 128, 128), (1.0, 1.0, 1.0), [(2, 2, 2)] * 5, [(3, 3, 3)] * 6),
        ((96, 96, 96), (1.5, 1.5, 1.5), [(2, 2, 2)] * 4, [(3, 3, 3)] * 5),
        # z is four times as long: it waits for two halvings, and is convolved from the level where the others caught up
        (
            (32, 192, 192),
            (5.0, 1.25, 1.25),
            [(1, 2, 2)] * 2 + [(2, 2, 2)] * 3,
            [(1, 3, 3)] * 2 + [(3, 3, 3)] * 4,
        ),
    ],
)
def test_dynunet_is_planned_as_nnunet_plans(
    patch: tuple[int, int, int],
    spacing: tuple[float, float, float],
    strides: list[tuple[int, int, int]],
    kernels: list[tuple[int, int, int]],
) -> None:
    plan = plan_network(patch, spacing)
    assert list(plan.strides_zyx) == [(1, 1, 1), *strides]
    assert list(plan.kernels_zyx) == kernels
    assert plan.channels(32) == tuple(min(32 * 2**i, 320) for i in range(len(kernels)))


# axes and merging of the weights of others


@pytest.mark.parametrize(("merging", "patch"), [("all", (32, 32, 64)), ("repeated", (32, 64, 96))])
def test_reversed_axes_are_those_of_the_network_on_transposed_arrays(merging: str, patch: tuple[int, int, int]) -> None:
    """A non-cubic patch, windows of 7 and shorter ones, shifted and not; position tables that are far from 0."""
    small = {"network.patch_merging": merging, "augment.rot90_probability": 0}
    ours = build_segmenter(
        small_network("swinunetr", **small, **{"network.axes": "xyz", "region.patch_zyx": patch})
    ).eval()
    theirs = build_segmenter(small_network("swinunetr", **small, **{"region.patch_zyx": patch[::-1]})).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    ours.load_state_dict({f"network.{key}": value for key, value in theirs.state_dict().items()})
    x = torch.rand(1, 1, *patch, generator=generator)
    with torch.no_grad():
        expected = theirs(x.permute(0, 1, 4, 3, 2)).permute(0, 1, 4, 3, 2)
        torch.testing.assert_close(ours(x), expected, rtol=0, atol=1e-4)
        assert (theirs(x) - expected).abs().max() > 0.01  # the order of the axes matters


def test_generator_sees_its_axes_reversed_and_paints_with_its_first_output() -> None:
    plain = {"generator.width": 4, "region.patch_zyx": (16, 16, 16)}
    theirs = build_generator(Config.preset("abdomen").with_overrides(plain)).eval()
    ours = build_generator(
        Config.preset("abdomen").with_overrides({**plain, "generator.axes": "xyz", "generator.channel": "first"})
    ).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.rand(2, 1, 8, 16, 24, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = theirs(x.permute(0, 1, 4, 3, 2)).permute(0, 1, 4, 3, 2)[:, :1].expand(-1, 3, -1, -1, -1)
        torch.testing.assert_close(ours(x), expected, rtol=0, atol=1e-6)


def test_repeated_patch_merging_takes_the_voxels_of_old_monai() -> None:
    """Voxels that hold their own offset in the block, as bits z y x; the table is the one of MONAI's issue 8284."""
    merging = RepeatedPatchMerging(1)
    for name in ("norm", "reduction"):
        setattr(merging, name, torch.nn.Identity())
    z, y, x = torch.meshgrid(*(torch.arange(n) % 2 for n in (2, 4, 3)), indexing="ij")
    merged = merging((100 * z + 10 * y + x).float()[None, ..., None])
    assert merged.shape == (1, 1, 2, 2, 8)
    assert merged[0, 0, 0, 0].tolist() == [0, 100, 10, 1, 101, 10, 1, 111]
    assert merged[0, 0, 1, 1].tolist() == [0, 100, 10, 0, 0, 10, 0, 0]  # the odd axis was padded with 0


def test_published_names_are_the_settings() -> None:
    assert set(SMALL) == set(NetworkConfig.model_fields["name"].annotation.__args__)  # type: ignore[union-attr]
