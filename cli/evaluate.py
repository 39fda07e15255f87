"""``ftengine evaluate`` and ``ftengine compare``: how well predictions agree with the truth, and runs side by side."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from ftengine.cli.console import (
    ConfigOption,
    JsonOption,
    QuietOption,
    Reporter,
    SplitOption,
    print_json,
    progress,
    stdout,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from ftengine.config import EvaluationConfig
    from ftengine.evaluation.compare import ClassTest
    from ftengine.evaluation.evaluate import Evaluation
    from ftengine.evaluation.metrics import CaseScore
    from ftengine.evaluation.tables import ResultTable

MarkdownOption = Annotated[
    Path | None, typer.Option("--markdown", metavar="FILE", help="Write the tables as Markdown.")
]
LatexOption = Annotated[Path | None, typer.Option("--latex", metavar="FILE", help="Write the tables as LaTeX.")]
_SHOWN_UNPAIRED = 10


def evaluate(
    predicted: Annotated[
        Path, typer.Argument(metavar="PRED|CKPT", help="A file or folder of predictions, or a checkpoint.")
    ],
    truth: Annotated[str, typer.Argument(metavar="TRUTH|STORE", help="A file or folder of true labels, or a store.")],
    region: Annotated[
        str, typer.Option(help="Preset whose labels the files have, e.g. abdomen, abdomen-liver, chest.")
    ] = "abdomen",
    config: ConfigOption = None,
    split: SplitOption = None,
    fold: Annotated[int | None, typer.Option(metavar="K", help="Score only volumes of this fold of a store.")] = None,
    overlap: Annotated[float | None, typer.Option(help="Overlap of the windows for a checkpoint.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    label_map: Annotated[
        str | None,
        typer.Option(
            "--label-map", metavar="V=LABEL,...", help="Values of the true files, e.g. 1=liver,2=liver_tumor."
        ),
    ] = None,
    predicted_label_map: Annotated[
        str | None,
        typer.Option("--predicted-label-map", metavar="V=LABEL,...", help="The same for the files of predictions."),
    ] = None,
    tolerance: Annotated[
        float | None, typer.Option(metavar="MM", help="Tolerance of the normalised surface Dice (default: 2).")
    ] = None,
    surface: Annotated[
        str | None,
        typer.Option(help="elements (default, as surface-distance) or voxels (as MONAI), for HD95 and surface Dice."),
    ] = None,
    match: Annotated[
        str | None, typer.Option(help="When a lesion is found: any (default: any overlap), overlap or iou.")
    ] = None,
    match_fraction: Annotated[
        float | None, typer.Option(metavar="F", help="Least share of voxels, or IoU, of --match overlap and iou (0.5).")
    ] = None,
    connectivity: Annotated[
        int | None, typer.Option(help="Neighbours of a lesion's voxels: 26 (default), 18 or 6.")
    ] = None,
    diameter: Annotated[
        str | None, typer.Option(help="axial (default, WHO), 3d or equivalent (ball of the same volume).")
    ] = None,
    small: Annotated[
        float | None, typer.Option(metavar="MM", help="Lesions of a smaller diameter are small (default: 20).")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes that read and score at the same time.")] = 1,
    csv_file: Annotated[
        Path | None, typer.Option("--csv", metavar="FILE", help="Write one line per case and class.")
    ] = None,
    markdown: MarkdownOption = None,
    latex: LatexOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Score predictions against true labels: Dice, HD95 and surface Dice per class, detection by volume and by lesion.

    Every definition: docs/evaluation.md. Runs side by side: ftengine compare.
    """
    from ftengine.evaluation.evaluate import cases_csv
    from ftengine.files import write_text_whole

    _check_writable(csv_file, markdown, latex)
    chosen = {
        "tolerance_mm": tolerance,
        "surface": surface,
        "match": match,
        "match_fraction": match_fraction,
        "connectivity": connectivity,
        "diameter": diameter,
        "small_mm": small,
    }
    settings = {key: value for key, value in chosen.items() if value is not None}
    is_store = "://" in truth or (Path(truth) / "zarr.json").exists()
    with progress("scoring", 0, quiet=quiet or as_json) as reporter:
        if is_store:
            _refuse_for_a_store(config, label_map, predicted_label_map)
            result = _on_store(
                predicted, truth, settings, reporter, split=split, fold=fold, overlap=overlap, device=device, workers=workers
            )  # fmt: skip
        else:
            _refuse_for_files(truth, {"--split": split, "--fold": fold, "--overlap": overlap})
            result = _on_files(
                predicted, Path(truth), region, config, settings, reporter, (label_map, predicted_label_map), workers
            )
    if as_json:
        print_json(result.to_json())
    elif result.cases:
        _print_evaluation(result)
    if csv_file is not None:
        write_text_whole(csv_file, cases_csv(result))
    if result.cases and (markdown is not None or latex is not None):
        from ftengine.evaluation.compare import result_tables

        _write_tables(result_tables({predicted.name: [result]}), markdown, latex)
    _print_left_out(result, quiet=quiet)
    raise typer.Exit(result.exit_code)


