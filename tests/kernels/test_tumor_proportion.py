"""tumor_proportion: exact counts on both paths, from predictions and from logits, and the corner cases of Eq. 4."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from ftengine.errors import KernelInputError
from ftengine.kernels import tumor_proportion
from ftengine.kernels.tumor_proportion_ref import tumor_proportion_of_logits_ref, tumor_proportion_ref
from tests.kernels.cuda_cpu import THREAD_ORDERS
from tests.kernels.support import (
    FEW,
    PROPERTY,
    Guarded,
    KernelsOnCpu,
    as_array,
    check_operator,
    compiled,
    past_2_to_31_voxels,
    run_behind_a_late_copy,
    same_bits,
)

PREDICTED_DTYPES = (torch.bool, torch.uint8)
MASK_DTYPES = (torch.uint8, torch.bool, torch.float32)
Pair = tuple[torch.Tensor, torch.Tensor]


def pair_of(
    seed: int, shape: tuple[int, ...], predicted_dtype: torch.dtype, mask_dtype: torch.dtype, *, fraction: float = 0.5
) -> Pair:
    """Predictions in half of the voxels, of label 2 too where the dtype holds it; a tumour in a share, also soft."""
    rng = np.random.default_rng(seed)
    predicted = rng.integers(0, 2 if predicted_dtype == torch.bool else 3, shape)
    mask = np.where(rng.random(shape) < fraction, 1.0, np.where(rng.random(shape) < 0.3, 0.5, 0.0))
    if mask_dtype != torch.float32:
        mask = np.floor(mask)
    return torch.from_numpy(predicted).to(predicted_dtype), torch.from_numpy(mask).to(mask_dtype)


@st.composite
def pairs(draw: st.DrawFn) -> Pair:
    shape = tuple(draw(st.integers(1, n)) for n in (4, 6, 7, 12))
    dtypes = draw(st.sampled_from(PREDICTED_DTYPES)), draw(st.sampled_from(MASK_DTYPES))
    return pair_of(
        draw(st.integers(0, 2**32 - 1)), shape, *dtypes, fraction=draw(st.sampled_from([0.0, 0.02, 0.5, 1.0]))
    )


def rounded(proportions: NDArray[np.float64]) -> NDArray[np.float64]:
    """What float32 makes of the exact quotient: the only rounding there is."""
    return proportions.astype(np.float32).astype(np.float64)


def assert_equals_reference(predicted: torch.Tensor, mask: torch.Tensor) -> None:
    found = tumor_proportion(predicted, mask)
    assert (found.dtype, found.shape, found.device) == (torch.float32, (len(predicted),), predicted.device)
    assert np.array_equal(as_array(found), rounded(tumor_proportion_ref(predicted.cpu(), mask.cpu())))


@PROPERTY
@given(pair=pairs())
def test_cpu_path_equals_reference(pair: Pair) -> None:
    assert_equals_reference(*pair)


@FEW
@given(pair=pairs())
def test_kernel_equals_reference_in_every_thread_order(on_cpu: KernelsOnCpu, pair: Pair) -> None:
    for order in THREAD_ORDERS:
        with on_cpu(order):
            assert_equals_reference(*pair)


def test_kernel_sums_over_several_blocks(on_cpu: KernelsOnCpu) -> None:
    """More than the 8,192 voxels of a block in each sample."""
    predicted, mask = pair_of(1, (2, 20, 30, 33), torch.uint8, torch.float32)
    with on_cpu("reverse"):
        assert_equals_reference(predicted, mask)


@PROPERTY
@given(pair=pairs())
def test_proportion_is_between_its_bounds(pair: Pair) -> None:
    predicted, mask = pair
    proportion = tumor_proportion(predicted, mask)
    assert bool(((proportion >= 0) & (proportion <= 1)).all())
    everything, nothing = torch.ones_like(predicted), torch.zeros_like(predicted)
    has_tumor = (mask == 1).flatten(1).any(dim=1)
    assert torch.equal(tumor_proportion(everything, mask), has_tumor.float())
    assert not tumor_proportion(nothing, mask).any()
    complement = (predicted != 1).to(predicted.dtype)
    both = tumor_proportion(predicted, mask).double() + tumor_proportion(complement, mask).double()
    assert (
        float((both - has_tumor.double()).abs().max()) <= 2 * 2.0**-25
    )  # two roundings of at most half an ulp of 1/2..1


def test_empty_mask_gives_zero(on_cpu: KernelsOnCpu) -> None:
    predicted, mask = torch.ones(2, 3, 4, 5, dtype=torch.bool), torch.zeros(2, 3, 4, 5, dtype=torch.uint8)
    mask[1, 0, 0, 0] = 1
    assert tumor_proportion(predicted, mask).tolist() == [0.0, 1.0]
    with on_cpu("forward"):
        assert tumor_proportion(predicted, mask).tolist() == [0.0, 1.0]


def test_soft_voxels_and_other_labels_do_not_count(on_cpu: KernelsOnCpu) -> None:
    mask = torch.tensor([1.0, 1.0, 0.999, 0.5, 2.0, float("nan")]).view(1, 1, 1, 6)
    predicted = torch.tensor([1, 2, 1, 1, 1, 1], dtype=torch.uint8).view(1, 1, 1, 6)
    assert tumor_proportion(predicted, mask).tolist() == [0.5]
    with on_cpu("forward"):
        assert tumor_proportion(predicted, mask).tolist() == [0.5]


def test_empty_batch_gives_nothing(on_cpu: KernelsOnCpu) -> None:
    nothing = torch.empty(0, 3, 4, 5, dtype=torch.uint8)
    assert tumor_proportion(nothing, nothing).shape == (0,)
    with on_cpu("forward"):
        assert tumor_proportion(nothing, nothing).shape == (0,)


LOGIT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
SPECIAL = (float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 6e-8, -6e-8)  # 6e-8 is subnormal in float16


@dataclass(frozen=True)
class LogitCase:
    """Logits with ties and special values, a mask, and which classes are tumours: as a table, and as a call gives them."""

    logits: torch.Tensor
    mask: torch.Tensor
    is_tumor: NDArray[np.bool_]
    tumor_classes: Any

    def to(self, device: torch.device) -> "LogitCase":
        return LogitCase(self.logits.to(device), self.mask.to(device), self.is_tumor, self.tumor_classes)


def logit_case_of(
    seed: int,
    shape: tuple[int, int, int, int],
    num_classes: int,
    dtype: torch.dtype,
    mask_dtype: torch.dtype,
    *,
    form: str = "table",
    fraction: float = 0.5,
) -> LogitCase:
    rng = np.random.default_rng(seed)
    batch, *zyx = shape
    logits = rng.normal(0, 2, (batch, num_classes, *zyx))
    tied = rng.random(shape) < 0.3  # whole numbers: several classes share the largest
    logits = np.where(tied[:, None], np.round(logits), logits)
    logits = np.where(rng.random(logits.shape) < 0.1, rng.choice(SPECIAL, logits.shape), logits)
    mask = pair_of(seed, shape, torch.uint8, mask_dtype, fraction=fraction)[1]
    is_tumor = np.zeros((batch, num_classes), dtype=np.bool_)
    tumor_classes: Any
    if form == "all":
        tumor_classes = sorted({int(c) for c in rng.integers(0, num_classes, 3)})
        is_tumor[:, tumor_classes] = True
    elif form == "one each":
        tumor_classes = rng.integers(0, num_classes, batch)
        is_tumor[np.arange(batch), tumor_classes] = True
    else:
        is_tumor = rng.random((batch, num_classes)) < 0.4
        is_tumor[np.arange(batch), rng.integers(0, num_classes, batch)] = True
        tumor_classes = torch.from_numpy(is_tumor)
    return LogitCase(torch.from_numpy(logits).to(dtype), mask, is_tumor, tumor_classes)


@st.composite
def logit_cases(draw: st.DrawFn) -> LogitCase:
    z, y, x = (draw(st.integers(1, n)) for n in (6, 7, 12))
    return logit_case_of(
        draw(st.integers(0, 2**32 - 1)),
        (draw(st.integers(1, 9)), z, y, x),
        draw(st.integers(1, 8)),
        draw(st.sampled_from(LOGIT_DTYPES)),
        draw(st.sampled_from(MASK_DTYPES)),
        form=draw(st.sampled_from(["all", "one each", "table"])),
        fraction=draw(st.sampled_from([0.0, 0.02, 0.5, 1.0])),
    )


def assert_logits_equal_reference(case: LogitCase) -> None:
    """Bit for bit; the reference takes numpy.argmax, and torch.argmax must agree with both."""
    out = Guarded((len(case.logits),), torch.float32, device=case.logits.device)
    found = tumor_proportion(case.logits, case.mask, tumor_classes=case.tumor_classes, out=out.tensor)
    assert found is out.tensor
    assert out.is_intact()
    classes = [np.flatnonzero(row) for row in case.is_tumor]
    wanted = tumor_proportion_of_logits_ref(as_array(case.logits), case.mask.cpu(), classes)
    assert np.array_equal(as_array(found), rounded(wanted))
    most_probable = case.logits.argmax(1)
    sample = torch.arange(len(case.logits), device=case.logits.device).view(-1, 1, 1, 1)
    predicted = torch.from_numpy(case.is_tumor).to(case.logits.device)[sample, most_probable]
    assert same_bits(found, tumor_proportion(predicted, case.mask))
    assert same_bits(found, tumor_proportion(case.logits, case.mask, tumor_classes=case.tumor_classes))


@PROPERTY
@given(case=logit_cases())
def test_cpu_path_of_logits_equals_reference_and_torch(case: LogitCase) -> None:
    assert_logits_equal_reference(case)


@FEW
@given(case=logit_cases())
def test_kernel_of_logits_equals_reference_in_every_thread_order(on_cpu: KernelsOnCpu, case: LogitCase) -> None:
    for order in THREAD_ORDERS:
        with on_cpu(order):
            assert_logits_equal_reference(case)


@pytest.mark.parametrize("shape", [(2, 1, 130, 129), (1, 130, 1, 67), (9, 3, 5, 7), (2, 20, 30, 33)])
@pytest.mark.parametrize("dtype", LOGIT_DTYPES)
def test_larger_logits_equal_reference(
    on_cpu: KernelsOnCpu, dtype: torch.dtype, shape: tuple[int, int, int, int]
) -> None:
    """The last shape is more than the 8,192 voxels of a block in each sample."""
    case = logit_case_of(4, shape, 5, dtype, torch.float32)
    assert_logits_equal_reference(case)
    with on_cpu("reverse"):
        assert_logits_equal_reference(case)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_half_is_ordered_as_torch_orders_it(on_cpu: KernelsOnCpu, dtype: torch.dtype) -> None:
    """All 65,536 patterns of bits, NaN and subnormal numbers among them, against each of a few."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    for value in (*SPECIAL, 1.0, -2.5):
        logits = torch.stack((torch.full_like(every, value), every)).view(1, 2, 1, 256, 256)
        mask = torch.ones(1, 1, 256, 256, dtype=torch.uint8)
        wanted = tumor_proportion(logits.argmax(1).bool(), mask)
        assert same_bits(tumor_proportion(logits, mask, tumor_classes=[1]), wanted)
        with on_cpu("forward"):
            assert same_bits(tumor_proportion(logits, mask, tumor_classes=[1]), wanted)


