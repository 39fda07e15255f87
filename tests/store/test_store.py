"""Write and read volumes: exact, checked, committed by their row."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftengine.errors import CaseError, ConfigError, StoreError
from ftengine.geometry import Box
from ftengine.store import index, layout
from ftengine.store.location import Location
from ftengine.store.reader import Store, open_store
from ftengine.store.writer import Provenance, create_store, write_volume
from tests.support import coordinate_volume, make_store, ras_grid_at, small_config

SHAPE = (37, 70, 41)  # no multiple of a chunk
CONFIG = small_config()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    root = create_store(tmp_path_factory.mktemp("store") / "s.zarr", CONFIG.region)
    image = coordinate_volume(SHAPE)
    label = (image % 3).astype(np.uint8)
    grid = ras_grid_at(SHAPE)
    write_volume(root, "d/labelled", image, label, grid, grid, CONFIG.region, Provenance("x.nii.gz", "00"))
    write_volume(root, "d/sub/plain", image, None, grid, grid, CONFIG.region, Provenance("y.nii.gz", "11"))
    return open_store(root)


@given(
    origin=st.tuples(*(st.integers(-40, n + 10) for n in SHAPE)),
    shape=st.tuples(*(st.integers(1, 50) for _ in range(3))),
)
@settings(max_examples=40, deadline=None)
def test_read_equals_a_slice_of_the_padded_volume(
    store: Store, origin: tuple[int, int, int], shape: tuple[int, int, int]
) -> None:
    patch = store.read("d/labelled", origin, shape)
    image = np.full(shape, layout.AIR_HU, dtype=np.int16)
    label = np.zeros(shape, dtype=np.uint8)
    whole = coordinate_volume(SHAPE)
    inside = Box(origin, shape).inside(SHAPE)
    if min(inside.shape_zyx) > 0:
        target = tuple(
            slice(i - o, i - o + n) for i, o, n in zip(inside.origin_zyx, origin, inside.shape_zyx, strict=True)
        )
        image[target] = whole[inside.slices()]
        label[target] = whole[inside.slices()] % 3
    np.testing.assert_array_equal(patch.image, image)
    np.testing.assert_array_equal(patch.label, label)
    assert patch.image.dtype == np.int16
    assert patch.label.dtype == np.uint8


def test_a_volume_without_a_label_reads_label_zero(store: Store) -> None:
    assert not store.has_label("d/sub/plain")
    assert store.read("d/sub/plain", (0, 0, 0), (8, 8, 8)).label.max() == 0


def test_one_shard_a_volume(store: Store) -> None:
    files = [p for p in (store.path / "volumes/d/labelled/0").rglob("*") if p.is_file()]
    assert sorted(p.name for p in files) == ["0", "zarr.json"]


def test_index_row_describes_the_volume(store: Store) -> None:
    row = store.row("d/labelled")
    label = (coordinate_volume(SHAPE) % 3).astype(np.uint8)
    assert row["class_voxels"] == np.bincount(label.ravel(), minlength=3).tolist()
    assert row["shape_zyx"] == list(SHAPE)
    assert (row["source"], row["source_sha256"], row["annotation"]) == ("x.nii.gz", "00", "tumor")
    assert store.row("d/sub/plain")["annotation"] == "none"
    assert store.grid("d/labelled").spacing_mm_zyx == (3.0, 3.0, 3.0)


@given(seed=st.integers(0, 2**32), density=st.floats(0, 0.2))
@settings(max_examples=25, deadline=None)
def test_located_classes_equal_a_count_of_each_chunk(seed: int, density: float) -> None:
    shape = (33, 64, 40)
    rng = np.random.default_rng(seed)
    label = ((rng.random(shape) < density) * rng.integers(1, 4, shape)).astype(np.uint8)
    found = index.locate_classes(label, "case")
    assert set(found) == set(np.unique(label)) - {0}
    for value, where in found.items():
        grid = layout.chunks_per_axis(shape)
        for chunk, voxels, anchor in zip(where.chunk, where.voxels, where.anchor, strict=True):
            start = np.array(np.unravel_index(chunk, grid)) * layout.CHUNK
            block = label[tuple(slice(s, s + layout.CHUNK) for s in start)]
            assert voxels == (block == value).sum()
            assert label[tuple(start + np.array(np.unravel_index(anchor, (layout.CHUNK,) * 3)))] == value
        assert where.voxels.sum() == (label == value).sum()


def test_body_chunks_hold_background_above_the_window() -> None:
    image = np.full((32, 32, 96), -1000, dtype=np.int16)
    image[..., 32:64] = 40
    label = np.zeros(image.shape, dtype=np.uint8)
    assert index.body_chunks(image, label, -175).tolist() == [False, True, False]
    label[..., 32:64] = 1
    assert not index.body_chunks(image, label, -175).any()
    packed = np.packbits(index.body_chunks(image, None, -175)).tobytes()
    assert index.unpack_body_chunks(packed, (32, 32, 96)).tolist() == [1]


# damage: every kind is a StoreError that names the volume


def _damaged_copy(store: Store, tmp_path: Path) -> Path:
    return Path(shutil.copytree(store.path, tmp_path / "copy.zarr"))


def _shard(root: Path, array: str = "0") -> Path:
    return root / "volumes/d/labelled" / array / "c/0/0/0"


@pytest.mark.parametrize("array", ["0", "labels/seg/0"])
@pytest.mark.parametrize("harm", ["delete", "empty", "truncate", "flip a bit"])
def test_damage_is_reported_never_read(store: Store, tmp_path: Path, array: str, harm: str) -> None:
    root = _damaged_copy(store, tmp_path)
    shard = _shard(root, array)
    data = bytearray(shard.read_bytes())
    if harm == "delete":
        shard.unlink()
    elif harm == "empty":
        shard.write_bytes(b"")
    elif harm == "truncate":
        shard.write_bytes(data[: len(data) // 2])
    else:
        data[len(data) // 3] ^= 1
        shard.write_bytes(data)
    with pytest.raises(StoreError, match=r"d/labelled.*Convert this case again"):
        open_store(root).read_volume("d/labelled")


def test_a_shape_that_differs_from_the_row_is_reported(store: Store, tmp_path: Path) -> None:
    root = _damaged_copy(store, tmp_path)
    shutil.rmtree(root / "volumes/d/labelled/0")
    shutil.copytree(root / "volumes/d/sub/plain/0", root / "volumes/d/labelled/0")
    metadata = root / "volumes/d/labelled/0/zarr.json"
    document = json.loads(metadata.read_text())
    document["shape"] = [30, 70, 41]
    metadata.write_text(json.dumps(document))
    with pytest.raises(StoreError, match=r"d/labelled/0: shape_zyx is \(30, 70, 41\), the index says \(37, 70, 41\)"):
        open_store(root).read_volume("d/labelled")


def _change_attributes(root: Path, **values: object) -> None:
    file = root / "zarr.json"
    document = json.loads(file.read_text())
    document["attributes"]["ftengine"] |= values
    file.write_text(json.dumps(document))


def test_a_future_format_is_refused(store: Store, tmp_path: Path) -> None:
    root = _damaged_copy(store, tmp_path)
    _change_attributes(root, format=2)
    with pytest.raises(StoreError, match="store format 2; this version of ftengine reads format 1"):
        open_store(root)


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"attributes": {}}'])
def test_a_folder_that_is_no_store_is_refused(tmp_path: Path, content: str) -> None:
    with pytest.raises(StoreError, match="is not a store"):
        open_store(tmp_path)
    (tmp_path / "zarr.json").write_text(content)
    with pytest.raises(StoreError, match="is not an ftengine store"):
        open_store(tmp_path)


def test_a_broken_index_is_named(store: Store, tmp_path: Path) -> None:
    root = _damaged_copy(store, tmp_path)
    index.compact_index(root)
    (root / "index.parquet").write_bytes(b"PAR1 not parquet")
    with pytest.raises(StoreError, match=r"index\.parquet: the index cannot be read"):
        open_store(root)


def test_an_unknown_case_is_named(store: Store) -> None:
    with pytest.raises(StoreError, match="holds no case 'd/other'"):
        store.read("d/other", (0, 0, 0), (1, 1, 1))


def test_a_store_keeps_its_region(store: Store) -> None:
    from ftengine.config import Config

    with pytest.raises(ConfigError, match="A store has one region and spacing"):
        create_store(store.path, Config.preset("chest").region)


def test_another_folder_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(StoreError, match="is not empty and is not a store"):
        create_store(tmp_path, CONFIG.region)


@pytest.mark.parametrize("case", ["noslash", "../x/y", "d/../../x", "d/", "/d/x", "d/.hidden", "d/a\\b", "d/a\0b"])
def test_a_case_cannot_leave_the_store(tmp_path: Path, case: str) -> None:
    root = create_store(tmp_path / "s.zarr", CONFIG.region)
    grid = ras_grid_at((8, 8, 8))
    with pytest.raises(ConfigError, match="case name"):
        write_volume(root, case, coordinate_volume((8, 8, 8)), None, grid, grid, CONFIG.region, Provenance("x", "y"))
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == ["zarr.json", "zarr.json"]


@pytest.mark.parametrize("url", ["http://host/store", "s3://", "ftp://a/b"])
def test_an_unknown_kind_of_place_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="want a folder, s3://bucket/prefix or gs://bucket/prefix"):
        open_store(url)


# commit


def test_a_failed_write_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = create_store(tmp_path / "s.zarr", CONFIG.region)
    grid = ras_grid_at((8, 8, 8))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(index, "append_row", full)  # the last step before the commit
    with pytest.raises(OSError, match="No space left"):
        write_volume(root, "d/x", coordinate_volume((8, 8, 8)), None, grid, grid, CONFIG.region, Provenance("x", "y"))
    assert root.keys("volumes/d/x", recursive=True) == []
    assert len(open_store(root)) == 0


def test_writing_again_replaces_row_and_data(tmp_path: Path) -> None:
    root = create_store(tmp_path / "s.zarr", CONFIG.region)
    grid = ras_grid_at((8, 8, 8))
    for offset in (0, 5):
        write_volume(
            root,
            "d/x",
            coordinate_volume((8, 8, 8), offset),
            None,
            grid,
            grid,
            CONFIG.region,
            Provenance("x", str(offset)),
        )
        index.compact_index(root)
    store = open_store(root)
    assert (len(store), store.row("d/x")["source_sha256"]) == (1, "5")
    np.testing.assert_array_equal(store.read_volume("d/x").image, coordinate_volume((8, 8, 8), 5))


def test_compaction_keeps_every_row_and_ends_with_one_file(tmp_path: Path) -> None:
    store = make_store(tmp_path, CONFIG)
    before = store.index
    grid = ras_grid_at((8, 8, 8))
    write_volume(
        store.path, "b/new", coordinate_volume((8, 8, 8)), None, grid, grid, CONFIG.region, Provenance("x", "y")
    )
    assert open_store(store.path).cases == ["a/0", "a/1", "b/new", "o/0", "o/1"]
    assert index.compact_index(store.path) == 5
    assert list((store.path / "index.d").iterdir()) == []
    assert open_store(store.path).index.slice(0, 2) == before.slice(0, 2)


@pytest.mark.parametrize(
    ("first", "second"), [("d/p", "d/p/scan"), ("d/p/scan", "d/p"), ("d/p/0", "d/p"), ("d/p/labels", "d/p")]
)
def test_a_case_inside_another_is_refused_and_both_stay_whole(tmp_path: Path, first: str, second: str) -> None:
    root = create_store(tmp_path / "s.zarr", CONFIG.region)
    grid = ras_grid_at((8, 8, 8))
    volume = coordinate_volume((8, 8, 8))
    write_volume(root, first, volume, None, grid, grid, CONFIG.region, Provenance("x", "y"))
    with pytest.raises(CaseError, match="lie inside one another"):
        write_volume(root, second, volume, None, grid, grid, CONFIG.region, Provenance("x", "y"))
    store = open_store(root)
    assert store.cases == [first]
    np.testing.assert_array_equal(store.read_volume(first).image, volume)


def test_an_interrupt_behind_the_commit_takes_the_row_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = create_store(tmp_path / "s.zarr", CONFIG.region)
    grid = ras_grid_at((8, 8, 8))
    append = index.append_row

    def interrupted(where: Location, row: dict[str, object]) -> None:
        append(where, row)
        raise KeyboardInterrupt

    monkeypatch.setattr(index, "append_row", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_volume(root, "d/x", coordinate_volume((8, 8, 8)), None, grid, grid, CONFIG.region, Provenance("x", "y"))
    assert open_store(root).cases == []
    assert root.keys("volumes/d/x", recursive=True) == []


def test_two_converters_do_not_write_at_once(tmp_path: Path) -> None:
    root = create_store(tmp_path / "s.zarr", CONFIG.region)
    with root.only_writer():
        with pytest.raises(StoreError, match="another process is converting into this store"), root.only_writer():
            pass
    with root.only_writer():
        assert len(open_store(root)) == 0  # readers need no lock
