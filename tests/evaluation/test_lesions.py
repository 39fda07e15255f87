"""Single lesions: components, the three matching rules against slow references, and the three diameters."""

import itertools
import math
from collections import deque
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftengine.config import EvaluationConfig
from ftengine.evaluation.lesions import Lesions, diameter_mm, match_lesions
from ftengine.geometry import FloatZYX
from tests.evaluation.masks import SPACINGS, Mask, mask_pairs

CUBIC = (1.0, 1.0, 1.0)
Component = frozenset[tuple[int, ...]]


def _settings(**fields: Any) -> EvaluationConfig:
    return EvaluationConfig.model_validate(fields)


def _components(mask: Mask, connectivity: int) -> list[Component]:
    """By flooding, voxel by voxel, in C order of first voxels."""
    most = {6: 1, 18: 2, 26: 3}[connectivity]
    steps = [s for s in itertools.product((-1, 0, 1), repeat=3) if 0 < sum(map(abs, s)) <= most]
    left = {tuple(map(int, v)) for v in np.argwhere(mask)}
    found = []
    for start in sorted(left):
        if start not in left:
            continue
        left.remove(start)
        one, queue = {start}, deque([start])
        while queue:
            here = queue.popleft()
            for step in steps:
                there = tuple(a + b for a, b in zip(here, step, strict=True))
                if there in left:
                    left.remove(there)
                    one.add(there)
                    queue.append(there)
        found.append(frozenset(one))
    return found


def _reference(
    true: list[Component], predicted: list[Component], rule: str, fraction: float
) -> tuple[list[bool], list[bool]]:
    """The rules as they are written in the documentation."""
    all_true, all_predicted = frozenset[Any]().union(*true), frozenset[Any]().union(*predicted)
    if rule == "any":
        return [bool(t & all_predicted) for t in true], [bool(p & all_true) for p in predicted]
    if rule == "overlap":
        return (
            [len(t & all_predicted) >= fraction * len(t) for t in true],
            [len(p & all_true) >= fraction * len(p) for p in predicted],
        )
    raise AssertionError(rule)


@settings(max_examples=100, deadline=None)
@given(
    masks=mask_pairs(),
    connectivity=st.sampled_from([6, 18, 26]),
    rule=st.sampled_from(["any", "overlap"]),
    fraction=st.sampled_from([0.1, 0.5, 1.0]),
)
def test_lesions_equal_the_reference(masks: tuple[Mask, Mask], connectivity: int, rule: str, fraction: float) -> None:
    predicted, truth = masks
    found = match_lesions(
        predicted, truth, CUBIC, _settings(connectivity=connectivity, match=rule, match_fraction=fraction)
    )
    true, guessed = (_components(m, connectivity) for m in (truth, predicted))
    wanted = _reference(true, guessed, rule, fraction)
    assert ([t.matched for t in found.truth], [p.matched for p in found.predicted]) == wanted
    assert [round(t.volume_ml * 1000) for t in found.truth] == [len(t) for t in true]


@settings(max_examples=100, deadline=None)
@given(masks=mask_pairs(), fraction=st.sampled_from([0.05, 0.2, 0.5]))
def test_pairs_by_iou_are_the_most_that_there_can_be(masks: tuple[Mask, Mask], fraction: float) -> None:
    predicted, truth = masks
    true, guessed = (_components(m, 6) for m in (truth, predicted))
    if len(true) > 6 or len(guessed) > 6:
        return
    found = match_lesions(predicted, truth, CUBIC, _settings(connectivity=6, match="iou", match_fraction=fraction))
    short, long = sorted((true, guessed), key=len)
    best = 0
    for chosen in itertools.permutations(long, len(short)):
        ious = (len(a & b) / len(a | b) for a, b in zip(short, chosen, strict=True))
        best = max(best, sum(iou >= fraction for iou in ious))
    assert sum(t.matched for t in found.truth) == sum(p.matched for p in found.predicted) == best


def _line(*spans: tuple[int, int], length: int = 40) -> Mask:
    mask = np.zeros((1, 1, length), dtype=bool)
    for start, stop in spans:
        mask[0, 0, start:stop] = True
    return mask


def _matched(lesions: Lesions) -> tuple[list[bool], list[bool]]:
    return [t.matched for t in lesions.truth], [p.matched for p in lesions.predicted]


