"""Charts as inline SVG: they take the colours of the page, light or dark, stay sharp, and weigh a few kilobytes.

A chart is drawn ``WIDTH`` units wide and shown at about that many pixels, so its letters are readable on a phone too; wider screens put
several side by side. Lines of a chart differ in dashes, not only in colour. All texts are escaped here.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from ftengine.pictures.panels import shortened

WIDTH, HEIGHT = 320.0, 190.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 50.0, 10.0, 8.0, 34.0
_MAX_POINTS = 300  # of a line; more than its pixels
_STYLES = 4


@dataclass(frozen=True)
class Line:
    """Values over x, both finite, in the order of x. style: 1 to 4; None: by its place in the chart."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    style: int | None = None

    def style_at(self, place: int) -> int:
        """The style of a line at a place in its chart, from 0."""
        return 1 + place % _STYLES if self.style is None else self.style


@dataclass(frozen=True)
class Strip:
    """One distribution: a value for each case, and what each is called."""

    name: str
    values: Sequence[float]
    cases: Sequence[str]


def line_chart(
    lines: Sequence[Line],
    *,
    x_label: str,
    alt: str,
    y_range: tuple[float, float] | None = None,
    x_range: tuple[float, float] | None = None,
    limit: tuple[float, str] | None = None,
    x_limit: tuple[float, str] | None = None,
) -> str:
    """Lines over a common axis, with a legend where there are several. limit, x_limit: a value of y or of x with its name, drawn dotted."""
    xs = np.concatenate([np.asarray(line.x, dtype=float) for line in lines])
    ys = np.concatenate([np.asarray(line.y, dtype=float) for line in lines])
    plot = _Plot(x_range or _span(xs), y_range or _span(ys), whole_x=bool((xs == np.rint(xs)).all()))
    parts = [plot.axes(x_label)]
    if limit is not None:
        parts.append(plot.across(*limit))
    if x_limit is not None:
        parts.append(plot.down(*x_limit))
    for number, line in enumerate(lines):
        points = thinned(line.x, line.y)
        style = line.style_at(number)
        way = " ".join(f"{plot.x(x):.1f},{plot.y(y):.1f}" for x, y in points)
        parts.append(f'<polyline class="l{style}" points="{way}"/>')
        if len(points) <= 12:
            parts += [
                f'<circle class="d{style}" cx="{plot.x(x):.1f}" cy="{plot.y(y):.1f}" r="2.6"/>' for x, y in points
            ]
    svg = _svg(HEIGHT, alt, "".join(parts))
    return svg + _legend(lines) if len(lines) > 1 else svg


def scatter_chart(groups: Sequence[Line], *, x_label: str, alt: str, y_range: tuple[float, float]) -> str:
    """Points of several groups: style 1 as dots, the others as crosses, with a legend."""
    plot = _Plot(_span(np.concatenate([np.asarray(group.x, dtype=float) for group in groups])), y_range)
    parts = [plot.axes(x_label)]
    for number, group in enumerate(groups):
        style = group.style_at(number)
        for x, y in zip(group.x, group.y, strict=True):
            parts.append(_mark(style, plot.x(x), plot.y(y)))
    items = "".join(
        f'<li><svg viewBox="0 0 30 10" aria-hidden="true">{_mark(group.style_at(n), 15, 5)}</svg>{escape(group.name)}</li>'
        for n, group in enumerate(groups)
    )
    return f'{_svg(HEIGHT, alt, "".join(parts))}<ul class="legend">{items}</ul>'


def _mark(style: int, x: float, y: float) -> str:
    if style == 1:
        return f'<circle class="d1 dot" cx="{x:.1f}" cy="{y:.1f}" r="3"/>'
    return f'<path class="cross c{style}" d="M{x - 2.6:.1f} {y - 2.6:.1f}l5.2 5.2m0 -5.2l-5.2 5.2"/>'


