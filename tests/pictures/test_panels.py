"""Orientation, outlines and page of our pictures."""

import ast
import io
import itertools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from hypothesis.extra.numpy import arrays
from matplotlib.image import imread
from numpy.typing import NDArray

from ftengine.errors import ConfigError
from ftengine.geometry import grid_from_codes, to_ras
from ftengine.pictures import panels
from ftengine.pictures.panels import (
    Panel,
    Plane,
    Sheet,
    View,
    central_voxel,
    edge_letters,
    equivalent_diameter_mm,
    outline,
    pixel_mm,
    png_bytes,
    printable,
    radiological,
    scale_bar_mm,
    shortened,
    three_views,
    windowed,
)

SHAPE = (5, 6, 7)


def side_of_patient(side: str) -> NDArray[np.int16]:
    """A RAS+ volume that is bright in the voxels at one side of the patient only."""
    volume = np.zeros(SHAPE, dtype=np.int16)
    axis = {"R": 2, "L": 2, "A": 1, "P": 1, "S": 0, "I": 0}[side]
    place: list[int | slice] = [slice(None)] * 3
    place[axis] = -1 if side in "RAS" else 0  # RAS+: indices grow towards right, anterior, superior
    volume[tuple(place)] = 1000
    return volume


@pytest.mark.parametrize("plane", ["axial", "coronal", "sagittal"])
def test_each_letter_stands_where_that_side_of_the_patient_is(plane: Plane) -> None:
    edges = edge_letters(plane)
    for letter, border in (
        (edges.left, np.s_[:, 0]),
        (edges.right, np.s_[:, -1]),
        (edges.top, np.s_[0]),
        (edges.bottom, np.s_[-1]),
    ):
        picture = radiological(side_of_patient(letter), plane, 2)
        assert (picture[border] == 1000).all()
        assert (picture == 1000).sum() == picture[border].size


def test_letters_are_those_a_radiologist_expects() -> None:
    assert edge_letters("axial") == ("R", "L", "A", "P")
    assert edge_letters("coronal") == ("R", "L", "S", "I")
    assert edge_letters("sagittal") == ("A", "P", "S", "I")


def test_axial_picture_is_the_dicom_slice_as_it_lies_in_the_file() -> None:
    """Columns of an axial DICOM slice run to the left, rows to the back: what every viewer shows without turning it."""
    stored = np.arange(np.prod(SHAPE), dtype=np.int16).reshape(SHAPE)
    volume, _ = to_ras(stored, grid_from_codes(SHAPE, (5.0, 0.8, 0.8), "LPS"))
    for z in range(SHAPE[0]):
        np.testing.assert_array_equal(radiological(volume, "axial", z), stored[z])


def test_index_outside_the_volume_is_refused() -> None:
    with pytest.raises(ConfigError, match="axial slice 5"):
        radiological(side_of_patient("R"), "axial", 5)
    with pytest.raises(ConfigError, match="sagittal slice -1"):
        radiological(side_of_patient("R"), "sagittal", -1)


def test_pixels_have_the_spacing_of_their_plane() -> None:
    spacing = (5.0, 1.5, 0.8)
    assert [pixel_mm(p, spacing) for p in panels.PLANES] == [(1.5, 0.8), (5.0, 0.8), (5.0, 1.5)]
    views = three_views((1, 2, 3), SHAPE, spacing)
    assert [v.index for v in views] == [1, 2, 3]
    np.testing.assert_allclose(
        [v.extent_mm for v in views], [(6 * 1.5, 7 * 0.8), (5 * 5.0, 7 * 0.8), (5 * 5.0, 6 * 1.5)]
    )


