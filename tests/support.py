"""What tests of several stages share: a small region, small volumes, a small store."""

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ftengine.config import Config
from ftengine.geometry import Grid, IntZYX, grid_from_matrix
from ftengine.store import index
from ftengine.store.reader import Store, open_store
from ftengine.store.writer import Provenance, create_store, write_volume


def small_config(**overrides: object) -> Config:
    """The demo's region with patches of 16 voxels and networks of a few thousand weights; keys with ``__`` for dots."""
    base: dict[str, object] = {
        "region.patch_zyx": (16, 16, 16),
        "network.channels": (4, 8),
        "generator.width": 4,  # smaller is slower: the CPU convolutions work in blocks of 8 channels
        "training.log_every": 1,
        "generator_training.log_every": 1,
        "training.batch_size": 2,
        "generator_training.batch_size": 2,
        "qc.min_pass_rate": 0.0,
    }
    return Config.preset("demo").with_overrides(
        base | {key.replace("__", "."): value for key, value in overrides.items()}
    )


def ras_grid_at(shape_zyx: IntZYX, spacing_mm: float = 3.0) -> Grid:
    """An axis-parallel RAS+ grid with its first voxel at the origin."""
    return grid_from_matrix(shape_zyx, np.diag([spacing_mm, spacing_mm, spacing_mm, 1.0]))


def coordinate_volume(shape_zyx: IntZYX, offset: int = 0) -> NDArray[np.int16]:
    """A volume whose voxels hold their own C-order index (modulo 20,000): a crop that is off by one shows as a number."""
    return ((np.arange(np.prod(shape_zyx)) + offset) % 20_000 - 1000).astype(np.int16).reshape(shape_zyx)


def organ_volume(shape_zyx: IntZYX, *, tumor: bool, seed: int) -> tuple[NDArray[np.int16], NDArray[np.uint8]]:
    """Soft tissue with a block of liver (about 100 HU), and a darker tumour of 5 voxels edge where asked."""
    rng = np.random.default_rng(seed)
    image = np.rint(rng.normal(30, 10, shape_zyx)).astype(np.int16)
    label = np.zeros(shape_zyx, dtype=np.uint8)
    z, y, x = (n // 4 for n in shape_zyx)
    label[z:-z, y:-y, x:-x] = 1
    image[label == 1] += 70
    if tumor:
        place = tuple(slice(n // 2 - 2, n // 2 + 3) for n in shape_zyx)
        label[place] = 2
        image[place] -= 60
    return image, label


def make_store(
    folder: Path, config: Config, *, num_annotated: int = 2, num_organs: int = 2, shape_zyx: IntZYX = (40, 44, 48)
) -> Store:
    """A store with annotated volumes ``a/0`` ... and organ-labelled ones ``o/0`` ..."""
    root = create_store(folder / "store.zarr", config.region)
    for kind, count in (("tumor", num_annotated), ("organ", num_organs)):
        for number in range(count):
            image, label = organ_volume(shape_zyx, tumor=kind == "tumor", seed=number + (100 if kind == "organ" else 0))
            grid = ras_grid_at(shape_zyx)
            provenance = Provenance("made by a test", "", annotation=kind, split="train")
            write_volume(
                root, f"{kind[0].replace('t', 'a')}/{number}", image, label, grid, grid, config.region, provenance
            )
    index.compact_index(root)
    return open_store(root)


@contextmanager
def host_syncs_forbidden() -> Iterator[None]:
    """Inside the block, a host sync of torch's on any thread is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that its sync detector is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """``s3://bucket`` of an S3 server on loopback, made for this test run; the environment names it as a user's would."""
    code = (
        "from moto.server import ThreadedMotoServer; import time\n"
        "server = ThreadedMotoServer(ip_address='127.0.0.1', port=0, verbose=False); server.start()\n"
        "print(server.get_host_and_port()[1], flush=True); time.sleep(3600)"
    )
    process = subprocess.Popen([sys.executable, "-W", "ignore", "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    endpoint = f"http://127.0.0.1:{int(process.stdout.readline())}"
    names = {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    before = {name: os.environ.get(name) for name in names}
    os.environ |= names
    try:
        import boto3

        boto3.client("s3", endpoint_url=endpoint).create_bucket(Bucket="bucket")
        yield "s3://bucket"
    finally:
        process.kill()
        process.communicate()
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
