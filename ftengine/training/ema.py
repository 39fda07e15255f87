"""Exponential moving average of a network's weights."""

import copy

import torch
from torch import nn


class MovingAverage:
    """A copy of a network whose weights follow: average = decay * average + (1 - decay) * weights after each step.

    Early on the decay is lower, (1 + n) / (10 + n) after n steps, so that the weights that the run began with are soon forgotten.
    Buffers are copied. The copy is in eval mode and gets no gradients.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.network = copy.deepcopy(network).eval().requires_grad_(requires_grad=False)
        self._decay = decay
        self.num_updates = 0

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Follow ``network``, which has the architecture of the copy."""
        self.num_updates += 1
        decay = min(self._decay, (1 + self.num_updates) / (10 + self.num_updates))
        for average, now in zip(self.network.parameters(), network.parameters(), strict=True):
            average.lerp_(now.to(average.dtype), 1.0 - decay)
        for kept, current in zip(self.network.buffers(), network.buffers(), strict=True):
            kept.copy_(current)