def test_lowest_class_wins_ties_and_nan_is_the_largest(on_cpu: KernelsOnCpu) -> None:
    nan = float("nan")
    rows = [[1.0, 1.0, 0.0], [0.0, -0.0, -1.0], [5.0, nan, 9.0], [nan, nan, 0.0], [float("inf"), 0.0, nan]]
    mask = torch.ones(1, 1, 1, len(rows), dtype=torch.uint8)
    for dtype in LOGIT_DTYPES:
        logits = torch.tensor(rows, dtype=dtype).T.reshape(1, 3, 1, 1, len(rows)).contiguous()
        for share, tumor_class in ((0.6, 0), (0.2, 1), (0.2, 2)):
            wanted = [float(np.float32(share))]
            assert tumor_proportion(logits, mask, tumor_classes=[tumor_class]).tolist() == wanted
            with on_cpu("forward"):
                assert tumor_proportion(logits, mask, tumor_classes={tumor_class}).tolist() == wanted


@PROPERTY
@given(case=logit_cases())
def test_every_class_together_is_everything_and_what_lies_outside_is_not_read(case: LogitCase) -> None:
    num_classes = case.logits.shape[1]
    has_tumor = (case.mask == 1).flatten(1).any(dim=1).float()
    assert torch.equal(tumor_proportion(case.logits, case.mask, tumor_classes=range(num_classes)), has_tumor)
    elsewhere = case.logits.clone()
    elsewhere.movedim(1, -1)[case.mask != 1] = float("nan")
    a, b = (tumor_proportion(t, case.mask, tumor_classes=case.tumor_classes) for t in (case.logits, elsewhere))
    assert same_bits(a, b)


