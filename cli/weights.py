"""``ftengine weights``: the released weights in and out, and what a file of weights holds."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from ftengine.cli.console import JsonOption, print_json, stdout

app = typer.Typer(help="Released FreeTumor weights in and out; what a file holds.", no_args_is_help=True)


@app.command("import")
def import_(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="TGAN.pt or model_baseline_segmentor.pt, of abdomen or chest.")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for generator.pt and segmenter.pt.")],
    as_json: JsonOption = False,
) -> None:
    """Turn released weights into checkpoints for --synth, --judge, predict and evaluate. Nothing in the file is run."""
    from ftengine.training.released_weights import import_weights

    done = import_weights(file, out)
    written = {"generator": done.generator, "segmenter": done.segmenter}
    if as_json:
        paths = {name: None if path is None else str(path) for name, path in written.items()}
        print_json({"region": done.region, "sha256": done.sha256, **paths})
        return
    console = stdout()
    console.print(f"{file}: released weights of the {done.region}, sha256 {done.sha256}", highlight=False, markup=False)
    for name, path in written.items():
        console.print(f"{name}: {path or 'not in the file'}", highlight=False, markup=False)
    if done.generator is not None:
        console.print("paint with them: --set synthesis.variant=released", highlight=False, markup=False)


@app.command()
def export(
    checkpoints: Annotated[
        list[Path], typer.Argument(metavar="CKPT...", help="A generator, a segmenter, or one of each, of one region.")
    ],
    out: Annotated[
        Path, typer.Option("--out", metavar="FILE", help="TGAN.pt, or a baseline where there is only a segmenter.")
    ],
) -> None:
    """Write checkpoints in the released layout (.pt, or .safetensors by the name of --out)."""
    from ftengine.training.released_weights import export_weights

    region, names = export_weights(checkpoints, out)
    stdout().print(f"{out}: {', '.join(names)} in the released layout of the {region}", highlight=False, markup=False)


@app.command()
def show(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A checkpoint of ours or anybody's file of weights.")],
    as_json: JsonOption = False,
) -> None:
    """Show what a file of weights is: kind, SHA-256, training, and every tensor. Nothing in the file is run."""
    from ftengine.training.released_weights import describe

    document = describe(file)
    if as_json:
        print_json(_plain(document))
        return
    tensors = document.pop("tensors")
    console = stdout()
    for name, value in document.items():
        if value is not None:
            console.print(f"{name}: {value}", highlight=False, markup=False)
    table = Table("tensor", "shape", "dtype")
    for key, (shape, dtype) in tensors.items():
        table.add_row(key, " ".join(map(str, shape)) or "scalar", dtype)
    console.print(table)


def _plain(value: Any) -> Any:
    """What JSON can hold; anything else as text."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)
