"""gaussian_blur: the reference equals SciPy, both paths equal the reference, and the promises of the docstring hold."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import scipy.ndimage
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from ftengine.errors import KernelInputError
from ftengine.kernels import gaussian_blur
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
    past_2_to_31_voxels,
    random_volumes,
    run_behind_a_late_copy,
    same_bits,
)


@dataclass(frozen=True)
class Case:
    """A batch and its sigmas, [B, 3]."""

    x: torch.Tensor
    sigma: NDArray[np.float64]

    @property
    def rounding_steps(self) -> int:
        """Roundings on the way to one voxel when all is done in one precision.

        Per axis: a product and a sum for each of the 2 r + 1 taps, of which every term meets at most 2 r + 1, the
        rounding of the weights (1) and of the stored result (1), and one to spare for second-order terms.
        """
        return int(sum(2 * int(4 * s + 0.5) + 4 for s in self.sigma.max(axis=0)))

    @property
    def largest(self) -> float:
        """No blurred value exceeds it: the weights are positive and sum to 1."""
        return float(self.x.abs().max())


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Small volumes whose windows often exceed them several times: reflections of reflections."""
    shape = [draw(st.integers(1, n)) for n in (3, 7, 6, 9)]
    sigma = [draw(st.just(0.0) | st.floats(0.05, 4.0)) for _ in range(3 * shape[0])]
    return Case(random_volumes(draw(st.integers(0, 2**32 - 1)), *shape), np.reshape(sigma, (shape[0], 3)))


LONG = Case(
    random_volumes(1, 1, 2, 110, 400), np.array([[0.6, 3.0, 2.0]])
)  # several products an axis; fewer lines a block


@PROPERTY
@given(case=cases())
def test_reference_equals_scipy(case: Case) -> None:
    x = as_array(case.x)
    by_scipy = [
        scipy.ndimage.gaussian_filter(v, s, mode="reflect", truncate=4.0) for v, s in zip(x, case.sigma, strict=True)
    ]
    tolerance = 2 * case.rounding_steps * EPS64 * case.largest  # both sum in float64, in their own order
    np.testing.assert_allclose(gaussian_blur_ref(x, case.sigma), by_scipy, rtol=0, atol=tolerance)


def assert_cpu_path_equals_reference(case: Case) -> None:
    tolerance = (EPS32 + 2 * case.rounding_steps * EPS64) * case.largest  # float64 throughout, rounded once
    np.testing.assert_allclose(
        as_array(gaussian_blur(case.x, case.sigma)), gaussian_blur_ref(case.x, case.sigma), rtol=0, atol=tolerance
    )


@PROPERTY
@given(case=cases())
def test_cpu_path_equals_reference(case: Case) -> None:
    assert_cpu_path_equals_reference(case)


def test_cpu_path_equals_reference_on_a_long_axis() -> None:
    assert_cpu_path_equals_reference(LONG)


def assert_kernel_equals_reference(case: Case) -> None:
    out = Guarded(tuple(case.x.shape), torch.float32, device=case.x.device)
    assert gaussian_blur(case.x, case.sigma, out=out.tensor) is out.tensor
    tolerance = case.rounding_steps * EPS32 * case.largest  # float32 throughout
    np.testing.assert_allclose(
        as_array(out.tensor), gaussian_blur_ref(case.x.cpu(), case.sigma), rtol=0, atol=tolerance
    )
    assert out.is_intact()


@FEW
@given(case=cases())
def test_kernel_equals_reference_in_every_thread_order(on_cpu: KernelsOnCpu, case: Case) -> None:
    for order in THREAD_ORDERS:
        with on_cpu(order):
            assert_kernel_equals_reference(case)


def test_kernel_equals_reference_on_a_long_axis(on_cpu: KernelsOnCpu) -> None:
    with on_cpu("reverse"):
        assert_kernel_equals_reference(LONG)


@PROPERTY
@given(case=cases())
def test_blur_keeps_the_sum_and_the_range(case: Case) -> None:
    """With a mirrored boundary every voxel gives away as much as it gets."""
    x, blurred = as_array(case.x), as_array(gaussian_blur(case.x, case.sigma))
    tolerance = (EPS32 + 2 * case.rounding_steps * EPS64) * case.largest
    assert np.abs(blurred.sum(axis=(1, 2, 3)) - x.sum(axis=(1, 2, 3))).max() <= tolerance * x[0].size
    assert x.min() - tolerance <= blurred.min()
    assert blurred.max() <= x.max() + tolerance


