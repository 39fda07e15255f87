"""Networks that turn pictures of tumours into feature vectors: for FID and KID.

A file of weights decides which network it is for, by the names in it. Files hold tensors only and are read as ``training.weight_files``
says: a TorchScript or a ``torch.export`` file holds a program, and torch runs what it finds while it reads one, so neither is taken. Whoever has another network hands it to ``SliceNetwork`` in a program of their own.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
import torch.nn.functional as nnf
from monai.networks.layers.simplelayers import SkipConnection
from monai.networks.nets.resnet import resnet50
from numpy.typing import NDArray
from torch import nn

from ftengine.config import RegionConfig
from ftengine.errors import ConfigError
from ftengine.fid.inception import NUM_CLASSES, SIDE, FidInception
from ftengine.fid.tumor_images import CropRule, TumorImage, patch_around, square_around
from ftengine.geometry import Box, FloatZYX, IntZYX, int_zyx
from ftengine.training.checkpoint import load_segmenter
from ftengine.training.networks import ReversedAxes
from ftengine.training.weight_files import read_weights, sha256_of

_RESNET_SIDE = 224
_IMAGENET_MEAN, _IMAGENET_SD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_RADIMAGENET_NAMES = {
    "backbone.0.": "conv1.",
    "backbone.1.": "bn1.",
    **{f"backbone.{k + 3}.": f"layer{k}." for k in range(1, 5)},
}
_WANTED = (
    "want the Inception weights of pytorch-fid or torch-fidelity (pt_inception-2015-12-05), a ResNet-50 in the layout of torchvision or of "
    "RadImageNet, or a segmenter that 'ftengine train seg' wrote"
)


@dataclass(frozen=True)
class NetworkInfo:
    """What a result should say of its feature network. sample: what one feature vector is of; sha256: of the file, empty without one."""

    name: str
    sha256: str
    sample: str
    input: str


class FeatureNetwork(Protocol):
    """Feature vectors of tumours."""

    @property
    def info(self) -> NetworkInfo:
        """What it is, for the result."""
        ...

    def box(self, extent: Box, volume_shape_zyx: IntZYX, spacing_mm_zyx: FloatZYX) -> Box:
        """What it wants to see of a volume around the bounding box of a tumour; may reach beyond the volume."""
        ...

    def features(self, tumor: TumorImage) -> NDArray[np.float64]:
        """One row a sample, [samples, D]; ``tumor`` was cut by ``box``."""
        ...


class SliceNetwork:
    """A two-dimensional network on axial slices through the tumour, in radiological view, each cut to the tumour and resized to the input.

    network: float32 [B, 3, side, side] -> [B, D] in eval mode on ``device``. prepare: grey values in [0, 1], [B, 3, side, side], to what
    the network was trained on. The same grey value goes into all three channels.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        name: str,
        side: int,
        prepare: Callable[[torch.Tensor], torch.Tensor],
        rule: CropRule,
        device: torch.device,
        sha256: str = "",
        batch_size: int = 32,
    ) -> None:
        self._network, self._side, self._prepare, self._rule = network, side, prepare, rule
        self._device, self._batch_size = device, batch_size
        self.info = NetworkInfo(name, sha256, "axial slice", f"{side} x {side} pixels")

    def box(self, extent: Box, volume_shape_zyx: IntZYX, spacing_mm_zyx: FloatZYX) -> Box:
        """The slices of the tumour, and in them a square around it."""
        return square_around(extent, self._rule.margin_mm, spacing_mm_zyx)

    def features(self, tumor: TumorImage) -> NDArray[np.float64]:
        """One row a slice."""
        slices = torch.from_numpy(tumor.image[tumor.slices(self._rule.slices)])
        slices = slices.flip(1, 2).unsqueeze(1)  # from RAS+ to the radiological view that such networks were trained on
        rows = [self._of(part) for part in slices.split(self._batch_size)]
        return np.concatenate(rows)

    @torch.inference_mode()
    def _of(self, slices: torch.Tensor) -> NDArray[np.float64]:
        size = (self._side, self._side)
        grey = nnf.interpolate(slices.to(self._device), size, mode="bilinear", antialias=True)  # smooths only to shrink
        found = self._network(self._prepare(grey.expand(-1, 3, -1, -1)))
        return _rows(found, len(slices), self.info.name)


