"""Sheets: one painted tumour in three planes, many of them at a glance, a volume with its label."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, isnan, prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ftengine.config import Config
from ftengine.errors import ConfigError
from ftengine.geometry import FloatZYX, IntZYX, float_zyx, int_zyx
from ftengine.pictures.hu_windows import Window, WindowChoice
from ftengine.pictures.panels import (
    DEFAULT_WIDTH_PX,
    FAILED_COLOR,
    MASK_COLOR,
    PASSED_COLOR,
    PREDICTION_COLOR,
    SHEET_WIDTH_IN,
    Panel,
    PanelGrid,
    Rectangle,
    Sheet,
    View,
    central_voxel,
    class_color,
    classes_of,
    equivalent_diameter_mm,
    legend_rows,
    shortened,
    three_views,
)
from ftengine.pictures.samples import PaintedSample
from ftengine.types import PatchRequest

_VIEW_NOTE = "Radiological view: R, the patient's right, is on the left of axial and coronal pictures."


@dataclass(frozen=True)
class SheetInfo:
    """One painted tumour and its sheet.

    diameter_mm: of the sphere with the tumour's volume. contrast_hu: mean change inside it. proportion: P of Eq. 4 over the patch's whole
    mask, NaN without a judge. passed: whether training would get the patch painted. number, num_tumors: which of the patch's tumours it
    is, from 1. (seed, epoch, index) is the patch's address.
    """

    path: Path
    case: str
    organ: str
    size_class: str
    diameter_mm: float
    contrast_hu: float
    proportion: float
    passed: bool
    num_draws: int
    seed: int
    epoch: int
    index: int
    number: int = 1
    num_tumors: int = 1

    @property
    def title(self) -> str:
        """One line for a caption."""
        which = f" {self.number} of {self.num_tumors}" if self.num_tumors > 1 else ""
        return f"{self.case}: synthetic {self.size_class} {self.organ} tumour{which}, {self.measures}, {self.verdict}"

    @property
    def measures(self) -> str:
        """Size and contrast."""
        return f"{self.diameter_mm:.0f} mm, {_signed(self.contrast_hu)} HU"

    @property
    def verdict(self) -> str:
        """P and what quality control says of it."""
        if isnan(self.proportion):
            return "not judged"
        return f"P = {self.proportion:.2f}, {'passed' if self.passed else 'failed'}"


def described(config: Config, sample: PaintedSample, path: Path) -> Iterator[tuple[SheetInfo, NDArray[np.bool_]]]:
    """What there is to say of each tumour of a patch, and its mask. path: of the first one's sheet; others get a number."""
    request, painted = sample.request, sample.painted
    tumors = sample.tumors
    for number, mask in enumerate(tumors, start=1):
        yield (
            SheetInfo(
                path=path if number == 1 else path.with_name(f"{path.stem}-tumor-{number}.png"),
                case=request.case,
                organ=painted.organ,
                size_class=painted.size_class,
                diameter_mm=equivalent_diameter_mm(int(mask.sum()), config.region.spacing_mm_zyx),
                contrast_hu=float(sample.difference_hu[mask].mean()),
                proportion=painted.proportion,
                passed=painted.passed,
                num_draws=painted.num_draws,
                seed=config.seed,
                epoch=request.epoch,
                index=request.index,
                number=number,
                num_tumors=len(tumors),
            ),
            mask,
        )


def draw_sample(
    config: Config,
    sample: PaintedSample,
    info: SheetInfo,
    tumor: NDArray[np.bool_],
    choice: WindowChoice,
    width_px: int,
) -> None:
    """Write the sheet of one tumour of a painted patch to ``info.path``."""
    spacing = config.region.spacing_mm_zyx
    request, difference, window = sample.request, sample.difference_hu, choice.of(config.region, info.organ)
    center = central_voxel(tumor, spacing)
    views = three_views(center, int_zyx(sample.mask.shape), spacing)
    columns = ["original", "mask outline", "synthetic", "difference"]
    if sample.predicted is not None:
        columns.append("judge's prediction")
    grid = PanelGrid(views, len(columns), top=2.05, max_row_height=4.2)
    sheet = Sheet(_whole_pixels(grid.bottom + 1.1), width_px=width_px)
    _head(sheet, config, info, request, window)
    for number, name in enumerate(columns):
        sheet.text(grid.middle_of_column(number), 1.5, name, points=12.0, weight="bold", ha="center")
        sheet.text(grid.middle_of_column(number), 1.77, _below_heading(number, config, info), points=10.0, ha="center")
    limit_hu = difference_limit_hu(sample)
    shown: Any = None
    for row, view in enumerate(views):
        for column in range(len(columns)):
            panel = grid.panel(sheet, row, column)
            if column == 3:
                shown = panel.signed(difference, limit_hu)
            else:
                panel.grey(sample.original_hu if column < 2 else sample.synthetic_hu, window.hu)
            if column in {1, 3, 4}:
                panel.outline(sample.mask, MASK_COLOR, width_pt=1.4)
            if column == 4 and sample.predicted is not None:
                panel.outline(sample.predicted, PREDICTION_COLOR, dashed=True)
            panel.marks()
            if column == 0:
                panel.scale_bar()
        in_volume = request.box.origin_zyx[row] + view.index  # rows and axes have one order: across z, y, x
        name = f"{view.plane}, {'zyx'[row]} = {in_volume}"
        sheet.text(0.26, grid.middle_of_row(row), name, rotation=90.0, ha="center", va="center")
    _foot(sheet, grid, config, sample, shown)
    sheet.save(info.path)


