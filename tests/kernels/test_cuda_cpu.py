"""The tests' own tool: does running a kernel on the CPU find what it is there to find?"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.kernels.cuda_cpu import THREAD_ORDERS, CpuModule, LaunchError, compiler
from tests.kernels.support import missing

EXAMPLES = Path(__file__).with_name("cuda_cpu_examples.cu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if compiler() is None:
        missing("no g++ on this machine; want it to run CUDA kernels on the CPU. Install g++.")
    return tmp_path_factory.mktemp("examples")


def pointer(array: NDArray[Any]) -> np.uint64:
    return np.uint64(array.ctypes.data)


def mirrored_by(kernel: str, folder: Path, order: str) -> NDArray[np.int32]:
    given, result = np.arange(64, dtype=np.int32), np.full(64, -1, dtype=np.int32)
    CpuModule(EXAMPLES, folder, order=order).get_function(kernel)((1,), (64,), (pointer(result), pointer(given)))
    return result


@pytest.mark.parametrize("order", THREAD_ORDERS)
def test_barrier_makes_every_order_right(folder: Path, order: str) -> None:
    assert np.array_equal(mirrored_by("mirror", folder, order), np.arange(64)[::-1])


def test_missing_barrier_shows_between_two_orders(folder: Path) -> None:
    forward, reverse = (mirrored_by("mirror_without_barrier", folder, order) for order in ("forward", "reverse"))
    assert not np.array_equal(forward, reverse)


def test_divergent_barrier_is_reported_and_the_module_lives_on(folder: Path) -> None:
    module, out = CpuModule(EXAMPLES, folder), np.zeros(64, dtype=np.int32)
    with pytest.raises(LaunchError, match="ended while others wait at a barrier"):
        module.get_function("divergent_barrier")((1,), (64,), (pointer(out),))
    assert np.array_equal(mirrored_by("mirror", folder, "forward"), np.arange(64)[::-1])


def test_overrun_of_dynamic_shared_memory_is_reported(folder: Path) -> None:
    fill, out = CpuModule(EXAMPLES, folder).get_function("fill_shared"), np.zeros(1, dtype=np.float32)
    fill((1,), (1,), (pointer(out), np.int32(8)), shared_mem=32)
    assert out[0] == 7
    with pytest.raises(LaunchError, match="behind its dynamic shared memory"):
        fill((1,), (1,), (pointer(out), np.int32(9)), shared_mem=32)


def test_unwritten_shared_memory_is_nan(folder: Path) -> None:
    out = np.zeros(1, dtype=np.float32)
    CpuModule(EXAMPLES, folder).get_function("read_unwritten")((1,), (1,), (pointer(out),), shared_mem=4)
    assert np.isnan(out[0])


def test_every_index_of_a_three_dimensional_launch_is_met_once(folder: Path) -> None:
    total = np.zeros(1, dtype=np.uint64)
    CpuModule(EXAMPLES, folder, order="shuffled").get_function("sum_of_places")((3, 2, 2), (4, 3, 2), (pointer(total),))
    z, y, x = np.indices((4, 6, 12))
    assert total[0] == (x + 100 * y + 10_000 * z).sum()


@pytest.mark.parametrize("order", THREAD_ORDERS)
def test_largest_value_is_found_by_its_bits(folder: Path, order: str) -> None:
    values = np.random.default_rng(0).random(64, dtype=np.float32)
    bits, out = np.zeros(1, dtype=np.uint32), np.zeros(1, dtype=np.float32)
    CpuModule(EXAMPLES, folder, order=order).get_function("largest")(
        (1,), (64,), (pointer(out), pointer(bits), pointer(values))
    )
    assert out[0] == values.max()
    assert bits[0] == values.view(np.uint32).max()


@pytest.mark.parametrize("order", THREAD_ORDERS)
def test_warps_vote_and_atomics_find_the_range(folder: Path, order: str) -> None:
    """Two whole warps and a part of one; the thread that comes last knows it."""
    values = np.random.default_rng(0).integers(0, 100, 80, dtype=np.int32)
    ballots, ends = np.zeros((80, 2), dtype=np.uint32), np.array([1000, -1, 0, 0])
    CpuModule(EXAMPLES, folder, order=order).get_function("vote_and_range")(
        (1,), (80,), (pointer(ballots), pointer(ends), pointer(values))
    )
    lanes = np.arange(80) % 32
    for column, flags in enumerate((values % 2 != 0, values >= 50)):
        for start in (0, 32, 64):
            warp = slice(start, start + 32)
            assert (ballots[warp, column] == np.sum(flags[warp].astype(np.int64) << lanes[warp])).all()
    last = {"forward": 79, "reverse": 0, "shuffled": int(np.random.default_rng(0).permutation(80)[-1])}[order]
    odd_in_warp = int((values[last // 32 * 32 : last // 32 * 32 + 32] % 2).sum())
    assert ends.tolist() == [values.min(), values.max(), 80, odd_in_warp + 4]


def test_scalars_arrive_in_the_parameters_types(folder: Path) -> None:
    values = np.array([1.0, 0.0, 2.0, 0.0, 3.0])
    CpuModule(EXAMPLES, folder).get_function("scale")(
        (1,), (1,), (pointer(values), np.float64(0.1), np.float32(0.5), np.int32(3), np.int64(2))
    )
    assert np.array_equal(values, [1 * 0.1 + 0.5, 0, 2 * 0.1 + 0.5, 0, 3 * 0.1 + 0.5])


def test_a_struct_arrives_by_value_and_by_its_size(folder: Path) -> None:
    weights = np.zeros((), np.dtype([("count", np.int32), ("of", np.float64, 3)], align=True))
    weights["count"], weights["of"] = 2, [0.5, 0.25, 7]
    out = np.zeros(1)
    weigh = CpuModule(EXAMPLES, folder).get_function("weigh")
    weigh((1,), (1,), (pointer(out), weights[()]))
    assert out[0] == 0.75
    packed = np.zeros((), np.dtype([("count", np.int32), ("of", np.float64, 3)]))
    with pytest.raises(LaunchError, match="argument 1 is V28, the parameter V32"):
        weigh((1,), (1,), (pointer(out), packed[()]))


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        ((np.uint64(0), np.float64(1), np.float32(1), np.int32(1)), "4 arguments for 5 parameters"),
        ((np.uint64(0), 1.0, np.float32(1), np.int32(1), np.int64(1)), "argument 1 is float, the parameter f8"),
        ((np.uint64(0), np.float64(1), np.int32(1), np.int32(1), np.int64(1)), "argument 2 is i4, the parameter f4"),
        ((np.uint64(0), np.float64(1), np.float32(1), np.int64(1), np.int64(1)), "argument 3 is i8, the parameter i4"),
    ],
)
def test_wrong_arguments_are_refused(folder: Path, args: tuple[Any, ...], complaint: str) -> None:
    with pytest.raises(LaunchError, match=complaint):
        CpuModule(EXAMPLES, folder).get_function("scale")((1,), (1,), args)


@pytest.mark.parametrize(("grid", "block", "shared_bytes"), [((0,), (1,), 0), ((1,), (2048,), 0), ((1,), (1,), 50_000)])
def test_launches_that_a_gpu_refuses_are_refused(
    folder: Path, grid: tuple[int], block: tuple[int], shared_bytes: int
) -> None:
    out = np.zeros(1, dtype=np.float32)
    with pytest.raises(LaunchError):
        CpuModule(EXAMPLES, folder).get_function("read_unwritten")(
            grid, block, (pointer(out),), shared_mem=shared_bytes
        )


def test_unknown_kernel_is_named(folder: Path) -> None:
    with pytest.raises(LaunchError, match="no kernel absent; the file has mirror"):
        CpuModule(EXAMPLES, folder).get_function("absent")
