"""``ftengine qc``: what the judge of painted tumours makes of real ones."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Column, Table

from ftengine.cli.console import (
    ConfigOption,
    JsonOption,
    QuietOption,
    SetOption,
    SplitOption,
    load_config,
    print_json,
    progress,
    stdout,
)

app = typer.Typer(help="Quality control of painted tumours.", no_args_is_help=True)


@app.callback()
def qc() -> None:
    """Quality control of painted tumours."""


@app.command()
def calibrate(
    store: Annotated[str, typer.Argument(metavar="STORE")],
    judge: Annotated[Path, typer.Option("--judge", metavar="S.pt", help="The segmenter that judges painted tumours.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for calibration.json and calibration.png.")],
    synth: Annotated[
        Path | None, typer.Option("--synth", metavar="G.pt", help="Generator (default: a fixed contrast).")
    ] = None,
    split: SplitOption = None,
    fold: Annotated[
        int | None, typer.Option("--fold", metavar="K", help="Only real tumours of this fold of the store.")
    ] = None,
    num_painted: Annotated[int, typer.Option("--painted", min=0, help="How many painted tumours to judge.")] = 200,
    config: ConfigOption = None,
    assignments: SetOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """P of the judge (Eq. 4) on real held-out tumours by size and contrast, beside painted ones; recommends qc.threshold.

    Give a split or a fold that the judge was not trained on. The result is also written beside S.pt, where 'train seg --judge' finds it.
    """
    from ftengine.assemble import calibrate_judge
    from ftengine.pictures.calibration import HEADER, heading, sentences, table
    from ftengine.quality.calibrate import calibration_file
    from ftengine.store.reader import open_store

    opened = open_store(store)
    chosen = load_config(config, assignments, opened)
    with progress("judging", 0, quiet=quiet or as_json) as reporter:
        calibration = calibrate_judge(
            chosen,
            opened,
            judge_path=judge,
            generator_path=synth,
            out=out,
            split=split,
            fold=fold,
            num_painted=num_painted,
            warn=(lambda _text: None) if quiet else reporter.warn,
        )
    if as_json:
        print_json(calibration.to_json())
        return
    console = stdout()
    shown = Table(HEADER[0], *(Column(name, justify="right") for name in HEADER[1:]), title=heading(calibration))
    for row in table(calibration):
        shown.add_row(*row)
    console.print(shown)
    for line in sentences(calibration):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print(
        f"written: {out / 'calibration.json'}, {out / 'calibration.png'}, {calibration_file(judge)}", highlight=False
    )
