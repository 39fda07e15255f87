"""``ftengine convert``: files to a store."""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from ftengine.cli.console import ConfigOption, JsonOption, QuietOption, SetOption, print_json, progress, stderr, stdout

if TYPE_CHECKING:
    from ftengine.store.convert import CaseOutcome, ConversionReport


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
        typer.Option(metavar="A=B,...", help="Label values of the files to values of the region, e.g. 1=1,3=1."),
    ] = None,
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
    allow_gaps: Annotated[
        bool, typer.Option(help="Fill missing or unevenly spaced DICOM slices linearly from their neighbours; noted.")
    ] = False,
    nan: Annotated[
        float | None, typer.Option(metavar="HU", help="HU in place of NaN and infinity, e.g. -1024 for air; noted.")
    ] = None,
    resample_labels: Annotated[
        bool, typer.Option(help="Bring labels on another grid to their image's by nearest neighbour; noted.")
    ] = False,
    pseudonymize: Annotated[
        str | None,
        typer.Option(metavar="SALT", help="Replace case and file names by keyed hashes; the same salt gives the same."),
    ] = None,
    pseudonym_key: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write which name stands for which case (JSON), outside the store."),
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
    from ftengine.volume.discover import discover_all, parse_source
    from ftengine.volume.pseudonyms import Pseudonyms, write_key
    from ftengine.volume.readers import ReadOptions

    chosen = Config.preset(region) if config is None else Config.from_file(config, default_preset=region)
    chosen = chosen.with_assignments(assignments or [])
    pairs = [parse_source(text) for text in sources]
    label_of = {image: label for image, label in pairs if label is not None}
    discovery = discover_all([image for image, _ in pairs], labels=labels, dataset=dataset, pairs=label_of)
    found = discovery.sources
    if discovery.ignored and not (quiet or as_json):
        reasons = Counter(reason for _, reason in discovery.ignored)
        typer.echo(
            "ignored: " + "; ".join(f"{count} x {reason}" for reason, count in sorted(reasons.items())), err=True
        )
    if annotated not in ("auto", "tumor", "organ"):
        raise ConfigError(f"--annotated {annotated}: want auto, tumor or organ.")
    reading = ReadOptions(assume_orientation, allow_gaps, nan, resample_labels)
    pseudonyms = None if pseudonymize is None else Pseudonyms(pseudonymize)
    key = {} if pseudonyms is None else pseudonyms.key(source.case for source in found)
    if pseudonym_key is not None:
        write_key(pseudonym_key, key, Path(store))
    with progress("converting", len(found), quiet=quiet or as_json) as reporter:
        report = convert_cases(
            found,
            store,
            chosen.region,
            annotation=annotated,  # type: ignore[arg-type]  # checked above
            split=split,
            label_map=_parse_label_map(label_map),
            reading=reading,
            pseudonyms=pseudonyms,
            dry_run=dry_run,
            on_start=reporter.working_on,
            on_outcome=lambda o: reporter.advance(f"{o.status} {o.case} ({o.seconds:.1f} s)"),
        )
    if as_json:
        print_json(report.to_json() | ({"pseudonyms": key} if key else {}))
    else:
        _print_report(report, quiet=quiet)
    raise typer.Exit(report.exit_code)


def _parse_label_map(text: str | None) -> dict[int, int] | None:
    from ftengine.errors import ConfigError

    if text is None:
        return None
    try:
        return {int(a): int(b) for a, b in (pair.split("=") for pair in text.split(","))}
    except ValueError as error:
        raise ConfigError(f"--label-map {text}: want pairs of whole numbers such as 1=1,3=1.") from error


def _print_report(report: "ConversionReport", *, quiet: bool) -> None:
    messages = stderr()
    for outcome in report.outcomes:
        for note in outcome.notes:
            if not quiet:
                messages.print(f"note: {outcome.case}: {note}", markup=False, highlight=False)
    for outcome in report.outcomes:
        if outcome.status == "failed":
            messages.print(
                f"failed: {outcome.case}: {outcome.reason} {outcome.advice} [{outcome.code}]",
                markup=False,
                highlight=False,
                style="red",
            )
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
