"""What becomes of an out-of-memory error: the numbers that matter and what would fit, in place of a traceback."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from math import prod
from pathlib import Path

import torch

from ftengine.config import Config
from ftengine.errors import ConfigError, MemoryLimitError
from ftengine.geometry import IntZYX, int_zyx
from ftengine.training.checkpoint import SECTION, Kind
from ftengine.training.step_memory import StepMemory, free_bytes, gigabytes, step_memory

_CPU_TEXTS = ("not enough memory", "can't allocate memory", "cannot allocate memory", "std::bad_alloc")
_PATCH_MULTIPLE = (
    16  # of the patches that are proposed; a network that wants more refuses, and the next smaller one is tried
)

Measure = Callable[[Config], StepMemory]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or on the host: torch has three ways to say so."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in _CPU_TEXTS)


@contextmanager
def explaining_memory(kind: Kind, config: Config, out: Path, device: torch.device) -> Iterator[None]:
    """Inside the block, an error of memory that ran out becomes a MemoryLimitError with advice."""
    budget = _budget(device)
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        settings = getattr(config, SECTION[kind])
        asked = " ".join(str(error).split())[:160] or type(error).__name__
        raise MemoryLimitError(
            f"{out}: a step with {SECTION[kind]}.batch_size={settings.batch_size} and patches of {config.region.patch_zyx} voxels does not fit "
            f"the memory of this machine ({asked}). The last checkpoint, if there is one, is kept. Try, in this order: "
            f"{' '.join(_advice_after(kind, config, device, budget))} '--dry-run' shows what a step needs."
        ) from error


def memory_advice(kind: Kind, config: Config, measure: Measure | None) -> list[str]:
    """What makes a step smaller, one sentence each, the mildest first; keys with their present values, and what a step then needs.

    measure: the memory of a step with a configuration, beside what is free; None where that cannot be known, and then half the batch is
    proposed. The batch proposed divides the patches of a step, so that with more batches a step the weights see as many patches as now.
    """
    section = SECTION[kind]
    settings = getattr(config, section)
    now = None if measure is None else measure(config)
    if now is None or not now.is_traced or now.free is None:
        now = measure = None
    proposals: list[tuple[str, dict[str, object]]] = []
    if kind == "segmenter" and config.network.name == "swinunetr" and not config.network.checkpointing:
        text = "network.checkpointing=true (now false), which computes activations twice"
        proposals.append((text, {"network.checkpointing": True}))
    patches = settings.batch_size * settings.accumulate
    size = _smaller_batch(config, kind, patches, now)
    if size is not None:
        text = (
            f"{section}.batch_size={size} (now {settings.batch_size}) with {section}.accumulate={patches // size} "
            f"(now {settings.accumulate}), as many patches a step"
        )
        proposals.append((text, {f"{section}.batch_size": size, f"{section}.accumulate": patches // size}))
    on_gpu = config.device != "cpu" and torch.cuda.is_available()  # on a CPU autocast keeps copies in both widths
    if on_gpu and settings.precision == "fp32":
        proposals.append((f"{section}.precision=bf16 (now fp32)", {f"{section}.precision": "bf16"}))
    if kind == "generator" and config.generator.width > 1:
        width = config.generator.width // 2
        text = f"generator.width={width} (now {config.generator.width}), a smaller generator"
        proposals.append((text, {"generator.width": width}))
    sentences = [f"Set {text}{_figures(config, keys, measure)}." for text, keys in proposals]
    if config.synthesis.box == "full" and config.synthesis.variant == "paper" and kind == "segmenter":
        sentences.append("Where it paints, set synthesis.box=auto (now full): painting comes on top of these figures.")
    return [*sentences, _smaller_patch(config, now, measure)]


def _smaller_batch(config: Config, kind: Kind, patches: int, now: StepMemory | None) -> int | None:
    """The largest batch below the present one that fits and divides the patches of a step, the smallest where none fits; None without any."""
    batch_size: int = getattr(config, SECTION[kind]).batch_size
    least = 2 if kind == "segmenter" and config.training.cutmix_probability > 0 else 1  # CutMix wants a partner
    sizes = [size for size in range(least, batch_size) if patches % size == 0]
    fitting = batch_size // 2 if now is None else now.largest_batch
    return max((size for size in sizes if size <= fitting), default=min(sizes, default=None))


def _figures(config: Config, keys: dict[str, object], measure: Measure | None) -> str:
    """What a step needs with these keys, and whether that is enough; empty where it is not known."""
    if measure is None:
        return ""
    needed = measure(config.with_overrides(keys))
    free = "" if needed.free is None else f" of {gigabytes(needed.free)}"
    return f": about {gigabytes(needed.total)}{free}{'' if needed.fits else ', which alone is not enough'}"


def _smaller_patch(config: Config, now: StepMemory | None, measure: Measure | None) -> str:
    """The largest patch that fits at the present batch, of those with the proportions of the present one."""
    patch = config.region.patch_zyx
    if now is not None and measure is not None:
        for smaller in _smaller_patches(patch):
            share = prod(smaller) / prod(patch)
            if not replace(now, activations=round(now.activations * share)).fits:
                continue  # what is kept grows with the voxels: not worth a look
            keys: dict[str, object] = {"region.patch_zyx": smaller}
            try:
                if measure(config.with_overrides(keys)).fits:
                    return f"Set region.patch_zyx={list(smaller)} (now {list(patch)}){_figures(config, keys, measure)}."
            except ConfigError:
                continue  # not a size of this network
    return f"Make region.patch_zyx smaller (now {list(patch)})."


def _smaller_patches(patch_zyx: IntZYX) -> list[IntZYX]:
    """Patches of about the same proportions, large ones first."""
    found: list[IntZYX] = []
    for eighths in range(7, 0, -1):
        smaller = int_zyx(
            max(_PATCH_MULTIPLE, n * eighths // 8 // _PATCH_MULTIPLE * _PATCH_MULTIPLE) for n in patch_zyx
        )
        fits_in = all(a <= b for a, b in zip(smaller, patch_zyx, strict=True))
        if fits_in and smaller != patch_zyx and smaller not in found:
            found.append(smaller)
    return found


def _budget(device: torch.device) -> int | None:
    """What this process may hold on a device, what it holds already included on a GPU."""
    free = free_bytes(device)
    held = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    return None if free is None else free + held


def _advice_after(kind: Kind, config: Config, device: torch.device, budget: int | None) -> list[str]:
    """The advice after a step did not fit ``budget``; without figures where no memory is left to find them with."""
    if budget is None:
        return memory_advice(kind, config, None)
    try:
        now = step_memory(kind, config, device=device)
        # painting and work space are not counted, and took the rest: taken to grow with the batch, as activations do
        fixed = now.total - now.activations
        growth = max(1.0, (budget - fixed) / max(1, now.activations))
        return memory_advice(
            kind, config, lambda changed: _grown(step_memory(kind, changed, device=device), growth, budget)
        )
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return memory_advice(kind, config, None)


def _grown(memory: StepMemory, growth: float, free: int) -> StepMemory:
    return replace(
        memory,
        activations=round(memory.activations * growth),
        activations_a_patch=round(memory.activations_a_patch * growth),
        free=free,
    )
