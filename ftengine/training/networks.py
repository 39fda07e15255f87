"""The networks: the segmenter S (MONAI), the generator G and the classifier C (the paper's 3-D U-Net)."""

from collections.abc import Callable
from typing import cast

import torch
from monai.networks.nets.dynunet import DynUNet
from monai.networks.nets.swin_unetr import PatchMergingV2, SwinUNETR
from monai.networks.nets.unet import UNet
from monai.networks.nets.unetr import UNETR
from torch import nn

from ftengine.config import Config, GeneratorConfig, NetworkConfig
from ftengine.errors import ConfigError
from ftengine.geometry import FloatZYX, IntZYX
from ftengine.training.nnunet_plan import plan_network
from ftengine.training.transunet import STRIDE, TransUNet
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
    build = _BUILDERS[network.name]
    built = _seeded(config.seed, lambda: build(network, region.num_classes, region.patch_zyx, region.spacing_mm_zyx))
    return built if network.axes == "zyx" else ReversedAxes(built)


class ReversedAxes(nn.Module):
    """A network whose weights were trained on arrays x, y, z, for arrays z, y, x.

    The weights of a Swin transformer cannot be permuted to the same effect: MONAI takes the position biases of a window that is shorter
    than 7 tokens from the first entries of the table for 7^3, whatever the axis, so they depend on the order of the axes.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, 1, z, y, x] -> [B, channels, z, y, x]."""
        return reverse_axes(self.network(reverse_axes(x)))


def reverse_axes(x: torch.Tensor) -> torch.Tensor:
    """[..., z, y, x] -> [..., x, y, z], contiguous, and back."""
    return x.transpose(-1, -3).contiguous()


def _swinunetr(network: NetworkConfig, num_classes: int, patch_zyx: IntZYX, _spacing: FloatZYX) -> nn.Module:
    _want_multiples(network.name, patch_zyx, (32, 32, 32))
    if max(patch_zyx) < 64:
        raise ConfigError(f"region.patch_zyx={patch_zyx}: network swinunetr wants at least 64 voxels on some axis.")
    swin: nn.Module = SwinUNETR(
        in_channels=1,
        out_channels=num_classes,
        feature_size=network.feature_size,
        use_v2=True,
        use_checkpoint=network.checkpointing,
        spatial_dims=3,
        downsample="merging"
        if network.patch_merging == "all"
        else cast("nn.Module", RepeatedPatchMerging),  # a class of it
    )
    return swin


class RepeatedPatchMerging(PatchMergingV2):
    """Patch merging as MONAI's SwinUNETR had it before version 1.5: of the 2 x 2 x 2 voxels, two are taken twice and two never.

    Source: the table in MONAI's issue 8284. Weights and shapes are those of the merging that takes each once.
    """

    OFFSETS = ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 0), (0, 0, 1), (1, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, d, h, w, C] of any size -> [B, d / 2, h / 2, w / 2, 2 C], rounded up."""
        d, h, w = x.shape[1:4]
        x = nn.functional.pad(x, (0, 0, 0, w % 2, 0, h % 2, 0, d % 2))
        merged: torch.Tensor = self.norm(torch.cat([x[:, i::2, j::2, k::2] for i, j, k in self.OFFSETS], dim=-1))
        result: torch.Tensor = self.reduction(merged)
        return result


def _unet(network: NetworkConfig, num_classes: int, patch_zyx: IntZYX, _spacing: FloatZYX) -> nn.Module:
    divisor = 2 ** max(0, len(network.channels) - 2)
    _want_multiples(network.name, patch_zyx, (divisor,) * 3)
    strides = (1, *(2,) * (len(network.channels) - 2))  # MONAI would halve the volume before its first convolution
    unet: nn.Module = UNet(
        spatial_dims=3,
        in_channels=1,
        out_channels=num_classes,
        channels=network.channels,
        strides=strides,
        num_res_units=1,
        norm=("INSTANCE", {"affine": True}),
    )
    return unet


def _dynunet(network: NetworkConfig, num_classes: int, patch_zyx: IntZYX, spacing_mm_zyx: FloatZYX) -> nn.Module:
    """nnU-Net's network without deep supervision; convolutions have no bias, which the norm behind them would take away."""
    plan = plan_network(patch_zyx, spacing_mm_zyx)
    if len(plan.strides_zyx) < 3:
        raise ConfigError(
            f"region.patch_zyx={patch_zyx}: network dynunet wants a patch that can be halved twice: at least 16 voxels on some axis."
        )
    _want_multiples(network.name, patch_zyx, plan.divisor_zyx)
    unet: nn.Module = DynUNet(
        spatial_dims=3,
        in_channels=1,
        out_channels=num_classes,
        kernel_size=plan.kernels_zyx,
        strides=plan.strides_zyx,
        upsample_kernel_size=plan.strides_zyx[1:],
        filters=plan.channels(network.width),
    )
    return unet


