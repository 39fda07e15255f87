"""The report: one HTML file on training runs and evaluations. Curves, quality control, cases with contours, speed, configuration.

``ReportData`` is what there is to show; a part for which nothing was given, or whose files are broken, says so. ``page`` makes the file.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from ftengine.errors import ConfigError
from ftengine.evaluation import calibration as shown_calibration
from ftengine.evaluation.charts import Line, Strip, heat_chart, line_chart, scatter_chart, strip_chart
from ftengine.evaluation.figures import PaintedFigure, glance, key_of_lines
from ftengine.evaluation.page import (
    NONE,
    Section,
    details,
    document,
    missing,
    note,
    number,
    percent,
    preformatted,
    table,
    tiles,
)
from ftengine.evaluation.preview import Tile
from ftengine.evaluation.run_folder import RunLog, figure, mapping
from ftengine.evaluation.scores import Scores, tumor_classes
from ftengine.evaluation.statistics import paired_tests
from ftengine.evaluation.svg_panels import data_uri
from ftengine.files import write_text_whole
from ftengine.quality.calibrate import Calibration

_MANY_CASES = 24  # from which the table of cases is folded
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_TENTHS = range(1, 11)
# figures of an evaluation's summary: (key, heading, format), shown where at least one class has them
_SUMMARY: tuple[tuple[str, str, str], ...] = (
    ("dice", "Dice", "{:.3f}"),
    ("hd95_mm", "HD95, mm", "{:.1f}"),
    ("surface_dice", "surface Dice", "{:.3f}"),
    ("num_volumes_with_truth", "volumes", "{:.0f}"),
    ("sensitivity", "sensitivity", "{:.3f}"),
    ("specificity", "specificity", "{:.3f}"),
    ("precision", "precision", "{:.3f}"),
    ("f1", "F1", "{:.3f}"),
)


@dataclass(frozen=True)
class Introduction:
    """What a reader should know first. notice: what the data are; is_quick: the run was too short to compare anything; steps: what was
    done, a sentence each; stage_seconds: duration of each stage, in order.
    """

    notice: str = ""
    quick: str = ""
    steps: Sequence[str] = ()
    stage_seconds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class ReportData:
    """What a report shows; all texts are escaped when written.

    runs: of training, as ``read_run`` gives them. evaluations: the first is what the others are compared with. cases: figures of
    ``case_figures``; case_notes: why some are not drawn. tiles, painted: painted tumours. calibration: of the judge. created: when and by
    which version, a text.
    """

    title: str
    runs: Sequence[RunLog] = ()
    evaluations: Sequence[Scores] = ()
    cases: Sequence[str] = ()
    case_notes: Sequence[str] = ()
    tiles: Sequence[Tile] = ()
    painted: Sequence[PaintedFigure] = ()
    calibration: Calibration | None = None
    introduction: Introduction = field(default_factory=Introduction)
    created: str = ""

    @property
    def classes(self) -> list[str]:
        """The tumour classes of the evaluations."""
        return tumor_classes(list(dict.fromkeys(name for scores in self.evaluations for name in scores.classes)))

    @property
    def painting_run(self) -> RunLog | None:
        """The last run that trained a segmenter with painted tumours."""
        painting = [run for run in self.runs if run.keys("mix/") and run.keys("qc/pass_rate")]
        return painting[-1] if painting else None


def write_report(path: Path, data: ReportData) -> None:
    """Write the report whole as one HTML file (UTF-8); its folder is made. Raises ConfigError where a run's picture is no PNG file."""
    write_text_whole(path, page(data), durable=False)


def page(data: ReportData) -> str:
    """The report as HTML."""
    what = [
        f"{len(items)} {noun}{'' if len(items) == 1 else 's'}"
        for items, noun in ((data.runs, "training run"), (data.evaluations, "evaluation"))
        if items
    ]
    line = "; ".join([*([data.created] if data.created else []), *what])
    lead = f'<p class="kind">ftengine report</p><h1>{escape(data.title)}</h1><p class="line">{escape(line)}</p>'
    sections = [
        Section("overview", "Overview", _overview(data)),
        Section("results", "Results", _results(data)),
        Section("cases", "Worst and best cases", _cases(data)),
        Section("painted", "Painted tumours", _painted(data)),
        Section("quality", "Quality control", _quality(data)),
        Section("training", "Training", _training(data)),
        Section("speed", "Speed", _speed(data)),
        Section("setup", "Configuration and versions", _setup(data)),
    ]
    return document(data.title, lead, sections)


# ---- overview ----