def test_forms_of_the_same_classes_give_the_same(on_cpu: KernelsOnCpu) -> None:
    case = logit_case_of(5, (2, 4, 5, 6), 4, torch.float32, torch.uint8)
    table = torch.tensor([[False, True, False, True]] * 2)
    for forms in (
        ([1, 3], (3, 1), {1, 3}, range(1, 4, 2), [np.int64(1), np.int32(3)], table, table.numpy()),
        ([2], np.array([2, 2]), torch.tensor([2, 2], dtype=torch.uint8), torch.tensor([[2, 0], [2, 0]])[:, 0]),
    ):
        results = [tumor_proportion(case.logits, case.mask, tumor_classes=form) for form in forms]
        with on_cpu("forward"):
            results += [tumor_proportion(case.logits, case.mask, tumor_classes=form) for form in forms]
        assert all(same_bits(result, results[0]) for result in results)


def test_samples_do_not_depend_on_their_batch_nor_on_threads() -> None:
    case = logit_case_of(6, (5, 9, 10, 11), 3, torch.float32, torch.uint8)
    together = tumor_proportion(case.logits, case.mask, tumor_classes=case.tumor_classes)
    for b in range(5):
        part = slice(b, b + 1)
        alone = tumor_proportion(case.logits[part], case.mask[part], tumor_classes=case.tumor_classes[part])
        assert same_bits(alone, together[part])
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            again = tumor_proportion(case.logits, case.mask, tumor_classes=case.tumor_classes)
            assert same_bits(again, together)
    finally:
        torch.set_num_threads(threads)


