"""One picture of what a store holds: native spacing, HU, voxels of each class, tumour sizes, volumes by data set. From the index alone."""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, NullLocator
from numpy.typing import NDArray

from ftengine.errors import ConfigError
from ftengine.pictures.panels import INK, Color, png_bytes, printable, shortened
from ftengine.store.index import ANNOTATIONS, HU_PERCENTILES, Table
from ftengine.store.layout import label_color
from ftengine.store.reader import Store

SMALL_TUMOR_MM = 20.0  # the paper's small tumours: a diameter below 2 cm (Table A10)
_MAX_DATASETS = 24  # bars that fit; the rest is one bar
_BINS_PER_OCTAVE = 8
_SIZE_IN = (16.0, 9.0)
_DPI = 100
# Okabe and Ito, as everywhere: distinct with the common colour vision deficiencies
_BLUE: Color = (0.0, 114 / 255, 178 / 255)
_ORANGE: Color = (230 / 255, 159 / 255, 0.0)
_GREY: Color = (0.72, 0.72, 0.74)
_ANNOTATION_COLORS: dict[str, Color] = {
    "tumor": (213 / 255, 94 / 255, 0.0),
    "organ": (86 / 255, 180 / 255, 233 / 255),
    "none": _GREY,
}
_ANNOTATION_NAMES = {"tumor": "tumours annotated", "organ": "organs only", "none": "no label"}
_SPACING_TICKS_MM = (0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 7, 10, 20)
_DIAMETER_TICKS_MM = (1, 2, 3, 5, 10, 20, 30, 50, 100, 200, 300, 500)


def draw_store(store: Store, path: Path) -> None:
    """Write the picture as PNG, 1600 x 900 pixels; its folder is made. Raises ConfigError for a store without volumes."""
    image = png_bytes(store_figure(store))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(image)


def store_figure(store: Store) -> Figure:
    """The picture as a figure of five panels. Reads the index alone. Raises ConfigError for a store without volumes."""
    if not len(store):
        raise ConfigError(f"{store.path}: holds no volume to draw. Convert some first.")
    figure = Figure(figsize=_SIZE_IN, dpi=_DPI, layout="constrained", facecolor="white")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12, wspace=0.03, hspace=0.03)  # type: ignore[union-attr, call-arg]  # it is constrained
    grid = figure.add_gridspec(2, 3, width_ratios=(1.0, 1.0, 0.9))
    _draw_spacing(figure.add_subplot(grid[0, 0]), store)
    _draw_hu(figure.add_subplot(grid[0, 1]), store)
    _draw_voxels(figure.add_subplot(grid[1, 0]), store)
    _draw_diameters(figure.add_subplot(grid[1, 1]), store)
    _draw_datasets(figure.add_subplot(grid[:, 2]), store.select(["dataset", "annotation"]))
    counts = Counter(store.column("annotation").to_pylist())
    kinds = ", ".join(f"{counts[kind]:,} {_ANNOTATION_NAMES[kind]}" for kind in ANNOTATIONS if counts[kind])
    spacing = " x ".join(f"{mm:g}" for mm in store.spacing_mm_zyx)
    stored_bytes = int(np.sum(store.column("stored_bytes").to_numpy()))
    noun = "volume" if len(store) == 1 else "volumes"
    title = (
        f"{shortened(printable(store.path.name), 60)}: {len(store):,} {noun}, {store.region}, {spacing} mm (z, y, x)"
    )
    figure.suptitle(f"{title}\n{kinds}; {_bytes(stored_bytes)} stored", fontsize=14, color=INK, parse_math=False)
    return figure


def native_spacing_mm(table: Table) -> NDArray[np.float64]:
    """Voxel size of the converted files along the patient's axes, [volume, (z, y, x)] mm, whatever axis order a file has."""
    matrix = _rows(table, "native_affine_ras", 16).reshape(-1, 4, 4)[:, :3, :3]
    length_mm = np.linalg.norm(matrix, axis=1)  # [volume, voxel axis x y z]
    axis = np.abs(matrix).argmax(axis=1)  # the patient axis (0 x, 1 y, 2 z) that each voxel axis runs along
    spacing = np.full(length_mm.shape, np.nan)
    np.put_along_axis(spacing, axis, length_mm, axis=1)
    return spacing[:, ::-1]


