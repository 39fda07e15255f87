"""The inside of a worker process: takes jobs as lines of JSON on stdin, answers on stdout. ``schedule`` is the other end."""

import json
import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any

from ftengine.errors import FtengineError

Advance = Callable[[float, str], None]  # how much of the job is done, and a text that says it


class InterruptedRunError(FtengineError):
    """A training was asked to stop; its state is saved."""

    exit_code = 130


def serve(do: Callable[[dict[str, Any], Advance], None]) -> None:
    """Call ``do(payload, advance)`` for each job until the input ends; errors are answered and the next job follows.

    When the input ends inside a job, which is when the other process is gone, this process sends itself SIGTERM: a training saves and
    stops, anything else is cut off. Whatever is printed goes to stderr.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    busy = threading.Event()
    threading.Thread(target=_listen, args=(lines, busy), daemon=True).start()

    def say(document: dict[str, Any]) -> None:
        answers.write(json.dumps(document) + "\n")
        answers.flush()

    def advance(fraction: float, text: str) -> None:
        say({"fraction": fraction, "text": text})

    while (line := lines.get()) is not None:
        busy.set()
        error = None
        try:
            do(json.loads(line), advance)
        except (InterruptedRunError, BrokenPipeError):
            return
        except FtengineError as problem:
            error = str(problem)
        except Exception as problem:  # noqa: BLE001 - a bug in one job must not stop the others
            traceback.print_exc()
            error = f"{type(problem).__name__}: {problem}"
        busy.clear()
        say({"error": error})


def _listen(lines: "queue.SimpleQueue[str | None]", busy: threading.Event) -> None:
    for line in sys.stdin:
        lines.put(line)
    lines.put(None)
    if busy.is_set():
        os.kill(os.getpid(), signal.SIGTERM)
