"""The report's part on quality control: how many painted tumours passed, and what the judge sees of real ones."""

from html import escape
from typing import Any

import numpy as np

from ftengine.pictures import calibration as shown_calibration
from ftengine.quality.calibrate import Calibration
from ftengine.report.charts import Line, heat_chart, line_chart, scatter_chart
from ftengine.report.data import ReportData
from ftengine.report.page import (
    NONE,
    missing,
    number,
    percent,
    table,
)
from ftengine.report.run_folder import RunLog, figure, mapping
from ftengine.report.training import curve

_TENTHS = range(1, 11)


def quality(data: ReportData) -> str:
    """The part as HTML: each run that painted, then the judge's calibration."""
    parts = [
        (
            "<p>A painted tumour passes where the judge, a frozen segmenter, sees enough of it as tumour (P &ge; T); a patch that fails goes to "
            "training as it was. In a run that trains the generator, P is what it is trained for.</p>"
        )
    ]
    shown = [made for run in data.runs if (made := _run_quality(run))]
    parts += shown or [missing("No run that was given painted tumours." if data.runs else "No run was given.")]
    if data.calibration is None:
        parts.append(
            "<h3>What the judge sees of real tumours</h3>"
            + missing(
                "The judge was not calibrated here:",
                "ftengine qc calibrate STORE --judge S.pt --out DIR; ftengine report RUN --calibration DIR/calibration.json",
            )
        )
    else:
        parts.append(_calibration(data.calibration))
    return "".join(parts)


def _run_quality(run: RunLog) -> str:
    steps, rates = run.series("qc/pass_rate")
    if not steps:
        return ""
    threshold = figure(run.setting("qc", "threshold"))
    lines = [Line("since the start" if run.keys("mix/") else "since the last line", steps, rates)]
    window_steps, window_rates = run.series("qc/window_pass_rate")
    if window_steps:
        lines.append(Line("of the last patches (qc.window)", window_steps, window_rates))
    least = figure(run.setting("qc", "min_pass_rate"))
    ends = f"from {rates[0]:.1%} to {rates[-1]:.1%}"
    chart = line_chart(
        lines,
        x_label="step",
        alt=f"{run.name}: share of painted tumours that passed, {ends} over {steps[-1]:.0f} steps.",
        y_range=(0.0, 1.0),
        limit=None if not least else (least, "least allowed"),
    )
    charts = [
        f"<figure><h4>Pass rate</h4>{chart}<figcaption>{escape(ends[0].upper() + ends[1:])}.</figcaption></figure>",
        _p_over_time(run, threshold),
        _by_size(run) or curve(run, run.keys("generator/contrast"), "tanh(G) inside M, mean and deviation"),
    ]
    return f'<h3>{escape(run.name)}</h3><div class="charts">{"".join(charts)}</div>{_quality_tables(run)}'


def _by_size(run: RunLog) -> str:
    """Pass rate of each size class since the start of the run."""
    prefix = "qc/pass_rate/size/"
    lines = [Line(key.removeprefix(prefix), *run.series(key)) for key in run.keys(prefix)]
    if not lines:
        return ""
    ends = "; ".join(f"{line.name} {line.y[-1]:.1%}" for line in lines)
    alt = f"{run.name}: share of painted tumours that passed since the start, by size class; at the end {ends}."
    chart = line_chart(lines, x_label="step", alt=alt, y_range=(0.0, 1.0))
    return f"<figure><h4>Pass rate by size class</h4>{chart}<figcaption>{escape(ends)}.</figcaption></figure>"


def _p_over_time(run: RunLog, threshold: float | None) -> str:
    keys = [f"qc/p_tenth/{n}" for n in _TENTHS]
    lines = [line for line in run.metrics if all(key in line for key in keys)]
    if not lines:
        return ""
    shares = np.array([[line[key] for key in keys] for line in lines])
    steps = [line["step"] + 1 for line in lines]
    first, last = (float((row * (np.arange(10) + 0.5) / 10).sum()) for row in (shares[0], shares[-1]))
    alt = f"{run.name}: distribution of P over the run; its mean is about {first:.2f} at the first logged step and {last:.2f} at the last."
    chart = heat_chart(steps, shares, x_label="step", y_label="P", alt=alt, limit=threshold)
    caption = "Share of the painted tumours in each tenth of P, the darker the more; a column is a part of the run."
    return f"<figure><h4>Distribution of P</h4>{chart}<figcaption>{caption}</figcaption></figure>"


