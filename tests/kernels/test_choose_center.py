"""choose_center: both paths against the reference and SciPy, equal draws, and what the borders mean."""

import sys
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import scipy.ndimage as ndi
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from ftengine.errors import KernelInputError
from ftengine.kernels import choose_center
from ftengine.kernels.choose_center_ref import choose_center_ref, eroded_ref
from ftengine.rng import Purpose, patch_rng
from tests.kernels.cuda_cpu import THREAD_ORDERS
from tests.kernels.support import (
    FEW,
    PROPERTY,
    Guarded,
    KernelsOnCpu,
    check_operator,
    compiled,
    past_2_to_31_voxels,
    run_behind_a_late_copy,
)

MODULE = sys.modules["ftengine.kernels.choose_center"]  # the package's name of it is the function
LAST = 1 - 2.0**-53  # the largest draw


@dataclass(frozen=True)
class Case:
    organ: torch.Tensor
    margin: Any
    draws: NDArray[np.float64]

    def chosen(self, *, device: torch.device | None = None) -> NDArray[np.int64]:
        """By the public function, into a buffer whose surroundings stay as they are."""
        out = Guarded((*self.draws.shape, 3), torch.int64, device=device)
        assert choose_center(self.organ.to(device or "cpu"), self.margin, self.draws, out=out.tensor) is out.tensor
        assert out.is_intact()
        return np.asarray(out.tensor.cpu().numpy())

    def wanted(self) -> NDArray[np.int64]:
        margins = np.broadcast_to(np.asarray(self.margin), (len(self.organ), 3))
        return np.array(
            [
                [choose_center_ref(organ, (int(m[0]), int(m[1]), int(m[2])), float(d)) for d in draws]
                for organ, m, draws in zip(self.organ.numpy(), margins, self.draws, strict=True)
            ]
        ).reshape(*self.draws.shape, 3)


def organs_of(seed: int, shape: tuple[int, ...], fraction: float) -> torch.Tensor:
    """Smooth random shapes that fill a fraction of each patch; any value above 0 is organ."""
    rng = np.random.default_rng(seed)
    smooth = ndi.gaussian_filter(rng.random(shape), (0, 1.5, 1.5, 1.5))
    organ = smooth >= np.quantile(smooth, 1 - fraction) if fraction > 0 else np.zeros(shape, dtype=bool)
    return torch.from_numpy(organ * rng.integers(1, 256, shape)).to(torch.uint8)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    shape = tuple(draw(st.integers(1, n)) for n in (3, 9, 12, 80))
    organ = organs_of(draw(st.integers(0, 2**31)), shape, draw(st.sampled_from([0.0, 0.02, 0.5, 0.97, 1.0])))
    margins = st.integers(0, 3) | st.sampled_from([5, 40, 70, 1000])
    rows = draw(st.sampled_from([None, shape[0]]))
    margin = [draw(st.tuples(margins, margins, margins)) for _ in range(rows or 1)]
    number = draw(st.integers(1, 3))
    draws = draw(st.lists(st.floats(0, LAST), min_size=shape[0] * number, max_size=shape[0] * number))
    return Case(
        organ > 0 if draw(st.booleans()) else organ,
        margin[0] if rows is None else np.array(margin),
        np.array(draws).reshape(shape[0], number),
    )


@PROPERTY
@given(case=cases())
def test_cpu_path_equals_reference(case: Case) -> None:
    assert np.array_equal(case.chosen(), case.wanted())


@FEW
@given(case=cases(), tables_on_device=st.booleans())
def test_kernel_equals_reference(on_cpu: KernelsOnCpu, case: Case, tables_on_device: bool) -> None:
    wanted = case.wanted()
    for order in THREAD_ORDERS:
        with on_cpu(order), pytest.MonkeyPatch.context() as patch:
            if tables_on_device:
                patch.setattr(MODULE, "_on_host", lambda _table: False)
            assert np.array_equal(case.chosen(), wanted)


@PROPERTY
@given(case=cases())
def test_reference_erodes_as_scipy_does(case: Case) -> None:
    for organ in case.organ.numpy():
        size = np.minimum(np.asarray(case.margin).reshape(-1, 3)[0], 12)
        by_scipy = ndi.binary_erosion(organ > 0, np.ones(2 * size + 1, dtype=bool), border_value=1)
        assert np.array_equal(eroded_ref(organ, (int(size[0]), int(size[1]), int(size[2]))), by_scipy)


