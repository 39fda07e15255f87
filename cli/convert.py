"""``ftengine convert``: files to a store."""

import re
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from ftengine.cli.console import ConfigOption, JsonOption, QuietOption, SetOption, print_json, progress, stderr, stdout

if TYPE_CHECKING:
    from ftengine.cli.console import Reporter
    from ftengine.config import Config
    from ftengine.store.case import CaseOutcome, ConvertOptions
    from ftengine.store.convert import ConversionReport, Resources
    from ftengine.volume.cases import Discovery, Source


def convert(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SRC...",
            help="Files, folders of files, or DICOM series folders; 'IMAGE=LABEL' pairs two files, 'IMAGE=-' takes no label.",
        ),
    ],
    store: Annotated[
        str,
        typer.Argument(
            metavar="STORE", help="Folder, s3://bucket/prefix or gs://bucket/prefix; made if it does not exist."
        ),
    ],
    region: Annotated[
        str, typer.Option(help="Preset whose grid and labels apply, e.g. abdomen, abdomen-liver, chest, demo.")
    ] = "abdomen",
    dataset: Annotated[
        str | None,
        typer.Option(help="Data set name, the first part of every case name (default: data, or the --source)."),
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="SRC is this data set of the registry: its file names and label map apply (ftengine datasets).",
        ),
    ] = None,
    registry: Annotated[
        Path | None, typer.Option(metavar="DIR", help="With --source: a folder of YAML files with data sets of yours.")
    ] = None,
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
    workers: Annotated[int, typer.Option(min=1, help="Processes of this machine that convert at the same time.")] = 1,
    dask: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS", help="Convert on a dask.distributed cluster: its scheduler's address, or local:N."
        ),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Run only as many cases at once as fit, e.g. 16GB (default: no limit)."),
    ] = None,
    unchanged: Annotated[
        str,
        typer.Option(
            help="What tells that a converted case is up to date: stat (name, size, time of its files) or hash."
        ),
    ] = "stat",
    dry_run: Annotated[
        bool,
        typer.Option(
            help="List cases and sizes from headers, and estimate disk and time from a sample; write nothing."
        ),
    ] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Convert CT volumes (NIfTI, DICOM, NRRD, MHA) into a chunked Zarr store.

    A file that cannot be used is listed with the reason, here and in STORE/failed.csv, and the rest goes on (exit code 1). Run the same
    command again to go on after an interruption: what is committed is not redone.
    """
    from dataclasses import replace

    from ftengine.config import Config
    from ftengine.datasets.check import find_dataset
    from ftengine.datasets.registry import load_registry
    from ftengine.errors import ConfigError
    from ftengine.store.case import ConvertOptions
    from ftengine.store.convert import Resources, convert_cases
    from ftengine.volume.discover import parse_source
    from ftengine.volume.layouts.choose import find_cases
    from ftengine.volume.pseudonyms import Pseudonyms, write_key
    from ftengine.volume.readers import ReadOptions

    chosen = Config.preset(region) if config is None else Config.from_file(config, default_preset=region)
    chosen = chosen.with_assignments(assignments or [])
    options = ConvertOptions(
        annotation=annotated,  # type: ignore[arg-type]  # convert_cases checks it
        split=split,
        reading=ReadOptions(assume_orientation, allow_gaps, nan, resample_labels),
        pseudonyms=None if pseudonymize is None else Pseudonyms(pseudonymize),
    )
    resources = Resources(workers, dask, None if memory is None else _parse_bytes(memory))
    if source is not None:
        if layout != "auto" or organ_labels is not None or organ_label_map is not None or len(sources) != 1:
            raise ConfigError(
                f"--source {source}: says itself how its one folder is laid out; want no --layout, no --organ-labels and one SRC."
            )
        found = find_dataset(
            Path(sources[0]), load_registry(registry).get(source), labels=labels, region=chosen.region, dataset=dataset
        )
        given = _parsed(label_map, chosen.region.labels, "--label-map")
        options = replace(options, label_map=tuple((given or {}).items()))
    else:
        pairs = [parse_source(text) for text in sources]
        discovery = find_cases(
            [image for image, _ in pairs],
            layout=layout,
            dataset=dataset or "data",
            labels=labels,
            organ_labels=organ_labels,
            pairs={image: label for image, label in pairs if label is not None},
            region_labels=chosen.region.labels,
            label_map=_parsed(label_map, chosen.region.labels, "--label-map"),
            organ_label_map=_parsed(organ_label_map, chosen.region.labels, "--organ-label-map"),
            absolute_paths=absolute_paths,
        )
        found = list(discovery.sources)
        _print_discovery(discovery, quiet=quiet)
    key = {} if options.pseudonyms is None else options.pseudonyms.key(source.case for source in found)
    if pseudonym_key is not None:
        write_key(pseudonym_key, key, Path(store))
    if dry_run:
        _plan(found, store, chosen, options, resources, as_json=as_json, quiet=quiet)
    with progress("converting", len(found), quiet=quiet or as_json) as reporter:
        tally = _Tally(reporter)
        report = convert_cases(
            found,
            store,
            chosen.region,
            options=options,
            resources=resources,
            unchanged=unchanged,  # type: ignore[arg-type]  # convert_cases checks it
            on_start=reporter.working_on,
            on_outcome=tally.add,
        )
    if as_json:
        print_json(report.to_json() | ({"pseudonyms": key} if key else {}))
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


class _Tally:
    """What the progress display says: rate, bytes, failures so far."""

    def __init__(self, reporter: "Reporter") -> None:
        self._reporter = reporter
        self._started = time.monotonic()
        self._converted = self._failed = self._read = self._written = 0

    def add(self, outcome: "CaseOutcome") -> None:
        self._converted += outcome.status == "converted"
        self._failed += outcome.status == "failed"
        self._read += outcome.source_bytes
        self._written += outcome.stored_bytes
        rate = self._converted / max(1e-3, time.monotonic() - self._started)
        self._reporter.figures(
            f"{rate * 60:.1f} volumes/min, {self._read / 1e6:,.0f} MB read, {self._written / 1e6:,.0f} MB written, {self._failed} failed"
        )
        self._reporter.advance(f"{outcome.status} {outcome.case} ({outcome.seconds:.1f} s)")


def _plan(
    found: "Sequence[Source]",
    store: str,
    config: "Config",
    options: "ConvertOptions",
    resources: "Resources",
    *,
    as_json: bool,
    quiet: bool,
) -> None:
    """Print what a conversion would do, and leave with its exit code."""
    from ftengine.store.convert import ConversionReport
    from ftengine.store.estimate import estimate, plan_case

    report = ConversionReport(store, config.region.name)
    with progress("reading headers", len(found), quiet=quiet or as_json) as reporter:
        for source in found:
            report.outcomes.append(plan_case(source, config.region, options))
            reporter.advance()
        reporter.working_on("converting a sample")
        sampled = estimate(found, report.outcomes, config.region, options)
    hours = None if sampled.seconds_of_one_worker is None else sampled.seconds_of_one_worker / resources.workers / 3600
    if as_json:
        figures = {"sampled": sampled.sampled, "store_bytes": sampled.store_bytes, "hours": hours}
        print_json({**report.to_json(), "estimate": figures})
    else:
        _print_report(report, quiet=quiet)
        if hours is not None and sampled.store_bytes is not None:
            stdout().print(
                f"estimated from {sampled.sampled} converted cases: {sampled.store_bytes / 1e6:,.1f} MB on disk, "
                f"{hours:.2f} h with {resources.workers} worker(s) like this machine's",
                highlight=False,
            )
    raise typer.Exit(report.exit_code)


def _parse_bytes(text: str) -> int:
    from ftengine.errors import ConfigError

    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?B?)", text.strip().upper())
    if match is None or match[2] not in units or float(match[1]) <= 0:
        raise ConfigError(f"--memory {text}: want a size such as 16GB or 800MB.")
    return int(float(match[1]) * units[match[2]])


def _print_report(report: "ConversionReport", *, quiet: bool) -> None:
    messages = stderr()
    for outcome in report.outcomes:
        for note in outcome.notes:
            if not quiet:
                messages.print(f"note: {outcome.case}: {note}", markup=False, highlight=False)
    for outcome in report.outcomes:
        if outcome.status == "failed":
            text = f"failed: {outcome.case} [{outcome.code}]: {outcome.reason} {outcome.advice}".rstrip()
            messages.print(text, markup=False, highlight=False, style="red")
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
