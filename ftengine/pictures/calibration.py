"""How a calibration is shown: lines of text, a picture, and rows of a table."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from ftengine.pictures.panels import INK, class_color, png_bytes, printable
from ftengine.quality.calibrate import Calibration, Origin

HEADER = ("tumours", "real", "mean P", "pass at T", "HU, median", "painted", "mean P", "pass at T", "HU, median")
ORIGINS: tuple[Origin, ...] = ("real", "painted")
_STYLES: dict[Origin, tuple[int, str]] = {"real": (7, "solid"), "painted": (2, "dashed")}


def shown_threshold(calibration: Calibration) -> float | None:
    """The T that tables and pictures are drawn for: the configured one, else the recommended one."""
    return calibration.recommended_threshold if calibration.threshold is None else calibration.threshold


def table(calibration: Calibration) -> list[list[str]]:
    """Rows under ``HEADER``: all tumours, then each size class; a dash where there is nothing."""
    threshold = shown_threshold(calibration)
    rows = []
    for size in (None, *calibration.sizes):
        row = [size or "all"]
        for origin in _STYLES:
            values = calibration.proportions(origin, size)
            contrasts = calibration.contrasts_hu(origin, size)
            rate = None if threshold is None else calibration.pass_rate(origin, threshold, size)
            row += [
                str(len(values)),
                f"{values.mean():.2f}" if len(values) else "-",
                "-" if rate is None else f"{rate:.0%}",
                f"{np.median(contrasts):+.0f}" if len(contrasts) else "-",
            ]
        rows.append(row)
    return rows


def heading(calibration: Calibration) -> str:
    """What the table is of."""
    threshold = shown_threshold(calibration)
    chosen = "no T" if threshold is None else f"T = {threshold:g}"
    where = {True: "held out from the judge's training", False: "which the judge was trained on", None: ""}
    known = where[calibration.held_out]
    return f"P of the judge on real tumours{f' ({known})' if known else ''} beside painted ones, {chosen}"


def shares_over(proportions: NDArray[np.float64], limits: NDArray[np.float64]) -> NDArray[np.float64]:
    """The share of ascending P that are at least each limit."""
    shares: NDArray[np.float64] = 1.0 - np.searchsorted(proportions, limits, side="left") / len(proportions)
    return shares


def contrast_points(calibration: Calibration, origin: Origin) -> list[tuple[float, float]]:
    """(contrast in HU, P) of the tumours whose contrast can be measured."""
    return [
        (t.contrast_hu, t.proportion) for t in calibration.tumors if t.origin == origin and t.contrast_hu is not None
    ]


def draw_calibration(calibration: Calibration, *, width_in: float = 9.0) -> bytes:
    """A PNG: for all tumours and each size class, the share of tumours of which S sees at least P, over P; and P over contrast.

    Where the painted line lies far above the real one, painted tumours are easier for S than real ones.
    """
    panels: list[str | None] = [None, *calibration.sizes]
    columns = min(3, len(panels) + 1)
    rows = -(-(len(panels) + 1) // columns)
    figure = Figure(figsize=(width_in, 0.34 * width_in * rows), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, size in zip(grid, panels, strict=False):
        _draw_shares(axes, calibration, size)
    _draw_contrast(grid[len(panels)], calibration)
    for axes in grid[len(panels) + 1 :]:
        axes.set_visible(False)
    return png_bytes(figure)


def _draw_shares(axes: Axes, calibration: Calibration, size: str | None) -> None:
    limits = np.linspace(0.0, 1.0, 101)
    for origin, (color, style) in _STYLES.items():
        values = calibration.proportions(origin, size)
        if len(values):
            shares = shares_over(values, limits)
            label = f"{origin} (n = {len(values)})"
            axes.plot(limits, shares, color=class_color(color), linestyle=style, linewidth=1.6, label=label)
    threshold = shown_threshold(calibration)
    if threshold is not None:
        axes.axvline(threshold, color=INK, linewidth=0.8, linestyle="dotted")
    axes.set_xlim(0.0, 1.0)
    axes.set_ylim(0.0, 1.05)
    title = "all tumours" if size is None else f"size class {printable(size)}"
    _finish(axes, title, "P", "share with at least this P")


def _draw_contrast(axes: Axes, calibration: Calibration) -> None:
    for origin, (color, _) in _STYLES.items():
        points = contrast_points(calibration, origin)
        if points:
            x, y = zip(*points, strict=True)
            marker = "o" if origin == "real" else "x"
            axes.scatter(x, y, s=12, marker=marker, linewidths=0.9, color=class_color(color), alpha=0.8, label=origin)
    axes.set_ylim(-0.05, 1.05)
    _finish(axes, "by contrast", "tumour minus ring, HU", "P")


def _finish(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title.replace("$", r"\$"), fontsize=9, color=INK)
    axes.set_xlabel(x, fontsize=8, color=INK)
    axes.set_ylabel(y, fontsize=8, color=INK)
    axes.tick_params(colors=INK, labelsize=8)
    axes.grid(visible=True, color=INK, alpha=0.15, linewidth=0.6)
    for side, spine in axes.spines.items():
        spine.set_visible(side in {"left", "bottom"})
        spine.set_color(INK)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7, labelcolor=INK, frameon=False)


def sentences(calibration: Calibration) -> Sequence[str]:
    """What a reader of the table should know besides."""
    lines = [f"{calibration.advice()[0].upper()}{calibration.advice()[1:].rstrip('.')}."]
    finding = calibration.side_finding()
    if finding:
        lines.append(f"{finding}.")
    if calibration.held_out is False:
        lines.append("The judge was trained on these volumes: it sees more of them than of tumours that are new to it.")
    if calibration.held_out is None:
        lines.append(
            "Its checkpoint does not say which volumes it was trained on: only held-out ones give a rate that counts."
        )
    if calibration.num_cut:
        lines.append(f"{calibration.num_cut} real tumours are larger than the patch; P is that of the part inside.")
    return [*lines, *calibration.notes]