def test_nothing_is_differentiated() -> None:
    case = logit_case_of(7, (2, 3, 4, 5), 3, torch.float32, torch.float32)
    logits, mask = case.logits.clone().requires_grad_(), case.mask.clone().requires_grad_()
    assert not tumor_proportion(logits, mask, tumor_classes=[1]).requires_grad
    assert not tumor_proportion(case.mask == 1, mask).requires_grad


def test_empty_batch_of_logits_gives_nothing(on_cpu: KernelsOnCpu) -> None:
    logits, mask = torch.empty(0, 3, 2, 4, 5), torch.empty(0, 2, 4, 5)
    for classes in ([1], torch.empty(0, dtype=torch.int64), torch.empty(0, 3, dtype=torch.bool)):
        assert tumor_proportion(logits, mask, tumor_classes=classes).shape == (0,)
        with on_cpu("forward"):
            assert tumor_proportion(logits, mask, tumor_classes=classes).shape == (0,)
    thin = torch.empty(2, 3, 2, 0, 5)
    assert tumor_proportion(thin, thin[:, 0].contiguous(), tumor_classes=[1]).tolist() == [0.0, 0.0]
    with on_cpu("forward"):
        assert tumor_proportion(thin, thin[:, 0].contiguous(), tumor_classes=[1]).tolist() == [0.0, 0.0]


