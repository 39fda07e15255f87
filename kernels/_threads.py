"""How the CPU paths use the cores: one task a sample, as many threads as torch is told to use."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray


def for_shares(cost: Sequence[float], task: Callable[[NDArray[np.int64]], object]) -> None:
    """Divide samples into one share a thread and call ``task`` with the numbers of each share, in ascending order.

    cost: how long each sample takes, in any unit; the longest is given away first, each to the least loaded. For tasks that loop
    over their samples in compiled code: Python takes part once a share, not once a sample.
    """
    threads = min(len(cost), torch.get_num_threads())
    if threads <= 1:
        task(np.arange(len(cost)))
        return
    loads = [0.0] * threads
    shares: list[list[int]] = [[] for _ in range(threads)]
    for index in sorted(range(len(cost)), key=cost.__getitem__, reverse=True):
        lightest = loads.index(min(loads))
        loads[lightest] += cost[index]
        shares[lightest].append(index)
    arrays = [np.array(sorted(share), dtype=np.int64) for share in shares if share]
    others = [_pool(threads, os.getpid()).submit(task, share) for share in arrays[1:]]
    try:
        task(arrays[0])
    finally:
        for other in others:
            other.result()


def for_each(count: int, task: Callable[[int], object]) -> None:
    """Call ``task(0)`` to ``task(count - 1)``, on up to ``torch.get_num_threads()`` threads; the first error is raised.

    Tasks write to memory of their own and run without Python's lock (NumPy, numba's ``nogil``), so their order and the
    number of threads change no bit of a result.
    """
    threads = min(count, torch.get_num_threads())
    if threads <= 1:
        for index in range(count):
            task(index)
        return
    for _ in _pool(threads, os.getpid()).map(task, range(count)):
        pass


@cache
def _pool(threads: int, _process: int) -> ThreadPoolExecutor:
    """Kept for good: starting threads costs more than a small tumour. A forked process has none of its parent's threads."""
    return ThreadPoolExecutor(threads, thread_name_prefix="ftengine-kernels")