class SegmenterNetwork:
    """The deepest features of a segmenter S on a patch around the tumour, averaged over the places that the tumour's box covers.

    The box is that of the tumour and the margin; a place of the feature map that lies in it by half counts half. One sample a tumour.
    """

    def __init__(
        self,
        segmenter: nn.Module,
        name: str,
        region: RegionConfig,
        *,
        rule: CropRule,
        device: torch.device,
        sha256: str = "",
    ) -> None:
        """segmenter: as ``training.networks.build_segmenter`` makes it; name: ``network.name``."""
        self._network = segmenter.to(device).eval()
        self._reversed = isinstance(segmenter, ReversedAxes)
        self._deepest = _deepest(segmenter, name)
        self._patch, self._spacing, self._rule, self._device = region.patch_zyx, region.spacing_mm_zyx, rule, device
        size = " x ".join(map(str, region.patch_zyx))
        self.info = NetworkInfo(f"segmenter {name}", sha256, "tumour", f"patch of {size} voxels")

    def box(self, extent: Box, volume_shape_zyx: IntZYX, spacing_mm_zyx: FloatZYX) -> Box:
        """A patch of the region's size around the tumour, inside the volume where it can be."""
        return patch_around(extent, self._patch, volume_shape_zyx)

    @torch.inference_mode()
    def features(self, tumor: TumorImage) -> NDArray[np.float64]:
        """One row."""
        found: list[Any] = []
        hook = self._deepest.register_forward_hook(lambda _module, _given, result: found.append(result))
        try:
            self._network(torch.from_numpy(tumor.image)[None, None].to(self._device))
        finally:
            hook.remove()
        covered = torch.from_numpy(tumor.covered(self._rule.margin_mm, self._spacing)).to(self._device)
        return _rows(self._pooled(found[0], covered), 1, self.info.name)

    def _pooled(self, found: torch.Tensor | tuple[torch.Tensor, ...], covered: torch.Tensor) -> torch.Tensor:
        """[1, C, z, y, x], or tokens [1, N, C] of a grid of 16 voxels, and float32 [z, y, x] in [0, 1] -> [1, C]."""
        maps = found[0] if isinstance(found, tuple) else found  # MONAI's ViT: tokens, then those of its layers
        if maps.ndim == 3:
            maps = maps.transpose(1, 2).unflatten(2, [n // 16 for n in covered.shape])
        weights = covered.permute(2, 1, 0) if self._reversed else covered
        shares = nnf.adaptive_avg_pool3d(weights[None, None], int_zyx(maps.shape[2:]))
        return (maps * shares).sum(dim=(2, 3, 4)) / shares.sum()


def _deepest(segmenter: nn.Module, name: str) -> nn.Module:
    """The module whose output is the deepest feature map: the last one before the way back up."""
    inner = segmenter.network if isinstance(segmenter, ReversedAxes) else segmenter
    paths = {"swinunetr": "encoder10", "dynunet": "bottleneck", "unetr": "vit", "transunet": "bottom"}
    if name in paths:
        return cast("nn.Module", getattr(inner, paths[name]))
    level: nn.Module = cast("nn.Module", inner.model)  # unet: each level holds the next one
    while skips := [m for m in level.children() if isinstance(m, SkipConnection)]:
        level = skips[0].submodule
    return level


def load_features(
    path: str | Path, region: RegionConfig, *, rule: CropRule, device: torch.device
) -> SliceNetwork | SegmenterNetwork:
    """The feature network that a file of weights is for; nothing in the file is run.

    Raises ConfigError where the file is none of those that are known, is damaged, or is a segmenter of another region.
    """
    path = Path(path)
    weights = read_weights(path)
    names = {name.removeprefix("module."): tensor for name, tensor in weights.tensors.items()}
    if weights.rest.get("kind") == "segmenter":
        return _segmenter(path, region, rule, device)
    if "Mixed_7c.branch1x1.conv.weight" in names:
        network, name, side, prepare = _inception(path, names), "Inception (pt_inception-2015-12-05)", SIDE, _both_signs
    elif "layer4.2.conv3.weight" in names:
        network, name, side, prepare = _resnet(path, names), "ResNet-50 (torchvision layout)", _RESNET_SIDE, _imagenet
    elif "backbone.7.2.conv3.weight" in names:
        network, name = _resnet(path, _renamed(names)), "ResNet-50 (RadImageNet layout)"
        side, prepare = _RESNET_SIDE, _both_signs
    else:
        raise ConfigError(
            f"{path}: holds no feature network that is known ({', '.join(list(names)[:3])}, ...); {_WANTED}."
        )
    return SliceNetwork(
        network.to(device).eval(),
        name=name,
        side=side,
        prepare=prepare,
        rule=rule,
        device=device,
        sha256=weights.sha256,
    )


def _segmenter(path: Path, region: RegionConfig, rule: CropRule, device: torch.device) -> SegmenterNetwork:
    network, config = load_segmenter(path)
    trained = config.region
    for key in ("name", "spacing_mm_zyx", "window_hu"):
        if getattr(trained, key) != getattr(region, key):
            raise ConfigError(
                f"{path}: was trained with region.{key}={getattr(trained, key)}; the store has {getattr(region, key)}. Use a segmenter of this "
                "region."
            )
    return SegmenterNetwork(network, config.network.name, trained, rule=rule, device=device, sha256=sha256_of(path))


def _inception(path: Path, names: Mapping[str, torch.Tensor]) -> nn.Module:
    classes = names.get("fc.weight")
    if classes is None or len(classes) != NUM_CLASSES:
        found = "none" if classes is None else str(len(classes))
        raise ConfigError(
            f"{path}: is an Inception network with {found} classes; want {NUM_CLASSES}: torchvision's own weights give FIDs that nothing published can "
            "be compared with. Fetch pt_inception-2015-12-05-6726825d.pth of pytorch-fid."
        )
    return _filled(FidInception(), path, names)


def _resnet(path: Path, names: Mapping[str, torch.Tensor]) -> nn.Module:
    network: nn.Module = resnet50(
        spatial_dims=2, n_input_channels=3, conv1_t_stride=2, feed_forward=False, bias_downsample=False
    )
    return _filled(network, path, names)


def _renamed(names: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """RadImageNet numbers the parts of torchvision's network."""
    result = {}
    for name, tensor in names.items():
        prefix = next((p for p in _RADIMAGENET_NAMES if name.startswith(p)), "")
        result[_RADIMAGENET_NAMES.get(prefix, "") + name.removeprefix(prefix)] = tensor
    return result


def _filled(network: nn.Module, path: Path, names: Mapping[str, torch.Tensor]) -> nn.Module:
    """The network with these weights; what tells classes apart (``fc``, ``AuxLogits``) and the counters of the norms are left out."""
    wanted = network.state_dict()
    given = {name: tensor for name, tensor in names.items() if name.split(".")[0] not in {"fc", "AuxLogits"}}
    counters = {name for name in wanted if name.endswith("num_batches_tracked")}
    differs = sorted((wanted.keys() ^ given.keys()) - counters) or [
        name for name in sorted(given.keys() - counters) if given[name].shape != wanted[name].shape
    ]
    if differs:
        raise ConfigError(
            f"{path}: {differs[0]} is missing, is not of this network or has another shape ({len(differs)} such); {_WANTED}."
        )
    network.load_state_dict({name: given.get(name, wanted[name]) for name in wanted})
    return network


def _both_signs(grey: torch.Tensor) -> torch.Tensor:
    """[0, 1] -> [-1, 1]; RadImageNet's is (v - 127.5) * 2 / 255 of a byte v."""
    return 2.0 * grey - 1.0


def _imagenet(grey: torch.Tensor) -> torch.Tensor:
    mean, sd = (grey.new_tensor(values).view(1, 3, 1, 1) for values in (_IMAGENET_MEAN, _IMAGENET_SD))
    return (grey - mean) / sd


def _rows(found: torch.Tensor, num: int, name: str) -> NDArray[np.float64]:
    if found.ndim != 2 or len(found) != num:
        raise ConfigError(
            f"feature network {name}: gave {tuple(found.shape)} for {num} samples; want [{num}, features]."
        )
    rows: NDArray[np.float64] = found.double().cpu().numpy()
    return rows
