"""``ftengine fid``: how far synthetic tumours are from real ones."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

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

if TYPE_CHECKING:
    from ftengine.evaluation.tables import ResultTable

METRICS: tuple[Literal["fid", "kid"], ...] = ("fid", "kid")
TABLES = {".md": "to_markdown", ".tex": "to_latex", ".csv": "to_csv"}


def fid(
    store: Annotated[str, typer.Argument(metavar="STORE")],
    features: Annotated[
        Path,
        typer.Option(
            "--features",
            metavar="FILE",
            help="Weights of the feature network: pytorch-fid's Inception, a ResNet-50 (torchvision, RadImageNet), or a segmenter S.pt.",
        ),
    ],
    synth: Annotated[
        Path | None, typer.Option("--synth", metavar="G.pt", help="Generator (default: a fixed contrast).")
    ] = None,
    judge: Annotated[
        Path | None,
        typer.Option("--judge", metavar="S.pt", help="Segmenter that judges (default: every tumour counts)."),
    ] = None,
    split: SplitOption = None,
    fold: Annotated[
        int | None, typer.Option("--fold", metavar="K", help="Only real tumours of this fold of the store.")
    ] = None,
    slices: Annotated[
        Literal["all", "largest"], typer.Option(help="Axial slices of each tumour; a segmenter takes it as a whole.")
    ] = "all",
    margin_mm: Annotated[
        float, typer.Option(min=0.0, help="What is left around a tumour's bounding box, in mm.")
    ] = 10.0,
    repeats: Annotated[int, typer.Option(min=1, help="How often tumours are painted anew.")] = 5,
    num: Annotated[
        int | None,
        typer.Option(min=1, help="Synthetic tumours of each type (default: as many as there are real ones)."),
    ] = None,
    sizes: Annotated[
        Literal["matched", "painted"],
        typer.Option(help="Synthetic tumours of the real ones' size classes, or as they are painted."),
    ] = "matched",
    name: Annotated[str | None, typer.Option(help="Name of the row (default: the synthesiser).")] = None,
    beside: Annotated[
        list[Path] | None, typer.Option(metavar="JSON", help="Result of another run, as a row above; repeatable.")
    ] = None,
    out: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE", help="Write the result (.json) or the table of FID (.md, .tex, .csv); repeatable."
        ),
    ] = None,
    config: ConfigOption = None,
    assignments: SetOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """FID and KID of synthetic against real tumours, by tumour type (Table A4)."""
    from ftengine.assemble import measure_fid
    from ftengine.errors import ConfigError
    from ftengine.fid.fid import compared, read_result
    from ftengine.fid.tumor_images import CropRule
    from ftengine.files import write_text_whole
    from ftengine.store.reader import open_store

    unknown = [file for file in out or [] if file.suffix not in {".json", *TABLES}]
    if unknown:
        raise ConfigError(f"--out {unknown[0]}: want a name that ends in .json, {', '.join(TABLES)}.")
    opened = open_store(store)
    others = [read_result(file) for file in beside or []]
    with progress("tumours", 0, quiet=quiet or as_json) as reporter:
        result = measure_fid(
            load_config(config, assignments, opened),
            opened,
            features=features,
            rule=CropRule(slices, margin_mm),
            generator_path=synth,
            judge_path=judge,
            split=split,
            fold=fold,
            repeats=repeats,
            num=num,
            sizes=sizes,
            name=name,
            beside=others,
            on_tumor=reporter.advance,
            warn=(lambda _text: None) if quiet else reporter.warn,
        )
    files = out or []
    for file in (f for f in files if f.suffix == ".json"):
        write_text_whole(file, json.dumps(result.to_json(), indent=1, allow_nan=False) + "\n")
    if as_json:
        print_json(result.to_json())
    table, kid = (compared([*others, result], metric) for metric in METRICS)
    for file in (f for f in files if f.suffix in TABLES):
        write_text_whole(file, getattr(table, TABLES[file.suffix])())
    if not as_json:
        for shown in (table, kid):
            _print_table(shown)


def _print_table(table: "ResultTable") -> None:
    """Title and notes as lines of their own: rich breaks them at the width of the table, which is narrow."""
    shown = table.to_rich()
    shown.title = shown.caption = None
    console = stdout()
    console.print(table.title, highlight=False, markup=False, soft_wrap=True)
    console.print(shown)
    for note in table.notes:
        console.print(note, highlight=False, markup=False, soft_wrap=True)
