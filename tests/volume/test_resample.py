"""Resampling: against SimpleITK in patient space, back to a file's grid, and the identities."""

import hypothesis.strategies as st
import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from numpy.typing import NDArray
from scipy import ndimage

from ftengine.geometry import Grid, from_ras, grid_from_codes, grid_from_matrix, ras_grid, resampled_grid, to_ras
from ftengine.types import Volume
from ftengine.volume.resample import resample, resample_to
from tests.recipes import ct_array, sitk_image


def smooth(shape_zyx: tuple[int, int, int], *, seed: int = 0) -> NDArray[np.int16]:
    """HU that change slowly from voxel to voxel, as anatomy does."""
    noise = np.random.default_rng(seed).normal(size=shape_zyx)
    field = ndimage.gaussian_filter(noise, 2.0)
    return np.rint(field / np.abs(field).max() * 800).astype(np.int16)


def blobs(shape_zyx: tuple[int, int, int], *, seed: int = 0) -> NDArray[np.uint8]:
    """Labels 0, 1 and 2 in smooth blobs."""
    field = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape_zyx), 3.0)
    low, high = np.quantile(field, (0.6, 0.85))
    return ((field > low).astype(np.uint8) + (field > high)).astype(np.uint8)


def oblique(shape_zyx: tuple[int, int, int], spacing_mm_zyx: tuple[float, float, float], degrees: float) -> Grid:
    """A RAS+ grid turned about the left-right axis, away from the origin."""
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    turn = np.array([[1, 0, 0, 31.5], [0, c, -s, -120.25], [0, s, c, 700.0], [0, 0, 0, 1]])
    return grid_from_matrix(shape_zyx, turn @ grid_from_codes(shape_zyx, spacing_mm_zyx, "RAS").matrix)


def volume_of(
    image: NDArray[np.int16] | NDArray[np.float32], grid: Grid, label: NDArray[np.uint8] | None = None
) -> Volume:
    return Volume(image, label, grid, grid, ("a note",))


@pytest.mark.parametrize("degrees", [0.0, 12.0, 33.0])
@pytest.mark.parametrize("spacing", [(1.5, 1.5, 1.5), (5.0, 1.25, 1.25), (0.7, 0.9, 1.1)])
def test_equals_simpleitk_in_patient_space(degrees: float, spacing: tuple[float, float, float]) -> None:
    grid = oblique((20, 24, 28), (2.4, 0.8, 0.8), degrees)
    image, label = smooth((20, 24, 28)), blobs((20, 24, 28))
    result = resample(volume_of(image, grid, label), spacing)
    assert result.grid == resampled_grid(grid, spacing)
    reference = sitk_image(np.zeros(result.grid.shape_zyx, dtype=np.uint8), result.grid)
    wanted = sitk.GetArrayFromImage(
        sitk.Resample(sitk_image(image.astype(np.float32), grid), reference, sitk.Transform(), sitk.sitkLinear)
    )
    wanted_label = sitk.GetArrayFromImage(
        sitk.Resample(sitk_image(label, grid), reference, sitk.Transform(), sitk.sitkNearestNeighbor)
    )
    inside = (slice(1, -1),) * 3  # SimpleITK writes 0 where a voxel lies outside the old extent
    assert np.abs(result.image_hu[inside] - wanted[inside]).max() <= 1
    assert result.label is not None
    # a voxel exactly between two old ones goes either way in patient space, by rounding: those are not compared
    relation = np.linalg.solve(grid.matrix, result.grid.matrix)
    clear = [
        np.abs((relation[i, 3] + relation[i, i] * np.arange(result.grid.shape_zyx[2 - i])) % 1 - 0.5) > 1e-6
        for i in (2, 1, 0)
    ]
    compared = np.ix_(*(c[1:-1] for c in clear))
    assert result.label[inside][compared].size > 100
    np.testing.assert_array_equal(result.label[inside][compared], wanted_label[inside][compared])


