"""Feature networks: equal to the published ones, recognised by their files, and what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.networks.nets.resnet import resnet50
from safetensors.torch import save_file
from torch import nn

from ftengine.config import Config
from ftengine.errors import ConfigError
from ftengine.fid.feature_networks import SegmenterNetwork, SliceNetwork, load_features
from ftengine.fid.inception import NUM_CLASSES, FidInception
from ftengine.fid.tumor_images import CropRule, TumorImage
from ftengine.geometry import Box, IntZYX, int_zyx
from ftengine.training.checkpoint import save_checkpoint
from ftengine.training.networks import ReversedAxes, build_segmenter
from tests.fid.networks import made_weights
from tests.support import small_config

CPU = torch.device("cpu")
CONFIG = small_config()
GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "feature_networks.json").read_text())
RADIMAGENET = {"conv1": "0", "bn1": "1", **{f"layer{k}": str(k + 3) for k in range(1, 5)}}


def tumor_image(image: np.ndarray, mask: np.ndarray | None = None) -> TumorImage:
    """A tumour that fills the picture, unless a mask says otherwise."""
    whole = np.ones(image.shape, dtype=bool) if mask is None else mask
    held = np.argwhere(whole)
    origin, end = held.min(axis=0), held.max(axis=0) + 1
    extent = Box(int_zyx(origin), int_zyx(end - origin))
    box = Box((0, 0, 0), int_zyx(image.shape))
    return TumorImage("c", "liver", 20.0, image.astype(np.float32), whole, box, extent)


def two_pictures() -> TumorImage:
    """The pictures of the golden values, 37 x 37 grey values each, as slices of a volume: RAS+ has them upside down and mirrored."""
    pictures = np.random.default_rng(0).uniform(0, 1, (2, 37, 37))
    return tumor_image(pictures[:, ::-1, ::-1].copy())


@pytest.fixture(scope="module")
def inception_weights() -> dict[str, torch.Tensor]:
    head = {"fc.weight": torch.empty(NUM_CLASSES, 2048), "fc.bias": torch.empty(NUM_CLASSES)}
    weights = made_weights({**FidInception().state_dict(), **head})
    assert len(weights) == GOLDEN["inception_keys"]
    return weights


@pytest.fixture(scope="module")
def resnet_weights() -> dict[str, torch.Tensor]:
    network = resnet50(spatial_dims=2, n_input_channels=3, conv1_t_stride=2, bias_downsample=False, num_classes=1000)
    weights = made_weights(network.state_dict())
    assert len(weights) == GOLDEN["resnet50_keys"]
    return weights


def _load(path: Path, rule: CropRule | None = None) -> SliceNetwork | SegmenterNetwork:
    return load_features(path, CONFIG.region, rule=rule or CropRule(), device=CPU)


def test_inception_equals_pytorch_fid(inception_weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    torch.save(inception_weights, tmp_path / "inception.pth")
    network = _load(tmp_path / "inception.pth")
    found = network.features(two_pictures())
    assert found.shape == (2, 2048)
    assert network.info.name.startswith("Inception")
    # 94 convolutions in float32, whose sums another build of torch may order otherwise
    np.testing.assert_allclose(found[:, ::64], GOLDEN["inception"], rtol=1e-4, atol=1e-4)
    assert np.ptp(found[:, ::64]) > 1.0
    one = _load(tmp_path / "inception.pth", CropRule(slices="largest")).features(two_pictures())
    np.testing.assert_allclose(one, found[:1], rtol=1e-4, atol=1e-4)


def test_resnet_equals_torchvision_in_both_layouts(resnet_weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    numbered = {
        f"module.backbone.{RADIMAGENET[part]}.{name.removeprefix(f'{part}.')}": tensor
        for name, tensor in resnet_weights.items()
        if (part := name.split(".")[0]) in RADIMAGENET
    }
    save_file(numbered, tmp_path / "rad.safetensors")
    rad = _load(tmp_path / "rad.safetensors")
    assert "RadImageNet" in rad.info.name
    found = rad.features(two_pictures())
    np.testing.assert_allclose(found[:, ::64], GOLDEN["resnet50"], rtol=1e-4)

    torch.save({"state_dict": resnet_weights}, tmp_path / "imagenet.pt")
    imagenet = _load(tmp_path / "imagenet.pt")
    assert "torchvision" in imagenet.info.name
    mean, sd = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    assert isinstance(imagenet, SliceNetwork)
    prepared = imagenet._prepare(torch.full((1, 3, 1, 1), 0.5))
    np.testing.assert_allclose(prepared.ravel().numpy(), (0.5 - mean) / sd, rtol=1e-6)
    assert not np.allclose(imagenet.features(two_pictures()), found, rtol=0.01)


NETWORKS: dict[str, tuple[dict[str, Any], int]] = {
    "unet": ({"network.channels": (4, 8, 12)}, 12),
    "swinunetr": ({"network.feature_size": 12, "region.patch_zyx": (32, 32, 64)}, 192),
    "dynunet": ({"network.width": 4, "region.patch_zyx": (32, 32, 32)}, 32),
    "unetr": ({"network.transformer_width": 24, "region.patch_zyx": (16, 32, 32)}, 24),
    "transunet": (
        {
            "network.width": 4,
            "network.transformer_width": 24,
            "network.transformer_layers": 1,
            "region.patch_zyx": (16, 32, 32),
        },
        64,
    ),
}


def _segmenter(name: str, **more: Any) -> tuple[Config, nn.Module]:
    keys = {"network.name": name, **NETWORKS[name][0], **more, "augment.rot90_probability": 0.0}
    config = CONFIG.with_overrides(keys)
    return config, build_segmenter(config)


def _patch(shape: IntZYX) -> TumorImage:
    """Noise with a tumour in one corner."""
    mask = np.zeros(shape, dtype=bool)
    mask[2:9, 1:8, 3:7] = True
    return tumor_image(np.random.default_rng(3).uniform(size=shape), mask)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_deepest_features_of_every_segmenter(name: str, tmp_path: Path) -> None:
    config, network = _segmenter(name)
    save_checkpoint(tmp_path / "S.pt", "segmenter", config, {"model": network.state_dict()})
    loaded = load_features(tmp_path / "S.pt", config.region, rule=CropRule(margin_mm=6.0), device=CPU)
    patch = _patch(config.region.patch_zyx)
    found = loaded.features(patch)
    assert found.shape == (1, NETWORKS[name][1])
    assert np.isfinite(found).all()
    assert np.std(found) > 0
    near = patch.image.copy()
    near[patch.mask] = 1.0
    assert not np.allclose(loaded.features(tumor_image(near, patch.mask)), found, rtol=1e-4)


def test_features_of_a_unet_are_those_of_its_lowest_level() -> None:
    config, network = _segmenter("unet")
    patch = _patch(config.region.patch_zyx)
    ours = SegmenterNetwork(network, "unet", config.region, rule=CropRule(margin_mm=3.0), device=CPU).features(patch)
    outer: Any = network.eval()
    with torch.no_grad():
        maps = torch.from_numpy(patch.image)[None, None]
        maps = outer.model[0](maps)
        maps = outer.model[1].submodule[0](maps)
        maps = outer.model[1].submodule[1].submodule(maps)
    assert maps.shape == (1, 12, 8, 8, 8)
    covered = np.zeros((16, 16, 16))
    covered[1:10, 0:9, 2:8] = 1.0  # the tumour's box and a voxel of 3 mm
    shares = covered.reshape(8, 2, 8, 2, 8, 2).mean(axis=(1, 3, 5))
    wanted = (maps[0].numpy() * shares).sum(axis=(1, 2, 3)) / shares.sum()
    np.testing.assert_allclose(ours[0], wanted, rtol=1e-5)


def test_reversed_axes_see_the_reversed_patch() -> None:
    config, network = _segmenter("swinunetr", **{"network.axes": "xyz", "region.patch_zyx": (64, 32, 32)})
    assert isinstance(network, ReversedAxes)
    rule = CropRule(margin_mm=3.0)
    patch = _patch(config.region.patch_zyx)
    turned = tumor_image(patch.image.transpose(2, 1, 0).copy(), patch.mask.transpose(2, 1, 0).copy())
    ours = SegmenterNetwork(network, "swinunetr", config.region, rule=rule, device=CPU).features(patch)
    inner = SegmenterNetwork(network.network, "swinunetr", config.region, rule=rule, device=CPU).features(turned)
    np.testing.assert_allclose(ours, inner, rtol=1e-6)


def test_a_network_of_ones_own() -> None:
    class Mean(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mean(dim=(2, 3))

    kind: dict[str, Any] = {"name": "mean", "side": 8, "prepare": lambda x: x, "rule": CropRule(), "device": CPU}
    image = np.stack([np.full((5, 6), 0.25), np.full((5, 6), 0.5)])
    np.testing.assert_allclose(
        SliceNetwork(Mean(), **kind).features(tumor_image(image)), [[0.25] * 3, [0.5] * 3], rtol=1e-6
    )
    with pytest.raises(ConfigError, match=r"want \[2, features\]"):
        SliceNetwork(nn.Identity(), **kind).features(tumor_image(image))


def test_files_that_are_none_of_these(inception_weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    def refusal(document: Any, text: str) -> None:
        torch.save(document, tmp_path / "w.pt")
        with pytest.raises(ConfigError, match=text):
            _load(tmp_path / "w.pt")

    refusal({"layer.weight": torch.zeros(2)}, "no feature network that is known")
    imagenet = {**inception_weights, "fc.weight": torch.zeros(1000, 2048)}
    refusal(imagenet, "1000 classes; want 1008")
    short = {k: v for k, v in inception_weights.items() if k != "Mixed_6b.branch_pool.bn.weight"}
    refusal(short, "Mixed_6b.branch_pool.bn.weight is missing")
    refusal({**inception_weights, "Mixed_7c.branch1x1.conv.weight": torch.zeros(1)}, "or has another shape")
    config, network = _segmenter("unet", **{"region.window_hu": (-100.0, 200.0)})
    save_checkpoint(tmp_path / "S.pt", "segmenter", config, {"model": network.state_dict()})
    with pytest.raises(ConfigError, match=r"region\.window_hu"):
        _load(tmp_path / "S.pt")


def test_programs_are_not_taken(tmp_path: Path) -> None:
    """A TorchScript and a torch.export file hold a program: nothing of them is run."""
    script = tmp_path / "n.pt"
    with pytest.warns(DeprecationWarning, match="jit"):
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), script)
    exported = tmp_path / "n.pt2"
    torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.zeros(1, 2),)), exported)
    for file in (script, exported):
        with pytest.raises(ConfigError):
            _load(file)