def test_operators_keep_torchs_rules() -> None:
    case = logit_case_of(8, (2, 3, 4, 5), 3, torch.float32, torch.uint8)
    out = torch.empty(2)
    for classes in (torch.tensor([[1, 2]]), torch.tensor([[1], [2]]), torch.from_numpy(case.is_tumor)):
        check_operator(torch.ops.ftengine.tumor_proportion.default, (case.logits, case.mask, classes))
        check_operator(torch.ops.ftengine.tumor_proportion_out.default, (case.logits, case.mask, classes, out))
    predicted = case.logits[:, 0] > 0
    check_operator(torch.ops.ftengine.tumor_proportion.default, (predicted, case.mask, None))
    check_operator(torch.ops.ftengine.tumor_proportion_out.default, (predicted, case.mask, None, out))


def test_compiled_in_one_graph_it_gives_the_same() -> None:
    case = logit_case_of(9, (2, 3, 4, 5), 3, torch.bfloat16, torch.uint8)
    for classes in ([0, 2], torch.tensor([1, 2]), torch.from_numpy(case.is_tumor)):
        wanted = tumor_proportion(case.logits * 2, case.mask, tumor_classes=classes) * 3
        found = compiled(lambda logits, c: tumor_proportion(logits * 2, case.mask, tumor_classes=c) * 3)(
            case.logits, classes
        )
        assert same_bits(found, wanted)
    out = torch.empty(2)
    compiled(lambda mask: tumor_proportion(mask == 1, mask, out=out))(case.mask)
    assert same_bits(out, tumor_proportion(case.mask == 1, case.mask))


U = torch.zeros(2, 3, 4, 5, dtype=torch.uint8)
REFUSED: list[tuple[str, Any, Any, str]] = [
    ("probabilities", U.float(), U, r"tumor_proportion: predicted is float32; want uint8 or bool"),
    ("labels of 64 bit", U.long(), U, r"predicted is int64; want uint8 or bool"),
    ("mask of 64 bit", U, U.double(), r"mask is float64; want uint8 or bool or float32"),
    ("mask of one sample", U, U[:1], r"mask has shape \(1, 3, 4, 5\); want \(2, 3, 4, 5\), that of predicted"),
    ("channel axis", U[:, None], U, r"predicted has shape \(2, 1, 3, 4, 5\); want four axes.* predicted\[:, 0\]"),
    ("mask elsewhere", U, U.to("meta"), r"mask is on meta; want cpu or cuda"),
    ("out of order", U.transpose(1, 3), U, r"Call predicted\.contiguous\(\)"),
    ("an array", U.numpy(), U, r"predicted is a ndarray; want a torch tensor"),
]


@pytest.mark.parametrize(("predicted", "mask", "message"), [pytest.param(*row[1:], id=row[0]) for row in REFUSED])
def test_wrong_input_is_refused(predicted: Any, mask: Any, message: str) -> None:
    with pytest.raises(KernelInputError, match=message):
        tumor_proportion(predicted, mask)


