"""``ftengine turing``: the Visual Turing Test as a reader study."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ftengine.cli.console import ConfigOption, JsonOption, QuietOption, SetOption, SplitOption, print_json, stdout

if TYPE_CHECKING:
    from ftengine.turing.build import ReaderName

app = typer.Typer(no_args_is_help=True, help="The paper's Visual Turing Test: build, serve and score a reader study.")


@app.command()
def build(
    store: Annotated[str, typer.Argument(metavar="STORE", help="Tumours are painted on its volumes.")],
    out: Annotated[Path, typer.Option("--out", metavar="STUDY", help="Folder of the study; must be new.")],
    key: Annotated[
        Path, typer.Option("--key", metavar="FILE", help="Which case is which; outside the study folder, mode 600.")
    ],
    reader: Annotated[
        list[str], typer.Option("--reader", metavar="NAME[:GROUP]", help="A reader, e.g. 'Jun-1:Junior'; repeatable.")
    ],
    synth: Annotated[
        Path | None, typer.Option("--synth", metavar="G.pt", help="Generator (default: a fixed contrast).")
    ] = None,
    judge: Annotated[
        Path | None, typer.Option("--judge", metavar="S.pt", help="Segmenter that judges (default: none).")
    ] = None,
    real_store: Annotated[
        str | None, typer.Option("--real-store", metavar="R", help="Real tumours come from it (default: STORE).")
    ] = None,
    types: Annotated[
        list[str] | None,
        typer.Option(
            "--type", metavar="ORGAN[=NAME]", help="Tumour type, e.g. 'lung=COVID'; repeatable (default: all organs)."
        ),
    ] = None,
    per_type: Annotated[int, typer.Option("--per-type", help="Cases of each type, half of them real.")] = 18,
    repeats: Annotated[int, typer.Option(min=0, help="Cases that each reader sees a second time.")] = 0,
    training_cases: Annotated[
        int, typer.Option("--training-cases", min=0, help="Further cases, shown first, with the truth afterwards.")
    ] = 0,
    size_mm: Annotated[
        tuple[float, float, float], typer.Option("--size-mm", metavar="Z Y X", help="Size of every case.")
    ] = (144.0, 192.0, 192.0),
    min_diameter_mm: Annotated[
        float, typer.Option("--min-diameter-mm", min=0.0, help="Of the sphere of the tumour's volume, real or painted.")
    ] = 5.0,
    max_diameter_mm: Annotated[float | None, typer.Option("--max-diameter-mm", min=0.0, help="Likewise.")] = None,
    hide_position: Annotated[
        bool, typer.Option("--hide-position", help="Do not tell readers where the tumour lies (the paper does).")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Decides cases, paintings and orders.")] = 0,
    split: SplitOption = None,
    config: ConfigOption = None,
    assignments: SetOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Draw blinded cases, real and synthetic, and write the study and, apart from it, its key."""
    from ftengine.assemble import build_bank, check_region, load_painters
    from ftengine.cli.console import load_config
    from ftengine.store.reader import open_store
    from ftengine.training.weight_files import sha256_of
    from ftengine.turing.build import StudyOptions, build_study, check_options, check_places
    from ftengine.turing.cases import CaseDrawer, CaseOptions, shape_of

    check_places(out, key)
    painted = open_store(store)
    real = painted if real_store is None else open_store(real_store)
    chosen = load_config(config, assignments, painted).with_overrides({"seed": seed})
    for opened in (painted, real):
        check_region(chosen, opened)
    options = StudyOptions(
        per_type=per_type,
        types=_types(types, tuple(chosen.region.organs)),
        readers=[_reader(text) for text in reader],
        seed=seed,
        repeats=repeats,
        training_cases=training_cases,
    )
    check_options(options, chosen)
    case_options = CaseOptions(
        shape_of(size_mm, chosen.region.spacing_mm_zyx),
        least_diameter_mm=min_diameter_mm,
        largest_diameter_mm=float("inf") if max_diameter_mm is None else max_diameter_mm,
        split=split,
        centered=not hide_position,
    )
    generator, quality = load_painters(chosen, synth, judge)
    drawer = CaseDrawer(
        chosen,
        real,
        painted,
        case_options,
        seed=seed,
        generator=generator,
        judge=quality,
        bank=build_bank(chosen, painted, split=split),
    )
    built = build_study(
        drawer,
        chosen,
        case_options,
        options,
        out,
        key,
        generator_sha256="" if synth is None else sha256_of(synth),
        judge_sha256="" if judge is None else sha256_of(judge),
        on_case=lambda text: None if quiet else typer.echo(text, err=True),
    )
    for warning in built.warnings:
        _warn(warning)
    if as_json:
        print_json(
            {
                "study": str(built.out),
                "key": str(built.key),
                "num_cases": built.num_cases,
                "num_training": built.num_training,
                "num_showings": built.num_showings,
                "case_bytes": built.case_bytes,
                "warnings": list(built.warnings),
            }
        )
        return
    typer.echo(
        f"{built.out}: {built.num_cases} cases and {built.num_training} for training, {built.case_bytes / 1e6:.1f} MB each; a reader is shown "
        f"{built.num_showings}\nkey: {built.key}  (keep it from readers and from whoever sits with them; without it nothing can be scored)"
    )