def test_drawn_panel_has_the_right_side_up_and_the_aspect_of_the_spacing() -> None:
    volume = np.full((4, 10, 20), -1000, dtype=np.int16)
    volume[2, 8:, 18:] = 1000  # the patient's right, anterior
    view = View("axial", 2, (4, 10, 20), (5.0, 2.0, 1.0))
    height, width = view.extent_mm
    assert (height, width) == (20.0, 20.0)
    sheet = Sheet(4.0, width_px=800)
    Panel(sheet.axes(0.0, 0.0, 4.0, 4.0), view).grey(volume, (-1000.0, 1000.0))
    drawn = imread(io.BytesIO(png_bytes(sheet.figure)))[:, :, 0]
    assert drawn.shape == (200, 800)
    panel = drawn[3:197, 3:197]  # without its frame
    bright = np.argwhere(panel > 0.9)
    assert bright.max(axis=0)[0] == pytest.approx(200 * 2 / 10 - 4, abs=2)
    assert bright.max(axis=0)[1] == pytest.approx(200 * 2 / 20 - 4, abs=2)
    assert bright.min() == 0
    assert (panel[60:] < 0.1).all()


def test_window_maps_its_ends_to_black_and_white() -> None:
    hu = np.array([-1024, -175, 37, 250, 3000], dtype=np.int16)
    assert windowed(hu, (-175.0, 250.0)).tolist() == [0, 0, 127, 255, 255]


def edges_of(loops: list[NDArray[np.float64]]) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """The directed unit steps that loops are made of."""
    steps = []
    for loop in loops:
        assert (loop[0] == loop[-1]).all()
        for start, end in zip(loop[:-1].astype(int), loop[1:].astype(int), strict=True):
            assert (start == end).sum() == 1  # along a row or a column
            count = int(np.abs(end - start).max())
            points = [tuple(p) for p in np.linspace(start, end, count + 1).astype(int).tolist()]
            steps += list(itertools.pairwise(points))
    return steps


@given(mask=arrays(bool, st.tuples(st.integers(1, 9), st.integers(1, 9))))
def test_outline_is_every_border_between_inside_and_outside_once(mask: NDArray[np.bool_]) -> None:
    padded = np.pad(mask, 1)
    wanted = set()
    for row, column in np.argwhere(mask).tolist():
        if not padded[row, column + 1]:
            wanted.add(((column, row), (column + 1, row)))
        if not padded[row + 2, column + 1]:
            wanted.add(((column + 1, row + 1), (column, row + 1)))
        if not padded[row + 1, column]:
            wanted.add(((column, row + 1), (column, row)))
        if not padded[row + 1, column + 2]:
            wanted.add(((column + 1, row), (column + 1, row + 1)))
    loops = outline(mask)
    steps = edges_of(loops)
    assert len(steps) == len(set(steps))
    assert set(steps) == wanted
    area = sum(
        float((loop[:-1, 0] * loop[1:, 1] - loop[1:, 0] * loop[:-1, 1]).sum()) / 2 for loop in loops
    )  # shoelace; holes count negative
    assert area == mask.sum()


def test_outline_keeps_corners_only_and_gives_holes_their_own_loop() -> None:
    mask = np.zeros((7, 8), dtype=np.uint8)
    mask[1:6, 2:7] = 1
    mask[3, 4] = 0
    outer, hole = sorted(outline(mask), key=lambda loop: -float(np.ptp(loop)))
    assert {tuple(p) for p in outer.tolist()} == {(2, 1), (7, 1), (7, 6), (2, 6)}
    assert {tuple(p) for p in hole.tolist()} == {(4, 3), (5, 3), (5, 4), (4, 4)}
    assert len(outer) == len(hole) == 5
    assert outline(np.zeros((3, 3), dtype=bool)) == []


def test_drawn_outline_lies_on_the_border_of_the_mask() -> None:
    mask = np.zeros((3, 20, 20), dtype=np.uint8)
    mask[1, 5:12, 8:14] = 1
    sheet = Sheet(4.0, width_px=1600)
    panel = Panel(sheet.axes(0.0, 0.0, 4.0, 4.0), View("axial", 1, (3, 20, 20), (1.0, 1.0, 1.0)))
    panel.grey(np.zeros(mask.shape, dtype=np.int16), (0.0, 1.0))
    panel.outline(mask, (1.0, 0.0, 0.0))
    drawn = imread(io.BytesIO(png_bytes(sheet.figure)))[:400, :400, :3]
    red = np.argwhere((drawn[..., 0] > 0.9) & (drawn[..., 1] < 0.1))
    # flipped on both axes, 20 pixels a voxel: rows 20 - 12 to 20 - 5, columns 20 - 14 to 20 - 8
    np.testing.assert_allclose(red.min(axis=0), (8 * 20, 6 * 20), atol=2)
    np.testing.assert_allclose(red.max(axis=0), (15 * 20, 12 * 20), atol=2)
    assert not ((red[:, 0] > 165) & (red[:, 0] < 295) & (red[:, 1] > 125) & (red[:, 1] < 235)).any()