@pytest.mark.parametrize("shape", [(1, 7, 5, 130), (1, 40, 33, 64), (9, 3, 4, 5), (1, 96, 96, 96)])
@pytest.mark.parametrize("margin", [(0, 0, 0), (1, 2, 0), (3, 1, 5), (0, 0, 33)])
def test_larger_patches_by_scipy_and_by_the_kernel(
    on_cpu: KernelsOnCpu, shape: tuple[int, ...], margin: tuple[int, int, int]
) -> None:
    """Many chunks of words, rows of several words; the kernel over the largest only once, g++ being no GPU."""
    case = Case(organs_of(3, shape, 0.8), margin, np.random.default_rng(4).random((shape[0], 4)))
    chosen = case.chosen()
    window = np.ones(2 * np.array(margin) + 1, dtype=bool)
    for organ, centers, draws in zip(case.organ.numpy(), chosen, case.draws, strict=True):
        left = np.argwhere(ndi.binary_erosion(organ > 0, window, border_value=1))
        left = left if len(left) else np.argwhere(organ > 0)
        assert np.array_equal(centers, left[np.floor(draws * len(left)).astype(int)])
    if shape[1] < 96 or margin == (3, 1, 5):
        with on_cpu("shuffled"):
            assert np.array_equal(case.chosen(), chosen)


def test_every_voxel_is_picked_by_its_share_of_the_draws(on_cpu: KernelsOnCpu) -> None:
    organ = torch.zeros(1, 9, 9, 70, dtype=torch.uint8)
    organ[0, 2:7, 2:7, 30:37] = 1
    voxels = [[z, y, x] for z in (3, 4, 5) for y in (3, 4, 5) for x in (31, 32, 33, 34, 35)]
    draws = np.array([[(i + share) / 45 for i in range(45) for share in (1e-9, 0.5, 1 - 1e-9)]])
    for context in (None, "forward"):
        with nullcontext() if context is None else on_cpu(context):
            assert choose_center(organ, (1, 1, 1), draws)[0].tolist() == [v for v in voxels for _ in range(3)]
            assert choose_center(organ, (1, 1, 1), [LAST])[0, 0].tolist() == voxels[-1]


def test_the_patchs_border_counts_as_organ(on_cpu: KernelsOnCpu) -> None:
    """An organ that fills the patch loses nothing, whatever the margin; at one border only the other side counts."""
    everything = torch.ones(1, 3, 5, 70, dtype=torch.uint8)
    touching = everything.clone()
    touching[0, :, :, 40:] = 0
    for context in (None, "forward"):
        with nullcontext() if context is None else on_cpu(context):
            assert choose_center(everything, (9, 9, 99), [[0.0, LAST]]).tolist() == [[[0, 0, 0], [2, 4, 69]]]
            assert choose_center(touching, (9, 9, 6), [[0.0, LAST]]).tolist() == [[[0, 0, 0], [2, 4, 33]]]
            assert choose_center(touching, (0, 0, 40), [[0.0, LAST]]).tolist() == [[[0, 0, 0], [2, 4, 39]]]


def test_thin_organs_use_their_own_voxels_and_none_gives_minus_one(on_cpu: KernelsOnCpu) -> None:
    organ = torch.zeros(2, 5, 5, 5, dtype=torch.uint8)
    organ[0, 2, 2, 1:4] = 7
    for context in (None, "reverse"):
        with nullcontext() if context is None else on_cpu(context):
            chosen = choose_center(organ, (3, 3, 3), [[0.0, 0.4, 0.9]] * 2)
            assert chosen.tolist() == [[[2, 2, 1], [2, 2, 2], [2, 2, 3]], [[-1, -1, -1]] * 3]


@FEW
@given(seed=st.integers(0, 2**63), epoch=st.integers(0, 1000), first=st.integers(0, 10**6))
def test_equal_addresses_give_equal_voxels_on_both_paths(
    on_cpu: KernelsOnCpu, seed: int, epoch: int, first: int
) -> None:
    """The streams of the host decide, whatever the device, the batch around a patch and the way the draws travel."""
    organ = organs_of(6, (3, 10, 11, 40), 0.6)
    draws = np.stack([patch_rng(seed, Purpose.TUMOR, epoch=epoch, index=first + b).random(2) for b in range(3)])
    case = Case(organ, (1, 1, 2), draws)
    chosen = case.chosen()
    for b in range(3):
        assert np.array_equal(Case(organ[b : b + 1], (1, 1, 2), draws[b : b + 1]).chosen()[0], chosen[b])
    with on_cpu("shuffled"):
        assert np.array_equal(case.chosen(), chosen)