def test_dtypes_rounding_native_and_notes() -> None:
    grid = grid_from_codes((8, 8, 8), (1.0, 1.0, 1.0), "RAS")
    image = np.broadcast_to(np.arange(8, dtype=np.int16), (8, 8, 8)).copy()
    result = resample(volume_of(image, grid), (1.0, 1.0, 0.5))
    assert result.image_hu.dtype == np.int16
    assert result.image_hu.flags.c_contiguous
    # new voxels lie at -0.25, 0.25, 0.75 ...: interpolated, then rounded; the edge replicates
    np.testing.assert_array_equal(result.image_hu[0, 0], np.rint(np.clip(np.arange(16) / 2 - 0.25, 0, 7)))
    assert result.label is None
    assert result.native == grid
    assert result.notes == ("a note",)


def test_half_a_hu_goes_to_the_even_neighbour() -> None:
    grid = grid_from_codes((4, 4, 6), (1.0, 1.0, 1.0), "RAS")
    image = np.broadcast_to(np.array([0, 1, 1, 2, 2, 3], dtype=np.int16), (4, 4, 6)).copy()
    result = resample(volume_of(image, grid), (1.0, 1.0, 2.0))  # new voxels lie between two old ones: 0.5, 1.5, 2.5
    np.testing.assert_array_equal(result.image_hu[0, 0], (0, 2, 2))


@pytest.mark.parametrize("factor", [1.0, 1.0 + 9e-5])
def test_the_same_spacing_is_the_identity(factor: float) -> None:
    grid = grid_from_codes((6, 8, 10), (2.0, 0.75, 1.25), "RAS")
    volume = volume_of(ct_array(), grid, blobs((6, 8, 10)))
    result = resample(volume, (2.0 * factor, 0.75, 1.25))
    assert result.grid == grid
    assert result.image_hu is volume.image_hu
    assert result.label is volume.label


def test_fractions_are_rounded_even_where_the_spacing_stays() -> None:
    grid = grid_from_codes((6, 8, 10), (2.0, 0.75, 1.25), "RAS")
    image = ct_array().astype(np.float32) + np.float32(0.5)
    result = resample(volume_of(image, grid), (2.0, 0.75, 1.25))
    assert result.image_hu.dtype == np.int16
    np.testing.assert_array_equal(result.image_hu, np.rint(image))


@pytest.mark.parametrize("spacing", [(1.5, 1.2, 1.2), (2.0, 1.0, 1.0), (1.0, 0.7, 0.7), (1.25, 0.4, 0.4)])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_finer_grid_keeps_the_volume_of_blobs_within_2_percent(
    seed: int, spacing: tuple[float, float, float]
) -> None:
    """At four fifths of the old spacing or less; nearer to it, single slices are doubled or lost (3 % at 1.5 mm from 1.6 mm)."""
    grid = grid_from_codes((40, 48, 48), (2.5, 1.6, 1.6), "RAS")
    label = blobs((40, 48, 48), seed=seed)
    result = resample(volume_of(smooth((40, 48, 48)), grid, label), spacing)
    assert result.label is not None
    for value in (1, 2):
        after_mm3 = (result.label == value).sum() * np.prod(spacing)
        assert after_mm3 == pytest.approx((label == value).sum() * 2.5 * 1.6 * 1.6, rel=0.02)


@settings(max_examples=15, deadline=None)
@given(
    center=st.tuples(*[st.floats(10, 13)] * 3),
    radii=st.tuples(*[st.floats(5, 8)] * 3),
    spacing=st.tuples(*[st.floats(0.4, 0.9)] * 3),
)
def test_a_finer_grid_keeps_the_volume_of_any_ellipsoid(
    center: tuple[float, float, float], radii: tuple[float, float, float], spacing: tuple[float, float, float]
) -> None:
    shape = (24, 24, 24)
    grid = grid_from_codes(shape, (1.0, 1.0, 1.0), "RAS")
    level = sum(((axis - c) / r) ** 2 for axis, c, r in zip(np.indices(shape), center, radii, strict=True))
    label = (np.asarray(level) <= 1).astype(np.uint8)
    result = resample(volume_of(ct_array(shape), grid, label), spacing)
    assert result.label is not None
    # nearest neighbour works axis by axis; each line through the body becomes longer or shorter by at most one new voxel. The second
    # and third axis see a body that has grown by as much already: at most 0.9 of its smallest radius of 5
    bound_mm3 = sum(step * label.any(axis=axis).sum() for axis, step in enumerate(spacing)) * (1 + 0.9 / 5) ** 2
    assert abs(result.label.sum() * np.prod(spacing) - label.sum()) <= bound_mm3


