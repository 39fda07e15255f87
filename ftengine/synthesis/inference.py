"""How the frozen networks G and S are evaluated: in which precision, memory order, whether compiled and whether as CUDA graphs."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

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

    A compiled network gets one patch at a time. So it is compiled once a box size, however many patches a batch paints, nothing is padded, and
    a patch's result has the same bits whatever its batch-mates are. CUDA graphs are recorded once a size and number of patches.
    """

    def __init__(self, network: nn.Module, config: SynthesisConfig, device: torch.device) -> None:
        """network: in eval mode, on ``device``; it is changed: channels last where asked, and no activations are recomputed."""
        super().__init__()
        self._dtype = inference_dtype(config, device)
        self._device_type = device.type
        self._memory_format = torch.channels_last_3d if config.channels_last else torch.contiguous_format
        for module in network.modules():
            if hasattr(module, "use_checkpoint"):
                # saves memory for gradients only; to torch's annotations every attribute is a tensor or a module
                module.use_checkpoint = False  # type: ignore[assignment]
        network.to(memory_format=self._memory_format)  # type: ignore[call-overload]  # torch leaves this format out of its overloads
        self._is_compiled = config.compile
        if config.compile:
            network = cast("nn.Module", torch.compile(network, dynamic=False))
        self.network = network
        self._graphs = CudaGraphs(self._evaluate) if config.cuda_graphs and device.type == "cuda" else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Evaluate: float32 [B, 1, z, y, x] -> [B, channels, z, y, x] in the dtype of ``precision``."""
        x = x.contiguous(memory_format=self._memory_format)
        evaluate = self._evaluate if self._graphs is None else self._graphs
        return torch.cat([evaluate(patch) for patch in x.split(1)]) if self._is_compiled else evaluate(x)

    def _evaluate(self, x: torch.Tensor) -> torch.Tensor:
        # no cache: a graph must not hold weights that were converted outside it
        is_narrow = self._dtype != torch.float32
        with torch.no_grad(), torch.autocast(self._device_type, self._dtype, enabled=is_narrow, cache_enabled=False):
            if not self._is_compiled:
                result: torch.Tensor = self.network(x)
                return result
            return self._evaluate_compiled(x)

    def _evaluate_compiled(self, x: torch.Tensor) -> torch.Tensor:
        from torch._dynamo.exc import BackendCompilerFailed  # a second of imports, for compiled networks only

        try:
            result: torch.Tensor = self.network(x)
        except BackendCompilerFailed as error:
            raise ConfigError(
                f"synthesis.compile=true: torch.compile failed ({str(error).splitlines()[0]}); want a C++ compiler, on a GPU Triton. "
                "Install them or set synthesis.compile to false."
            ) from error
        return result


@dataclass(frozen=True)
class _Recorded:
    """A function's launches for one shape, and the memory that they read and write."""

    graph: torch.cuda.CUDAGraph
    given: torch.Tensor
    result: torch.Tensor


class CudaGraphs:
    """A function of one CUDA tensor, replayed as one CUDA graph a shape: the host launches one graph in place of hundreds of kernels.

    The first call with a shape runs the function twice and records it; other threads' work on the device goes on meanwhile. Calls come in
    order, whatever their thread and stream. The function must not look at values on the host. Every graph keeps its result's memory, so at
    most ``MOST_SHAPES`` are recorded; with further shapes the function runs as it is.
    """

    MOST_SHAPES = 32  # two box sizes and batches of 16

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._function = function
        self._recorded: dict[tuple[int, ...], _Recorded] = {}
        self._memory: Any = None  # of all graphs: one runs at a time and its result is copied
        self._lock = threading.Lock()
        self._last: torch.cuda.Event | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The function's result, in memory of its own, on the current stream."""
        stream = torch.cuda.current_stream(x.device)
        with self._lock:
            if self._last is not None:
                stream.wait_event(self._last)
            recorded = self._recorded.get(tuple(x.shape))
            if recorded is None and len(self._recorded) >= self.MOST_SHAPES:
                return self._function(x)
            if recorded is None:
                recorded = self._recorded[tuple(x.shape)] = self._record(x)
            recorded.given.copy_(x)
            recorded.graph.replay()
            result = recorded.result.clone()
            self._last = torch.cuda.Event()
            self._last.record(stream)
        return result

    def _record(self, x: torch.Tensor) -> _Recorded:
        given = x.clone()
        side = torch.cuda.Stream(x.device)
        side.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(side):
            self._function(given)  # what libraries and compilers set up at a first call cannot be recorded
            self._function(given)
        side.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._memory, stream=side, capture_error_mode="thread_local"):
                result = self._function(given)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise ConfigError(
                f"synthesis.cuda_graphs=true: the network cannot be recorded ({str(error).splitlines()[0]}); want one that never looks at "
                "values on the host. Set synthesis.cuda_graphs to false."
            ) from error
        self._memory = graph.pool()
        torch.cuda.current_stream(x.device).wait_stream(side)
        return _Recorded(graph, given, result)
