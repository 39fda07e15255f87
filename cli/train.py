"""``ftengine train``: the two training stages."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.table import Column, Table

from ftengine.cli.console import (
    ConfigOption,
    JsonOption,
    QuietOption,
    SetOption,
    SplitOption,
    print_json,
    stdout,
)
from ftengine.cli.training_view import (
    AllowOption,
    DryRunOption,
    JsonLogOption,
    StepSize,
    TrainingView,
    check_outputs,
    print_dry_run,
    show_estimate,
    show_files,
    training_view,
)

if TYPE_CHECKING:
    from ftengine.config import GeneratorTrainingConfig, TrainingConfig
    from ftengine.training.estimate import Estimate
    from ftengine.training.run import TrainingResult

app = typer.Typer(help="Train the segmenter (seg) or the tumour generator (synth).", no_args_is_help=True)

StoreArgument = Annotated[str, typer.Argument(metavar="STORE")]
OutOption = Annotated[
    Path, typer.Option("--out", metavar="RUN", help="Folder of the run: configuration, logs, checkpoint.")
]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Go on with the run in --out, to the same losses.")]
HeldOutOption = Annotated[
    int | None,
    typer.Option(
        "--fold", metavar="K", help="Hold out this fold: train on all others ('store subset --folds' deals them)."
    ),
]
ValSplitOption = Annotated[
    str | None,
    typer.Option(
        "--val-split",
        metavar="NAME",
        help="Validate on this split, every training.validate_every; best.pt is the best.",
    ),
]
PictureSplitOption = Annotated[
    str | None,
    typer.Option("--val-split", metavar="NAME", help="Pictures show patches of this split (default: of --split)."),
]
PrecisionOption = Annotated[
    Literal["fp32", "bf16", "fp16"] | None,
    typer.Option(
        "--precision",
        help="Of this stage's products: short for --set training.precision=... (synth: generator_training.precision).",
    ),
]
INTERRUPTED = 130


@app.command()
def seg(
    store: StoreArgument,
    out: OutOption,
    synth: Annotated[
        Path | None, typer.Option("--synth", metavar="G.pt", help="Generator: paint tumours while training.")
    ] = None,
    judge: Annotated[
        Path | None, typer.Option("--judge", metavar="S.pt", help="Baseline segmenter that judges painted tumours.")
    ] = None,
    init: Annotated[
        Path | None,
        typer.Option(
            "--init",
            metavar="FILE",
            help="Start from these weights: a segmenter of ours, VoCo, SwinSSL, the released ones (docs/networks.md).",
        ),
    ] = None,
    split: SplitOption = None,
    fold: HeldOutOption = None,
    val_split: ValSplitOption = None,
    config: ConfigOption = None,
    assignments: SetOption = None,
    precision: PrecisionOption = None,
    resume: ResumeOption = False,
    allow: AllowOption = None,
    dry_run: DryRunOption = False,
    json_log: JsonLogOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Train a segmenter: the baseline on tumour-annotated volumes, or with --synth also on organ-labelled ones with painted tumours."""
    from ftengine.assemble import train_segmentation
    from ftengine.cli.console import load_config
    from ftengine.store.reader import open_store
    from ftengine.training.estimate import rehearse

    quiet = quiet or not _is_main()
    check_outputs(as_json=as_json, json_log=json_log)
    chosen = load_config(config or _config_of(out, resume=resume), assignments, open_store(store))
    chosen = chosen if precision is None else chosen.with_overrides({"training.precision": precision})
    show_files({"--synth": synth, "--judge": judge, "--init": init}, quiet=quiet)
    train = partial(
        train_segmentation,
        store_path=store,
        generator_path=synth,
        judge_path=judge,
        init=init,
        split=split,
        held_out_fold=fold,
        val_split=val_split,
    )
    if dry_run:
        _show_rehearsal(rehearse("segmenter", chosen, train), as_json=as_json)
        return
    settings = chosen.training
    with training_view(
        "training",
        loss="loss",
        steps=settings.steps,
        step=_step_size(settings),
        json_log=json_log and _is_main(),
        quiet=quiet or as_json,
    ) as view:
        result = train(
            chosen,
            out=out,
            resume=resume,
            allow=allow or (),
            on_step=view,
            on_estimate=partial(show_estimate, view=view),
            warn=(lambda _text: None) if quiet else view.warn,
        )
    _finish(result, view, as_json=as_json, json_log=json_log)


