"""Charts: values land where they should, no peak is lost, texts stay texts."""

import re
from xml.etree import ElementTree as ET

import numpy as np
import pytest

from ftengine.report.charts import (
    WIDTH,
    Line,
    Strip,
    heat_chart,
    line_chart,
    scatter_chart,
    strip_chart,
    thinned,
)

EVIL = "<img src=x onerror=1>\"'&"


def svg_of(html: str) -> ET.Element:
    return ET.fromstring(html.split("</svg>", maxsplit=1)[0] + "</svg>")  # noqa: S314 - our own output


def test_line_goes_from_the_lowest_to_the_highest_value() -> None:
    svg = svg_of(line_chart([Line("loss", [0, 50, 100], [2.0, 1.0, 0.0])], x_label="step", alt="falls"))
    line = svg.find("polyline")
    assert line is not None
    points = [tuple(map(float, p.split(","))) for p in line.attrib["points"].split()]
    assert points[0][0] < points[1][0] < points[2][0] < WIDTH
    assert points[0][1] < points[1][1] < points[2][1]
    assert points[1][0] == pytest.approx((points[0][0] + points[2][0]) / 2, abs=0.1)
    assert {"0", "20", "40", "60", "80", "100"} <= {t.text for t in svg.findall("text")}
    assert svg.attrib["aria-label"] == "falls"


@pytest.mark.parametrize("values", [[1.0], [3.0, 3.0, 3.0], [0.0, 0.0], [1e-9, 2e-9], [-5.0, 1e6]])
def test_any_values_can_be_drawn(values: list[float]) -> None:
    svg = svg_of(line_chart([Line("x", list(range(len(values))), values)], x_label="step", alt="x"))
    assert "nan" not in ET.tostring(svg, encoding="unicode")


def test_long_lines_are_thinned_and_keep_their_peaks() -> None:
    y = np.random.default_rng(0).normal(size=5000)
    y[1234], y[4321] = 99.0, -99.0
    kept = thinned(list(range(5000)), y.tolist())
    assert len(kept) <= 300
    assert {(1234, 99.0), (4321, -99.0)} <= set(kept)
    assert [x for x, _ in kept] == sorted(x for x, _ in kept)


def test_several_lines_differ_in_more_than_colour_and_are_named() -> None:
    html = line_chart([Line(EVIL, [0, 1], [0, 1]), Line("b", [0, 1], [1, 0])], x_label="step", alt="two")
    assert [p.attrib["class"] for p in svg_of(html).findall("polyline")] == ["l1", "l2"]
    assert html.count("<li>") == 2
    assert "<img" not in html


def test_heat_has_a_cell_where_something_is() -> None:
    shares = np.zeros((3, 10))
    shares[0, 0], shares[1, 9], shares[2, 4] = 1.0, 1.0, 1.0
    svg = svg_of(heat_chart([10, 20, 30], shares, x_label="step", y_label="P", alt="P", limit=0.5))
    cells = [(float(r.attrib["x"]), float(r.attrib["y"])) for r in svg.findall("rect")]
    assert len(cells) == 3
    assert cells[0][0] < cells[1][0] < cells[2][0]
    assert cells[1][1] < cells[2][1] < cells[0][1]  # up is more
    assert "T = 0.5" in {t.text for t in svg.findall("text")}


def test_strip_shows_every_case_with_its_name() -> None:
    strips = [Strip("one", [0.0, 0.5, 0.5, 1.0], ["a", EVIL, "c", "d"]), Strip(EVIL, [0.2], ["a"])]
    html = strip_chart(strips, x_label="Dice", alt="strips")
    svg = svg_of(html)
    dots = svg.findall("circle")
    assert [dot.findtext("title") for dot in dots] == ["a: 0.000", f"{EVIL}: 0.500", "c: 0.500", "d: 1.000", "a: 0.200"]
    x = [float(dot.attrib["cx"]) for dot in dots]
    assert x[0] < x[1] == x[2] < x[3]
    assert dots[1].attrib["cy"] != dots[2].attrib["cy"]  # equal values lie side by side
    assert len(svg.findall("rect")) == 2
    assert not re.search("<img", html)


def test_scatter_marks_groups_by_shape() -> None:
    svg = svg_of(
        scatter_chart(
            [Line("real", [1.0], [0.5]), Line("painted", [2.0, 3.0], [0.1, 0.9])], x_label="HU", alt="P", y_range=(0, 1)
        )
    )
    assert len(svg.findall("circle")) == 1
    assert sum(p.attrib["class"] == "cross c2" for p in svg.findall("path")) == 2