def test_draws_on_the_device_are_not_looked_at_but_held_within_the_organ(
    on_cpu: KernelsOnCpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    organ = torch.zeros(1, 3, 3, 40, dtype=torch.uint8)
    organ[0, 1, 1, 10:20] = 1
    draws = torch.tensor([[-1.0, 1.0, 1e30, torch.nan, torch.inf, 0.35]], dtype=torch.float64)
    monkeypatch.setattr(MODULE, "_on_host", lambda _table: False)
    with on_cpu("forward"):
        assert choose_center(organ, (0, 0, 0), draws)[0, :, 2].tolist() == [10, 19, 19, 10, 19, 13]


def test_forms_of_arguments(on_cpu: KernelsOnCpu) -> None:
    organ = organs_of(9, (2, 6, 7, 8), 0.7)
    wanted = choose_center(organ, (1, 0, 1), [0.25, 0.75])
    assert (wanted.dtype, wanted.shape) == (torch.int64, (2, 1, 3))
    for context in (None, "forward"):
        with nullcontext() if context is None else on_cpu(context):
            for margin in (torch.tensor([1, 0, 1]), np.array([[1, 0, 1]] * 2, dtype=np.uint8)):
                for draws in (np.array([[0.25], [0.75]]), torch.tensor([0.25, 0.75])):
                    assert torch.equal(choose_center(organ, margin, draws), wanted)
            assert torch.equal(choose_center(organ > 0, (1, 0, 1), (0.25, 0.75)), wanted)
            assert choose_center(organ[:0], (1, 1, 1), np.empty(0)).shape == (0, 1, 3)
            assert choose_center(organ, (1, 1, 1), np.empty((2, 0))).shape == (2, 0, 3)


def test_threads_change_no_bit() -> None:
    case = Case(organs_of(12, (5, 20, 21, 22), 0.5), (1, 2, 1), np.random.default_rng(1).random((5, 3)))
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(case.chosen())
    torch.set_num_threads(threads)
    assert np.array_equal(results[0], results[1])
    assert np.array_equal(results[0], results[2])


def test_operator_keeps_torchs_rules() -> None:
    organ, draws = organs_of(10, (2, 6, 7, 8), 0.7), torch.tensor([[0.1, 0.9], [0.2, 0.3]], dtype=torch.float64)
    for margin in (torch.tensor([[1, 1, 0]]), torch.tensor([[1, 1, 0], [0, 0, 0]])):
        check_operator(torch.ops.ftengine.choose_center.default, (organ, margin, draws))
        out = torch.empty(2, 2, 3, dtype=torch.int64)
        check_operator(torch.ops.ftengine.choose_center_out.default, (organ, margin, draws, out))


def test_compiled_in_one_graph_it_gives_the_same() -> None:
    organ, margin = organs_of(11, (2, 6, 7, 8), 0.7), torch.tensor([1, 1, 0])
    draws = torch.tensor([0.1, 0.9], dtype=torch.float64)
    wanted, out = choose_center(organ, margin, draws), torch.zeros(2, 1, 3, dtype=torch.int64)
    function = compiled(lambda o, m, d, **k: choose_center(o > 0, m, d, **k) + 0)
    assert torch.equal(function(organ, margin, draws), wanted)
    assert torch.equal(function(organ, margin, draws, out=out), wanted)
    assert torch.equal(out, wanted)


ORGAN = torch.ones(2, 4, 5, 6, dtype=torch.uint8)
MEMORY = torch.ones(240, dtype=torch.uint8)
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("organ of another dtype", {"organ": ORGAN.float()}, r"choose_center: organ is float32; want uint8 or bool"),
    ("organ without a batch", {"organ": ORGAN[0]}, r"organ has shape \(4, 5, 6\); want four axes"),
    ("organ elsewhere", {"organ": ORGAN.to("meta")}, r"organ is on meta; want cpu or cuda"),
    (
        "organ out of order",
        {"organ": ORGAN.transpose(1, 3).contiguous().transpose(1, 3)},
        r"Call organ\.contiguous\(\)",
    ),
    ("margin in millimetres", {"margin_vox_zyx": (1.5, 1, 1)}, r"margin_vox_zyx holds float64; want integers"),
    ("one margin", {"margin_vox_zyx": 3}, r"margin_vox_zyx has shape \(\); want three integers"),
    ("margins of another batch", {"margin_vox_zyx": [(1, 1, 1)] * 3}, r"margin_vox_zyx has shape \(3, 3\); want"),
    ("negative margin", {"margin_vox_zyx": (1, -1, 1)}, r"margin_vox_zyx holds -1; want 0 or more voxels"),
    (
        "margin elsewhere",
        {"margin_vox_zyx": torch.ones(3, device="meta")},
        r"margin_vox_zyx is on meta; want it on the",
    ),
    ("a single draw", {"draws": 0.5}, r"draws has shape \(\); want \(2,\) or \(2, N\)"),
    ("draws of another batch", {"draws": [0.1, 0.2, 0.3]}, r"draws has shape \(3,\); want \(2,\) or \(2, N\)"),
    ("a draw of 1", {"draws": [0.5, 1.0]}, r"draws holds a number outside \[0, 1\)"),
    ("a negative draw", {"draws": torch.tensor([0.5, -0.1])}, r"draws holds a number outside \[0, 1\)"),
    ("a draw that is NaN", {"draws": torch.tensor([0.5, torch.nan])}, r"draws holds a number outside \[0, 1\) or NaN"),
    ("draws elsewhere", {"draws": torch.ones(2, device="meta")}, r"draws is on meta; want cpu"),
    ("out of another dtype", {"out": torch.zeros(2, 1, 3)}, r"out is torch\.float32 of shape \(2, 1, 3\) on cpu; want"),
    ("out of another shape", {"out": torch.zeros(2, 3, dtype=torch.int64)}, r"want torch\.int64 of shape \(2, 1, 3\)"),
    (
        "out in the organ's memory",
        {"organ": MEMORY.view(2, 4, 5, 6), "out": MEMORY[:48].view(torch.int64).view(2, 1, 3)},
        r"out shares memory with organ",
    ),
]


