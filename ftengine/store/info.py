"""A store described in plain values."""

from collections import Counter
from typing import Any

import numpy as np

from ftengine.store.layout import FORMAT
from ftengine.store.reader import Store


def describe_store(store: Store, *, list_cases: bool) -> dict[str, Any]:
    """Region, grid, labels, sizes, and volumes by (data set, annotation, split); with ``list_cases`` each volume too."""
    rows = store.index.select(
        ["case", "dataset", "annotation", "split", "shape_zyx", "num_tumors", "tumor_diameters_mm", "stored_bytes"]
    ).to_pylist()
    volumes = Counter((r["dataset"], r["annotation"], r["split"]) for r in rows)
    tumors: Counter[tuple[str, str, str]] = Counter()
    for r in rows:
        tumors[r["dataset"], r["annotation"], r["split"]] += r["num_tumors"]
    document: dict[str, Any] = {
        "format": FORMAT,
        "region": store.region,
        "spacing_mm_zyx": list(store.spacing_mm_zyx),
        "labels": store.labels,
        "created_by": store.created_by,
        "num_volumes": len(store),
        "stored_mb": sum(r["stored_bytes"] for r in rows) / 1e6,
        "raw_mb": sum(int(np.prod(r["shape_zyx"])) * (2 if r["annotation"] == "none" else 3) for r in rows) / 1e6,
        "groups": [
            {"dataset": d, "annotation": a, "split": s, "volumes": n, "tumors": tumors[d, a, s]}
            for (d, a, s), n in sorted(volumes.items())
        ],
    }
    if list_cases:
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
