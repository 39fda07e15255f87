"""A worker process of an experiment: ``python -m ftengine.experiments.worker DIR DEVICE --lock FD`` takes keys of units on stdin.

FD is the inherited descriptor of the folder's lock. With ``--unit KEY`` it does that one unit and ends, as one of torchrun's processes.
"""

import argparse
import contextlib
import gc
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ftengine.errors import FtengineError
from ftengine.experiments.folder import log_file
from ftengine.experiments.serve import Advance, InterruptedRunError, serve


def main() -> None:
    """The process."""
    import torch

    from ftengine.experiments.work import do

    arguments = _arguments()
    folder, device = arguments.folder, arguments.device
    keep_fds = () if arguments.lock is None else (arguments.lock,)
    if arguments.unit is not None:
        with contextlib.suppress(InterruptedRunError):  # saved; whoever asked for it knows
            do(folder, arguments.unit, device, lambda _fraction, _text: None)
        return

    def work(payload: dict[str, Any], advance: Advance) -> None:
        with _printing_to(log_file(folder, payload["key"])):
            try:
                do(folder, payload["key"], device, advance, keep_fds=keep_fds)
            except FtengineError:
                raise
            except Exception:
                traceback.print_exc()
                raise
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()

    serve(work)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("device")
    parser.add_argument("--unit")
    parser.add_argument("--lock", type=int)
    return parser.parse_args()


@contextlib.contextmanager
def _printing_to(file: Path) -> Iterator[None]:
    """Whatever is printed, also by programs that are started, goes to the end of a file."""
    kept = [(number, os.dup(number)) for number in (1, 2)]
    with file.open("ab") as log:
        for number, _ in kept:
            os.dup2(log.fileno(), number)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, copy in kept:
            os.dup2(copy, number)
            os.close(copy)


if __name__ == "__main__":
    main()
