"""``ftengine store``: look into a store and take volumes out of it."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from ftengine.cli.console import JsonOption, QuietOption, print_json, progress, stdout

app = typer.Typer(help="Look into a store and take volumes out of it.", no_args_is_help=True)


@app.command()
def info(
    store: Annotated[str, typer.Argument(metavar="STORE")],
    cases: Annotated[bool, typer.Option("--cases", help="List every volume.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show what a store holds: region, grid, labels, volumes by data set, annotation and split."""
    from ftengine.store.info import describe_store
    from ftengine.store.reader import open_store

    opened = open_store(store)
    document = describe_store(opened, list_cases=cases or as_json)
    if as_json:
        print_json(document)
        return
    console = stdout()
    console.print(
        f"{store}: format {document['format']}, region {document['region']}, {document['num_volumes']} volumes",
        highlight=False,
    )
    console.print(
        f"spacing (z, y, x) {document['spacing_mm_zyx']} mm; {document['stored_mb']:.1f} MB stored, {document['raw_mb']:.1f} MB raw",
        highlight=False,
    )
    console.print(
        "labels: " + ", ".join(f"{value} {name}" for name, value in document["labels"].items()), highlight=False
    )
    table = Table("data set", "annotation", "split", "volumes", "tumors")
    for group in document["groups"]:
        table.add_row(
            escape(group["dataset"]),
            group["annotation"],
            escape(group["split"]),
            str(group["volumes"]),
            str(group["tumors"]),
        )
    console.print(table)
    if cases:
        listing = Table("case", "voxels z y x", "annotation", "tumors", "largest mm")
        for row in document["cases"]:
            largest = f"{row['largest_tumor_mm']:.1f}" if row["largest_tumor_mm"] is not None else ""
            listing.add_row(
                escape(row["case"]),
                " ".join(map(str, row["shape_zyx"])),
                row["annotation"],
                str(row["num_tumors"]),
                largest,
            )
        console.print(listing)


@app.command()
def export(
    store: Annotated[str, typer.Argument(metavar="STORE")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for the NIfTI files.")],
    case: Annotated[
        list[str] | None, typer.Option("--case", help="A case to export; repeatable (default: all).")
    ] = None,
    grid: Annotated[str, typer.Option(help="store: as stored; native: on the grid of the converted file.")] = "store",
    quiet: QuietOption = False,
) -> None:
    """Write volumes and labels back as NIfTI."""
    from ftengine.store.export import export_case
    from ftengine.store.reader import open_store

    opened = open_store(store)
    wanted = case or opened.cases
    with progress("exporting", len(wanted), quiet=quiet) as reporter:
        for name in wanted:
            reporter.working_on(name)
            for path in export_case(opened, name, out, grid=grid):  # type: ignore[arg-type]  # export_case checks it
                typer.echo(path)
            reporter.advance()
