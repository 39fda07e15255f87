"""tumor_proportion: exact counts on both paths, and the corner cases of Eq. 4."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from ftengine.errors import KernelInputError
from ftengine.kernels import tumor_proportion
from ftengine.kernels.tumor_proportion_ref import tumor_proportion_ref
from tests.kernels.cuda_cpu import THREAD_ORDERS
from tests.kernels.support import (
    FEW,
    PROPERTY,
    KernelsOnCpu,
    as_array,
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


@pytest.mark.gpu
def test_gpu_reaches_past_2_to_31_voxels(cuda: torch.device) -> None:
    shape = past_2_to_31_voxels(cuda, 2)
    predicted, mask = (torch.zeros(shape, dtype=torch.uint8, device=cuda) for _ in range(2))
    mask[-1, -1, -1, -4:] = 1
    predicted[-1, -1, -1, -1] = 1
    assert tumor_proportion(predicted, mask).tolist() == [0.0, 0.25]
    mask[0] = 1
    assert tumor_proportion(mask, mask).tolist() == [1.0, 1.0]
