"""Grids: turning to RAS+ and back, repair and refusal of affines, offsets, codes and boxes."""

import hypothesis.strategies as st
import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given
from nibabel.orientations import aff2axcodes
from numpy.typing import NDArray

from ftengine.errors import CaseError, ConfigError
from ftengine.geometry import (
    Box,
    Grid,
    checked_grid,
    from_ras,
    grid_from_codes,
    grid_from_matrix,
    grid_from_sitk,
    grid_offset_vox,
    mm_to_vox,
    ras_grid,
    resampled_grid,
    reverse_axes,
    sitk_frame,
    to_ras,
)

PAIRS = ("RL", "AP", "SI")


@st.composite
def codes(draw: st.DrawFn) -> str:
    """Any of the 48 axis orders and flips."""
    order = draw(st.permutations(PAIRS))
    return "".join(draw(st.sampled_from(pair)) for pair in order)


@st.composite
def oblique_grids(draw: st.DrawFn) -> Grid:
    """A grid of any axis order and flip, turned by up to 20 degrees, at any spacing and origin."""
    spacing = draw(st.tuples(*[st.floats(0.4, 5.0)] * 3))
    matrix = grid_from_codes((5, 6, 7), spacing, draw(codes())).matrix
    angles = draw(st.tuples(*[st.floats(-0.2, 0.2)] * 3))
    turned = np.eye(4)
    for axis, angle in enumerate(angles):
        a, b = [i for i in range(3) if i != axis]
        step = np.eye(4)
        step[a, a] = step[b, b] = np.cos(angle)
        step[a, b], step[b, a] = -np.sin(angle), np.sin(angle)
        turned = turned @ step
    turned[:3, 3] = draw(st.tuples(*[st.floats(-300, 300)] * 3))
    return grid_from_matrix((5, 6, 7), turned @ matrix)


def world(grid: Grid, index_zyx: tuple[int, int, int]) -> NDArray[np.float64]:
    z, y, x = index_zyx
    return np.asarray((grid.matrix @ np.array([x, y, z, 1.0]))[:3])


@given(grid=oblique_grids(), seed=st.integers(0, 99))
def test_to_ras_keeps_every_voxel_where_it_is_in_the_patient(grid: Grid, seed: int) -> None:
    array = np.arange(5 * 6 * 7, dtype=np.int16).reshape(5, 6, 7)
    turned, turned_grid = to_ras(array, grid)
    assert turned.flags.c_contiguous
    assert turned_grid.is_ras
    assert turned_grid == ras_grid(grid)
    old = tuple(int(v) for v in np.random.default_rng(seed).integers(0, (5, 6, 7)))
    new = tuple(int(v[0]) for v in np.nonzero(turned == array[old]))
    np.testing.assert_allclose(
        world(turned_grid, (new[0], new[1], new[2])), world(grid, (old[0], old[1], old[2])), atol=1e-9
    )


@given(grid=oblique_grids())
def test_from_ras_undoes_to_ras(grid: Grid) -> None:
    array = np.arange(5 * 6 * 7, dtype=np.int16).reshape(5, 6, 7)
    turned, _ = to_ras(array, grid)
    np.testing.assert_array_equal(from_ras(turned, grid), array)


@given(text=codes())
def test_codes_mean_what_nibabel_means(text: str) -> None:
    grid = grid_from_codes((4, 5, 6), (3.0, 2.0, 1.0), text)
    assert "".join(aff2axcodes(grid.matrix)) == text
    assert grid.spacing_mm_zyx == (3.0, 2.0, 1.0)


@pytest.mark.parametrize("text", ["", "RA", "RAX", "RRS", "RLS", "RASS"])
def test_other_codes_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="three letters"):
        grid_from_codes((4, 5, 6), (1.0, 1.0, 1.0), text)


@given(grid=oblique_grids())
def test_the_grid_of_a_simpleitk_image_is_the_grid_it_was_given(grid: Grid) -> None:
    image = sitk.Image(grid.shape_zyx[::-1], sitk.sitkUInt8)
    frame = sitk_frame(grid)
    image.SetOrigin(frame["origin"])
    image.SetSpacing(frame["spacing"])
    image.SetDirection(frame["direction"])
    assert grid_offset_vox(grid, grid_from_sitk(image)) < 1e-6
    point = image.TransformIndexToPhysicalPoint((6, 0, 3))
    np.testing.assert_allclose(np.array(point) * (-1, -1, 1), world(grid, (3, 0, 6)), atol=1e-6)


