"""Slices as a radiologist expects them, and the parts that our sheets are made of: panels, outlines, marks, scale bars.

Volumes are RAS+ [z, y, x]. Drawn as it lies, a slice of one is rotated by 180 degrees from the radiological convention: every plane is
flipped on both axes here, and each picture says where R, L, A, P, S and I are. A picture's row 0 is its top, its column 0 its left side.

matplotlib is used through its objects only (``Figure`` on an Agg canvas, never ``pyplot``): no global state, no window, nothing that
outlives the figure, so pictures can be drawn in any thread.
"""

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias, TypeVar

import numpy as np
import scipy.ndimage as ndi
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle as DrawnRectangle
from matplotlib.patheffects import withStroke
from matplotlib.text import Text
from numpy.typing import NDArray

from ftengine.errors import ConfigError
from ftengine.geometry import FloatZYX, IntZYX, int_zyx
from ftengine.store.layout import label_color

Plane: TypeAlias = Literal["axial", "coronal", "sagittal"]
Color: TypeAlias = tuple[float, float, float]
Rectangle: TypeAlias = tuple[
    float, float, float, float
]  # left, right, top, bottom in mm from a picture's top left corner
ScalarT = TypeVar("ScalarT", bound=np.generic)

PLANES: tuple[Plane, ...] = ("axial", "coronal", "sagittal")
_AXIS: dict[Plane, int] = {"axial": 0, "coronal": 1, "sagittal": 2}  # the array axis that a plane is taken across

SHEET_WIDTH_IN = 16.0  # a power of two, so that inches times dots per inch gives whole pixels
DEFAULT_WIDTH_PX = 1600  # text of 10 points is then 11 pixels high where the sheet is shown 1280 pixels wide
MIN_WIDTH_PX = 320
_FONT = "DejaVu Sans"  # comes with matplotlib

# Okabe and Ito's colours, distinct on grey and with the common colour vision deficiencies; prediction lines are dashed besides
MASK_COLOR: Color = (230 / 255, 159 / 255, 0.0)
PREDICTION_COLOR: Color = (86 / 255, 180 / 255, 233 / 255)
# of differences in HU, from below 0 over none to above: light and dark blue, black, dark and light orange, after Okabe and Ito
DIFFERENCE_COLORS = LinearSegmentedColormap.from_list(
    "difference", ["#d5edfb", "#56b4e9", "#0d5f91", "#000000", "#96480a", "#f0883a", "#ffe3c8"]
)
PASSED_COLOR: Color = (0.0, 114 / 255, 178 / 255)
FAILED_COLOR: Color = (213 / 255, 94 / 255, 0.0)
INK: Color = (0.1, 0.1, 0.12)
_FAINT: Color = (0.35, 0.35, 0.38)
_WHITE: Color = (1.0, 1.0, 1.0)


class Edges(NamedTuple):
    """The patient's side at each edge of a picture."""

    left: str
    right: str
    top: str
    bottom: str


_EDGES: dict[Plane, Edges] = {
    "axial": Edges(left="R", right="L", top="A", bottom="P"),
    "coronal": Edges(left="R", right="L", top="S", bottom="I"),
    "sagittal": Edges(left="A", right="P", top="S", bottom="I"),
}


def radiological(volume: NDArray[ScalarT], plane: Plane, index: int) -> NDArray[ScalarT]:
    """One slice of a RAS+ volume [z, y, x] as a picture [row from the top, column from the left]; a view.

    axial (``index`` along z): anterior up, the patient's right on the left. coronal (along y): superior up, right on the left.
    sagittal (along x): superior up, anterior on the left. Raises ConfigError for an index outside the volume.
    """
    axis = _AXIS[plane]
    if volume.ndim != 3 or not 0 <= index < volume.shape[axis]:
        raise ConfigError(
            f"{plane} slice {index} of a volume of shape {volume.shape}; want [z, y, x] and an index inside it."
        )
    # what is left of z, y, x is (rows, columns) in each case, and both grow against the picture's directions
    picture: NDArray[ScalarT] = np.take(volume, index, axis=axis)[::-1, ::-1]
    return picture


def pixel_mm(plane: Plane, spacing_mm_zyx: FloatZYX) -> tuple[float, float]:
    """Height and width of a pixel of ``radiological``, in mm."""
    height, width = (s for axis, s in enumerate(spacing_mm_zyx) if axis != _AXIS[plane])
    return height, width


