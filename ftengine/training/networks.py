"""The networks: the segmenter S (MONAI), the generator G and the classifier C (the paper's 3-D U-Net)."""

from collections.abc import Callable

import torch
from monai.networks.nets.swin_unetr import SwinUNETR
from monai.networks.nets.unet import UNet
from torch import nn

from ftengine.config import Config, GeneratorConfig, NetworkConfig, RegionConfig
from ftengine.errors import ConfigError
from ftengine.vml import settle

settle()  # forward, backward and optimiser run in several threads

NUM_CLASSIFIER_CLASSES = 3  # background, real tumour, painted tumour


def _seeded(seed: int, build: Callable[[], nn.Module]) -> nn.Module:
    """Build a network with weights drawn from ``seed``, leaving the global random state as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def build_segmenter(config: Config) -> nn.Module:
    """S or the student: float32 [B, 1, z, y, x] -> logits [B, classes, z, y, x]; weights drawn from ``config.seed``.

    Raises ConfigError where the patch does not fit the network's strides.
    """
    network, region = config.network, config.region
    divisor = 32 if network.name == "swinunetr" else 2 ** max(0, len(network.channels) - 2)
    if any(n % divisor for n in region.patch_zyx):
        raise ConfigError(
            f"region.patch_zyx={region.patch_zyx}: network {network.name} wants multiples of {divisor} on each axis."
        )
    if network.name == "swinunetr" and max(region.patch_zyx) < 64:
        raise ConfigError(
            f"region.patch_zyx={region.patch_zyx}: network swinunetr wants at least 64 voxels on some axis."
        )
    return _seeded(config.seed, lambda: _segmenter(network, region))


def _segmenter(network: NetworkConfig, region: RegionConfig) -> nn.Module:
    if network.name == "swinunetr":
        swin: nn.Module = SwinUNETR(
            in_channels=1,
            out_channels=region.num_classes,
            feature_size=network.feature_size,
            use_v2=True,
            use_checkpoint=network.checkpointing,
            spatial_dims=3,
        )
        return swin
    strides = (1, *(2,) * (len(network.channels) - 2))  # MONAI would halve the volume before its first convolution
    unet: nn.Module = UNet(
        spatial_dims=3,
        in_channels=1,
        out_channels=region.num_classes,
        channels=network.channels,
        strides=strides,
        num_res_units=1,
        norm=("INSTANCE", {"affine": True}),
    )
    return unet


def build_generator(config: Config) -> "SynthesisUNet":
    """G: [B, 1, z, y, x] in [0, 1] -> [B, organs, z, y, x] before tanh; the last layer starts near 0, so first tumours are faint."""

    if any(n % 8 for n in config.region.patch_zyx):
        raise ConfigError(
            f"region.patch_zyx={config.region.patch_zyx}: the generator wants multiples of 8 on each axis."
        )

    def build() -> SynthesisUNet:
        generator = SynthesisUNet(config.generator, out_channels=len(config.region.organs))
        nn.init.normal_(generator.head.weight, std=config.generator.initial_scale)
        generator.head.bias = nn.Parameter(torch.zeros(len(config.region.organs)))
        return generator

    network = _seeded(config.seed + 1, build)
    assert isinstance(network, SynthesisUNet)  # noqa: S101 - says to the type checker what build returns
    return network


def build_classifier(config: Config) -> nn.Module:
    """C: [B, 1, z, y, x] -> logits [B, 3, z, y, x] (background, real tumour, painted tumour) for each voxel."""
    return _seeded(config.seed + 2, lambda: SynthesisUNet(config.generator, out_channels=NUM_CLASSIFIER_CLASSES))


class SynthesisUNet(nn.Module):
    """The paper's U-Net for G and C: four levels of two blocks conv 3^3, norm, ReLU; max-pooling; transposed convolutions.

    With width 32 its layers and parameter counts are those of the released network (19,073,795 with 3 outputs). Its norm is the
    instance norm: the released batch norm always uses the statistics of the batch, which for batches of one is the same
    (reference 1.2), and so a batch gives what its members give one by one. Input sizes must be multiples of 8.
    """

    def __init__(self, config: GeneratorConfig, *, out_channels: int) -> None:
        super().__init__()
        w = config.width
        self.encoder = nn.ModuleList(
            [_double_block(1, w, 2 * w), *(_double_block(2 * w * k, 2 * w * k, 4 * w * k) for k in (1, 2, 4))]
        )
        self.upsample = nn.ModuleList(
            [nn.ConvTranspose3d(c, c, kernel_size=2, stride=2) for c in (16 * w, 8 * w, 4 * w)]
        )
        self.decoder = nn.ModuleList([_double_block(24 * w // k, 8 * w // k, 8 * w // k) for k in (1, 2, 4)])
        self.head = nn.Conv3d(2 * w, out_channels, kernel_size=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, 1, z, y, x] -> [B, out_channels, z, y, x], no activation."""
        skips = []
        for level, block in enumerate(self.encoder):
            x = block(x if level == 0 else nn.functional.max_pool3d(x, 2))
            skips.append(x)
        x = skips.pop()
        for up, block in zip(self.upsample, self.decoder, strict=True):
            x = block(torch.cat([up(x), skips.pop()], dim=1))
        out: torch.Tensor = self.head(x)
        return out


def _double_block(in_channels: int, middle: int, out_channels: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in ((in_channels, middle), (middle, out_channels)):
        layers += [nn.Conv3d(a, b, kernel_size=3, padding=1), nn.InstanceNorm3d(b, affine=True), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


def count_parameters(network: nn.Module) -> int:
    """Number of weights."""
    return sum(p.numel() for p in network.parameters())