def _overview(data: ReportData) -> str:
    given = data.introduction
    parts = []
    if given.notice:
        parts.append(note(f"<strong>What the data are.</strong> {escape(given.notice)}", "warning"))
    if given.quick:
        parts.append(note(escape(given.quick), "warning"))
    parts.append(tiles(_key_figures(data)))
    if given.steps:
        parts.append(
            f'<h3>What was done</h3><ol class="steps">{"".join(f"<li>{escape(step)}</li>" for step in given.steps)}</ol>'
        )
    for run in data.runs:
        parts += [note(f"<strong>{escape(run.name)}.</strong> {escape(text)}", "warning") for text in run.notes]
        parts += [
            note(f"<strong>{escape(run.name)}</strong> warned: {escape(str(text))}", "warning")
            for text in _list(mapping(run.result).get("warnings"))
        ]
    return "".join(parts) or missing("Nothing was given to report on.")


def _key_figures(data: ReportData) -> Iterator[tuple[str, str, str]]:
    """What a reader looks for first, of the last evaluation and the last run."""
    for name in data.classes if data.evaluations else ():
        last, first = data.evaluations[-1], data.evaluations[0]
        dice, before = last.figure(name, "dice"), first.figure(name, "dice")
        if dice is None:
            continue
        bounds = last.interval(name, "dice")
        remark = f"mean of {len(last.of_class(name))} volumes" + (
            f", {bounds[0]:.2f} to {bounds[1]:.2f}" if bounds else ""
        )
        if last is not first and before is not None:
            remark += f"; {first.name}: {before:.3f}"
        yield f"Dice, {name}", number(dice), remark
        sensitivity, specificity = (last.figure(name, key) for key in ("sensitivity", "specificity"))
        if sensitivity is not None:
            of_healthy = "no healthy volume" if specificity is None else f"specificity {specificity:.2f}"
            yield f"Sensitivity, {name}", number(sensitivity, "{:.2f}"), f"volumes; {of_healthy}"
    painting = data.painting_run
    if painting is not None:
        _, rates = painting.series("qc/pass_rate")
        threshold = figure(painting.setting("qc", "threshold"))
        asked = "no threshold" if threshold is None else f"P at least {threshold:g}"
        yield "Painted tumours that passed", percent(rates[-1]), f"{asked}; {painting.name}"
    last_run = next((run for run in reversed(data.runs) if run.metrics), None)
    if last_run is not None:
        waited = last_run.weighted("loader/wait_fraction")
        if waited is not None:
            yield "Training waited for data", percent(waited), last_run.name
        best = mapping(mapping(last_run.result).get("best"))
        if figure(best.get("dice")) is not None:
            yield (
                "Best validation Dice",
                number(figure(best.get("dice"))),
                f"after {figure(best.get('step')) or 0:.0f} steps",
            )


# ---- results ----


def _results(data: ReportData) -> str:
    if not data.evaluations:
        return missing(
            "No evaluation was given, so there are no scores. Make one and name it:",
            "ftengine evaluate CKPT STORE --json > scores.json; ftengine report RUN --evaluation scores.json",
        )
    parts = [_summary_table(data.evaluations), _lesion_table(data.evaluations)]
    sentences = [
        _comparison(data.evaluations[0], other, name) for other in data.evaluations[1:] for name in data.classes
    ]
    parts += [f"<p>{sentence}</p>" for sentence in sentences if sentence]
    parts += [_volume_by_volume(data.evaluations, name) for name in data.classes]
    for scores in data.evaluations:
        if scores.num_left_out:
            parts.append(
                note(
                    f"<strong>{escape(scores.name)}</strong>: {scores.num_left_out} volumes were left out, as nobody annotated tumours in them."
                )
            )
        if scores.failed:
            rows = [[escape(case), escape(reason)] for case, reason in scores.failed.items()]
            parts.append(table(f"{scores.name}: files that could not be scored", ["File", "Reason"], rows, texts=2))
    return "".join(parts)


def _summary_table(evaluations: Sequence[Scores]) -> str:
    classes = list(dict.fromkeys(name for scores in evaluations for name in scores.classes))
    shown = [c for c in _SUMMARY if any(s.figure(name, c[0]) is not None for s in evaluations for name in classes)]
    rows = [
        [escape(name), escape(scores.name), *(_with_interval(scores, name, key, style) for key, _, style in shown)]
        for name in classes
        for scores in evaluations
        if name in scores.classes
    ]
    caption = (
        "Mean over the volumes that hold the class; sensitivity, specificity, precision and F1 count volumes, not voxels, and any overlap is a hit. "
        f"Small: {evaluations[0].confidence:.0%} confidence interval, where there is one."
    )
    return table(caption, ["Class", "Evaluation", *(heading for _, heading, _ in shown)], rows, texts=2)


def _with_interval(scores: Scores, name: str, key: str, style: str) -> str:
    """A number as HTML, and below it its confidence interval."""
    bounds = scores.interval(name, key)
    shown = number(scores.figure(name, key), style)
    if bounds is None:
        return shown
    coarse = "{:.2f}" if style == "{:.3f}" else "{:.0f}"
    return f'{shown}<span class="interval">{number(bounds[0], coarse)} to {number(bounds[1], coarse)}</span>'