def edge_letters(plane: Plane) -> Edges:
    """Where R, L, A, P, S and I lie in a picture of ``plane``."""
    return _EDGES[plane]


def windowed(image_hu: NDArray[np.generic], window_hu: tuple[float, float]) -> NDArray[np.uint8]:
    """HU of any shape as grey values: the window's low end and below 0 (black), its high end and above 255 (white)."""
    low, high = window_hu
    unit = (image_hu.astype(np.float32) - low) / (high - low)
    grey: NDArray[np.uint8] = np.rint(np.clip(unit, 0.0, 1.0) * 255.0).astype(np.uint8)
    return grey


def outline(mask: NDArray[np.generic]) -> list[NDArray[np.float64]]:
    """The border of a picture's mask [row, column] along the edges of its pixels, as closed loops.

    Each loop is [n, 2] in (column, row) units, first point = last point; pixel (r, c) covers c to c + 1 and r to r + 1. The mask lies on
    the right-hand side of the way (as seen in the picture), so holes come as loops of the other turn. Corners only: points on a straight
    way are left out. Nothing is smoothed: what is inside the loops is what the mask holds, and nothing else.
    """
    inside = np.pad(mask.astype(bool), 1)
    core = inside[1:-1, 1:-1]
    ways = (  # border of a pixel: neighbour outside; start and end corner relative to the pixel, clockwise
        (inside[:-2, 1:-1], (0, 0), (1, 0)),
        (inside[1:-1, 2:], (1, 0), (1, 1)),
        (inside[2:, 1:-1], (1, 1), (0, 1)),
        (inside[1:-1, :-2], (0, 1), (0, 0)),
    )
    following: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for neighbour, start, end in ways:
        for row, column in np.argwhere(core & ~neighbour).tolist():
            corner = (column + start[0], row + start[1])
            following.setdefault(corner, []).append((column + end[0], row + end[1]))
    loops = []
    while following:
        first = next(iter(following))
        loop, here = [first], _step(following, first)
        while here != first:
            loop.append(here)
            here = _step(following, here)
        loops.append(_corners_only(np.array(loop, dtype=np.float64)))
    return loops


def _step(following: dict[tuple[int, int], list[tuple[int, int]]], here: tuple[int, int]) -> tuple[int, int]:
    ends = following[here]
    end = ends.pop()
    if not ends:
        del following[here]
    return end


def _corners_only(loop: NDArray[np.float64]) -> NDArray[np.float64]:
    ahead = np.roll(loop, -1, axis=0) - loop
    behind = loop - np.roll(loop, 1, axis=0)
    corners = loop[np.any(ahead != behind, axis=1)]
    return np.concatenate([corners, corners[:1]])


def central_voxel(mask: NDArray[np.generic], spacing_mm_zyx: FloatZYX) -> IntZYX:
    """The voxel of the mask's largest part that lies nearest to that part's centre of mass, so planes through it always cut the mask.

    mask: [z, y, x] with at least one voxel above 0; parts are 26-connected. Raises ConfigError for an empty mask.
    """
    parts, count = ndi.label(mask.astype(bool), structure=np.ones((3, 3, 3)))
    if count == 0:
        raise ConfigError("the mask is empty; want at least one voxel to draw planes through.")
    largest = 1 + int(np.argmax(np.bincount(parts.ravel())[1:]))
    voxels = np.argwhere(parts == largest)
    distance_mm = (voxels - voxels.mean(axis=0)) * np.array(spacing_mm_zyx)
    return int_zyx(voxels[int(np.argmin((distance_mm**2).sum(axis=1)))])


def equivalent_diameter_mm(num_voxels: int, spacing_mm_zyx: FloatZYX) -> float:
    """Diameter of the sphere that has the volume of ``num_voxels`` voxels, in mm."""
    return 2.0 * (3.0 * num_voxels * math.prod(spacing_mm_zyx) / (4.0 * math.pi)) ** (1.0 / 3.0)


def scale_bar_mm(width_mm: float) -> float:
    """Length of a scale bar for a picture of that width: the largest of 1, 2, 5, 10, 20, 50 ... mm up to a third of it."""
    limit = width_mm / 3.0
    decade = 10.0 ** math.floor(math.log10(limit))
    return decade * max(step for step in (1, 2, 5) if step * decade <= limit * (1 + 1e-9))


