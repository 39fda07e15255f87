"""gaussian_blur: the reference equals SciPy, all paths equal the reference and each other, the docstring's promises hold."""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import scipy.ndimage
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from ftengine.errors import KernelInputError
from ftengine.kernels import _launch, gaussian_blur
from ftengine.kernels.gaussian_blur_ref import gaussian_blur_ref
from tests.kernels.cuda_cpu import THREAD_ORDERS
from tests.kernels.support import (
    EPS32,
    EPS64,
    FEW,
    PROPERTY,
    Guarded,
    KernelsOnCpu,
    as_array,
    check_operator,
    compiled,
    past_2_to_31_voxels,
    random_volumes,
    run_behind_a_late_copy,
    same_bits,
)

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
MODULE = sys.modules[gaussian_blur.__module__]  # its name is taken by the function

# Relative and absolute error of one rounding to storage; the latter is half the smallest subnormal.
STORED = {torch.float16: (2.0**-11, 2.0**-25), torch.bfloat16: (2.0**-8, 2.0**-134)}


@dataclass(frozen=True)
class Case:
    """A batch and its sigmas, [B, 3]."""

    x: torch.Tensor
    sigma: NDArray[np.float64]

    def to(self, to: torch.device | torch.dtype) -> "Case":
        return replace(self, x=self.x.to(to))

    @property
    def largest(self) -> float:
        """No blurred value exceeds it: the weights are positive and sum to 1."""
        return float(self.x.abs().max())

    def tolerance(self, dtype: torch.dtype) -> float:
        """The docstring's bound.

        An axis with a window of 2 r + 1 taps rounds each weight, each product, and each of the 2 r sums: at most
        2 r + 2 factors (1 + u) stand at any term, whose sizes sum to at most max|x|. Axes multiply their factors.
        """
        radii = (4 * self.sigma + 0.5).astype(int)
        n_u = int(np.where(radii > 0, 2 * radii + 2, 0).sum(axis=1).max()) * (
            EPS64 if dtype == torch.float64 else EPS32
        )
        error = n_u / (1 - n_u) * self.largest
        relative, absolute = STORED.get(dtype, (0.0, 0.0))
        of_the_reference = 2 * int((2 * radii + 4).sum(axis=1).max()) * EPS64 * self.largest  # sums, then divides
        return error + relative * (self.largest + error) + absolute + of_the_reference


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Small volumes whose windows often exceed them several times: reflections of reflections."""
    shape = [draw(st.integers(1, n)) for n in (3, 7, 6, 9)]
    sigma = [draw(st.just(0.0) | st.floats(0.05, 4.0)) for _ in range(3 * shape[0])]
    return Case(random_volumes(draw(st.integers(0, 2**32 - 1)), *shape), np.reshape(sigma, (shape[0], 3)))


def case_of(seed: int, shape: tuple[int, ...], *sigma: tuple[float, ...]) -> Case:
    return Case(random_volumes(seed, *shape), np.array(sigma))


# Odd, thin and long: every radius of the one-pass kernel, several tiles along each axis, wide windows, a large batch.
LARGE = [
    case_of(1, (1, 2, 33, 400), (0.6, 3.0, 2.0)),
    case_of(2, (1, 37, 65, 70), (1.5, 1.5, 1.5)),
    case_of(3, (1, 130, 1, 3), (2.0, 1.0, 0.0)),
    case_of(4, (2, 1, 130, 5), (0.5, 2.1, 0.25), (0.0, 0.13, 2.12)),
    case_of(5, (1, 3, 2, 130), (0.0, 5.0, 7.5)),
    case_of(6, (9, 3, 4, 5), *[(0.25 * k, 0.25 * (8 - k), 0.25 * ((k + 4) % 9)) for k in range(9)]),
    case_of(7, (20, 2, 2, 3), *[(0.1 * k, 1.0, 0.2) for k in range(20)]),
]


@contextmanager
def patched(**values: Any) -> Iterator[None]:
    """The kernel's module with other values for some of its names."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            patch.setattr(MODULE, name, value)
        yield


@contextmanager
def by_axes(on_cpu: KernelsOnCpu, order: str) -> Iterator[None]:
    """The kernel for wide windows, whatever the windows; it is never asked to blur nothing."""
    at_once = MODULE._blur_at_once

    def blur(out: torch.Tensor, x: torch.Tensor, work: Any, *tables: torch.Tensor | None) -> None:
        (MODULE._blur_by_axes if work.radii.any() else at_once)(out, x, work, *tables)

    with on_cpu(order), patched(_blur_at_once=blur):
        yield


@contextmanager
def in_chunks(on_cpu: KernelsOnCpu, order: str) -> Iterator[None]:
    """The one-pass kernel as a large GPU runs it: columns cut into pieces along z."""
    with on_cpu(order), patched(_blocks_at_once=lambda _device: 12):
        yield


@contextmanager
def box_on_device(on_cpu: KernelsOnCpu, order: str) -> Iterator[None]:
    """Boxes as the kernel meets them in device memory, unchecked."""
    with on_cpu(order), patched(_is_on_device=lambda _table: True):
        yield


