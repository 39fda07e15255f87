"""``ftengine experiment``: folds, transfer and ablations from a plan."""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Column, Table
from typing_extensions import override

from ftengine.cli.console import JsonOption, QuietOption, print_json, stdout
from ftengine.experiments.schedule import Job, Watcher

if TYPE_CHECKING:
    from ftengine.experiments.collect import Results
    from ftengine.experiments.plan import Plan
    from ftengine.experiments.run import Status

app = typer.Typer(
    help="Folds, transfer and ablations from a plan: run what is missing, resume, collect one table.",
    no_args_is_help=True,
)

PlanArgument = Annotated[
    str, typer.Argument(metavar="PLAN", help="A YAML file, or the name of a shipped plan ('ftengine experiment list').")
]
OutOption = Annotated[
    Path, typer.Option("--out", metavar="DIR", help="Folder of the experiment; one begun there goes on.")
]
StoreOption = Annotated[
    list[str] | None,
    typer.Option("--store", metavar="NAME=PATH", help="Where a store of the plan lies; remembered in DIR; repeatable."),
]
StoresOption = Annotated[
    Path | None, typer.Option("--stores", metavar="FILE", help="YAML file of names and paths of stores.")
]
TaskOption = Annotated[
    list[str] | None, typer.Option("--task", metavar="NAME", help="Only this task of the plan; repeatable.")
]
MethodOption = Annotated[
    list[str] | None, typer.Option("--method", metavar="NAME", help="Only this method of the plan; repeatable.")
]
FoldOption = Annotated[list[int] | None, typer.Option("--fold", metavar="K", help="Only this fold; repeatable.")]
SOME_FAILED = 1


@app.command(name="list")
def list_plans(as_json: JsonOption = False) -> None:
    """List the shipped plans: what each compares, and the stores that it needs."""
    from ftengine.experiments.plan import load_plan, plan_names

    plans = {name: load_plan(name) for name in plan_names()}
    if as_json:
        print_json({name: plan.model_dump(mode="json") for name, plan in plans.items()})
        return
    table = Table("plan", "title", "stores", "tasks", "methods", Column("folds x repeats", justify="right"))
    for name, plan in plans.items():
        folds = 1 if plan.folds is None else plan.folds.number
        stores = ", ".join(f"{s} ({'drawn' if need.phantoms else need.preset})" for s, need in plan.stores.items())
        table.add_row(
            name, escape(plan.title), stores, str(len(plan.tasks)), str(len(plan.methods)), f"{folds} x {plan.repeats}"
        )
    stdout().print(table)


@app.command()
def show(
    plan: Annotated[str, typer.Argument(metavar="NAME", help="Name of a shipped plan.")],
) -> None:
    """Print a shipped plan as YAML, to be changed and run as a file."""
    from ftengine.errors import ConfigError
    from ftengine.experiments.plan import plan_names, shipped_plan

    if plan not in plan_names():
        raise ConfigError(f"experiment show {plan}: no such plan; want one of {', '.join(plan_names())}.")
    typer.echo(shipped_plan(plan), nl=False)


@app.command()
def run(
    plan: PlanArgument,
    out: OutOption,
    store: StoreOption = None,
    stores: StoresOption = None,
    task: TaskOption = None,
    method: MethodOption = None,
    fold: FoldOption = None,
    jobs: Annotated[int, typer.Option(min=1, help="Trainings at a time, each in a process of its own.")] = 1,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of each.")] = 1,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N, for every process.")] = "auto",
    stop_after: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="Begin nothing that would not be done by then.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the units and what is known of their time; train nothing.")
    ] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Run what is missing of a plan, then collect one table. The same command goes on after an interrupt or a kill, and tries failed units again."""
    from ftengine.experiments.plan import load_plan
    from ftengine.experiments.run import Resources, opened, run_experiment

    chosen = load_plan(plan)
    given = _given(store, stores)
    with opened(
        chosen, out, given=given, tasks=task or (), methods=method or (), folds=fold or (), writes=not dry_run
    ) as experiment:
        status = experiment.status()
        if dry_run:
            _show_status(status, jobs=jobs, every_unit=True, as_json=as_json)
            return
        with _view(status, jobs, quiet=quiet or as_json) as view:
            outcome, results = run_experiment(experiment, Resources(jobs, threads, device, stop_after), watcher=view)
        after = experiment.status()
    if as_json:
        print_json({**results.to_json(), **after.to_json()})
    else:
        _show_results(results, out)
    if outcome.num_left and not outcome.failed:
        typer.echo(f"{outcome.num_left} units are left; the same command goes on", err=True)
    _show_failed(after)
    if after.failed:
        raise typer.Exit(SOME_FAILED)


@app.command()
def status(
    plan: Annotated[
        str, typer.Argument(metavar="PLAN|DIR", help="A plan, with --out, or the folder of an experiment.")
    ],
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Folder of the experiment.")] = None,
    store: StoreOption = None,
    stores: StoresOption = None,
    task: TaskOption = None,
    method: MethodOption = None,
    fold: FoldOption = None,
    units: Annotated[bool, typer.Option("--units", help="List every unit.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show what is done, failed and missing. Exit code 1 where something failed."""
    from ftengine.experiments.run import opened

    chosen, folder = _plan_and_folder(plan, out)
    with opened(
        chosen,
        folder,
        given=_given(store, stores),
        tasks=task or (),
        methods=method or (),
        folds=fold or (),
        writes=False,
        known_only=True,
    ) as experiment:
        found = experiment.status()
    _show_status(found, jobs=1, every_unit=units, as_json=as_json)
    if found.failed:
        raise typer.Exit(SOME_FAILED)


