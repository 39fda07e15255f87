"""One HTML file that says what a comparison of segmenters came to: figures, curves, pictures, configuration.

The file stands alone: pictures and styles are inside, there is no script, and its content security policy lets a browser load nothing
from anywhere. Every text from outside (case names come from files, and files from strangers) is escaped before it goes in.
"""

import base64
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from statistics import fmean

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ftengine.errors import ConfigError
from ftengine.evaluation import calibration as shown_calibration
from ftengine.evaluation.pictures import Color, class_color, png_bytes, printable
from ftengine.quality.calibrate import Calibration
from ftengine.training.run import read_metrics

PHANTOM_NOTICE = (
    "All CT in this report are synthetic phantoms, drawn from formulas and made to be learnable in minutes. They show no patient. The "
    "figures say that the engine works from end to end on this machine; nothing here says how well it works on patients."
)
QUICK_NOTICE = (
    "This was a quick run: a few volumes and a few training steps, to check that all parts work. The networks have hardly learned "
    "anything, so do not compare the Dice figures at all."
)
WHAT_THE_DEMO_DID = (
    "Drew phantom CT volumes and converted them into a store.",
    "Trained a baseline segmenter S on the few volumes whose tumours are annotated.",
    "Trained a generator G to paint tumours that S takes for real ones.",
    "Trained two students that go on from S for equally many steps. The first saw the annotated volumes alone.",
    "The second saw volumes without tumours too, into which G painted tumours while it trained; S judged each, and it saw those that passed.",
    "Predicted held-out volumes that no network had seen, and compared the predictions with their known truth.",
)

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_NONE = "&ndash;"
_MAX_CURVE_POINTS = 2000  # more than pixels; a long run's log is thinned


@dataclass(frozen=True)
class ArmResult:
    """One trained segmenter on the held-out volumes.

    dice: mean Dice by class; None where no volume holds the class. sensitivity, specificity: detection of the tumour class at the level
    of volumes (0 to 1), None without a volume to take it from. cases: Dice of the tumour class by volume, for volumes that hold it.
    """

    dice: Mapping[str, float | None]
    sensitivity: float | None
    specificity: float | None
    cases: Sequence[tuple[str, float]]


@dataclass(frozen=True)
class ReportData:
    """What a report shows. Plain values, as read from JSON; all texts are escaped when written.

    arms: by name; the first is what the others are compared with. quality: {"by_organ", "by_size" or "by_dataset": {name: {"painted",
    "passed", "draws"}}}. qc_pass_rate: of all painted patches, 0 to 1. stage_seconds: duration of each stage, in order. stall: by run,
    the keys wait_fraction, patches_per_s, median_step_s; slowest: by run, the stage that set its pace. runs: run folders with a metrics.jsonl. sheets: (caption, PNG file). quick: say that
    the run was too short to compare anything. notice: what the data are; shown first. steps: what was done, a sentence each. notes:
    further sentences for the results. calibration: of the judge, None where it was not calibrated.
    """

    title: str
    tumor_class: str
    arms: Mapping[str, ArmResult]
    quality: Mapping[str, Mapping[str, Mapping[str, float]]]
    qc_pass_rate: float | None
    stage_seconds: Mapping[str, float]
    stall: Mapping[str, Mapping[str, float]]
    runs: Mapping[str, Path]
    sheets: Sequence[tuple[str, Path]]
    config_yaml: str
    versions: Mapping[str, str]
    slowest: Mapping[str, str] = field(default_factory=dict)
    quick: bool = False
    notice: str = PHANTOM_NOTICE
    steps: Sequence[str] = WHAT_THE_DEMO_DID
    notes: Sequence[str] = ()
    calibration: Calibration | None = None