def difference_limit_hu(sample: PaintedSample) -> float:
    """HU at which the difference map of a patch has its full colour."""
    return _round_limit(float(np.percentile(np.abs(sample.difference_hu[sample.mask]), 99)))


def _below_heading(column: int, config: Config, info: SheetInfo) -> str:
    if column == 2:
        return "as painted, before the verdict"
    if column == 3:
        return "synthetic minus original, in HU"
    if column == 4 and not isnan(info.proportion):
        limit = "no T" if config.qc.threshold is None else f"T = {config.qc.threshold:.2f}"
        return f"P = {info.proportion:.2f}, {limit}: {'passed' if info.passed else 'failed'}"
    return ""


def _head(sheet: Sheet, config: Config, info: SheetInfo, request: PatchRequest, window: Window) -> None:
    sheet.text(0.5, 0.14, shortened(info.case, 90), points=17.0, weight="bold")
    which = f" {info.number} of {info.num_tumors}" if info.num_tumors > 1 else ""
    sheet.text(SHEET_WIDTH_IN - 0.2, 0.2, f"synthetic tumour{which}", points=12.0, ha="right")
    sheet.text(
        0.5,
        0.53,
        f"{info.organ}, size class {info.size_class}: {info.diameter_mm:.1f} mm (sphere of the tumour's volume), contrast "
        f"{_signed(info.contrast_hu)} HU (mean change inside it)",
        points=12.0,
    )
    box = request.box
    sheet.text(
        0.5,
        0.82,
        f"address: seed {info.seed}, epoch {info.epoch}, index {info.index};  patch of {_by(box.shape_zyx)} voxels (z, y, x) at "
        f"{_by(config.region.spacing_mm_zyx)} mm from voxel {box.origin_zyx};  {window}",
    )
    words, color = _verdict(config, info)
    sheet.text(0.5, 1.1, words, points=12.0, weight="bold", color=color)


def _verdict(config: Config, info: SheetInfo) -> tuple[str, tuple[float, float, float]]:
    threshold = config.qc.threshold
    draws = "" if info.num_draws == 1 else f" (draw {info.num_draws})"
    if isnan(info.proportion):
        return "Quality control: no judge was given, every painted tumour is kept", PASSED_COLOR
    seen = f"P = {info.proportion:.2f} of the mask is seen as tumour"
    if threshold is None:
        return f"Quality control{draws}: {seen}; no threshold is set, every painted tumour is kept", PASSED_COLOR
    if info.passed:
        return f"Quality control{draws}: PASSED. {seen}, threshold T = {threshold:.2f}", PASSED_COLOR
    return (
        f"Quality control{draws}: FAILED. {seen}, threshold T = {threshold:.2f}; training gets the original patch",
        FAILED_COLOR,
    )


def _foot(sheet: Sheet, grid: PanelGrid, config: Config, sample: PaintedSample, shown: Any) -> None:
    top = grid.bottom + 0.2
    sheet.legend_entry(0.5, top, "border of the tumour mask M", MASK_COLOR)
    if sample.predicted is not None:
        organ = sample.painted.organ
        released = config.synthesis.variant == "released"
        name = (
            "any tumour class"
            if released
            else next(n for n, v in config.region.labels.items() if v == config.region.organs[organ].tumor)
        )
        sheet.legend_entry(4.0, top, f"the judge's {name}", PREDICTION_COLOR, dashed=True)
    bar_axes = sheet.axes(grid.lefts[3] + 0.15, grid.bottom + 0.16, grid.column_width - 0.3, 0.16)
    bar = sheet.figure.colorbar(shown, cax=bar_axes, orientation="horizontal")
    limit = float(shown.norm.vmax)
    bar.set_ticks([-limit, 0.0, limit], labels=["", "", ""])
    bar.outline.set_linewidth(0.6)
    for value, ha, left in (
        (-limit, "left", grid.lefts[3] + 0.15),
        (0.0, "center", grid.middle_of_column(3)),
        (limit, "right", grid.lefts[3] + grid.column_width - 0.15),
    ):
        sheet.text(left, grid.bottom + 0.4, f"{_signed(value)} HU" if value else "0", ha=ha)
    sheet.text(
        0.5,
        grid.bottom + 0.76,
        f"{_VIEW_NOTE} Planes run through the tumour. No random flips, turns or intensity changes, which the loader applies before painting.",
        points=10.0,
    )