def _lesion_table(evaluations: Sequence[Scores]) -> str:
    """Detection of single lesions, where the evaluations counted them."""
    rows = []
    for scores in evaluations:
        for name in scores.classes:
            lesions = mapping(mapping(scores.summary.get(name)).get("lesions"))
            if not lesions:
                continue
            sizes = mapping(lesions.get("by_size"))
            rows.append(
                [
                    escape(name),
                    escape(scores.name),
                    *(_found(mapping(row)) for row in (lesions, sizes.get("small"), sizes.get("large"))),
                    number(figure(lesions.get("precision"))),
                    number(figure(lesions.get("f1"))),
                    number(figure(lesions.get("false_positives_per_volume")), "{:.2f}"),
                ]
            )
    header = [
        "Class",
        "Evaluation",
        "found",
        "small, found",
        "large, found",
        "precision",
        "F1",
        "false alarms a volume",
    ]
    return table("Single lesions: connected parts, whatever volume they lie in.", header, rows, texts=2) if rows else ""


def _found(row: Mapping[str, Any]) -> str:
    found, total = (figure(row.get(key)) for key in ("num_found", "num_truth"))
    if found is None or not total:
        return NONE
    return f'{percent(found / total)}<span class="interval">{found:,.0f} of {total:,.0f}</span>'


def _comparison(first: Scores, second: Scores, name: str) -> str:
    """A sentence on the paired Dice of two evaluations, as HTML; it counts, and claims no significance."""
    before, after = first.of_class(name), second.of_class(name)
    both = [case for case in before if case in after]
    if not both:
        return ""
    better = sum(after[case] > before[case] for case in both)
    worse = sum(after[case] < before[case] for case in both)
    tests = paired_tests([after[case] for case in both], [before[case] for case in both])
    said = [
        f"{test} p = {value:.3g}"
        for test, value in (("paired t-test", tests.t_pvalue), ("Wilcoxon", tests.wilcoxon_pvalue))
        if value is not None
    ]
    bounds = tests.interval
    if bounds is not None and bounds.low is not None and bounds.high is not None:
        said.insert(0, f"95% interval {number(bounds.low, '{:+.3f}')} to {number(bounds.high, '{:+.3f}')}")
    in_brackets = f" ({'; '.join(said)})" if said else ""
    return (
        f"On the {len(both)} volume{'s' if len(both) > 1 else ''} with {escape(name)}, the Dice of <q>{escape(second.name)}</q> is higher than that of "
        f"<q>{escape(first.name)}</q> on {better} and lower on {worse}; the mean difference is {number(tests.mean_difference, '{:+.3f}')}"
        f"{in_brackets}. This compares two trained networks, not two methods: another seed can give another difference."
    )


def _volume_by_volume(evaluations: Sequence[Scores], name: str) -> str:
    """Dice of a class in every volume: the distribution, and the numbers."""
    chart, numbers = _strips(evaluations, name), _case_table(evaluations, name)
    if not chart:
        return ""
    charts = f"<div>{chart}{_over_size(evaluations, name)}</div>"
    return f'<h3>{escape(name)}, volume by volume</h3><div class="side">{charts}{numbers}</div>'


def _over_size(evaluations: Sequence[Scores], name: str) -> str:
    """Dice over the diameter of the volume's largest true lesion, where the evaluations measured it."""
    groups = []
    for style, scores in enumerate(evaluations, start=1):
        dice = scores.of_class(name)
        points = [(mm, dice[case]) for case in dice if (mm := scores.diameter_mm.get(case, {}).get(name)) is not None]
        if points:
            groups.append(Line(scores.name, [x for x, _ in points], [y for _, y in points], 1 + (style - 1) % 4))
    if not groups:
        return ""
    alt = f"Dice of {name} of each volume over the diameter of its largest true lesion. " + " ".join(
        f"{group.name}: {len(group.x)} volumes, lesions of {min(group.x):.0f} to {max(group.x):.0f} mm."
        for group in groups
    )
    chart = scatter_chart(groups, x_label="largest true lesion, mm", alt=alt, y_range=(-0.03, 1.03))
    return f'<figure class="card"><h4>Dice over size</h4>{chart}</figure>'


