"""``ftengine demo``: the whole road on phantoms."""

from pathlib import Path
from typing import Annotated

import typer

from ftengine.cli.console import JsonOption, print_json, stdout


def demo(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for everything the demo makes.")] = Path(
        "demo"
    ),
    seed: Annotated[int, typer.Option(help="Seed of phantoms, networks and batches.")] = 0,
    quick: Annotated[
        bool, typer.Option("--quick", help="A minute instead of several: every stage runs, the figures mean nothing.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Run the whole road on synthetic phantom CT, on a CPU, in minutes.

    Phantoms -> convert -> baseline -> generator -> segmentation with online synthesis -> evaluate -> DIR/report.html, DIR/summary.json.
    """
    from ftengine.demo import run_demo

    summary = run_demo(out, seed=seed, quick=quick, say=lambda text: typer.echo(text, err=True))
    if as_json:
        print_json(summary)
        return
    console = stdout()
    console.print(
        f"tumor Dice on held-out phantoms: baseline {summary['dice_baseline']:.3f}, with synthesis {summary['dice_synthesis']:.3f}; "
        f"quality control passed {summary['qc_pass_rate']:.0%}; training waited {summary['wait_fraction']:.1%} of the time",
        highlight=False,
    )
    console.print(
        f"report: {out / 'report.html'}    figures: {out / 'summary.json'}    total {summary['seconds']:.0f} s",
        highlight=False,
    )