def check_untouched_axes() -> None:
    x = random_volumes(2, 2, 5, 6, 7)
    x[0, 0, 0, :2] = torch.tensor([-0.0, 0.0])
    sigma = np.array([[0.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    blurred = gaussian_blur(x, sigma)
    assert same_bits(blurred[0], x[0])
    alone = torch.stack(
        [gaussian_blur(x[1:, z : z + 1, :, i : i + 1].contiguous(), (0, 1, 0)) for z in range(5) for i in range(7)]
    )
    lines = alone.view(5, 7, 6).permute(0, 2, 1)  # each line along y blurred by itself: nothing came in from beside it
    assert float((blurred[1] - lines).abs().max()) <= 2 * Case(x, sigma).rounding_steps * EPS32 * float(x.abs().max())
    assert same_bits(gaussian_blur(x, (0.0, 0.1, 0.124)), x)


def test_axis_with_sigma_zero_is_untouched(on_cpu: KernelsOnCpu) -> None:
    check_untouched_axes()
    with on_cpu("forward"):
        check_untouched_axes()


def check_out_may_be_x(device: torch.device) -> None:
    case = Case(random_volumes(3, 2, 6, 9, 40).to(device), np.array([[1.0, 0.7, 2.0], [0.0, 1.5, 0.3]]))
    expected, x = gaussian_blur(case.x, case.sigma), case.x.clone()
    assert gaussian_blur(x, case.sigma, out=x) is x
    assert same_bits(x, expected)
    assert same_bits(gaussian_blur(x, (0, 0, 0), out=x), expected)


def test_out_may_be_x(on_cpu: KernelsOnCpu) -> None:
    check_out_may_be_x(torch.device("cpu"))
    for order in THREAD_ORDERS:
        with on_cpu(order):
            check_out_may_be_x(torch.device("cpu"))


def check_batch_mates_do_not_matter(device: torch.device) -> None:
    x, sigma = random_volumes(4, 3, 8, 9, 10).to(device), np.array([[1.0, 2.0, 3.0], [0.0, 0.5, 9.0], [0.3, 0.0, 1.0]])
    together = gaussian_blur(x, sigma)
    for b in range(3):
        assert same_bits(together[b], gaussian_blur(x[b : b + 1], sigma[b])[0])


def test_batch_mates_do_not_matter(on_cpu: KernelsOnCpu) -> None:
    check_batch_mates_do_not_matter(torch.device("cpu"))
    with on_cpu("forward"):
        check_batch_mates_do_not_matter(torch.device("cpu"))


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


def check_gradient(device: torch.device) -> None:
    """The gradient of <blur(x), w> is the adjoint blur of w, which is the blur of w; higher derivatives likewise."""
    x, w = (random_volumes(seed, 2, 3, 5, 7).to(device) for seed in (7, 8))
    sigma = np.array([[1.0, 0.0, 2.0], [0.4, 3.0, 0.5]])
    x.requires_grad_()
    product = (gaussian_blur(x, sigma) * w).sum()
    product.backward()
    assert x.grad is not None
    assert same_bits(x.grad, gaussian_blur(w, sigma))
    # <blur x, w> = <x, blur w>: a sum of x.numel() terms, each off by what its blur is off
    case = Case(x.detach(), sigma)
    tolerance = 2 * x.numel() * (case.rounding_steps + x.numel()) * EPS32 * case.largest * float(w.abs().max())
    assert abs(float(product.detach()) - float((x.detach() * gaussian_blur(w, sigma)).sum())) <= tolerance

    w.requires_grad_()
    (outer,) = torch.autograd.grad(gaussian_blur(w, sigma).square().sum(), w, create_graph=True)
    (second,) = torch.autograd.grad(outer.sum(), w)
    twice = gaussian_blur(gaussian_blur(torch.full_like(w, 2.0), sigma), sigma)  # of values of 2, on both sides
    tolerance = 2 * 2 * case.rounding_steps * EPS32 * 2
    np.testing.assert_allclose(as_array(second), as_array(twice), rtol=0, atol=tolerance)


def test_gradient_is_the_blur_of_the_gradient(on_cpu: KernelsOnCpu) -> None:
    check_gradient(torch.device("cpu"))
    with on_cpu("shuffled"):
        check_gradient(torch.device("cpu"))


def test_expanded_gradient_is_taken() -> None:
    """sum() hands back a gradient without memory of its own."""
    x = random_volumes(9, 1, 3, 4, 5).requires_grad_()
    gaussian_blur(x, (1, 1, 1)).sum().backward()
    assert x.grad is not None
    np.testing.assert_allclose(as_array(x.grad), 1.0, rtol=0, atol=EPS32 * 2)


def test_empty_batch_is_returned_empty() -> None:
    assert gaussian_blur(torch.empty(0, 4, 5, 6), (1, 1, 1)).shape == (0, 4, 5, 6)
    assert gaussian_blur(torch.empty(0, 4, 5, 6), np.empty((0, 3))).shape == (0, 4, 5, 6)


X = torch.zeros(2, 3, 4, 5)
REFUSED: list[tuple[str, Any, Any, dict[str, Any], str]] = [
    (
        "not a tensor",
        np.zeros((2, 3, 4, 5), np.float32),
        (1, 1, 1),
        {},
        r"gaussian_blur: x is a ndarray; want a torch tensor",
    ),
    ("dtype", X.double(), (1, 1, 1), {}, r"x is float64; want float32\. Convert it: x\.to\(torch\.float32\)"),
    ("axes", X[0], (1, 1, 1), {}, r"x has shape \(3, 4, 5\); want four axes, batch z y x"),
    ("memory order", X.transpose(2, 3), (1, 1, 1), {}, r"x has strides .* Call x\.contiguous\(\)"),
    ("device", X.to("meta"), (1, 1, 1), {}, r"x is on meta; want cpu or cuda"),
    ("one sigma", X, 1.0, {}, r"sigma_vox_zyx has shape \(\); want \(3,\) or \(2, 3\)"),
    ("sigma of another batch", X, np.ones((3, 3)), {}, r"has shape \(3, 3\); want \(3,\) or \(2, 3\)"),
    ("ragged sigma", X, [[1, 1, 1], [1]], {}, r"sigma_vox_zyx is not a regular array"),
    ("sigma of words", X, ["a", "b", "c"], {}, r"sigma_vox_zyx holds <U1; want real numbers"),
    ("negative sigma", X, (1, -1, 1), {}, r"sigma_vox_zyx holds -1\.0; want 0 or more voxels"),
    ("sigma NaN", X, (1, float("nan"), 1), {}, r"sigma_vox_zyx holds NaN or infinity"),
    ("sigma in micrometres", X, (1, 1, 2000), {}, r"an axis with its window takes 16005 voxels .* at most 12288"),
    ("sigma elsewhere", X, torch.ones(3, device="meta"), {}, r"sigma_vox_zyx is on meta; want it on the host"),
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


@pytest.mark.gpu
def test_gpu_equals_reference(cuda: torch.device) -> None:
    for seed, sigma in enumerate([[[2.0, 2.0, 2.0], [0.0, 0.7, 1.3]], [[5.0, 11.0, 0.3], [0.0, 0.0, 0.0]]]):
        assert_kernel_equals_reference(Case(random_volumes(seed, 2, 17, 33, 70).to(cuda), np.array(sigma)))
    assert_kernel_equals_reference(Case(LONG.x.to(cuda), LONG.sigma))


@pytest.mark.gpu
def test_gpu_keeps_the_promises(cuda: torch.device) -> None:
    check_out_may_be_x(cuda)
    check_batch_mates_do_not_matter(cuda)
    check_gradient(cuda)


@pytest.mark.gpu
def test_gpu_works_on_the_current_stream_without_a_sync(cuda: torch.device) -> None:
    data = random_volumes(10, 2, 24, 24, 24).to(cuda)
    expected = gaussian_blur(data, (1, 2, 3))
    assert same_bits(run_behind_a_late_copy(data, lambda x: gaussian_blur(x, (1, 2, 3))), expected)


@pytest.mark.gpu
def test_gpu_reaches_past_2_to_31_voxels(cuda: torch.device) -> None:
    """In place; the last corner of the batch is that of a small volume whose windows end before its other side."""
    x = torch.zeros(past_2_to_31_voxels(cuda, 4), device=cuda)
    x[-1, -1, -1, -1] = 1
    corner = torch.zeros(1, 24, 24, 24, device=cuda)
    corner[-1, -1, -1, -1] = 1
    gaussian_blur(x, (1, 2, 0.7), out=x)
    assert same_bits(x[-1, -24:, -24:, -24:], gaussian_blur(corner, (1, 2, 0.7))[0])
    assert not x[0].any()
