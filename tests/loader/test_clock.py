"""Busy seconds of the loader's parts, and their ranges in a profile."""

import threading
import time
from collections.abc import Iterator

import pytest
import torch

from ftengine.loader import nvtx
from ftengine.loader.nvtx import nvtx_range
from ftengine.loader.stages import BusyClock


@pytest.fixture
def ranges(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, str]]]:
    """What a profiler would be told on a machine with a GPU: (thread, "+name") and (thread, "-")."""
    told: list[tuple[int, str]] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", lambda name: told.append((threading.get_ident(), f"+{name}")))
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: told.append((threading.get_ident(), "-")))
    nvtx._profilers_listen.cache_clear()
    yield told
    nvtx._profilers_listen.cache_clear()


def test_ranges_nest_in_their_thread_and_end_after_errors(ranges: list[tuple[int, str]]) -> None:
    clock = BusyClock()

    def work() -> None:
        with pytest.raises(ZeroDivisionError), nvtx_range("outer"), clock.measure("inner"):
            raise ZeroDivisionError

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    work()
    for thread in threads:
        thread.join()
    of_thread = {ident: [text for i, text in ranges if i == ident] for ident, _ in ranges}
    once = ["+outer", "+inner", "-", "-"]
    assert of_thread[threading.get_ident()] == once
    assert sorted(map(len, of_thread.values())) in (
        [4, 4, 4],
        [4, 8],
    )  # a thread that ended gives its number to the next
    assert all(texts == once * (len(texts) // 4) for texts in of_thread.values())
    assert clock.seconds()["inner"] > 0


def test_without_cuda_nobody_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        pytest.fail("nvtx was called without CUDA")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", refuse)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", refuse)
    nvtx._profilers_listen.cache_clear()
    try:
        with nvtx_range("a"), BusyClock().measure("b"):
            pass
    finally:
        nvtx._profilers_listen.cache_clear()


def test_a_block_that_has_not_ended_counts_up_to_now() -> None:
    clock = BusyClock()
    clock.add("a", 1.0)
    with clock.measure("a"):
        time.sleep(0.02)
        inside = clock.seconds()["a"]
        assert 1.02 <= inside < 2
        time.sleep(0.01)
    after = clock.seconds()["a"]
    assert after >= inside + 0.01
    time.sleep(0.01)
    assert clock.seconds()["a"] == after
