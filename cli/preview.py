"""``ftengine preview``: pictures of what the loader feeds."""

from pathlib import Path
from typing import Annotated

import typer

from ftengine.cli.console import ConfigOption, QuietOption, SetOption, SplitOption, progress


def preview(
    store: Annotated[str, typer.Argument(metavar="STORE")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for the PNG sheets.")],
    num_sheets: Annotated[int, typer.Option("--num", min=1, help="How many painted patches to draw.")] = 4,
    synth: Annotated[
        Path | None, typer.Option("--synth", metavar="G.pt", help="Generator (default: a fixed contrast).")
    ] = None,
    judge: Annotated[
        Path | None, typer.Option("--judge", metavar="S.pt", help="Segmenter that judges (default: none).")
    ] = None,
    split: SplitOption = None,
    config: ConfigOption = None,
    assignments: SetOption = None,
    quiet: QuietOption = False,
) -> None:
    """Draw PNG sheets of painted patches: original, mask, synthetic, difference, verdict; in radiological view."""
    from ftengine.assemble import build_bank, check_region, load_painters
    from ftengine.cli.console import load_config
    from ftengine.evaluation.preview import preview as draw
    from ftengine.store.reader import open_store
    from ftengine.training.checkpoint import load_segmenter

    opened = open_store(store)
    chosen = load_config(config, assignments, opened)
    check_region(chosen, opened)
    generator, quality = load_painters(chosen, synth, judge)
    segmenter = None if judge is None else load_segmenter(judge)[0]
    with progress("drawing", num_sheets, quiet=quiet) as reporter:
        sheets = draw(
            chosen,
            opened,
            out,
            num_sheets=num_sheets,
            generator=generator,
            judge=quality,
            segmenter=segmenter,
            bank=build_bank(chosen, opened, split=split),
            split=split,
            on_sheet=lambda sheet: reporter.advance(str(sheet.path)),
        )
    for sheet in sheets:
        typer.echo(sheet.path)
