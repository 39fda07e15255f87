"""A network that is trained, with all that belongs to it: optimiser, loss scale, moving average. Precision, accumulation and several
processes are dealt with here and nowhere else.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, cast

import torch
from torch import nn

from ftengine.errors import ConfigError
from ftengine.training.distributed import World
from ftengine.training.ema import MovingAverage

Precision = Literal["fp32", "bf16", "fp16"]
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Learner:
    """Forward in the wanted precision, backward as often as there are batches, then one update with the gradients of all of them.

    Weights and optimiser stay float32; products are rounded by autocast. fp16 scales the loss (``GradScaler``): a step whose gradients
    overflow is left out and the scale lowered. On the CPU fp16 works as well, but nothing is faster there.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        device: torch.device,
        world: World,
        precision: Precision = "fp32",
        clip_norm: float | None = None,
        ema_decay: float | None = None,
        compiled: bool = False,
    ) -> None:
        """network: on ``device``, with float32 weights that ``optimizer`` updates; it is set to training mode."""
        self.network = network.train()
        self.optimizer = optimizer
        self._device, self._world, self._clip_norm = device, world, clip_norm
        self._precision: Precision = precision
        self._forward = compiled_forward(network, compiled=compiled)
        self._scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self._average = None if ema_decay is None else MovingAverage(network, ema_decay)
        self._parameters = [p for p in network.parameters() if p.requires_grad]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """float32 [B, 1, z, y, x] -> the network's output, float32."""
        with autocast(self._device, self._precision):
            output: torch.Tensor = self._forward(x)
        return output.float()

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of ``loss`` to those of the step."""
        self._scaler.scale(loss).backward()

    def update(self, rate: float, *, divide_by: torch.Tensor | float = 1.0) -> None:
        """Step with the sum of the gradients of all processes over ``divide_by``, then forget them. All processes call it alike."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self._world.sum_gradients(self._parameters)
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        if isinstance(divide_by, torch.Tensor) or divide_by != 1.0:
            for gradient in gradients:
                gradient.div_(divide_by)
        self._scaler.unscale_(self.optimizer)
        if self._clip_norm is not None:
            nn.utils.clip_grad_norm_(self._parameters, self._clip_norm)
        self._scaler.step(self.optimizer)
        self._scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self._average is not None:
            self._average.update(self.network)

    @property
    def product(self) -> nn.Module:
        """The network to use and to validate: the moving average where there is one."""
        return self.network if self._average is None else self._average.network

    def spread(self) -> None:
        """Give every process the weights of rank 0."""
        self._world.spread([*self.network.parameters(), *self.network.buffers()])

    def state_dict(self) -> dict[str, Any]:
        """Everything to go on with but the weights of ``product``, which a checkpoint holds beside it."""
        average = self._average
        return {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
            "weights": None if average is None else self.network.state_dict(),
            "ema_updates": None if average is None else average.num_updates,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was taken; ``product`` holds its weights already. Raises ConfigError where the moving average came or went."""
        if (self._average is None) != (state["weights"] is None):
            raise ConfigError(
                "ema_decay: the run began with another kind of it (none or some). Restore it, or start a new run."
            )
        if self._average is not None:
            self.network.load_state_dict(state["weights"])
            self._average.num_updates = state["ema_updates"]
        self._load_optimizer(state["optimizer"])
        if state["scaler"]:
            self._scaler.load_state_dict(state["scaler"])

    def _load_optimizer(self, state: Mapping[str, Any]) -> None:
        """Its moments; how it decays and averages is what the configuration says now, which a resumed run may be allowed to change."""
        mine = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        for group, saved in zip(mine, state["param_groups"], strict=True):
            if group["amsgrad"] != saved["amsgrad"]:
                raise ConfigError(
                    f"amsgrad: the run began with {saved['amsgrad']}, whose state the other way does not have. Restore it, or start a new run."
                )
        self.optimizer.load_state_dict(dict(state))
        for group, wanted in zip(self.optimizer.param_groups, mine, strict=True):
            group.update(wanted)


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """Products in ``precision`` inside the block."""
    return torch.autocast(device.type, dtype=_DTYPES.get(precision, torch.bfloat16), enabled=precision != "fp32")


def compiled_forward(network: nn.Module, *, compiled: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    """The network, or the network through torch.compile: its weights stay where they are, under their names."""
    return cast("nn.Module", torch.compile(network, dynamic=False)) if compiled else network
