"""A store described in plain values."""

from typing import Any

import numpy as np

from ftengine.store.layout import FORMAT
from ftengine.store.reader import Store


def describe_store(store: Store, *, list_cases: bool) -> dict[str, Any]:
    """Region, grid, labels, sizes, and volumes by (data set, annotation, split); with ``list_cases`` each volume too."""
    counts = (
        store.select(["dataset", "annotation", "split", "num_tumors"])
        .group_by(["dataset", "annotation", "split"])
        .aggregate([([], "count_all"), ("num_tumors", "sum")])
    )
    groups = sorted(
        zip(
            *(counts.column(n).to_pylist() for n in ("dataset", "annotation", "split", "count_all", "num_tumors_sum")),
            strict=True,
        )
    )
    voxels = (
        store.column("shape_zyx").combine_chunks().flatten().to_numpy().astype(np.int64).reshape(-1, 3).prod(axis=1)
    )
    voxel_bytes = np.where(np.array(store.column("annotation").to_pylist(), dtype=str) == "none", 2, 3)
    document: dict[str, Any] = {
        "format": FORMAT,
        "region": store.region,
        "spacing_mm_zyx": list(store.spacing_mm_zyx),
        "labels": store.labels,
        "created_by": store.created_by,
        "num_volumes": len(store),
        "stored_mb": int(store.column("stored_bytes").to_numpy().sum()) / 1e6,
        "raw_mb": int((voxels * voxel_bytes).sum()) / 1e6,
        "groups": [{"dataset": d, "annotation": a, "split": s, "volumes": n, "tumors": t} for d, a, s, n, t in groups],
    }
    if list_cases:
        rows = store.select(
            ["case", "shape_zyx", "annotation", "split", "num_tumors", "tumor_diameters_mm"]
        ).to_pylist()
        document["cases"] = [
            {
                "case": r["case"],
                "shape_zyx": r["shape_zyx"],
                "annotation": r["annotation"],
                "split": r["split"],
                "num_tumors": r["num_tumors"],
                "largest_tumor_mm": max(r["tumor_diameters_mm"], default=None),
            }
            for r in rows
        ]
    return document