L = torch.zeros(2, 4, 3, 4, 5)
MEMORY = torch.zeros(2, 3, 4, 5)
REFUSED_LOGITS: list[tuple[str, dict[str, Any], str]] = [
    ("no classes named", {"tumor_classes": None}, r"predicted is float32; want uint8 or bool, or logits with"),
    ("a prediction with classes", {"predicted": U}, r"logits is uint8; want float32 or float16 or bfloat16 or float64"),
    ("logits without a class axis", {"predicted": L[:, 0]}, r"logits has shape .*; want five axes, batch class z y x"),
    ("logits of no class", {"predicted": L[:, :0]}, r"logits has shape \(2, 0, 3, 4, 5\), no class; want at least one"),
    ("logits out of order", {"predicted": L.transpose(2, 4)}, r"Call logits\.contiguous\(\)"),
    ("logits elsewhere", {"predicted": L.to("meta")}, r"logits is on meta; want cpu or cuda"),
    (
        "mask of another shape",
        {"mask": U[:, :2]},
        r"mask has shape .*; want \(2, 3, 4, 5\), that of one class of logits",
    ),
    ("mask of 64 bit", {"mask": U.long()}, r"mask is int64; want uint8 or bool or float32"),
    ("no class", {"tumor_classes": []}, r"tumor_classes is empty; want at least one class"),
    ("a bare class", {"tumor_classes": 2}, r"tumor_classes is 2; want class indices, such as \[2, 4\]"),
    ("a list of bool", {"tumor_classes": [True, False]}, r"tumor_classes is \[True, False\]; want class indices"),
    ("a class and a half", {"tumor_classes": [1.5]}, r"tumor_classes is \[1\.5\]; want class indices"),
    ("a class too high", {"tumor_classes": [1, 4]}, r"tumor_classes holds 4; want 0 to 3, the classes of the logits"),
    ("a class below 0", {"tumor_classes": torch.tensor([-1, 2])}, r"tumor_classes holds -1; want 0 to 3"),
    ("floats in an array", {"tumor_classes": np.ones(2)}, r"tumor_classes holds float64; want integers or bool"),
    ("floats in a tensor", {"tumor_classes": torch.ones(2)}, r"tumor_classes is float32; want int64 or bool"),
    ("three for two samples", {"tumor_classes": np.array([1, 2, 3])}, r"shape \(3,\); want \(2,\), one class a sample"),
    ("a table too wide", {"tumor_classes": np.ones((2, 5), bool)}, r"shape \(2, 5\); want \(2, 4\), a sample, a class"),
    ("classes elsewhere", {"tumor_classes": torch.ones(2, 4).bool().to("meta")}, r"is on meta; want the host or cpu"),
    ("one each elsewhere", {"tumor_classes": torch.ones(2).long().to("meta")}, r"is on meta; want the host, where"),
    (
        "a sample without a class",
        {"tumor_classes": torch.tensor([[True] * 4, [False] * 4])},
        r"tumor_classes has no class for sample 1; want at least one",
    ),
    ("out of another length", {"out": torch.empty(3)}, r"out has shape \(3,\); want \(2,\), batch"),
    ("out of another dtype", {"out": torch.empty(2).double()}, r"out is float64; want float32"),
    ("out with axes", {"out": torch.empty(2, 1)}, r"out has shape \(2, 1\); want one axis, batch"),
    ("out that wants a gradient", {"out": torch.empty(2).requires_grad_()}, r"out requires a gradient"),
    ("out on the mask", {"mask": MEMORY, "out": MEMORY.view(-1)[4:6]}, r"out shares memory with mask"),
    ("out on the logits", {"out": L.view(-1)[4:6]}, r"out shares memory with logits"),
]


@pytest.mark.parametrize(("change", "message"), [pytest.param(*row[1:], id=row[0]) for row in REFUSED_LOGITS])
def test_wrong_input_with_logits_is_refused(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"predicted": L, "mask": U, "tumor_classes": [2]}
    with pytest.raises(KernelInputError, match=message):
        tumor_proportion(**(arguments | change))


