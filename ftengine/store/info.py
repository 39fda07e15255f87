"""A store described in plain values."""

import math
from collections import Counter
from typing import Any

from ftengine.store.layout import FORMAT
from ftengine.store.reader import Store


def describe_store(store: Store, *, list_cases: bool) -> dict[str, Any]:
    """Region, grid, labels, sizes, and volumes by (data set, annotation, split); with ``list_cases`` each volume too."""
    names = ("dataset", "annotation", "split", "num_tumors", "stored_bytes")
    dataset, annotation, split, num_tumors, stored_bytes = (store.column(name).to_pylist() for name in names)
    shapes = [tuple(shape) for shape in store.column("shape_zyx").to_pylist()]
    volumes, tumors = Counter[tuple[str, str, str]](), Counter[tuple[str, str, str]]()
    for group, count in zip(zip(dataset, annotation, split, strict=True), num_tumors, strict=True):
        volumes[group] += 1
        tumors[group] += count
    bytes_per_voxel = (2 if kind == "none" else 3 for kind in annotation)
    document: dict[str, Any] = {
        "format": FORMAT,
        "region": store.region,
        "spacing_mm_zyx": list(store.spacing_mm_zyx),
        "labels": store.labels,
        "created_by": store.created_by,
        "num_volumes": len(store),
        "stored_mb": sum(stored_bytes) / 1e6,
        "raw_mb": sum(math.prod(n) * size for n, size in zip(shapes, bytes_per_voxel, strict=True)) / 1e6,
        "groups": [
            {"dataset": d, "annotation": a, "split": s, "volumes": n, "tumors": tumors[d, a, s]}
            for (d, a, s), n in sorted(volumes.items())
        ],
    }
    if list_cases:
        diameters = store.column("tumor_diameters_mm").to_pylist()
        columns = (store.cases, shapes, annotation, split, num_tumors, diameters)
        document["cases"] = [
            {
                "case": case,
                "shape_zyx": list(shape),
                "annotation": kind,
                "split": part,
                "num_tumors": count,
                "largest_tumor_mm": max(diameters_mm, default=None),
            }
            for case, shape, kind, part, count, diameters_mm in zip(*columns, strict=True)
        ]
    return document