def test_one_prediction_over_two_lesions() -> None:
    """any: both are found by it. iou: it is one lesion, and pairs with one at most. A prediction beside all of them is wrong."""
    truth, predicted = _line((0, 8), (10, 14)), _line((0, 14), (30, 32))
    assert _matched(match_lesions(predicted, truth, CUBIC, _settings())) == ([True, True], [True, False])
    by_iou = _settings(match="iou", match_fraction=0.5)
    assert _matched(match_lesions(predicted, truth, CUBIC, by_iou)) == ([True, False], [True, False])


def test_one_lesion_in_two_predictions() -> None:
    """overlap: pieces count together; iou: no piece is half of it."""
    truth, predicted = _line((0, 10)), _line((0, 4), (5, 8))
    by_overlap, by_iou = (_settings(match=rule) for rule in ("overlap", "iou"))
    assert _matched(match_lesions(predicted, truth, CUBIC, by_overlap)) == ([True], [True, True])
    assert _matched(match_lesions(predicted, truth, CUBIC, by_iou)) == ([False], [False, False])
    assert _matched(match_lesions(_line((0, 4)), truth, CUBIC, by_overlap)) == ([False], [True])


def test_the_most_pairs_come_before_the_best_pair() -> None:
    """Taking the best pair first (true 0 with predicted 0) would leave true 1 and predicted 1 alone."""
    truth, predicted = _line((0, 10), (12, 20)), _line((0, 1), (4, 16))
    lesions = match_lesions(predicted, truth, CUBIC, _settings(match="iou", match_fraction=0.05))
    assert _matched(lesions) == ([True, True], [True, True])


def test_masks_without_lesions_have_none() -> None:
    empty, one = np.zeros((3, 3, 3), dtype=bool), _line((0, 2))
    for rule in ("any", "overlap", "iou"):
        assert match_lesions(empty, empty, CUBIC, _settings(match=rule)) == Lesions((), ())
        assert _matched(match_lesions(~one & False, one, CUBIC, _settings(match=rule))) == ([False], [])
        assert _matched(match_lesions(one, ~one & False, CUBIC, _settings(match=rule))) == ([], [False])
        nothing = np.zeros((0, 0, 0), dtype=bool)
        assert match_lesions(nothing, nothing, CUBIC, _settings(match=rule)) == Lesions((), ())


@settings(max_examples=80, deadline=None)
@given(masks=mask_pairs(), spacing=SPACINGS)
def test_diameters_equal_all_pairs_of_voxels(masks: tuple[Mask, Mask], spacing: FloatZYX) -> None:
    mask = masks[0]
    if not mask.any():
        return
    points = np.argwhere(mask) * np.array(spacing)
    distances = np.linalg.norm(points[:, None] - points[None], axis=2)
    in_slice = points[:, None, 0] == points[None, :, 0]
    assert diameter_mm(mask, spacing, "3d") == pytest.approx(distances.max() + sum(spacing) / 3)
    assert diameter_mm(mask, spacing, "axial") == pytest.approx(distances[in_slice].max() + sum(spacing[1:]) / 2)
    volume = mask.sum() * math.prod(spacing)
    assert math.pi / 6 * diameter_mm(mask, spacing, "equivalent") ** 3 == pytest.approx(volume)


def test_diameters_of_a_ball_are_its_own() -> None:
    """A ball of 30 mm in voxels of half a millimetre, within one voxel; large enough to go by its hull."""
    z, y, x = (0.5 * np.indices((64, 64, 64)) - 15.75) ** 2
    ball = z + y + x <= 15.0**2
    for kind, error_mm in (("axial", 0.5), ("3d", 0.5), ("equivalent", 0.05)):
        assert diameter_mm(ball, (0.5, 0.5, 0.5), kind) == pytest.approx(30.0, abs=error_mm)  # type: ignore[arg-type]
    plate = np.zeros((1, 64, 64), dtype=bool)
    plate[0] = ball[32]
    assert diameter_mm(plate, (0.5, 0.5, 0.5), "3d") == pytest.approx(30.0, abs=0.5)
    slanted = np.zeros((600, 600, 3), dtype=bool)
    slanted[np.arange(600), np.arange(600)] = True  # a flat sheet: it has no hull in space
    assert diameter_mm(slanted, CUBIC, "3d") == pytest.approx(math.hypot(599, 599, 2) + 1)
