"""The report: one HTML file on training runs and evaluations. Curves, quality control, cases with contours, speed, configuration.

``ReportData`` is what there is to show; a part for which nothing was given, or whose files are broken, says so.
"""

from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ftengine.files import write_text_whole
from ftengine.report.data import ReportData
from ftengine.report.figures import glance, key_of_lines
from ftengine.report.page import (
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
from ftengine.report.quality import quality
from ftengine.report.results import results
from ftengine.report.run_folder import figure, mapping
from ftengine.report.training import speed, training


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
        Section("results", "Results", results(data)),
        Section("cases", "Worst and best cases", _cases(data)),
        Section("painted", "Painted tumours", _painted(data)),
        Section("quality", "Quality control", quality(data)),
        Section("training", "Training", training(data)),
        Section("speed", "Speed", speed(data)),
        Section("setup", "Configuration and versions", _setup(data)),
    ]
    return document(data.title, lead, sections)


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
