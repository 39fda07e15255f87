"""The maths of the diverse variant against float64 and SciPy; its draws; off, it changes no bit."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.ndimage as ndi
import torch
import yaml
from numpy.typing import NDArray
from scipy.special import ndtr

from ftengine.config import DIVERSE, Config
from ftengine.synthesis.engine import Address, Synthesizer
from ftengine.synthesis.rows import mean_inside
from ftengine.synthesis.shape import PatchDraw, draw_patch
from ftengine.synthesis.style import CORE_BEGINS, LEAST_CHANGE_HU, RIM_ENDS

ROOT = Path(__file__).parents[2]
SHAPE = (36, 40, 44)
WIDTH_HU = 425.0
SPACING = (1.5, 1.5, 1.5)
BASE = Config.preset("abdomen").with_overrides(
    {
        "region.patch_zyx": SHAPE,
        "augment.rot90_probability": 0.0,
        "synthesis.size_weights": {"small": 1.0},
    }
)
KEYS: dict[str, dict[str, Any]] = {
    "hyperdense": {"hyperdense_fraction": 1.0},
    "rim": {"rim_fraction": 1.0},
    "target": {"target_contrast_hu": (10.0, 60.0)},
    "heterogeneity": {"heterogeneity": (0.3, 1.0)},
    "all": {
        "hyperdense_fraction": 0.5,
        "rim_fraction": 0.7,
        "target_contrast_hu": (10.0, 60.0),
        "heterogeneity": (0.0, 1.0),
        "edge_sigma_mm": 1.2,
    },
    "all but target": {
        "hyperdense_fraction": 0.5,
        "rim_fraction": 0.7,
        "heterogeneity": (0.0, 1.0),
        "contrast_factor": (0.5, 2.0),
    },
}
ADDRESSES = [Address(0, i) for i in range(6)]


def _config(keys: dict[str, Any]) -> Config:
    return BASE.with_overrides({f"synthesis.{key}": value for key, value in keys.items()})


def _batch() -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(4)
    image = torch.from_numpy(rng.uniform(0.4, 0.8, (6, 1, *SHAPE)).astype(np.float32))
    label = torch.zeros((6, 1, *SHAPE), dtype=torch.uint8)
    label[:, 0, 2:34, 2:38, 2:42] = 1
    return image, label


def _generator() -> torch.nn.Module:
    network = torch.nn.Conv3d(1, 3, 3, padding=1)
    with torch.no_grad():
        network.weight.copy_(torch.from_numpy(np.random.default_rng(1).normal(0, 0.05, network.weight.shape)))
        assert network.bias is not None
        network.bias.fill_(0.1)
    return network.eval()


def _expected(
    x: NDArray[np.float64],
    g: NDArray[np.float64],
    mask: NDArray[np.float64],
    draw: PatchDraw,
    config: Config,
    field: Any,
) -> NDArray[np.float64]:
    """docs/synthesisers.md, in float64 with SciPy's blur."""
    inside, style = mask > 0, draw.style
    texture = ndi.gaussian_filter(x, draw.texture_sigma_mm / 1.5) * draw.contrast_factor
    if style.heterogeneity:
        texture = texture * (1 + style.heterogeneity * (field - field[inside].mean()) / field[inside].std())
    change = np.tanh(g) * texture
    if style.target_hu is not None:
        mean = change[inside].mean()
        least = LEAST_CHANGE_HU / WIDTH_HU
        change = change * style.target_hu / WIDTH_HU / math.copysign(max(abs(mean), least), mean)
    if style.is_hyperdense:
        change = -change
    if style.rim_width_mm:
        depth = ndi.gaussian_filter(mask, style.rim_width_mm / 1.5)
        core = np.clip((depth - ndtr(0.75)) / (ndtr(1.25) - ndtr(0.75)), 0, 1)
        change = change * (core - style.rim_contrast * (1 - core))
    sigma = config.synthesis.edge_sigma_mm / 1.5
    soft = ndi.gaussian_filter(mask, sigma) if sigma else mask
    return x - soft * change


