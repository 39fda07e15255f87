"""Samples are divided among threads completely, evenly by cost, and errors come back."""

import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from ftengine.kernels._threads import for_each, for_shares
from tests.kernels.support import PROPERTY


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@PROPERTY
@given(cost=st.lists(st.floats(0, 1e6), max_size=20), count=st.integers(1, 4))
def test_every_sample_is_in_exactly_one_share(cost: list[float], count: int) -> None:
    torch.set_num_threads(count)
    shares: list[NDArray[np.int64]] = []
    lock = threading.Lock()

    def take(share: NDArray[np.int64]) -> None:
        with lock:
            shares.append(share)

    for_shares(cost, take)
    assert sorted(int(i) for share in shares for i in share) == list(range(len(cost)))
    assert len(shares) <= max(1, min(count, len(cost)))
    assert all((np.diff(share) > 0).all() for share in shares)
    loads = [sum(cost[i] for i in share) for share in shares]
    assert max(loads, default=0) <= sum(cost) / max(1, min(count, len(cost))) + max(cost, default=0) + 1e-3


def test_samples_of_equal_cost_are_divided_evenly() -> None:
    torch.set_num_threads(2)
    sizes: list[int] = []
    for_shares([1.0] * 6, lambda share: sizes.append(len(share)))
    assert sorted(sizes) == [3, 3]


@pytest.mark.parametrize("bad", [0, 1])
def test_an_error_of_any_thread_is_raised(bad: int) -> None:
    torch.set_num_threads(2)

    def fail_at(share: NDArray[np.int64]) -> None:
        if bad in share:
            raise ValueError(f"sample {bad}")

    with pytest.raises(ValueError, match=f"sample {bad}"):
        for_shares([1.0, 1.0], fail_at)
    with pytest.raises(ValueError, match=f"sample {bad}"):
        for_each(2, lambda i: fail_at(np.array([i])))