@app.command()
def synth(
    store: StoreArgument,
    baseline: Annotated[
        Path,
        typer.Option("--baseline", metavar="S.pt", help="Frozen segmenter that the painted tumours must convince."),
    ],
    out: OutOption,
    split: SplitOption = None,
    fold: HeldOutOption = None,
    val_split: PictureSplitOption = None,
    config: ConfigOption = None,
    assignments: SetOption = None,
    precision: PrecisionOption = None,
    resume: ResumeOption = False,
    allow: AllowOption = None,
    dry_run: DryRunOption = False,
    json_log: JsonLogOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Train the generator against a frozen baseline segmenter and a classifier (Eq. 1-3)."""
    from ftengine.assemble import train_synthesis
    from ftengine.cli.console import load_config
    from ftengine.store.reader import open_store
    from ftengine.training.estimate import rehearse
    from ftengine.training.synthesis import main_loss_of

    quiet = quiet or not _is_main()
    check_outputs(as_json=as_json, json_log=json_log)
    chosen = load_config(config or _config_of(out, resume=resume), assignments, open_store(store))
    chosen = chosen if precision is None else chosen.with_overrides({"generator_training.precision": precision})
    show_files({"--baseline": baseline}, quiet=quiet)
    train = partial(
        train_synthesis, store_path=store, baseline=baseline, split=split, held_out_fold=fold, val_split=val_split
    )
    if dry_run:
        _show_rehearsal(rehearse("generator", chosen, train), as_json=as_json)
        return
    settings = chosen.generator_training
    with training_view(
        "training the generator",
        loss=main_loss_of(settings),
        steps=settings.steps,
        step=_step_size(settings),
        json_log=json_log and _is_main(),
        quiet=quiet or as_json,
    ) as view:
        result = train(
            chosen,
            out=out,
            resume=resume,
            allow=allow or (),
            on_step=view,
            on_estimate=partial(show_estimate, view=view),
            warn=(lambda _text: None) if quiet else view.warn,
        )
    _finish(result, view, as_json=as_json, json_log=json_log)


def _is_main() -> bool:
    """Whether this is the process of a run that reports: the only one, or torchrun's first."""
    from ftengine.training.distributed import world_of_environment

    return world_of_environment().is_main


def _step_size(settings: "TrainingConfig | GeneratorTrainingConfig") -> StepSize:
    from ftengine.training.distributed import world_of_environment

    return StepSize(settings.batch_size * world_of_environment().size, settings.accumulate)


def _show_rehearsal(estimate: "Estimate", *, as_json: bool) -> None:
    if _is_main():
        print_dry_run(estimate, as_json=as_json)


def _config_of(out: Path, *, resume: bool) -> Path | None:
    """A resumed run uses its own configuration unless another is given."""
    file = out / "config.yaml"
    return file if resume and file.exists() else None


def _finish(result: "TrainingResult", view: TrainingView, *, as_json: bool, json_log: bool) -> None:
    if _is_main():  # the others leave it to that one
        _report(result, view, as_json=as_json, json_log=json_log)
    if result.interrupted:
        raise typer.Exit(INTERRUPTED)


def _report(result: "TrainingResult", view: TrainingView, *, as_json: bool, json_log: bool) -> None:
    if json_log:
        view.end(result.document())
    elif as_json:
        print_json(result.document())
    else:
        _print_result(result)


def _print_result(result: "TrainingResult") -> None:
    console, speed = stdout(), result.speed
    state = "interrupted, state saved; --resume goes on" if result.interrupted else "done"
    console.print(f"{state}: {result.steps} steps, checkpoint {result.checkpoint}", highlight=False)
    if result.init:
        console.print(f"started from {result.init}", highlight=False, markup=False)
    table = Table(
        "stage", *(Column(name, justify="right") for name in ("busy s", "of the time", "queue before it, mean"))
    )
    for part in speed.parts:
        level = "" if part.level is None else f"{part.queue} {part.level:.1f} of {speed.capacities[str(part.queue)]}"
        table.add_row(part.name, f"{part.busy_s:.1f}", f"{part.share:.1%}", level)
    console.print(table)
    console.print(speed.sentence(), highlight=False, markup=False, soft_wrap=True)
    console.print(
        f"{result.stall['patches_per_s']:.2f} patches/s, median step {speed.median_step_s:.3f} s, longest wait {speed.max_wait_s:.3f} s",
        highlight=False,
    )
    if result.best:
        console.print(
            f"best validation: Dice {result.best['dice']:.3f} after {result.best['step']:.0f} steps, {result.checkpoint.with_name('best.pt')}",
            highlight=False,
        )
    if result.bad_reads:
        named = ", ".join(f"{case} ({count})" for case, count in sorted(result.bad_reads.items()))
        console.print(f"{sum(result.bad_reads.values())} reads failed and were replaced: {named}", highlight=False)
    if result.mix:
        mix = result.mix
        console.print(
            f"training saw {_share(mix['painted'])} painted, {_share(mix['annotated'])} annotated and {_share(mix['healthy'])} healthy patches",
            highlight=False,
        )
    if result.quality:
        quality = result.quality
        at = ", ".join(f"{n} at draw {draw}" for draw, n in quality["passed_at_draw"].items())
        console.print(
            f"quality control passed {quality['passed']} of {quality['painted']} painted patches ({quality['qc/pass_rate']:.1%}{'; ' + at if at else ''})",
            highlight=False,
        )


def _share(value: float | None) -> str:
    return "no" if value is None else f"{value:.1%}"