def heat_chart(
    x: Sequence[float], shares: NDArray[np.float64], *, x_label: str, y_label: str, alt: str, limit: float | None
) -> str:
    """How a distribution on [0, 1] moves: a column for each x, a cell for each equal part of [0, 1], the darker the larger its share.

    shares: [x, part]; a column sums to 1. limit: a value on [0, 1], drawn across.
    """
    columns = min(len(x), 48)
    groups = np.array_split(np.arange(len(x)), columns)
    means = np.array([shares[group].mean(axis=0) for group in groups])
    plot = _Plot((0.0, float(columns)), (0.0, 1.0))
    width, parts_of_y = plot.x(1.0) - plot.x(0.0), shares.shape[1]
    height = plot.y(0.0) - plot.y(1.0 / parts_of_y)
    cells = []
    for column in range(columns):
        for part in range(parts_of_y):
            share = float(means[column, part])
            if share > 0.004:
                cells.append(
                    f'<rect class="heat" x="{plot.x(column):.1f}" y="{plot.y((part + 1) / parts_of_y):.1f}" width="{width:.1f}" '
                    f'height="{height:.1f}" fill-opacity="{0.08 + 0.92 * share:.2f}"/>'
                )
    ends = [(0.0, f"{x[0]:g}"), (float(columns), f"{x[-1]:g}")]
    body = "".join(cells) + plot.axes(x_label, y_label, x_ticks=ends)
    if limit is not None:
        body += plot.across(limit, f"T = {limit:g}")
    return _svg(HEIGHT, alt, body)


def strip_chart(strips: Sequence[Strip], *, x_label: str, alt: str) -> str:
    """Every case as a dot on [0, 1], a row for each distribution, with quartiles as a box and the mean as a bar."""
    row, left = 58.0, 14.0
    height = _TOP + row * len(strips) + _BOTTOM
    plot = _Plot((0.0, 1.0), (0.0, float(len(strips))), height=height, left=left)
    parts = [plot.axes(x_label, y_ticks=[])]
    for number, strip in enumerate(strips):
        middle = _TOP + row * number + 0.64 * row
        values = np.asarray(strip.values, dtype=float)
        parts.append(
            f'<text class="name" x="{left + 4}" y="{_TOP + row * number + 13:.1f}">{escape(shortened(strip.name, 40))} (n = {len(values)})</text>'
        )
        for value, case, up in zip(values.tolist(), strip.cases, _swarm(values, plot.x), strict=True):
            parts.append(
                f'<circle class="d{1 + number % _STYLES} dot" cx="{plot.x(value):.1f}" cy="{middle - up:.1f}" r="3.2">'
                f"<title>{escape(case)}: {value:.3f}</title></circle>"
            )
        q1, q3 = (plot.x(float(q)) for q in np.percentile(values, (25, 75)))
        mean = plot.x(float(values.mean()))
        parts.append(
            f'<rect class="box" x="{q1:.1f}" y="{middle - 12:.1f}" width="{max(q3 - q1, 0.5):.1f}" height="24" rx="2"/>'
            f'<path class="mean" d="M{mean:.1f} {middle - 15:.1f}v30"/>'
        )
    return _svg(height, alt, "".join(parts))


def _legend(lines: Sequence[Line]) -> str:
    """Samples of the lines' styles and what they stand for."""
    items = "".join(
        f'<li><svg viewBox="0 0 30 10" aria-hidden="true"><path class="l{line.style_at(n)}" d="M1 5h28"/></svg>{escape(line.name)}</li>'
        for n, line in enumerate(lines)
    )
    return f'<ul class="legend">{items}</ul>'


