"""The command ``ftengine``: all commands, and what becomes of errors."""

import sys
from typing import Annotated

import typer

from ftengine import __version__
from ftengine.cli import (
    bench,
    config,
    convert,
    datasets,
    demo,
    doctor,
    evaluate,
    experiment,
    fid,
    organs,
    predict,
    preview,
    qc,
    replay,
    report,
    store,
    train,
    turing,
    view,
    weights,
)
from ftengine.cli.console import EXIT_CODES
from ftengine.errors import FtengineError

INTERRUPTED = 130

app = typer.Typer(
    name="ftengine",
    help="Data engine of FreeTumor: tumour segmentation on CT with tumours painted while the segmenter trains.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # our errors are one line; locals of a traceback could hold patient data
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(name="demo")(demo.demo)
app.command(name="convert")(convert.convert)
app.add_typer(store.app, name="store")
app.add_typer(datasets.app, name="datasets")
app.command(name="organs")(organs.organs)
app.add_typer(train.app, name="train")
app.command(name="predict")(predict.predict)
app.command(name="evaluate")(evaluate.evaluate)
app.command(name="compare")(evaluate.compare)
app.add_typer(experiment.app, name="experiment")
app.command(name="fid")(fid.fid)
app.add_typer(qc.app, name="qc")
app.command(name="preview")(preview.preview)
app.command(name="report")(report.report)
app.command(name="replay")(replay.replay)
app.command(name="view")(view.view)
app.add_typer(turing.app, name="turing")
app.add_typer(weights.app, name="weights")
app.command(name="config")(config.config)
app.command(name="doctor")(doctor.doctor)
app.command(
    name="bench",
    add_help_option=False,  # each program prints its own
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)(bench.bench)


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"ftengine {__version__}")
        raise typer.Exit


@app.callback()
def main(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error; allowed anywhere on the line.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Data engine of FreeTumor."""


def run() -> None:
    """Entry point: errors of ours become their text and exit code, Ctrl-C becomes 130; ``--debug`` shows tracebacks."""
    debug = "--debug" in sys.argv
    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    try:
        app(args=arguments)
    except SystemExit as stop:
        if stop.code == INTERRUPTED:  # typer makes this of Ctrl-C, and 'train' of a run that was saved
            _say(
                "interrupted; what was committed is kept. The same command goes on (train: with --resume; demo: starts anew)."
            )
        raise
    except FtengineError as error:
        _fail(f"error: {error}", error.exit_code, debug=debug)
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        _fail(
            f"error: {place}{error.strerror or error}. Check the path, its permissions and the free space.",
            2,
            debug=debug,
        )
    except MemoryError:
        _fail("error: out of memory. Use a smaller batch or patch (--set training.batch_size=1).", 2, debug=debug)


def _say(text: str) -> None:
    typer.echo(f"ftengine: {text}", err=True)


def _fail(text: str, code: int, *, debug: bool) -> None:
    """Inside an except clause: print one line and leave with the code, or raise again for ``--debug``."""
    if debug:
        raise  # noqa: PLE0704 - only called while an exception is handled
    _say(text)
    sys.exit(code)


if __name__ == "__main__":
    run()
