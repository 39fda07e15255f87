"""Painting: only inside M, Eq. 1 to the letter, labels follow, failed patches come back as they were."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import scipy.ndimage as ndi
import torch

from ftengine.config import Config
from ftengine.synthesis.engine import Address, Synthesizer
from ftengine.synthesis.painting import Painting
from ftengine.synthesis.released import TextureFields, released_blend

CONFIG = Config.preset("abdomen").with_overrides({"synthesis.size_weights": {"tiny": 0.5, "small": 0.5}})
SHAPE = (40, 44, 48)
ADDRESSES = [Address(0, i) for i in range(3)]


def _batch() -> tuple[torch.Tensor, torch.Tensor]:
    """A patch with a large liver, one with a thin pancreas, one with a liver that has a real tumour."""
    rng = np.random.default_rng(0)
    image = torch.from_numpy(rng.uniform(0.4, 0.8, (3, 1, *SHAPE)).astype(np.float32))
    label = torch.zeros((3, 1, *SHAPE), dtype=torch.uint8)
    label[0, 0, 4:36, 4:40, 4:44] = 1
    label[1, 0, 10:30, 20:23, 20:23] = 3
    label[2, 0, 4:36, 4:40, 4:44] = 1
    label[2, 0, 20:25, 20:25, 20:25] = 2
    return image, label


def _synthesizer(**options: object) -> Synthesizer:
    config = options.pop("config", CONFIG)
    assert isinstance(config, Config)
    return Synthesizer(config.region, config.synthesis, seed=3, **options)  # type: ignore[arg-type]  # keywords of the test


def _paint(**options: object) -> Painting:
    return _synthesizer(**options).paint(*_batch(), ADDRESSES)


def test_only_the_mask_changes_and_only_eligible_patches_are_painted() -> None:
    image, label = _batch()
    out = _paint()
    outside = out.mask == 0
    assert torch.equal(out.image[outside], image[outside])
    assert torch.equal(out.label[outside], label[outside])
    assert [p is not None for p in out.records()] == [True, True, False]  # the third holds a real tumour
    assert torch.equal(out.image[2], image[2])


def test_the_label_inside_the_mask_becomes_the_organs_tumor() -> None:
    _, label = _batch()
    out = _paint()
    for row, (organ, tumor) in {0: (1, 2), 1: (3, 4)}.items():
        inside = out.mask[row] > 0
        assert inside.any()  # the thin pancreas too: no turn is wasted
        assert (label[row][inside] == organ).all()
        assert (out.label[row][inside] == tumor).all()


def test_inputs_are_left_alone_and_equal_addresses_paint_equally() -> None:
    image, label = _batch()
    before = image.clone(), label.clone()
    first = _synthesizer().paint(image, label, ADDRESSES)
    second = _synthesizer().paint(image, label, ADDRESSES)
    assert torch.equal(image, before[0])
    assert torch.equal(label, before[1])
    assert torch.equal(first.image, second.image)
    assert first.records()[:1] != _synthesizer().paint(image, label, [Address(0, 7)] * 3).records()[:1]


def test_a_batch_paints_what_its_members_paint_one_by_one() -> None:
    image, label = _batch()
    whole = _synthesizer().paint(image, label, ADDRESSES)
    for row in range(3):
        alone = _synthesizer().paint(image[row : row + 1], label[row : row + 1], ADDRESSES[row : row + 1])
        assert torch.equal(alone.mask[0], whole.mask[row])
        torch.testing.assert_close(alone.image[0], whole.image[row], rtol=0, atol=1e-6)


def test_paper_variant_is_equation_1() -> None:
    """x_hat = (1 - M) x + M (x - tanh(G(x)) g(x)), g(x) the image blurred by the drawn sigma, written with scipy in float64."""
    image, label = _batch()
    network = torch.nn.Conv3d(1, 3, 3, padding=1)
    synthesizer = _synthesizer(generator=network)
    drawn = synthesizer.draw(label, ADDRESSES)
    out = synthesizer.paint(image, label, ADDRESSES)
    for row, channel in ((0, 0), (1, 1)):  # liver is the first organ, pancreas the second
        x = image[row, 0].double().numpy()
        with torch.no_grad():
            g = network(image[row : row + 1])[0, channel].double().numpy()
        texture = ndi.gaussian_filter(x, drawn[row].texture_sigma_mm / 1.5)
        mask = out.mask[row, 0].numpy()
        expected = (1 - mask) * x + mask * (x - np.tanh(g) * texture)
        np.testing.assert_allclose(out.image[row, 0].numpy(), expected, rtol=0, atol=2e-6)


def test_without_a_generator_the_fixed_contrast_is_subtracted() -> None:
    image, _ = _batch()
    darker = _paint(config=CONFIG.with_overrides({"synthesis.fixed_contrast": 0.3}))
    brighter = _paint(config=CONFIG.with_overrides({"synthesis.fixed_contrast": -0.3}))
    inside = darker.mask[0] > 0
    mean = float(image[0][inside].mean())
    assert float((darker.image[0] - image[0])[inside].mean()) == pytest.approx(-0.3 * mean, rel=0.05)
    assert float((brighter.image[0] - image[0])[inside].mean()) == pytest.approx(0.3 * mean, rel=0.05)


def test_a_soft_edge_keeps_the_hard_label() -> None:
    soft = _paint(config=CONFIG.with_overrides({"synthesis.edge_sigma_mm": 1.5}))
    hard = _paint()
    assert torch.equal(soft.label, hard.label)
    assert torch.equal(soft.mask, hard.mask)
    image, label = _batch()
    fringe = (soft.image != image) & (soft.mask == 0)
    assert fringe.any()  # the blurred edge reaches beyond M
    assert ((label == 1) | (label == 3))[fringe].all()  # but never beyond the organ


def test_the_contrast_factor_scales_the_difference() -> None:
    image, _ = _batch()
    once = _paint(config=CONFIG.with_overrides({"synthesis.contrast_factor": (1.0, 1.0)})).image - image
    twice = _paint(config=CONFIG.with_overrides({"synthesis.contrast_factor": (2.0, 2.0)})).image - image
    torch.testing.assert_close(twice, 2 * once, rtol=0, atol=2e-6)


def test_several_tumors_are_united() -> None:
    config = CONFIG.with_overrides({"synthesis.num_tumors": 3, "synthesis.size_weights": {"tiny": 1.0}})
    out = _paint(config=config)
    painted = out.records()[0]
    assert painted is not None
    assert len(painted.center_zyx) == 3
    for center in painted.center_zyx:
        assert out.mask[0, 0][center] == 1


def test_gradients_reach_the_generator_through_the_mask_only() -> None:
    image, label = _batch()
    synthesizer = _synthesizer()
    placement = synthesizer.place(label, synthesizer.draw(label, ADDRESSES))
    g = torch.zeros_like(image[placement.rows, 0], requires_grad=True)
    synthesizer.blend(image[placement.rows, 0], g, placement).sum().backward()
    assert g.grad is not None
    assert (g.grad[placement.mask == 0] == 0).all()
    assert (g.grad[placement.mask > 0] < 0).all()  # more tanh(G) is darker


class _Judge:
    """Passes by row, in the order asked; counts how often it was asked."""

    def __init__(self, proportions: list[list[float]]) -> None:
        self.proportions, self.asked = proportions, 0

    def __call__(
        self, image: torch.Tensor, mask: torch.Tensor, tumor_values: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        proportion = torch.tensor(self.proportions[self.asked])
        assert len(proportion) == len(image) == len(mask) == len(tumor_values)
        self.asked += 1
        return proportion, proportion >= 0.7


def test_a_failed_patch_goes_back_to_image_and_label() -> None:
    image, label = _batch()
    out = _paint(judge=_Judge([[0.9, 0.2]]))
    assert torch.equal(out.image[1], image[1])
    assert torch.equal(out.label[1], label[1])
    assert not torch.equal(out.label[0], label[0])
    kept, failed = out.records()[0], out.records()[1]
    assert kept is not None
    assert failed is not None
    assert (kept.passed, round(kept.proportion, 3)) == (True, 0.9)
    assert (failed.passed, round(failed.proportion, 3)) == (False, 0.2)


class _CountingGenerator:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return torch.full((len(x), 3, *x.shape[2:]), math.atanh(0.2))


def test_retries_draw_failed_patches_anew_with_one_generator_call() -> None:
    generator = _CountingGenerator()
    judge = _Judge([[0.9, 0.2], [0.3], [0.8]])
    out = _paint(judge=judge, generator=generator, retries=3)
    assert judge.asked == 3
    assert generator.calls == 1
    assert [p.num_draws for p in out.records() if p is not None] == [1, 3]
    assert all(p.passed for p in out.records() if p is not None)


# the released variant


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_released_blend_equals_its_formula(sign: float) -> None:
    rng = np.random.default_rng(1)
    x, d, t, m = (rng.random((1, 12, 13, 14)).astype(np.float32) for _ in range(4))
    organ = (rng.random((1, 12, 13, 14)) < 0.6).astype(np.float32)
    ours = released_blend(*(torch.from_numpy(a) for a in (x, d, organ, t, m)), sign=sign).numpy()
    taps = np.exp(-0.5 * np.arange(-3, 4) ** 2)
    taps /= taps.sum()
    smooth = (d * organ).astype(np.float64)[0]
    for axis in range(3):
        smooth = ndi.correlate1d(smooth, taps, axis=axis, mode="constant")
    expected = np.where(organ > 0, x + sign * m * smooth * t, x)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-6)


def test_released_variant_paints_inside_the_organ_with_channel_zero() -> None:
    config = CONFIG.with_overrides({"synthesis.variant": "released"})
    network = torch.nn.Conv3d(1, 3, 1)
    torch.nn.init.zeros_(network.weight)
    assert network.bias is not None
    network.bias.data = torch.tensor([1.0, 50.0, 50.0])
    synthesizer = _synthesizer(config=config, generator=network)
    synthesizer._fields = TextureFields(0, ((3.0, 4.0),), (48, 48, 48))  # the full field takes seconds
    image, label = _batch()
    placement = synthesizer.place(label, synthesizer.draw(label, ADDRESSES))
    assert (synthesizer.difference(image[placement.rows], placement) == 1.0).all()  # channel 0, for the pancreas too
    out = synthesizer.paint(image, label, ADDRESSES)
    changed = out.image[0, 0] != image[0, 0]
    assert changed.any()
    assert (label[0, 0][changed] == 1).all()
