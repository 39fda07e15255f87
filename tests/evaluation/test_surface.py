"""HD95 and surface Dice equal surface-distance (elements), MONAI and SciPy (voxels) to 1e-6."""

import math
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import surface_distance
import torch
from hypothesis import given, settings
from monai.metrics.hausdorff_distance import compute_hausdorff_distance
from monai.metrics.surface_dice import compute_surface_dice
from scipy import ndimage as ndi

from ftengine.config import EvaluationConfig
from ftengine.evaluation.metrics import ClassScore, FullScoring, score_case
from ftengine.evaluation.surface import Directed, surface_distances
from ftengine.geometry import FloatZYX
from tests.evaluation.masks import SPACINGS, Mask, edge_cases, mask_pairs, real_pairs

PERCENTS = (50.0, 95.0, 100.0)
PERCENTS_OF_MONAI = (95.0, 100.0)  # it is slow
TOLERANCES_MM = (0.0, 2.3456)  # no distance of a test equals one but 0: MONAI compares them in float32


@pytest.fixture(autouse=True)
def old_names(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """surface-distance 0.1 uses a name that NumPy 2 no longer has, and names of SciPy that warn; both libraries warn of empty masks."""
    monkeypatch.setattr(np, "Inf", np.inf, raising=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Please import", category=DeprecationWarning)
        warnings.filterwarnings("ignore", message=".*always_return_as_numpy", category=FutureWarning)  # MONAI of itself
        warnings.filterwarnings("ignore", message=".*all 0, this may result in nan/inf distance", category=UserWarning)
        yield


def _compare_with_surface_distance(predicted: Mask, truth: Mask, spacing: FloatZYX) -> None:
    dice = surface_distance.compute_dice_coefficient(truth, predicted)
    assert _score(predicted, truth, "elements").dice == pytest.approx(dice, abs=1e-12)
    ours = surface_distances(predicted, truth, spacing)
    theirs = surface_distance.compute_surface_distances(truth, predicted, spacing)
    for percent in PERCENTS:
        assert ours.hausdorff_mm(percent) == pytest.approx(
            surface_distance.compute_robust_hausdorff(theirs, percent), rel=1e-6, abs=1e-6
        )
    for tolerance in TOLERANCES_MM:
        expected = surface_distance.compute_surface_dice_at_tolerance(theirs, tolerance)
        assert ours.surface_dice(tolerance) == pytest.approx(expected, rel=1e-6, abs=1e-6)


def _monai(mask: Mask) -> torch.Tensor:
    return torch.from_numpy(mask)[None, None]


def _rounding_of_monai(directed: Directed) -> float:
    """MONAI's percentile lies at (N - 1) q in float32: between two distances it is off by that rounding times their difference."""
    return len(directed.distance_mm) * float(np.finfo(np.float32).eps) * float(np.ptp(directed.distance_mm))


def _compare_with_monai(predicted: Mask, truth: Mask, spacing: FloatZYX) -> None:
    ours = surface_distances(predicted, truth, spacing, surface="voxels")
    p, t = _monai(predicted), _monai(truth)
    for percent in PERCENTS_OF_MONAI:
        theirs = compute_hausdorff_distance(p, t, include_background=True, percentile=percent, spacing=spacing)
        rounding = max(_rounding_of_monai(d) for d in (ours.truth_to_predicted, ours.predicted_to_truth))
        assert ours.hausdorff_mm(percent) == pytest.approx(float(theirs), rel=1e-6, abs=1e-6 + rounding)
    elements = surface_distances(predicted, truth, spacing)
    for tolerance in TOLERANCES_MM:
        of_voxels = compute_surface_dice(p, t, [tolerance], include_background=True, spacing=spacing)
        assert ours.surface_dice(tolerance) == pytest.approx(float(of_voxels), rel=1e-6, abs=1e-6)
        of_elements = compute_surface_dice(
            p, t, [tolerance], include_background=True, spacing=spacing, use_subvoxels=True
        )
        assert elements.surface_dice(tolerance) == pytest.approx(float(of_elements), rel=1e-6, abs=1e-6)


def _compare_with_scipy(predicted: Mask, truth: Mask, spacing: FloatZYX) -> None:
    """Borders by erosion, distances by the distance transform, percentiles by NumPy: nothing of ours."""
    ours = surface_distances(predicted, truth, spacing, surface="voxels")
    borders = [np.pad(m, 1) & ~ndi.binary_erosion(np.pad(m, 1)) for m in (predicted, truth)]
    maps = [ndi.distance_transform_edt(~b, sampling=spacing) for b in borders]
    directed = [maps[1][borders[0]], maps[0][borders[1]]]
    for percent in PERCENTS:
        expected = max(np.percentile(d, percent) for d in directed)
        assert ours.hausdorff_mm(percent) == pytest.approx(expected, rel=1e-6, abs=1e-6)
    # to the last bits: of two points at the same distance either may be taken, and their squares are summed in another order
    np.testing.assert_allclose(ours.predicted_to_truth.distance_mm, directed[0], rtol=1e-14)
    np.testing.assert_allclose(ours.truth_to_predicted.distance_mm, directed[1], rtol=1e-14)


@settings(max_examples=60, deadline=None)
@given(masks=mask_pairs(), spacing=SPACINGS)
def test_random_masks_equal_the_libraries(masks: tuple[Mask, Mask], spacing: FloatZYX) -> None:
    predicted, truth = masks
    if predicted.any() and truth.any():
        _compare_with_surface_distance(predicted, truth, spacing)
        _compare_with_monai(predicted, truth, spacing)


@settings(max_examples=50, deadline=None)
@given(masks=mask_pairs())
def test_distances_are_those_of_the_distance_transform(masks: tuple[Mask, Mask]) -> None:
    predicted, truth = masks
    if predicted.any() and truth.any():
        _compare_with_scipy(predicted, truth, (2.5, 0.75, 0.75))


@pytest.mark.parametrize("name", edge_cases())
def test_edge_cases_equal_the_libraries(name: str) -> None:
    predicted, truth, spacing = edge_cases()[name]
    _compare_with_surface_distance(predicted, truth, spacing)
    _compare_with_monai(predicted, truth, spacing)
    _compare_with_scipy(predicted, truth, spacing)


@pytest.mark.data
def test_real_labels_equal_the_libraries(data_dir: Path) -> None:
    for _, predicted, truth, spacing in real_pairs(data_dir):
        _compare_with_surface_distance(predicted, truth, spacing)
        _compare_with_monai(predicted, truth, spacing)
        _compare_with_scipy(predicted, truth, spacing)


def _score(predicted: Mask, truth: Mask, surface: str) -> ClassScore:
    full = FullScoring((1.0, 1.0, 1.0), (), EvaluationConfig.model_validate({"surface": surface}))
    scores = score_case("c", predicted.astype(np.uint8), truth.astype(np.uint8), {"background": 0, "a": 1}, full)
    return scores.classes["a"]


@pytest.mark.parametrize("surface", ["elements", "voxels"])
def test_empty_masks_are_none_where_the_libraries_give_nan_or_infinity(surface: str) -> None:
    empty = np.zeros((4, 5, 6), dtype=bool)
    one = empty.copy()
    one[1, 2, 3] = True
    both = _score(empty, empty, surface)
    assert (both.dice, both.hd95_mm, both.surface_dice) == (None, None, None)
    with np.errstate(invalid="ignore"):
        theirs = surface_distance.compute_surface_distances(empty, empty, (1.0, 1.0, 1.0))
        assert surface_distance.compute_robust_hausdorff(theirs, 95) == math.inf
        assert math.isnan(surface_distance.compute_surface_dice_at_tolerance(theirs, 2.0))
    assert math.isnan(compute_surface_dice(_monai(empty), _monai(empty), [2.0], include_background=True))
    for predicted, truth in ((one, empty), (empty, one)):
        of_one = _score(predicted, truth, surface)
        assert (of_one.dice, of_one.hd95_mm, of_one.surface_dice) == (0.0, None, 0.0)
        theirs = surface_distance.compute_surface_distances(truth, predicted, (1.0, 1.0, 1.0))
        assert surface_distance.compute_robust_hausdorff(theirs, 95) == math.inf
        assert surface_distance.compute_surface_dice_at_tolerance(theirs, 2.0) == 0.0
        assert float(compute_surface_dice(_monai(predicted), _monai(truth), [2.0], include_background=True)) == 0.0
        of_monai = compute_hausdorff_distance(_monai(predicted), _monai(truth), include_background=True, percentile=95)
        assert not math.isfinite(of_monai)


def test_masks_without_a_distance_are_refused() -> None:
    one = np.ones((2, 2, 2), dtype=bool)
    for predicted, truth in ((one, ~one), (~one, one), (one, np.ones((2, 2, 3), dtype=bool))):
        with pytest.raises(ValueError, match="want one shape and no empty mask"):
            surface_distances(predicted, truth, (1.0, 1.0, 1.0))


@settings(max_examples=30, deadline=None)
@given(masks=mask_pairs(), spacing=SPACINGS)
def test_what_lies_around_the_masks_changes_nothing(masks: tuple[Mask, Mask], spacing: FloatZYX) -> None:
    """The crop to the box of the union, which all scoring goes through, is exact."""
    predicted, truth = (m.astype(np.uint8) for m in masks)
    labels = {"background": 0, "a": 1}
    wide_predicted, wide_truth = (np.pad(m, ((3, 1), (0, 4), (2, 2))) for m in (predicted, truth))
    for surface in ("elements", "voxels"):
        full = FullScoring(spacing, (1,), EvaluationConfig.model_validate({"surface": surface}))
        cropped = score_case("c", predicted, truth, labels, full)
        assert score_case("c", wide_predicted, wide_truth, labels, full) == cropped
