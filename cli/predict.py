"""``ftengine predict``: label maps for CT files."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ftengine.cli.console import JsonOption, QuietOption, print_json, progress, stdout


def predict(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="A segmenter that 'ftengine train seg' wrote.")],
    sources: Annotated[list[str], typer.Argument(metavar="CT...", help="Files, folders, or DICOM series folders.")],
    out: Annotated[
        Path,
        typer.Option("--out", metavar="DIR", help="Folder for the label maps (NIfTI, in each input's own geometry)."),
    ],
    overlap: Annotated[
        float | None, typer.Option(help="Overlap of the windows, 0 to 0.95 (default: the checkpoint's).")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Predict CT files; each result is a NIfTI label map on the grid of its input."""
    from ftengine.assemble import resolve_device
    from ftengine.errors import CaseError
    from ftengine.evaluation.infer import Prediction, check_outputs, predict_file
    from ftengine.training.checkpoint import load_segmenter
    from ftengine.volume.discover import discover

    network, config = load_segmenter(checkpoint)
    if overlap is not None:
        config = config.with_overrides({"inference.overlap": overlap})
    found = discover([Path(s) for s in sources], labels=None, dataset="predict")
    check_outputs(found, out)
    chosen_device = resolve_device(device)
    done: list[Prediction] = []
    failed: dict[str, str] = {}
    with progress("predicting", len(found), quiet=quiet or as_json) as reporter:
        for source in found:
            reporter.working_on(source.case)
            try:
                done.append(predict_file(network, source, out, config, chosen_device))
                reporter.advance(f"predicted {source.case}")
            except CaseError as error:
                failed[source.case] = str(error)
                reporter.advance(f"failed {source.case}: {error}")
    if as_json:
        cases = [{"case": p.case, "path": str(p.path), "class_voxels": p.class_voxels} for p in done]
        print_json({"predictions": cases, "failed": failed})
    else:
        names = [n for n, value in config.region.labels.items() if value]
        table = Table("file", *(f"{n} (voxels)" for n in names))
        for p in done:
            table.add_row(str(p.path), *(str(p.class_voxels[n]) for n in names))
        stdout().print(table)
        for case, reason in failed.items():
            typer.echo(f"failed: {case}: {reason}", err=True)
    raise typer.Exit(0 if not failed else 1 if done else 4)
