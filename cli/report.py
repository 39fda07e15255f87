"""``ftengine report``: one HTML file on runs and evaluations."""

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ftengine.cli.console import ConfigOption, QuietOption, SetOption, SplitOption, progress
from ftengine.cli.preview import WindowOption

if TYPE_CHECKING:
    import torch

    from ftengine.report.cases import Predict
    from ftengine.report.scores import Scores
    from ftengine.store.reader import Store


def report(
    runs: Annotated[
        list[Path] | None, typer.Argument(metavar="[RUN]...", help="Folders that 'ftengine train' wrote.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The HTML file.")] = Path("report.html"),
    title: Annotated[str, typer.Option(help="Heading of the report.")] = "Training and evaluation",
    evaluation: Annotated[
        list[Path] | None,
        typer.Option(
            "--evaluation",
            metavar="FILE.json",
            help="What 'ftengine evaluate --json' printed; the first is compared with.",
        ),
    ] = None,
    store: Annotated[
        str | None, typer.Option("--store", metavar="STORE", help="Where the pictures are cut from.")
    ] = None,
    checkpoint: Annotated[
        list[Path] | None,
        typer.Option("--checkpoint", metavar="CKPT", help="Draw its predictions of the worst and best cases."),
    ] = None,
    predictions: Annotated[
        list[Path] | None,
        typer.Option("--predictions", metavar="DIR", help="Draw these predictions in place of a checkpoint's."),
    ] = None,
    split: SplitOption = None,
    num_cases: Annotated[int, typer.Option("--cases", min=0, help="How many worst and how many best cases.")] = 3,
    synth: Annotated[
        Path | None, typer.Option("--synth", metavar="G.pt", help="Generator whose painted tumours are drawn.")
    ] = None,
    judge: Annotated[
        Path | None, typer.Option("--judge", metavar="S.pt", help="Segmenter that judges them; draws them, too.")
    ] = None,
    num_painted: Annotated[int, typer.Option("--painted", min=1, help="How many painted patches.")] = 12,
    calibration: Annotated[
        Path | None, typer.Option("--calibration", metavar="FILE.json", help="Of 'ftengine qc calibrate'.")
    ] = None,
    window: WindowOption = "region",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    config: ConfigOption = None,
    assignments: SetOption = None,
    quiet: QuietOption = False,
) -> None:
    """Write one self-contained HTML file: curves, quality control, Dice of every case, worst and best cases, speed, configuration."""
    from ftengine import __version__
    from ftengine.assemble import build_bank, check_region, load_painters, resolve_device
    from ftengine.cli.console import load_config
    from ftengine.errors import ConfigError
    from ftengine.pictures.hu_windows import WindowChoice
    from ftengine.pictures.samples import painted_samples
    from ftengine.pictures.sheets import Tile
    from ftengine.quality.calibrate import read_calibration
    from ftengine.report.cases import case_figures
    from ftengine.report.data import ReportData
    from ftengine.report.figures import PaintedFigure, painted_figures
    from ftengine.report.report import write_report
    from ftengine.report.run_folder import distinct_names, read_runs
    from ftengine.report.scores import read_scores, tumor_classes, worst_and_best
    from ftengine.store.reader import open_store
    from ftengine.training.checkpoint import load_segmenter

    choice = WindowChoice(window)
    files = evaluation or []
    scores = [read_scores(file, name) for file, name in zip(files, distinct_names(files), strict=True)]
    for given in (files, checkpoint or [], predictions or []):
        if len({path.resolve() for path in given}) < len(given):
            raise ConfigError(f"{', '.join(map(str, given))}: one is given twice; it cannot be compared with itself.")
    read = read_runs(runs or [])
    if not (read or scores or store):
        raise ConfigError("nothing to report on: give folders of runs, --evaluation FILE.json or --store STORE.")
    if store is None and (checkpoint or predictions or synth or judge):
        raise ConfigError(
            "--checkpoint, --predictions, --synth and --judge draw volumes of a store: give --store STORE."
        )
    if num_cases and checkpoint and predictions:
        raise ConfigError("--checkpoint and --predictions: give one of them.")
    given_calibration = None if calibration is None else read_calibration(calibration)
    cases: list[str] = []
    notes: list[str] = []
    tiles: list[Tile] = []
    painted: list[PaintedFigure] = []
    with progress("drawing", 0, quiet=quiet) as reporter:
        if store is not None:
            opened = open_store(store)
            chosen = load_config(config, assignments, opened)
            check_region(chosen, opened)
            organs = list(chosen.region.organs)
            named = _predictors(opened, checkpoint or [], predictions or [], resolve_device(device))
            if named and not scores:
                reporter.note("scoring: no --evaluation was given")
                scores = _scored(opened, named, checkpoint or [], split, resolve_device(device))
            if named and len(scores) != len(named):
                raise ConfigError(
                    f"{len(scores)} evaluations and {len(named)} predictions: want one --evaluation for each, in the same order, or none."
                )
            if named and num_cases:
                classes = tumor_classes(scores[-1].classes)
                by_name = {s.name: predict for s, (_, predict) in zip(scores, named, strict=True)}
                picked = worst_and_best(scores[-1], classes, num_cases)
                shown = choice.of(chosen.region, organs[0] if len(organs) == 1 else None)
                cases, notes = case_figures(opened, picked, by_name, {s.name: s for s in scores}, classes, shown)
            if synth is not None or judge is not None:
                generator, quality = load_painters(chosen, synth, judge)
                samples = painted_samples(
                    chosen,
                    opened,
                    num_patches=num_painted,
                    generator=generator,
                    judge=quality,
                    segmenter=None if judge is None else load_segmenter(judge)[0],
                    bank=build_bank(chosen, opened, split=split),
                    split=split,
                )
                tiles, painted = painted_figures(chosen, samples, choice, num_figures=len(chosen.synthesis.sizes))
    data = ReportData(
        title=title,
        runs=read,
        evaluations=scores,
        cases=cases,
        case_notes=notes,
        tiles=tiles,
        painted=painted,
        calibration=given_calibration,
        created=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, ftengine {__version__}",
    )
    write_report(out, data)
    typer.echo(out)


