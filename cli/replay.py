"""``ftengine replay``: the patches on which a training run broke."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ftengine.cli.console import JsonOption, print_json, stdout


def replay(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A replay-STEP.json that a run left when it stopped.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Folder for the pictures (default: beside FILE, with its name)."),
    ] = None,
    every_step: Annotated[bool, typer.Option("--all", help="Also the batches just before the one that broke.")] = False,
    store: Annotated[str | None, typer.Option("--store", help="The store, where it has moved.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N (default: the run's).")] = None,
    as_json: JsonOption = False,
) -> None:
    """Make the patches of a broken training step again, through the loader and the painters: numbers, and a picture of each."""
    from ftengine.assemble import replay as make_again

    folder = out or file.with_suffix("")
    warnings: list[str] = []
    found, patches = make_again(
        file, folder, every_step=every_step, store_path=store, device=device, warn=warnings.append
    )
    if as_json:
        print_json(
            {
                "reason": found.reason,
                "kind": found.kind,
                "warnings": warnings,
                "patches": [p.document() for p in patches],
            }
        )
        return
    console = stdout()
    console.print(f"{found.reason}; pictures are in {folder}", highlight=False, markup=False)
    table = Table(
        "step",
        "case",
        "epoch",
        "index",
        "box from z, y, x",
        "lowest",
        "highest",
        "mean",
        "NaN",
        "label voxels",
        "painted",
        "again",
    )
    for p in patches:
        table.add_row(
            str(p.step),
            p.case,
            str(p.epoch),
            str(p.index),
            ", ".join(map(str, p.origin_zyx)),
            *(f"{x:.3f}" for x in (p.lowest, p.highest, p.mean)),
            str(p.num_not_finite),
            ", ".join(f"{name} {count}" for name, count in p.label_voxels.items()) or "none",
            p.recorded or ("not kept" if p.as_recorded is None else "no"),
            "the same" if p.as_recorded else f"now: {p.now or 'no'}",
        )
    console.print(table)
    for text in warnings:
        console.print(f"warning: {text}", highlight=False, markup=False, soft_wrap=True)
    if any(p.num_not_finite for p in patches):
        console.print(
            "A patch itself holds NaN: the store or a painter is to blame, not the learning rate.", highlight=False
        )
    else:
        console.print("All patches are finite: the weights or the loss overflowed on sound data.", highlight=False)