def class_color(value: int) -> Color:
    """The colour of a label value above 0, as in the store's metadata, for matplotlib."""
    red, green, blue = label_color(value)
    return red / 255.0, green / 255.0, blue / 255.0


@dataclass(frozen=True)
class View:
    """One plane of volumes of a shape and spacing."""

    plane: Plane
    index: int
    shape_zyx: IntZYX
    spacing_mm_zyx: FloatZYX

    def picture(self, volume: NDArray[ScalarT]) -> NDArray[ScalarT]:
        """The slice of a volume of this shape; see ``radiological``."""
        return radiological(volume, self.plane, self.index)

    @property
    def pixel_mm(self) -> tuple[float, float]:
        """Height and width of a pixel, in mm."""
        return pixel_mm(self.plane, self.spacing_mm_zyx)

    @property
    def extent_mm(self) -> tuple[float, float]:
        """Height and width of the picture, in mm."""
        rows, columns = (n for axis, n in enumerate(self.shape_zyx) if axis != _AXIS[self.plane])
        height, width = self.pixel_mm
        return rows * height, columns * width


def three_views(center_zyx: IntZYX, shape_zyx: IntZYX, spacing_mm_zyx: FloatZYX) -> list[View]:
    """The axial, coronal and sagittal view through a voxel."""
    return [View(plane, center_zyx[_AXIS[plane]], shape_zyx, spacing_mm_zyx) for plane in PLANES]


class Panel:
    """One picture of a sheet: a slice in millimetres, with what is drawn over it."""

    def __init__(self, axes: Axes, view: View, shown_mm: Rectangle | None = None) -> None:
        """``shown_mm``: left, right, top, bottom of the part to show, in mm from the picture's top left corner; None: all of it."""
        self._axes, self._view = axes, view
        height, width = view.extent_mm
        left, right, top, bottom = shown_mm or (0.0, width, 0.0, height)
        self._width_mm = right - left
        axes.set_xlim(left, right)
        axes.set_ylim(bottom, top)
        axes.set_aspect("equal")
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set_color((0.6, 0.6, 0.6))
            spine.set_linewidth(0.6)

    def grey(self, image_hu: NDArray[np.generic], window_hu: tuple[float, float]) -> None:
        """Show the slice of a volume of HU."""
        self._show(windowed(self._view.picture(image_hu), window_hu), cmap="gray", low=0.0, high=255.0)

    def signed(self, difference_hu: NDArray[np.generic], limit_hu: float) -> AxesImage:
        """Show the slice of a volume of differences: blue below 0, black at 0, orange above, full colour at ``limit_hu``."""
        picture = self._view.picture(difference_hu)
        return self._show(picture, cmap=DIFFERENCE_COLORS, low=-limit_hu, high=limit_hu)

    def outline(self, mask: NDArray[np.generic], color: Color, *, dashed: bool = False, width_pt: float = 1.8) -> None:
        """Draw the border of a volume's mask; dashes let the dark line below show, so that both styles stand out on any grey."""
        height, width = self._view.pixel_mm
        loops = [loop * (width, height) for loop in outline(self._view.picture(mask))]
        for line_color, line_width, style in (
            ((0.0, 0.0, 0.0), width_pt + 1.2, "solid"),
            (color, width_pt, (0, (3.0, 1.6)) if dashed else "solid"),
        ):
            self._axes.add_collection(
                LineCollection(loops, colors=[line_color], linewidths=line_width, linestyles=[style]), autolim=False
            )

    def frame(self, shown_mm: Rectangle) -> None:
        """Draw the rectangle that another panel shows enlarged: left, right, top, bottom in mm."""
        left, right, top, bottom = shown_mm
        for color, width_pt in (((0.0, 0.0, 0.0), 2.2), (_WHITE, 1.0)):
            box = DrawnRectangle(
                (left, top), right - left, bottom - top, fill=False, edgecolor=color, linewidth=width_pt
            )
            self._axes.add_patch(box)

    def marks(self) -> None:
        """Write the patient's sides at the picture's edges."""
        edges = edge_letters(self._view.plane)
        x, y = self._fraction(0.11)
        for letter, at_x, at_y in (
            (edges.left, x, 0.5),
            (edges.right, 1.0 - x, 0.5),
            (edges.top, 0.5, 1.0 - y),
            (edges.bottom, 0.5, y),
        ):
            self._write(at_x, at_y, letter, ha="center", va="center")

    def scale_bar(self) -> None:
        """Draw a bar of a round number of millimetres at the lower left."""
        length_mm = scale_bar_mm(self._width_mm)
        x, y = self._fraction(0.1)
        for color, width_pt in (((0.0, 0.0, 0.0), 4.2), (_WHITE, 2.4)):
            bar = Line2D(
                [x, x + length_mm / self._width_mm],
                [y, y],
                transform=self._axes.transAxes,
                color=color,
                linewidth=width_pt,
                solid_capstyle="butt",
            )
            self._axes.add_artist(bar)
        self._write(x, 1.6 * y, f"{length_mm:g} mm", ha="left", va="bottom")

    def _fraction(self, length_in: float) -> tuple[float, float]:
        """A length on the sheet in units of the panel's width and height."""
        figure = self._axes.get_figure(root=True)
        assert figure is not None  # noqa: S101 - the axes come from a sheet
        width_in, height_in = self._axes.get_position().size * figure.get_size_inches()
        return length_in / float(width_in), length_in / float(height_in)

    def _show(self, picture: NDArray[np.generic], *, cmap: str | Colormap, low: float, high: float) -> AxesImage:
        height, width = self._view.extent_mm
        limits = self._axes.get_xlim(), self._axes.get_ylim()
        shown = self._axes.imshow(
            picture,
            cmap=cmap,
            vmin=low,
            vmax=high,
            interpolation="nearest",  # a voxel is shown as it is
            extent=(0.0, width, height, 0.0),
        )
        self._axes.set_xlim(limits[0])
        self._axes.set_ylim(limits[1])
        return shown

    def _write(self, x: float, y: float, text: str, *, ha: str, va: str) -> None:
        written = _text(x, y, text, points=10.0, color=_WHITE, ha=ha, va=va, halo=True, weight="bold")
        written.set_transform(self._axes.transAxes)
        self._axes.add_artist(written)


