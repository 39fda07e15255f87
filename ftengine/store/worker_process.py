"""The first lines of a worker process. Imports nothing heavy: a worker whose parent is killed while it still imports must end, too."""

import ctypes
import os
import signal
from multiprocessing.connection import Connection

_PR_SET_PDEATHSIG = 1


def serve(pipe: Connection, parent: int) -> None:
    """The life of a worker process: tasks in, outcomes out, until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    die_with_parent(parent)
    from ftengine.store.workers import answer_tasks

    answer_tasks(pipe)


def die_with_parent(parent: int) -> None:
    """Have the kernel end this process with its parent: a killed conversion must not leave writers behind (Linux)."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the call
        os._exit(1)
