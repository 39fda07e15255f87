"""Small stores and plans for the tests of experiments."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import yaml

from ftengine.config import Config
from ftengine.experiments.plan import Plan, parse_plan
from ftengine.store import index
from ftengine.store.reader import Store, open_store
from ftengine.store.writer import Provenance, create_store, write_volume
from tests.support import organ_volume, ras_grid_at

SHAPE_ZYX = (34, 34, 34)


def store_of(folder: Path, preset: str, volumes: Mapping[str, tuple[int, str]], *, name: str = "store") -> Store:
    """A store of the preset's region. volumes: data set -> (how many, annotation); cases are ``DATASET/0`` and so on."""
    region = Config.preset(preset).region
    root = create_store(folder / f"{name}.zarr", region)
    for dataset, (number, annotation) in volumes.items():
        for k in range(number):
            image, label = organ_volume(SHAPE_ZYX, tumor=annotation == "tumor", seed=k)
            grid = ras_grid_at(SHAPE_ZYX, region.spacing_mm_zyx[0])
            provenance = Provenance(f"{dataset}-{k}", f"sha of {dataset} {k}", annotation=annotation, split="train")
            write_volume(root, f"{dataset}/{k}", image, label, grid, grid, region, provenance)
    index.compact_index(root)
    return open_store(root)


def rows_of_many(folder: Path, preset: str, volumes: Mapping[str, tuple[int, str]], *, name: str) -> Store:
    """The rows of such a store, without voxels of their own: enough to cut plans."""
    kinds = {"tumor", "organ"}
    small = store_of(folder, preset, {kind: (1, kind) for kind in sorted(kinds)}, name=name)
    table = small.index
    row_of = {row["annotation"]: row for row in table.to_pylist()}
    rows = [
        {**row_of[annotation], "case": f"{dataset}/{k}", "dataset": dataset, "source_sha256": f"sha of {dataset} {k}"}
        for dataset, (number, annotation) in sorted(volumes.items())
        for k in range(number)
    ]
    index.write_index(small.location, pa.Table.from_pylist(rows, schema=table.schema))
    return open_store(small.location)


def plan_of(**changes: Any) -> Plan:
    """A plan of one task, ``home`` (data set a), with a baseline and FreeTumor; changes replace its top keys."""
    return parse_plan(yaml.safe_dump(plan_values(**changes), sort_keys=False), where="test")


def plan_values(**changes: Any) -> dict[str, Any]:
    """The same as plain values."""
    return {
        "title": "Test",
        "stores": {"liver": {"preset": "demo"}},
        "tasks": {"home": {"store": "liver", "datasets": ["a"]}},
        "folds": {"number": 2},
        "baseline": "plain",
        "methods": {
            "plain": {},
            "free": {
                "paints": "freetumor",
                "judge": True,
                "unlabelled": {"datasets": ["o"]},
                "generator": {"unlabelled": {"datasets": ["o"]}},
            },
        },
        "set": {"training.steps": 5},
        **changes,
    }
