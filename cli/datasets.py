"""``ftengine datasets``: the public CT sources of the paper, and a folder compared with them."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from ftengine.cli.console import JsonOption, QuietOption, Reporter, print_json, progress, stdout

if TYPE_CHECKING:
    from ftengine.datasets.check import FolderCheck

app = typer.Typer(help="The public CT sources of the paper, and your folders compared with them.", no_args_is_help=True)

RegistryOption = Annotated[
    Path | None,
    typer.Option("--registry", metavar="DIR", help="Folder of your own YAML files, one a data set; they come first."),
]


@app.command(name="list")
def list_datasets(
    region: Annotated[str | None, typer.Option(help="Only data sets of this region: abdomen or chest.")] = None,
    registry: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the known data sets: region, tumour, number of volumes, layout."""
    from ftengine.datasets.registry import REGIONS, load_registry
    from ftengine.errors import ConfigError

    if region is not None and region not in REGIONS:
        raise ConfigError(f"--region {region}: want {' or '.join(REGIONS)}.")
    entries = [e for e in load_registry(registry).entries.values() if region is None or region in e.regions]
    if as_json:
        print_json([e.model_dump(mode="json") for e in entries])
        return
    table = Table("name", "data set", "region", "tumour", "volumes", "layout", "labels")
    for e in entries:
        volumes = "?" if e.volumes is None else f"{e.volumes:,}"
        labels = "voxels" if e.label_map is not None else "organs" if e.organ_labels else "-"
        table.add_row(e.name, escape(e.title), e.region, e.tumor or "-", volumes, e.layout or "?", labels)
    console = stdout()
    console.print(table)
    total = sum(e.volumes or 0 for e in entries)
    console.print(f"{len(entries)} data sets, {total:,} volumes", highlight=False)


@app.command()
def show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name, title or alias of a data set.")],
    registry: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show all that is known of a data set: files, label values, link, overlaps with others."""
    from ftengine.datasets.registry import load_registry

    known = load_registry(registry)
    entry = known.get(name)
    overlaps = known.overlaps(entry.name)
    if as_json:
        print_json(entry.model_dump(mode="json") | {"overlaps": overlaps})
        return
    typer.echo(entry.model_copy(update={"overlaps": overlaps}).to_yaml(), nl=False)


@app.command()
def check(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of a downloaded data set.")],
    dataset: Annotated[
        str | None, typer.Option(metavar="NAME", help="Compare with this data set (default: the one that fits best).")
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of label files with the images' relative names.")
    ] = None,
    registry: RegistryOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Compare a folder with the registry: number of volumes, missing labels, unreadable headers. Reads no voxel; exit code 1 on a mismatch."""
    from contextlib import ExitStack

    from ftengine.datasets.check import check_folder
    from ftengine.datasets.registry import load_registry

    reporters: list[Reporter] = []
    with ExitStack() as stack:
        result = check_folder(
            folder,
            load_registry(registry),
            dataset=dataset,
            labels=labels,
            on_start=lambda total: reporters.append(
                stack.enter_context(progress("reading headers", total, quiet=quiet or as_json))
            ),
            on_case=lambda _case: reporters[0].advance(),
        )
    if as_json:
        print_json(result.to_json())
    else:
        _print_check(result)
    raise typer.Exit(result.exit_code)


def _print_check(result: "FolderCheck") -> None:
    console = stdout()
    expected = "" if result.expected is None else f" of {result.expected}"
    name = result.dataset or "no known data set"
    console.print(f"{result.folder}: {name}, {result.found}{expected} volumes", markup=False, highlight=False)
    for fit in result.fits:
        console.print(f"fits {fit.name} by {', '.join(fit.reasons)}", markup=False, highlight=False)
    for reason, count in result.ignored.items():
        console.print(f"ignored {count} x {reason}", markup=False, highlight=False)
    if result.without_label:
        console.print(f"without label: {_some(result.without_label)}", markup=False, highlight=False)
    if result.without_organs:
        console.print(f"without all organ labels: {_some(result.without_organs)}", markup=False, highlight=False)
    for case, reason in result.unreadable.items():
        console.print(f"unreadable: {case}: {reason}", markup=False, highlight=False)
    for problem in result.problems:
        console.print(f"mismatch: {problem}", markup=False, highlight=False)
    if not result.problems:
        console.print("as expected", highlight=False)


def _some(cases: tuple[str, ...]) -> str:
    more = f" and {len(cases) - 5} more" if len(cases) > 5 else ""
    return f"{len(cases)}: {', '.join(cases[:5])}{more}"