def _unetr(network: NetworkConfig, num_classes: int, patch_zyx: IntZYX, _spacing: FloatZYX) -> nn.Module:
    _want_multiples(network.name, patch_zyx, (16, 16, 16))
    unetr = _UnetrOfOneSize(
        in_channels=1,
        out_channels=num_classes,
        img_size=patch_zyx,
        hidden_size=network.transformer_width,
        mlp_dim=4 * network.transformer_width,
    )
    for name, weight in unetr.named_parameters():
        if "norm_cross_attn" in name:  # of a cross attention that this network does not have: no gradient ever comes
            weight.requires_grad = False
    return unetr


class _UnetrOfOneSize(UNETR):
    """MONAI's UNETR, which says what it wants where it is given another size than it was built for."""

    def forward(self, x_in: torch.Tensor) -> torch.Tensor:
        size = tuple(n * p for n, p in zip(self.feat_size, self.patch_size, strict=True))
        if tuple(x_in.shape[2:]) != size:
            raise ConfigError(
                f"network unetr was built for patches of {size} voxels and got {tuple(x_in.shape[2:])}: its position embeddings are for one size. "
                "Use patches of region.patch_zyx, synthesis.box=full, or another network."
            )
        logits: torch.Tensor = super().forward(x_in)
        return logits


def _transunet(network: NetworkConfig, num_classes: int, patch_zyx: IntZYX, _spacing: FloatZYX) -> nn.Module:
    _want_multiples(network.name, patch_zyx, (STRIDE, STRIDE, STRIDE))
    if max(patch_zyx) < 2 * STRIDE:
        raise ConfigError(
            f"region.patch_zyx={patch_zyx}: network transunet wants at least {2 * STRIDE} voxels on some axis."
        )
    return TransUNet(
        out_channels=num_classes,
        patch_zyx=patch_zyx,
        width=network.width,
        token_size=network.transformer_width,
        num_layers=network.transformer_layers,
    )


_BUILDERS: dict[str, Callable[[NetworkConfig, int, IntZYX, FloatZYX], nn.Module]] = {
    "swinunetr": _swinunetr,
    "unet": _unet,
    "dynunet": _dynunet,
    "unetr": _unetr,
    "transunet": _transunet,
}


def _want_multiples(name: str, patch_zyx: IntZYX, divisor_zyx: IntZYX) -> None:
    if any(n % d for n, d in zip(patch_zyx, divisor_zyx, strict=True)):
        same = len(set(divisor_zyx)) == 1
        wanted = f"{divisor_zyx[0]} on each axis" if same else f"{divisor_zyx}"
        raise ConfigError(f"region.patch_zyx={patch_zyx}: network {name} wants multiples of {wanted}.")


def build_generator(config: Config) -> "SynthesisUNet":
    """G: [B, 1, z, y, x] in [0, 1] -> [B, organs, z, y, x] before tanh; the last layer starts near 0, so first tumours are faint."""

    if any(n % 8 for n in config.region.patch_zyx):
        raise ConfigError(
            f"region.patch_zyx={config.region.patch_zyx}: the generator wants multiples of 8 on each axis."
        )

    def build() -> SynthesisUNet:
        generator = SynthesisUNet(config.generator, out_channels=len(config.region.organs), is_generator=True)
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

    def __init__(self, config: GeneratorConfig, *, out_channels: int, is_generator: bool = False) -> None:
        """``config.channel`` concerns a generator only: every output is then the first."""
        super().__init__()
        w = config.width
        self._is_xyz, self._is_first_for_all = config.axes == "xyz", is_generator and config.channel == "first"
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
        if self._is_xyz:
            x = reverse_axes(x)
        for level, block in enumerate(self.encoder):
            x = block(x if level == 0 else nn.functional.max_pool3d(x, 2))
            skips.append(x)
        x = skips.pop()
        for up, block in zip(self.upsample, self.decoder, strict=True):
            x = block(torch.cat([up(x), skips.pop()], dim=1))
        out: torch.Tensor = self.head(x)
        if self._is_first_for_all:
            out = out[:, :1].expand_as(out)
        return reverse_axes(out) if self._is_xyz else out


def _double_block(in_channels: int, middle: int, out_channels: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in ((in_channels, middle), (middle, out_channels)):
        layers += [nn.Conv3d(a, b, kernel_size=3, padding=1), nn.InstanceNorm3d(b, affine=True), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


def count_parameters(network: nn.Module) -> int:
    """Number of weights."""
    return sum(p.numel() for p in network.parameters())
