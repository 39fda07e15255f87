"""Two pictures: paired differences of Dice seed by seed, and what else an arm changes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ftengine.pictures.panels import class_color, png_bytes

_OUTCOMES = (
    ("dice", "Dice in the organ"),
    ("small_any", "small tumours found"),
    ("small_half", "small tumours half found"),
    ("false_per_tumor_volume", "false positives, ill"),
    ("false_per_healthy_volume", "false positives, healthy"),
)


def draw_differences(path: Path, comparisons: Sequence[Mapping[str, Any]], baseline: str) -> None:
    """A row an arm: a dot a seed, a bar for the mean; to the right of zero the arm is better than the baseline of the same seed."""
    shown = [c for c in comparisons if c["second"] == baseline]
    figure = Figure(figsize=(8, 1.2 + 0.34 * max(1, len(shown))), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for row, c in enumerate(reversed(shown)):
        color = class_color(7)
        axes.barh(row, c["mean"], height=0.6, color=color, alpha=0.3)
        axes.plot(c["differences"], [row] * c["n"], "o", color=color, markersize=4)
        for seed, difference in zip(c["seeds"], c["differences"], strict=True):
            axes.annotate(str(seed), (difference, row), (0, 4), textcoords="offset points", fontsize=6, ha="center")
    axes.axvline(0.0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(shown)), [f"{c['first']} (n = {c['n']})" for c in reversed(shown)], fontsize=8)
    axes.set_xlabel("Dice minus that of the baseline of the same seed (dots: seeds, bar: mean)", fontsize=9)
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(visible=True, axis="x", alpha=0.2)
    path.write_bytes(png_bytes(figure))


def draw_outcomes(path: Path, arms: Mapping[str, Mapping[str, Any]]) -> None:
    """A row an arm, a column a figure: mean and deviation over seeds."""
    figure = Figure(figsize=(12, 1.4 + 0.3 * len(arms)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    columns = figure.subplots(1, len(_OUTCOMES), sharey=True)
    names = list(arms)[::-1]
    for axes, (key, title) in zip(columns, _OUTCOMES, strict=True):
        for row, name in enumerate(names):
            spread = arms[name]["figures"][key]
            if spread is not None:
                axes.errorbar(
                    spread["mean"], row, xerr=spread["sd"] or 0.0, fmt="o", color=class_color(2), markersize=4
                )
        axes.set_title(title, fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(visible=True, alpha=0.2)
    columns[0].set_yticks(range(len(names)), names, fontsize=8)
    path.write_bytes(png_bytes(figure))