@contextmanager
def box_on_device_by_axes(on_cpu: KernelsOnCpu, order: str) -> Iterator[None]:
    with by_axes(on_cpu, order), patched(_is_on_device=lambda _table: True):
        yield


def everywhere(on_cpu: KernelsOnCpu, order: str) -> list[AbstractContextManager[None]]:
    """The CPU path, and the kernels with boxes of the host and of the device."""
    return [nullcontext(), *(path(on_cpu, order) for path in BOX_PATHS)]


KERNEL_PATHS = (in_chunks, by_axes)
BOX_PATHS = (in_chunks, by_axes, box_on_device, box_on_device_by_axes)


@PROPERTY
@given(case=cases())
def test_reference_equals_scipy(case: Case) -> None:
    x = as_array(case.x)
    by_scipy = [
        scipy.ndimage.gaussian_filter(v, s, mode="reflect", truncate=4.0) for v, s in zip(x, case.sigma, strict=True)
    ]
    np.testing.assert_allclose(gaussian_blur_ref(x, case.sigma), by_scipy, rtol=0, atol=case.tolerance(torch.float64))


def assert_equals_reference(case: Case) -> torch.Tensor:
    """The blur, after checks."""
    out = Guarded(tuple(case.x.shape), case.x.dtype, device=case.x.device)
    assert gaussian_blur(case.x, case.sigma, out=out.tensor) is out.tensor
    assert out.is_intact()
    np.testing.assert_allclose(
        as_array(out.tensor),
        gaussian_blur_ref(as_array(case.x), case.sigma),
        rtol=0,
        atol=case.tolerance(case.x.dtype),
    )
    return out.tensor