def _draw_spacing(axes: Axes, store: Store) -> None:
    spacing = native_spacing_mm(store.select(["native_affine_ras"]))
    bins = _log_bins(spacing, edge=2 ** (0.5 / _BINS_PER_OCTAVE), at_least=(0.4, 6.0))
    groups = (
        ("between slices (z)", spacing[:, 0], _BLUE),
        ("in the slice (mean of y, x)", spacing[:, 1:].mean(axis=1), _ORANGE),
    )
    for name, values, color in groups:
        axes.hist(
            values,
            bins=bins.tolist(),
            histtype="stepfilled",
            facecolor=(*color, 0.35),
            edgecolor=color,
            linewidth=1.4,
            label=name,
        )
    for mm in sorted(set(store.spacing_mm_zyx)):
        axes.axvline(mm, color=INK, linestyle="--", linewidth=1.0)
    axes.plot([], [], color=INK, linestyle="--", linewidth=1.0, label="in the store")
    _finish(axes, "Spacing of the files", "mm", "volumes")
    _log_ticks(axes, bins, _SPACING_TICKS_MM)
    _leave_room(axes)
    _legend(axes)


def _draw_hu(axes: Axes, store: Store) -> None:
    values = _rows(store.select(["hu_percentiles"]), "hu_percentiles", len(HU_PERCENTILES))
    low, high = store.window_hu
    axes.axhspan(low, high, color=(*_ORANGE, 0.18), linewidth=0, label=f"window {low:g} to {high:g} HU")
    _boxes(axes, [values[:, i] for i in range(values.shape[1])], [_BLUE] * values.shape[1], vertical=True)
    axes.set_xticks(range(len(HU_PERCENTILES)), [f"{p:g}" for p in HU_PERCENTILES])
    axes.set_xlim(-0.6, len(HU_PERCENTILES) - 0.4)
    axes.set_ylim(
        top=max(float(values.max()), high) + 0.15 * (max(float(values.max()), high) - min(float(values.min()), low))
    )
    _finish(
        axes,
        "HU percentiles over the volumes",
        "percentile of a volume's voxels\n(box: quartiles; whiskers: 5 to 95 %; dots: ends)",
        "HU",
    )
    _legend(axes, "upper left")


def _draw_voxels(axes: Axes, store: Store) -> None:
    voxels = _rows(store.select(["class_voxels"]), "class_voxels", len(store.labels))
    named = sorted(((value, name) for name, value in store.labels.items() if value), reverse=True)
    present = [voxels[:, value][voxels[:, value] > 0] for value, _ in named]
    _boxes(axes, present, [_rgb(value) for value, _ in named], vertical=False)
    axes.set_yticks(
        range(len(named)), [f"{name}\n{len(there):,} volumes" for (_, name), there in zip(named, present, strict=True)]
    )
    axes.set_ylim(-0.6, len(named) - 0.4)
    _finish(
        axes,
        "Voxels of a class, where a volume holds it",
        f"voxels in the store; 1 ml is {1000 / np.prod(store.spacing_mm_zyx):,.0f}",
        "",
    )
    if any(len(there) for there in present):
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(_short_count))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        _say(axes, "no labels")


def _draw_diameters(axes: Axes, store: Store) -> None:
    values = store.column("tumor_values").combine_chunks().flatten().to_numpy()
    diameters = store.column("tumor_diameters_mm").combine_chunks().flatten().to_numpy()
    _finish(axes, "Tumours by longest axial diameter", "mm", "tumours")
    if not len(diameters):
        _say(axes, "no annotated tumours")
        return
    bins = _log_bins(diameters, edge=SMALL_TUMOR_MM, at_least=(3.0, 120.0))
    names = {value: name for name, value in store.labels.items()}
    kinds = sorted(int(v) for v in np.unique(values))
    axes.hist(
        [diameters[values == kind] for kind in kinds],
        bins=bins.tolist(),
        stacked=True,
        color=[_rgb(kind) for kind in kinds],
        label=[f"{names.get(kind, kind)}, {int((values == kind).sum()):,}" for kind in kinds],
    )
    small = float((diameters < SMALL_TUMOR_MM).mean())
    axes.axvline(
        SMALL_TUMOR_MM, color=INK, linestyle="--", linewidth=1.0, label=f"below {SMALL_TUMOR_MM:g} mm: {small:.0%}"
    )
    _log_ticks(axes, bins, _DIAMETER_TICKS_MM)
    _leave_room(axes)
    _legend(axes)