def _quality_tables(run: RunLog) -> str:
    quality = mapping(mapping(run.result).get("quality"))
    both = mapping(quality.get("by_organ_and_size"))
    if both:
        rows = [
            [escape(organ), escape(size), *_counts(row)]
            for organ, sizes in both.items()
            for size, row in mapping(sizes).items()
        ]
        tables = [table("Painted tumours by organ and size class", ["Organ", "Size class", *_COUNTS], rows, texts=2)]
        datasets = mapping(quality.get("by_dataset"))
        tables.append(
            table(
                "By data set that was painted on",
                ["Data set", *_COUNTS],
                [[escape(n), *_counts(r)] for n, r in datasets.items()],
            )
        )
        return f'<div class="side">{"".join(tables)}</div>'
    prefix = "qc/pass_rate/"
    rates = {key.removeprefix(prefix): run.series(key)[1][-1] for key in run.keys(prefix)}
    if not rates:
        return ""
    rows = [
        [escape(name.split("/", 1)[0]), escape(name.split("/", 1)[-1]), percent(rate)] for name, rate in rates.items()
    ]
    return table("Pass rates so far; counts come when the run ends", ["Kind", "Name", "pass rate"], rows, texts=2)


_COUNTS = ("painted", "passed", "pass rate", "draws a patch")


def _counts(row: Any) -> list[str]:
    painted, passed, draws = (figure(mapping(row).get(key)) or 0.0 for key in ("painted", "passed", "draws"))
    return [
        f"{painted:,.0f}",
        f"{passed:,.0f}",
        percent(passed / painted if painted else None),
        number(draws / painted if painted else None, "{:.2f}"),
    ]


def _calibration(given: Calibration) -> str:
    """What the judge sees of real tumours beside painted ones: table, pictures for light and dark pages, what follows."""
    rows = [
        [escape(row[0]), *(NONE if cell == "-" else escape(cell).replace("-", "&minus;") for cell in row[1:])]
        for row in shown_calibration.table(given)
    ]
    made = table(shown_calibration.heading(given), shown_calibration.HEADER, rows)
    charts = [_shares(given, size) for size in (None, *given.sizes)]
    charts.append(_contrast(given))
    sentences = "".join(f"<p>{escape(line)}</p>" for line in shown_calibration.sentences(given))
    how = (
        "<p>Each curve falls from 1: the share of tumours of which the judge sees at least P. Where the painted curve lies far above the real one, "
        "painted tumours are easier for the judge than real ones.</p>"
    )
    return (
        f'<h3>What the judge sees of real tumours</h3>{sentences}{made}{how}<div class="charts">{"".join(charts)}</div>'
    )


def _shares(given: Calibration, size: str | None) -> str:
    """The share of tumours with at least P, over P, of a size class or of all."""
    limits = np.linspace(0.0, 1.0, 101)
    lines = [
        Line(
            f"{origin} (n = {len(values)})",
            limits.tolist(),
            shown_calibration.shares_over(values, limits).tolist(),
            style,
        )
        for style, origin in enumerate(shown_calibration.ORIGINS, start=1)
        if len(values := given.proportions(origin, size))
    ]
    if not lines:
        return ""
    title = "All tumours" if size is None else f"Size class {size}"
    threshold = shown_calibration.shown_threshold(given)
    middle = "; ".join(f"{line.name}: {line.y[50]:.0%} with P of at least 0.5" for line in lines)
    chart = line_chart(
        lines,
        x_label="P",
        alt=f"{title}, {middle}.",
        x_range=(0.0, 1.0),
        y_range=(0.0, 1.05),
        x_limit=None if threshold is None else (threshold, f"T = {threshold:g}"),
    )
    return f"<figure><h4>{escape(title)}</h4>{chart}</figure>"


def _contrast(given: Calibration) -> str:
    """P over the contrast of each tumour."""
    groups = []
    for style, origin in enumerate(shown_calibration.ORIGINS, start=1):
        points = shown_calibration.contrast_points(given, origin)
        if points:
            groups.append(Line(origin, [x for x, _ in points], [y for _, y in points], style))
    if not groups:
        return ""
    alt = "P of each tumour over its contrast, tumour minus the ring around it, in HU. " + " ".join(
        f"{group.name}: {len(group.x)} tumours, from {min(group.x):.0f} to {max(group.x):.0f} HU." for group in groups
    )
    chart = scatter_chart(groups, x_label="tumour minus ring, HU", alt=alt, y_range=(-0.05, 1.05))
    return f"<figure><h4>P over contrast</h4>{chart}</figure>"
