"""Makes a conversion die at a chosen moment; the scripts of test_convert.py call it, and so do the workers that import them."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ftengine.store import case, convert, index, location, workers


def arm(die_at: tuple[str, str, int] | None, die_on: str | None, once: str | None) -> None:
    """``die_at``: SIGKILL this process before or after the n-th call of a function. ``die_on``: SIGKILL the worker of a case."""
    if die_at is not None:
        function, when, number = die_at
        place: dict[str, Any] = {
            "scratch": location.LocalLocation,
            "publish": location.LocalLocation,
            "delete": location.LocalLocation,
            "write_bytes": location.LocalLocation,
            "_sync_tree": location,
            "append_row": index,
            "compact_index": index,
            "_write_failed": convert,
        }
        name = "_write_failed" if function == "write_failed" else function
        if name == "_write_failed":
            number = 1
        _wrap(place[name], name, when, number)
    if die_on is not None:
        setattr(workers, "convert_case", Deadly(die_on, once))  # noqa: B010 - a name that the module only imports


def _wrap(owner: Any, name: str, when: str, number: int) -> None:
    original: Callable[..., Any] = getattr(owner, name)
    calls = 0

    def deadly(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*arguments, **options)
        if calls == number and when == "after":
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, deadly)


class Deadly:
    """Converts a case, but dies on one."""

    def __init__(self, die_on: str, once: str | None) -> None:
        self.die_on, self.once = die_on, once

    def __call__(self, task: case.Task) -> case.CaseOutcome:
        if task.source.case == self.die_on and not (self.once and Path(self.once).exists()):
            if self.once:
                Path(self.once).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return case.convert_case(task)
