"""Named ranges for NVIDIA's profilers (Nsight Systems), where there is a GPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch


@cache
def _profilers_listen() -> bool:
    """Whether ranges go anywhere; asked once, as the answer takes a driver call."""
    return torch.cuda.is_available()


@contextmanager
def nvtx_range(name: str) -> Iterator[None]:
    """Show the block as a range of this thread in a profile; without CUDA, do nothing.

    A range ends in the thread that began it, and ranges of a thread nest. So the block must not give its thread to other work, as an
    ``await`` does.
    """
    if not _profilers_listen():
        yield
        return
    torch.cuda.nvtx.range_push(name)
    try:
        yield
    finally:
        torch.cuda.nvtx.range_pop()
