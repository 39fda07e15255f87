"""texture_field: the generator's known answers, each step on both paths bit for bit, the law of the released code."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import scipy.ndimage as ndi
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch._dynamo.exc import Unsupported

from ftengine.errors import KernelInputError
from ftengine.kernels import _launch, gaussian_blur, texture_field
from ftengine.kernels.texture_field import (
    _SLAB_VOXELS,
    _draw_noise,
    _fill_words,
    _pointers,
    _scale_to_mean,
    _Stream,
    _toss_coins,
)
from ftengine.kernels.texture_field_ref import field_of_spots_ref, philox4x32_ref, texture_field_ref
from ftengine.rng import Purpose, patch_rng
from tests.kernels.cuda_cpu import THREAD_ORDERS
from tests.kernels.support import (
    EPS32,
    FEW,
    PROPERTY,
    Guarded,
    KernelsOnCpu,
    as_array,
    compiled,
    run_behind_a_late_copy,
    same_bits,
)

# Random123's known answers for philox4x32-10: counter, key, words
KNOWN_ANSWERS = [
    ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]

words32 = st.integers(0, 2**32 - 1)
seeds = st.one_of(st.integers(0, 9), st.integers(0, 2**64 - 1))
sizes = st.tuples(st.integers(1, 6), st.integers(1, 9), st.integers(1, 40))


def words_by_numba(counter: tuple[int, ...], key: tuple[int, ...], blocks: int) -> NDArray[np.uint32]:
    out = np.zeros(4 * blocks, np.uint32)
    _fill_words(out, *_launch_numbers(counter, key))
    return out


def words_by_kernel(counter: tuple[int, ...], key: tuple[int, ...], blocks: int) -> NDArray[np.uint32]:
    out = torch.zeros(4 * blocks, dtype=torch.int32)
    _launch.launch(
        "texture_field.cu",
        "random_words",
        (2,),
        (32,),
        (*_pointers(out), *_launch_numbers(counter, key), np.int64(blocks)),
        out.device,
        options=("--fmad=false",),
    )
    return out.numpy().view(np.uint32)


def _launch_numbers(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[np.generic, ...]:
    return (
        np.uint64(counter[0] | counter[1] << 32),
        np.uint32(counter[2]),
        np.uint32(counter[3]),
        np.uint64(key[0] | key[1] << 32),
    )


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_generator_gives_the_known_answers(
    on_cpu: KernelsOnCpu, counter: tuple[int, int, int, int], key: tuple[int, int], words: tuple[int, ...]
) -> None:
    assert philox4x32_ref(counter, key) == words
    assert tuple(words_by_numba(counter, key, 1)) == words
    with on_cpu("forward"):
        assert tuple(words_by_kernel(counter, key, 1)) == words


@FEW
@given(counter=st.tuples(words32, words32, words32, words32), key=st.tuples(words32, words32))
def test_generator_counts_on_over_its_lower_words(
    on_cpu: KernelsOnCpu, counter: tuple[int, int, int, int], key: tuple[int, int]
) -> None:
    """Seventy blocks on; from 2**32 - 8 the lowest word wraps and the next one counts."""
    for low in (counter[0], 2**32 - 8):
        first = low | counter[1] << 32
        blocks = [(first + b) % 2**64 for b in range(70)]
        wanted = [w for b in blocks for w in philox4x32_ref((b % 2**32, b >> 32, counter[2], counter[3]), key)]
        assert words_by_numba((low, *counter[1:]), key, 70).tolist() == wanted
        with on_cpu("shuffled"):
            assert words_by_kernel((low, *counter[1:]), key, 70).tolist() == wanted


def uniforms_ref(shape: tuple[int, ...], stream: _Stream) -> NDArray[np.float64]:
    """The module's docstring, voxel by voxel."""
    count = int(np.prod(shape))
    key = (stream.seed % 2**32, stream.seed >> 32)
    words = [
        philox4x32_ref((i // 4, 0, stream.number, int(Purpose.TEXTURE_FIELD) << 8 | stream.use), key)[i % 4]
        for i in range(count)
    ]
    return np.array([(word >> 8) / 2**24 for word in words]).reshape(shape)


def uniforms(shape: tuple[int, ...], stream: _Stream) -> torch.Tensor:
    guarded = Guarded(shape, torch.float32)
    _draw_noise(guarded.tensor, stream)
    assert guarded.is_intact()
    return guarded.tensor


@FEW
@given(shape=sizes, seed=seeds, number=words32, use=st.integers(0, 1))
def test_noise_is_the_generators(
    on_cpu: KernelsOnCpu, shape: tuple[int, int, int], seed: int, number: int, use: int
) -> None:
    stream = _Stream(seed, number, use)
    wanted = uniforms_ref(shape, stream)
    assert np.array_equal(as_array(uniforms(shape, stream)), wanted)
    for order in THREAD_ORDERS:
        with on_cpu(order):
            assert np.array_equal(as_array(uniforms(shape, stream)), wanted)


def test_noise_goes_on_from_slab_to_slab() -> None:
    values = uniforms((1, _SLAB_VOXELS + 7), _Stream(3, 1, 0))[0]
    start = _SLAB_VOXELS - 4
    words = words_by_numba((start // 4, 0, 1, int(Purpose.TEXTURE_FIELD) << 8), (3, 0), 3)
    assert values[start:].tolist() == [float(w >> 8) / 2**24 for w in words[:11]]


def test_noise_is_uniform_and_streams_have_nothing_in_common() -> None:
    """Mean and mean square within five standard deviations; so is the correlation of any two streams."""
    n = 1 << 18
    streams = [_Stream(0, 0, 0), _Stream(0, 0, 1), _Stream(0, 1, 0), _Stream(1, 0, 0), _Stream(2**32, 0, 0)]
    values = np.stack([as_array(uniforms((n,), stream)) for stream in streams])
    assert np.all(np.abs(values.mean(1) - 1 / 2) <= 5 * np.sqrt(1 / 12 / n))
    assert np.all(np.abs((values**2).mean(1) - 1 / 3) <= 5 * np.sqrt(4 / 45 / n))
    assert np.all(np.abs(np.corrcoef(values) - np.eye(len(streams))) <= 5 / np.sqrt(n) + np.eye(len(streams)))
    assert np.all((values >= 0) & (values < 1))


@dataclass(frozen=True)
class Law:
    """A small field with the numbers that its maker draws."""

    seed: int
    number: int
    sigma_a: float
    sigma_b: float
    shape: tuple[int, int, int]

    @property
    def parameters(self) -> tuple[float, float, float]:
        rng = patch_rng(self.seed, Purpose.TEXTURE_FIELD, index=self.number)
        return rng.uniform(0.19, 0.21), rng.uniform(0.04, 0.06), rng.uniform(0.5, 0.55)

    def stream(self, use: int) -> _Stream:
        return _Stream(self.seed, self.number, use)

    def spots(self) -> torch.Tensor:
        """The steps up to the coins, on the path of the moment: [1, z, y, x]."""
        scale, base, _ = self.parameters
        values = uniforms((1, *self.shape), self.stream(0))
        gaussian_blur(values, [self.sigma_a] * 3, out=values)
        _toss_coins(values, np.float32(scale), np.float32(base), self.stream(1))
        return values

    def field(self) -> torch.Tensor:
        return texture_field(self.seed, self.number, self.sigma_a, self.sigma_b, self.shape)


@st.composite
def laws(draw: st.DrawFn) -> Law:
    shape = draw(st.tuples(st.integers(1, 24), st.integers(1, 24), st.integers(1, 24)))
    sigma = st.sampled_from([0.0, 0.5, 1.0, 2.5, 4.0])
    return Law(draw(seeds), draw(st.integers(0, 9)), draw(sigma), draw(sigma), shape)


def blur_bound(sigma: float) -> float:
    """What gaussian_blur promises at most, for values up to 1; the later axes hardly widen it, since weights sum to 1."""
    return 3 * (2 * int(4 * sigma + 0.5) + 4) * EPS32 * (1 + 1e-3) if sigma >= 0.125 else 0.0


def assert_follows_the_law(law: Law, *, path: Callable[[], AbstractContextManager[None]] = nullcontext) -> None:
    """Against float64 for the same uniform numbers: coins beside their probability's error, then the whole field."""
    scale, base, u0 = law.parameters
    noise, coin = (as_array(uniforms(law.shape, law.stream(use))) for use in (0, 1))
    wanted = texture_field_ref(noise, coin, law.sigma_a, law.sigma_b, scale, base, u0)
    with path():
        spots, field = as_array(law.spots())[0], as_array(law.field())
    assert np.all((field >= 0) & (field <= 1))
    assert set(np.unique(spots)) <= {0.0, 1.0}

    # A coin may fall otherwise only where its number lies within the probability's error: that of three blurred values
    # (the voxel's twice, the numerator's and the range's ends), then at most seven roundings of numbers up to 0.27.
    smooth = ndi.gaussian_filter(noise, law.sigma_a)
    error, width = blur_bound(law.sigma_a), float(smooth.max() - smooth.min())
    if width > 2 * error:
        band = scale * 4 * error / (width - 2 * error) + 2 * EPS32
        differs = spots != wanted.spots
        assert np.all(np.abs(coin - wanted.probability)[differs] <= band)

    # The field of these spots. A value within the blur's error of 0.12 may fall on either side; each moves the mean m by
    # at most its distance from m over their number.
    error = blur_bound(law.sigma_b)
    blurred = ndi.gaussian_filter(spots, law.sigma_b)
    exact = field_of_spots_ref(spots, law.sigma_b, u0)
    bright, undecided = blurred[blurred > 0.12], int((np.abs(blurred - 0.12) <= error).sum())
    if len(bright) <= undecided:  # the mean of nothing certain: only the range can be said
        return
    mean = float(bright.mean())
    mean_error = error + undecided * (abs(mean - 0.12) + error) / (len(bright) - undecided)
    beta = u0 / mean
    relative = mean_error / (mean - mean_error) + 2 * EPS32  # of beta, with the roundings of beta and of the product
    assert np.all(np.abs(field - exact) <= (beta * error + beta * blurred * relative) * (1 + 1e-3))


@PROPERTY
@given(law=laws())
def test_cpu_path_follows_the_law(law: Law) -> None:
    assert_follows_the_law(law)


@FEW
@given(law=laws())
def test_kernel_follows_the_law(on_cpu: KernelsOnCpu, law: Law) -> None:
    for order in THREAD_ORDERS:
        assert_follows_the_law(law, path=lambda order=order: on_cpu(order))  # type: ignore[misc]  # bound for this turn


def test_nearly_all_voxels_of_a_field_are_those_of_float64() -> None:
    """Where no coin falls otherwise, the field is that of the law in float64 everywhere, to the derived bound."""
    equal = 0
    for seed in range(6):
        law = Law(seed, 0, 3.0, 4.0, (60, 64, 68))
        assert_follows_the_law(law)
        scale, base, u0 = law.parameters
        noise, coin = (as_array(uniforms(law.shape, law.stream(use))) for use in (0, 1))
        wanted = texture_field_ref(noise, coin, 3.0, 4.0, scale, base, u0)
        differs = int((as_array(law.spots())[0] != wanted.spots).sum())
        # the band is 4e-5 wide on either side at most, so of 261,120 coins about twenty lie in it, at the very most
        assert differs <= 20
        if differs == 0:
            equal += 1
            assert np.abs(as_array(law.field()) - wanted.field).max() <= 1e-4
    assert equal > 0


@FEW
@given(law=laws())
def test_coins_and_scale_have_the_same_bits_on_both_paths(on_cpu: KernelsOnCpu, law: Law) -> None:
    """From equal blurred values, whatever the blur."""
    scale, base, u0 = law.parameters
    smooth = gaussian_blur(uniforms((1, *law.shape), law.stream(0)), [law.sigma_a] * 3)

    def steps() -> tuple[torch.Tensor, torch.Tensor]:
        spots = smooth.clone()
        _toss_coins(spots, np.float32(scale), np.float32(base), law.stream(1))
        scaled = smooth.clone()
        _scale_to_mean(scaled, u0)
        return spots, scaled

    by_cpu = steps()
    for order in THREAD_ORDERS:
        with on_cpu(order):
            by_kernel = steps()
        assert all(same_bits(a, b) for a, b in zip(by_cpu, by_kernel, strict=True))


@pytest.mark.parametrize("sigmas", [(0.0, 0.0), (1.0, 1.5), (3.0, 4.0)])
def test_field_has_the_same_bits_on_both_paths(on_cpu: KernelsOnCpu, sigmas: tuple[float, float]) -> None:
    law = Law(5, 2, *sigmas, (13, 18, 31))
    by_cpu = law.field()
    for order in THREAD_ORDERS:
        with on_cpu(order):
            assert same_bits(law.field(), by_cpu)


def test_reductions_reach_every_slab_and_block(on_cpu: KernelsOnCpu) -> None:
    """The extremes, and the only bright value, at the very end of more voxels than one slab or one launch's threads."""
    n = _SLAB_VOXELS + 5
    for context in (nullcontext(), on_cpu("forward")):
        values = torch.full((1, 1, 1, n), 0.5)
        values[..., -1], values[..., -2] = 0.75, 0.25
        with context:
            _toss_coins(values, np.float32(1), np.float32(0), _Stream(0, 0, 1))
        assert values[..., -1] == 1  # probability 1
        assert values[..., -2] == 0  # probability 0
        assert abs(float(values.mean()) - 0.5) <= 5 * 0.5 / np.sqrt(n)
        values = torch.full((1, 1, 1, n), 0.0625)
        values[..., -1] = 0.25
        with context if isinstance(context, nullcontext) else on_cpu("reverse"):
            _scale_to_mean(values, 0.5)
        assert values[..., -1] == 0.5
        assert values[..., 0] == 0.125


@PROPERTY
@given(seed=st.integers(0, 2**31), u0=st.floats(0.05, 0.2))
def test_mean_of_the_bright_values_becomes_u0(seed: int, u0: float) -> None:
    """Before clipping, here where nothing is clipped; exact sums in between, so two roundings a value."""
    values = np.random.default_rng(seed).random((1, 3, 4, 50), dtype=np.float32) * np.float32(0.5)
    bright = values > 0.12
    total = sum((Fraction(float(v)) for v in values[bright]), start=Fraction(0))
    beta = np.float32(u0 * int(bright.sum()) / float(total))
    scaled = torch.from_numpy(values.copy())
    _scale_to_mean(scaled, u0)
    # float64's roundings may fall on the other side of a halfway point of float32's: one unit, no more
    betas = [np.nextafter(beta, np.float32(s)) for s in (0, 9)]
    assert np.all(
        (scaled.numpy() >= np.minimum(values * betas[0], 1)) & (scaled.numpy() <= np.minimum(values * betas[1], 1))
    )
    if beta * values.max() <= 1:
        assert abs(float(scaled.double()[torch.from_numpy(bright)].mean()) - u0) <= 2 * EPS32 * u0 * (1 + 1e-6)


def test_threads_change_no_bit() -> None:
    threads = torch.get_num_threads()
    fields = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        fields.append(texture_field(1, 2, 1.0, 1.0, (107, 101, 103)))
    torch.set_num_threads(threads)
    assert fields[0].numel() > _SLAB_VOXELS
    assert same_bits(fields[0], fields[1])
    assert same_bits(fields[0], fields[2])


def test_every_argument_changes_the_field() -> None:
    one = texture_field(0, 0, 1.0, 1.0, (12, 13, 14))
    assert one.dtype == torch.float32
    assert one.shape == (12, 13, 14)
    assert one.is_contiguous()
    assert same_bits(one, texture_field(0, 0, 1.0, 1.0, (12, 13, 14)))
    for other in ((1, 0, 1.0, 1.0), (2**32, 0, 1.0, 1.0), (0, 1, 1.0, 1.0), (0, 0, 2.0, 1.0), (0, 0, 1.0, 2.0)):
        assert not torch.equal(one, texture_field(*other, (12, 13, 14)))


def statistics_of(field: NDArray[np.float64]) -> list[float]:
    """Mean, standard deviation, share of dark and of clipped values, autocorrelation at four distances."""
    centred = field - field.mean()
    correlations = [
        float(
            np.mean(
                [
                    (np.take(centred, range(lag, n), axis) * np.take(centred, range(n - lag), axis)).mean()
                    for axis, n in enumerate(field.shape)
                ]
            )
            / field.var()
        )
        for lag in (2, 4, 8, 12)
    ]
    return [field.mean(), field.std(), (field < 0.3).mean(), (field >= 1).mean(), *correlations]


@pytest.mark.parametrize("sigmas", [(3.0, 4.0), (6.0, 4.0)])
def test_fields_are_distributed_as_those_of_scipy_from_numpys_generator(sigmas: tuple[float, float]) -> None:
    """Means over seeds of each statistic, within five standard errors of their difference."""
    seeds, shape = range(12), (64, 60, 56)
    ours, theirs = [], []
    for seed in seeds:
        law, rng = Law(seed, 0, *sigmas, shape), np.random.default_rng(seed)
        ours.append(statistics_of(as_array(law.field())))
        theirs.append(
            statistics_of(texture_field_ref(rng.random(shape), rng.random(shape), *sigmas, *law.parameters).field)
        )
    a, b = np.array(ours), np.array(theirs)
    error = np.sqrt((a.var(0, ddof=1) + b.var(0, ddof=1)) / len(seeds))
    assert np.all(np.abs(a.mean(0) - b.mean(0)) <= 5 * error)


def test_degenerate_fields_are_what_the_docstring_says(on_cpu: KernelsOnCpu) -> None:
    for context in (nullcontext(), on_cpu("forward")):
        with context:
            constant = torch.full((1, 20, 20, 20), 0.25)
            _toss_coins(constant, np.float32(0.2), np.float32(0.05), _Stream(0, 0, 1))
            dark = torch.full((1, 2, 3, 4), 0.05)
            _scale_to_mean(dark, 0.5)
            one = torch.stack([texture_field(seed, 0, 3.0, 4.0, (1, 1, 1)) for seed in range(40)])
        assert abs(float(constant.mean()) - 0.05) <= 5 * np.sqrt(0.05 * 0.95 / 8000)
        assert bool((dark == 0.05).all())
        assert bool(((one == 0) | (abs(one - 0.525) <= 0.025)).all())


def test_compiled_code_says_that_it_cannot_hold_a_field() -> None:
    with pytest.raises(Unsupported, match="texture_field is made once, outside compiled code"):
        compiled(lambda x: x + texture_field(0, 0, 1.0, 1.0, (2, 3, 4)))(torch.zeros(2, 3, 4))
    torch._dynamo.reset()
    in_pieces = torch.compile(lambda x: x + texture_field(0, 0, 1.0, 1.0, (2, 3, 4)), backend="eager")
    assert same_bits(in_pieces(torch.zeros(2, 3, 4)), texture_field(0, 0, 1.0, 1.0, (2, 3, 4)))


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("a negative seed", {"seed": -1}, r"texture_field: seed is -1; want 0 to 2\*\*64 - 1"),
    ("a large seed", {"seed": 2**64}, r"seed is 18446744073709551616; want 0 to 2\*\*64 - 1"),
    ("a large number", {"number": 2**32}, r"number is 4294967296; want 0 to 2\*\*32 - 1"),
    ("a negative sigma", {"sigma_a": -1.0}, r"sigma_a is -1\.0; want a finite number of 0 or more voxels"),
    ("a sigma that is no number", {"sigma_b": float("nan")}, r"sigma_b is nan; want a finite number"),
    ("two lengths", {"shape_zyx": (3, 4)}, r"shape_zyx=\(3, 4\); want three positive lengths"),
    ("no voxel", {"shape_zyx": (3, 0, 4)}, r"shape_zyx=\(3, 0, 4\); want three positive lengths"),
    ("another device", {"device": "meta"}, r"device is on meta; want cpu or cuda"),
]


@pytest.mark.parametrize(("change", "message"), [pytest.param(*row[1:], id=row[0]) for row in REFUSED])
def test_wrong_input_is_refused(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"seed": 0, "number": 0, "sigma_a": 1.0, "sigma_b": 1.0, "shape_zyx": (3, 4, 5)}
    with pytest.raises(KernelInputError, match=message):
        texture_field(**(arguments | change))


@pytest.mark.gpu
@pytest.mark.parametrize("sigmas", [(0.0, 0.0), (1.0, 1.5), (3.0, 4.0), (15.0, 7.0)])
def test_gpu_field_has_the_bits_of_the_cpu(cuda: torch.device, sigmas: tuple[float, float]) -> None:
    for shape in ((13, 18, 31), (64, 75, 101)):
        by_gpu = texture_field(5, 2, *sigmas, shape, device=cuda)
        assert by_gpu.device == cuda
        assert same_bits(by_gpu, texture_field(5, 2, *sigmas, shape))


@pytest.mark.gpu
def test_gpu_works_on_the_current_stream_without_a_sync(cuda: torch.device) -> None:
    noise = torch.rand((1, 40, 41, 43), device=cuda)

    def steps(values: torch.Tensor) -> torch.Tensor:
        result = values.clone()
        _toss_coins(result, np.float32(0.2), np.float32(0.05), _Stream(0, 0, 1))
        result += values
        _scale_to_mean(result, 0.2)
        return result + texture_field(0, 0, 1.0, 1.0, (40, 41, 43), device=cuda)

    expected = steps(noise)
    assert same_bits(run_behind_a_late_copy(noise, steps), expected)


@pytest.mark.gpu
def test_gpu_reaches_past_2_to_31_voxels(cuda: torch.device) -> None:
    count = 2**31 + 2**20 + 5
    free, _ = torch.cuda.mem_get_info(cuda)
    if free < 5 * count:
        pytest.skip(
            f"{free >> 30} GiB of GPU memory are free; want {5 * count >> 30} GiB for a field past 2**31 voxels"
        )
    values = torch.empty((1, 1, 1, count), device=cuda)
    _draw_noise(values, _Stream(0, 0, 0))
    first = count // 4 - 10
    words = words_by_numba((first, 0, 0, int(Purpose.TEXTURE_FIELD) << 8), (0, 0), 11)
    assert values[0, 0, 0, 4 * first :].tolist() == [float(w >> 8) / 2**24 for w in words[: count - 4 * first]]
    values.fill_(0.5)
    values[..., -1], values[..., -2] = 0.75, 0.25
    _toss_coins(values, np.float32(1), np.float32(0), _Stream(0, 0, 1))
    assert values[0, 0, 0, -2:].tolist() == [0, 1]
    values.fill_(0.0625)
    values[..., -1] = 0.25
    _scale_to_mean(values, 0.5)
    assert values[0, 0, 0, -2:].tolist() == [0.125, 0.5]


@pytest.mark.gpu
def test_gpu_field_can_be_captured_in_a_graph(cuda: torch.device) -> None:
    wanted = texture_field(1, 0, 1.0, 1.5, (20, 21, 22), device=cuda)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = texture_field(1, 0, 1.0, 1.5, (20, 21, 22), device=cuda)
    found.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert same_bits(found, wanted)
