"""Measures of shape on shapes whose numbers are known, at spacings as CT has them."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.spatial.distance import pdist

from ftengine.evaluation.shape_measures import (
    MEASURES,
    column,
    directions,
    ellipsoid_area_mm2,
    measure_shape,
    measure_tumors,
    surface_area_mm2,
)
from ftengine.geometry import FloatZYX
from ftengine.volume.lesions import axial_diameter_mm


def _ellipsoid(radii_mm: FloatZYX, spacing_mm: FloatZYX, shift_mm: float = 0.3) -> NDArray[np.bool_]:
    """Voxels whose centres lie in an axis-parallel ellipsoid, with background around; off the grid by ``shift_mm``."""
    axes = []
    for radius, spacing in zip(radii_mm, spacing_mm, strict=True):
        reach = math.ceil(radius / spacing) + 2
        axes.append(((np.arange(-reach, reach + 1) * spacing + shift_mm) / radius) ** 2)
    z, y, x = axes
    return z[:, None, None] + y[:, None] + x < 1


def _ball(radius_mm: float, spacing_mm: FloatZYX) -> NDArray[np.bool_]:
    return _ellipsoid((radius_mm, radius_mm, radius_mm), spacing_mm)


def _plane_errors(spacing: FloatZYX) -> tuple[float, float]:
    """Lowest and highest relative error of the estimated area of a plane, over all its orientations: what the 13 directions can do."""
    normals = np.vstack([np.random.default_rng(0).standard_normal((20_000, 3)), np.eye(3)])
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    estimate = sum(
        2 * share * abs(normals @ (np.array(offset) * spacing / mm)) for offset, mm, share in directions(spacing)
    )
    return float(np.min(estimate)) - 1, float(np.max(estimate)) - 1


def test_planes_of_any_direction_are_as_the_module_says() -> None:
    low, high = _plane_errors((1.5, 1.5, 1.5))
    assert -0.074 < low < high < 0.024
    low, high = _plane_errors((2.5, 0.8, 0.8))
    assert -0.165 < low < high < 0.11


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (1.5, 1.5, 1.5), (2.5, 0.8, 0.8), (5.0, 0.7, 0.7)])
@pytest.mark.parametrize("radius", [10.0, 25.0])
def test_a_ball(radius: float, spacing: FloatZYX) -> None:
    measures = measure_shape(_ball(radius, spacing), spacing)
    # a slice of 5 mm is a quarter of the small ball: its volume depends on where the slices fall
    share = 0.1 if radius / spacing[0] < 3 else 0.03
    assert measures.volume_ml == pytest.approx(4 / 3 * math.pi * radius**3 / 1000, rel=share)
    assert measures.equivalent_radius_mm == pytest.approx(radius, rel=share)
    assert measures.diameter_mm == pytest.approx(2 * radius, abs=2 * max(spacing[1:]))
    assert measures.sphericity == pytest.approx(1, abs=share)
    assert measures.roughness == pytest.approx(0, abs=share)
    assert measures.elongation == pytest.approx(1, abs=share)
    assert measures.flatness == pytest.approx(1, abs=share)


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (2.5, 0.8, 0.8)])
@pytest.mark.parametrize("radii", [(10.0, 20.0, 30.0), (30.0, 20.0, 10.0), (12.0, 12.0, 30.0)])
def test_an_ellipsoid(radii: FloatZYX, spacing: FloatZYX) -> None:
    measures = measure_shape(_ellipsoid(radii, spacing), spacing)
    short, middle, long = sorted(radii)
    volume = 4 / 3 * math.pi * short * middle * long
    assert measures.volume_ml == pytest.approx(volume / 1000, rel=0.02)
    assert measures.elongation == pytest.approx(middle / long, rel=0.02)
    assert measures.flatness == pytest.approx(short / long, rel=0.02)
    low, high = _plane_errors(spacing)
    assert low - 0.02 < measures.roughness < high + 0.02  # long, not rough
    ball = (36 * math.pi * volume**2) ** (1 / 3)
    assert 1 / (1 + high + 0.02) < measures.sphericity / (ball / ellipsoid_area_mm2(radii)) < 1 / (1 + low - 0.02)
    assert measures.diameter_mm == pytest.approx(2 * max(radii[1:]), abs=2 * max(spacing[1:]))
    steps = sum(mm / radius for mm, radius in zip(spacing, radii, strict=True)) / 2  # half a voxel on each axis
    assert 1 - steps < measures.solidity < 1.02


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (2.0, 1.0, 1.0)])
def test_a_box(spacing: FloatZYX) -> None:
    voxels = np.pad(np.ones((20, 30, 40), dtype=bool), 2)
    z, y, x = (n * s for n, s in zip((20, 30, 40), spacing, strict=True))
    measures = measure_shape(voxels, spacing)
    low, high = _plane_errors(spacing)
    rounded = (
        2 * sum(spacing) / min(z, y, x)
    )  # lines through edges and corners are lost: a border of about a voxel around each face
    assert 1 + low - rounded < surface_area_mm2(voxels, spacing) / (2 * (z * y + y * x + z * x)) < 1 + high
    assert measures.volume_ml == pytest.approx(z * y * x / 1000)
    # second moments of a box go as its sides squared, exactly, with those of the voxels counted
    short, middle, long = sorted((z, y, x))
    assert measures.elongation == pytest.approx(middle / long)
    assert measures.flatness == pytest.approx(short / long)
    assert measures.diameter_mm == pytest.approx(math.hypot(y - 1, x - 1) + 1)


@pytest.mark.parametrize(
    "normal", [(1.0, 0.0, 0.0), (1.0, 1.0, 0.0), (1.0, 1.0, 1.0), (3.0, 2.0, 1.0), (5.0, 1.0, 0.0)]
)
@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (2.5, 1.0, 1.0)])
def test_the_surface_of_a_ball_cut_by_a_plane_of_any_direction(normal: FloatZYX, spacing: FloatZYX) -> None:
    radius = 24.0
    ball = _ball(radius, spacing)
    centers = [(np.arange(n) - n // 2) * s + 0.3 for n, s in zip(ball.shape, spacing, strict=True)]
    z, y, x = np.meshgrid(*centers, indexing="ij")
    half = ball & (z * normal[0] + y * normal[1] + x * normal[2] > 0)
    low, high = (
        error / 3 for error in _plane_errors(spacing)
    )  # the plane is a third of the surface, the dome all directions
    ratio = surface_area_mm2(half, spacing) / (3 * math.pi * radius**2)
    assert 1 + low - 0.03 < ratio < 1 + high + 0.03


def test_the_area_of_an_ellipsoid_is_that_of_known_formulas() -> None:
    assert ellipsoid_area_mm2((3.0, 3.0, 3.0)) == pytest.approx(36 * math.pi)
    e = math.sqrt(1 - 4 / 25)  # prolate, semi-axes 5, 2, 2
    assert ellipsoid_area_mm2((2.0, 5.0, 2.0)) == pytest.approx(2 * math.pi * 4 * (1 + 5 / 2 / e * math.asin(e)))


def test_lobes_are_rough_and_not_convex_and_a_cavity_is_surface() -> None:
    one = _ball(12.0, (1.0, 1.0, 1.0))
    two = np.zeros((*one.shape[:2], one.shape[2] + 16), dtype=bool)
    two[:, :, : one.shape[2]] |= one
    two[:, :, 16:] |= one
    smooth, lobed = measure_shape(one, (1.0, 1.0, 1.0)), measure_shape(two, (1.0, 1.0, 1.0))
    assert lobed.roughness > smooth.roughness + 0.02
    assert lobed.solidity < smooth.solidity - 0.02
    hollow = one & ~_ellipsoid_inside(one, 6.0)
    assert surface_area_mm2(hollow, (1.0, 1.0, 1.0)) == pytest.approx(4 * math.pi * (12.0**2 + 6.0**2), rel=0.03)


def _ellipsoid_inside(outer: NDArray[np.bool_], radius: float) -> NDArray[np.bool_]:
    z, y, x = (((np.arange(n) - n // 2) + 0.3) ** 2 for n in outer.shape)
    return z[:, None, None] + y[:, None] + x < radius**2


shapes = st.builds(
    lambda seed, density: np.random.default_rng(seed).random((6, 7, 8)) < density,
    st.integers(0, 10_000),
    st.floats(0.2, 0.9),
)


@given(shapes, st.sampled_from([(1.0, 1.0, 1.0), (3.0, 0.7, 0.9)]), st.floats(0.5, 3.0))
@settings(max_examples=30, deadline=None)
def test_ratios_do_not_change_with_scale_nor_with_mirrors(
    voxels: NDArray[np.bool_], spacing: FloatZYX, scale: float
) -> None:
    a = measure_shape(voxels, spacing)
    z, y, x = spacing
    b = measure_shape(voxels[::-1, :, ::-1], (z * scale, y * scale, x * scale))
    assert b.volume_ml == pytest.approx(a.volume_ml * scale**3)
    assert b.diameter_mm == pytest.approx(a.diameter_mm * scale)
    for name in MEASURES[2:]:
        assert getattr(b, name) == pytest.approx(getattr(a, name)), name
    assert 0 < a.flatness <= a.elongation <= 1


@given(shapes, st.floats(0.5, 2.0))
@settings(max_examples=30, deadline=None)
def test_the_diameter_is_the_longest_distance_in_any_slice(voxels: NDArray[np.bool_], x_mm: float) -> None:
    longest = 0.0
    for plane in voxels:
        points = np.argwhere(plane) * (1.0, x_mm)
        longest = max(longest, float(pdist(points).max()) if len(points) > 1 else 0.0)
    assert axial_diameter_mm(voxels, (2.0, 1.0, x_mm)) == pytest.approx(longest + (1.0 + x_mm) / 2)


def test_tumors_are_components_of_a_smallest_size() -> None:
    mask = np.zeros((20, 20, 20), dtype=np.uint8)
    mask[1:5, 1:5, 1:5] = 1
    mask[5, 5, 5] = 1  # touches by a corner
    mask[10:13, 10:13, 10:13] = 1
    found = measure_tumors(mask, (1.0, 1.0, 1.0), min_voxels=27)
    np.testing.assert_allclose(column(found, "volume_ml"), [0.065, 0.027])
    assert len(measure_tumors(mask, (1.0, 1.0, 1.0))) == 1
    assert measure_tumors(np.zeros((4, 4, 4), dtype=bool), (1.0, 1.0, 1.0)) == []


def test_nothing_has_no_shape_and_one_voxel_has() -> None:
    with pytest.raises(ValueError, match="holds no voxel"):
        measure_shape(np.zeros((3, 3, 3), dtype=bool), (1.0, 1.0, 1.0))
    single = measure_shape(np.ones((1, 1, 1), dtype=bool), (2.0, 1.0, 1.0))
    assert single.volume_ml == pytest.approx(0.002)
    assert single.elongation == pytest.approx(0.5)
    assert all(math.isfinite(getattr(single, name)) for name in MEASURES)
