"""A bounded queue: order, capacity, and nobody waits at a closed one."""

import threading
import time

import pytest

from ftengine.loader.channel import Channel, Closed


def test_items_come_in_order_and_never_more_than_the_capacity() -> None:
    channel: Channel[int] = Channel(3)
    levels = []

    def fill() -> None:
        for number in range(200):
            channel.put(number)

    thread = threading.Thread(target=fill)
    thread.start()
    taken = []
    for _ in range(200):
        levels.append(len(channel))
        taken.append(channel.get())
    thread.join()
    assert taken == list(range(200))
    assert max(levels) <= 3


@pytest.mark.parametrize("side", ["put", "get"])
def test_closing_wakes_who_waits(side: str) -> None:
    channel: Channel[int] = Channel(1)
    if side == "put":
        channel.put(0)
    ended = threading.Event()

    def wait() -> None:
        with pytest.raises(Closed):
            channel.put(1) if side == "put" else channel.get()
        ended.set()

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.05)
    assert not ended.is_set()
    channel.close()
    assert ended.wait(5)
    thread.join()
    assert len(channel) == 0  # what lay in it is gone
    with pytest.raises(Closed):
        channel.get()
