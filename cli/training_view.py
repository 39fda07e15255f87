"""What the training commands show: the estimate, progress, a log of JSON lines, and the files that were read."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ftengine.cli.console import Reporter, progress

if TYPE_CHECKING:
    from ftengine.training.estimate import Estimate

AllowOption = Annotated[
    list[str] | None,
    typer.Option(
        "--allow",
        metavar="KEY",
        help="With --resume: this key, option or 'store' may differ from what the run began with; repeatable, 'all' for any.",
    ),
]
DryRunOption = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="Train three steps in a folder that is thrown away, print what the run will take, and stop."
    ),
]
JsonLogOption = Annotated[
    bool,
    typer.Option(
        "--json-log",
        help="Print one JSON document a line on stdout: each logged step, counted from 0, each warning, the end.",
    ),
]


@dataclass(frozen=True)
class StepSize:
    """What a step is made of. patches: of a batch, in all processes together; batches: of a step. The stall meter measures batches."""

    patches: int
    batches: int = 1


class TrainingView:
    """Shows a training run as it goes: a bar or plain lines on stderr, or with ``json_log`` JSON lines on stdout."""

    def __init__(self, reporter: Reporter, *, loss: str, steps: int, step: StepSize, json_log: bool) -> None:
        """loss: name of the figure shown."""
        self._reporter, self._loss, self._steps, self._step = reporter, loss, steps, step
        self._json_log = json_log

    def __call__(self, step: int, values: Mapping[str, float]) -> None:
        """``step`` steps are done; ``values`` are the figures of the last one where it is logged."""
        line = ""
        if values:
            shown = self._figures(step, values)
            line = f"step {step}: {shown}"
            self._reporter.figures(shown)
            if self._json_log:
                _print_line({"event": "step", "step": step - 1, **values})
        self._reporter.advance(line)

    def warn(self, text: str) -> None:
        """Show a warning."""
        self._reporter.warn(text)
        if self._json_log:
            _print_line({"event": "warning", "text": text})

    def note(self, text: str) -> None:
        """Show a line that is no warning."""
        self._reporter.note(text)

    def end(self, document: Mapping[str, Any]) -> None:
        """The last line of a log of JSON lines."""
        _print_line({"event": "end", **document})

    def _figures(self, step: int, values: Mapping[str, float]) -> str:
        import torch

        from ftengine.training.estimate import duration

        loss = f"{values[self._loss]:.4f}" if self._loss in values else "-"
        parts = [f"epoch {int(values['epoch'])}"] if "epoch" in values else []
        parts.append(f"{self._loss} {loss}")
        batch_s = values.get("step_s", 0.0)
        if batch_s > 0:
            parts += [
                f"{self._step.patches / batch_s:.3g} patches/s",
                f"waited {values.get('loader/wait_fraction', 0.0):.0%}",
            ]
        if "qc/window_pass_rate" in values or "qc/pass_rate" in values:
            parts.append(f"QC passes {values.get('qc/window_pass_rate', values.get('qc/pass_rate', 0.0)):.0%}")
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            parts.append(f"GPU {torch.cuda.memory_reserved() / 1e9:.1f} GB")
        if batch_s > 0 and step < self._steps:
            parts.append(f"{duration(batch_s * self._step.batches * (self._steps - step))} left")
        return ", ".join(parts)


@contextmanager
def training_view(
    description: str, *, loss: str, steps: int, step: StepSize, json_log: bool, quiet: bool
) -> Iterator[TrainingView]:
    """A view of a run of ``steps`` steps; ``quiet`` shows neither progress nor notes."""
    with progress(description, steps, quiet=quiet or json_log) as reporter:
        yield TrainingView(reporter, loss=loss, steps=steps, step=step, json_log=json_log)


def check_outputs(*, as_json: bool, json_log: bool) -> None:
    """``--json`` and ``--json-log`` both want stdout for themselves."""
    if as_json and json_log:
        raise typer.BadParameter("--json and --json-log: both print on stdout; give one of them.")


def show_files(given: Mapping[str, Path | None], *, quiet: bool) -> None:
    """Print the SHA-256 of the files that a run is given, one line each: what was trained with can be told later."""
    from ftengine.training.weight_files import sha256_of

    for option, path in given.items():
        if path is not None and not quiet:
            typer.echo(f"{option} {path}: sha256 {sha256_of(path)}", err=True)


def show_estimate(estimate: "Estimate", *, view: TrainingView) -> None:
    """Before the first step: what it will take, as notes; that a batch does not fit, as a warning."""
    lines = estimate.lines()
    for line in lines if estimate.memory.fits else lines[:-1]:
        view.note(line)
    if not estimate.memory.fits:
        view.warn(lines[-1])


def print_dry_run(estimate: "Estimate", *, as_json: bool) -> None:
    """The result of ``--dry-run``."""
    if as_json:
        typer.echo(json.dumps(estimate.document(), indent=2, allow_nan=False))
        return
    for line in estimate.lines():
        typer.echo(line)


def _print_line(document: Mapping[str, Any]) -> None:
    typer.echo(json.dumps(document, allow_nan=False))