@given(grid=oblique_grids(), factor=st.tuples(*[st.floats(0.3, 3.0)] * 3))
def test_a_resampled_grid_keeps_centre_axes_and_extent(grid: Grid, factor: tuple[float, float, float]) -> None:
    spacing = tuple(s * f for s, f in zip(grid.spacing_mm_zyx, factor, strict=True))
    new = resampled_grid(grid, (spacing[0], spacing[1], spacing[2]))
    np.testing.assert_allclose(new.spacing_mm_zyx, spacing)
    centres = [g.matrix @ np.array([*((np.array(g.shape_zyx[::-1]) - 1) / 2), 1.0]) for g in (grid, new)]
    np.testing.assert_allclose(centres[0], centres[1], atol=1e-9)
    extents = [np.array(g.shape_zyx) * g.spacing_mm_zyx for g in (grid, new)]
    # a shape is a whole number of at least one voxel, so an extent is off by half a voxel, or short of one voxel
    assert (np.abs(extents[0] - extents[1]) <= np.maximum(0.5, 1 - extents[0] / spacing) * spacing + 1e-9).all()


@pytest.mark.parametrize("size", [2e-4, 1e-3])
def test_axes_off_by_rounding_are_made_orthogonal(size: float) -> None:
    matrix = np.diag([-1.0, -1.0, 2.0, 1.0])
    matrix[0, 1] = size
    grid = checked_grid(grid_from_matrix((8, 8, 8), matrix), "x")
    directions = grid.matrix[:3, :3] / np.array(grid.spacing_mm_zyx[::-1])
    np.testing.assert_allclose(directions @ directions.T, np.eye(3), atol=1e-12)
    assert grid_offset_vox(grid_from_matrix((8, 8, 8), matrix), grid) < 0.01


def broken_affine(kind: str) -> NDArray[np.float64]:
    matrix = np.diag([-1.0, -1.0, 2.0, 1.0])
    if kind == "shear":
        matrix[1, 2] = 0.5
    elif kind == "zero spacing":
        matrix[2, 2] = 0.0
    elif kind == "metres":
        matrix[:3] *= 1e-3
    elif kind == "microns":
        matrix[:3] *= 1e3
    else:
        matrix[0, 3] = np.nan
    return matrix


@pytest.mark.parametrize(
    ("kind", "word"),
    [("shear", "sheared"), ("zero spacing", "spacing"), ("metres", "spacing"), ("microns", "spacing"), ("nan", "NaN")],
)
def test_grids_that_would_move_the_anatomy_are_refused(kind: str, word: str) -> None:
    with pytest.raises(CaseError, match=word):
        checked_grid(grid_from_matrix((8, 8, 8), broken_affine(kind)), "x.nii.gz")


def test_an_offset_is_counted_in_voxels_of_the_first_grid() -> None:
    a = grid_from_codes((4, 5, 6), (5.0, 1.0, 1.0), "LPS")
    matrix = a.matrix.copy()
    matrix[2, 3] += 1.0
    assert grid_offset_vox(a, grid_from_matrix((4, 5, 6), matrix)) == pytest.approx(0.2)
    assert grid_offset_vox(a, a) == 0.0


def test_units_and_axis_order() -> None:
    assert mm_to_vox(1.2, (2.5, 0.8, 0.8)) == pytest.approx((0.48, 1.5, 1.5))
    assert mm_to_vox((5.0, 1.6, 0.8), (2.5, 0.8, 0.8)) == pytest.approx((2.0, 2.0, 1.0))
    assert reverse_axes(np.zeros((2, 3, 4), dtype=np.uint8)).shape == (4, 3, 2)


def test_the_inside_of_a_box() -> None:
    assert Box((-2, 3, 9), (5, 4, 3)).inside((4, 5, 6)) == Box((0, 3, 6), (3, 2, 0))
    assert Box((1, 0, 2), (2, 3, 4)).slices() == (slice(1, 3), slice(0, 3), slice(2, 6))