@pytest.mark.parametrize("name", KEYS)
@pytest.mark.parametrize("with_g", [True, False])
def test_painting_equals_the_documented_formula(name: str, *, with_g: bool) -> None:
    config = _config(KEYS[name])
    network = _generator() if with_g else None
    synthesizer = Synthesizer(config.region, config.synthesis, seed=5, generator=network)
    image, label = _batch()
    drawn = synthesizer.draw(label, ADDRESSES)
    out = synthesizer.paint(image, label, ADDRESSES)
    graph = None  # the way of a GPU and of generator training, which sees whole patches
    if network is not None:
        placement = synthesizer.place(label, drawn)
        difference = synthesizer.difference(image, placement)
        assert difference.requires_grad
        graph = synthesizer.blend(image[:, 0], difference, placement).detach()
    assert {d.style.is_hyperdense for d in drawn.values()} == {
        "hyperdense": {True},
        "all": {True, False},
        "all but target": {True, False},
    }.get(name, {False})
    for row, draw in drawn.items():
        x = image[row, 0].double().numpy()
        if network is None:
            g = np.full(SHAPE, math.atanh(0.2))
        else:
            with torch.no_grad():
                g = network(image[row : row + 1])[0, 0].double().numpy()
        field = None
        if draw.style.heterogeneity:
            field = synthesizer._noise.crop(draw.texture_draw, SHAPE).double().numpy()
        expected = _expected(x, g, out.mask[row, 0].double().numpy(), draw, config, field)
        organ = label[row, 0].numpy() == 1
        expected = np.where(organ, expected, x)
        if graph is not None:
            np.testing.assert_allclose(graph[row].numpy(), expected, rtol=0, atol=1e-5)
        # the ramp between core and rim is 8 times steeper than the blur that it is made of
        np.testing.assert_allclose(out.image[row, 0].numpy(), expected, rtol=0, atol=1e-5)


def test_ramp_constants_are_the_normal_distribution() -> None:
    assert pytest.approx(ndtr(0.75), abs=1e-7) == RIM_ENDS
    assert pytest.approx(ndtr(1.25), abs=1e-7) == CORE_BEGINS


def test_the_target_is_the_mean_contrast_whatever_g_says() -> None:
    config = _config({"target_contrast_hu": (10.0, 60.0)})
    image, label = _batch()
    for network in (_generator(), None):
        synthesizer = Synthesizer(config.region, config.synthesis, seed=5, generator=network)
        out = synthesizer.paint(image, label, ADDRESSES)
        for row, draw in synthesizer.draw(label, ADDRESSES).items():
            inside = out.mask[row] > 0
            contrast_hu = float((image[row][inside] - out.image[row][inside]).double().mean()) * WIDTH_HU
            assert contrast_hu == pytest.approx(draw.style.target_hu, abs=0.01)


def test_a_rim_is_brighter_than_its_organ_around_a_darker_core() -> None:
    config = _config({"rim_fraction": 1.0, "rim_contrast": (0.8, 0.8), "target_contrast_hu": (40.0, 40.0)})
    image = torch.full((6, 1, *SHAPE), 0.6)
    _, label = _batch()
    synthesizer = Synthesizer(config.region, config.synthesis, seed=5)
    out = synthesizer.paint(image, label, ADDRESSES)
    num_cores = 0
    for row, draw in synthesizer.draw(label, ADDRESSES).items():
        mask = out.mask[row, 0].numpy() > 0
        radius_mm = min(draw.tumors[0].radii_vox_zyx) * 1.5
        assert 1.5 <= draw.style.rim_width_mm <= radius_mm / 3
        depth_mm = ndi.distance_transform_edt(np.pad(mask, 1), sampling=1.5)[1:-1, 1:-1, 1:-1]
        change_hu = (out.image[row, 0].numpy() - 0.6) * WIDTH_HU
        assert change_hu[mask & (depth_mm <= 1.5)].mean() > 25  # 0.8 of 40 HU
        core = depth_mm > 1.6 * draw.style.rim_width_mm
        num_cores += int(core.any())
        assert not core.any() or change_hu[core].mean() < -30
    assert num_cores >= 5  # the organ's border may cut a tumour so thin that it is all rim


def test_a_key_that_is_turned_on_leaves_the_draws_of_the_others() -> None:
    def draw(**keys: Any) -> PatchDraw:
        found = draw_patch(["liver"], _config(keys).synthesis, SPACING, seed=9, epoch=1, index=3)
        assert found is not None
        return found

    plain, full = draw(), draw(**KEYS["all"])
    assert plain.style == type(plain.style)()
    assert full.tumors[0].radii_vox_zyx == plain.tumors[0].radii_vox_zyx
    assert (full.texture_sigma_mm, full.edge_sigma_vox, full.texture_draw) == (
        plain.texture_sigma_mm,
        plain.edge_sigma_vox,
        plain.texture_draw,
    )
    only = draw(target_contrast_hu=(10.0, 60.0))
    assert only.style.target_hu == full.style.target_hu


