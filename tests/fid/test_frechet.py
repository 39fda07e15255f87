"""FID and KID: equal to published implementations, and what must hold whatever the features are."""

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.metrics.fid import FIDMetric
from numpy.typing import NDArray

from ftengine.errors import ConfigError
from ftengine.fid.frechet import ADVISED_SAMPLES, frechet_distance, kernel_distance, sample_advice

Features = NDArray[np.float64]
seeds = st.integers(0, 2**32 - 1)
PYTORCH_FID = 9500.856351926632
TORCH_FIDELITY_KID = 1809582.88013146


def _features(seed: int, num: int, size: int, shift: float = 0.0) -> Features:
    """Correlated, of different scales, with a mean: as those of a network."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(size, size)) * np.exp(rng.normal(size=size))
    return np.maximum(rng.normal(size=(num, size)) @ mixing + rng.normal(size=size) + shift, 0.0)


def _whitened(seed: int, num: int, size: int) -> Features:
    """Samples whose mean is 0 and whose covariance (N - 1) is the unit matrix, both exactly but for rounding."""
    samples = np.random.default_rng(seed).normal(size=(num, size))
    return np.linalg.qr(samples - samples.mean(axis=0))[0] * np.sqrt(num - 1)


def _by_sqrtm(a: Features, b: Features) -> float:
    """The formula as it is written: Heusel et al. 2017, Eq. 6."""
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(cov_a @ cov_b)
    return float(np.square(a.mean(0) - b.mean(0)).sum() + np.trace(cov_a + cov_b - 2 * root.real))


@pytest.mark.parametrize("size", [1, 2, 16, 64])
def test_equals_sqrtm_and_monai(size: int) -> None:
    a, b = _features(1, 300, max(size, 2), 0.3)[:, :size], _features(2, 250, max(size, 2))[:, :size]
    ours = frechet_distance(a, b)
    assert ours > 0.01
    if size > 1:  # the other two take no scalars
        assert ours == pytest.approx(_by_sqrtm(a, b), rel=1e-9)
        with torch.no_grad(), pytest.warns(DeprecationWarning, match="disp"):
            assert ours == pytest.approx(float(FIDMetric()(torch.tensor(a), torch.tensor(b))), rel=1e-9)
    else:
        assert ours == pytest.approx((a.mean() - b.mean()) ** 2 + (a.std(ddof=1) - b.std(ddof=1)) ** 2, rel=1e-12)


def test_the_values_of_pytorch_fid_and_torch_fidelity() -> None:
    """``pytorch_fid.fid_score.calculate_frechet_distance`` 0.3.0 and ``torch_fidelity.metric_kid.kernel_mmd`` 0.4.0 on the same features."""
    a, b = _features(5, 400, 48, 0.2), _features(6, 500, 48)
    assert frechet_distance(a, b) == pytest.approx(PYTORCH_FID, rel=1e-9)
    assert kernel_distance(a, b[:400]) == pytest.approx(TORCH_FIDELITY_KID, rel=1e-9)


@settings(max_examples=25, deadline=None)
@given(seed=seeds, num=st.integers(2, 40), size=st.integers(1, 30))
def test_of_a_set_and_itself_is_zero(seed: int, num: int, size: int) -> None:
    a = _features(seed, num, size)
    scale = float(np.var(a, axis=0, ddof=1).sum())
    # the spread is a difference of sums of size ``scale``, each rounded at most a few hundred times
    assert frechet_distance(a, a) <= 1e3 * np.finfo(np.float64).eps * scale
    assert frechet_distance(a, a[::-1]) <= 1e3 * np.finfo(np.float64).eps * (scale + float(np.square(a).sum()))


@settings(max_examples=25, deadline=None)
@given(seed=seeds, size=st.integers(1, 12))
def test_closed_form_for_diagonal_covariances(seed: int, size: int) -> None:
    rng = np.random.default_rng(seed)
    sd_a, sd_b, mean_a, mean_b = np.exp(rng.normal(size=(4, size)))
    a = _whitened(seed, 40, size) * sd_a + mean_a
    b = _whitened(seed + 1, 60, size) * sd_b + mean_b
    wanted = np.square(mean_a - mean_b).sum() + np.square(sd_a - sd_b).sum()
    assert frechet_distance(a, b) == pytest.approx(wanted, rel=1e-9)


@settings(max_examples=25, deadline=None)
@given(seed=seeds, sizes=st.tuples(st.integers(2, 40), st.integers(2, 40), st.integers(1, 20)))
def test_symmetric_and_blind_to_rotation_and_shift(seed: int, sizes: tuple[int, int, int]) -> None:
    num_a, num_b, size = sizes
    a, b = _features(seed, num_a, size), _features(seed + 1, num_b, size)
    rng = np.random.default_rng(seed)
    rotation = np.linalg.qr(rng.normal(size=(size, size)))[0]
    shift = rng.normal(size=size)
    value = frechet_distance(a, b)
    least = 1e-10 * float(np.square(a).sum() + np.square(b).sum())
    assert frechet_distance(b, a) == pytest.approx(value, rel=1e-8, abs=least)
    assert frechet_distance(a @ rotation + shift, b @ rotation + shift) == pytest.approx(value, rel=1e-8, abs=least)
    assert frechet_distance(3 * a, 3 * b) == pytest.approx(9 * value, rel=1e-8, abs=9 * least)
    assert kernel_distance(b, a) == pytest.approx(kernel_distance(a, b), rel=1e-9, abs=1e-9)
    assert kernel_distance(a @ rotation, b @ rotation) == pytest.approx(kernel_distance(a, b), rel=1e-8, abs=1e-8)


def test_fewer_samples_than_features_is_exact_and_too_large() -> None:
    """Against sqrtm of the whole covariances of a set that lies in a space of 20 of 64 dimensions; and the bias that is warned of."""
    a, b = _features(3, 20, 64), _features(4, 21, 64)
    ours = frechet_distance(a, b)
    mean = float(np.square(a.mean(0) - b.mean(0)).sum())
    values = np.linalg.eigvals(np.cov(a, rowvar=False) @ np.cov(b, rowvar=False))
    root = np.sqrt(np.maximum(values.real, 0)).sum()
    direct = mean + np.var(a, axis=0, ddof=1).sum() + np.var(b, axis=0, ddof=1).sum() - 2 * root
    assert ours == pytest.approx(direct, rel=1e-5)  # roots of eigenvalues lose half of the digits
    many = _features(7, 6000, 16)
    few = [frechet_distance(many[k : k + 30], many[3000 + k : 3030 + k]) for k in range(0, 3000, 300)]
    assert np.mean(few) > 10 * frechet_distance(many[:3000], many[3000:])
    unbiased = [kernel_distance(many[k : k + 30], many[3000 + k : 3030 + k]) for k in range(0, 3000, 30)]
    assert abs(np.mean(unbiased)) < 4 * np.std(unbiased) / np.sqrt(len(unbiased))


def test_kernel_distance_is_the_mean_over_pairs() -> None:
    a, b = _features(8, 5, 3), _features(9, 4, 3)

    def kernel(x: Features, y: Features) -> float:
        return float((x @ y / 3 + 1) ** 3)

    def within(s: Features) -> float:
        return float(np.mean([kernel(x, y) for i, x in enumerate(s) for j, y in enumerate(s) if i != j]))

    wanted = within(a) + within(b) - 2 * np.mean([kernel(x, y) for x in a for y in b])
    assert kernel_distance(a, b) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize(
    ("a", "b", "text"),
    [
        (np.zeros((3, 4)), np.zeros((3, 5)), "of one network"),
        (np.zeros((1, 4)), np.zeros((3, 4)), "at least 2"),
        (np.full((3, 4), np.nan), np.zeros((3, 4)), "finite"),
    ],
)
def test_refused(a: Features, b: Features, text: str) -> None:
    for distance in (frechet_distance, kernel_distance):
        with pytest.raises(ConfigError, match=text):
            distance(a, b)


@pytest.mark.parametrize(
    ("real", "painted", "size", "text"),
    [
        (300, 4000, 2048, "full rank"),
        (2048, 2048, 2048, "full rank"),
        (300, 4000, 64, f"fewer than {ADVISED_SAMPLES}"),
        (2049, 2049, 2048, None),
        (2048, 2048, 64, None),
    ],
)
def test_few_samples_are_told(real: int, painted: int, size: int, text: str | None) -> None:
    told = sample_advice(real, painted, size)
    assert (told is None) == (text is None)
    if told is not None and text is not None:
        assert text in told
        assert f"{real} real and {painted} synthetic" in told
