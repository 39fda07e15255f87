"""How the frozen networks G and S are evaluated: in which precision, memory order, and whether compiled."""

from typing import cast

import torch
from torch import nn

from ftengine.config import SynthesisConfig
from ftengine.errors import ConfigError

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def inference_dtype(config: SynthesisConfig, device: torch.device) -> torch.dtype:
    """The dtype of G's and S's products: ``synthesis.precision``, where auto is bfloat16 on a GPU that has it, else float32."""
    if config.precision == "auto":
        has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has_bf16 else torch.float32
    return _DTYPES.get(config.precision, torch.float32)


class Inference(nn.Module):
    """A frozen network as painting evaluates it; without gradients. Its weights stay float32: autocast converts what it multiplies.

    Compiled networks get one patch at a time. So there is one graph a box size, however many patches a batch paints, nothing is padded, and a
    patch's result has the same bits whatever its batch-mates are. On a GPU they run as CUDA graphs (mode ``reduce-overhead``).
    """

    def __init__(self, network: nn.Module, config: SynthesisConfig, device: torch.device) -> None:
        """network: in eval mode, on ``device``; it is changed: channels last where asked, and no activations are recomputed."""
        super().__init__()
        self._dtype = inference_dtype(config, device)
        self._device_type = device.type
        self._is_compiled = config.compile
        self._memory_format = torch.channels_last_3d if config.channels_last else torch.contiguous_format
        for module in network.modules():
            if hasattr(module, "use_checkpoint"):
                # saves memory for gradients only; to torch's annotations every attribute is a tensor or a module
                module.use_checkpoint = False  # type: ignore[assignment]
        network.to(memory_format=self._memory_format)  # type: ignore[call-overload]  # torch leaves this format out of its overloads
        if config.compile:
            mode = "reduce-overhead" if device.type == "cuda" else "default"
            network = cast("nn.Module", torch.compile(network, dynamic=False, mode=mode))
        self.network = network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Evaluate: float32 [B, 1, z, y, x] -> [B, channels, z, y, x] in the dtype of ``precision``."""
        with torch.no_grad(), torch.autocast(self._device_type, self._dtype, enabled=self._dtype != torch.float32):
            x = x.contiguous(memory_format=self._memory_format)
            result: torch.Tensor = self._one_by_one(x) if self._is_compiled else self.network(x)
        return result

    def _one_by_one(self, x: torch.Tensor) -> torch.Tensor:
        from torch._dynamo.exc import BackendCompilerFailed  # a second of imports, for compiled networks only

        results = []
        for patch in x.split(1):
            torch.compiler.cudagraph_mark_step_begin()
            try:
                results.append(self.network(patch).clone())  # a CUDA graph writes to the same memory each time
            except BackendCompilerFailed as error:
                raise ConfigError(
                    f"synthesis.compile=true: torch.compile failed ({str(error).splitlines()[0]}); want a C++ compiler, on a GPU Triton. "
                    "Install them or set synthesis.compile to false."
                ) from error
        return torch.cat(results)