def test_a_constant_stays_a_constant_up_to_the_edge() -> None:
    grid = grid_from_codes((7, 9, 11), (3.0, 0.7, 0.9), "RAS")
    result = resample(
        volume_of(np.full((7, 9, 11), -321, dtype=np.int16), grid, np.ones((7, 9, 11), np.uint8)), (1.3, 1.3, 1.3)
    )
    assert (result.image_hu == -321).all()
    assert result.label is not None
    assert (result.label == 1).all()


@pytest.mark.parametrize("codes", ["RAS", "LPS", "PIR"])
def test_a_prediction_goes_back_to_the_file_s_own_grid(codes: str) -> None:
    native = grid_from_codes((18, 20, 22), (0.9, 1.1, 1.3), codes)
    label = blobs((18, 20, 22))
    ras, grid = to_ras(label, native)
    stored = resample(volume_of(smooth(ras.shape), grid, ras), (0.5, 0.5, 0.5))
    assert stored.label is not None
    back = from_ras(resample_to(stored.label, stored.grid, ras_grid(native), nearest=True, outside=9), native)
    assert back.dtype == np.uint8
    np.testing.assert_array_equal(back, label)  # finer than the file, so nothing is lost, and no rim is "outside"


def test_outside_is_filled_beyond_half_a_voxel() -> None:
    small = grid_from_codes((4, 4, 4), (2.0, 2.0, 2.0), "RAS")
    matrix = np.diag([1.0, 1.0, 1.0, 1.0])
    matrix[:3, 3] = -4.0
    large = grid_from_matrix((16, 16, 16), matrix)
    array = np.full((4, 4, 4), 5, dtype=np.int16)
    for nearest in (True, False):
        result = resample_to(array, small, large, nearest=nearest, outside=-1024)
        # voxel centres at -4 .. 11 mm; the small grid reaches from -1 to 7 mm, and replicates 1 mm beyond
        line = np.where((np.arange(16) - 4 >= -2) & (np.arange(16) - 4 <= 8), 5, -1024)
        np.testing.assert_array_equal(result[8, 8], line)
        np.testing.assert_array_equal(result[:, 8, 8], line)
        assert result.dtype == np.int16


@pytest.mark.parametrize("dtype", ["u1", "i2", "f4"])
def test_resample_to_keeps_the_dtype_and_equals_itself_on_one_grid(dtype: str) -> None:
    grid = oblique((6, 8, 10), (2.0, 0.75, 1.25), 12.0)
    array = np.abs(ct_array()).astype(dtype)
    for nearest in (True, False):
        result = resample_to(array, grid, grid, nearest=nearest, outside=0)
        assert result.dtype == np.dtype(dtype)
        np.testing.assert_allclose(result, array, atol=1e-3 if dtype == "f4" else 0)


@given(shift=st.tuples(*[st.floats(-3, 3)] * 3), scale=st.tuples(*[st.floats(0.4, 2.5)] * 3))
def test_linear_resampling_reproduces_a_linear_field(
    shift: tuple[float, float, float], scale: tuple[float, float, float]
) -> None:
    """A voxel value that is a linear function of its place comes out as that function of the new place: a shift becomes a number."""
    coarse = grid_from_codes((8, 9, 10), (1.0, 1.0, 1.0), "RAS")
    z, y, x = np.meshgrid(*map(np.arange, (8.0, 9.0, 10.0)), indexing="ij")
    array = (100 * z + 10 * y + x).astype(np.float32)
    matrix = np.diag([*scale[::-1], 1.0])
    matrix[:3, 3] = shift[::-1]
    fine = grid_from_matrix((5, 5, 5), matrix)
    result = resample_to(array, coarse, fine, nearest=False, outside=-1)
    for _ in range(5):
        index = np.random.default_rng(7).integers(0, 5, 3)
        place = np.array(shift) + np.array(scale) * index
        if (place >= 0).all() and (place <= (7, 8, 9)).all():
            assert result[tuple(index)] == pytest.approx(place @ (100, 10, 1), abs=1e-2)


