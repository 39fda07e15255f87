"""Random patches: our reader against zarr-python on the same store, and against a whole ``.nii.gz`` per patch."""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from ftengine.bench.timing import interleave, report
from ftengine.config import Config
from ftengine.geometry import IntZYX
from ftengine.store import index
from ftengine.store.layout import volume_path
from ftengine.store.reader import open_store
from ftengine.store.writer import Provenance, create_store, write_volume
from ftengine.volume.nifti import write_nifti
from ftengine.volume.phantom import make_phantom
from ftengine.volume.readers import read_volume


def run(*, shape_zyx: IntZYX, patch_zyx: IntZYX, rounds: int, as_json: bool = False) -> dict[str, Any]:
    """Image and label of one random patch a call; all three ways give equal voxels (checked first)."""
    config = Config.preset("abdomen")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        phantom = make_phantom("abdomen", seed=0, shape_zyx=shape_zyx, spacing_mm_zyx=config.region.spacing_mm_zyx)
        root = create_store(folder / "bench.zarr", config.region)
        provenance = Provenance("bench", "")
        write_volume(
            root, "b/0", phantom.image_hu, phantom.label, phantom.grid, phantom.grid, config.region, provenance
        )
        index.compact_index(root)
        write_nifti(folder / "ct.nii.gz", phantom.image_hu, phantom.grid)
        write_nifti(folder / "label.nii.gz", phantom.label, phantom.grid)
        store = open_store(root)
        group = zarr.open_group(folder / "bench.zarr" / volume_path("b/0"), mode="r")
        arrays = [group["0"], group["labels/seg/0"]]
        rng = np.random.default_rng(0)
        boxes = [
            tuple(int(rng.integers(0, n - p + 1)) for n, p in zip(shape_zyx, patch_zyx, strict=True))
            for _ in range(1000)
        ]
        turn = {"ours": 0, "zarr": 0, "nifti": 0}

        def origin(who: str) -> IntZYX:
            turn[who] += 1
            z, y, x = boxes[turn[who] % len(boxes)]
            return z, y, x

        def slices(who: str) -> tuple[slice, ...]:
            return tuple(slice(o, o + n) for o, n in zip(origin(who), patch_zyx, strict=True))

        def ours() -> tuple[Any, Any]:
            patch = store.read("b/0", origin("ours"), patch_zyx)
            return patch.image, patch.label

        def by_zarr() -> tuple[Any, Any]:
            where = slices("zarr")
            return arrays[0][where], arrays[1][where]  # type: ignore[index]  # arrays of the group

        def by_nifti() -> tuple[Any, Any]:
            where = slices("nifti")
            volume = read_volume(folder / "ct.nii.gz", folder / "label.nii.gz")
            return volume.image_hu[where], None if volume.label is None else volume.label[where]

        for a, b, c in zip(ours(), by_zarr(), by_nifti(), strict=True):
            if not (np.array_equal(a, b) and np.array_equal(a, c)):
                raise AssertionError("the three readers disagree: the measurement would mean nothing")
        candidates = {"ftengine store": ours, "zarr-python, same store": by_zarr, "whole .nii.gz": by_nifti}
        rows = interleave(candidates, rounds=rounds)
        size = sum(f.stat().st_size for f in (folder / "bench.zarr" / volume_path("b/0")).rglob("*") if f.is_file())
        extra = {
            "shape_zyx": shape_zyx,
            "patch_zyx": patch_zyx,
            "stored_bytes": size,
            "raw_bytes": int(np.prod(shape_zyx)) * 3,
        }
        return report(
            f"one {patch_zyx} patch of a {shape_zyx} phantom", rows, "whole .nii.gz", as_json=as_json, extra=extra
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """``ftengine bench store``."""
    parser = argparse.ArgumentParser(prog="ftengine bench store", description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    run(shape_zyx=(200, 256, 256), patch_zyx=(96, 96, 96), rounds=options.rounds, as_json=options.json)


if __name__ == "__main__":
    main()
