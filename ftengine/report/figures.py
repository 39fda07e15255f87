"""Figures of CT for a page: painted tumours, many of them at a glance, and cases with truth and prediction; in radiological view."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from math import isnan
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ftengine.config import Config
from ftengine.geometry import FloatZYX, IntZYX, int_zyx
from ftengine.pictures.hu_windows import Window, WindowChoice
from ftengine.pictures.panels import Rectangle, View, central_voxel, three_views
from ftengine.pictures.samples import PaintedSample
from ftengine.pictures.sheets import SheetInfo, Tile, described, difference_limit_hu, zoom_mm
from ftengine.pictures.svg_panels import SvgPanel, data_uri, difference_rgb, png_of


@dataclass(frozen=True)
class PaintedFigure:
    """A painted tumour in three planes: original, outline of M, synthetic, difference, and the judge's prediction where there is one."""

    info: SheetInfo
    html: str

    @classmethod
    def of(
        cls, config: Config, sample: PaintedSample, info: SheetInfo, tumor: NDArray[np.bool_], choice: WindowChoice
    ) -> "PaintedFigure":
        """Draw one tumour of a painted patch."""
        spacing, window = config.region.spacing_mm_zyx, choice.of(config.region, info.organ)
        limit_hu = difference_limit_hu(sample)
        panels = []
        for view in three_views(central_voxel(tumor, spacing), int_zyx(sample.mask.shape), spacing):
            what = f"a {info.size_class} synthetic {info.organ} tumour in {info.case}"
            place = f"{view.plane} slice {_global(sample, view)}"
            for name, draw in _columns(sample, window, limit_hu).items():
                panel = SvgPanel(view, f"{name.capitalize()}, {place}, {what}: {window}.")
                draw(panel)
                panel.marks()
                panel.scale_bar()
                panels.append(_panel(panel, f"<b>{escape(name.capitalize())}</b>, {view.plane}"))
        columns = 5 if sample.predicted is not None else 4
        html = (
            f'<figure class="sheet"><figcaption><strong>{escape(info.case)}</strong>{badge(info)}'
            f'<span class="facts">{escape(_facts(info, config, window))}</span></figcaption>'
            f'<div class="panels{" four" if columns == 4 else ""}">{"".join(panels)}</div>{_color_scale(limit_hu)}</figure>'
        )
        return cls(info, html)


def glance(tiles: Sequence[Tile]) -> str:
    """Many painted tumours side by side: axial slice, verdict, size."""
    items = []
    for tile in tiles:
        info = tile.info
        panel = SvgPanel(
            tile.view, f"{info.title}; axial slice of the painted image with the border of M.", tile.shown_mm
        )
        panel.grey(tile.image_hu, tile.window.hu)
        panel.outline(tile.mask, "mask")
        panel.marks()
        panel.scale_bar()
        words = (
            f"<b>{escape(info.verdict)}</b><br>{escape(info.size_class)} {escape(info.organ)}, {escape(info.measures)}"
        )
        items.append(f'<li class="panel">{panel.svg()}<span class="tag">{words}</span></li>')
    return f'<ul class="panels glance">{"".join(items)}</ul>'


