"""Eq. 4-5, and the gate that stops a run on nothing."""

import json
import math
from itertools import pairwise

import pytest
import torch

from ftengine.config import Config, QualityConfig
from ftengine.errors import RejectionError
from ftengine.quality.gate import QualityGate
from ftengine.quality.judge import SegmenterJudge
from ftengine.types import Painted

REGION = Config.preset("abdomen").region


def _logits(classes: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.one_hot(classes.long(), 7).movedim(-1, 1).float()


def _case() -> tuple[torch.Tensor, torch.Tensor]:
    """Predicted classes and masks of 10 voxels: 7 of 10 seen; a kidney tumour seen as a liver tumour; nothing painted."""
    mask = torch.zeros((3, 1, 4, 5), dtype=torch.uint8)
    mask[:2, 0, 0:2] = 1
    seen = torch.zeros((3, 1, 4, 5))
    seen[0].view(-1)[:7] = 2
    seen[1, 0, 0:2] = 2
    seen[2] = 2
    return seen, mask


def test_judge_counts_the_organs_own_tumor_class() -> None:
    seen, mask = _case()
    judge = SegmenterJudge(lambda _image: _logits(seen), QualityConfig(threshold=0.7), REGION)
    proportion, passed = judge(torch.zeros(3, 1, 1, 4, 5), mask, [2, 6, 2])
    assert proportion.tolist() == pytest.approx([0.7, 0.0, 0.0])
    assert passed.tolist() == [bool(proportion[0] >= 0.7), False, False]


def test_released_judge_counts_any_tumor_class_and_is_strict() -> None:
    seen, mask = _case()
    judge = SegmenterJudge(
        lambda _image: _logits(seen), QualityConfig(threshold=1.0), REGION, any_tumor=True, strict=True
    )
    proportion, passed = judge(torch.zeros(3, 1, 1, 4, 5), mask, [2, 6, 2])
    assert proportion.tolist() == pytest.approx([0.7, 1.0, 0.0])
    assert passed.tolist() == [False, False, False]  # P > T, not P >= T


@pytest.mark.parametrize(("threshold", "expected"), [(0.5, True), (0.50001, False), (None, True)])
def test_the_threshold_is_inclusive(threshold: float | None, expected: bool) -> None:
    mask = torch.ones((1, 1, 2, 2), dtype=torch.uint8)
    seen = torch.tensor([[[[2, 2], [0, 0]]]])
    judge = SegmenterJudge(lambda _image: _logits(seen), QualityConfig(threshold=threshold), REGION)
    assert judge(torch.zeros(1, 1, 1, 2, 2), mask, [2])[1].tolist() == [expected]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("any_tumor", [False, True])
def test_judge_says_what_argmax_and_a_comparison_say(dtype: torch.dtype, *, any_tumor: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn((4, 7, 5, 6, 7), generator=generator).round(decimals=1).to(dtype)  # with ties
    mask = (torch.rand((4, 5, 6, 7), generator=generator) < 0.4).to(torch.uint8)
    mask[3] = 0
    own = torch.tensor([2, 6, 4, 2])
    classes = logits.argmax(1)
    seen = torch.isin(classes, torch.tensor(REGION.tumor_values)) if any_tumor else classes == own.view(-1, 1, 1, 1)
    hits, voxels = ((m & (mask == 1)).flatten(1).sum(1) for m in (seen, torch.ones_like(seen)))
    wanted = (hits.double() / voxels.clamp(min=1)).float()
    judge = SegmenterJudge(lambda _image: logits, QualityConfig(threshold=0.2), REGION, any_tumor=any_tumor)
    proportion, passed = judge(torch.zeros(4, 1, 5, 6, 7), mask, own.tolist())
    assert torch.equal(proportion, wanted)
    assert torch.equal(passed, wanted >= 0.2)


def _painted(
    *, passed: bool, organ: str = "liver", size: str = "tiny", draws: int = 1, proportion: float | None = None
) -> Painted:
    p = (0.9 if passed else 0.1) if proportion is None else proportion
    return Painted(organ, size, ((0, 0, 0),), ((1.0, 1.0, 1.0),), 10, p, passed, draws)


def test_the_gate_counts_by_organ_size_and_dataset() -> None:
    gate = QualityGate(QualityConfig(retries=2))
    gate.record(_painted(passed=True), "A")
    gate.record(_painted(passed=False, size="small", draws=3), "A")
    gate.record(_painted(passed=True, organ="kidney", size="small", draws=2), "B")
    assert (gate.total().painted, gate.total().passed, gate.total().draws) == (3, 2, 6)
    assert gate.by_organ()["liver"].pass_rate == 0.5
    assert gate.by_size()["small"].painted == 2
    assert {name: t.pass_rate for name, t in gate.by_dataset().items()} == {"A": 0.5, "B": 1.0}
    assert gate.total().passed_at_draw == {1: 1, 2: 1}
    assert gate.total().draws_per_passed == 3
    figures = gate.figures()
    assert figures["qc/pass_rate"] == pytest.approx(2 / 3)
    assert figures["qc/pass_rate/dataset/A"] == figures["qc/pass_rate/organ/liver"] == 0.5
    assert (figures["qc/passed_at_draw/1"], figures["qc/passed_at_draw/2"], figures["qc/below_min"]) == (1, 1, 0)
    summary = json.loads(json.dumps(gate.summary(), allow_nan=False))
    assert summary["by_dataset"]["A"] == {"painted": 2, "passed": 1, "draws": 4, "pass_rate": 0.5}
    assert summary["passed_at_draw"] == {"1": 1, "2": 1}


def test_a_gate_that_saw_nothing_has_figures() -> None:
    gate = QualityGate(QualityConfig())
    assert gate.total().pass_rate == 0
    assert math.isnan(gate.figures()["qc/draws_per_passed"])
    assert math.isnan(gate.figures()["qc/window_pass_rate"])
    json.dumps(gate.summary(), allow_nan=False)


def test_the_gate_warns_once_then_stops_after_another_window() -> None:
    gate = QualityGate(QualityConfig(min_pass_rate=0.25, window=8))
    gate.record(_painted(passed=True), "A")
    for _ in range(6):
        gate.record(_painted(passed=False), "A")  # not a full window yet
    assert gate.take_warning() is None
    assert gate.figures()["qc/below_min"] == 0
    gate.record(_painted(passed=False, organ="kidney", size="large", proportion=0.5), "B")
    warning = gate.take_warning()
    assert warning is not None
    assert "passed 12.5% of the last 8 painted patches (limit qc.min_pass_rate=25%)" in warning
    assert "The run stops if the next 8 stay below." in warning
    assert gate.figures()["qc/below_min"] == 1
    for _ in range(7):
        gate.record(_painted(passed=False), "A")
        assert gate.take_warning() is None
    with pytest.raises(RejectionError) as caught:
        gate.record(_painted(passed=False), "A")
    text = str(caught.value)
    assert "passed 0.0% of the last 8" in text
    assert "qc.min_pass_rate=25%" in text
    assert "T=0.7" in text
    assert "organ liver 0 of 8, size tiny 0 of 8, dataset A 0 of 8" in text
    assert "P: quartiles 0.10, 0.10, 0.10; patches in each tenth from 0 to 1: 0 8 0 0 0 0 0 0 0 0 [ @        ]" in text
    assert "lower qc.threshold (at 0.10, 25% of these would have passed)" in text
    assert "\n" not in text


def test_the_worst_kinds_are_those_of_the_window() -> None:
    gate = QualityGate(QualityConfig(min_pass_rate=0.9, window=4))
    for _ in range(20):
        gate.record(_painted(passed=True, size="large"), "OLD")
    for dataset, size, passed in (("A", "tiny", True), ("A", "small", False), ("B", "tiny", True), ("B", "tiny", True)):
        gate.record(_painted(passed=passed, size=size), dataset)
    warning = gate.take_warning()
    assert warning is not None
    assert "worst: organ liver 3 of 4, size small 0 of 1, dataset A 1 of 2" in warning


@pytest.mark.parametrize(
    ("proportion", "threshold", "advice"),
    [
        (0.004, 0.7, "The judge sees next to nothing of them"),
        (0.42, 0.7, "at 0.42, 50% of these would have passed"),
        (math.nan, None, "Without a threshold only an empty mask fails"),
    ],
)
def test_the_advice_follows_from_the_distribution_of_p(proportion: float, threshold: float | None, advice: str) -> None:
    gate = QualityGate(QualityConfig(min_pass_rate=0.5, window=4, threshold=threshold))
    for _ in range(4):
        gate.record(_painted(passed=False, proportion=proportion), "A")
    assert advice in (gate.take_warning() or "")


def test_a_rate_that_recovers_is_warned_of_again_a_window_later_at_the_earliest() -> None:
    gate = QualityGate(QualityConfig(min_pass_rate=0.5, window=4))
    warned = []
    for number, passed in enumerate((False, False, False, True, True, True) * 6):  # two of four, then one, then two ...
        gate.record(_painted(passed=passed), "A")
        if gate.take_warning() is not None:
            warned.append(number)
    assert warned[0] == 3  # the first full window: one of four
    assert all(later - earlier > 4 for earlier, later in pairwise(warned))
    assert len(warned) > 3


def test_a_gate_goes_on_where_its_state_was_taken() -> None:
    config = QualityConfig(min_pass_rate=0.5, window=6, retries=3)
    verdicts = [(n % 5 == 0, "AB"[n % 2], 1 + n % 3) for n in range(40)]

    def stops_at(gate: QualityGate, rest: list[tuple[bool, str, int]]) -> tuple[int, str]:
        for number, (passed, dataset, draws) in enumerate(rest):
            try:
                gate.record(_painted(passed=passed, draws=draws), dataset)
            except RejectionError as error:
                return number, str(error)
        pytest.fail("the gate never stopped")

    whole = stops_at(QualityGate(config), verdicts)
    for taken in range(whole[0] + 1):
        first = QualityGate(config)
        for passed, dataset, draws in verdicts[:taken]:
            first.record(_painted(passed=passed, draws=draws), dataset)
        second = QualityGate(config)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert second.summary() == first.summary()
        number, text = stops_at(second, verdicts[taken:])
        assert (number + taken, text) == whole
        assert sum(second.total().passed_at_draw.values()) == second.total().passed


def test_another_threshold_begins_the_window_anew_and_keeps_the_counts() -> None:
    first = QualityGate(QualityConfig(min_pass_rate=0.5, window=4))
    for _ in range(7):
        first.record(_painted(passed=False), "A")
    second = QualityGate(QualityConfig(min_pass_rate=0.5, window=4, threshold=0.05))
    second.load_state_dict(first.state_dict())
    assert second.total().painted == 7
    assert not second.below_min
    for _ in range(3):
        second.record(_painted(passed=False), "A")
    assert not second.below_min
