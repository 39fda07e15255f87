"""The report's parts on training (curves, validation, pictures) and on speed (the stall meter)."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from ftengine.errors import ConfigError
from ftengine.pictures.svg_panels import data_uri
from ftengine.report.charts import Line, line_chart
from ftengine.report.data import ReportData
from ftengine.report.page import (
    NONE,
    details,
    missing,
    number,
    percent,
    table,
)
from ftengine.report.run_folder import RunLog, mapping

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def training(data: ReportData) -> str:
    """Curves and pictures of each run, as HTML."""
    if not data.runs:
        return missing("No run was given:", "ftengine report RUN")
    return "".join(_run_training(run) for run in data.runs)


def _run_training(run: RunLog) -> str:
    kind = {"segmenter": "Segmenter", "generator": "Generator"}.get(run.kind, "Run")
    wanted = "" if run.steps_wanted is None else f" of {run.steps_wanted:,}"
    heading = f"<h3>{escape(run.name)}</h3><p>{kind}, {run.steps_done:,}{wanted} steps.</p>"
    if not run.keys("loss"):
        return heading + missing("No loss was logged.") + _pictures(run)
    charts = [
        curve(run, run.keys("loss"), "Loss"),
        curve(run, run.keys("learning_rate"), "Learning rate"),
        _validation(run),
    ]
    return f'{heading}<div class="charts">{"".join(charts)}</div>{_pictures(run)}'


def curve(run: RunLog, keys: Sequence[str], title: str) -> str:
    """A figure of logged quantities over steps, as HTML; empty where none was logged."""
    lines = [Line(key, *run.series(key)) for key in keys]
    if not lines:
        return ""
    ends = "; ".join(f"{line.name} from {line.y[0]:.3g} to {line.y[-1]:.3g}" for line in lines)
    alt = f"{title} of {run.name} over {run.steps_done:,} steps: {ends}."
    chart = line_chart(lines, x_label="step", alt=alt)
    return f"<figure><h4>{escape(title)}</h4>{chart}<figcaption>{escape(ends)}</figcaption></figure>"


def _validation(run: RunLog) -> str:
    keys = list(dict.fromkeys(key for line in run.validations for key in line if key.startswith("dice/")))
    lines = [
        Line(
            key.removeprefix("dice/"),
            [line["step"] for line in run.validations if key in line],
            [line[key] for line in run.validations if key in line],
        )
        for key in keys
    ]
    if not lines:
        why = (
            ""
            if run.kind == "generator"
            else missing(
                "This run was not validated while it trained:", "ftengine train seg STORE --out RUN --val-split NAME"
            )
        )
        return f"<figure><h4>Validation Dice</h4>{why}</figure>" if why else ""
    best = max(run.validations, key=lambda line: line.get("dice", 0.0))
    ends = f"best mean {best.get('dice', 0.0):.3f} after {best['step']:.0f} steps"
    chart = line_chart(lines, x_label="step", alt=f"Validation Dice of {run.name}: {ends}.", y_range=(0.0, 1.0))
    return f"<figure><h4>Validation Dice</h4>{chart}<figcaption>{escape(ends[0].upper() + ends[1:])}.</figcaption></figure>"


def _pictures(run: RunLog) -> str:
    """PNG sheets that the run itself drew."""
    if not run.pictures:
        return ""
    figures = []
    for path in run.pictures:
        label = escape(
            f"{run.name}, {path.parent.name}, {path.name}: painted patch in three planes, drawn while the run trained"
        )
        figures.append(
            f'<figure class="file"><div class="scroll" tabindex="0" role="region" aria-label="{label}">'
            f'<img src="{data_uri(_png(path))}" alt="{label}"></div><figcaption>{escape(path.parent.name)}, {escape(path.name)}</figcaption></figure>'
        )
    return details(f"Pictures of {run.name}, {run.pictures[0].parent.name}", "".join(figures))


def _png(path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"picture {path}: cannot be read ({error.strerror}); want a PNG file.") from error
    if not content.startswith(_PNG_SIGNATURE):
        raise ConfigError(f"picture {path}: is not a PNG file; want what ftengine drew. Remove it from the run.")
    return content


def speed(data: ReportData) -> str:
    """How long training waited, what its slowest part was, and how long each stage took, as HTML."""
    parts = []
    timed = [run for run in data.runs if sum(run.line_seconds()) > 0]
    if timed:
        header = ["Run", "slowest part", "waited for data", "patches / s", "step, s", "training, s"]
        parts.append(
            table(
                "Stall meter: how long training waited for its batches.",
                header,
                [_speed_row(run) for run in timed],
                texts=2,
            )
        )
        parts.append(f'<div class="side">{"".join(_stages(run) for run in timed)}</div>')
        for run in timed:
            sentence = mapping(mapping(run.result).get("stall")).get("sentence")
            if sentence:
                parts.append(f"<p><strong>{escape(run.name)}</strong>: {escape(str(sentence))}.</p>")
    seconds = data.introduction.stage_seconds
    if seconds:
        rows = [[escape(name), f"{value:.1f}"] for name, value in seconds.items()]
        rows.append(["all stages", f"{sum(seconds.values()):.1f}"])
        parts.append(table("Duration of the stages.", ["Stage", "seconds"], rows))
    return "".join(parts) or missing("No run that was given has logged its speed.")


def _speed_row(run: RunLog) -> list[str]:
    seconds = sum(run.line_seconds())
    step_s = seconds / (run.metrics[-1]["step"] + 1)
    samples = run.samples_per_step
    slowest = mapping(mapping(run.result).get("stall")).get("slowest")
    return [
        escape(run.name),
        escape(str(slowest)) if slowest else NONE,
        percent(run.weighted("loader/wait_fraction")),
        number(samples / step_s if samples is not None and step_s > 0 else None, "{:.1f}"),
        number(step_s),
        number(seconds, "{:,.0f}"),
    ]


def _stages(run: RunLog) -> str:
    """The parts of the way from the store to the weights, and how much of the time each was at work."""
    prefix = "loader/busy/"
    names = [key.removeprefix(prefix) for key in run.keys(prefix)]
    first_stage = next((name for name in names if name not in {"reads", "prepare"}), "")
    queues = {"prepare": "reads", first_stage: "prepared"}
    rows = [
        [
            escape(name),
            percent(run.weighted(f"{prefix}{name}")),
            number(run.weighted(f"loader/level/{queues[name]}") if name in queues else None, "{:.1f}"),
        ]
        for name in sorted(
            names, key=lambda name: ("reads", "prepare").index(name) if name in {"reads", "prepare"} else 2
        )
    ]
    waited = run.weighted("loader/wait_fraction")
    rows.append(
        [
            "training",
            percent(None if waited is None else 1.0 - waited),
            number(run.weighted("loader/level/ready"), "{:.1f}"),
        ]
    )
    return table(
        f"{run.name}: how much of the time each part worked, and how full the queue before it was.",
        ["Part", "at work", "queue before it"],
        rows,
    )
