"""Back to a file's grid: linear interpolation of all classes, slice by slice, and what a round trip keeps of tumours."""

from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from numpy.typing import NDArray
from scipy import ndimage

from ftengine.geometry import FloatZYX, Grid, IntZYX, grid_from_codes, resampled_grid, to_ras
from ftengine.prediction.onto_grid import onto_grid
from ftengine.prediction.sliding_windows import Slab
from ftengine.types import Volume
from ftengine.volume.lesions import find_lesions
from ftengine.volume.phantom import TumorSpec, make_phantom
from ftengine.volume.resample import resample, resample_to

STORE_MM: FloatZYX = (1.5, 1.5, 1.5)


def slabs(scores: NDArray[np.float32], *, is_probability: bool, thickness: int = 5) -> list[Slab]:
    tensor = torch.from_numpy(scores)
    return [Slab(z, tensor[:, z : z + thickness], is_probability) for z in range(0, scores.shape[1], thickness)]


def smooth_logits(shape_zyx: IntZYX, num_classes: int, seed: int) -> NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    fields = [ndimage.gaussian_filter(rng.normal(size=shape_zyx), 2.0) for _ in range(num_classes)]
    return (np.stack(fields) * 40).astype(np.float32)


@settings(max_examples=15, deadline=None)
@given(
    shape=st.tuples(*[st.integers(4, 24)] * 3),
    spacing=st.tuples(*[st.floats(0.6, 4.0)] * 3),
    thickness=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_equals_resampling_each_class_whole(shape: IntZYX, spacing: FloatZYX, thickness: int, seed: int) -> None:
    native = grid_from_codes(shape, spacing, "RAS")
    stored = resampled_grid(native, STORE_MM)
    logits = smooth_logits(stored.shape_zyx, 4, seed)
    found = list(
        onto_grid(slabs(logits, is_probability=False, thickness=thickness), stored, native, with_probabilities=True)
    )
    assert [one.z for one in found] == list(range(shape[0]))
    probabilities = np.stack([one.probabilities for one in found if one.probabilities is not None], axis=1)
    softmax = torch.from_numpy(logits).softmax(0).numpy()
    expected = np.stack([resample_to(c, stored, native, nearest=False, outside=0) for c in softmax])
    np.testing.assert_allclose(probabilities, expected, atol=1e-5)
    label = np.stack([one.label for one in found])
    differ = label != expected.argmax(0)
    ranked = np.sort(expected, axis=0)
    assert ((ranked[-1] - ranked[-2])[differ] < 1e-5).all()  # only where two classes are equal up to rounding
    without = np.stack([one.label for one in onto_grid(slabs(logits, is_probability=False), stored, native)])
    np.testing.assert_array_equal(without, label)


def test_one_grid_is_the_identity() -> None:
    grid = grid_from_codes((9, 10, 11), STORE_MM, "RAS")
    logits = smooth_logits((9, 10, 11), 3, 0)
    label = np.stack([one.label for one in onto_grid(slabs(logits, is_probability=False), grid, grid)])
    np.testing.assert_array_equal(label, logits.argmax(0))


def test_outside_the_stored_grid_is_background() -> None:
    small = grid_from_codes((4, 4, 4), (2.0, 2.0, 2.0), "RAS")
    matrix = np.eye(4)
    matrix[:3, 3] = -4.0
    large = Grid((16, 16, 16), tuple(matrix.ravel()))
    scores = np.zeros((2, 4, 4, 4), dtype=np.float32)
    scores[1] = 1.0
    found = list(onto_grid(slabs(scores, is_probability=True), small, large, with_probabilities=True))
    line = (np.arange(16) - 4 >= -2) & (np.arange(16) - 4 <= 8)  # half a voxel beyond the outermost ones
    inside = line[:, None, None] & line[:, None] & line
    np.testing.assert_array_equal(np.stack([one.label for one in found]) == 1, inside)
    background = np.stack([one.probabilities[0] for one in found if one.probabilities is not None])
    np.testing.assert_array_equal(background == 1, ~inside)


def share_of_voxels(mask: NDArray[np.bool_], grid: Grid, stored: Grid, *, steps: int = 4) -> NDArray[np.float32]:
    """The share of each voxel of ``stored`` that lies inside the mask: the mean over ``steps`` points along each axis."""
    matrix = stored.matrix
    matrix[:3, :3] /= steps
    matrix[:3, 3] -= matrix[:3, :3] @ np.full(3, (steps - 1) / 2)
    z, y, x = stored.shape_zyx
    fine = Grid((z * steps, y * steps, x * steps), tuple(matrix.ravel()))
    inside = resample_to(mask.astype(np.uint8), grid, fine, nearest=True, outside=0)
    shares: NDArray[np.float32] = inside.reshape(z, steps, y, steps, x, steps).mean((1, 3, 5), dtype=np.float32)
    return shares


def round_trip(mask: NDArray[np.bool_], grid: Grid) -> NDArray[np.bool_]:
    """A tumour as the probabilities of a network that knows the share of each store voxel, and back."""
    stored = resampled_grid(grid, STORE_MM)
    tumor = share_of_voxels(mask, grid, stored)
    scores = np.stack([1 - tumor, tumor])
    return np.stack([one.label for one in onto_grid(slabs(scores, is_probability=True), stored, grid)]) == 1


def by_nearest(mask: NDArray[np.bool_], grid: Grid) -> NDArray[np.bool_]:
    """The same with labels: nearest neighbour there and back."""
    image = np.zeros(mask.shape, dtype=np.int16)
    stored = resample(Volume(image, mask.astype(np.uint8), grid, grid), STORE_MM)
    assert stored.label is not None
    return resample_to(stored.label, stored.grid, grid, nearest=True, outside=0) == 1


def dice(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float:
    return float(2 * np.count_nonzero(a & b) / (np.count_nonzero(a) + np.count_nonzero(b)))


def test_phantom_tumors_above_2_cm_survive_the_round_trip() -> None:
    shape, spacing = (72, 180, 220), (2.5, 1.1, 1.1)
    phantom = make_phantom(
        "abdomen",
        seed=8,
        shape_zyx=shape,
        spacing_mm_zyx=spacing,
        tumors=TumorSpec(),
    )
    scores = []
    for value in (2, 4, 6):
        mask = phantom.label == value
        if any(lesion.diameter_mm > 20 for lesion in find_lesions(phantom.label, (value,), spacing)):
            scores.append(dice(mask, round_trip(mask, phantom.grid)))
    assert scores
    assert min(scores) >= 0.98, scores


def real_tumors(data_dir: Path, every: int) -> list[tuple[NDArray[np.bool_], Grid]]:
    """Masks of real tumours above 2 cm (longest axial diameter), RAS+."""
    found = []
    for file in sorted((data_dir / "tumor_masks").rglob("*.npz"))[::every]:
        archive: Any = np.load(file)
        spacing = [float(mm) for mm in archive["spacing"]]
        mask = np.pad(archive["mask"] == 2, 4)
        # the archive's axes are those of nibabel: x y z of the file, its letters say where they run
        reversed_axes = np.ascontiguousarray(mask.transpose(2, 1, 0))
        spacing_zyx = (spacing[2], spacing[1], spacing[0])
        turned, grid = to_ras(
            reversed_axes, grid_from_codes(reversed_axes.shape, spacing_zyx, str(archive["orientation"]))
        )
        lesions = find_lesions(turned.astype(np.uint8), (1,), grid.spacing_mm_zyx)
        if max((lesion.diameter_mm for lesion in lesions), default=0.0) > 20:
            found.append((turned, grid))
    return found


@pytest.mark.data
def test_real_tumors_above_2_cm_survive_the_round_trip(data_dir: Path) -> None:
    tumors = real_tumors(data_dir, every=4)
    assert len(tumors) > 30
    linear = [dice(mask, round_trip(mask, grid)) for mask, grid in tumors]
    nearest = [dice(mask, by_nearest(mask, grid)) for mask, grid in tumors]
    assert np.mean(linear) >= 0.98
    assert np.median(linear) >= 0.99
    assert np.mean(nearest) < np.mean(linear) - 0.02
