"""Streaming windows: bit by bit MONAI's sliding window on the CPU, mirroring, precision, air, memory."""

from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from monai.data.utils import dense_patch_slices
from monai.inferers.utils import sliding_window_inference
from numpy.typing import NDArray
from torch import nn

from ftengine.config import Config
from ftengine.errors import ConfigError
from ftengine.geometry import IntZYX
from ftengine.prediction.infer import predict_volume
from ftengine.prediction.sliding_windows import (
    WindowScores,
    best_class,
    chosen_precision,
    slabs_of,
    window_starts,
)
from tests.support import organ_volume, small_config

CPU = torch.device("cpu")


def network_of(config: Config, seed: int = 0) -> nn.Module:
    """Two layers without any symmetry: a flip or a shift changes what comes out."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv3d(1, 3, 3, padding=1), nn.Tanh(), nn.Conv3d(3, config.region.num_classes, 3, padding=1)
        )


def noise_hu(shape_zyx: IntZYX, seed: int = 0) -> NDArray[np.int16]:
    return np.random.default_rng(seed).integers(-500, 600, shape_zyx).astype(np.int16)


def by_monai(image_hu: NDArray[np.int16], network: nn.Module, config: Config) -> torch.Tensor:
    low, high = config.region.window_hu
    unit = torch.from_numpy(np.clip((image_hu.astype(np.float32) - low) / (high - low), 0.0, 1.0))
    inference = config.inference
    with torch.no_grad():
        scores = sliding_window_inference(
            unit[None, None],
            config.region.patch_zyx,
            inference.windows_per_call,
            network,
            overlap=inference.overlap,
            mode=inference.weighting,
        )
    assert isinstance(scores, torch.Tensor)
    return scores[0]


@settings(max_examples=25, deadline=None)
@given(
    shape=st.tuples(*[st.integers(4, 45)] * 3),
    patch=st.tuples(*[st.sampled_from((8, 12, 16))] * 3),
    overlap=st.sampled_from((0.0, 0.25, 0.5, 0.6, 0.75, 0.9)),
    weighting=st.sampled_from(("constant", "gaussian")),
    windows_per_call=st.integers(1, 5),
)
def test_scores_have_the_bits_of_monais(
    shape: IntZYX, patch: IntZYX, overlap: float, weighting: str, windows_per_call: int
) -> None:
    if np.prod([max(1.0, n / (p * (1 - overlap))) for n, p in zip(shape, patch, strict=True)]) > 2000:
        overlap = 0.5
    config = small_config(
        region__patch_zyx=patch,
        inference__overlap=overlap,
        inference__weighting=weighting,
        inference__windows_per_call=windows_per_call,
        augment__rot90_probability=0.0,
    )
    network, image = network_of(config), noise_hu(shape)
    expected = by_monai(image, network, config)
    slabs = list(slabs_of(image, network, config, CPU))
    found = torch.cat([slab.scores for slab in slabs], dim=1)
    assert torch.equal(found, expected)
    assert [slab.first_z for slab in slabs] == np.cumsum([0, *(slab.scores.shape[1] for slab in slabs)])[:-1].tolist()
    np.testing.assert_array_equal(
        predict_volume(network, image, config, CPU), expected.argmax(0).to(torch.uint8).numpy()
    )


@given(
    lengths=st.lists(st.tuples(st.integers(1, 20), st.integers(0, 60)), min_size=3, max_size=3),
    overlap=st.floats(0, 0.99),
)
def test_windows_lie_where_monai_puts_them(lengths: list[tuple[int, int]], overlap: float) -> None:
    patch = (lengths[0][0], lengths[1][0], lengths[2][0])
    shape = (sum(lengths[0]), sum(lengths[1]), sum(lengths[2]))
    steps = [p if p == n else max(1, int(p * (1 - overlap))) for p, n in zip(patch, shape, strict=True)]
    if np.prod([n / s for n, s in zip(shape, steps, strict=True)]) > 3000:
        return
    expected = [tuple(s.start for s in place) for place in dense_patch_slices(shape, patch, steps)]
    assert window_starts(shape, patch, overlap) == expected


def test_no_more_than_a_patch_of_slices_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    largest = 0
    zeros = torch.zeros

    def counting(*arguments: object, **options: object) -> torch.Tensor:
        nonlocal largest
        made = zeros(*arguments, **options)  # type: ignore[call-overload]  # whatever it is given
        largest = max(largest, made.numel())
        return made

    monkeypatch.setattr(torch, "zeros", counting)
    config = small_config(inference__overlap=0.5)
    for slab in slabs_of(noise_hu((200, 20, 24)), network_of(config), config, CPU):
        assert slab.scores.shape[1] <= 16
    assert largest == config.region.num_classes * 16 * 20 * 24


def test_mirroring_is_the_mean_of_the_probabilities_of_all_flips() -> None:
    config = small_config(inference__mirror_axes=("z", "x"))
    network = network_of(config)
    windows = torch.rand(2, 1, 16, 16, 16)
    with torch.no_grad():
        flips: list[tuple[int, ...]] = [(), (2,), (4,), (2, 4)]
        expected = sum(network(windows.flip(f)).softmax(1).flip(f) for f in flips) / 4
    found = WindowScores(network, config, CPU)(windows)
    torch.testing.assert_close(found, expected)
    # a network that sees a flipped scan says the flipped result
    image = noise_hu((16, 20, 24))
    there = torch.cat([s.probabilities for s in slabs_of(image, network, config, CPU)], 1)
    back = torch.cat([s.probabilities for s in slabs_of(image[:, :, ::-1].copy(), network, config, CPU)], 1)
    torch.testing.assert_close(back.flip(-1), there)
    torch.testing.assert_close(there.sum(0), torch.ones(16, 20, 24))


def test_mirror_axes_are_three_at_most() -> None:
    for axes in (("x", "x"), ("w",)):
        with pytest.raises(ConfigError, match="mirror_axes"):
            small_config(inference__mirror_axes=axes)


@pytest.mark.parametrize(
    ("wanted", "trained", "device", "expected"),
    [
        ("auto", "bf16", "cuda", "bf16"),
        ("auto", "fp16", "cuda", "fp16"),
        ("auto", "bf16", "cpu", "fp32"),
        ("bf16", "fp32", "cpu", "bf16"),
    ],
)
def test_auto_is_the_precision_of_the_training(wanted: str, trained: str, device: str, expected: str) -> None:
    config = small_config(inference__precision=wanted, training__precision=trained)
    assert chosen_precision(config, torch.device(device)) == expected


def test_bf16_rounds_the_products_and_gives_float32() -> None:
    narrow, wide = (small_config(inference__precision=p) for p in ("bf16", "fp32"))
    network, windows = network_of(wide), torch.rand(1, 1, 16, 16, 16)
    found, exact = WindowScores(network, narrow, CPU)(windows), WindowScores(network, wide, CPU)(windows)
    assert found.dtype == torch.float32
    assert not torch.equal(found, exact)
    torch.testing.assert_close(found, exact, atol=0.03, rtol=0.03)


@pytest.mark.parametrize("mirror", [(), ("x",)])
@pytest.mark.parametrize("shape", [(40, 44, 48), (10, 44, 48)])
def test_windows_of_air_are_left_out_only_where_asked(shape: IntZYX, mirror: tuple[str, ...]) -> None:
    config = small_config(inference__overlap=0.5, inference__mirror_axes=mirror)
    image, _ = organ_volume(shape, tumor=False, seed=0)
    image[:, :, 20:] = -1000
    network = network_of(config)
    counts = {}
    for skip_air in (False, True):
        of_run = config.with_overrides({"inference.skip_air": skip_air})
        totals: list[int] = []
        label = predict_volume(network, image, of_run, CPU, on_windows=lambda _done, total, t=totals: t.append(total))  # type: ignore[misc]
        counts[skip_air] = totals[-1]
        if skip_air:
            assert (label[:, :, 40:] == 0).all()  # no window that holds body reaches there
    assert counts[True] < counts[False] == len(window_starts((max(16, shape[0]), 44, 48), (16, 16, 16), 0.5))
    empty = np.full(shape, -1024, dtype=np.int16)
    nothing = list(slabs_of(empty, network, config.with_overrides({"inference.skip_air": True}), CPU))
    probabilities = torch.cat([slab.probabilities for slab in nothing], 1)
    assert probabilities.shape == (config.region.num_classes, *shape)
    assert (probabilities[0] == 1).all()
    assert (probabilities[1:] == 0).all()


def test_of_equal_scores_the_lowest_class_wins() -> None:
    scores = np.array([[0, 1, 2, -1], [0, 1, 3, -1], [0, 2, 3, -2]], dtype=np.float32)
    np.testing.assert_array_equal(best_class(scores), [0, 2, 1, 0])
    drawn = np.random.default_rng(0).integers(0, 3, (7, 5, 6, 7)).astype(np.float32)
    np.testing.assert_array_equal(best_class(drawn), drawn.argmax(0))


@pytest.mark.gpu
def test_a_gpu_gives_monais_labels(tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    del tmp_path
    config = small_config(inference__overlap=0.5, inference__weighting="gaussian")
    network, image = network_of(config), noise_hu((40, 44, 48))
    expected = by_monai(image, network, config)
    found = torch.cat([slab.scores.cpu() for slab in slabs_of(image, network, config, torch.device("cuda"))], 1)
    torch.testing.assert_close(
        found, expected, atol=1e-3, rtol=1e-3
    )  # TF32 is off by default; convolutions sum in another order
