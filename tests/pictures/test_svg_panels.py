"""Panels of a page: the same pixels, sides and borders as on a sheet, and nothing that a text could break out of."""

import base64
import io
import re
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from ftengine.pictures.panels import PLANES, Plane, View, edge_letters, radiological, windowed
from ftengine.pictures.svg_panels import SvgPanel, difference_rgb

SHAPE, SPACING = (5, 6, 7), (4.0, 2.0, 1.0)
WINDOW = (0.0, 255.0)


def pixels(element: ET.Element) -> NDArray[np.uint8]:
    data = element.attrib["href"].removeprefix("data:image/png;base64,")
    with Image.open(io.BytesIO(base64.b64decode(data, validate=True))) as image:
        return np.asarray(image)


def drawn(panel: SvgPanel) -> ET.Element:
    return ET.fromstring(panel.svg())  # noqa: S314 - our own output


@pytest.mark.parametrize("plane", PLANES)
def test_pixels_and_sides_are_those_of_the_radiological_view(plane: Plane) -> None:
    volume = np.arange(np.prod(SHAPE), dtype=np.float32).reshape(SHAPE)
    view = View(plane, 2, SHAPE, SPACING)
    panel = SvgPanel(view, "a slice")
    panel.grey(volume, WINDOW)
    panel.marks()
    panel.scale_bar()
    svg = drawn(panel)
    image = svg.find("image")
    assert image is not None
    np.testing.assert_array_equal(pixels(image), windowed(radiological(volume, plane, 2), WINDOW))
    height, width = view.extent_mm
    assert [float(image.attrib[k]) for k in ("x", "y", "width", "height")] == [0.0, 0.0, width, height]
    place = {t.text: (float(t.attrib["x"]) / width, float(t.attrib["y"]) / height) for t in svg.findall("text")}
    edges = edge_letters(plane)
    assert place[edges.left][0] < 0.1
    assert place[edges.right][0] > 0.9
    assert place[edges.top][1] < 0.3
    assert place[edges.bottom][1] > 0.7
    assert any(text is not None and text.endswith(" mm") for text in place)


def test_part_of_a_slice_holds_the_voxels_it_touches_at_their_place() -> None:
    volume = np.arange(np.prod(SHAPE), dtype=np.float32).reshape(SHAPE)
    view = View("axial", 1, SHAPE, SPACING)
    panel = SvgPanel(view, "a part", (1.5, 4.5, 3.0, 8.0))  # columns 1 to 4 of 1 mm, rows 1 to 3 of 2 mm
    panel.grey(volume, WINDOW)
    svg = drawn(panel)
    image = svg.find("image")
    assert image is not None
    np.testing.assert_array_equal(pixels(image), windowed(radiological(volume, "axial", 1), WINDOW)[1:4, 1:5])
    assert [float(image.attrib[k]) for k in ("x", "y", "width", "height")] == [1.0, 2.0, 4.0, 6.0]
    assert svg.attrib["viewBox"] == "1.50 3.00 3.00 5.00"


def test_outline_is_the_border_of_the_mask_in_millimetres() -> None:
    mask = np.zeros(SHAPE, dtype=bool)
    mask[1, 2:4, 1] = True  # in the picture: column 7 - 1 - 1 = 5, rows 2 and 3
    panel = SvgPanel(View("axial", 1, SHAPE, SPACING), "a mask")
    panel.outline(mask, "prediction")
    below, above = drawn(panel).findall("path")
    assert (below.attrib["class"], above.attrib["class"]) == ("below", "prediction")
    numbers = np.array([float(n) for n in re.findall(r"[\d.]+", above.attrib["d"])]).reshape(-1, 2)
    assert (numbers.min(axis=0).tolist(), numbers.max(axis=0).tolist()) == ([5.0, 4.0], [6.0, 8.0])
    away = SvgPanel(View("axial", 1, SHAPE, SPACING), "elsewhere", (0.0, 3.0, 0.0, 3.0))
    away.outline(mask, "mask")
    assert not drawn(away).findall("path")


def test_difference_is_black_at_zero_and_tells_signs_apart() -> None:
    colors = difference_rgb(np.array([[-200.0, -50.0, 0.0, 50.0, 200.0]]), 100.0).astype(int)[0]
    assert colors[2].max() <= 3
    assert colors[1][2] > colors[1][0] + 40  # blue
    assert colors[3][0] > colors[3][2] + 40  # orange
    np.testing.assert_array_equal(difference_rgb(np.array([[-100.0, 100.0]]), 100.0)[0], colors[[0, 4]])


def test_text_from_outside_stays_text() -> None:
    evil = "\"><script>alert(1)</script>&'"
    panel = SvgPanel(View("axial", 0, SHAPE, SPACING), evil)
    svg = drawn(panel)
    assert svg.attrib["aria-label"] == evil
    assert not list(svg)