@dataclass(frozen=True)
class Tile:
    """One tumour of a contact sheet: the axial slice through its middle. image_hu, mask: [1, y, x]."""

    info: SheetInfo
    image_hu: NDArray[np.float32]
    mask: NDArray[np.bool_]
    view: View
    shown_mm: Rectangle
    window: Window

    @classmethod
    def of(
        cls, config: Config, sample: PaintedSample, info: SheetInfo, tumor: NDArray[np.bool_], choice: WindowChoice
    ) -> "Tile":
        """A copy of the slice, so that the patch's volumes can go."""
        z = central_voxel(tumor, config.region.spacing_mm_zyx)[0]
        image, mask = sample.synthetic_hu[z : z + 1].copy(), sample.mask[z : z + 1].copy()
        view = View("axial", 0, int_zyx(image.shape), config.region.spacing_mm_zyx)
        shown_mm = zoom_mm(view, tumor[z : z + 1])
        return cls(info, image, mask, view, shown_mm, choice.of(config.region, info.organ))


def write_contact_sheet(path: Path, tiles: Sequence[Tile], *, width_px: int = DEFAULT_WIDTH_PX) -> None:
    """Write one PNG with all tumours side by side: axial slice of the painted image with the border of M, size, contrast, verdict."""
    num_columns = 6
    margin, gap, text_height, top = 0.5, 0.16, 0.9, 1.2
    side = (SHEET_WIDTH_IN - 2 * margin - gap * (num_columns - 1)) / num_columns
    num_rows = ceil(len(tiles) / num_columns)
    sheet = Sheet(_whole_pixels(top + num_rows * (side + text_height) + 0.3), width_px=width_px)
    num_passed = sum(tile.info.passed for tile in tiles)
    noun = "tumour" if len(tiles) == 1 else "tumours"
    sheet.text(margin, 0.14, f"{len(tiles)} synthetic {noun}, {num_passed} kept", points=17.0, weight="bold")
    windows = "; ".join(dict.fromkeys(f"{tile.info.organ}: {tile.window}" for tile in tiles))
    sheet.text(margin, 0.53, f"axial slices, {shortened(windows, 130)}", points=12.0)
    sheet.text(margin, 0.8, f"{_VIEW_NOTE} Orange: border of the tumour mask M. Sheets are named as here.", points=10.0)
    for number, tile in enumerate(tiles):
        row, column = divmod(number, num_columns)
        left, upper = margin + column * (side + gap), top + row * (side + text_height)
        panel = Panel(sheet.axes(left, upper, side, side), tile.view, tile.shown_mm)
        panel.grey(tile.image_hu, tile.window.hu)
        panel.outline(tile.mask, MASK_COLOR, width_pt=1.6)
        panel.marks()
        panel.scale_bar()
        info = tile.info
        color = PASSED_COLOR if info.passed else FAILED_COLOR
        sheet.text(left, upper + side + 0.05, info.verdict, points=10.5, weight="bold", color=color)
        sheet.text(left, upper + side + 0.24, f"{info.size_class} {info.organ}, {info.measures}", points=9.5)
        sheet.text(left, upper + side + 0.42, shortened(info.path.stem, 30), points=9.0)
        sheet.text(left, upper + side + 0.58, shortened(info.case, 30), points=9.0)
    sheet.save(path)


