"""``ftengine evaluate``: Dice and detection."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from ftengine.cli.console import ConfigOption, JsonOption, QuietOption, SplitOption, print_json, stdout

if TYPE_CHECKING:
    from ftengine.evaluation.evaluate import Evaluation


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
    csv_file: Annotated[
        Path | None, typer.Option("--csv", metavar="FILE", help="Write one line per case and class.")
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Score predictions against true labels: Dice per class (Eq. 9) and volume-level detection (Eq. 7, 10, 11)."""
    from ftengine.assemble import resolve_device
    from ftengine.config import Config
    from ftengine.evaluation.evaluate import evaluate_checkpoint, evaluate_folders
    from ftengine.evaluation.metrics import CaseScore
    from ftengine.store.reader import open_store

    def show(score: CaseScore) -> None:
        if not (quiet or as_json):
            figures = ", ".join(f"{n} {c.dice:.3f}" for n, c in score.classes.items() if c.truth_voxels)
            typer.echo(f"{score.case}: {figures or 'nothing in the truth'}", err=True)

    if "://" in truth or (Path(truth) / "zarr.json").exists():
        result = evaluate_checkpoint(
            predicted,
            open_store(truth),
            device=resolve_device(device),
            split=split,
            fold=fold,
            overlap=overlap,
            on_case=show,
        )
    else:
        chosen = Config.preset(region) if config is None else Config.from_file(config, default_preset=region)
        result = evaluate_folders(predicted, Path(truth), chosen.region, on_case=show)
    if as_json:
        print_json(result.to_json())
    else:
        _print(result)
    if csv_file is not None:
        from ftengine.evaluation.evaluate import write_csv

        write_csv(result, csv_file)
    raise typer.Exit(result.exit_code)


def _print(result: "Evaluation") -> None:
    from ftengine.evaluation.metrics import summarize

    table = Table("class", "Dice", "volumes", "sensitivity", "specificity", "precision", "F1", "tp/fp/tn/fn")
    for name, row in summarize(result.cases).items():
        figures = (row[k] for k in ("sensitivity", "specificity", "precision", "f1"))
        counts = "/".join(str(row[k]) for k in ("tp", "fp", "tn", "fn"))
        table.add_row(
            name, _figure(row["dice"]), str(row["num_volumes_with_truth"]), *(_figure(f) for f in figures), counts
        )
    stdout().print(table)
    if result.num_left_out:
        typer.echo(
            f"left out: {result.num_left_out} volumes with organ labels only, whose tumours nobody annotated; if they are healthy, convert them "
            "with --annotated tumor, so that false positives in them count.",
            err=True,
        )
    for case, reason in result.failed.items():
        typer.echo(f"failed: {case}: {reason}", err=True)


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
