"""The memory of a training step, from the networks' own graphs without computing them.

Forward is run on fake tensors (shapes without numbers), and what autograd keeps is added up: it costs no memory and hardly any time, and
says for a GPU that is not there what it would need.
"""

import resource
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedFakeTensorException,
)
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call

from ftengine.config import Config
from ftengine.training.checkpoint import SECTION, Kind
from ftengine.training.networks import build_classifier, build_generator, build_segmenter

_ADAM_STATES = 2  # tensors that Adam keeps for each weight
_SPARE = 0.9  # of the free memory: the rest is for the allocator's gaps and the kernels' work space


@dataclass(frozen=True)
class StepMemory:
    """Bytes that a training step needs at its peak. activations: what the forward pass keeps for the backward pass, whole batch.

    is_traced: whether the network could be followed; where it looks at values it cannot, and activations are 0. Painting, which the loader's threads do on the same device, and the work space of convolutions come on top.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    activations_a_patch: int
    free: int | None
    is_traced: bool = True

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.activations

    @property
    def fits(self) -> bool:
        """Whether it fits what is free, with a tenth to spare; true where that is not known."""
        return self.free is None or self.total <= _SPARE * self.free

    @property
    def largest_batch(self) -> int:
        """The largest batch that fits; 0 where not even one patch does, or the weights alone do not. Only where ``free`` is known."""
        assert self.free is not None  # noqa: S101 - asked only where something does not fit
        if not self.activations_a_patch:
            return 0
        left = _SPARE * self.free - (self.total - self.activations)
        return max(0, int(left // self.activations_a_patch))


def step_memory(kind: Kind, config: Config, *, device: torch.device, segmenter: nn.Module | None = None) -> StepMemory:
    """Bytes of one training step, from the networks' graphs on fake tensors; nothing is computed or allocated."""
    settings = getattr(config, SECTION[kind])
    trained: list[nn.Module]
    frozen: list[nn.Module] = []
    if kind == "segmenter":
        network = build_segmenter(config)
        trained = [network]
        graph = partial(_segmentation_graph, network)
    else:
        generator, classifier = build_generator(config), build_classifier(config)
        judge = build_segmenter(config) if segmenter is None else segmenter
        trained, frozen = [generator, classifier], [judge]
        graph = partial(_generator_graph, generator, judge, classifier)
    a_patch = _kept_bytes(config, kind, device, graph)
    weights = sum(map(_weight_bytes, trained))
    return StepMemory(
        weights=weights
        + sum(map(_weight_bytes, frozen))
        + (0 if settings.ema_decay is None else _weight_bytes(trained[0])),
        gradients=weights,
        optimizer=(_ADAM_STATES + (kind == "segmenter" and config.training.amsgrad)) * weights,
        activations=(a_patch or 0) * settings.batch_size,
        activations_a_patch=a_patch or 0,
        free=free_bytes(device),
        is_traced=a_patch is not None,
    )


def free_bytes(device: torch.device) -> int | None:
    """Memory that is free for this process on a device: what torch holds and does not use counted as free; None where it is not known."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    limits = [value for value in (_meminfo(), _cgroup(), _address_space()) if value is not None]
    return min(limits, default=None)


def _kept_bytes(
    config: Config, kind: Kind, device: torch.device, forward: Callable[[torch.Tensor], torch.Tensor]
) -> int | None:
    """Bytes of the tensors that autograd keeps of one patch for the backward pass, each storage once; None where a network looks at values."""
    storages: dict[int, int] = {}
    held = []  # so that no storage's number is used twice

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage.nbytes()
        held.append(tensor)
        return tensor

    precision = getattr(config, SECTION[kind]).precision
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.zeros((1, 1, *config.region.patch_zyx), device=device)
        try:
            with (
                saved_tensors_hooks(keep, lambda tensor: tensor),
                torch.autocast(device.type, dtype, enabled=precision != "fp32"),
            ):
                forward(x)
        except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedFakeTensorException):
            return None
    return sum(storages.values())


def _segmentation_graph(network: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The network, and what the loss keeps: softmax, one-hot labels, log-softmax, labels as integers. The loss itself looks at values."""
    logits = _faked(network, x).float()
    probability = logits.softmax(1)
    labels = torch.zeros((len(logits), *logits.shape[2:]), dtype=torch.int64, device=logits.device)
    return (probability * torch.zeros_like(probability)).sum() + nn.functional.cross_entropy(logits, labels)


def _generator_graph(
    generator: nn.Module, segmenter: nn.Module, classifier: nn.Module, x: torch.Tensor
) -> torch.Tensor:
    """G's phase in short: Eq. 1 on the patch, then S and C on it."""
    painted = x - torch.tanh(_faked(generator, x)[:, :1]) * x
    seen, classified = _faked(segmenter, painted), _faked(classifier, painted)
    return seen.float().log_softmax(1).mean() + classified.float().log_softmax(1).mean()


def _faked(network: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The network on a fake tensor, with its weights faked beside it."""
    assert isinstance(x, FakeTensor)  # noqa: S101 - made by _kept_bytes
    named = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    faked = {name: x.fake_mode.from_tensor(tensor).to(x.device) for name, tensor in named.items()}
    result: torch.Tensor = functional_call(network, faked, (x,))
    return result


def _weight_bytes(network: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in network.parameters())


def _meminfo() -> int | None:
    lines = _lines(Path("/proc/meminfo"))
    found = [line.split() for line in lines if line.startswith("MemAvailable:")]
    return int(found[0][1]) * 1024 if found else None


def _cgroup() -> int | None:
    """What a container may still take (cgroup 2); None without a limit."""
    limit, used = (_lines(Path("/sys/fs/cgroup") / name) for name in ("memory.max", "memory.current"))
    if not limit or not used or limit[0] == "max":
        return None
    return max(0, int(limit[0]) - int(used[0]))


def _address_space() -> int | None:
    """What the process may still map (``ulimit -v``); None without a limit."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    pages = _lines(Path("/proc/self/statm"))
    if limit == resource.RLIM_INFINITY or not pages:
        return None
    return max(0, limit - int(pages[0].split()[0]) * resource.getpagesize())


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").split("\n")
    except OSError:
        return []


def gigabytes(size: float) -> str:
    """A size as people say it."""
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2g} MB" if size < 1e7 else f"{size / 1e6:.0f} MB"
