"""A worker process of an experiment: ``python -m ftengine.experiments.worker DIR DEVICE`` takes keys of units on stdin.

With ``--unit KEY`` it does that one unit and ends, as one of torchrun's processes.
"""

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

    folder, device = Path(sys.argv[1]), sys.argv[2]
    if len(sys.argv) > 3:
        with contextlib.suppress(InterruptedRunError):  # saved; whoever asked for it knows
            do(folder, sys.argv[4], device, lambda _fraction, _text: None)
        return

    def work(payload: dict[str, Any], advance: Advance) -> None:
        with _printing_to(log_file(folder, payload["key"])):
            try:
                do(folder, payload["key"], device, advance)
            except FtengineError:
                raise
            except Exception:
                traceback.print_exc()
                raise
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()

    serve(work)


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