class Sheet:
    """A page of panels and text. Lengths are inches from the top left corner; a sheet is ``SHEET_WIDTH_IN`` wide."""

    def __init__(self, height_in: float, *, width_px: int = DEFAULT_WIDTH_PX) -> None:
        """``width_px``: width of the PNG. Raises ConfigError where it is too small to read anything."""
        if width_px < MIN_WIDTH_PX:
            raise ConfigError(f"width_px={width_px}; want at least {MIN_WIDTH_PX} pixels for a legible sheet.")
        self._height_in = height_in
        self.figure = Figure(figsize=(SHEET_WIDTH_IN, height_in), dpi=width_px / SHEET_WIDTH_IN, facecolor="white")

    def axes(self, left: float, top: float, width: float, height: float) -> Axes:
        """Axes in a rectangle of the sheet."""
        return self.figure.add_axes(
            (
                left / SHEET_WIDTH_IN,
                1.0 - (top + height) / self._height_in,
                width / SHEET_WIDTH_IN,
                height / self._height_in,
            )
        )

    def text(
        self,
        left: float,
        top: float,
        text: str,
        *,
        points: float = 10.5,
        color: Color = INK,
        weight: str = "normal",
        ha: str = "left",
        va: str = "top",
        rotation: float = 0.0,
    ) -> None:
        """Write text as it is: no mathematics, and "?" for characters that the font lacks."""
        self.figure.add_artist(
            _text(
                left / SHEET_WIDTH_IN,
                1.0 - top / self._height_in,
                text,
                points=points,
                color=color,
                weight=weight,
                ha=ha,
                va=va,
                rotation=rotation,
            )
        )

    def legend_entry(self, left: float, top: float, text: str, color: Color, *, dashed: bool = False) -> None:
        """A sample of an outline and what it stands for."""
        y = 1.0 - (top + 0.09) / self._height_in
        x = [left / SHEET_WIDTH_IN, (left + 0.42) / SHEET_WIDTH_IN]
        below = Line2D(x, [y, y], color=(0.0, 0.0, 0.0), linewidth=4.0, solid_capstyle="butt")
        style: Literal["solid"] | tuple[float, tuple[float, float]] = (0.0, (2.4, 1.2)) if dashed else "solid"
        above = Line2D(
            x, [y, y], color=color, linewidth=2.6, linestyle=style, solid_capstyle="butt", dash_capstyle="butt"
        )
        self.figure.add_artist(below)
        self.figure.add_artist(above)
        self.text(left + 0.52, top, text)

    def save(self, path: Path) -> None:
        """Write the sheet as PNG; its folder is made."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png_bytes(self.figure))


def png_bytes(figure: Figure) -> bytes:
    """A figure as PNG; equal figures give equal bytes."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": "ftengine"})
    return buffer.getvalue()


