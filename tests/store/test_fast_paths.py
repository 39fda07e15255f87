"""What was made fast gives what the plain way gives: anchors of classes, bits of the body, percentiles, shards, and what a worker imports."""

import subprocess
import sys
from pathlib import Path
from zlib import crc32

import numpy as np
import tensorstore
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from zarr.codecs import BloscCodec, Crc32cCodec

from ftengine.config import Config
from ftengine.rng import Purpose, patch_rng
from ftengine.store import index, layout
from ftengine.store.writer import Provenance, create_store, write_volume
from tests.support import organ_volume, ras_grid_at

CHUNK = layout.CHUNK


def _located_plainly(label: NDArray[np.uint8], case: str) -> dict[int, tuple[list[int], list[int], list[int]]]:
    """Chunks, counts and anchors of each value: shuffle its voxels, the first of each chunk is the anchor."""
    rng = patch_rng(0, Purpose.ANCHOR, index=crc32(case.encode()))
    grid = layout.chunks_per_axis((label.shape[0], label.shape[1], label.shape[2]))
    found = {}
    for value in np.unique(label[label > 0]):
        z, y, x = np.unravel_index(rng.permutation(np.flatnonzero(label == value)), label.shape)
        ids = np.ravel_multi_index((z // CHUNK, y // CHUNK, x // CHUNK), grid)
        chunk, first, voxels = np.unique(ids, return_index=True, return_counts=True)
        anchor = np.ravel_multi_index((z[first] % CHUNK, y[first] % CHUNK, x[first] % CHUNK), (CHUNK,) * 3)
        found[int(value)] = (chunk.tolist(), voxels.tolist(), anchor.tolist())
    return found


@given(
    seed=st.integers(0, 2**32),
    density=st.floats(0, 0.6),
    shape=st.tuples(st.integers(1, 70), st.integers(1, 40), st.integers(1, 70)),
)
@settings(max_examples=40, deadline=None)
def test_anchors_are_the_first_of_a_shuffle(seed: int, density: float, shape: tuple[int, int, int]) -> None:
    rng = np.random.default_rng(seed)
    label = ((rng.random(shape) < density) * rng.choice([1, 2, 200], shape)).astype(np.uint8)
    found = {
        v: (w.chunk.tolist(), w.voxels.tolist(), w.anchor.tolist()) for v, w in index.locate_classes(label, "c").items()
    }
    assert found == _located_plainly(label, "c")


@given(
    seed=st.integers(0, 2**32),
    spread=st.sampled_from([0, 1, 300, 20_000]),
    shape=st.tuples(st.integers(1, 70), st.integers(1, 40), st.integers(1, 70)),
)
@settings(max_examples=40, deadline=None)
def test_body_chunks_and_percentiles_are_those_of_all_voxels(
    seed: int, spread: int, shape: tuple[int, int, int]
) -> None:
    rng = np.random.default_rng(seed)
    image = rng.normal(-150, spread, shape).clip(-32768, 32767).astype(np.int16)
    label = (rng.random(shape) < 0.2).astype(np.uint8)
    blocks = np.pad((image > -175) & (label == 0), [(0, -n % CHUNK) for n in shape]).reshape(
        *(n for count in layout.chunks_per_axis(shape) for n in (count, CHUNK))
    )
    wanted = blocks.sum(axis=(1, 3, 5)) >= index.MIN_BODY_VOXELS
    np.testing.assert_array_equal(index.body_chunks(image, label, -175), wanted.ravel())
    percentiles = np.percentile(image[::2, ::2, ::2], index.HU_PERCENTILES)
    np.testing.assert_array_equal(index.hu_percentiles(image), percentiles)


def test_a_worker_imports_nothing_heavy_that_it_does_not_use() -> None:
    script = """
import sys
import ftengine.store.workers
heavy = {"dask", "matplotlib", "monai", "numcodecs", "pandas", "scipy.ndimage", "scipy.spatial", "torch", "typer", "zarr"}
print(*sorted(heavy & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_shards_hold_what_zarr_python_would_write_and_every_empty_chunk(tmp_path: Path) -> None:
    shape = (40, 70, 33)
    image, label = organ_volume(shape, tumor=True, seed=3)
    image[:, :32], label[:, :32] = layout.AIR_HU, 0
    region = Config.preset("abdomen").region
    store = create_store(tmp_path / "s.zarr", region)
    grid = ras_grid_at(shape)
    write_volume(store, "d/x", image, label, grid, grid, region, Provenance("x", ""))
    for key, data, fill, codec in (
        ("0", image, layout.AIR_HU, layout.IMAGE_CODEC),
        ("labels/seg/0", label, 0, layout.LABEL_CODEC),
    ):
        plain = zarr.create_array(
            tmp_path / f"plain-{fill}.zarr",
            config={"write_empty_chunks": True},
            shape=shape,
            dtype=data.dtype,
            chunks=(CHUNK,) * 3,
            shards=layout.shard_shape(shape),
            fill_value=fill,
            dimension_names=("z", "y", "x"),
            compressors=[BloscCodec(**codec), Crc32cCodec()],  # type: ignore[arg-type]  # a table of plain values
        )
        plain[...] = data
        ours = tmp_path / "s.zarr/volumes/d/x" / key
        assert (ours / "zarr.json").read_bytes() == (tmp_path / f"plain-{fill}.zarr/zarr.json").read_bytes()
        np.testing.assert_array_equal(zarr.open_array(ours, mode="r")[...], data)
        spec = {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": f"{ours}/"},
            "fill_missing_data_reads": False,
        }
        np.testing.assert_array_equal(tensorstore.open(spec, read=True).result().read().result(), data)
        chunks = int(np.prod(layout.chunks_per_axis(shape)))
        entries = _entries(ours, chunks)
        assert (entries != np.iinfo(np.uint64).max).all()
        assert sorted(entries[:, 1]) == sorted(_entries(tmp_path / f"plain-{fill}.zarr", chunks)[:, 1])


def _entries(array: Path, chunks: int) -> NDArray[np.uint64]:
    """(offset, length) of each inner chunk, from the index at the end of the shard."""
    data = (array / "c/0/0/0").read_bytes()
    return np.frombuffer(data[-(16 * chunks + 4) : -4], dtype="<u8").reshape(chunks, 2)
