"""``ftengine store``: look into a store and take volumes out of it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from ftengine.cli.console import JsonOption, QuietOption, SplitOption, print_json, progress, stdout

if TYPE_CHECKING:
    from ftengine.store.subset import SubsetReport

app = typer.Typer(help="Look into a store and take volumes out of it.", no_args_is_help=True)


@app.command()
def info(
    store: Annotated[str, typer.Argument(metavar="STORE")],
    cases: Annotated[bool, typer.Option("--cases", help="List every volume.")] = False,
    picture: Annotated[
        Path | None, typer.Option(metavar="PNG", help="Draw spacing, HU, label and tumour size histograms into a file.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show what a store holds: region, grid, labels, volumes by data set, annotation and split."""
    from ftengine.store.info import describe_store
    from ftengine.store.reader import open_store

    opened = open_store(store)
    if picture is not None:
        from ftengine.pictures.store_picture import draw_store

        draw_store(opened, picture)
    document = describe_store(opened, list_cases=cases)
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


@app.command()
def verify(
    store: Annotated[str, typer.Argument(metavar="STORE")],
    deep: Annotated[
        list[str] | None,
        typer.Option(
            "--deep", metavar="SRC", help="Also convert these sources again, in memory, and compare; repeatable."
        ),
    ] = None,
    dataset: Annotated[str, typer.Option(help="With --deep: the data set name of the conversion.")] = "data",
    labels: Annotated[Path | None, typer.Option(metavar="DIR", help="With --deep: as in the conversion.")] = None,
    organ_labels: Annotated[Path | None, typer.Option(metavar="DIR", help="With --deep: as in the conversion.")] = None,
    layout: Annotated[str, typer.Option(help="With --deep: as in the conversion.")] = "auto",
    absolute_paths: Annotated[
        bool, typer.Option("--absolute-paths", help="With --deep: as in the conversion.")
    ] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Read every chunk against its checksum and every row against its arrays; exit code 3 where something is damaged."""
    from dataclasses import asdict

    from ftengine.errors import StoreError
    from ftengine.store.reader import open_store
    from ftengine.store.verify import verify_store
    from ftengine.volume.discover import parse_source
    from ftengine.volume.layouts.choose import find_cases

    opened = open_store(store)
    sources = None
    if deep:
        pairs = [parse_source(text) for text in deep]
        found = find_cases(  # the maps stand in the rows
            [image for image, _ in pairs],
            layout=layout,
            dataset=dataset,
            labels=labels,
            organ_labels=organ_labels,
            pairs={image: label for image, label in pairs if label is not None},
            absolute_paths=absolute_paths,
        )
        sources = found.sources
    with progress("verifying", len(opened), quiet=quiet or as_json) as reporter:
        findings = verify_store(
            opened,
            sources=sources,
            on_finding=lambda finding: reporter.advance(f"{finding.verdict} {finding.case}"),
        )
    bad = [finding for finding in findings if finding.verdict != "sound"]
    if as_json:
        print_json(
            {
                "store": store,
                "volumes": len(findings),
                "sound": len(findings) - len(bad),
                "bad": [asdict(f) for f in bad],
            }
        )
    else:
        for finding in bad:
            typer.echo(f"{finding.verdict}: {finding.problem}")
        typer.echo(f"{len(findings) - len(bad)} of {len(findings)} volumes are sound")
    if bad:
        raise typer.Exit(StoreError.exit_code)


@app.command()
def compact(
    store: Annotated[str, typer.Argument(metavar="STORE")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be folded and removed.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Fold the rows written since the last compaction into the index and remove what killed conversions left behind."""
    from dataclasses import asdict

    from ftengine.store.location import locate
    from ftengine.store.maintenance import compact_store

    done = compact_store(locate(store), dry_run=dry_run)
    if as_json:
        print_json({"store": store, "dry_run": dry_run, **asdict(done)})
        return
    would = "would be " if dry_run else ""
    for name in done.orphans:
        typer.echo(f"{would}removed: {name} (no row)")
    typer.echo(
        f"{done.num_rows} volumes; {done.num_row_files} row files {would}folded; {len(done.orphans)} orphans {would}removed"
    )


@app.command()
def subset(
    store: Annotated[str, typer.Argument(metavar="STORE")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="New folder for the subset; keep its place to STORE.")],
    scale: Annotated[
        str | None,
        typer.Option(
            "--subset", metavar="SCALE", help="Table A11: 0.7K, 8K, 13K or 20K (abdomen); 6K, 56K or 140K (chest)."
        ),
    ] = None,
    dataset: Annotated[list[str] | None, typer.Option(help="Only this data set; repeatable.")] = None,
    cases: Annotated[Path | None, typer.Option(metavar="FILE", help="Only the cases of this list, one a line.")] = None,
    split: SplitOption = None,
    folds: Annotated[
        int, typer.Option(min=0, help="Deal the volumes into folds, e.g. 5; 0 keeps those they have.")
    ] = 0,
    seed: Annotated[int, typer.Option(help="Which deal.")] = 0,
    dry_run: Annotated[bool, typer.Option(help="Count the volumes, write nothing.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Make a light store of chosen volumes: an index of its own, the voxels of STORE. Train, evaluate and export work on it as on STORE."""
    from ftengine.store.reader import open_store
    from ftengine.store.subset import make_subset, read_case_list

    report = make_subset(
        open_store(store),
        out,
        subset=scale,
        datasets=dataset or (),
        cases=None if cases is None else read_case_list(cases),
        split=split,
        num_folds=folds,
        seed=seed,
        dry_run=dry_run,
    )
    if as_json:
        print_json(report.to_json())
    else:
        _print_subset(report)


def _print_subset(report: "SubsetReport") -> None:
    console = stdout()
    table = Table("data set", "annotation", "split", "volumes")
    for (name, annotation, part), count in report.groups.items():
        table.add_row(escape(name), annotation, escape(part), str(count))
    console.print(table)
    short = {name: counts for name, counts in report.expected.items() if counts[0] != counts[1]}
    if short:
        wanted = Table("differs from Table A11", "volumes here", "volumes there")
        for name, (found, expected) in short.items():
            wanted.add_row(name, str(found), str(expected))
        console.print(wanted)
    dealt = f", folds of {' '.join(map(str, report.folds.values()))}" if report.folds else ""
    what = f"written to {report.out}" if report.is_written else "nothing written"
    console.print(f"{report.num_volumes} volumes{dealt}; {what}", markup=False, highlight=False)
