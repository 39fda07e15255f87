"""``ftengine predict``: label maps for CT files and for the volumes of a store."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from ftengine.cli.console import JsonOption, QuietOption, SplitOption, print_json, progress, stdout

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ftengine.config import Config
    from ftengine.prediction.predict import Outcome


def predict(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="A segmenter that 'ftengine train seg' wrote.")],
    places: Annotated[
        list[str],
        typer.Argument(metavar="CT...", help="Files, folders, DICOM series folders, as for convert; or stores."),
    ],
    out: Annotated[
        Path,
        typer.Option("--out", metavar="DIR", help="Folder for the label maps, one a case, each in its own geometry."),
    ],
    file_format: Annotated[
        str,
        typer.Option(
            "--format", help="nifti, or dicom-seg for DICOM inputs (extra dicom-seg; holds the patient's identity)."
        ),
    ] = "nifti",
    grid: Annotated[
        str,
        typer.Option(
            help="native: the grid of the input, or of the file a store was made from; store: the checkpoint's, RAS+."
        ),
    ] = "native",
    probabilities: Annotated[
        bool, typer.Option("--probabilities", help="Also write NAME_probabilities/, a NIfTI file (float32) a class.")
    ] = False,
    tta: Annotated[
        str | None,
        typer.Option(
            "--tta",
            metavar="AXES",
            help="Mirror over these axes, e.g. x or zyx: mean of the probabilities of all flips.",
        ),
    ] = None,
    overlap: Annotated[
        float | None, typer.Option(help="Overlap of the windows, 0 to 0.95 (default: the checkpoint's).")
    ] = None,
    weighting: Annotated[
        str | None, typer.Option(help="Weights of a window's voxels: constant or gaussian (default: the checkpoint's).")
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            help="auto, fp32, bf16 or fp16; auto: what it was trained in on a GPU, else fp32 (default: the checkpoint's)."
        ),
    ] = None,
    windows_per_call: Annotated[
        int | None,
        typer.Option(min=1, help="Windows evaluated at a time: fewer take less memory (default: the checkpoint's)."),
    ] = None,
    skip_air: Annotated[
        bool,
        typer.Option(
            "--skip-air", help="Leave out windows without body: faster, and not quite the same near the skin."
        ),
    ] = False,
    split: SplitOption = None,
    fold: Annotated[int | None, typer.Option(metavar="K", help="Only volumes of this fold of a store.")] = None,
    layout: Annotated[
        str, typer.Option(help="How the files lie: folder, nnunet, msd, dicom, csv, or auto; as for convert.")
    ] = "auto",
    assume_orientation: Annotated[
        str | None,
        typer.Option(metavar="CODES", help="Axis codes, e.g. RAS, for files that do not state their orientation."),
    ] = None,
    allow_gaps: Annotated[bool, typer.Option(help="Fill missing DICOM slices linearly from their neighbours.")] = False,
    nan: Annotated[float | None, typer.Option(metavar="HU", help="HU in place of NaN and infinity.")] = None,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Predict again what is complete; replace files that something else wrote."),
    ] = False,
    device: Annotated[
        str, typer.Option(help="auto, cpu, cuda or cuda:N; with torchrun each process takes its own GPU.")
    ] = "auto",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Predict CT; each result is a label map on the grid of its input, committed whole.

    A case that cannot be predicted is listed with the reason and the rest goes on (exit code 1). Run the same command again to go on after
    an interruption: cases that are complete, of the same checkpoint, settings and voxels, are not predicted again.
    """
    from datetime import timedelta

    from ftengine.assemble import resolve_device
    from ftengine.prediction.inputs import find_inputs
    from ftengine.prediction.predict import Model, PredictOptions, predict_cases
    from ftengine.training.checkpoint import load_segmenter
    from ftengine.training.distributed import device_name_for, joined
    from ftengine.training.weight_files import sha256_of
    from ftengine.volume.readers import ReadOptions

    network, config = load_segmenter(checkpoint)
    given = {
        "overlap": overlap,
        "weighting": weighting,
        "precision": precision,
        "windows_per_call": windows_per_call,
        "mirror_axes": None if tta is None else tuple(tta),
        "skip_air": skip_air or None,
    }
    config = config.with_overrides({f"inference.{key}": value for key, value in given.items() if value is not None})
    reading = ReadOptions(assume_orientation, allow_gaps, nan)
    options = PredictOptions(grid, file_format, probabilities, overwrite, reading)  # type: ignore[arg-type]  # it checks them
    inputs = find_inputs(places, config, checkpoint, layout=layout, split=split, fold=fold, reading=reading, out=out)
    with joined(patience=timedelta(days=7)) as world:
        model = Model(network, config, sha256_of(checkpoint), resolve_device(device_name_for(device, world)))
        mine = len(inputs[world.rank :: world.size])
        with progress("predicting", mine, quiet=quiet or as_json or not world.is_main) as reporter:

            def show(outcome: "Outcome") -> None:
                for warning in outcome.warnings:
                    reporter.warn(warning)
                reporter.advance(f"{outcome.status} {outcome.case}" + (f": {outcome.reason}" if outcome.reason else ""))

            outcomes = predict_cases(
                inputs,
                model,
                out,
                options,
                world=world,
                on_start=reporter.working_on,
                on_windows=lambda done, total: reporter.parts("windows", done, total),
                on_outcome=show,
            )
        if world.is_main:
            _report(outcomes, config, as_json=as_json)
        world.gather(None)  # torchrun ends all processes when one fails: none ends before the report is out
    if not world.is_main:
        return
    failed = sum(o.status == "failed" for o in outcomes)
    raise typer.Exit(0 if not failed else 1 if failed < len(outcomes) else 4)


def _report(outcomes: "Sequence[Outcome]", config: "Config", *, as_json: bool) -> None:
    failed = {o.case: o.reason for o in outcomes if o.status == "failed"}
    done = [o for o in outcomes if o.status != "failed"]
    if as_json:
        keys = ("case", "path", "status", "class_voxels", "warnings", "notes", "seconds")
        print_json({"predictions": [{key: getattr(o, key) for key in keys} for o in done], "failed": failed})
        return
    names = [name for name, value in config.region.labels.items() if value]
    table = Table("file", "status", *(f"{name} (voxels)" for name in names), "warnings")
    for o in done:
        table.add_row(escape(o.path), o.status, *(str(o.class_voxels[n]) for n in names), str(len(o.warnings) or ""))
    stdout().print(table)
    for case, reason in failed.items():
        typer.echo(f"failed: {case}: {reason}", err=True)