def test_styles_occur_as_often_as_their_fractions_say() -> None:
    config = _config({"hyperdense_fraction": 0.3, "rim_fraction": 0.1})
    styles = [
        d.style
        for i in range(1000)
        if (d := draw_patch(["liver"], config.synthesis, SPACING, seed=1, epoch=0, index=i)) is not None
    ]
    bright, rims = np.array([s.is_hyperdense for s in styles]), np.array([s.rim_width_mm > 0 for s in styles])
    assert abs(bright.mean() - 0.3) < 4 * math.sqrt(0.3 * 0.7 / 1000)
    assert abs(rims.mean() - 0.1) < 4 * math.sqrt(0.1 * 0.9 / 1000)
    assert abs((bright & rims).mean() - 0.03) < 4 * math.sqrt(0.03 * 0.97 / 1000)  # independent


def test_gradients_reach_g_through_the_target() -> None:
    """Target, rim and noise field at once, against differences of the way without gradients."""
    config = _config({"target_contrast_hu": (30.0, 30.0), "rim_fraction": 1.0, "heterogeneity": (0.5, 0.5)})
    synthesizer = Synthesizer(config.region, config.synthesis, seed=5)
    image, label = _batch()
    placement = synthesizer.place(label, synthesizer.draw(label, ADDRESSES))
    g = torch.full_like(image[:, 0], 0.2, dtype=torch.float32).requires_grad_()
    painted = synthesizer.blend(image[:, 0], g, placement)
    (painted - image[:, 0]).square().sum().backward()
    assert g.grad is not None
    assert (g.grad[placement.mask == 0] == 0).all()
    assert (g.grad[placement.mask > 0] != 0).any()
    # numerically, along a random direction
    direction = torch.from_numpy(np.random.default_rng(3).normal(size=g.shape).astype(np.float32)) * placement.mask
    losses = []
    for step in (-0.01, 0.01):
        moved = synthesizer.blend(image[:, 0], g.detach() + step * direction, placement)
        losses.append(float((moved - image[:, 0]).double().square().sum()))
    along = float((g.grad * direction).sum())
    assert along == pytest.approx((losses[1] - losses[0]) / 0.02, rel=0.02)


def test_means_are_those_of_numpy_with_and_without_gradients() -> None:
    rng = np.random.default_rng(2)
    values, other = (torch.from_numpy(rng.normal(size=(3, 8, 9, 10)).astype(np.float32)) for _ in range(2))
    mask = torch.from_numpy((rng.random((3, 8, 9, 10)) < 0.3).astype(np.uint8))
    mask[2] = 0
    box = torch.tensor([[[-2, 0, 0], [8, 9, 14]]] * 3)
    for tanh_of, product in ((None, values), (other, values * other.tanh())):
        expected = [float(product[i][mask[i] > 0].double().mean()) for i in range(2)] + [0.0]
        plain = mean_inside(values, mask, box, tanh_of=tanh_of)
        graph = mean_inside(values.clone().requires_grad_(), mask, box, tanh_of=tanh_of)
        np.testing.assert_allclose(plain.numpy(), expected, rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(graph.detach().numpy(), expected, rtol=1e-6, atol=1e-7)


GOLDEN = ROOT / "tests" / "golden" / "styles.json"


def _recorded() -> dict[str, Any]:
    draws: dict[str, Any] = {}
    for name, overrides in {
        "diverse": dict(DIVERSE),
        "syntumor, many": {"synthesis.synthesizer": "syntumor", "synthesis.syntumor_tumors": "many"},
    }.items():
        config = Config.preset("abdomen").with_overrides(overrides)
        rows = []
        for seed, epoch, index, again in ((0, 0, 0, 0), (3, 2, 17, 0), (3, 2, 17, 1), (2**62, 40, 2**40, 0)):
            d = draw_patch(["liver"], config.synthesis, SPACING, seed=seed, epoch=epoch, index=index, draw=again)
            assert d is not None
            numbers = [d.style.rim_width_mm, d.style.rim_contrast, d.style.target_hu or 0.0, d.style.heterogeneity]
            numbers += [d.syntumor_contrast_hu, d.syntumor_edge_mm]
            tumors = [[t.size_class, *(r.hex() for r in t.radii_vox_zyx)] for t in d.tumors]
            rows.append([d.style.is_hyperdense, [float(n).hex() for n in numbers], tumors])
        draws[name] = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    return draws


def test_draws_of_styles_are_as_recorded_bit_for_bit() -> None:
    assert _recorded() == json.loads(GOLDEN.read_text())


def test_the_documented_bundle_is_the_one_in_the_code() -> None:
    text = (ROOT / "docs" / "synthesisers.md").read_text()
    block = yaml.safe_load(text.split("```yaml\n# diverse\n")[1].split("```")[0])
    assert {f"synthesis.{key}": value for key, value in block["synthesis"].items()} == {
        key: list(value) if isinstance(value, tuple) else value for key, value in DIVERSE.items()
    }
    Config.preset("demo").with_overrides(dict(DIVERSE))