@app.command()
def table(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of an experiment.")], as_json: JsonOption = False
) -> None:
    """Collect the tables again from what is done; needs no store."""
    from ftengine.experiments.collect import collect, write_results

    results = collect(folder)
    write_results(folder, results)
    if as_json:
        print_json(results.to_json())
    else:
        _show_results(results, folder)


def _given(store: list[str] | None, file: Path | None) -> dict[str, str]:
    from ftengine.experiments.stores import parse_stores, read_paths

    return {**({} if file is None else read_paths(file)), **parse_stores(store or [])}


def _plan_and_folder(plan: str, out: Path | None) -> "tuple[Plan, Path]":
    from ftengine.errors import ConfigError
    from ftengine.experiments.folder import PLAN
    from ftengine.experiments.plan import load_plan

    if (Path(plan) / PLAN).is_file():
        return load_plan(str(Path(plan) / PLAN)), out or Path(plan)
    if out is None:
        raise ConfigError(f"{plan}: want the folder of an experiment, or a plan with --out DIR.")
    return load_plan(plan), out


def _show_results(results: "Results", folder: Path) -> None:
    console = stdout()
    for shown in results.tables.values():
        console.print(shown.to_rich())
    done = f"{results.num_done} of {results.num_scores} evaluations are done"
    console.print(
        f"{done}; written: {folder / 'table.md'}, .tex, .csv, .json",
        highlight=False,
        markup=False,
    )


def _show_status(status: "Status", *, jobs: int, every_unit: bool, as_json: bool) -> None:
    if as_json:
        print_json(status.to_json())
        return
    console = stdout()
    state = dict.fromkeys(status.done, "done") | dict.fromkeys(status.failed, "failed")
    if every_unit:
        for key, unit in status.units.items():
            console.print(
                f"{state.get(key, 'missing'):<8} {key}  {unit.title}", highlight=False, markup=False, soft_wrap=True
            )
    counts = Counter((unit.kind, state.get(key, "missing")) for key, unit in status.units.items())
    names = ("done", "failed", "missing")
    shown = Table("units", *(Column(name, justify="right") for name in (*names, "mean time")))
    for kind in dict.fromkeys(unit.kind for unit in status.units.values()):
        mean = _duration(status.seconds[kind]) if kind in status.seconds else "not known yet"
        shown.add_row(kind, *(str(counts[kind, name]) for name in names), mean)
    console.print(shown)
    left = status.seconds_left(jobs)
    rest = f"{status.num_open} units are open, {status.open_steps:,} training steps"
    if left is not None:
        rest += f", about {_duration(left)} with {jobs} at a time"
    elif status.num_open:
        rest += "; 'ftengine train seg STORE --dry-run' measures the time of a step"
    console.print(rest, highlight=False, markup=False, soft_wrap=True)
    _show_failed(status)


def _show_failed(status: "Status") -> None:
    for key, error in status.failed.items():
        typer.echo(f"failed: {status.units[key].title} ({key}): {error}", err=True)


def _duration(seconds: float) -> str:
    from ftengine.training.estimate import duration

    return duration(seconds)


class _View(Watcher):
    """On a terminal a bar for all units and one for each that runs; elsewhere a line a unit."""

    def __init__(self, status: "Status", jobs: int, bar: Progress | None, *, quiet: bool) -> None:
        self._bar, self._quiet, self._jobs = bar, quiet, jobs
        self._total, self._num_ended = status.num_open, 0
        self._seconds: dict[str, list[float]] = {kind: [mean] for kind, mean in status.seconds.items()}
        self._open: Counter[str] = Counter(status.units[key].kind for key in (*status.failed, *status.missing))
        self._all = bar.add_task("units", total=self._total, text="") if bar is not None else None
        self._running: dict[str, TaskID] = {}
        self._started = time.monotonic()

    @override
    def started(self, job: Job) -> None:
        if self._bar is not None:
            self._running[job.key] = self._bar.add_task(f"  {escape(job.title)}", total=1.0, text="")

    @override
    def advanced(self, job: Job, fraction: float, text: str) -> None:
        if self._bar is not None and job.key in self._running:
            self._bar.update(self._running[job.key], completed=fraction, text=text)

    @override
    def stopped(self, job: Job) -> None:
        if self._bar is not None and job.key in self._running:
            self._bar.remove_task(self._running.pop(job.key))

    @override
    def ended(self, job: Job, seconds: float, error: str | None) -> None:
        self._num_ended += 1
        self._open[job.kind] -= 1
        if error is None:
            self._seconds.setdefault(job.kind, []).append(seconds)
        if self._bar is not None and self._all is not None:
            self._bar.remove_task(self._running.pop(job.key))
            self._bar.update(self._all, advance=1, text=self._left())
            if error is not None:
                self._bar.console.print(f"failed: {job.title}: {error}", style="red", markup=False, highlight=False)
        elif not self._quiet:
            what = f"{seconds:.1f} s" if error is None else f"failed: {error}"
            typer.echo(f"[{self._num_ended}/{self._total}] {job.title}: {what}{self._left(', ')}", err=True)

    def _left(self, before: str = "") -> str:
        """The time that the open units will take, once one of each kind has ended."""
        if any(number > 0 and not self._seconds.get(kind) for kind, number in self._open.items()):
            return ""
        means = {kind: sum(values) / len(values) for kind, values in self._seconds.items()}
        left = sum(means[kind] * number for kind, number in self._open.items() if number > 0)
        return f"{before}about {_duration(left / self._jobs)} left" if left else ""


@contextmanager
def _view(status: "Status", jobs: int, *, quiet: bool) -> Iterator[_View]:
    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield _View(status, jobs, None, quiet=quiet)
        return
    columns: tuple[Any, ...] = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[text]}"),
    )
    with Progress(*columns, console=console) as bar:
        yield _View(status, jobs, bar, quiet=quiet)