@dataclass(frozen=True)
class CasePicture:
    """A volume with its true tumours and what models predict. Arrays [z, y, x], RAS+, on one grid.

    image_hu: HU. truth, predictions (by model): uint8. scores: what is said of a model, by model. rank: why it is shown, in words.
    """

    case: str
    rank: str
    image_hu: NDArray[np.generic]
    truth: NDArray[np.uint8]
    predictions: Mapping[str, NDArray[np.uint8]]
    scores: Mapping[str, str]
    spacing_mm_zyx: FloatZYX
    window: Window
    tumor_values: Sequence[int]

    @cached_property
    def true_tumor(self) -> NDArray[np.bool_]:
        """Voxels of any tumour class in the truth."""
        return np.isin(self.truth, self.tumor_values)

    def html(self) -> str:
        """The figure: for each model an overview and three enlarged planes through the largest true tumour, else the largest predicted."""
        predicted = {name: np.isin(label, self.tumor_values) for name, label in self.predictions.items()}
        either = self.true_tumor if self.true_tumor.any() else np.any(list(predicted.values()), axis=0)
        shape = int_zyx(self.image_hu.shape)
        center = central_voxel(either, self.spacing_mm_zyx) if either.any() else int_zyx(n // 2 for n in shape)
        rows = "".join(
            f'<p class="row">{escape(name)}: {escape(self.scores.get(name, "no score"))}</p>{self._row(name, mask, center, either)}'
            for name, mask in predicted.items()
        )
        through = (
            "the largest true tumour" if self.true_tumor.any() else "the largest predicted tumour; the truth holds none"
        )
        facts = f"{self.rank}. Planes through {through if either.any() else 'the middle; neither truth nor prediction holds a tumour'}; {self.window}; voxels of {_by(self.spacing_mm_zyx)} mm (z, y, x)."
        return (
            f'<figure class="sheet"><figcaption><strong>{escape(self.case)}</strong><span class="facts">{escape(facts)}</span></figcaption>'
            f'<div class="panels four">{rows}</div></figure>'
        )

    def _row(self, name: str, predicted: NDArray[np.bool_], center: IntZYX, either: NDArray[np.bool_]) -> str:
        views = three_views(center, int_zyx(self.image_hu.shape), self.spacing_mm_zyx)
        zooms = [zoom_mm(view, either) if either.any() else None for view in views]
        drawn: list[tuple[View, Rectangle | None, str]] = [(views[0], None, "Axial, whole slice")]
        drawn += [
            (view, zoom, f"{view.plane.capitalize()}, {'zyx'[n]} = {view.index}")
            for n, (view, zoom) in enumerate(zip(views, zooms, strict=True))
        ]
        panels = []
        for number, (view, zoom, tag) in enumerate(drawn):
            panel = SvgPanel(view, f"{self.case}, {tag.lower()}: true tumour and that of {name}; {self.window}.", zoom)
            panel.grey(self.image_hu, self.window.hu)
            panel.outline(self.true_tumor, "truth")
            panel.outline(predicted, "prediction")
            if number == 0 and zooms[0] is not None:
                panel.frame(zooms[0])
            panel.marks()
            panel.scale_bar()
            panels.append(_panel(panel, escape(tag)))
        return "".join(panels)


def painted_figures(
    config: Config, samples: Iterable[PaintedSample], choice: WindowChoice, *, num_figures: int
) -> tuple[list[Tile], list[PaintedFigure]]:
    """All tumours of the samples as tiles, by size class, and the first of each size class in three planes, at most ``num_figures``."""
    tiles: list[Tile] = []
    figures: dict[str, PaintedFigure] = {}
    for sample in samples:
        for info, tumor in described(config, sample, Path()):
            tiles.append(Tile.of(config, sample, info, tumor, choice))
            if info.size_class not in figures and len(figures) < num_figures:
                figures[info.size_class] = PaintedFigure.of(config, sample, info, tumor, choice)
    order = {name: number for number, name in enumerate(config.synthesis.sizes)}
    tiles.sort(key=lambda tile: order.get(tile.info.size_class, len(order)))
    return tiles, sorted(figures.values(), key=lambda f: order.get(f.info.size_class, len(order)))


def key_of_lines(*, painted: bool) -> str:
    """What the lines in figures stand for."""
    entries = (
        (("mask", "border of the tumour mask M"), ("prediction", "tumour that the judge S sees (dashed)"))
        if painted
        else (("truth", "true tumour"), ("prediction", "predicted tumour (dashed)"))
    )
    items = "".join(
        f'<li><svg viewBox="0 0 34 16" aria-hidden="true"><path class="{role}" d="M4 8h26"/></svg>{escape(text)}</li>'
        for role, text in entries
    )
    return f'<ul class="key">{items}</ul>'


def badge(info: SheetInfo) -> str:
    """The verdict, in words and with a colour."""
    kind = "plain" if isnan(info.proportion) else "good" if info.passed else "bad"
    return f'<span class="badge {kind}">{escape(info.verdict)}</span>'


def _columns(sample: PaintedSample, window: Window, limit_hu: float) -> dict[str, Callable[[SvgPanel], None]]:
    def original(panel: SvgPanel) -> None:
        panel.grey(sample.original_hu, window.hu)

    def masked(panel: SvgPanel) -> None:
        panel.grey(sample.original_hu, window.hu)
        panel.outline(sample.mask, "mask")

    def synthetic(panel: SvgPanel) -> None:
        panel.grey(sample.synthetic_hu, window.hu)

    def difference(panel: SvgPanel) -> None:
        panel.signed(sample.difference_hu, limit_hu)
        panel.outline(sample.mask, "mask")

    def predicted(panel: SvgPanel) -> None:
        panel.grey(sample.synthetic_hu, window.hu)
        panel.outline(sample.mask, "mask")
        if sample.predicted is not None:
            panel.outline(sample.predicted, "prediction")

    columns: dict[str, Callable[[SvgPanel], None]] = {
        "original": original,
        "mask outline": masked,
        "synthetic": synthetic,
        "difference": difference,
    }
    if sample.predicted is not None:
        columns["judge's prediction"] = predicted
    return columns


def _panel(panel: SvgPanel, tag: str) -> str:
    return f'<div class="panel">{panel.svg()}<span class="tag">{tag}</span></div>'


def _global(sample: PaintedSample, view: View) -> int:
    axis = ("axial", "coronal", "sagittal").index(view.plane)
    return sample.request.box.origin_zyx[axis] + view.index


def _facts(info: SheetInfo, config: Config, window: Window) -> str:
    which = f"tumour {info.number} of {info.num_tumors}, " if info.num_tumors > 1 else ""
    return (
        f"Synthetic {info.organ} tumour, {which}size class {info.size_class}: {info.measures} (sphere of its volume; mean change inside it). "
        f"Shown: {window}; voxels of {_by(config.region.spacing_mm_zyx)} mm (z, y, x). Address: seed {info.seed}, epoch {info.epoch}, index {info.index}."
    )


def _color_scale(limit_hu: float) -> str:
    """The colours of the difference map and what they are, in HU."""
    ramp = difference_rgb(np.linspace(-limit_hu, limit_hu, 128)[None], limit_hu)
    low, high = f"\N{MINUS SIGN}{limit_hu:g} HU", f"+{limit_hu:g} HU"
    return (
        f'<div class="scale"><span>Difference, synthetic minus original: {low}</span>'
        f'<svg viewBox="0 0 128 10" preserveAspectRatio="none" role="img" aria-label="Colours from blue, {low}, over black, 0, to orange, {high}">'
        f'<image width="128" height="10" preserveAspectRatio="none" href="{data_uri(png_of(ramp))}"/></svg><span>{high}</span></div>'
    )


def _by(values: Sequence[float]) -> str:
    return " x ".join(f"{v:g}" for v in values)