def _predictors(
    store: "Store", checkpoints: list[Path], folders: list[Path], device: "torch.device"
) -> "list[tuple[str, Predict]]":
    """(name, what gives the prediction of a case) of each checkpoint or folder."""
    from ftengine.prediction.infer import check_trained_for, predict_volume
    from ftengine.report.cases import predictions_in
    from ftengine.report.run_folder import distinct_names
    from ftengine.training.checkpoint import load_segmenter

    def of_checkpoint(path: Path) -> "Predict":
        network, config = load_segmenter(path)
        check_trained_for(store, config, path)
        return lambda _case, image: predict_volume(network, image, config, device)

    predictors = [*map(of_checkpoint, checkpoints), *(predictions_in(folder, store) for folder in folders)]
    return list(zip(distinct_names([*checkpoints, *folders]), predictors, strict=True))


def _scored(
    store: "Store",
    named: "list[tuple[str, Predict]]",
    checkpoints: list[Path],
    split: str | None,
    device: "torch.device",
) -> "list[Scores]":
    """Evaluations of the annotated volumes, for predictions that none was given of."""
    from ftengine.evaluation.evaluate import evaluate_checkpoint
    from ftengine.report.cases import score_predictions
    from ftengine.report.scores import scores_of
    from ftengine.store.folds import cases_of_kind

    if checkpoints:
        results = [evaluate_checkpoint(path, store, device=device, split=split) for path in checkpoints]
    else:
        cases = cases_of_kind(store, "tumor", split, None)
        results = [score_predictions(predict, store, cases) for _, predict in named]
    return [scores_of(name, result.to_json()) for (name, _), result in zip(named, results, strict=True)]
