"""``ftengine preview``: pictures of what the loader feeds."""

from pathlib import Path
from typing import Annotated

import typer

from ftengine.cli.console import ConfigOption, QuietOption, SetOption, SplitOption, progress

WindowOption = Annotated[
    str,
    typer.Option(
        "--window",
        metavar="WINDOW",
        help="Grey values: region (what the networks see), organ, liver, pancreas, kidney, abdomen, mediastinum, lung, bone, or LOW:HIGH in HU.",
    ),
]


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
    by_size: Annotated[
        bool, typer.Option("--by-size", help="Draw --num painted patches of each size class, not of all together.")
    ] = False,
    window: WindowOption = "region",
    split: SplitOption = None,
    config: ConfigOption = None,
    assignments: SetOption = None,
    quiet: QuietOption = False,
) -> None:
    """Draw PNG sheets of painted tumours in three planes, and contact.png with all of them: original, mask, synthetic, difference, verdict."""
    from ftengine.assemble import build_bank, check_region, load_painters
    from ftengine.cli.console import load_config
    from ftengine.pictures.hu_windows import WindowChoice
    from ftengine.pictures.preview import preview as draw
    from ftengine.pictures.samples import size_classes
    from ftengine.store.reader import open_store
    from ftengine.training.checkpoint import load_segmenter

    choice = WindowChoice(window)
    opened = open_store(store)
    chosen = load_config(config, assignments, opened)
    check_region(chosen, opened)
    generator, quality = load_painters(chosen, synth, judge)
    segmenter = None if judge is None else load_segmenter(judge)[0]
    sizes = size_classes(chosen) if by_size else []
    with progress("drawing", num_sheets * max(1, len(sizes)), quiet=quiet) as reporter:
        sheets = draw(
            chosen,
            opened,
            out,
            num_sheets=num_sheets,
            per_size=by_size,
            window=choice,
            contact=True,
            generator=generator,
            judge=quality,
            segmenter=segmenter,
            bank=build_bank(chosen, opened, split=split),
            split=split,
            on_sheet=lambda sheet: reporter.advance(str(sheet.path)),
        )
        for name in sizes:
            found = len({(s.epoch, s.index) for s in sheets if s.size_class == name})
            if found < num_sheets:
                reporter.warn(f"size class {name}: {found} of {num_sheets} patches were found")
    for sheet in sheets:
        typer.echo(sheet.path)
    typer.echo(out / "contact.png")
