"""``ftengine organs``: pseudo organ labels for the volumes of a store."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ftengine.cli.console import JsonOption, QuietOption, SplitOption, print_json, progress, stderr, stdout

if TYPE_CHECKING:
    from ftengine.organs.run import LabelReport


def organs(
    store: Annotated[
        str, typer.Argument(metavar="STORE", help="Folder, s3://bucket/prefix or gs://bucket/prefix of a store.")
    ],
    tool: Annotated[
        str,
        typer.Option(
            "--with", metavar="TOOL", help="checkpoint (of 'ftengine train seg'), lungmask or totalsegmentator."
        ),
    ],
    weights: Annotated[
        Path,
        typer.Option(
            metavar="PATH", help="The tool's weights: a file, or TotalSegmentator's folder. Never downloaded."
        ),
    ],
    case: Annotated[
        list[str] | None, typer.Option("--case", help="A case to label; repeatable (default: all).")
    ] = None,
    split: SplitOption = None,
    dataset: Annotated[str | None, typer.Option(help="Use only volumes of this data set (default: all).")] = None,
    under_tumors: Annotated[
        bool,
        typer.Option("--under-tumors", help="Also volumes whose label holds tumours only: organs go under them."),
    ] = False,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite/--keep-labels",
            help="Replace organs of label files and of other tools, too; tumours always stay.",
        ),
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would be labelled; write nothing.")] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Write pseudo organ labels into a store, for volumes that came without a label.

    A volume that cannot be labelled is listed with the reason and the rest goes on (exit code 1). Run the same command again to go on
    after an interruption: what is committed is not redone.
    """
    from ftengine.assemble import resolve_device
    from ftengine.organs.run import Selection, label_store, open_labeler, selected_cases
    from ftengine.store.reader import open_store

    opened = open_store(store)
    selection = Selection(tuple(case or ()), split, dataset, under_tumors, overwrite)
    cases = selected_cases(opened, selection)
    labeler = open_labeler(tool, weights, opened, resolve_device(device))
    with progress("labelling", len(cases), quiet=quiet or as_json) as reporter:
        report = label_store(
            store,
            labeler,
            selection,
            dry_run=dry_run,
            on_start=reporter.working_on,
            on_outcome=lambda o: reporter.advance(
                f"{o.status} {o.case}" + (f" ({o.seconds:.1f} s)" if o.status == "labelled" else "")
            ),
        )
    if as_json:
        print_json(report.to_json())
    else:
        _print_report(report)
    raise typer.Exit(report.exit_code)


def _print_report(report: "LabelReport") -> None:
    from rich.markup import escape
    from rich.table import Table

    messages, console = stderr(), stdout()
    for outcome in report.outcomes:
        if outcome.status == "failed":
            text = f"failed: {outcome.case} [{outcome.code}]: {outcome.reason} {outcome.advice}".rstrip()
            messages.print(text, markup=False, highlight=False, style="red")
    table = Table("case", "status", "voxels, or why", "s", title=report.store)
    for outcome in report.outcomes[:40]:
        voxels = ", ".join(f"{name} {count:,}" for name, count in outcome.class_voxels.items() if count)
        table.add_row(escape(outcome.case), outcome.status, escape(voxels or outcome.reason), f"{outcome.seconds:.1f}")
    console.print(table)
    if len(report.outcomes) > 40:
        console.print(f"... and {len(report.outcomes) - 40} more", highlight=False)
    counts = [
        f"{report.count(status)} {status}"
        for status in ("labelled", "planned", "skipped", "failed")
        if report.count(status)
    ]
    console.print(", ".join(counts), highlight=False)
