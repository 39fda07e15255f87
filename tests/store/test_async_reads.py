"""Boxes read ahead have the voxels of ``Store.read``; errors name the volume; closing cancels and leaves nothing."""

import threading
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ftengine.errors import StoreError
from ftengine.geometry import Box, IntZYX
from ftengine.store import index
from ftengine.store.async_reads import AsyncReads
from ftengine.store.reader import Store, open_store
from ftengine.store.writer import Provenance, create_store, write_volume
from tests.support import make_store, small_config

SHAPE = (40, 44, 48)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(tmp_path_factory.mktemp("ahead"), small_config())


@st.composite
def boxes(draw: st.DrawFn) -> Box:
    """Inside, over every edge, and outside the volume."""
    z, y, x = (draw(st.integers(-30, n + 10)) for n in SHAPE)
    size = (draw(st.integers(1, 60)), draw(st.integers(1, 60)), draw(st.integers(1, 60)))
    return Box((z, y, x), size)


@given(wanted=st.lists(boxes(), min_size=1, max_size=12), threads=st.integers(1, 4), in_flight=st.integers(1, 5))
@settings(max_examples=25, deadline=None)
def test_the_voxels_are_those_of_read(store: Store, wanted: list[Box], threads: int, in_flight: int) -> None:
    reads = AsyncReads(store, threads=threads, in_flight=in_flight)
    try:
        cases = [store.cases[i % len(store)] for i in range(len(wanted))]
        futures = [reads.submit(case, box) for case, box in zip(cases, wanted, strict=True)]
        for case, box, future in zip(cases, wanted, futures, strict=True):
            ahead, direct = future.result(), store.read(case, box.origin_zyx, box.shape_zyx)
            assert (ahead.case, ahead.box) == (direct.case, direct.box)
            for a, b in ((ahead.image, direct.image), (ahead.label, direct.label)):
                assert a.dtype == b.dtype
                assert a.flags.c_contiguous
                np.testing.assert_array_equal(a, b)
    finally:
        reads.close()


def test_patches_lie_in_the_memory_that_is_given(store: Store) -> None:
    given_out: list[NDArray[Any]] = []

    def allocate(shape: IntZYX, dtype: type[Any]) -> NDArray[Any]:
        given_out.append(np.full(shape, 77, dtype))
        return given_out[-1]

    reads = AsyncReads(store, threads=1, in_flight=1, allocate=allocate)
    patch = reads.submit(store.cases[0], Box((1, 2, 3), (8, 9, 10))).result()
    reads.close()
    assert patch.image is given_out[0]
    assert patch.label is given_out[1]
    np.testing.assert_array_equal(patch.image, store.read(store.cases[0], (1, 2, 3), (8, 9, 10)).image)


def test_a_damaged_volume_and_an_unknown_one_are_named(tmp_path: Path) -> None:
    store = make_store(tmp_path, small_config(), num_annotated=2, num_organs=0)
    shard = store.path / "volumes/a/0/0/c/0/0/0"
    content = bytearray(shard.read_bytes())
    content[100] ^= 0xFF
    shard.write_bytes(content)
    reads = AsyncReads(open_store(store.path), threads=2, in_flight=4)
    try:
        box = Box((0, 0, 0), SHAPE)
        with pytest.raises(StoreError, match=r"volumes/a/0: a chunk is missing or damaged"):
            reads.submit("a/0", box).result()
        with pytest.raises(StoreError, match="holds no case 'x/9'"):
            reads.submit("x/9", box).result()
        assert reads.submit("a/1", box).result().label.any()
    finally:
        reads.close()


def test_an_array_that_could_not_be_opened_is_tried_again(tmp_path: Path) -> None:
    store = make_store(tmp_path, small_config(), num_annotated=1, num_organs=0)
    metadata = store.path / "volumes/a/0/0/zarr.json"
    content = metadata.read_bytes()
    metadata.unlink()
    reads = AsyncReads(store, threads=1, in_flight=4)
    try:
        box = Box((0, 0, 0), (4, 4, 4))
        for future in [reads.submit("a/0", box) for _ in range(3)]:
            with pytest.raises(StoreError, match="volumes/a/0"):
                future.result()
        metadata.write_bytes(content)
        assert reads.submit("a/0", box).result().image.shape == (4, 4, 4)
    finally:
        reads.close()


def test_closing_cancels_what_is_under_way_and_ends_the_thread(store: Store) -> None:
    reads = AsyncReads(store, threads=1, in_flight=2)
    futures = [reads.submit(store.cases[0], Box((0, 0, 0), SHAPE)) for _ in range(200)]
    reads.close()
    reads.close()
    assert all(future.done() for future in futures)
    assert sum(future.cancelled() for future in futures) > 100
    with pytest.raises(CancelledError):
        futures[-1].result()
    with pytest.raises(RuntimeError, match="closed"):
        reads.submit(store.cases[0], Box((0, 0, 0), SHAPE))
    assert not [t for t in threading.enumerate() if t.name == "ftengine-reads"]


def test_over_s3_the_voxels_are_the_same(store: Store, s3_server: str) -> None:
    config = small_config()
    root = create_store(f"{s3_server}/ahead.zarr", config.region)
    for case in store.cases[:2]:
        volume = store.read_volume(case)
        grid = store.grid(case)
        provenance = Provenance("made by a test", "", annotation="organ")
        write_volume(root, case, volume.image, volume.label, grid, grid, config.region, provenance)
    index.compact_index(root)
    remote = open_store(f"{s3_server}/ahead.zarr")
    assert remote.shards is None  # tensorstore alone
    reads = AsyncReads(remote, threads=2, in_flight=8)
    try:
        wanted = [(case, Box((k, 2 * k, k), (20, 33, 40))) for k in range(4) for case in remote.cases]
        for (case, box), future in zip(wanted, [reads.submit(*w) for w in wanted], strict=True):
            ahead, direct = future.result(), store.read(case, box.origin_zyx, box.shape_zyx)
            np.testing.assert_array_equal(ahead.image, direct.image)
            np.testing.assert_array_equal(ahead.label, direct.label)
    finally:
        reads.close()