def thinned(x: Sequence[float], y: Sequence[float]) -> list[tuple[float, float]]:
    """Points of a line, at most ``_MAX_POINTS``: of each group of neighbours the lowest and the highest, so that no peak is lost."""
    if len(x) <= _MAX_POINTS:
        return list(zip(x, y, strict=True))
    kept: list[int] = []
    values = np.asarray(y, dtype=float)
    for group in np.array_split(np.arange(len(x)), _MAX_POINTS // 2):
        ends = {int(group[values[group].argmin()]), int(group[values[group].argmax()])}
        kept += sorted(ends)
    return [(x[i], y[i]) for i in kept]


class _Plot:
    """From values to places in the picture, and the axes."""

    def __init__(
        self,
        x_range: tuple[float, float],
        y_range: tuple[float, float],
        *,
        height: float = HEIGHT,
        left: float = _LEFT,
        whole_x: bool = False,
    ) -> None:
        """whole_x: only whole numbers stand on the x axis."""
        self._whole_x = whole_x
        self._x_range, self._y_range = x_range, y_range
        self._left, self._right, self._bottom = left, WIDTH - _RIGHT, height - _BOTTOM

    def x(self, value: float) -> float:
        low, high = self._x_range
        return self._left + (value - low) / (high - low) * (self._right - self._left)

    def y(self, value: float) -> float:
        low, high = self._y_range
        return self._bottom - (value - low) / (high - low) * (self._bottom - _TOP)

    def across(self, value: float, name: str) -> str:
        """A dotted line at a value of y."""
        low, high = self._y_range
        if not low <= value <= high:
            return ""
        y = self.y(value)
        return (
            f'<path class="limit" d="M{self._left:.1f} {y:.1f}H{self._right:.1f}"/>'
            f'<text class="name" x="{self._right - 2:.1f}" y="{y - 4:.1f}" text-anchor="end">{escape(name)}</text>'
        )

    def down(self, value: float, name: str) -> str:
        """A dotted line at a value of x."""
        x = self.x(value)
        return (
            f'<path class="limit" d="M{x:.1f} {_TOP:.1f}V{self._bottom:.1f}"/>'
            f'<text class="name" x="{x + 4:.1f}" y="{_TOP + 9:.1f}">{escape(name)}</text>'
        )

    def axes(
        self,
        x_label: str,
        y_label: str = "",
        *,
        x_ticks: Sequence[tuple[float, str]] | None = None,
        y_ticks: Sequence[tuple[float, str]] | None = None,
    ) -> str:
        parts = []
        for value, text in _ticks(self._y_range, 5) if y_ticks is None else y_ticks:
            y = self.y(value)
            parts.append(
                f'<path class="grid" d="M{self._left:.1f} {y:.1f}H{self._right:.1f}"/>'
                f'<text x="{self._left - 6:.1f}" y="{y + 3.8:.1f}" text-anchor="end">{text}</text>'
            )
        for value, text in _ticks(self._x_range, 5, whole=self._whole_x) if x_ticks is None else x_ticks:
            x = self.x(value)
            anchor = "end" if x > self._right - 8 else "start" if x < self._left + 4 else "middle"
            parts.append(
                f'<path class="axis" d="M{x:.1f} {self._bottom:.1f}v4"/>'
                f'<text x="{x:.1f}" y="{self._bottom + 16:.1f}" text-anchor="{anchor}">{text}</text>'
            )
        middle = (self._left + self._right) / 2
        parts.append(f'<path class="axis" d="M{self._left:.1f} {self._bottom:.1f}H{self._right:.1f}"/>')
        parts.append(
            f'<text x="{middle:.1f}" y="{self._bottom + 30:.1f}" text-anchor="middle">{escape(x_label)}</text>'
        )
        if y_label:
            y = (_TOP + self._bottom) / 2
            parts.append(f'<text x="0" y="{y + 3.8:.1f}">{escape(y_label)}</text>')
        return "".join(parts)


def _svg(height: float, alt: str, body: str) -> str:
    return f'<svg class="chart" role="img" aria-label="{escape(alt)}" viewBox="0 0 {WIDTH:g} {height:g}">{body}</svg>'


def _span(values: NDArray[np.float64]) -> tuple[float, float]:
    """A range that holds all values, with a little room; never empty."""
    low, high = float(values.min()), float(values.max())
    if high - low < 1e-12 * max(1.0, abs(low), abs(high)):
        room = abs(low) * 0.1 or 0.5
        return low - room, high + room
    return low, high


def _ticks(span: tuple[float, float], count: int, *, whole: bool = False) -> list[tuple[float, str]]:
    low, high = span
    values = [
        float(v) for v in MaxNLocator(count, integer=whole).tick_values(low, high) if low - 1e-9 <= v <= high + 1e-9
    ]
    step = values[1] - values[0] if len(values) > 1 else abs(high - low)
    return [(v, _tick_text(v, step)) for v in values]


def _tick_text(value: float, step: float) -> str:
    if value == 0.0:
        return "0"
    if max(abs(value), step) >= 10_000:
        return f"{value / 1000:g}k".replace("-", "\N{MINUS SIGN}")
    if step < 1e-3:
        return f"{value:.1e}".replace("e-0", "e-").replace("-", "\N{MINUS SIGN}")
    digits = next(d for d in range(6) if d == 5 or math.isclose(round(step, d), step, rel_tol=1e-6))
    return f"{value:.{digits}f}".replace("-", "\N{MINUS SIGN}")


def _swarm(values: NDArray[np.float64], place: Callable[[float], float]) -> list[float]:
    """How far each dot is moved up or down so that dots of like values lie side by side."""
    up = [0.0] * len(values)
    columns: dict[int, int] = {}
    for index in np.argsort(values, kind="stable").tolist():
        column = int(place(float(values[index])) // 6)
        number = columns.get(column, 0)
        columns[column] = number + 1
        up[index] = (1 if number % 2 else -1) * min((number + 1) // 2 * 5.0, 16.0)
    return up
