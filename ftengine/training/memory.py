"""What becomes of an out-of-memory error: the numbers that matter and what to change, in place of a traceback."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ftengine.config import Config
from ftengine.errors import MemoryLimitError
from ftengine.training.checkpoint import SECTION, Kind

_CPU_TEXTS = ("not enough memory", "can't allocate memory", "cannot allocate memory", "std::bad_alloc")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or on the host: torch has three ways to say so."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in _CPU_TEXTS)


@contextmanager
def explaining_memory(kind: Kind, config: Config, out: Path) -> Iterator[None]:
    """Inside the block, an error of memory that ran out becomes a MemoryLimitError with advice."""
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
            f"{'; '.join(memory_advice(kind, config, fitting=settings.batch_size // 2))}. '--dry-run' shows what a step needs."
        ) from error


def memory_advice(kind: Kind, config: Config, *, fitting: int) -> list[str]:
    """What makes a step smaller, the mildest first; keys with their present values.

    fitting: patches of the largest batch that may fit. The batch proposed is the largest below it that divides the patches of a step, so
    that with more batches a step the weights see as many patches as now; 1 where nothing fits.
    """
    section = SECTION[kind]
    settings = getattr(config, section)
    proposals = []
    if kind == "segmenter" and config.network.name == "swinunetr" and not config.network.checkpointing:
        proposals.append("network.checkpointing=true, which computes activations twice")
    if settings.batch_size > 1:
        patches = settings.batch_size * settings.accumulate
        most = max(1, min(fitting, settings.batch_size - 1))
        smaller = max(size for size in range(1, most + 1) if patches % size == 0)
        proposals.append(
            f"{section}.batch_size={smaller} (now {settings.batch_size}) with {section}.accumulate={patches // smaller} "
            f"(now {settings.accumulate}), as many patches a step"
        )
    on_gpu = config.device != "cpu" and torch.cuda.is_available()  # on a CPU autocast keeps copies in both widths
    if on_gpu and settings.precision == "fp32":
        proposals.append(f"{section}.precision=bf16 (now fp32)")
    if kind == "generator":
        proposals.append(f"a smaller generator.width (now {config.generator.width})")
    if config.synthesis.box == "full" and config.synthesis.variant == "paper" and kind == "segmenter":
        proposals.append("where it paints, synthesis.box=auto (now full)")
    proposals.append(f"a smaller region.patch_zyx (now {config.region.patch_zyx})")
    return proposals
