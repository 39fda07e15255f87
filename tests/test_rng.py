"""Random streams are functions of their address."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftengine.rng import Purpose, StreamReader, patch_rng

ADDRESS = st.tuples(
    st.integers(0, 2**63 - 1),
    st.sampled_from(Purpose),
    st.integers(0, 2**40),
    st.integers(0, 2**40),
    st.integers(0, 99),
)


def _draw(address: tuple[int, Purpose, int, int, int]) -> list[int]:
    seed, purpose, epoch, index, draw = address
    return patch_rng(seed, purpose, epoch=epoch, index=index, draw=draw).integers(0, 2**62, 8).tolist()


@given(ADDRESS, ADDRESS)
def test_equal_addresses_and_only_those_give_equal_streams(
    a: tuple[int, Purpose, int, int, int], b: tuple[int, Purpose, int, int, int]
) -> None:
    assert _draw(a) == _draw(a)
    assert (_draw(a) == _draw(b)) == (a == b)


def test_the_stream_is_pinned() -> None:
    """Golden numbers: every patch of every run depends on them. A change here is a new engine version."""
    rng = patch_rng(7, Purpose.TUMOR, epoch=3, index=11)
    assert rng.integers(0, 1000, 5).tolist() == [688, 403, 795, 404, 717]


def test_negative_numbers_are_refused() -> None:
    with pytest.raises(OverflowError):
        patch_rng(-1, Purpose.TUMOR)
    assert isinstance(patch_rng(0, Purpose.TUMOR), np.random.Generator)


@given(
    addresses=st.lists(
        st.tuples(*[st.integers(0, 2**64 - 1)] * 4, st.sampled_from(Purpose), st.booleans()), min_size=1, max_size=6
    )
)
def test_a_stream_reader_gives_the_streams_of_patch_rng(
    addresses: list[tuple[int, int, int, int, Purpose, bool]],
) -> None:
    """Whatever was drawn of the stream before: half a word may be left over there."""
    reader = StreamReader()
    for seed, epoch, index, draw, purpose, odd in addresses:
        ours = reader.patch_rng(seed, purpose, epoch=epoch, index=index, draw=draw)
        wanted = patch_rng(seed, purpose, epoch=epoch, index=index, draw=draw)
        assert ours.random(5).tolist() == wanted.random(5).tolist()
        count = 3 if odd else 4
        assert ours.integers(0, 32, count).tolist() == wanted.integers(0, 32, count).tolist()
        assert ours.standard_normal() == wanted.standard_normal()