def _strips(evaluations: Sequence[Scores], name: str) -> str:
    strips = [
        Strip(scores.name, list(dice.values()), list(dice)) for scores in evaluations if (dice := scores.of_class(name))
    ]
    if not strips:
        return ""
    alt = f"Dice of {name} for every volume. " + " ".join(
        f"{s.name}: {len(s.values)} volumes, mean {fmean(s.values):.3f}, lowest {min(s.values):.3f}, highest {max(s.values):.3f}."
        for s in strips
    )
    chart = strip_chart(strips, x_label=f"Dice of {name}", alt=alt)
    caption = "A dot is a volume that holds the class; the box is the middle half, the bar the mean."
    return f'<figure class="card">{chart}<figcaption>{caption}</figcaption></figure>'


def _case_table(evaluations: Sequence[Scores], name: str) -> str:
    dice = [scores.of_class(name) for scores in evaluations]
    cases = list(dict.fromkeys(case for of_one in dice for case in of_one))
    if not cases:
        return ""
    rows = []
    for case in cases:
        values = [of_one.get(case) for of_one in dice]
        differences = [None if v is None or values[0] is None else v - values[0] for v in values[1:]]
        rows.append([escape(case), *(number(v) for v in values), *(number(d, "{:+.3f}") for d in differences)])
    header = ["Volume", *(s.name for s in evaluations), *_difference_headings([s.name for s in evaluations])]
    made = table(f"Dice of {name} in each volume that holds it.", header, rows)
    return details(f"Numbers of all {len(cases)} volumes", made) if len(cases) > _MANY_CASES else made


def _difference_headings(names: Sequence[str]) -> list[str]:
    """Column headings of the differences to the first; a name only where there are several."""
    return ["difference"] if len(names) == 2 else [f"{name}: difference" for name in names[1:]]


# ---- pictures ----


def _cases(data: ReportData) -> str:
    notes = "".join(note(escape(text), "missing") for text in data.case_notes)
    if not data.cases:
        return notes or missing(
            "No case is drawn: name the store and what was predicted.",
            "ftengine report RUN --evaluation scores.json --store STORE --checkpoint CKPT",
        )
    return key_of_lines(painted=False) + _VIEW + "".join(data.cases) + notes


def _painted(data: ReportData) -> str:
    if not data.tiles and not data.painted:
        return missing(
            "No painted tumour is drawn: name the store, and the generator and the judge where there are some.",
            "ftengine report RUN --store STORE --synth G.pt --judge S.pt",
        )
    parts = [key_of_lines(painted=True), _VIEW]
    if data.tiles:
        kept = sum(tile.info.passed for tile in data.tiles)
        window = "; ".join(dict.fromkeys(f"{tile.info.organ}: {tile.window}" for tile in data.tiles))
        parts.append(
            f"<h3>At a glance</h3><p>{len(data.tiles)} tumours in the order of the size classes, {kept} kept; axial slices, {escape(window)}.</p>{glance(data.tiles)}"
        )
    if data.painted:
        parts.append("<h3>In three planes</h3>" + "".join(figure.html for figure in data.painted))
    return "".join(parts)


# ---- quality control ----


def _quality(data: ReportData) -> str:
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
        _by_size(run) or _curve(run, run.keys("generator/contrast"), "tanh(G) inside M, mean and deviation"),
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


# ---- training and speed ----


def _training(data: ReportData) -> str:
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
        _curve(run, run.keys("loss"), "Loss"),
        _curve(run, run.keys("learning_rate"), "Learning rate"),
        _validation(run),
    ]
    return f'{heading}<div class="charts">{"".join(charts)}</div>{_pictures(run)}'


def _curve(run: RunLog, keys: Sequence[str], title: str) -> str:
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


def _speed(data: ReportData) -> str:
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


# ---- configuration ----


def _setup(data: ReportData) -> str:
    if not data.runs:
        return missing("No run was given, so there is no configuration to show.")
    names = list(dict.fromkeys(name for run in data.runs for name in mapping(run.document.get("versions"))))
    rows = [
        [escape(name), *(escape(str(mapping(run.document.get("versions")).get(name, ""))) or NONE for run in data.runs)]
        for name in names
    ]
    parts = [
        table("Versions", ["Part", *(run.name for run in data.runs)], rows, texts=1 + len(data.runs))
        if rows
        else missing("No run says its versions.")
    ]
    for run in data.runs:
        given = mapping(run.document.get("given"))
        inside = (
            table(
                f"{run.name}: files and options",
                ["Option", "Value"],
                [[escape(k), escape(str(v))] for k, v in given.items()],
                texts=2,
            )
            if given
            else ""
        )
        yaml = (
            preformatted(f"Configuration of {run.name}", run.config_yaml)
            if run.config_yaml
            else missing("config.yaml is not there.")
        )
        parts.append(details(f"{run.name}: configuration", inside + yaml))
    return "".join(parts)


def _list(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list) else []


_VIEW = (
    "<p>Radiological view: R, the patient's right, is on the left of axial and coronal pictures, and anterior on the left of sagittal ones. "
    "Bars are millimetres; a voxel is shown as it is.</p>"
)
