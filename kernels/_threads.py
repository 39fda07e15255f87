"""How the CPU paths use the cores: one task a sample, as many threads as torch is told to use."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch


def for_each(count: int, task: Callable[[int], object], *, cost: Sequence[float] | None = None) -> None:
    """Call ``task(0)`` to ``task(count - 1)``, on up to ``torch.get_num_threads()`` threads; the first error is raised.

    cost: how long each takes, in any unit; the longest start first, so that the threads end together.
    Tasks write to memory of their own and run without Python's lock (NumPy, numba's ``nogil``), so their order and the
    number of threads change no bit of a result.
    """
    threads = min(count, torch.get_num_threads())
    if threads <= 1:
        for index in range(count):
            task(index)
        return
    order = range(count) if cost is None else sorted(range(count), key=cost.__getitem__, reverse=True)
    for _ in _pool(threads, os.getpid()).map(task, order):
        pass


@cache
def _pool(threads: int, _process: int) -> ThreadPoolExecutor:
    """Kept for good: starting threads costs more than a small tumour. A forked process has none of its parent's threads."""
    return ThreadPoolExecutor(threads, thread_name_prefix="ftengine-kernels")