def write_volume_sheet(
    path: Path,
    image_hu: NDArray[np.generic],
    label: NDArray[np.uint8],
    *,
    spacing_mm_zyx: FloatZYX,
    window_hu: tuple[float, float],
    labels: Mapping[str, int],
    title: str = "",
    center_zyx: IntZYX | None = None,
    width_px: int = DEFAULT_WIDTH_PX,
) -> None:
    """Write one PNG: axial, coronal and sagittal slice of a CT with the outlines of its classes, and a legend with their volumes.

    image_hu: HU [z, y, x], RAS+. label: uint8 of the same shape. labels: class names to values, 0 being the background. center_zyx: voxel
    to show; None: the centre of the largest labelled part (the larger lung: the centre of both lies where none is), or the middle of a
    volume without a label. Raises ConfigError where shapes differ.
    """
    _same_shapes(path, image_hu, {"label": label})
    shape = int_zyx(image_hu.shape)
    labelled = bool((label > 0).any())
    center = center_zyx or (central_voxel(label, spacing_mm_zyx) if labelled else int_zyx(n // 2 for n in shape))
    views = three_views(center, shape, spacing_mm_zyx)
    # side by side: a row of three views, so that each is a grid of its own, with one scale for all
    top, gap, margin = 1.15, 0.2, 0.3
    scale = min(
        (SHEET_WIDTH_IN - 2 * margin - 2 * gap) / sum(v.extent_mm[1] for v in views),
        7.0 / max(v.extent_mm[0] for v in views),
    )
    bottom = top + 0.3 + max(v.extent_mm[0] for v in views) * scale
    classes = classes_of(labels)
    sheet = Sheet(_whole_pixels(bottom + 0.85 + 0.28 * ceil(len(classes) / 4)), width_px=width_px)
    sheet.text(margin, 0.14, shortened(title or "CT volume", 90), points=17.0, weight="bold")
    sheet.text(
        margin,
        0.53,
        f"{_by(shape)} voxels (z, y, x) at {_by(spacing_mm_zyx)} mm;  {_window(window_hu)}",
        points=12.0,
    )
    left = margin
    for view in views:
        height, width = (length * scale for length in view.extent_mm)
        sheet.text(left + width / 2, top, f"{view.plane}, slice {view.index}", points=12.0, weight="bold", ha="center")
        panel = Panel(sheet.axes(left, top + 0.3, width, height), view)
        panel.grey(image_hu, window_hu)
        for _, value in classes:
            panel.outline(label == value, class_color(value), width_pt=1.5)
        panel.marks()
        panel.scale_bar()
        left += width + gap
    millilitres = prod(spacing_mm_zyx) / 1000.0
    entries = [
        (f"{name}: {num * millilitres:.1f} ml" if num else f"{name}: none", class_color(value))
        for name, value in classes
        for num in [int((label == value).sum())]
    ]
    end = legend_rows(sheet, bottom + 0.2, entries)
    sheet.text(
        margin,
        end + 0.12,
        f"{_VIEW_NOTE} Planes run through {_what_center(center_zyx, labelled=labelled)}.",
        points=10.0,
    )
    sheet.save(path)


def _what_center(center_zyx: IntZYX | None, *, labelled: bool) -> str:
    if center_zyx is not None:
        return f"voxel {center_zyx}"
    return "the centre of the largest labelled part" if labelled else "the volume's middle, as no voxel is labelled"


def zoom_mm(view: View, tumor: NDArray[np.bool_]) -> Rectangle:
    """A square around the largest part of the tumour on the slice, at least 50 mm wide, inside the picture: left, right, top, bottom."""
    picture = view.picture(tumor)
    _, row, column = central_voxel(picture[None], float_zyx((1.0, *view.pixel_mm)))
    height, width = view.pixel_mm
    rows, columns = np.flatnonzero(picture.any(axis=1)), np.flatnonzero(picture.any(axis=0))
    spread = max((rows[-1] - rows[0] + 1) * height, (columns[-1] - columns[0] + 1) * width)
    side = min(max(50.0, 1.6 * float(spread)), *view.extent_mm)
    left = min(max((column + 0.5) * width - side / 2, 0.0), view.extent_mm[1] - side)
    top = min(max((row + 0.5) * height - side / 2, 0.0), view.extent_mm[0] - side)
    return left, left + side, top, top + side


def _same_shapes(path: Path, image_hu: NDArray[np.generic], others: Mapping[str, NDArray[np.uint8]]) -> None:
    for name, array in others.items():
        if image_hu.ndim != 3 or array.shape != image_hu.shape:
            raise ConfigError(
                f"{path.name}: image_hu has shape {image_hu.shape}, {name} {array.shape}; want equal [z, y, x]."
            )


def _whole_pixels(height_in: float) -> float:
    """Up to the next sixteenth of an inch: a whole number of pixels at the usual widths."""
    return ceil(height_in * 16) / 16


def _round_limit(value_hu: float) -> float:
    """The next of 10, 20, 50, 100 ... HU, so that the colours of sheets can be compared; what lies beyond has the full colour."""
    limit = 10.0
    for step in (2.0, 2.5, 2.0) * 4:
        if limit >= value_hu:
            break
        limit *= step
    return limit


def _signed(value: float) -> str:
    """A number with its sign, as a minus and not a hyphen."""
    return f"{value:+.0f}".replace("-", "\N{MINUS SIGN}")


def _window(window_hu: tuple[float, float]) -> str:
    return str(Window("", *window_hu))


def _by(values: Sequence[float]) -> str:
    return " x ".join(f"{v:g}" for v in values)