def compare(
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="METHOD=FILE...",
            help="What 'ftengine evaluate --json' printed; the same METHOD again for each fold. The first is the reference.",
        ),
    ],
    markdown: MarkdownOption = None,
    latex: LatexOption = None,
    csv_file: Annotated[Path | None, typer.Option("--csv", metavar="FILE", help="Write the tables as CSV.")] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Evaluations side by side: tables with the mean, worst and best fold, and paired two-sided tests against the first method."""
    from ftengine.evaluation.compare import compare as compare_methods
    from ftengine.evaluation.evaluate import load_evaluation

    _check_writable(csv_file, markdown, latex)
    methods: dict[str, list[Any]] = {}
    for text in files:
        method, equals, path = text.partition("=")
        if not equals or Path(text).exists():
            method, path = Path(text).stem, text
        methods.setdefault(method, []).append(load_evaluation(Path(path)))
    comparison = compare_methods(methods)
    if as_json:
        print_json(comparison.to_json())
    else:
        for table in comparison.tables:
            stdout().print(table.to_rich())
        if comparison.tests:
            _print_tests(comparison.tests)
    _write_tables(comparison.tables, markdown, latex, csv_file)
    if not quiet:
        for sides in comparison.unpaired.values():
            for side, cases in sides.items():
                if cases:
                    more = f" and {len(cases) - _SHOWN_UNPAIRED} more" if len(cases) > _SHOWN_UNPAIRED else ""
                    typer.echo(f"not tested, {side}: {', '.join(cases[:_SHOWN_UNPAIRED])}{more}", err=True)


def _on_store(
    checkpoint: Path,
    store: str,
    settings: dict[str, Any],
    reporter: Reporter,
    *,
    split: str | None,
    fold: int | None,
    overlap: float | None,
    device: str,
    workers: int,
) -> "Evaluation":
    from ftengine.assemble import resolve_device
    from ftengine.evaluation.evaluate import evaluate_checkpoint
    from ftengine.store.reader import open_store

    return evaluate_checkpoint(
        checkpoint,
        open_store(store),
        device=resolve_device(device),
        split=split,
        fold=fold,
        overlap=overlap,
        settings=settings,
        workers=workers,
        on_start=reporter.begin,
        on_case=lambda score: reporter.advance(_line(score)),
    )


def _on_files(
    predicted: Path,
    truth: Path,
    region: str,
    config: Path | None,
    settings: dict[str, Any],
    reporter: Reporter,
    maps: tuple[str | None, str | None],
    workers: int,
) -> "Evaluation":
    from ftengine.config import Config
    from ftengine.evaluation.evaluate import evaluate_folders
    from ftengine.volume.label_maps import parse_label_map

    chosen = Config.preset(region) if config is None else Config.from_file(config, default_preset=region)
    chosen = chosen.with_overrides({f"evaluation.{key}": value for key, value in settings.items()})
    of_truth, of_predicted = (
        {} if text is None else parse_label_map(text, chosen.region.labels, option=option)
        for text, option in zip(maps, ("--label-map", "--predicted-label-map"), strict=True)
    )
    return evaluate_folders(
        predicted,
        truth,
        chosen.region,
        chosen.evaluation,
        label_map=of_truth,
        predicted_map=of_predicted,
        workers=workers,
        on_start=reporter.begin,
        on_case=lambda score: reporter.advance(_line(score)),
        on_failed=lambda case, _error: reporter.advance(f"{case}: failed"),
    )


def _refuse_for_a_store(config: Path | None, *maps: str | None) -> None:
    from ftengine.errors import ConfigError

    if config is not None or any(m is not None for m in maps):
        raise ConfigError(
            "--config, --label-map and --predicted-label-map are for label files; a checkpoint brings its own. Leave them out."
        )


def _refuse_for_files(truth: str, options: "Mapping[str, object]") -> None:
    from ftengine.errors import ConfigError

    given = [option for option, value in options.items() if value is not None]
    if given:
        raise ConfigError(
            f"{', '.join(given)}: for a checkpoint on a store; {truth} is no store but label files, all of which are scored. Leave it out."
        )


def _line(score: "CaseScore") -> str:
    figures = ", ".join(f"{n} {c.dice:.3f}" for n, c in score.classes.items() if c.truth_voxels and c.dice is not None)
    return f"{score.case}: {figures or 'nothing in the truth'}"


def _print_evaluation(result: "Evaluation") -> None:
    from ftengine.evaluation.metrics import summarize

    settings = result.settings
    summary = summarize(result.cases, settings)
    table = Table("class", "volumes", "Dice", "HD95 mm", f"NSD {settings.tolerance_mm:g} mm")
    for name, row in summary.items():
        figures = (_with_interval(row, key) for key in ("dice", "hd95_mm", "surface_dice"))
        table.add_row(escape(name), str(row["num_volumes_with_truth"]), *figures)
    stdout().print(table)
    table = Table("detection by volume", "sensitivity", "specificity", "precision", "F1", "tp/fp/tn/fn")
    tumors = {name: row for name, row in summary.items() if row["lesions"] is not None}
    if not tumors:
        return
    for name, row in tumors.items():
        figures = (_with_interval(row, key) for key in ("sensitivity", "specificity", "precision", "f1"))
        table.add_row(escape(name), *figures, "/".join(str(row[k]) for k in ("tp", "fp", "tn", "fn")))
    stdout().print(table)
    _print_lesions(tumors, settings)


def _print_lesions(tumors: dict[str, dict[str, Any]], settings: "EvaluationConfig") -> None:
    small = f"d < {settings.small_mm / 10:g} cm"
    table = Table(
        "detection by lesion",
        "found",
        "sensitivity",
        f"found, {small}",
        f"sensitivity, {small}",
        "false pos./volume",
        "F1",
    )
    for name, row in tumors.items():
        lesions = row["lesions"]
        sizes = lesions["by_size"]["small"]
        table.add_row(
            escape(name),
            f"{lesions['num_found']}/{lesions['num_truth']}",
            _with_interval(lesions, "sensitivity"),
            f"{sizes['num_found']}/{sizes['num_truth']}",
            _with_interval(sizes, "sensitivity"),
            _figure(lesions["false_positives_per_volume"]),
            _figure(lesions["f1"]),
        )
    stdout().print(table)


def _print_left_out(result: "Evaluation", *, quiet: bool) -> None:
    if result.num_left_out and not quiet:
        typer.echo(
            f"left out: {result.num_left_out} volumes with organ labels only, whose tumours nobody annotated; if they are healthy, convert them "
            "with --annotated tumor, so that false positives in them count.",
            err=True,
        )
    if not quiet:
        for case in result.without_truth:
            typer.echo(f"not scored, a prediction without a truth: {case}", err=True)
    for case, reason in result.failed.items():
        typer.echo(f"failed: {case}: {reason}", err=True)


def _print_tests(tests: "Iterable[ClassTest]") -> None:
    table = Table("method - reference", "class", "measure", "pairs", "difference", "t-test p", "Wilcoxon p")
    for t in tests:
        interval = t.tests.interval
        low_high = "" if interval is None or interval.low is None else f" ({interval.low:+.3f}, {interval.high:+.3f})"
        difference = "-" if t.tests.mean_difference is None else f"{t.tests.mean_difference:+.3f}{low_high}"
        p_values = ("-" if p is None else f"{p:.2g}" for p in (t.tests.t_pvalue, t.tests.wilcoxon_pvalue))
        names = (escape(text) for text in (f"{t.method} - {t.reference}", t.class_name, t.measure))
        table.add_row(*names, str(t.tests.num_pairs), difference, *p_values)
    stdout().print(table)


def _write_tables(
    tables: "tuple[ResultTable, ...]", markdown: Path | None, latex: Path | None, csv_file: Path | None = None
) -> None:
    from ftengine.evaluation.tables import csv_document
    from ftengine.files import write_text_whole

    if markdown is not None:
        write_text_whole(markdown, "\n".join(t.to_markdown() for t in tables))
    if latex is not None:
        write_text_whole(latex, "\n".join(t.to_latex() for t in tables))
    if csv_file is not None:
        write_text_whole(csv_file, csv_document(tables))


def _check_writable(*files: Path | None) -> None:
    """Make the files' folders before the work starts. Raises ConfigError where a file could not be written at the end."""
    from ftengine.errors import ConfigError

    for file in files:
        if file is None:
            continue
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"{file}: its folder cannot be made ({error.strerror}). Choose another name.") from error
        if file.is_dir() or not os.access(file.parent, os.W_OK):
            raise ConfigError(f"{file}: is a folder, or lies in one without write permission; want a file's name.")


def _with_interval(row: dict[str, Any], key: str) -> str:
    interval = row[f"{key}_interval"]
    return _figure(row[key]) + ("" if interval is None else f" ({interval[0]:.3f}, {interval[1]:.3f})")


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
