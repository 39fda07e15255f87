"""Files of the released layout with weights by formula or by chance, made from the key table of ../shared or, without it, from ours."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

REPOSITORY = Path(__file__).parents[2]


def shared_file(name: str) -> Path:
    """A file of the golden material: below FTENGINE_TEST_VECTORS or its parent, else beside the repository; skips where it is absent."""
    folder = Path(os.environ.get("FTENGINE_TEST_VECTORS", REPOSITORY.parent / "shared" / "vectors"))
    for candidate in (folder / name, folder.parent / name):
        if candidate.is_file():
            return candidate
    if os.environ.get("CI") == "true":
        pytest.fail(f"{folder / name} is missing")
    pytest.skip(f"no {name}: set FTENGINE_TEST_VECTORS to the folder of golden vectors")


def key_table(region: str) -> dict[str, dict[str, tuple[tuple[int, ...], str]]]:
    """The released table: network -> key with its prefix -> (shape, dtype)."""
    table = json.loads(shared_file("tgan_keys.json").read_text(encoding="utf-8"))[region]
    return {
        name: {key: (tuple(shape), dtype) for key, (shape, dtype) in table[name].items()}
        for name in ("netG", "netD", "netSeg")
    }


def random_state(region: str, *networks: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """A released state dict of some networks, with small random weights, position indices as they must be."""
    generator = torch.Generator().manual_seed(seed)
    noise = 0.05 * torch.randn(65_521, generator=generator)  # a prime: repeated, it lines up with no shape
    state = {}
    for name in networks:
        for key, (shape, dtype) in key_table(region)[name].items():
            if key.endswith("relative_position_index"):
                state[key] = _position_index()
            elif dtype == "int64":
                state[key] = torch.tensor(7)
            else:
                count = int(np.prod(shape))
                first = int(torch.randint(len(noise), (1,), generator=generator))
                values = noise.roll(first).repeat(count // len(noise) + 1)[:count].reshape(shape)
                state[key] = values + float("norm" in key and "weight" in key)
    return state


def _position_index() -> torch.Tensor:
    """MONAI's table for windows of 7^3."""
    places = torch.stack(torch.meshgrid(*[torch.arange(7)] * 3, indexing="ij")).flatten(1)
    offset = places[:, :, None] - places[:, None, :] + 6
    return offset[0] * 169 + offset[1] * 13 + offset[2]


def formula_unet(a: float, b: float, prefix: str = "netG.") -> dict[str, torch.Tensor]:
    """The weights of the golden forward (README of the vectors)."""
    state = {}
    for i, (full_key, (shape, dtype)) in enumerate(key_table("abdomen")["netG"].items()):
        key = full_key.removeprefix("netG.")
        if dtype == "int64":
            state[prefix + key] = torch.tensor(0)
            continue
        count = int(np.prod(shape))
        t = np.sin(a * np.arange(count, dtype=np.float64) + b * i)
        if key.endswith("running_mean"):
            values = 0.3 * t
        elif key.endswith("running_var"):
            values = 1 + 0.5 * t
        elif ".bn1.weight" in key:
            values = 1 + 0.2 * t
        elif len(shape) == 1:
            values = 0.1 * t
        else:
            values = t * np.sqrt(2 / (count / shape[0]))
        state[prefix + key] = torch.from_numpy(values.astype(np.float32).reshape(shape))
    return state


class ReleasedUNet(torch.nn.Module):
    """The released U-Net of G and C as reference 1.2 describes it, with its own keys: batch norms that use the batch's statistics."""

    def __init__(self, out_channels: int) -> None:
        super().__init__()

        def blocks(first: int, middle: int, last: int) -> torch.nn.Module:
            holder = torch.nn.Module()
            holder.ops = torch.nn.Sequential(_block(first, middle), _block(middle, last))
            return holder

        self.levels = (64, 128, 256, 512)
        for channels, first in zip(self.levels, (1, 64, 128, 256), strict=True):
            setattr(self, f"down_tr{channels}", blocks(first, channels // 2, channels))
        for channels, below in ((256, 512), (128, 256), (64, 128)):
            up = blocks(below + channels, channels, channels)
            up.up_conv = torch.nn.ConvTranspose3d(below, below, kernel_size=2, stride=2)
            setattr(self, f"up_tr{channels}", up)
        self.out_tr = torch.nn.Module()
        self.out_tr.final_conv = torch.nn.Conv3d(64, out_channels, kernel_size=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skips: list[torch.Tensor] = []
        for channels in self.levels:
            x = getattr(self, f"down_tr{channels}").ops(x if not skips else torch.nn.functional.max_pool3d(x, 2))
            skips.append(x)
        x = skips.pop()
        for channels in (256, 128, 64):
            up: Any = getattr(self, f"up_tr{channels}")
            x = up.ops(torch.cat([up.up_conv(x), skips.pop()], dim=1))
        result: torch.Tensor = self.out_tr.final_conv(x)  # type: ignore[operator]  # a Module
        return result


def _block(in_channels: int, out_channels: int) -> torch.nn.Sequential:
    block = torch.nn.Sequential()
    block.add_module("conv1", torch.nn.Conv3d(in_channels, out_channels, kernel_size=3, padding=1))
    block.add_module("bn1", torch.nn.BatchNorm3d(out_channels))
    block.add_module("activation", torch.nn.ReLU())
    return block
