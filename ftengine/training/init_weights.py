"""``--init FILE``: weights to start from, of ours or of others, and what of them fitted.

=======  ==========================================================================================
input    a segmenter's network and configuration, a file: our checkpoint, or VoCo's, SwinSSL's or the released code's weights
does     renames keys (reference 1.8), keeps what has the name and shape of ours
output   ``InitReport``: loaded, skipped and why, missing
raises   ConfigError where almost nothing fits, naming the first differences
=======  ==========================================================================================
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ftengine.config import Config
from ftengine.errors import ConfigError
from ftengine.training.checkpoint import check_document, config_inside
from ftengine.training.networks import ReversedAxes
from ftengine.training.weight_files import WeightFile, read_weights

LEAST_SHARE = 0.2  # of the network's tensors; SwinSSL's encoder is 0.74 of them
_NAMED = 3  # differences that a message names
_SAME_NETWORK = (
    "name",
    "feature_size",
    "channels",
    "width",
    "transformer_width",
    "transformer_layers",
    "patch_merging",
    "axes",
)


@dataclass(frozen=True)
class InitReport:
    """What became of a file of initial weights; keys are those of our network, of skipped tensors those of the file."""

    file: str
    sha256: str
    loaded: tuple[str, ...]
    skipped: Mapping[str, str]  # key: why
    missing: tuple[str, ...]  # left as drawn from the seed
    notes: tuple[str, ...] = ()

    def line(self) -> str:
        """One line for people."""
        reasons = "; ".join(_shortened(f"{key} ({why})" for key, why in self.skipped.items()))
        missing = ", ".join(_shortened(self.missing))
        return (
            f"{self.file}: {len(self.loaded)} tensors loaded"
            + (f", {len(self.skipped)} skipped: {reasons}" if self.skipped else "")
            + (f", {len(self.missing)} missing and drawn anew: {missing}" if self.missing else "")
            + "".join(f". {note}" for note in self.notes)
        )

    def document(self) -> dict[str, Any]:
        """For ``run.json``."""
        return {
            "file": self.file,
            "sha256": self.sha256,
            "loaded": len(self.loaded),
            "skipped": dict(self.skipped),
            "missing": list(self.missing),
            "notes": list(self.notes),
        }


def load_initial_weights(network: nn.Module, path: str | Path, config: Config) -> InitReport:
    """Put a file's weights into ``network``, made for ``config``, where name and shape are the same.

    A checkpoint of ours must be of the same network; its classes may differ, and then the output layer is drawn anew.
    Raises ConfigError where the file cannot be used (``read_weights``) or fewer than ``LEAST_SHARE`` of the network's tensors are in it.
    """
    file = read_weights(path)
    target = network.network if isinstance(network, ReversedAxes) else network
    is_ours = "format" in file.rest and "kind" in file.rest
    have = _of_ours(file, config) if is_ours else _renamed(file.tensors)
    want = {k: v for k, v in target.state_dict().items() if v.is_floating_point()}
    skipped = _reasons(have, want)
    loaded = {k: v for k, v in have.items() if k in want and k not in skipped}
    missing = tuple(k for k in want if k not in loaded)
    if len(loaded) < LEAST_SHARE * len(want):
        first = "; ".join(_shortened(f"{key}: {why}" for key, why in skipped.items())) or "its names are others"
        raise ConfigError(
            f"{path}: fits network {config.network.name} in {len(loaded)} of {len(want)} tensors ({first}; missing {', '.join(_shortened(missing))}). "
            "Use weights of this network, or the network section that they were trained with."
        )
    keep = {} if not is_ours else _untrained_rows(file, config, target, loaded)
    target.load_state_dict({**loaded, **keep}, strict=False)
    notes = () if is_ours else _notes(config)
    return InitReport(str(path), file.sha256, tuple(loaded), skipped, missing, notes)


def _of_ours(file: WeightFile, config: Config) -> dict[str, torch.Tensor]:
    check_document(file.path, {**file.rest, "model": file.tensors}, "segmenter")
    trained = config_inside(file.path, file.rest).network
    for key in _SAME_NETWORK:
        if getattr(trained, key) != getattr(config.network, key):
            raise ConfigError(
                f"{file.path}: holds the weights of another network: network.{key} was {getattr(trained, key)}, this run has "
                f"{getattr(config.network, key)}. Use the configuration it was trained with, or train with this one."
            )
    prefix = "network." if trained.axes == "xyz" else ""
    return {k.removeprefix(prefix): v for k, v in file.tensors.items() if v.is_floating_point()}


def _renamed(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {plain_key(key): value for key, value in tensors.items() if value.is_floating_point()}


def plain_key(key: str) -> str:
    """A tensor's name in MONAI's SwinUNETR, from the one in a file of VoCo, SwinSSL, nnU-Net's or the released code (reference 1.8)."""
    while True:
        shorter = re.sub(r"^(module|backbone|_orig_mod|student|model)\.", "", key)
        if shorter == key:
            break
        key = shorter
    key = re.sub(r"^swin_vit\.", "swinViT.", key)
    key = re.sub(r"^(?:encoder\.)?(patch_embed|layers[1-4]c?)\.", r"swinViT.\1.", key)
    key = re.sub(r"^(swinViT\.layers[1-4])\.0\.0\.", r"\1.0.", key)  # as MONAI's own copy of SwinSSL names them
    return re.sub(r"\.mlp\.fc([12])\.", r".mlp.linear\1.", key)


def _reasons(have: Mapping[str, torch.Tensor], want: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Why tensors of the file are of no use."""
    reasons = {}
    for key, value in have.items():
        if key not in want:
            reasons[key] = "not in the network"
        elif value.shape != want[key].shape:
            reasons[key] = f"shape {tuple(value.shape)}, want {tuple(want[key].shape)}"
        elif not torch.isfinite(value).all():
            reasons[key] = "holds NaN or infinity"
    return reasons


def _untrained_rows(
    file: WeightFile, config: Config, target: nn.Module, loaded: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The output layer where a file never knew some classes (``released_weights``): their rows as drawn from the seed."""
    rows = [
        config.region.labels[name] for name in file.rest.get("untrained_classes", ()) if name in config.region.labels
    ]
    own = target.state_dict()
    changed = {}
    for key in ("out.conv.conv.weight", "out.conv.conv.bias"):
        if rows and key in loaded:
            changed[key] = loaded[key].clone()
            changed[key][rows] = own[key][rows].to(changed[key])
    return changed


def _notes(config: Config) -> tuple[str, ...]:
    network = config.network
    if network.name != "swinunetr":
        return ()
    wanted = [
        f"network.{key}={value}"
        for key, value in (("axes", "xyz"), ("patch_merging", "repeated"))
        if getattr(network, key) != value
    ]
    if not wanted:
        return ()
    return (
        f"Weights of VoCo, SwinSSL and the released code were trained with {' and '.join(wanted)} (docs/networks.md)",
    )


def _shortened(texts: Iterable[str]) -> list[str]:
    listed = list(texts)
    return listed if len(listed) <= _NAMED else [*listed[:_NAMED], f"and {len(listed) - _NAMED} more"]
