"""An experiment's folder: where everything lies, what is done, and that one process at a time works in it.

::

    DIR/plan.yaml  stores.yaml           as last run
    DIR/stores/*.zarr                    rows that trainings read, and drawn phantoms
    DIR/units/KEY/unit.json              what the unit is
    DIR/units/KEY/run/                   its training run, as of 'ftengine train'
    DIR/units/KEY/log.txt                what it printed
    DIR/units/KEY/result.json            there when it is done; written last, whole
    DIR/units/KEY/failed.json            why it failed the last time
    DIR/table.md .tex .csv .json         the results
"""

import fcntl
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ftengine.errors import ConfigError
from ftengine.files import read_json, write_json_whole

PLAN, LOCK = "plan.yaml", ".lock"
_WAIT_FOR_WORKERS_S = 60.0


def unit_folder(folder: Path, key: str) -> Path:
    """Everything of one unit."""
    return folder / "units" / key


def result_file(folder: Path, key: str) -> Path:
    """There when the unit is done."""
    return unit_folder(folder, key) / "result.json"


def failure_file(folder: Path, key: str) -> Path:
    """There when the unit failed the last time it was tried."""
    return unit_folder(folder, key) / "failed.json"


def log_file(folder: Path, key: str) -> Path:
    """What the unit printed, all its tries."""
    return unit_folder(folder, key) / "log.txt"


def is_done(folder: Path, key: str) -> bool:
    """Whether the unit's result is there."""
    return result_file(folder, key).is_file()


def read_result(folder: Path, key: str) -> dict[str, Any]:
    """The result of a unit that is done."""
    return read_json(result_file(folder, key))


def failure_of(folder: Path, key: str) -> str | None:
    """Why a unit failed the last time; None where it did not."""
    file = failure_file(folder, key)
    return str(read_json(file)["error"]) if file.is_file() else None


def note_failure(folder: Path, key: str, error: str | None) -> None:
    """Write down why a unit failed, or with None that it did not."""
    if error is None:
        failure_file(folder, key).unlink(missing_ok=True)
    else:
        write_json_whole(failure_file(folder, key), {"error": error})


def write_unit(folder: Path, unit: Mapping[str, Any]) -> None:
    """Write what a unit is, for its worker and for readers."""
    write_json_whole(unit_folder(folder, unit["key"]) / "unit.json", unit)


def read_unit(folder: Path, key: str) -> dict[str, Any]:
    """What ``write_unit`` wrote."""
    return read_json(unit_folder(folder, key) / "unit.json")


@contextmanager
def only_one(folder: Path, *, wait_s: float = _WAIT_FOR_WORKERS_S) -> Iterator[int]:
    """Hold the folder's lock; gives the descriptor of its file.

    Workers inherit the descriptor, so that the lock is held until the last of them has ended, also where the process that started them
    was killed: they save and end then, which is waited for. Raises ConfigError where another process works on.
    """
    with (folder / LOCK).open("w", encoding="utf-8") as stream:
        deadline = time.monotonic() + wait_s
        while True:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise ConfigError(
                        f"{folder}: another process runs this experiment. Wait for it, or choose another --out."
                    ) from error
                time.sleep(0.2)
        yield stream.fileno()