@PROPERTY
@given(case=cases(), dtype=st.sampled_from(DTYPES))
def test_cpu_path_equals_reference(case: Case, dtype: torch.dtype) -> None:
    assert_equals_reference(case.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_cpu_path_equals_reference_on_large_volumes(dtype: torch.dtype) -> None:
    for case in LARGE:
        assert_equals_reference(case.to(dtype))


@FEW
@given(case=cases(), dtype=st.sampled_from(DTYPES))
def test_kernels_give_the_bits_of_the_cpu_path_in_every_thread_order(
    on_cpu: KernelsOnCpu, case: Case, dtype: torch.dtype
) -> None:
    case = case.to(dtype)
    expected = gaussian_blur(case.x, case.sigma)
    for path in KERNEL_PATHS:
        for order in THREAD_ORDERS:
            with path(on_cpu, order):
                assert same_bits(assert_equals_reference(case), expected)


@pytest.mark.parametrize("index", range(len(LARGE)))
def test_kernels_give_the_bits_of_the_cpu_path_on_large_volumes(on_cpu: KernelsOnCpu, index: int) -> None:
    for dtype in (torch.float32, torch.float64):
        case = LARGE[index].to(dtype)
        expected = gaussian_blur(case.x, case.sigma)
        for path in (on_cpu("reverse"), *(path(on_cpu, "reverse") for path in KERNEL_PATHS)):
            with path:
                assert same_bits(assert_equals_reference(case), expected)


@pytest.mark.parametrize("radius", range(10))
def test_kernels_give_the_same_bits_at_each_radius(on_cpu: KernelsOnCpu, radius: int) -> None:
    """The one-pass kernel is unrolled for each; the window of 9 is the first that it does not take."""
    case = case_of(radius, (1, 11, 34, 33), (radius / 4,) * 3)
    expected = gaussian_blur(case.x, case.sigma)
    np.testing.assert_allclose(
        as_array(expected), gaussian_blur_ref(case.x, case.sigma), rtol=0, atol=case.tolerance(torch.float32)
    )
    with on_cpu("shuffled"):
        assert same_bits(gaussian_blur(case.x, case.sigma), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_voxels_are_read_exactly(on_cpu: KernelsOnCpu, dtype: torch.dtype) -> None:
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype).view(1, 4, 128, 128)
    finite = torch.where(every.isfinite(), every, torch.zeros_like(every))
    expected = gaussian_blur(finite, (0.5, 0.3, 0.4))
    with on_cpu("forward"):
        kept = gaussian_blur(every, (0, 0, 0))
        assert torch.equal(kept.isnan(), every.isnan())
        assert same_bits(kept[~every.isnan()], every[~every.isnan()])
        assert same_bits(gaussian_blur(finite, (0.5, 0.3, 0.4)), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_voxels_are_rounded_as_torch_does(on_cpu: KernelsOnCpu, dtype: torch.dtype) -> None:
    """The one-axis kernel with a window of one tap only stores: float32 of all kinds, and every tie."""
    patterns = np.random.default_rng(0).integers(0, 2**32, 2**16, dtype=np.uint32)
    voxels = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype).float()
    voxels = voxels[voxels.isfinite() & (voxels >= 0)].sort().values
    ties = torch.cat([(voxels[1:] + voxels[:-1]) / 2, torch.tensor([65519.996, 65520.0, 65535.0])])
    values = torch.cat([torch.from_numpy(patterns.view(np.float32)), ties, -ties, voxels])
    stored = torch.zeros(values.shape, dtype=dtype)
    window, radii = torch.ones(1), torch.zeros(3, dtype=torch.int32)
    with on_cpu("forward"):
        _launch.launch(
            "gaussian_blur.cu",
            f"blur_axis_float32_{str(dtype).removeprefix('torch.')}",
            (-(-len(values) // 32),),
            (256,),
            (
                *(_launch.pointer(t) for t in (stored, values, window, radii, None, None)),
                *(np.int32(n) for n in (0, 0, 1, 1, 1, 1, len(values), len(values), len(values), 32)),
            ),
            values.device,
            shared_bytes=4 * 33,
        )
    assert torch.equal(stored.isnan(), values.isnan())
    assert same_bits(stored[~values.isnan()], values.to(dtype)[~values.isnan()])


@PROPERTY
@given(case=cases())
def test_blur_keeps_the_sum_and_the_range(case: Case) -> None:
    """With a mirrored boundary every voxel gives away as much as it gets."""
    x, blurred = as_array(case.x), as_array(gaussian_blur(case.x, case.sigma))
    tolerance = case.tolerance(torch.float32)
    assert np.abs(blurred.sum(axis=(1, 2, 3)) - x.sum(axis=(1, 2, 3))).max() <= tolerance * x[0].size
    assert x.min() - tolerance <= blurred.min()
    assert blurred.max() <= x.max() + tolerance


def check_untouched_axes() -> None:
    x = random_volumes(2, 2, 5, 6, 7)
    x[0, 0, 0, :2] = torch.tensor([-0.0, 0.0])
    sigma = np.array([[0.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    blurred = gaussian_blur(x, sigma)
    assert same_bits(blurred[0], x[0])
    for z in range(5):
        for i in range(7):  # each line along y blurred by itself: nothing came in from beside it
            line = x[1:, z : z + 1, :, i : i + 1].contiguous()
            assert same_bits(blurred[1:, z : z + 1, :, i : i + 1], gaussian_blur(line, (0, 1, 0)))
    assert same_bits(gaussian_blur(x, (0.0, 0.1, 0.124)), x)


def test_axis_with_sigma_zero_is_untouched(on_cpu: KernelsOnCpu) -> None:
    check_untouched_axes()
    with on_cpu("forward"):
        check_untouched_axes()


def check_nan_stays_in_its_window() -> None:
    x, sigma = random_volumes(3, 1, 20, 21, 22), (0.5, 0.7, 1.0)  # radii 2, 3, 4
    expected = gaussian_blur(x, sigma)
    for value in (float("nan"), float("inf")):
        x[0, 10, 10, 10] = value
        blurred = gaussian_blur(x, sigma)
        reached = torch.zeros(1, 20, 21, 22, dtype=torch.bool)
        reached[0, 8:13, 7:14, 6:15] = True
        assert torch.equal(~blurred.isfinite(), reached)
        assert same_bits(blurred[~reached], expected[~reached])


def test_nan_and_infinity_stay_in_their_windows(on_cpu: KernelsOnCpu) -> None:
    check_nan_stays_in_its_window()
    for path in KERNEL_PATHS:
        with path(on_cpu, "forward"):
            check_nan_stays_in_its_window()


def test_float16_survives_flushed_subnormals(on_cpu: KernelsOnCpu) -> None:
    """CuPy compiles with -ftz=true; here the processor flushes as well, for every one of the 65,536 float16 numbers."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.float16).reshape(1, 1, 256, 256)
    with on_cpu("forward"):
        assert torch.set_flush_denormal(True)
        try:
            same, blurred = gaussian_blur(x, (0, 0, 0)), gaussian_blur(x[..., :1, :].nan_to_num(0, 0, 0), (0, 0, 3))
        finally:
            torch.set_flush_denormal(False)
    is_nan = x.isnan()
    assert torch.equal(same.isnan(), is_nan)
    assert same_bits(same[~is_nan], x[~is_nan])
    assert same_bits(blurred, gaussian_blur(x[..., :1, :].nan_to_num(0, 0, 0), (0, 0, 3)))


def check_out_may_be_x(device: torch.device) -> None:
    for dtype in DTYPES:
        for sigma in ([[1.0, 0.7, 2.0], [0.0, 1.5, 0.3]], [[3.0, 0.7, 2.0], [0.0, 1.5, 0.3]], [[0, 2.5, 0]] * 2):
            x = random_volumes(3, 2, 6, 9, 40).to(device, dtype)
            expected = gaussian_blur(x, sigma)
            assert gaussian_blur(x, sigma, out=x) is x
            assert same_bits(x, expected)
            assert same_bits(gaussian_blur(x, (0, 0, 0), out=x), expected)
            boxes = [[[1, 2, 3], [5, 7, 33]], [[0, 0, 10], [6, 3, 40]]]
            expected = gaussian_blur(x, sigma, box=boxes, out=x.clone())
            assert same_bits(gaussian_blur(x, sigma, box=boxes, out=x), expected)


def test_out_may_be_x(on_cpu: KernelsOnCpu) -> None:
    check_out_may_be_x(torch.device("cpu"))
    for order in THREAD_ORDERS:
        with on_cpu(order):
            check_out_may_be_x(torch.device("cpu"))


def check_batch_mates_do_not_matter(device: torch.device) -> None:
    x, sigma = random_volumes(4, 3, 8, 9, 10).to(device), np.array([[1.0, 2.0, 2.0], [0.0, 0.5, 9.0], [0.3, 0.0, 1.0]])
    together = gaussian_blur(x, sigma)
    for b in range(3):
        assert same_bits(together[b], gaussian_blur(x[b : b + 1], sigma[b])[0])


def test_batch_mates_do_not_matter(on_cpu: KernelsOnCpu) -> None:
    check_batch_mates_do_not_matter(torch.device("cpu"))
    with on_cpu("forward"):
        check_batch_mates_do_not_matter(torch.device("cpu"))


def test_threads_change_no_bit() -> None:
    case = case_of(12, (5, 20, 21, 22), *[(1.0 + 0.1 * k, 0.7, 0.2 * k) for k in range(5)])
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(gaussian_blur(case.x, case.sigma))
    torch.set_num_threads(threads)
    assert same_bits(results[0], results[1])
    assert same_bits(results[0], results[2])


# ---- boxes ----


@st.composite
def boxed_cases(draw: st.DrawFn) -> tuple[Case, NDArray[np.int64]]:
    case = draw(cases())
    boxes = [
        [sorted((draw(st.integers(0, n)), draw(st.integers(0, n)))) for n in case.x.shape[1:]]
        for _ in range(len(case.x))
    ]
    return case, np.array(boxes).transpose(0, 2, 1).copy()


def inside(boxes: NDArray[np.int64], like: torch.Tensor) -> torch.Tensor:
    """The boxes' voxels."""
    mask = torch.zeros(like.shape, dtype=torch.bool)
    for b, (first, last) in enumerate(boxes):
        mask[b, first[0] : last[0], first[1] : last[1], first[2] : last[2]] = True
    return mask


def check_boxes(case: Case, boxes: Any, mask: torch.Tensor) -> None:
    """``mask`` are the voxels that the boxes mean."""
    whole = gaussian_blur(case.x, case.sigma)
    kept = random_volumes(99, *case.x.shape).to(case.x)
    out = Guarded(tuple(case.x.shape), case.x.dtype, device=case.x.device)
    out.tensor.copy_(kept)
    gaussian_blur(case.x, case.sigma, box=boxes, out=out.tensor)
    mask = mask.to(case.x.device)
    assert out.is_intact()
    assert same_bits(out.tensor, torch.where(mask, whole, kept))
    alone = gaussian_blur(case.x, case.sigma, box=boxes)
    assert same_bits(alone, torch.where(mask, whole, torch.zeros_like(whole)))


@PROPERTY
@given(boxed=boxed_cases(), dtype=st.sampled_from(DTYPES))
def test_box_holds_the_bits_of_the_whole_blur(boxed: tuple[Case, NDArray[np.int64]], dtype: torch.dtype) -> None:
    case, boxes = boxed
    check_boxes(case.to(dtype), boxes, inside(boxes, case.x))


@FEW
@given(boxed=boxed_cases(), dtype=st.sampled_from(DTYPES))
def test_box_of_the_kernels_holds_the_bits_of_the_whole_blur(
    on_cpu: KernelsOnCpu, boxed: tuple[Case, NDArray[np.int64]], dtype: torch.dtype
) -> None:
    case, boxes = boxed
    for path in BOX_PATHS:
        for order in ("forward", "shuffled"):
            with path(on_cpu, order):
                check_boxes(case.to(dtype), torch.from_numpy(boxes), inside(boxes, case.x))


LARGE_BOXES = [
    (case_of(1, (1, 40, 70, 80), (1.5, 0.8, 1.1)), [[[10, 30, 5], [25, 70, 75]]]),
    (
        case_of(2, (2, 10, 12, 100), (0.5, 2.0, 4.0), (3.0, 0.0, 0.5)),
        [[[0, 0, 0], [10, 12, 100]], [[9, 1, 30], [10, 2, 31]]],
    ),
    (
        case_of(3, (18, 3, 4, 40), *[(0.5, 0.5, 0.1 * k) for k in range(18)]),
        [[[k % 3, k % 4, k], [3, 4, 40 - k]] for k in range(18)],
    ),
]


@pytest.mark.parametrize("index", range(len(LARGE_BOXES)))
def test_large_boxes_hold_the_bits_of_the_whole_blur(on_cpu: KernelsOnCpu, index: int) -> None:
    case, boxes = LARGE_BOXES[index]
    mask = inside(np.array(boxes), case.x)
    check_boxes(case, boxes, mask)
    for path in BOX_PATHS:
        with path(on_cpu, "reverse"):
            check_boxes(case, torch.tensor(boxes), mask)


def test_box_on_the_device_is_clamped(on_cpu: KernelsOnCpu) -> None:
    case = case_of(8, (4, 5, 6, 7), *[(0.5, 1.0, 0.7)] * 4)
    far = 2**40
    boxes = torch.tensor(
        [[[-far, -1, 2], [far, 6, 5]], [[3, 3, 3], [3, 9, 9]], [[4, 5, 6], [1, 2, 3]], [[far, 0, 0], [far + 1, 6, 7]]]
    )
    mask = torch.zeros(case.x.shape, dtype=torch.bool)
    mask[0, :, :, 2:5] = True
    for path in (box_on_device, box_on_device_by_axes):
        with path(on_cpu, "forward"):
            check_boxes(case, boxes, mask)


# ---- gradients ----


GRADIENT_SIGMA = np.array([[1.0, 0.0, 2.0], [0.4, 3.0, 0.5]])


def cut_to(boxes: Any, w: torch.Tensor) -> torch.Tensor:
    """0 outside the boxes; everything without boxes."""
    if boxes is None:
        return w
    mask = inside(torch.as_tensor(boxes).cpu().numpy(), w).to(w.device)
    return torch.where(mask, w, torch.zeros_like(w))


def check_gradient(device: torch.device, boxes: Any = None) -> None:
    """The gradient of <blur(x), w> is the adjoint blur of w, which is the blur of w, cut to the box before."""
    for dtype in DTYPES:
        x, w = (random_volumes(seed, 2, 3, 5, 7).to(device, dtype) for seed in (7, 8))
        x.requires_grad_()
        gaussian_blur(x, GRADIENT_SIGMA, box=boxes).backward(w)
        assert x.grad is not None
        assert same_bits(x.grad, gaussian_blur(cut_to(boxes, w), GRADIENT_SIGMA))

    x = random_volumes(9, 2, 3, 5, 7).to(device).requires_grad_()
    (outer,) = torch.autograd.grad(gaussian_blur(x, GRADIENT_SIGMA, box=boxes).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(outer.sum(), x)
    # twice the blur, the box, the blur, of ones: values of at most 2, from which each side's two blurs err
    ones = gaussian_blur(torch.ones_like(x).detach(), GRADIENT_SIGMA)
    twice = gaussian_blur(cut_to(boxes, 2 * ones), GRADIENT_SIGMA)
    tolerance = 2 * 2 * Case(torch.full_like(ones, 2.0), GRADIENT_SIGMA).tolerance(torch.float32)
    np.testing.assert_allclose(as_array(second), as_array(twice), rtol=0, atol=tolerance)


GRADIENT_BOXES = [[[0, 1, 2], [2, 4, 7]], [[1, 0, 0], [3, 5, 1]]]


def test_gradient_is_the_blur_of_the_gradient(on_cpu: KernelsOnCpu) -> None:
    for boxes in (None, GRADIENT_BOXES):
        check_gradient(torch.device("cpu"), boxes)
        for path in (on_cpu("shuffled"), *(path(on_cpu, "shuffled") for path in BOX_PATHS)):
            with path:
                check_gradient(torch.device("cpu"), torch.tensor(boxes) if boxes else None)


def test_gradient_of_narrow_windows_in_one_pass(on_cpu: KernelsOnCpu) -> None:
    """Voxels outside the box count as 0 there too, for boxes of the host and of the device, and far from them too."""
    x, w, sigma = random_volumes(1, 1, 20, 40, 50), random_volumes(2, 1, 20, 40, 50), (0.5, 1.0, 0.7)
    boxes = torch.tensor([[[4, 5, 30], [8, 12, 40]]])
    cut = torch.where(inside(boxes.numpy(), x), w, torch.zeros_like(w))
    expected = gaussian_blur(cut, sigma)
    for path in everywhere(on_cpu, "reverse"):
        with path:
            leaf = x.clone().requires_grad_()
            gaussian_blur(leaf, sigma, box=boxes).backward(w)
            assert leaf.grad is not None
            assert same_bits(leaf.grad, expected)


def test_gradient_of_an_empty_box_is_zero(on_cpu: KernelsOnCpu) -> None:
    boxes = torch.tensor([[[1, 1, 1], [1, 3, 3]]])
    for path in everywhere(on_cpu, "forward"):
        with path:
            x = random_volumes(1, 1, 3, 4, 5).requires_grad_()
            gaussian_blur(x, (1, 0, 3), box=boxes).sum().backward()
            assert x.grad is not None
            assert not x.grad.any()


@pytest.mark.parametrize("boxes", [None, [[[0, 1, 1], [2, 3, 4]], [[1, 0, 0], [2, 3, 1]]]])
def test_gradients_equal_differences_in_float64(boxes: Any) -> None:
    x = random_volumes(3, 2, 2, 3, 4).double().requires_grad_()
    sigma = np.array([[1.0, 0.0, 2.0], [0.4, 3.0, 0.5]])
    assert torch.autograd.gradcheck(lambda x: gaussian_blur(x, sigma, box=boxes), x)
    assert torch.autograd.gradgradcheck(lambda x: gaussian_blur(x, sigma, box=boxes).square(), x)


def test_expanded_gradient_is_taken() -> None:
    """sum() hands back a gradient without memory of its own."""
    case = case_of(9, (1, 3, 4, 5), (1.0, 1.0, 1.0))
    x = case.x.clone().requires_grad_()
    gaussian_blur(x, case.sigma).sum().backward()
    assert x.grad is not None
    ones = Case(torch.ones_like(case.x), case.sigma)
    np.testing.assert_allclose(as_array(x.grad), 1.0, rtol=0, atol=ones.tolerance(torch.float32))


# ---- torch ----


@pytest.mark.parametrize("boxes", [None, GRADIENT_BOXES])
@pytest.mark.parametrize("wants_gradient", [False, True])
def test_operator_keeps_torchs_rules(boxes: Any, wants_gradient: bool) -> None:
    x, sigma = random_volumes(10, 2, 3, 5, 7), torch.tensor([1.0, 0.0, 0.7], dtype=torch.float64)
    table = None if boxes is None else torch.tensor(boxes)
    leaf = x.clone().requires_grad_(wants_gradient)
    check_operator(torch.ops.ftengine.gaussian_blur.default, (leaf, sigma, table, None))
    check_operator(torch.ops.ftengine.gaussian_blur.default, (leaf, sigma, None, table))
    if not wants_gradient:
        check_operator(torch.ops.ftengine.gaussian_blur_out.default, (x, sigma, table, torch.empty_like(x)))


def test_compiled_in_one_graph_it_gives_the_same() -> None:
    x, w = random_volumes(11, 2, 3, 5, 7), random_volumes(12, 2, 3, 5, 7)
    boxes, sigma = torch.tensor(GRADIENT_BOXES), torch.tensor([[1.0, 0.0, 2.0], [0.4, 3.0, 0.5]])

    def blurred(x: torch.Tensor, sigma: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
        by_constants = gaussian_blur(x * 2.0, (1.0, 0.5, 2.0), box=GRADIENT_BOXES)
        return gaussian_blur(by_constants, sigma, box=boxes)

    leaf, twin = (x.clone().requires_grad_() for _ in range(2))
    by_graph, by_hand = compiled(blurred)(leaf, sigma, boxes), blurred(twin, sigma, boxes)
    assert same_bits(by_graph.detach(), by_hand.detach())
    by_graph.backward(w)
    by_hand.backward(w)
    assert leaf.grad is not None
    assert twin.grad is not None
    assert same_bits(leaf.grad, twin.grad)
    out = torch.empty_like(x)
    compiled(lambda x: gaussian_blur(x, sigma, out=out))(x)
    assert same_bits(out, gaussian_blur(x, sigma))


@pytest.mark.parametrize(
    "sigma",
    [
        (1, 2, 3),
        [1.0, 2.0, 3.0],
        np.array([[1, 2, 3]], dtype=np.float32),
        torch.tensor([1, 2, 3]),
        torch.tensor([[1.0, 2, 3]]).bfloat16(),
    ],
)
def test_sigma_may_come_in_many_forms(sigma: Any) -> None:
    x = random_volumes(5, 1, 4, 5, 6)
    assert same_bits(gaussian_blur(x, sigma), gaussian_blur(x, np.array([[1.0, 2.0, 3.0]])))


@pytest.mark.parametrize(
    "box",
    [
        [((1, 1, 1), (3, 4, 5))],
        np.array([[[1, 1, 1], [3, 4, 5]]], dtype=np.uint8),
        torch.tensor([[[1, 1, 1], [3, 4, 5]]]).int(),
        torch.tensor([[[1, 3], [1, 4], [1, 5]]]).transpose(1, 2),
    ],
)
def test_box_may_come_in_many_forms(box: Any) -> None:
    x = random_volumes(5, 1, 4, 5, 6)
    expected = gaussian_blur(x, (1, 2, 3), box=torch.tensor([[[1, 1, 1], [3, 4, 5]]]))
    assert same_bits(gaussian_blur(x, (1, 2, 3), box=box), expected)


def test_precision_switches_of_a_training_loop_do_not_reach_it() -> None:
    x = random_volumes(6, 1, 8, 8, 8)
    expected = gaussian_blur(x, (1, 1, 1))
    with torch.autocast("cpu", torch.bfloat16):
        assert same_bits(gaussian_blur(x, (1, 1, 1)), expected)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        assert same_bits(gaussian_blur(x, (1, 1, 1)), expected)
    finally:
        torch.set_float32_matmul_precision(before)


def test_empty_batch_is_returned_empty(on_cpu: KernelsOnCpu) -> None:
    for path in (nullcontext(), on_cpu("forward")):
        with path:
            nothing = torch.empty(0, 4, 5, 6)
            assert gaussian_blur(nothing, (1, 1, 1)).shape == (0, 4, 5, 6)
            assert gaussian_blur(nothing, np.empty((0, 3)), box=np.empty((0, 2, 3), int)).shape == (0, 4, 5, 6)


def test_columns_are_cut_where_the_gpu_would_idle() -> None:
    assert MODULE._chunks(tiles=144, num_planes=96, radius=5, at_once=264) == 3  # 2 waves of 42, not 1 of 106
    assert MODULE._chunks(tiles=10_000, num_planes=96, radius=5, at_once=264) == 1
    assert MODULE._chunks(tiles=1, num_planes=3, radius=8, at_once=264) == 3


# ---- refusals ----


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool])
def test_a_mask_is_blurred_as_float32(on_cpu: KernelsOnCpu, dtype: torch.dtype) -> None:
    mask = (random_volumes(22, 2, 6, 7, 8) > 0).to(dtype)
    boxes = [[[1, 0, 2], [5, 7, 7]], [[0, 0, 0], [6, 7, 8]]]
    for sigma in ((1.0, 0.7, 1.2), (0.0, 0.0, 0.0)):
        wanted = gaussian_blur(mask.float(), sigma, box=boxes)
        assert same_bits(gaussian_blur(mask, sigma, box=boxes), wanted)
        out = torch.full_like(wanted, 7.0)
        gaussian_blur(mask, sigma, out=out)
        assert same_bits(out, gaussian_blur(mask.float(), sigma))
        with on_cpu("forward"):
            assert same_bits(gaussian_blur(mask, sigma, box=boxes), wanted)
    with pytest.raises(KernelInputError, match=r"out is uint8; want float32"):
        gaussian_blur(mask, (1, 1, 1), out=mask.to(torch.uint8))


def test_a_box_is_clamped_to_the_volume(on_cpu: KernelsOnCpu) -> None:
    x = random_volumes(21, 2, 6, 7, 8)
    grown = [[[-3, 2, -1], [4, 99, 5]], [[5, 0, 0], [2, 7, 8]]]  # the second has its corners swapped: empty
    clamped = [[[0, 2, 0], [4, 7, 5]], [[0, 0, 0], [0, 0, 0]]]
    wanted = gaussian_blur(x, (1.0, 0.7, 1.2), box=clamped)
    assert same_bits(gaussian_blur(x, (1.0, 0.7, 1.2), box=grown), wanted)
    assert not wanted[1].any()
    with on_cpu("forward"):
        assert same_bits(gaussian_blur(x, (1.0, 0.7, 1.2), box=grown), wanted)


X = torch.zeros(2, 3, 4, 5)
WHOLE = [[[0, 0, 0], [3, 4, 5]]] * 2
REFUSED: list[tuple[str, Any, Any, dict[str, Any], str]] = [
    (
        "not a tensor",
        np.zeros((2, 3, 4, 5), np.float32),
        (1, 1, 1),
        {},
        r"gaussian_blur: x is a ndarray; want a torch tensor",
    ),
    (
        "dtype",
        X.int(),
        (1, 1, 1),
        {},
        r"x is int32; want float32 or float64 or float16 or bfloat16 or uint8 or bool\. Convert it: x\.to\(torch\.float32\)",
    ),
    ("axes", X[0], (1, 1, 1), {}, r"x has shape \(3, 4, 5\); want four axes, batch z y x"),
    ("memory order", X.transpose(2, 3), (1, 1, 1), {}, r"x has strides .* Call x\.contiguous\(\)"),
    ("device", X.to("meta"), (1, 1, 1), {}, r"x is on meta; want cpu or cuda"),
    ("one sigma", X, 1.0, {}, r"sigma_vox_zyx has shape \(\); want \(3,\) or \(2, 3\)"),
    ("sigma of another batch", X, np.ones((3, 3)), {}, r"has shape \(3, 3\); want \(3,\) or \(2, 3\)"),
    ("ragged sigma", X, [[1, 1, 1], [1]], {}, r"sigma_vox_zyx is not a regular array"),
    ("sigma of words", X, ["a", "b", "c"], {}, r"sigma_vox_zyx holds <U1; want real numbers"),
    ("complex sigma", X, torch.ones(3, dtype=torch.complex64), {}, r"sigma_vox_zyx holds complex64; want real numbers"),
    ("negative sigma", X, (1, -1, 1), {}, r"sigma_vox_zyx holds -1\.0; want 0 or more voxels"),
    ("sigma NaN", X, (1, float("nan"), 1), {}, r"sigma_vox_zyx holds NaN or infinity"),
    ("sigma NaN in a tensor", X, torch.tensor([1, torch.nan, 1]), {}, r"sigma_vox_zyx holds NaN or infinity"),
    ("sigma that wants a gradient", X, torch.ones(3).requires_grad_(), {}, r"sigma_vox_zyx requires a gradient"),
    ("sigma in micrometres", X, (1, 1, 2000), {}, r"an axis with its window takes 16005 voxels .* at most 12288"),
    ("in float64", X.double(), (1, 1, 1000), {}, r"an axis with its window takes 8005 voxels .* at most 6144"),
    ("sigma elsewhere", X, torch.ones(3, device="meta"), {}, r"sigma_vox_zyx is on meta; want it on the host"),
    ("one box", X, (1, 1, 1), {"box": WHOLE[0]}, r"box has shape \(2, 3\); want \(2, 2, 3\)"),
    ("ragged box", X, (1, 1, 1), {"box": [[[0, 0, 0], [1]]]}, r"box is not a regular array"),
    ("box of floats", X, (1, 1, 1), {"box": np.array(WHOLE) * 1.0}, r"box holds float64; want integers"),
    ("box tensor of floats", X, (1, 1, 1), {"box": torch.tensor(WHOLE) * 1.0}, r"box holds float64; want integers"),
    (
        "box elsewhere",
        X,
        (1, 1, 1),
        {"box": torch.tensor(WHOLE).to("meta")},
        r"box is int64 on meta .* want int64 in memory order, on the host or on cpu like x",
    ),
    (
        "out of another shape",
        X,
        (1, 1, 1),
        {"out": torch.zeros(1, 3, 4, 5)},
        r"out has shape \(1, 3, 4, 5\); want \(2, 3, 4, 5\)",
    ),
    ("out of another dtype", X, (1, 1, 1), {"out": X.double()}, r"out is float64; want float32"),
    (
        "out that wants a gradient",
        X,
        (1, 1, 1),
        {"out": torch.zeros_like(X).requires_grad_()},
        r"out requires a gradient",
    ),
    (
        "out with a gradient wanted",
        X.clone().requires_grad_(),
        (1, 1, 1),
        {"out": X},
        r"out was given but x requires a gradient",
    ),
]


@pytest.mark.parametrize(("x", "sigma", "kwargs", "message"), [pytest.param(*row[1:], id=row[0]) for row in REFUSED])
def test_wrong_input_is_refused(x: Any, sigma: Any, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(KernelInputError, match=message):
        gaussian_blur(x, sigma, **kwargs)


def test_overlapping_out_is_refused() -> None:
    memory = torch.zeros(3, 3, 4, 5)
    with pytest.raises(KernelInputError, match="out overlaps a part of x; want x itself or separate memory"):
        gaussian_blur(memory[:2], (1, 1, 1), out=memory[1:])


# ---- on a GPU ----


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_gpu_gives_the_bits_of_the_cpu_path(cuda: torch.device, dtype: torch.dtype) -> None:
    for case in (
        *LARGE,
        case_of(8, (2, 17, 33, 70), (2.0, 2.0, 2.0), (0.0, 0.7, 1.3)),
        case_of(9, (2, 17, 33, 70), (5.0, 11.0, 0.3), (0.0, 0.0, 0.0)),
        case_of(10, (4, 96, 96, 96), *[(0.8, 1.2, 0.3 + 0.4 * k) for k in range(4)]),
    ):
        on_gpu = case.to(dtype).to(cuda)
        assert same_bits(assert_equals_reference(on_gpu), gaussian_blur(case.x.to(dtype), case.sigma))


@pytest.mark.gpu
def test_gpu_keeps_the_promises(cuda: torch.device) -> None:
    check_out_may_be_x(cuda)
    check_batch_mates_do_not_matter(cuda)
    for boxes in (None, GRADIENT_BOXES):
        check_gradient(cuda, boxes)
    for case, boxes in LARGE_BOXES:
        for table in (boxes, torch.tensor(boxes, device=cuda)):
            check_boxes(case.to(cuda), table, inside(np.array(boxes), case.x))


@pytest.mark.gpu
def test_gpu_works_on_the_current_stream_without_a_sync(cuda: torch.device) -> None:
    data, boxes = random_volumes(10, 2, 24, 24, 24).to(cuda), torch.tensor([[[2, 3, 4], [20, 21, 22]]] * 2, device=cuda)
    functions: list[Callable[[torch.Tensor], torch.Tensor]] = [
        lambda x: gaussian_blur(x, (1, 2, 2)),
        lambda x: gaussian_blur(x, (1, 2, 3)),
        lambda x: gaussian_blur(x, (1, 2, 2), box=boxes),
        lambda x: gaussian_blur(x, (1, 2, 3), box=boxes),
        lambda x: gaussian_blur(x, (1, 2, 2), out=x),
    ]
    for function in functions:
        expected = function(data.clone())
        assert same_bits(run_behind_a_late_copy(data, function), expected)


@pytest.mark.gpu
def test_gpu_is_captured_in_a_graph(cuda: torch.device) -> None:
    """Voxels and boxes may change between replays; sigma is fixed. Wide windows are refused."""
    x, boxes = random_volumes(1, 2, 24, 25, 26).to(cuda), torch.tensor([[[2, 3, 4], [20, 21, 22]]] * 2, device=cuda)
    out = torch.zeros_like(x)

    def blur() -> torch.Tensor:
        gaussian_blur(x, (1, 2, 0.5), box=boxes, out=out)
        return gaussian_blur(x, (1, 2, 0.5))

    blur()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        whole = blur()
        with pytest.raises(KernelInputError, match=r"a graph is being captured and a window has radius 12"):
            gaussian_blur(x, (1, 2, 3))
    for seed in (2, 3):
        x.copy_(random_volumes(seed, *x.shape))
        boxes.copy_(torch.tensor([[[seed, 0, 1], [9, 9, 9]], [[0, 0, 0], [24, 25, 26]]]))
        out.zero_()
        graph.replay()
        assert same_bits(whole, gaussian_blur(x, (1, 2, 0.5)))
        assert same_bits(out, gaussian_blur(x, (1, 2, 0.5), box=boxes))


@pytest.mark.gpu
def test_gpu_reaches_past_2_to_31_voxels(cuda: torch.device) -> None:
    """The last corner of the batch is that of a small volume whose windows end before its other side."""
    x = torch.zeros(past_2_to_31_voxels(cuda, 4 + 4), device=cuda)
    x[-1, -1, -1, -1] = 1
    corner = torch.zeros(1, 24, 24, 24, device=cuda)
    corner[-1, -1, -1, -1] = 1
    out = torch.empty_like(x)
    for sigma in ((1, 2, 0.7), (1, 3, 0.7)):
        gaussian_blur(x, sigma, out=out)
        assert same_bits(out[-1, -24:, -24:, -24:], gaussian_blur(corner, sigma)[0])
        assert not out[0].any()
