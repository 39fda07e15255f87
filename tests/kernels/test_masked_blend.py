"""masked_blend: Eq. 1 and its gradients on both paths, and the voxels that must not be touched."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ftengine.errors import KernelInputError
from ftengine.kernels import masked_blend
from ftengine.kernels.masked_blend_ref import masked_blend_gradients_ref, masked_blend_ref
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

MASK_DTYPES = (torch.float32, torch.uint8, torch.bool)

# How many roundings a float32 tanh may be off: 2 ulp in CUDA's table of errors, each at most two. Others do better.
TANH = 4


@dataclass(frozen=True)
class Case:
    x: torch.Tensor
    g: torch.Tensor
    texture: torch.Tensor
    mask: torch.Tensor
    grad_out: torch.Tensor

    def to(self, device: torch.device) -> "Case":
        return Case(*(t.to(device) for t in (self.x, self.g, self.texture, self.mask, self.grad_out)))

    @property
    def inputs(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.x, self.g, self.texture, self.mask


def case_of(
    seed: int, shape: tuple[int, ...], dtype: torch.dtype, *, contrast: float = 1.0, mask_fraction: float = 0.3
) -> Case:
    """Normal values; a mask of the given share of the voxels, soft where its dtype allows it."""
    rng = np.random.default_rng(seed)
    x, g, texture, grad_out = (random_volumes(seed + k, *shape) for k in range(4))
    mask = torch.from_numpy(rng.random(shape, dtype=np.float32))
    mask = torch.where(
        mask < mask_fraction,
        mask / max(mask_fraction, 1e-6) if dtype == torch.float32 else torch.ones(()),
        torch.zeros(()),
    )
    return Case(x, g * contrast, texture, mask.to(dtype), grad_out)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    shape = tuple(draw(st.integers(1, n)) for n in (3, 5, 6, 9))
    contrast = draw(st.sampled_from([0.01, 1.0, 30.0]))
    return case_of(
        draw(st.integers(0, 2**31)),
        shape,
        draw(st.sampled_from(MASK_DTYPES)),
        contrast=contrast,
        mask_fraction=draw(st.sampled_from([0.0, 0.3, 1.0])),
    )


def assert_equals_reference(case: Case) -> None:
    out = Guarded(tuple(case.x.shape), torch.float32, device=case.x.device)
    assert masked_blend(*case.inputs, out=out.tensor) is out.tensor
    assert out.is_intact()
    x, g, texture, mask = (as_array(t) for t in case.inputs)
    added = np.abs(mask * np.tanh(g) * texture)
    # tanh, two products and the difference, whose result is at most |x| + |added|
    tolerance = ((TANH + 2) * added + (np.abs(x) + added)) * EPS32 * (1 + 1e-5)
    assert np.all(np.abs(as_array(out.tensor) - masked_blend_ref(x, g, texture, mask)) <= tolerance)
    assert same_bits(masked_blend(*case.inputs), out.tensor)


def assert_gradients_equal_reference(case: Case) -> None:
    x, g, texture = (t.clone().requires_grad_() for t in (case.x, case.g, case.texture))
    painted = masked_blend(x, g, texture, case.mask)
    assert same_bits(painted.detach(), masked_blend(*case.inputs))
    painted.backward(case.grad_out)
    assert x.grad is not None
    assert g.grad is not None
    assert texture.grad is not None
    wanted_x, wanted_g, wanted_texture = masked_blend_gradients_ref(
        *(as_array(t) for t in (case.grad_out, case.g, case.texture, case.mask))
    )
    assert np.array_equal(as_array(x.grad), wanted_x)
    # 1 - tanh^2: twice tanh's error, the square's and the difference's rounding, all at most 1; then three products
    most = np.abs(as_array(case.mask) * as_array(case.texture) * as_array(case.grad_out))
    assert np.all(np.abs(as_array(g.grad) - wanted_g) <= (2 * TANH + 2 + 3) * most * EPS32 * (1 + 1e-5))
    # tanh and two products
    assert np.all(
        np.abs(as_array(texture.grad) - wanted_texture) <= (TANH + 2) * np.abs(wanted_texture) * EPS32 * (1 + 1e-5)
    )


@PROPERTY
@given(case=cases())
def test_cpu_path_equals_reference(case: Case) -> None:
    assert_equals_reference(case)
    assert_gradients_equal_reference(case)


@FEW
@given(case=cases())
def test_kernel_equals_reference(on_cpu: KernelsOnCpu, case: Case) -> None:
    for order in THREAD_ORDERS:
        with on_cpu(order):
            assert_equals_reference(case)
            assert_gradients_equal_reference(case)


@PROPERTY
@given(seed=st.integers(0, 2**31))
def test_reference_gradients_are_those_of_its_differences(seed: int) -> None:
    """Central differences of the reference in float64, so that the hand-written derivative rests on Eq. 1 alone."""
    case = case_of(seed, (1, 2, 3, 4), torch.float32, mask_fraction=0.7)
    x, g, texture, mask, grad_out = (as_array(t) for t in (*case.inputs, case.grad_out))
    gradients = masked_blend_gradients_ref(grad_out, g, texture, mask)
    h = 1e-5  # truncation h^2 and cancellation 1e-16 / h are both below 1e-9 for values of this scale
    for k, wanted in enumerate(gradients):
        low, high = [x, g, texture], [x, g, texture]
        low[k], high[k] = low[k] - h, high[k] + h
        above, below = (masked_blend_ref(shifted[0], shifted[1], shifted[2], mask) for shifted in (high, low))
        slope = (above - below) / (2 * h)
        np.testing.assert_allclose(slope * grad_out, wanted, rtol=0, atol=1e-8)


def check_untouched_outside_the_mask(device: torch.device) -> None:
    """Bit for bit, also -0 and NaN in x, whatever g and texture hold there; and no gradient leaks in."""
    awkward = torch.tensor([-0.0, float("nan"), float("inf"), -float("inf"), 1e-42, 1.0])
    for dtype in MASK_DTYPES:
        case = case_of(3, (2, 3, 4, 6), dtype).to(device)
        outside = (case.mask == 0).cpu()
        x, g, texture = (t.cpu().clone() for t in (case.x, case.g, case.texture))
        for tensor in (x, g, texture):
            tensor[outside] = awkward.repeat(tensor.numel() // 6 + 1)[: int(outside.sum())]
        leaves = [t.to(device).requires_grad_() for t in (x, g, texture)]
        painted = masked_blend(leaves[0], leaves[1], leaves[2], case.mask)
        assert same_bits(painted.detach().cpu()[outside], x[outside])
        assert bool(torch.isfinite(painted.detach().cpu()[~outside]).all())
        painted.backward(case.grad_out)
        for leaf in leaves[1:]:
            assert leaf.grad is not None
            assert bool((leaf.grad.cpu()[outside] == 0).all())
        same_in_place = leaves[0].detach().clone()
        assert (
            masked_blend(same_in_place, leaves[1].detach(), leaves[2].detach(), case.mask, out=same_in_place)
            is same_in_place
        )
        assert same_bits(same_in_place, painted.detach())


def test_outside_the_mask_nothing_changes(on_cpu: KernelsOnCpu) -> None:
    check_untouched_outside_the_mask(torch.device("cpu"))
    with on_cpu("forward"):
        check_untouched_outside_the_mask(torch.device("cpu"))


@pytest.mark.parametrize("name", ["x", "g", "texture"])
def test_each_input_may_want_a_gradient_alone(on_cpu: KernelsOnCpu, name: str) -> None:
    case = case_of(4, (2, 3, 4, 5), torch.uint8)
    for context in (None, "forward"):
        inputs: dict[str, Any] = {"x": case.x, "g": case.g, "texture": case.texture}
        inputs[name] = inputs[name].clone().requires_grad_()
        if context is None:
            masked_blend(
                **inputs, mask=case.mask
            ).sum().backward()  # sum() hands back a gradient without memory of its own
        else:
            with on_cpu(context):
                masked_blend(**inputs, mask=case.mask).sum().backward()
        everything = masked_blend_gradients_ref(
            np.ones(case.x.shape), *(as_array(t) for t in (case.g, case.texture, case.mask))
        )
        wanted = everything[("x", "g", "texture").index(name)]
        found = inputs[name].grad
        assert found is not None
        np.testing.assert_allclose(
            as_array(found), wanted, rtol=0, atol=(2 * TANH + 5) * EPS32 * float(case.texture.abs().max() + 1)
        )


def test_released_chest_variant_can_be_written_with_it() -> None:
    """The module's docstring: x + M sigmoid(h) t is the blend with g = atanh(sigmoid(h)) and the texture -t.

    An error of atanh reaches tanh(g) times (1 - s^2) g, which is below 1/2: the way there and back adds few roundings.
    """
    case = case_of(5, (1, 3, 4, 5), torch.uint8)
    s = torch.sigmoid(case.g)
    painted = masked_blend(case.x, torch.atanh(s), -case.texture, case.mask)
    tolerance = (2 * TANH + 6) * EPS32 * float((case.x.abs() + case.texture.abs()).max())
    np.testing.assert_allclose(
        as_array(painted), as_array(case.x + case.mask * s * case.texture), rtol=0, atol=tolerance
    )


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("dtype", MASK_DTYPES)
def test_gradients_equal_differences_in_float64(dtype: torch.dtype, sign: int) -> None:
    case = case_of(9, (2, 2, 3, 4), dtype, mask_fraction=0.6)
    leaves = [t.double().requires_grad_() for t in (case.x, case.g, case.texture)]
    assert torch.autograd.gradcheck(lambda x, g, t: masked_blend(x, g, t, case.mask, sign=sign), leaves)


@PROPERTY
@given(case=cases())
def test_plus_is_minus_of_the_negative_texture(case: Case) -> None:
    assert same_bits(
        masked_blend(*case.inputs, sign=1), masked_blend(case.x, case.g, -case.texture, case.mask, sign=-1)
    )


@PROPERTY
@given(case=cases())
def test_float64_is_more_exact_by_as_much(on_cpu: KernelsOnCpu, case: Case) -> None:
    x, g, texture = (t.double() for t in (case.x, case.g, case.texture))
    wanted = masked_blend_ref(as_array(x), as_array(g), as_array(texture), as_array(case.mask))
    scale = float(case.x.abs().max() + case.texture.abs().max())
    np.testing.assert_allclose(
        as_array(masked_blend(x, g, texture, case.mask)), wanted, rtol=0, atol=16 * EPS64 * scale
    )
    with on_cpu("forward"):
        np.testing.assert_allclose(
            as_array(masked_blend(x, g, texture, case.mask)), wanted, rtol=0, atol=16 * EPS64 * scale
        )


@pytest.mark.parametrize("leaf", [None, 0, 1, 2])
def test_operator_keeps_torchs_rules(leaf: int | None) -> None:
    case = case_of(10, (2, 3, 4, 5), torch.uint8)
    inputs = list(case.inputs)
    if leaf is not None:
        inputs[leaf] = inputs[leaf].clone().requires_grad_()
    check_operator(torch.ops.ftengine.masked_blend.default, (*inputs, -1, None, None))
    if leaf is None:
        whole = torch.tensor([[[0, 0, 0], [3, 4, 5]]] * 2)
        check_operator(
            torch.ops.ftengine.masked_blend_out.default, (*inputs, 1, case.mask, whole, torch.empty_like(case.x))
        )


def test_compiled_in_one_graph_it_gives_the_same() -> None:
    case = case_of(11, (2, 3, 4, 5), torch.float32)
    leaves = [t.clone().requires_grad_() for t in (case.x, case.g, case.texture)]
    twins = [t.clone().requires_grad_() for t in (case.x, case.g, case.texture)]

    def painted(x: torch.Tensor, g: torch.Tensor, texture: torch.Tensor) -> torch.Tensor:
        return masked_blend(x * 1.0, g, texture, case.mask, sign=1) * 2.0

    by_graph, by_hand = compiled(painted)(*leaves), painted(*twins)
    assert same_bits(by_graph.detach(), by_hand.detach())
    by_graph.backward(case.grad_out)
    by_hand.backward(case.grad_out)
    for a, b in zip(leaves, twins, strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert torch.equal(a.grad, b.grad)
    out = torch.empty_like(case.x)
    compiled(lambda x: masked_blend(x, x, x, case.mask, out=out))(case.x)
    assert same_bits(out, masked_blend(case.x, case.x, case.x, case.mask))


def assert_box_bounds_the_mask(case: Case, boxes: torch.Tensor) -> None:
    inside = torch.zeros_like(case.mask)
    for one, box in zip(inside, boxes.tolist(), strict=True):
        one[tuple(slice(max(a, 0), max(b, 0)) for a, b in zip(*box, strict=True))] = 1
    wanted = masked_blend(case.x, case.g, case.texture, case.mask * inside)
    assert same_bits(masked_blend(*case.inputs, box=boxes), wanted)
    in_place = case.x.clone()
    masked_blend(in_place, case.g, case.texture, case.mask, box=boxes, out=in_place)
    assert same_bits(in_place, wanted)
    gradients: list[torch.Tensor] = []
    for mask, box in ((case.mask * inside, None), (case.mask, boxes)):
        g = case.g.clone().requires_grad_()
        masked_blend(case.x, g, case.texture, mask, box=box).backward(case.grad_out)
        assert g.grad is not None
        gradients.append(g.grad)
    assert torch.equal(gradients[0], gradients[1])


@st.composite
def cases_with_boxes(draw: st.DrawFn) -> tuple[Case, torch.Tensor]:
    """Boxes of any corners: also empty ones and ones that leave the volume."""
    case = draw(cases())
    corner = st.lists(st.integers(-2, 11), min_size=3, max_size=3)
    count = len(case.mask)
    return case, torch.tensor(draw(st.lists(st.tuples(corner, corner), min_size=count, max_size=count)))


@PROPERTY
@given(given_case=cases_with_boxes())
def test_the_box_bounds_the_mask(given_case: tuple[Case, torch.Tensor]) -> None:
    assert_box_bounds_the_mask(*given_case)


@FEW
@given(given_case=cases_with_boxes())
def test_kernel_bounds_the_mask_by_the_box(on_cpu: KernelsOnCpu, given_case: tuple[Case, torch.Tensor]) -> None:
    with on_cpu("shuffled"):
        assert_box_bounds_the_mask(*given_case)


@pytest.mark.gpu
def test_gpu_bounds_the_mask_by_the_box(cuda: torch.device) -> None:
    case = case_of(15, (2, 9, 10, 11), torch.uint8).to(cuda)
    boxes = torch.tensor([[[1, 2, 3], [5, 99, 7]], [[-3, 0, 0], [4, 4, 4]]])
    assert_box_bounds_the_mask(case, boxes)
    assert_box_bounds_the_mask(case, boxes.to(cuda))


def check_organ_bounds_the_mask(device: torch.device) -> None:
    for dtype in MASK_DTYPES:
        case = case_of(13, (2, 5, 6, 7), dtype, mask_fraction=0.7).to(device)
        organ = (random_volumes(14, 2, 5, 6, 7) > 0).to(torch.uint8).to(device)
        bounded = torch.where(organ > 0, case.mask, torch.zeros((), dtype=dtype, device=device))
        results = []
        for mask, within in ((bounded, None), (case.mask, organ), (case.mask, organ.bool())):
            g = case.g.clone().requires_grad_()
            painted = masked_blend(case.x, g, case.texture, mask, organ=within)
            painted.backward(case.grad_out)
            assert g.grad is not None
            results.append((painted.detach(), g.grad))
        for painted, gradient in results[1:]:
            assert same_bits(painted, results[0][0])
            assert torch.equal(gradient, results[0][1])


def test_the_organ_bounds_the_mask(on_cpu: KernelsOnCpu) -> None:
    check_organ_bounds_the_mask(torch.device("cpu"))
    with on_cpu("forward"):
        check_organ_bounds_the_mask(torch.device("cpu"))


@pytest.mark.gpu
def test_gpu_bounds_the_mask_by_the_organ(cuda: torch.device) -> None:
    check_organ_bounds_the_mask(cuda)


def test_threads_change_no_bit() -> None:
    case = case_of(12, (5, 20, 21, 22), torch.float32)
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(masked_blend(*case.inputs))
    torch.set_num_threads(threads)
    assert same_bits(results[0], results[1])
    assert same_bits(results[0], results[2])


def test_a_second_derivative_is_refused() -> None:
    case = case_of(8, (1, 3, 4, 5), torch.float32)
    g = case.g.clone().requires_grad_()
    painted = masked_blend(case.x, g, case.texture, case.mask)
    (gradient,) = torch.autograd.grad(painted.sum(), g, create_graph=True)
    with pytest.raises(KernelInputError, match=r"a second derivative was asked for; want first derivatives only"):
        torch.autograd.grad(gradient.sum(), g)


def test_no_gradient_is_kept_under_no_grad() -> None:
    case = case_of(6, (1, 3, 4, 5), torch.float32)
    g, out = case.g.clone().requires_grad_(), torch.empty_like(case.x)
    with torch.no_grad():
        assert not masked_blend(case.x, g, case.texture, case.mask, out=out).requires_grad


def test_empty_batch_is_returned_empty(on_cpu: KernelsOnCpu) -> None:
    nothing = torch.empty(0, 3, 4, 5)
    assert masked_blend(nothing, nothing, nothing, nothing).shape == nothing.shape
    with on_cpu("forward"):
        assert masked_blend(nothing, nothing, nothing, nothing).shape == nothing.shape


A = torch.zeros(1, 3, 4, 5)
WANTS_GRADIENT = torch.zeros_like(A).requires_grad_()
MEMORY = torch.zeros(61)
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("x of another dtype", {"x": A.half()}, r"masked_blend: x is float16; want float32"),
    ("g of another dtype", {"g": A.double()}, r"g is float64; want float32"),
    ("g of another shape", {"g": A[:, :2]}, r"g has shape \(1, 2, 4, 5\); want \(1, 3, 4, 5\), that of x"),
    ("texture without a batch", {"texture": A[0]}, r"texture has shape \(3, 4, 5\); want four axes"),
    ("texture elsewhere", {"texture": A.to("meta")}, r"texture is on meta; want cpu or cuda"),
    (
        "texture out of order",
        {"texture": A.transpose(1, 3).contiguous().transpose(1, 3)},
        r"Call texture\.contiguous\(\)",
    ),
    ("sign without a direction", {"sign": 0}, r"sign is 0; want -1 \(Eq\. 1\) or 1"),
    ("organ of labels", {"organ": A.long()}, r"organ is int64; want uint8 or bool"),
    ("organ of another shape", {"organ": A[:, :2].byte()}, r"organ has shape \(1, 2, 4, 5\); want \(1, 3, 4, 5\)"),
    ("one box for two samples", {"box": [[0, 0, 0], [1, 1, 1]]}, r"box has shape \(2, 3\); want \(1, 2, 3\)"),
    ("box of floats", {"box": [[[0.0, 0, 0], [1, 1, 1]]]}, r"box holds float64; want integers"),
    ("mask of labels", {"mask": A.to(torch.int64)}, r"mask is int64; want float32 or uint8 or bool"),
    (
        "mask that wants a gradient",
        {"mask": WANTS_GRADIENT},
        r"mask requires a gradient; Eq\. 1 is differentiated in x, g and texture only",
    ),
    (
        "x itself as out with a gradient wanted",
        {"g": WANTS_GRADIENT, "out": A},
        r"out was given but x, g or texture requires a gradient",
    ),
    ("out that wants a gradient", {"out": WANTS_GRADIENT}, r"out requires a gradient"),
    ("out of another dtype", {"out": A.byte()}, r"out is uint8; want float32"),
    (
        "out that overlaps",
        {"g": MEMORY[:60].view(1, 3, 4, 5), "out": MEMORY[1:].view(1, 3, 4, 5)},
        r"out overlaps a part of g",
    ),
]


@pytest.mark.parametrize(("change", "message"), [pytest.param(*row[1:], id=row[0]) for row in REFUSED])
def test_wrong_input_is_refused(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"x": A, "g": A, "texture": A, "mask": A.byte()}
    with pytest.raises(KernelInputError, match=message):
        masked_blend(**(arguments | change))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", MASK_DTYPES)
def test_gpu_equals_reference(cuda: torch.device, dtype: torch.dtype) -> None:
    for seed, contrast in enumerate((0.01, 1.0, 30.0)):
        case = case_of(seed, (2, 17, 18, 19), dtype, contrast=contrast).to(cuda)
        assert_equals_reference(case)
        assert_gradients_equal_reference(case)


@pytest.mark.gpu
def test_gpu_leaves_the_outside_untouched(cuda: torch.device) -> None:
    check_untouched_outside_the_mask(cuda)


@pytest.mark.gpu
def test_gpu_refuses_mixed_devices(cuda: torch.device) -> None:
    with pytest.raises(KernelInputError, match=r"g is on cpu; want cuda:0, like the others"):
        masked_blend(A.to(cuda), A, A.to(cuda), A.to(cuda))


@pytest.mark.gpu
def test_gpu_works_on_the_current_stream_without_a_sync(cuda: torch.device) -> None:
    case = case_of(7, (2, 24, 24, 24), torch.uint8).to(cuda)

    def gradient_of_g(x: torch.Tensor) -> torch.Tensor:
        """Forward and backward; the gradient holds x through the texture."""
        g = case.g.clone().requires_grad_()
        masked_blend(x, g, x, case.mask).backward(case.grad_out)
        assert g.grad is not None
        return g.grad

    for function in (lambda x: masked_blend(x, case.g, case.texture, case.mask), gradient_of_g):
        expected = function(case.x)
        assert same_bits(run_behind_a_late_copy(case.x, function), expected)


@pytest.mark.gpu
def test_gpu_reaches_past_2_to_31_voxels(cuda: torch.device) -> None:
    """One painted voxel, the very last; x, g and texture share memory, so that the test fits."""
    shape = past_2_to_31_voxels(cuda, 4 + 4 + 1)
    x, mask = torch.ones(shape, device=cuda), torch.zeros(shape, dtype=torch.uint8, device=cuda)
    mask[-1, -1, -1, -1] = 1
    painted = masked_blend(x, x, x, mask)
    assert float(painted[-1, -1, -1, -1]) == pytest.approx(1 - np.tanh(1), rel=1e-6)
    painted[-1, -1, -1, -1] = 1
    assert all(torch.equal(a, b) for a, b in zip(painted, x, strict=True))
