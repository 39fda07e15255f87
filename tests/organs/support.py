"""A small segmenter that finds the organs of ``tests.support.organ_volume``, in seconds."""

from pathlib import Path

import numpy as np
import torch

from ftengine.config import Config
from ftengine.training.checkpoint import save_checkpoint
from ftengine.training.networks import build_segmenter
from tests.support import organ_volume, small_config


def segmenter_config(**overrides: object) -> Config:
    """The small configuration, its windows side by side."""
    return small_config(**{"inference__overlap": 0.0, "augment__rot90_probability": 0.0, **overrides})


def write_segmenter(path: Path, config: Config, *, steps: int = 40) -> Path:
    """Fit a segmenter of ``config`` to one volume, rare classes weighing as much as others, and save it as 'train seg' would."""
    torch.manual_seed(0)
    image, label = organ_volume((24, 24, 24), tumor=True, seed=0)
    low, high = config.region.window_hu
    x = torch.from_numpy(np.clip((image.astype(np.float32) - low) / (high - low), 0, 1))[None, None]
    y = torch.from_numpy(label.astype(np.int64))[None]
    weight = 1.0 / torch.bincount(y.ravel(), minlength=config.region.num_classes).clamp(min=1)
    network = build_segmenter(config)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.02)
    loss = torch.nn.CrossEntropyLoss(weight=weight.float())
    for _ in range(steps):
        optimizer.zero_grad()
        loss(network(x), y).backward()
        optimizer.step()
    save_checkpoint(path, "segmenter", config, {"model": network.state_dict()})
    return path