def test_central_voxel_lies_in_the_largest_part() -> None:
    mask = np.zeros((9, 12, 12), dtype=np.uint8)
    mask[1, 1, 1] = 1
    mask[4, 2:10, 2:10] = 1
    mask[4, 3:9, 3:9] = 0  # a ring: its centre of mass is outside it
    z, y, x = central_voxel(mask, (1.0, 1.0, 1.0))
    assert z == 4
    assert mask[z, y, x] == 1
    with pytest.raises(ConfigError, match="mask is empty"):
        central_voxel(np.zeros((2, 2, 2)), (1.0, 1.0, 1.0))


def test_equivalent_diameter_is_that_of_a_sphere() -> None:
    z, y, x = np.ogrid[-20:21, -20:21, -20:21]
    ball = z**2 + y**2 + x**2 <= 15**2
    assert equivalent_diameter_mm(int(ball.sum()), (1.0, 1.0, 1.0)) == pytest.approx(30.0, rel=0.01)
    assert equivalent_diameter_mm(1000, (5.0, 1.25, 1.25)) == pytest.approx(
        equivalent_diameter_mm(7812, (1.0, 1.0, 1.0)), rel=1e-3
    )


@given(width=st.floats(0.5, 2000))
def test_scale_bar_is_round_and_fits(width: float) -> None:
    length = scale_bar_mm(width)
    assert width / 7.6 < length <= width / 3 * (1 + 1e-6)  # the steps are at most a factor 2.5 apart
    assert f"{length:.0e}"[0] in "125"


def test_texts_cannot_disturb_a_sheet() -> None:
    assert printable("a\n\x1b[31m$x_{1}$ \u60a3\u8005 \u00fc") == "a??[31m$x_{1}$ ?? \u00fc"
    assert shortened("x" * 20, 20) == "x" * 20
    assert shortened("patient/aaaaaaaaaaaaaaaaaaaa_ct", 15) == "patien...aaa_ct"
    sheet = Sheet(2.0, width_px=320)
    sheet.text(0.1, 0.1, "$\\frac{$ broken mathematics \u60a3")
    assert imread(io.BytesIO(png_bytes(sheet.figure))).shape[:2] == (40, 320)


def test_sheet_too_small_to_read_is_refused() -> None:
    with pytest.raises(ConfigError, match="width_px=100"):
        Sheet(2.0, width_px=100)


def one_sheet(seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    volume = rng.integers(-200, 300, (12, 12, 12)).astype(np.int16)
    sheet = Sheet(4.0, width_px=800)
    panel = Panel(sheet.axes(0.5, 0.5, 3.0, 3.0), View("coronal", 6, (12, 12, 12), (1.0, 1.0, 1.0)))
    panel.grey(volume, (-175.0, 250.0))
    panel.outline(volume > 200, (0.9, 0.6, 0.0), dashed=True)
    panel.marks()
    panel.scale_bar()
    sheet.text(4.0, 0.5, f"sheet {seed}")
    return png_bytes(sheet.figure)


def test_sheets_drawn_in_threads_equal_those_drawn_one_by_one() -> None:
    wanted = [one_sheet(seed) for seed in range(6)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(one_sheet, range(6))) == wanted


def test_pyplot_with_its_global_figures_is_never_imported() -> None:
    folder = Path(panels.__file__).parent
    for file in folder.glob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        imported = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        imported |= {f"{n.module}.{a.name}" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for a in n.names}
        assert not [i for i in imported if "pyplot" in i]
