"""Eq. 4-5, and the gate that stops a run on nothing."""

import math

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


def _painted(*, passed: bool, organ: str = "liver", size: str = "tiny", draws: int = 1) -> Painted:
    return Painted(organ, size, ((0, 0, 0),), ((1.0, 1.0, 1.0),), 10, 0.9 if passed else 0.1, passed, draws)


def test_the_gate_counts_by_organ_and_size() -> None:
    gate = QualityGate(QualityConfig())
    gate.record(_painted(passed=True))
    gate.record(_painted(passed=False, size="small", draws=3))
    gate.record(_painted(passed=True, organ="kidney", size="small"))
    assert (gate.total().painted, gate.total().passed, gate.total().draws) == (3, 2, 5)
    assert gate.by_organ()["liver"].pass_rate == 0.5
    assert gate.by_size()["small"].painted == 2
    assert math.isclose(gate.total().pass_rate, 2 / 3)
    assert QualityGate(QualityConfig()).total().pass_rate == 0


def test_the_gate_stops_once_a_full_window_fails() -> None:
    gate = QualityGate(QualityConfig(min_pass_rate=0.25, window=8))
    gate.record(_painted(passed=True))
    for _ in range(6):
        gate.record(_painted(passed=False))  # not a full window yet
    with pytest.raises(RejectionError) as caught:
        gate.record(_painted(passed=False))
    text = str(caught.value)
    assert "12.5% of the last 8" in text
    assert "qc.min_pass_rate=25%" in text
    assert "T=0.7" in text
    assert "liver/tiny" in text


def test_the_gate_looks_at_the_window_only() -> None:
    gate = QualityGate(QualityConfig(min_pass_rate=0.5, window=4))
    for passed in (False, False, False, True, True, True) * 3:
        try:
            gate.record(_painted(passed=passed))
        except RejectionError:
            break
    else:
        pytest.fail("a window with one pass of four must stop the run")
