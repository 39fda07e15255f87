"""How the CPU paths use the cores: samples divided among as many threads as torch is told to use.

Tasks write to memory of their own and run without Python's lock (NumPy, numba's ``nogil``), so neither their order nor the
number of threads changes a bit of a result.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray

_MOST_THREADS = 256


def for_shares(cost: Sequence[float], task: Callable[[NDArray[np.int64]], object]) -> None:
    """Divide samples into one share a thread and call ``task`` with the numbers of each share, in ascending order.

    cost: how long each sample takes, in any unit; the longest is given away first, each to the least loaded. For tasks
    that loop over their samples in compiled code: Python takes part once a share, not once a sample. An error of any
    thread is raised when all have ended.
    """
    threads = min(len(cost), torch.get_num_threads(), _MOST_THREADS)
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
    others = [_pool(os.getpid()).submit(task, share) for share in arrays[1:]]
    try:
        task(arrays[0])
    finally:
        for other in others:
            other.result()


def for_each(count: int, task: Callable[[int], object]) -> None:
    """Call ``task(0)`` to ``task(count - 1)``, divided as ``for_shares`` divides samples of equal cost."""

    def run(share: NDArray[np.int64]) -> None:
        for index in share.tolist():
            task(index)

    for_shares([1.0] * count, run)


@cache
def _pool(_process: int) -> ThreadPoolExecutor:
    """One for the process, kept for good, as OpenMP keeps its own; threads start when they are first needed.

    A forked process has none of its parent's threads and makes its own.
    """
    return ThreadPoolExecutor(_MOST_THREADS, thread_name_prefix="ftengine-kernels")
