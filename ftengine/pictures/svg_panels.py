"""Panels of a page: slices in radiological view as inline SVG, so that they fit any width, light and dark, and stay sharp.

The same parts as the panels of a sheet (``pictures.Panel``): grey slice or difference, outlines, marks, scale bar. A slice is a PNG with one
pixel a voxel, which the browser enlarges without smoothing; outlines and letters are vectors over it. Lengths are millimetres.
"""

import base64
import io
from collections.abc import Callable, Sequence
from html import escape
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ftengine.pictures.panels import (
    DIFFERENCE_COLORS,
    Rectangle,
    View,
    edge_letters,
    outline,
    scale_bar_mm,
    windowed,
)

Role = Literal["mask", "truth", "prediction"]
Colored = Callable[[NDArray[np.generic]], NDArray[np.uint8]]


class SvgPanel:
    """One picture: a slice, or a part of it, with what is drawn over it. ``svg`` gives the element."""

    def __init__(self, view: View, alt: str, shown_mm: Rectangle | None = None) -> None:
        """``alt`` says what the picture shows; ``shown_mm``: the part to show, None: all of it."""
        height, width = view.extent_mm
        self._view, self._alt = view, alt
        self._shown = shown_mm or (0.0, width, 0.0, height)
        self._parts: list[str] = []

    def grey(self, image_hu: NDArray[np.generic], window_hu: tuple[float, float]) -> None:
        """Show the slice of a volume of HU."""
        self._show(lambda part: windowed(part, window_hu), image_hu)

    def signed(self, difference_hu: NDArray[np.generic], limit_hu: float) -> None:
        """Show the slice of a volume of differences: blue below 0, black at 0, orange above, full colour at ``limit_hu``."""
        self._show(lambda part: difference_rgb(part, limit_hu), difference_hu)

    def outline(self, mask: NDArray[np.generic], role: Role) -> None:
        """Draw the border of a volume's mask; a prediction's is dashed, whatever its colour."""
        height, width = self._view.pixel_mm
        loops = [loop * (width, height) for loop in outline(self._view.picture(mask))]
        inside = [loop for loop in loops if self._meets(loop)]
        if inside:
            way = "".join(_path(loop) for loop in inside)
            self._parts.append(f'<path class="below" d="{way}"/><path class="{role}" d="{way}"/>')

    def frame(self, shown_mm: Rectangle) -> None:
        """Draw the rectangle that another panel shows enlarged."""
        left, right, top, bottom = shown_mm
        self._parts.append(
            f'<rect class="frame" x="{left:.2f}" y="{top:.2f}" width="{right - left:.2f}" height="{bottom - top:.2f}"/>'
        )

    def marks(self) -> None:
        """Write the patient's sides at the picture's edges."""
        left, right, top, bottom = self._shown
        edges, unit = edge_letters(self._view.plane), self._unit
        middle_x, middle_y = (left + right) / 2, (top + bottom) / 2 + 0.35 * unit
        for letter, x, y in (
            (edges.left, left + 0.7 * unit, middle_y),
            (edges.right, right - 0.7 * unit, middle_y),
            (edges.top, middle_x, top + 1.1 * unit),
            (edges.bottom, middle_x, bottom - 0.4 * unit),
        ):
            self._write(letter, x, y, "middle")

    def scale_bar(self) -> None:
        """Draw a bar of a round number of millimetres at the lower left."""
        left, right, _, bottom = self._shown
        unit, length_mm = self._unit, scale_bar_mm(right - left)
        x, y = left + 0.5 * unit, bottom - 0.5 * unit
        for name in ("bar-below", "bar"):
            self._parts.append(f'<path class="{name}" d="M{x:.2f} {y:.2f}h{length_mm:g}"/>')
        self._write(f"{length_mm:g} mm", x, y - 0.45 * unit, "start")

    def svg(self) -> str:
        """The element: an image with a name for those who do not see it."""
        left, right, top, bottom = self._shown
        return (
            f'<svg class="ct" role="img" aria-label="{escape(self._alt)}" viewBox="{left:.2f} {top:.2f} {right - left:.2f} {bottom - top:.2f}">'
            f"{''.join(self._parts)}</svg>"
        )

    @property
    def _unit(self) -> float:
        """Height of a letter: a sixteenth of the panel's width."""
        return (self._shown[1] - self._shown[0]) / 16

    def _meets(self, loop: NDArray[np.float64]) -> bool:
        left, right, top, bottom = self._shown
        (x0, y0), (x1, y1) = loop.min(axis=0), loop.max(axis=0)
        return bool(x1 > left and x0 < right and y1 > top and y0 < bottom)

    def _show(self, colored: Colored, volume: NDArray[np.generic]) -> None:
        picture = self._view.picture(volume)
        height, width = self._view.pixel_mm
        left, right, top, bottom = self._shown
        # whole voxels that the shown part touches
        first_row, first_column = max(0, int(top / height)), max(0, int(left / width))
        part = picture[first_row : int(np.ceil(bottom / height)), first_column : int(np.ceil(right / width))]
        rows, columns = part.shape
        self._parts.append(
            f'<image x="{first_column * width:.3f}" y="{first_row * height:.3f}" width="{columns * width:.3f}" height="{rows * height:.3f}" '
            f'preserveAspectRatio="none" href="{data_uri(png_of(colored(part)))}"/>'
        )

    def _write(self, text: str, x: float, y: float, anchor: str) -> None:
        self._parts.append(
            f'<text x="{x:.2f}" y="{y:.2f}" font-size="{self._unit:.2f}" stroke-width="{self._unit / 5:.2f}" text-anchor="{anchor}">{escape(text)}</text>'
        )


def difference_rgb(difference_hu: NDArray[np.generic], limit_hu: float) -> NDArray[np.uint8]:
    """Differences [rows, columns] in HU as colours uint8 [rows, columns, 3]: full colour at plus and minus ``limit_hu``."""
    unit = np.clip((difference_hu.astype(np.float32) + limit_hu) / (2.0 * limit_hu), 0.0, 1.0)
    colored: NDArray[np.uint8] = DIFFERENCE_COLORS(unit, bytes=True)[..., :3]
    return colored


def png_of(pixels: NDArray[np.uint8]) -> bytes:
    """Pixels as PNG; equal pixels give equal bytes."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def data_uri(png: bytes) -> str:
    """A PNG as the address of a picture that is inside the page."""
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"


def _path(loop: NDArray[np.float64]) -> str:
    points: Sequence[tuple[float, float]] = loop[:-1].tolist()
    return "M" + "L".join(f"{x:.2f} {y:.2f}" for x, y in points) + "Z"