def _draw_datasets(axes: Axes, table: Table) -> None:
    pairs = Counter(zip(table.column("dataset").to_pylist(), table.column("annotation").to_pylist(), strict=True))
    totals: Counter[str] = Counter()
    for (dataset, _), count in pairs.items():
        totals[dataset] += count
    ranked = sorted(totals, key=lambda name: (-totals[name], name))
    shown, rest = ranked[:_MAX_DATASETS], ranked[_MAX_DATASETS:]
    bars = [(name, [name]) for name in shown] + ([(f"{len(rest)} more", rest)] if rest else [])
    left = np.zeros(len(bars))
    for kind in ANNOTATIONS:
        widths = np.array([sum(pairs[member, kind] for member in members) for _, members in bars], dtype=float)
        if widths.any():
            axes.barh(
                range(len(bars)),
                widths,
                left=left,
                color=_ANNOTATION_COLORS[kind],
                label=_ANNOTATION_NAMES[kind],
                height=min(0.75, 0.15 * len(bars)),
            )
        left += widths
    for row, total in enumerate(left.tolist()):
        axes.annotate(
            f"{int(total):,}",
            (total, row),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=INK,
        )
    axes.set_yticks(range(len(bars)), [shortened(printable(name), 22) for name, _ in bars])
    axes.set_ylim(max(len(bars), 4) - 0.4, -0.6)
    _finish(axes, "Volumes by data set", "volumes", "")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{int(value):,}"))
    axes.set_xlim(0, float(left.max()) * 1.16)
    _legend(axes, "lower right")


def _boxes(axes: Axes, groups: Sequence[NDArray[Any]], colors: Sequence[Color], *, vertical: bool) -> None:
    """A box for each group: quartiles and median, whiskers over 5 to 95 %, dots at both ends."""
    for place, (values, color) in enumerate(zip(groups, colors, strict=True)):
        if not len(values):
            continue
        low, q1, q2, q3, high = (float(v) for v in np.percentile(values, (5, 25, 50, 75, 95)))
        stats = [
            {
                "med": q2,
                "q1": q1,
                "q3": q3,
                "whislo": low,
                "whishi": high,
                "fliers": [float(values.min()), float(values.max())],
            }
        ]
        axes.bxp(
            stats,
            positions=[place],
            widths=0.55,
            orientation="vertical" if vertical else "horizontal",
            patch_artist=True,
            manage_ticks=False,
            boxprops={"facecolor": (*color, 0.45), "edgecolor": color},
            medianprops={"color": INK, "linewidth": 1.6},
            whiskerprops={"color": color},
            capprops={"color": color},
            flierprops={"marker": ".", "markersize": 4, "markerfacecolor": color, "markeredgecolor": color},
        )


def _rows(table: Table, column: str, width: int) -> NDArray[np.float64]:
    """A list column whose lists have one length, as [row, width]."""
    flat = table.column(column).combine_chunks().flatten().to_numpy()
    rows: NDArray[np.float64] = flat.astype(np.float64).reshape(table.num_rows, width)
    return rows


def _log_bins(values: NDArray[Any], *, edge: float, at_least: tuple[float, float]) -> NDArray[np.float64]:
    """Bin edges of equal ratio that hold all values and ``at_least``; one of them is ``edge``."""
    low, high = min(at_least[0], float(np.nanmin(values))), max(at_least[1], float(np.nanmax(values)))
    first = math.floor(math.log2(low / edge) * _BINS_PER_OCTAVE - 1e-6)
    last = math.ceil(math.log2(high / edge) * _BINS_PER_OCTAVE + 1e-6)
    return edge * np.exp2(np.arange(first, last + 1) / _BINS_PER_OCTAVE)


def _log_ticks(axes: Axes, bins: NDArray[np.float64], ticks: Sequence[float]) -> None:
    axes.set_xscale("log")
    axes.set_xlim(float(bins[0]), float(bins[-1]))
    inside = [t for t in ticks if bins[0] <= t <= bins[-1]]
    axes.set_xticks(inside, [f"{t:g}" for t in inside])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())


def _finish(axes: Axes, title: str, x_label: str, y_label: str) -> None:
    axes.set_title(title, fontsize=12, color=INK, loc="left")
    axes.set_xlabel(x_label, fontsize=10, color=INK)
    axes.set_ylabel(y_label, fontsize=10, color=INK)
    axes.tick_params(labelsize=9, colors=INK)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for label in (*axes.get_xticklabels(), *axes.get_yticklabels()):
        label.set_parse_math(False)
    if y_label in ("volumes", "tumours"):
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{int(value):,}"))


def _legend(axes: Axes, place: Literal["upper left", "upper right", "lower right"] = "upper right") -> None:
    axes.legend(fontsize=9, loc=place, frameon=True, framealpha=0.85, edgecolor="none", borderpad=0.2)


def _leave_room(axes: Axes) -> None:
    """Room above the bars for the legend."""
    axes.set_ylim(0, axes.get_ylim()[1] * 1.4)


def _short_count(value: float, _position: int | None = None) -> str:
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{value / scale:g} {unit}"
    return f"{value:g}"


def _say(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", fontsize=11, color=INK)
    axes.set_xticks([])
    if axes.get_ylabel():
        axes.set_yticks([])


def _rgb(value: int) -> Color:
    red, green, blue = label_color(value)
    return red / 255, green / 255, blue / 255


def _bytes(count: int) -> str:
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count / 1e3:.1f} kB"