@pytest.mark.gpu
@pytest.mark.parametrize("predicted_dtype", PREDICTED_DTYPES)
@pytest.mark.parametrize("mask_dtype", MASK_DTYPES)
def test_gpu_equals_reference(cuda: torch.device, predicted_dtype: torch.dtype, mask_dtype: torch.dtype) -> None:
    for shape in ((3, 17, 31, 29), (1, 1, 1, 1)):
        predicted, mask = pair_of(2, shape, predicted_dtype, mask_dtype)
        assert_equals_reference(predicted.to(cuda), mask.to(cuda))
    nothing = torch.zeros(2, 3, 4, 5, device=cuda)
    assert tumor_proportion(nothing.bool(), nothing.to(mask_dtype)).tolist() == [0.0, 0.0]


@pytest.mark.gpu
def test_gpu_works_on_the_current_stream_without_a_sync(cuda: torch.device) -> None:
    predicted, mask = (t.to(cuda) for t in pair_of(3, (2, 24, 24, 24), torch.uint8, torch.uint8))
    expected = tumor_proportion(predicted, mask)
    assert same_bits(run_behind_a_late_copy(predicted, lambda late: tumor_proportion(late, mask)), expected)
    case = logit_case_of(3, (2, 24, 24, 24), 4, torch.float32, torch.uint8, form="one each").to(cuda)

    def of_logits(late: torch.Tensor) -> torch.Tensor:
        return tumor_proportion(late, case.mask, tumor_classes=case.tumor_classes)

    assert same_bits(run_behind_a_late_copy(case.logits, of_logits), of_logits(case.logits))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", LOGIT_DTYPES)
@pytest.mark.parametrize("mask_dtype", MASK_DTYPES)
def test_gpu_of_logits_equals_reference(cuda: torch.device, dtype: torch.dtype, mask_dtype: torch.dtype) -> None:
    for form in ("all", "one each", "table"):
        case = logit_case_of(2, (3, 17, 31, 29), 5, dtype, mask_dtype, form=form).to(cuda)
        assert_logits_equal_reference(case)
        by_table = tumor_proportion(case.logits, case.mask, tumor_classes=torch.from_numpy(case.is_tumor).to(cuda))
        assert same_bits(by_table, tumor_proportion(case.logits, case.mask, tumor_classes=case.tumor_classes))


@pytest.mark.gpu
def test_gpu_is_captured_in_a_graph(cuda: torch.device) -> None:
    case = logit_case_of(10, (2, 12, 13, 14), 4, torch.float16, torch.uint8).to(cuda)
    logits, table, out = torch.zeros_like(case.logits), case.tumor_classes.to(cuda), torch.empty(2, device=cuda)
    tumor_proportion(logits, case.mask, tumor_classes=table, out=out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tumor_proportion(logits, case.mask, tumor_classes=table, out=out)
    logits.copy_(case.logits)
    graph.replay()
    assert same_bits(out, tumor_proportion(case.logits, case.mask, tumor_classes=case.tumor_classes))


@pytest.mark.gpu
def test_gpu_of_logits_reaches_past_2_to_31_voxels(cuda: torch.device) -> None:
    """The last voxel of the last class decides; two classes of one sample pass 2^31 values."""
    batch, *zyx = past_2_to_31_voxels(cuda, 5)
    logits = torch.zeros((1, batch, *zyx), dtype=torch.float16, device=cuda)
    mask = torch.zeros((1, *zyx), dtype=torch.uint8, device=cuda)
    mask[0, -1, -1, -4:] = 1
    logits[0, 1, -1, -1, -1] = 1
    assert tumor_proportion(logits, mask, tumor_classes=[1]).tolist() == [0.25]


@pytest.mark.gpu
def test_gpu_reaches_past_2_to_31_voxels(cuda: torch.device) -> None:
    shape = past_2_to_31_voxels(cuda, 2)
    predicted, mask = (torch.zeros(shape, dtype=torch.uint8, device=cuda) for _ in range(2))
    mask[-1, -1, -1, -4:] = 1
    predicted[-1, -1, -1, -1] = 1
    assert tumor_proportion(predicted, mask).tolist() == [0.0, 0.25]
    mask[0] = 1
    assert tumor_proportion(mask, mask).tolist() == [1.0, 1.0]
