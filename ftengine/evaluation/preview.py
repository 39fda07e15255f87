"""Pictures of what training sees: painted patches, many of them at a glance, volumes with their labels."""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, isnan, prod
from pathlib import Path
from typing import Any

import numpy as np
import scipy.ndimage as ndi
import torch
from numpy.typing import NDArray
from torch import nn

from ftengine.config import Config
from ftengine.errors import ConfigError
from ftengine.evaluation.hu_windows import Window, WindowChoice
from ftengine.evaluation.pictures import (
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
from ftengine.geometry import FloatZYX, IntZYX, float_zyx, int_zyx
from ftengine.loader.pipeline import PatchPipeline
from ftengine.loader.plan import Mix, Plan
from ftengine.store.reader import Store
from ftengine.synthesis.bank import TumorBank
from ftengine.synthesis.engine import Address, Generator, Judge, Synthesizer
from ftengine.synthesis.shape import count_labels, organs_in_patch
from ftengine.types import Augmentation, Painted, Patch, PatchRequest

TRIES_PER_SHEET = (
    100  # patches looked at for one sheet: eligible ones are rarer than 1 in 100 only where a run would starve too
)

REGION_WINDOW = WindowChoice()
Segmenter = Callable[[torch.Tensor], torch.Tensor]
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


@dataclass(frozen=True)
class PaintedSample:
    """A painted patch; arrays are [z, y, x] on one grid, images in HU inside the region's window.

    mask: M. predicted: the tumour that the judge sees, or None. tumors: the masks of the single tumours of M, the largest first.
    """

    request: PatchRequest
    painted: Painted
    original_hu: NDArray[np.float32]
    synthetic_hu: NDArray[np.float32]
    mask: NDArray[np.bool_]
    predicted: NDArray[np.bool_] | None

    @property
    def difference_hu(self) -> NDArray[np.float32]:
        """Synthetic minus original."""
        return self.synthetic_hu - self.original_hu

    @property
    def tumors(self) -> list[NDArray[np.bool_]]:
        """The tumours of M, the largest first: as many connected parts (26) as were drawn; all of M where one was, cut in two or not."""
        num_drawn = len(self.painted.center_zyx)
        if num_drawn == 1:
            return [self.mask]
        parts, _ = ndi.label(self.mask, structure=np.ones((3, 3, 3)))
        sizes = np.bincount(parts.ravel())[1:]
        return [parts == 1 + number for number in np.argsort(-sizes, kind="stable")[:num_drawn].tolist()]


class _Witness:
    """Asks the judge and keeps the image it judged: a failed patch is handed back unpainted (Eq. 5), but a sheet shows why it failed."""

    def __init__(self, judge: Judge) -> None:
        self._judge = judge
        self.image: torch.Tensor | None = None

    def __call__(
        self, image: torch.Tensor, mask: torch.Tensor, tumor_values: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.image = image
        return self._judge(image, mask, tumor_values)


def preview(
    config: Config,
    store: Store,
    out: Path,
    *,
    num_sheets: int,
    per_size: bool = False,
    generator: Generator | None = None,
    judge: Judge | None = None,
    segmenter: Segmenter | None = None,
    bank: TumorBank | None = None,
    mix: Mix = "mixed",
    split: str | None = None,
    window: WindowChoice = REGION_WINDOW,
    contact: bool = False,
    on_sheet: Callable[[SheetInfo], None] = lambda _sheet: None,
    width_px: int = DEFAULT_WIDTH_PX,
) -> list[SheetInfo]:
    """Draw ``out/sheet-000.png`` and following: patches of ``painted_samples``, a sheet a tumour.

    A sheet has three planes through the tumour and the columns original, mask outline, synthetic, difference in HU and, with ``segmenter``,
    that network's prediction. Sheets of a patch's further tumours are named ``sheet-000-tumor-2.png``; with ``per_size``, sheets are
    ``sheet-SIZE-000.png`` and come back by size class. contact: also draw ``out/contact.png``, all tumours side by side.

    Arguments beside these as ``painted_samples`` takes them. window: of the grey pictures. on_sheet: called after each sheet. width_px:
    width of the PNGs. Raises ConfigError as ``painted_samples`` does.
    """
    sheets: list[SheetInfo] = []
    tiles: list[Tile] = []
    num_of: Counter[str] = Counter()
    for sample in painted_samples(
        config,
        store,
        num_patches=num_sheets,
        per_size=per_size,
        generator=generator,
        judge=judge,
        segmenter=segmenter,
        bank=bank,
        mix=mix,
        split=split,
    ):
        kind = sample.painted.size_class if per_size else ""
        stem = "-".join(["sheet", *([_file_part(kind)] if kind else []), f"{num_of[kind]:03d}"])
        num_of[kind] += 1
        for info, mask in described(config, sample, out / f"{stem}.png"):
            draw_sample(config, sample, info, mask, window, width_px)
            sheets.append(info)
            if contact:
                tiles.append(Tile.of(config, sample, info, mask, window))
            on_sheet(info)
    if contact:
        write_contact_sheet(
            out / "contact.png", sorted(tiles, key=lambda t: _size_order(config, t.info)), width_px=width_px
        )
    return sorted(sheets, key=lambda info: _size_order(config, info)) if per_size else sheets


def painted_samples(
    config: Config,
    store: Store,
    *,
    num_patches: int,
    per_size: bool = False,
    generator: Generator | None = None,
    judge: Judge | None = None,
    segmenter: Segmenter | None = None,
    bank: TumorBank | None = None,
    mix: Mix = "mixed",
    split: str | None = None,
) -> Iterator[PaintedSample]:
    """Patches as the loader reads them, painted and judged: the first ``num_patches`` that can be painted, or with ``per_size`` the first
    so many of each size class.

    Patches come in the loader's order, from epoch 0 on, through the loader's own plan, reader and DALI graph; tumours have the
    addresses they have in training, and every eligible patch is painted whatever ``synthesis.fraction`` says. One difference: the
    random flips, turns and intensity changes are left out, so that the pictures stay in radiological orientation; where training draws
    some for a patch, the tumour it paints there lies elsewhere in the same organ.

    config: for the store's region. generator, judge: as ``Synthesizer`` takes them, on the configured device; generator None paints a
    fixed contrast, judge None keeps every tumour; bank: as ``assemble.build_bank`` makes it, for copy-paste. segmenter: float32
    [1, 1, z, y, x] -> logits [1, classes, z, y, x], the network the judge asks; a module is moved to the device and set to eval mode.
    split: only volumes of that split. Tries ``TRIES_PER_SHEET`` patches for each that is asked for, and ends with fewer where those do
    not suffice. Raises ConfigError where none can be painted, where configuration and store differ, or for ``num_patches`` below 1.
    """
    if num_patches < 1:
        raise ConfigError(f"num_patches={num_patches}; want at least 1.")
    if (store.spacing_mm_zyx, store.labels) != (config.region.spacing_mm_zyx, config.region.labels):
        raise ConfigError(
            f"{store.location}: holds {store.region} at {store.spacing_mm_zyx} mm with labels {store.labels}; the configuration is for "
            f"{config.region.name} at {config.region.spacing_mm_zyx} mm with labels {config.region.labels}. Choose the store's own."
        )
    sizes = size_classes(config) if per_size else [""]
    missing = Counter(dict.fromkeys(sizes, num_patches))
    refused: Counter[str] = Counter()
    painter = _Painter(config, store, generator, judge, segmenter, bank)
    num_found = 0
    for request in _requests(Plan(config, store, mix=mix, split=split), missing.total() * TRIES_PER_SHEET):
        sample = painter.paint(request, refused)
        if sample is None:
            continue
        kind = sample.painted.size_class if per_size else ""
        if missing[kind] < 1:
            continue
        missing[kind] -= 1
        num_found += 1
        yield sample
        if not missing.total():
            return
    if not num_found:
        raise ConfigError(_nothing_to_paint(config, store, split, refused))


def size_classes(config: Config) -> list[str]:
    """The size classes that are painted, in the configuration's order: those with a weight, where the weights decide."""
    synthesis = config.synthesis
    by_weight = synthesis.synthesizer != "copy-paste" and synthesis.shape == "paper"
    return [name for name in synthesis.sizes if not by_weight or synthesis.size_weights.get(name, 0.0) > 0]


def _size_order(config: Config, info: SheetInfo) -> int:
    names = list(config.synthesis.sizes)
    return names.index(info.size_class) if info.size_class in names else len(names)


def _file_part(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "_", name) or "_"


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


def _requests(plan: Plan, count: int) -> Iterator[PatchRequest]:
    """The first ``count`` requests of a run, in the loader's order."""
    per_epoch = plan.batches_per_epoch * plan.batch_size
    for number in range(count):
        yield plan.request(*divmod(number, per_epoch))


def _nothing_to_paint(config: Config, store: Store, split: str | None, refused: Counter[str]) -> str:
    where = "" if split is None else f" of split {split!r}"
    counts = "; ".join(f"{reason}: {count}" for reason, count in refused.most_common())
    return (
        f"{store.location}: none of {refused.total()} patches{where} can be painted ({counts}). A patch is painted where its label holds at least "
        f"synthesis.min_organ_voxels={config.synthesis.min_organ_voxels} voxels of {' or '.join(config.region.organs)} and no tumour. Convert "
        "volumes with organ labels, raise loader.positive_fraction where organs are small, or lower synthesis.min_organ_voxels."
    )


class _Painter:
    """Turns patch requests into painted samples, one at a time."""

    def __init__(
        self,
        config: Config,
        store: Store,
        generator: Generator | None,
        judge: Judge | None,
        segmenter: Segmenter | None,
        bank: TumorBank | None,
    ) -> None:
        device = _device(config)
        self._config, self._store = config, store
        self._pipeline = PatchPipeline(config, 1, device=device)
        self._witness = None if judge is None else _Witness(judge)
        self._segmenter = segmenter.to(device).eval() if isinstance(segmenter, nn.Module) else segmenter
        self._synthesizer = Synthesizer(
            config.region,
            config.synthesis.model_copy(update={"fraction": 1.0, "box": "full"}),  # the judge sees what is drawn
            seed=config.seed,
            generator=generator,
            judge=self._witness,
            retries=config.qc.retries,
            bank=bank,
        )

    def paint(self, request: PatchRequest, refused: Counter[str]) -> PaintedSample | None:
        """Read and paint; None, with the reason counted in ``refused``, for a patch that is not eligible."""
        patch = self._store.read(request.case, request.box.origin_zyx, request.box.shape_zyx)
        reason = self._ineligible(patch)
        if reason is not None:
            refused[reason] += 1
            return None
        image, label, _ = self._pipeline([patch], [replace(request, augmentation=Augmentation(), read=request.box)])
        painting = self._synthesizer.paint(image, label, [Address(request.epoch, request.index)])
        painted = painting.records()[0]
        if painted is None or painted.num_voxels == 0:
            refused["the drawn tumour holds no voxel of the organ"] += 1
            return None
        synthetic = painting.image if self._witness is None else self._witness.image
        assert synthetic is not None  # noqa: S101 - a patch that was painted was judged
        return PaintedSample(
            request,
            painted,
            self._hu(image),
            self._hu(synthetic),
            painting.mask[0, 0].cpu().numpy().astype(bool),
            self._predicted(synthetic, painted.organ),
        )

    def _ineligible(self, patch: Patch) -> str | None:
        region = self._config.region
        if organs_in_patch(count_labels(patch.label), region, self._config.synthesis.min_organ_voxels):
            return None
        if np.isin(patch.label, region.tumor_values).any():
            return "a labelled tumour in the patch"
        return "too little healthy organ in the patch"

    def _hu(self, image: torch.Tensor) -> NDArray[np.float32]:
        low, high = self._config.region.window_hu
        unit: NDArray[np.float32] = image[0, 0].cpu().numpy()
        return unit * np.float32(high - low) + np.float32(low)

    def _predicted(self, synthetic: torch.Tensor, organ: str) -> NDArray[np.bool_] | None:
        if self._segmenter is None:
            return None
        with torch.no_grad():
            classes = self._segmenter(synthetic).argmax(1)[0].cpu().numpy()
        released = self._config.synthesis.variant == "released"  # whose judge counts any tumour class
        region = self._config.region
        values = region.tumor_values if released else (region.organs[organ].tumor,)
        predicted: NDArray[np.bool_] = np.isin(classes, values)
        return predicted


def _device(config: Config) -> torch.device:
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(config.device)


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