def write_report(path: Path, data: ReportData) -> None:
    """Write the report as one HTML file (UTF-8); its folder is made.

    Raises ConfigError where a sheet is not a PNG file or a run folder has no readable metrics.jsonl.
    """
    parts = [
        _head(data),
        _results(data),
        _cases(data),
        _quality(data),
        _calibration(data),
        _speed(data),
        _curves(data),
        _sheets(data),
        _origin(data),
    ]
    document = _PAGE.format(
        csp=escape(_content_security_policy()),
        title=escape(data.title),
        style=_STYLE,
        body="\n".join(part for part in parts if part),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(document, encoding="utf-8")


def _head(data: ReportData) -> str:
    quick = f'<p class="quick">{escape(QUICK_NOTICE)}</p>' if data.quick else ""
    steps = "".join(f"<li>{escape(step)}</li>" for step in data.steps)
    return (
        f"<header><h1>{escape(data.title)}</h1>"
        f'<div class="notice" role="note"><p><strong>What the data are.</strong> {escape(data.notice)}</p>{quick}</div></header>'
        f"<section><h2>What was done</h2><ol>{steps}</ol></section>"
    )


def _results(data: ReportData) -> str:
    names = list(data.arms)
    classes = list(dict.fromkeys(name for arm in data.arms.values() for name in arm.dice))
    rows: list[tuple[str, list[float | None], str]] = [
        (f"Dice, {name}", [arm.dice.get(name) for arm in data.arms.values()], "{:.3f}") for name in classes
    ]
    rows += [
        (f"Sensitivity, {data.tumor_class}", [arm.sensitivity for arm in data.arms.values()], "{:.2f}"),
        (f"Specificity, {data.tumor_class}", [arm.specificity for arm in data.arms.values()], "{:.2f}"),
    ]
    header = ["Figure", *names, *_difference_headings(names)]
    body = []
    for label, values, style in rows:
        differences = [None if value is None or values[0] is None else value - values[0] for value in values[1:]]
        cells = [_number(v, style) for v in values]
        cells += [_number(d, style.replace("{:", "{:+")) for d in differences]
        body.append([escape(label), *cells])
    table = _table(
        "Held-out volumes: mean Dice of the volumes that hold the class; sensitivity and specificity count volumes, not voxels.",
        header,
        body,
    )
    sentences = [text for name in names[1:] if (text := _comparison(data, names[0], name))]
    sentences += [escape(note) for note in data.notes]
    return f"<section><h2>Results</h2>{table}{''.join(f'<p>{s}</p>' for s in sentences)}</section>"


def _difference_headings(names: Sequence[str]) -> list[str]:
    """Column headings of the differences to the first arm; its name only where there are several."""
    return ["difference"] if len(names) == 2 else [f"{name}: difference" for name in names[1:]]


def _comparison(data: ReportData, first: str, second: str) -> str:
    """A sentence on the paired Dice of two arms, escaped; it counts, and claims no significance."""
    before, after = dict(data.arms[first].cases), dict(data.arms[second].cases)
    both = [case for case in before if case in after]
    if not both:
        return ""
    better = sum(after[case] > before[case] for case in both)
    worse = sum(after[case] < before[case] for case in both)
    change = fmean(after[case] - before[case] for case in both)
    return (
        f"On the {len(both)} held-out volume{'s' if len(both) > 1 else ''} with {escape(data.tumor_class)}, the Dice of "
        f"<q>{escape(second)}</q> is higher than that of <q>{escape(first)}</q> on {better} and lower on {worse}; the mean difference is "
        f"{_number(change, '{:+.3f}')}. One training run each is no measure of a method: another seed can give another difference."
    )


def _cases(data: ReportData) -> str:
    names = list(data.arms)
    table = {name: dict(arm.cases) for name, arm in data.arms.items()}
    cases = list(dict.fromkeys(case for name in names for case in table[name]))
    if not cases:
        return ""
    body = []
    for case in cases:
        values = [table[name].get(case) for name in names]
        differences = [None if v is None or values[0] is None else v - values[0] for v in values[1:]]
        body.append(
            [
                escape(case),
                *(_number(v, "{:.3f}") for v in values),
                *(_number(d, "{:+.3f}") for d in differences),
            ]
        )
    header = ["Volume", *names, *_difference_headings(names)]
    caption = f"Dice of {data.tumor_class} in each held-out volume that holds it."
    return f"<section><h2>Volume by volume</h2>{_table(caption, header, body)}</section>"


def _quality(data: ReportData) -> str:
    if not data.quality and data.qc_pass_rate is None:
        return ""
    titles = {
        "by_organ": ("By organ", "Organ"),
        "by_size": ("By size class", "Size class"),
        "by_dataset": ("By data set that was painted on", "Data set"),
    }
    tables = []
    for key, rows in data.quality.items():
        body = [
            [
                escape(name),
                f"{row['painted']:.0f}",
                f"{row['passed']:.0f}",
                _percent(row["passed"] / row["painted"] if row["painted"] else None),
                _number(row["draws"] / row["painted"] if row["painted"] else None, "{:.2f}"),
            ]
            for name, row in rows.items()
        ]
        title, heading = titles.get(key, (key, key))
        tables.append(_table(title, [heading, "painted", "passed", "pass rate", "draws a patch"], body))
    total = (
        ""
        if data.qc_pass_rate is None
        else f"<p>In all, {_percent(data.qc_pass_rate)} of the painted patches passed.</p>"
    )
    if data.qc_pass_rate == 0.0:
        total += "<p>So no painted tumour reached training: the student with synthesis saw none.</p>"
    return (
        "<section><h2>Quality control of painted tumours</h2>"
        "<p>A painted tumour passes where the baseline segmenter sees enough of it as tumour (P &ge; T); a failed patch goes to "
        f'training as it was.</p>{total}<div class="side">{"".join(tables)}</div></section>'
    )


def _calibration(data: ReportData) -> str:
    """What the judge sees of real tumours beside painted ones: table, pictures for light and dark pages, what follows."""
    if data.calibration is None:
        return ""
    given = data.calibration
    rows = [[escape(cell) for cell in row] for row in shown_calibration.table(given)]
    table = _table(shown_calibration.heading(given), shown_calibration.HEADER, rows)
    alt = f"Share of real and of painted tumours over P. {given.advice()}"
    dark = _data_uri(shown_calibration.draw_calibration(given, dark=True))
    light = _data_uri(shown_calibration.draw_calibration(given))
    picture = (
        f'<figure><picture class="calibration"><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{escape(alt)}"></picture>'
        "<figcaption>Each curve falls from 1: the share of tumours of which the judge sees at least P. Where the painted curve lies far above "
        "the real one, painted tumours are easier for the judge than real ones. The last panel shows P over contrast.</figcaption></figure>"
    )
    sentences = "".join(f"<p>{escape(line)}</p>" for line in shown_calibration.sentences(given))
    return f"<section><h2>What the judge sees of real tumours</h2>{sentences}{table}{picture}</section>"


def _speed(data: ReportData) -> str:
    stall = [
        [
            escape(name),
            _percent(figures.get("wait_fraction")),
            _number(figures.get("patches_per_s"), "{:.1f}"),
            _number(figures.get("median_step_s"), "{:.3f}"),
            escape(data.slowest[name]) if name in data.slowest else _NONE,
        ]
        for name, figures in data.stall.items()
    ]
    stages = [[escape(name), f"{seconds:.1f}"] for name, seconds in data.stage_seconds.items()]
    if stages:
        stages.append(["all stages", f"{sum(data.stage_seconds.values()):.1f}"])
    tables = ""
    if stall:
        header = ["Run", "waited for data", "patches / s", "median step, s", "slowest stage"]
        tables += _table("Stall meter: share of the training time spent waiting for a batch.", header, stall)
    if stages:
        tables += _table("Duration of the stages.", ["Stage", "seconds"], stages)
    return f'<section><h2>Speed</h2><div class="side">{tables}</div></section>' if tables else ""


def _curves(data: ReportData) -> str:
    figures = []
    for name, folder in data.runs.items():
        curves = _loss_curves(name, folder)
        if not curves:
            continue
        ends = "; ".join(f"{key} from {ys[0]:.3f} to {ys[-1]:.3f}" for key, (_, ys) in curves.items())
        last = max(xs[-1] for xs, _ in curves.values())
        alt = f"Loss curves of the run {name} over {last:.0f} steps: {ends}."
        figures.append(
            f"<figure>{_picture(curves, alt)}<figcaption>{escape(name)}: {escape(ends)}</figcaption></figure>"
        )
    if not figures:
        return ""
    return f'<section><h2>Training</h2><div class="side">{"".join(figures)}</div></section>'


def _loss_curves(name: str, folder: Path) -> dict[str, tuple[list[float], list[float]]]:
    """(steps, values) of every logged figure that is a loss."""
    try:
        logged = read_metrics(folder)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"run {name}: {folder / 'metrics.jsonl'} cannot be read ({error}). Leave the run out or train it again."
        ) from error
    keys = dict.fromkeys(key for line in logged for key in line if key.startswith("loss"))
    thinned = logged[:: -(-len(logged) // _MAX_CURVE_POINTS) or 1]
    return {
        key: ([line["step"] + 1 for line in thinned if key in line], [line[key] for line in thinned if key in line])
        for key in keys
    }


def _picture(curves: Mapping[str, tuple[list[float], list[float]]], alt: str) -> str:
    """A chart in four versions, of which the browser takes one: light and dark, narrow and wide."""
    sources = [
        (f"{media} and (prefers-color-scheme: dark)" if media else "(prefers-color-scheme: dark)", width, True)
        for media, width in (("(max-width: 640px)", 3.6), ("", 5.6))
    ]
    tags = [
        f'<source media="{media}" srcset="{_data_uri(_chart(curves, width, dark=dark))}">'
        for media, width, dark in [*sources, ("(max-width: 640px)", 3.6, False)]
    ]
    image = f'<img src="{_data_uri(_chart(curves, 5.6, dark=False))}" alt="{escape(alt)}">'
    return f"<picture>{''.join(tags)}{image}</picture>"


def _chart(curves: Mapping[str, tuple[list[float], list[float]]], width_in: float, *, dark: bool) -> bytes:
    """Loss over steps, one line a figure, named at the line's style and colour in a legend."""
    ink: Color = (0.88, 0.89, 0.91) if dark else (0.13, 0.14, 0.16)
    figure = Figure(figsize=(width_in, width_in * 0.6), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    figure.patch.set_alpha(0.0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0.0)
    styles = ("solid", "dashed", "dashdot", "dotted")
    colors = [class_color(v) for v in ((1, 4, 3, 5) if dark else (7, 2, 3, 5))]
    for number, (key, (steps, values)) in enumerate(curves.items()):
        style, color = styles[number % 4], colors[number % 4]
        marker = "o" if len(steps) == 1 else ""
        axes.plot(
            steps,
            values,
            color=color,
            linestyle=style,
            linewidth=1.6,
            marker=marker,
            label=printable(key).replace("$", r"\$"),
        )
    axes.set_xlabel("step", color=ink, fontsize=9)
    axes.set_ylabel("loss", color=ink, fontsize=9)
    axes.tick_params(colors=ink, labelsize=9)
    axes.grid(visible=True, color=ink, alpha=0.15, linewidth=0.6)
    for side, spine in axes.spines.items():
        spine.set_visible(side in {"left", "bottom"})
        spine.set_color(ink)
    if len(curves) > 1:
        axes.legend(fontsize=8, labelcolor=ink, frameon=False)
    return png_bytes(figure)


def _sheets(data: ReportData) -> str:
    figures = []
    for caption, path in data.sheets:
        try:
            content = path.read_bytes()
        except OSError as error:
            raise ConfigError(f"sheet {path}: cannot be read ({error.strerror}); want a PNG file.") from error
        if not content.startswith(_PNG_SIGNATURE):
            raise ConfigError(f"sheet {path}: is not a PNG file; want a sheet that ftengine drew.")
        text = escape(caption)
        figures.append(
            f'<figure><div class="wide" tabindex="0" role="region" aria-label="{text}">'
            f'<img src="{_data_uri(content)}" alt="{text}"></div><figcaption>{text}</figcaption></figure>'
        )
    if not figures:
        return ""
    hint = '<p class="hint">On a narrow screen, pictures and tables scroll sideways.</p>'
    return f"<section><h2>Pictures</h2>{hint}{''.join(figures)}</section>"


def _origin(data: ReportData) -> str:
    versions = _table("Versions", ["Part", "Version"], [[escape(k), escape(str(v))] for k, v in data.versions.items()])
    return (
        f"<section><h2>Configuration and versions</h2>{versions}"
        f'<details><summary>Configuration (YAML)</summary><pre tabindex="0">{escape(data.config_yaml)}</pre></details></section>'
    )


def _table(caption: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; caption and header are escaped here, ``rows`` are HTML already; the first cell of a row is its header."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in header)
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>{"".join(f"<td>{cell}</td>" for cell in row[1:])}</tr>' for row in rows
    )
    label = escape(caption)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{label}"><table><caption><span>{label}</span></caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _number(value: float | None, style: str) -> str:
    """A number as HTML, with a true minus; a dash where there is none."""
    if value is None:
        return _NONE
    text = style.format(value)
    if float(text) == 0.0:
        text = text.lstrip("+-")  # what rounds to nothing has no direction
    return text.replace("-", "&minus;")


def _percent(value: float | None) -> str:
    return _NONE if value is None else f"{value:.1%}"


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"


def _content_security_policy() -> str:
    """Nothing may be loaded or run; the one style sheet is allowed by its hash."""
    digest = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode("ascii")
    return f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{csp}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="referrer" content="no-referrer">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""

_STYLE = """
:root {
  color-scheme: light dark;
  --page: #fbfbfa; --card: #ffffff; --ink: #1d1f23; --soft: #565b64; --line: #d9dce1; --head: #f1f3f5;
  --notice: #fff4dc; --notice-line: #b36b00; --focus: #0072b2;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #15171a; --card: #1c1f24; --ink: #e6e8eb; --soft: #a8aeb8; --line: #363b43; --head: #24282e;
    --notice: #33290f; --notice-line: #e69f00; --focus: #56b4e9;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1200px; margin: 0 auto; padding: 16px; }
h1 { font-size: 1.8rem; line-height: 1.2; margin: 0.6em 0 0.5em; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; line-height: 1.3; margin: 2em 0 0.6em; padding-bottom: 0.25em; border-bottom: 1px solid var(--line); }
p, ol { max-width: 75ch; overflow-wrap: anywhere; }
ol { padding-left: 1.4em; }
li { margin: 0.25em 0; }
.notice { background: var(--notice); border-left: 5px solid var(--notice-line); border-radius: 4px; padding: 0.3em 1em; }
.notice p { max-width: none; }
.scroll, .wide { overflow-x: auto; }
.scroll:focus-visible, .wide:focus-visible, pre:focus-visible, summary:focus-visible { outline: 3px solid var(--focus); outline-offset: 2px; }
table { border-collapse: collapse; background: var(--card); font-variant-numeric: tabular-nums; margin: 0 0 1em; min-width: min(100%, 22rem); }
caption { text-align: left; color: var(--soft); font-size: 0.92rem; padding: 0 0 0.5em; }
caption span { display: block; position: sticky; left: 0; max-width: min(75ch, 100vw - 32px); }
th, td { padding: 0.42em 0.8em; border: 1px solid var(--line); text-align: right; }
thead th { background: var(--head); vertical-align: bottom; }
th:first-child { text-align: left; overflow-wrap: anywhere; min-width: 8.5em; max-width: 24em; }
tbody th { font-weight: 500; }
.side { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); gap: 1em 2em; align-items: start; }
figure { margin: 0 0 1.6em; min-width: 0; }
figcaption { color: var(--soft); font-size: 0.92rem; margin-top: 0.4em; overflow-wrap: anywhere; }
picture img { display: block; width: 100%; height: auto; max-width: 640px; }
.calibration img { max-width: 1000px; }
.wide { border: 1px solid var(--line); border-radius: 4px; background: #ffffff; }
.wide img { display: block; width: 100%; min-width: 860px; height: auto; }
.hint { color: var(--soft); display: none; }
@media (max-width: 900px) { .hint { display: block; } }
@media (max-width: 640px) {
  h1 { font-size: 1.5rem; }
  table { font-size: 0.86rem; }
  th, td { padding: 0.4em 0.5em; }
  th:first-child { min-width: 7em; }
}
pre { background: var(--card); border: 1px solid var(--line); border-radius: 4px; padding: 1em; overflow-x: auto; font-size: 0.86rem; line-height: 1.45; }
summary { cursor: pointer; padding: 0.5em 0; }
@media print { .wide img { min-width: 0; } body { background: #ffffff; color: #000000; } }
"""