class PanelGrid:
    """Where the panels of a sheet lie: columns of equal width, one row for each view; lengths in inches."""

    def __init__(
        self,
        views: Sequence[View],
        num_columns: int,
        *,
        top: float,
        max_row_height: float = 5.0,
        gap: float = 0.14,
    ) -> None:
        """A millimetre has the same length in all rows; no row gets higher than ``max_row_height``."""
        margin_left, margin_right = 0.5, 0.2
        self._views = tuple(views)
        self.column_width = (SHEET_WIDTH_IN - margin_left - margin_right - gap * (num_columns - 1)) / num_columns
        self._scale = min(min(self.column_width / v.extent_mm[1], max_row_height / v.extent_mm[0]) for v in views)
        heights = [v.extent_mm[0] * self._scale for v in views]
        self.tops = tuple(top + sum(heights[:row]) + gap * row for row in range(len(heights)))
        self.lefts = tuple(margin_left + (self.column_width + gap) * number for number in range(num_columns))
        self.bottom = self.tops[-1] + heights[-1]

    def middle_of_column(self, column: int) -> float:
        """Middle of a column, from the sheet's left side."""
        return self.lefts[column] + self.column_width / 2

    def middle_of_row(self, row: int) -> float:
        """Middle of a row, from the sheet's top."""
        return self.tops[row] + self._views[row].extent_mm[0] * self._scale / 2

    def panel(self, sheet: Sheet, row: int, column: int) -> Panel:
        """A new panel in the middle of its column."""
        view = self._views[row]
        height, width = (length * self._scale for length in view.extent_mm)
        left = self.middle_of_column(column) - width / 2
        return Panel(sheet.axes(left, self.tops[row], width, height), view)


def legend_rows(
    sheet: Sheet, top: float, entries: Iterable[tuple[str, Color]], *, per_row: int = 4, row_height: float = 0.28
) -> float:
    """Write legend entries in rows; returns where they end, in inches from the top."""
    shown = list(entries)
    for number, (text, color) in enumerate(shown):
        row, column = divmod(number, per_row)
        left = 0.5 + column * (SHEET_WIDTH_IN - 0.7) / per_row
        sheet.legend_entry(left, top + row * row_height, shortened(text, 150 // per_row), color)
    return top + row_height * -(-len(shown) // per_row)


def classes_of(labels: Mapping[str, int]) -> list[tuple[str, int]]:
    """Names and values of the classes that get an outline: all but the background, by value."""
    return sorted(((name, value) for name, value in labels.items() if value), key=lambda item: item[1])


def shortened(text: str, limit: int) -> str:
    """A text of at most ``limit`` characters; a longer one loses its middle, as the ends of a case name tell most."""
    if len(text) <= limit:
        return text
    head = (limit - 3) // 2
    return f"{text[:head]}...{text[len(text) - (limit - 3 - head) :]}"


def printable(text: str) -> str:
    """The text with "?" for what the font cannot show: a missing glyph would only be warned about, a control character moves others."""
    known = _code_points()
    return "".join(c if ord(c) in known and c.isprintable() else "?" for c in text)


@lru_cache(maxsize=1)
def _code_points() -> frozenset[int]:
    return frozenset(get_font(findfont(FontProperties(family=_FONT))).get_charmap())


def _text(
    x: float,
    y: float,
    text: str,
    *,
    points: float,
    color: Color,
    weight: str = "normal",
    ha: str = "left",
    va: str = "top",
    rotation: float = 0.0,
    halo: bool = False,
) -> Text:
    made = Text(
        x,
        y,
        printable(text),
        color=color,
        rotation=rotation,
        horizontalalignment=ha,  # type: ignore[arg-type]  # matplotlib's literals, chosen by our own callers only
        verticalalignment=va,  # type: ignore[arg-type]  # as above
        fontproperties=FontProperties(family=_FONT, size=points, weight=weight),
        parse_math=False,  # a "$" in a case name is a dollar
        usetex=False,
    )
    if halo:
        made.set_path_effects([withStroke(linewidth=2.4, foreground="black")])
    return made
