"""The fast way to local voxels equals tensorstore, and leaves to it whatever is not as our writer leaves it."""

import json
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftengine.errors import StoreError
from ftengine.geometry import Box, IntZYX
from ftengine.store import index, layout, shard
from ftengine.store.reader import Store, open_store
from ftengine.store.writer import Provenance, create_store, write_volume
from tests.support import ras_grid_at, small_config

SHAPE = (70, 45, 100)
CONTENTS = ("organs", "noise", "constant")


def _content(kind: str, shape: IntZYX = SHAPE) -> tuple[Any, Any]:
    """Voxels that compress well, not at all, and to almost nothing."""
    rng = np.random.default_rng(CONTENTS.index(kind))
    if kind == "noise":
        return rng.integers(-(2**15), 2**15, shape).astype(np.int16), rng.integers(0, 3, shape).astype(np.uint8)
    image, label = np.full(shape, -7, dtype=np.int16), np.ones(shape, dtype=np.uint8)
    if kind == "organs":
        image[20:50, 10:40, 30:90] = rng.integers(0, 100, (30, 30, 60))
        label[20:50, 10:40, 30:90] = 2
        label[60:] = 0
    return image, label


def _write(root: Any, case: str, image: Any, label: Any) -> None:
    grid = ras_grid_at(image.shape)
    provenance = Provenance("made by a test", "", annotation="organ")
    write_volume(root, case, image, label, grid, grid, small_config().region, provenance)


def _make(folder: Path, contents: dict[str, tuple[Any, Any]]) -> Path:
    root = create_store(folder / "store.zarr", small_config().region)
    for case, (image, label) in contents.items():
        _write(root, case, image, label)
    index.compact_index(root)
    return folder / "store.zarr"


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Store]:
    """The same store by the fast way and by tensorstore alone."""
    place = _make(tmp_path_factory.mktemp("shard"), {f"d/{kind}": _content(kind) for kind in CONTENTS})
    fast, slow = open_store(place), open_store(place)
    slow.__dict__["shards"] = None
    return fast, slow


def test_the_fast_way_is_open_here(stores: tuple[Store, Store]) -> None:
    if sys.platform != "linux":
        pytest.skip("numcodecs and google-crc32c may be built otherwise on this system")
    assert stores[0].shards is not None


@given(
    kind=st.sampled_from(CONTENTS),
    origin=st.tuples(*(st.integers(-20, n + 5) for n in SHAPE)),
    size=st.tuples(*[st.integers(1, 110)] * 3),
)
@settings(max_examples=150, deadline=None)
def test_voxels_are_those_of_tensorstore(stores: tuple[Store, Store], kind: str, origin: IntZYX, size: IntZYX) -> None:
    fast, slow = stores
    cut = fast.cut(f"d/{kind}", Box(origin, size))
    here, wanted = fast.read_here(cut), slow.read(f"d/{kind}", origin, size)
    assert slow.read_here(cut) is None
    if fast.shards is not None:
        assert here is not None
        for a, b in ((here.image, wanted.image), (here.label, wanted.label)):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)


def test_many_threads_read_at_the_same_time(stores: tuple[Store, Store]) -> None:
    fast, slow = stores
    rng = np.random.default_rng(0)
    asked = [(f"d/{CONTENTS[k % 3]}", tuple(rng.integers(0, 40, 3).tolist())) for k in range(60)]
    with ThreadPoolExecutor(8) as pool:
        patches = list(pool.map(lambda a: fast.read(a[0], a[1], (40, 33, 60)), asked))
    for (case, origin), patch in zip(asked, patches, strict=True):
        wanted = slow.read(case, origin, (40, 33, 60))
        np.testing.assert_array_equal(patch.image, wanted.image)
        np.testing.assert_array_equal(patch.label, wanted.label)


def test_a_volume_that_is_converted_again_is_read_anew(tmp_path: Path) -> None:
    image, label = _content("organs")
    store = open_store(_make(tmp_path, {"d/x": (image, label)}))
    np.testing.assert_array_equal(store.read("d/x", (0, 0, 0), SHAPE).image, image)
    root = store.location
    _write(root, "d/x", image + np.int16(1), label)
    np.testing.assert_array_equal(store.read("d/x", (0, 0, 0), SHAPE).image, image + 1)


def _shard_file(store: Store, name: str = "0") -> Path:
    return store.path / f"volumes/d/x/{name}/c/0/0/0"


def _flip_a_byte_of_a_chunk(store: Store) -> None:
    content = bytearray(_shard_file(store).read_bytes())
    content[50] ^= 1
    _shard_file(store).write_bytes(content)


def _flip_a_byte_of_the_index(store: Store) -> None:
    content = bytearray(_shard_file(store).read_bytes())
    content[-10] ^= 1
    _shard_file(store).write_bytes(content)


def _take_a_chunk_out_of_the_index(store: Store) -> None:
    from google_crc32c import value

    content = bytearray(_shard_file(store).read_bytes())
    grid = layout.chunks_per_axis(SHAPE)
    start = len(content) - 16 * int(np.prod(grid)) - 4
    content[start : start + 16] = b"\xff" * 16
    content[-4:] = value(bytes(content[start:-4])).to_bytes(4, "little")
    _shard_file(store).write_bytes(content)


def _cut_the_file_short(store: Store) -> None:
    _shard_file(store).write_bytes(_shard_file(store).read_bytes()[:-100])


def _take_the_file_away(store: Store) -> None:
    _shard_file(store).unlink()


def _damage_the_label(store: Store) -> None:
    _shard_file(store, "labels/seg/0").write_bytes(b"")


@pytest.mark.parametrize(
    "harm",
    [
        _flip_a_byte_of_a_chunk,
        _flip_a_byte_of_the_index,
        _take_a_chunk_out_of_the_index,
        _cut_the_file_short,
        _take_the_file_away,
        _damage_the_label,
    ],
)
@pytest.mark.parametrize("opened_before", [False, True])
def test_what_is_damaged_is_left_to_tensorstore_which_names_it(
    tmp_path: Path, harm: Callable[[Store], None], *, opened_before: bool
) -> None:
    store = open_store(_make(tmp_path, {"d/x": _content("organs")}))
    if opened_before:
        store.read("d/x", (0, 0, 0), (8, 8, 8))
    harm(store)
    whole = Box((0, 0, 0), SHAPE)
    assert store.read_here(store.cut("d/x", whole)) is None
    with pytest.raises(StoreError, match="volumes/d/x: a chunk is missing or damaged"):
        store.read("d/x", (0, 0, 0), SHAPE)


def test_an_array_that_another_program_wrote_is_left_to_tensorstore(tmp_path: Path) -> None:
    image, label = _content("organs")
    store = open_store(_make(tmp_path, {"d/x": (image, label)}))
    metadata = store.path / "volumes/d/x/0/zarr.json"
    document = json.loads(metadata.read_text())
    document["attributes"] = {"made by": "somebody else"}
    metadata.write_text(json.dumps(document))
    again = open_store(store.path)
    assert again.read_here(again.cut("d/x", Box((0, 0, 0), SHAPE))) is None
    np.testing.assert_array_equal(again.read("d/x", (0, 0, 0), SHAPE).image, image)


def test_without_the_libraries_tensorstore_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image, label = _content("organs")
    place = _make(tmp_path, {"d/x": (image, label)})
    monkeypatch.setattr(shard, "_libraries", lambda: None)
    store = open_store(place)
    assert store.shards is None
    np.testing.assert_array_equal(store.read("d/x", (1, 2, 3), (30, 30, 30)).image, image[1:31, 2:32, 3:33])
