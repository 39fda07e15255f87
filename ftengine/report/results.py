"""The report's part on evaluations: means with intervals, paired comparison, every volume."""

from collections.abc import Mapping, Sequence
from html import escape
from statistics import fmean
from typing import Any

from ftengine.evaluation.statistics import paired_tests
from ftengine.report.charts import Line, Strip, scatter_chart, strip_chart
from ftengine.report.data import ReportData
from ftengine.report.page import (
    NONE,
    details,
    missing,
    note,
    number,
    percent,
    table,
)
from ftengine.report.run_folder import figure, mapping
from ftengine.report.scores import Scores

_MANY_CASES = 24  # from which the table of cases is folded

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


def results(data: ReportData) -> str:
    """The part as HTML; where no evaluation was given, how to make one."""
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