@pytest.mark.parametrize(("change", "message"), [pytest.param(*row[1:], id=row[0]) for row in REFUSED])
def test_wrong_input_is_refused(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"organ": ORGAN, "margin_vox_zyx": (1, 1, 1), "draws": [0.5, 0.5]}
    with pytest.raises(KernelInputError, match=message):
        choose_center(**(arguments | change))


def test_out_of_another_memory_order_is_refused() -> None:
    out = torch.zeros(3, 1, 2, dtype=torch.int64).transpose(0, 2)
    with pytest.raises(KernelInputError, match=r"Call out\.contiguous\(\)"):
        choose_center(ORGAN, (1, 1, 1), [0.5, 0.5], out=out)


@pytest.mark.gpu
@PROPERTY
@given(case=cases())
def test_gpu_equals_cpu_path(cuda: torch.device, case: Case) -> None:
    wanted = case.chosen()
    assert np.array_equal(case.chosen(device=cuda), wanted)
    on_device = choose_center(case.organ.to(cuda), case.margin, torch.from_numpy(case.draws).to(cuda))
    assert np.array_equal(on_device.cpu().numpy(), wanted)


@pytest.mark.gpu
def test_gpu_works_on_the_current_stream_without_a_sync(cuda: torch.device) -> None:
    case = Case(organs_of(7, (2, 24, 25, 26), 0.7), [(1, 2, 3)] * 2, np.array([[0.3, 0.9], [0.1, 0.5]]))
    wanted = case.chosen()
    late = run_behind_a_late_copy(case.organ.to(cuda), lambda organ: choose_center(organ, case.margin, case.draws))
    assert np.array_equal(late.cpu().numpy(), wanted)


@pytest.mark.gpu
def test_gpu_graph_picks_anew_at_each_replay(cuda: torch.device) -> None:
    case = Case(organs_of(7, (2, 24, 25, 26), 0.7), (1, 2, 3), np.array([[0.3, 0.9], [0.1, 0.5]]))
    organ, draws = case.organ.to(cuda), torch.from_numpy(case.draws).to(cuda)
    out = torch.zeros(2, 2, 3, dtype=torch.int64, device=cuda)
    choose_center(organ, case.margin, draws, out=out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        choose_center(organ, case.margin, draws, out=out)
    for other in (case.draws, 1 - case.draws):
        draws.copy_(torch.from_numpy(other))
        graph.replay()
        assert np.array_equal(out.cpu().numpy(), replace(case, draws=other).chosen())


@pytest.mark.gpu
def test_gpu_reaches_past_2_to_31_voxels(cuda: torch.device) -> None:
    """An organ in the last corner of the batch."""
    shape = past_2_to_31_voxels(cuda, 2)
    organ = torch.zeros(shape, dtype=torch.uint8, device=cuda)
    organ[-1, -8:, -8:, -8:] = 1
    chosen = choose_center(organ, (3, 3, 3), [[0.0, LAST]] * 2).tolist()
    assert chosen == [[[-1, -1, -1]] * 2, [[n - 5 for n in shape[1:]], [n - 1 for n in shape[1:]]]]