@pytest.mark.parametrize("codes", ["LAS", "SRA"])
def test_grids_that_are_not_parallel_are_a_caller_s_mistake(codes: str) -> None:
    grid = grid_from_codes((8, 8, 8), (1.0, 1.0, 1.0), "RAS")
    other = grid_from_codes((8, 8, 8), (1.0, 1.0, 1.0), codes)
    with pytest.raises(ValueError, match="not parallel"):
        resample_to(ct_array((8, 8, 8)), grid, other, nearest=True, outside=0)
    with pytest.raises(ValueError, match="not parallel"):
        resample_to(ct_array((8, 8, 8)), grid, oblique((8, 8, 8), (1.0, 1.0, 1.0), 5.0), nearest=True, outside=0)
    with pytest.raises(ValueError, match="on a grid of"):
        resample_to(ct_array((8, 8, 7)), grid, grid, nearest=True, outside=0)


def test_there_and_back_stays_within_the_interpolation_error() -> None:
    grid = oblique((20, 24, 28), (2.5, 0.8, 0.8), 12.0)
    image = smooth((20, 24, 28))
    stored = resample(volume_of(image, grid), (1.25, 0.4, 0.4))
    back = resample_to(stored.image_hu, stored.grid, grid, nearest=False, outside=-1024)
    # linear interpolation is off by at most 1/8 of the second difference a direction, twice over, and by the roundings
    second = sum(np.abs(np.diff(image.astype(int), 2, axis=axis)).max() for axis in range(3))
    assert np.abs(back[1:-1, 1:-1, 1:-1].astype(int) - image[1:-1, 1:-1, 1:-1]).max() <= second / 4 + 1


@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.tuples(st.integers(1, 24), st.integers(1, 24), st.integers(1, 24)),
    spacing=st.tuples(*[st.sampled_from([0.5, 0.703125, 0.75, 0.782, 1.0, 1.25, 2.0, 2.5, 3.0, 5.0])] * 3),
    target=st.sampled_from([(1.5, 1.5, 1.5), (5.0, 1.25, 1.25), (3.0, 3.0, 3.0), (0.6, 0.7, 0.8)]),
    dtype=st.sampled_from([np.int16, np.float32]),
)
@settings(deadline=None, max_examples=150)
def test_slice_by_slice_equals_the_resampler_of_simpleitk(
    seed: int,
    shape: tuple[int, int, int],
    spacing: tuple[float, float, float],
    target: tuple[float, float, float],
    dtype: type[np.int16] | type[np.float32],
) -> None:
    """Each voxel, and positions half-way between two voxels, which these spacings are full of."""
    rng = np.random.default_rng(seed)
    whole = rng.integers(-1024, 3000, shape).astype(np.int16)
    image = whole if dtype == np.int16 else whole + rng.random(shape, dtype=np.float32)
    label = rng.integers(0, 7, shape).astype(np.uint8)
    grid = grid_from_codes(shape, spacing, "RAS")
    moved = resample(volume_of(image, grid, label), target)
    for ours, array, interpolator in (
        (moved.image_hu, image, sitk.sitkLinear),
        (moved.label, label, sitk.sitkNearestNeighbor),
    ):
        resampler = sitk.ResampleImageFilter()
        source = sitk.GetImageFromArray(array)
        scale = [t / s for t, s in zip(target, spacing, strict=True)]
        relation = np.linalg.solve(grid.matrix, moved.grid.matrix)
        assert np.allclose(np.diag(relation)[:3], scale[::-1])
        resampler.SetSize(moved.grid.shape_zyx[::-1])
        resampler.SetOutputSpacing(np.diag(relation)[:3].tolist())
        resampler.SetOutputOrigin(relation[:3, 3].tolist())
        resampler.SetInterpolator(interpolator)
        resampler.SetOutputPixelType(source.GetPixelID() if array is label else sitk.sitkFloat32)
        resampler.UseNearestNeighborExtrapolatorOn()
        assert ours is not None
        np.testing.assert_array_equal(ours, np.rint(sitk.GetArrayFromImage(resampler.Execute(source))))
