"""``ftengine convert``: files to a store."""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from ftengine.cli.console import ConfigOption, JsonOption, QuietOption, SetOption, print_json, progress, stderr, stdout

if TYPE_CHECKING:
    from ftengine.store.convert import CaseOutcome, ConversionReport
    from ftengine.volume.cases import Discovery


def convert(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SRC...",
            help="Files, folders of files, or DICOM series folders; 'IMAGE=LABEL' pairs two files, 'IMAGE=-' takes no label.",
        ),
    ],
    store: Annotated[str, typer.Argument(metavar="STORE", help="Folder of the store; made if it does not exist.")],
    region: Annotated[
        str, typer.Option(help="Preset whose grid and labels apply: abdomen, chest or demo.")
    ] = "abdomen",
    dataset: Annotated[str, typer.Option(help="Data set name, the first part of every case name.")] = "data",
    labels: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of label files with the images' relative names.")
    ] = None,
    label_map: Annotated[
        str | None,
        typer.Option(
            metavar="A=B,...",
            help="Label values of the files to labels of the region, e.g. 1=liver,2=liver_tumor,255=0.",
        ),
    ] = None,
    organ_labels: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder of a second label file a case, with organs; the first one's tumours lie over them.",
        ),
    ] = None,
    organ_label_map: Annotated[
        str | None, typer.Option(metavar="A=B,...", help="As --label-map, for the files with organs.")
    ] = None,
    layout: Annotated[
        str,
        typer.Option(
            help="How the sources lie: folder, nnunet, msd (Decathlon), dicom (a tree of studies), csv (a manifest), or auto: by what is there."
        ),
    ] = "auto",
    absolute_paths: Annotated[
        bool,
        typer.Option("--absolute-paths", help="Let a manifest name files outside its own folder by absolute paths."),
    ] = False,
    annotated: Annotated[
        str,
        typer.Option(
            help="What labels hold: tumor, organ (no tumours labelled), or auto: tumor where a tumour voxel is found."
        ),
    ] = "auto",
    split: Annotated[str, typer.Option(help="Split to record for these volumes, e.g. train or test.")] = "",
    assume_orientation: Annotated[
        str | None,
        typer.Option(
            metavar="CODES", help="Axis codes, e.g. RAS or LPS, for files that do not state their orientation."
        ),
    ] = None,
    config: ConfigOption = None,
    assignments: SetOption = None,
    dry_run: Annotated[bool, typer.Option(help="Read headers only: list cases and sizes, write nothing.")] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Convert CT volumes (NIfTI, DICOM, NRRD, MHA) into a chunked Zarr store.

    A file that cannot be used is listed with the reason and the rest goes on (exit code 1). Run the same command again to go on after
    an interruption: what is committed is not redone.
    """
    from ftengine.config import Config
    from ftengine.errors import ConfigError
    from ftengine.store.convert import convert_cases
    from ftengine.volume.discover import parse_source
    from ftengine.volume.layouts.choose import find_cases

    chosen = Config.preset(region) if config is None else Config.from_file(config, default_preset=region)
    chosen = chosen.with_assignments(assignments or [])
    pairs = [parse_source(text) for text in sources]
    discovery = find_cases(
        [image for image, _ in pairs],
        layout=layout,
        dataset=dataset,
        labels=labels,
        organ_labels=organ_labels,
        pairs={image: label for image, label in pairs if label is not None},
        region_labels=chosen.region.labels,
        label_map=_parsed(label_map, chosen.region.labels, "--label-map"),
        organ_label_map=_parsed(organ_label_map, chosen.region.labels, "--organ-label-map"),
        absolute_paths=absolute_paths,
    )
    found = discovery.sources
    _print_discovery(discovery, quiet=quiet)
    if annotated not in ("auto", "tumor", "organ"):
        raise ConfigError(f"--annotated {annotated}: want auto, tumor or organ.")
    with progress("converting", len(found), quiet=quiet or as_json) as reporter:
        report = convert_cases(
            found,
            store,
            chosen.region,
            annotation=annotated,  # type: ignore[arg-type]  # checked above
            split=split,
            assume_orientation=assume_orientation,
            dry_run=dry_run,
            on_start=reporter.working_on,
            on_outcome=lambda o: reporter.advance(f"{o.status} {o.case} ({o.seconds:.1f} s)"),
        )
    if as_json:
        print_json(report.to_json())
    else:
        _print_report(report, quiet=quiet)
    raise typer.Exit(report.exit_code)


def _parsed(text: str | None, labels: dict[str, int], option: str) -> dict[int, int] | None:
    from ftengine.volume.label_maps import parse_label_map

    return None if text is None else parse_label_map(text, labels, option=option)


def _print_discovery(discovery: "Discovery", *, quiet: bool) -> None:
    """What was chosen and what was passed over, on stderr."""
    if quiet:
        return
    for note in discovery.notes:
        typer.echo(f"note: {note}", err=True)
    if discovery.ignored:
        reasons = Counter(reason for _, reason in discovery.ignored)
        typer.echo(
            "ignored: " + "; ".join(f"{count} x {reason}" for reason, count in sorted(reasons.items())), err=True
        )


def _print_report(report: "ConversionReport", *, quiet: bool) -> None:
    messages = stderr()
    for outcome in report.outcomes:
        for note in outcome.notes:
            if not quiet:
                messages.print(f"note: {outcome.case}: {note}", markup=False, highlight=False)
    for outcome in report.outcomes:
        if outcome.status == "failed":
            messages.print(f"failed: {outcome.case}: {outcome.reason}", markup=False, highlight=False, style="red")
    table = Table(title=f"{report.store} ({report.region})")
    for heading in ("case", "status", "voxels z y x", "MB", "s"):
        table.add_column(heading, justify="left" if heading in ("case", "status") else "right")
    shown = [o for o in report.outcomes if o.status != "skipped"]
    for outcome in shown[:40]:
        table.add_row(*_cells(outcome))
    console = stdout()
    if shown:
        console.print(table)
    if len(shown) > 40:
        console.print(f"... and {len(shown) - 40} more", highlight=False)
    counts = ", ".join(
        f"{report.count(s)} {s}" for s in ("converted", "planned", "skipped", "failed") if report.count(s)
    )
    size = sum(o.stored_bytes for o in report.outcomes) / 1e6
    what = "would be about (uncompressed)" if report.count("planned") else "written"
    console.print(f"{counts or 'nothing to do'}; {size:.1f} MB {what}", highlight=False)


def _cells(outcome: "CaseOutcome") -> tuple[str, ...]:
    from rich.markup import escape

    shape = "" if outcome.shape_zyx is None else " ".join(map(str, outcome.shape_zyx))
    size = f"{outcome.stored_bytes / 1e6:.2f}" if outcome.stored_bytes else ""
    return escape(outcome.case), outcome.status, shape, size, f"{outcome.seconds:.1f}"