@app.command()
def serve(
    study: Annotated[Path, typer.Argument(metavar="STUDY")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port on 127.0.0.1; 0 takes any free one.")] = 0,
    allow_host: Annotated[
        list[str] | None,
        typer.Option("--allow-host", metavar="NAME", help="Name by which a TLS proxy of yours is reached; repeatable."),
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Show a study to its readers on 127.0.0.1 until Ctrl-C; prints a link for each of them."""
    _need_packages()
    from ftengine.store.serve import ADDRESS, listen, run_server
    from ftengine.turing.answers import Journals
    from ftengine.turing.serve import checked_hosts, make_app
    from ftengine.turing.study import StudyFolder

    folder = StudyFolder.open(study)
    folder.check_cases()
    hosts = checked_hosts(allow_host or [])
    journals = Journals(folder, warn=_warn)
    try:
        with listen(port) as sock:
            url = f"http://{ADDRESS}:{sock.getsockname()[1]}/"
            links = [
                {"reader": r.name, "group": r.group, "url": f"{url}#{folder.token(r)}"} for r in folder.study.readers
            ]
            if as_json:
                print_json({"url": url, "readers": links})
            else:
                typer.echo("\n".join(f"{link['reader']}  {link['url']}" for link in links))
            if not quiet:
                typer.echo(
                    "ftengine: serving to this machine alone; a link admits its reader, give each only their own. Ctrl-C ends it.",
                    err=True,
                )
            run_server(make_app(folder, journals, allow_hosts=hosts, warn=_warn), sock)
    finally:
        journals.close()


@app.command()
def score(
    studies: Annotated[list[Path], typer.Argument(metavar="STUDY...")],
    key: Annotated[list[Path], typer.Option("--key", metavar="FILE", help="The key of each study, in their order.")],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Write JSON, Markdown, LaTeX and CSV there.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Sensitivity, specificity and accuracy by reader, group and type (Tables A1 to A3), pass counts, intervals, agreement."""
    from ftengine.turing.score import score_studies, write_score

    scored = score_studies(studies, key)
    written = [] if out is None else write_score(scored, out)
    if as_json:
        print_json(scored.to_json())
        return
    console = stdout()
    for table in scored.tables.values():
        console.print(table.to_rich())
        console.print()
    for path in written:
        typer.echo(path)


def _warn(text: str) -> None:
    typer.echo(f"warning: {text}", err=True)


def _types(texts: list[str] | None, organs: tuple[str, ...]) -> dict[str, str]:
    """{organ: name of the type}, from ``ORGAN=NAME`` or ``ORGAN``."""
    pairs = (text.partition("=") for text in texts or organs)
    return {organ: name or organ for organ, _, name in pairs}


def _reader(text: str) -> "ReaderName":
    from ftengine.turing.build import ReaderName

    name, _, group = text.partition(":")
    return ReaderName(name.strip(), group.strip())


def _need_packages() -> None:
    from ftengine.errors import ConfigError

    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"'ftengine turing serve' needs the package {error.name}; install it with: pip install 'ftengine[study]'"
        ) from error
