"""What all commands share: where results and messages go, progress, configuration, exit codes."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

if TYPE_CHECKING:
    from ftengine.config import Config
    from ftengine.store.reader import Store

EXIT_CODES = "Exit codes: 0 done, 1 some cases failed (listed), 2 usage or configuration, 3 store, 4 nothing usable, 130 interrupted (state saved)."

ConfigOption = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="YAML file; may start from 'preset: NAME'.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override one key, e.g. --set training.batch_size=2; repeatable."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
QuietOption = Annotated[
    bool, typer.Option("--quiet", "-q", help="No progress and no messages, only results and errors.")
]
SplitOption = Annotated[str | None, typer.Option("--split", help="Use only volumes of this split (default: all).")]


def stdout() -> Console:
    """The console for results."""
    return Console() if sys.stdout.isatty() else Console(width=200)  # a file or pipe has no width: never cut a name


def stderr() -> Console:
    """The console for progress and messages."""
    return Console(stderr=True, soft_wrap=True)


def print_json(document: Any) -> None:
    """Print exactly one JSON document on stdout."""
    typer.echo(json.dumps(document, indent=2, allow_nan=False))


def load_config(file: Path | None, assignments: list[str] | None, store: "Store | None" = None) -> "Config":
    """The configuration of a command: ``--config`` or the preset of the store's region, then ``--set``."""
    from ftengine.assemble import config_for_store
    from ftengine.config import Config

    if file is not None:
        config = Config.from_file(file)
    elif store is not None:
        config = config_for_store(store)
    else:
        config = Config.preset("abdomen")
    return config.with_assignments(assignments or [])


class Reporter:
    """Progress on a terminal as a bar with rate and time left; elsewhere as one plain line an item, so that logs stay readable."""

    def __init__(self, bar: Progress | None, task: TaskID | None, total: int, *, quiet: bool) -> None:
        self._bar, self._task, self._total, self._quiet = bar, task, total, quiet
        self._done = 0

    def begin(self, total: int) -> None:
        """The number of items, where it is known only after the display began."""
        self._total = total
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, total=total)

    def working_on(self, text: str) -> None:
        """Name the item that has begun."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, description=text)

    def advance(self, line: str = "") -> None:
        """One item is done; ``line`` is what a log should say of it."""
        self._done += 1
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, advance=1)
        elif line and not self._quiet:
            typer.echo(f"[{self._done}/{self._total}] {line}", err=True)

    def warn(self, text: str) -> None:
        """Show a warning; it stays above the bar, and ``quiet`` does not hide it."""
        if self._bar is not None:
            self._bar.console.print(f"warning: {text}", style="yellow", markup=False, highlight=False)
        else:
            typer.echo(f"warning: {text}", err=True)

    def note(self, text: str) -> None:
        """Show a line that is no warning, above the bar; ``quiet`` hides it."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        elif not self._quiet:
            typer.echo(text, err=True)

    def figures(self, text: str) -> None:
        """Show figures beside the bar."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, figures=text)


@contextmanager
def progress(description: str, total: int, *, quiet: bool) -> Iterator[Reporter]:
    """A progress display on stderr."""
    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield Reporter(None, None, total, quiet=quiet)
        return
    columns: tuple[ProgressColumn, ...] = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}"),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(description, total=total, figures="")
        yield Reporter(bar, task, total, quiet=quiet)
