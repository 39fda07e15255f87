"""An index of 161,310 volumes: opening the store, drawing patches, describing it; and the whole conversion, simulated from measured costs."""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ftengine.bench.timing import environment, peak_bytes
from ftengine.config import Config
from ftengine.geometry import IntZYX
from ftengine.loader.plan import Plan
from ftengine.store import index
from ftengine.store.layout import chunks_per_axis, volume_path
from ftengine.store.reader import open_store
from ftengine.store.writer import Provenance, create_store, write_volume
from ftengine.volume.phantom import TumorSpec, make_phantom

NUM_VOLUMES = 161_310  # FreeTumor, Table A17
ANNOTATED_SHARE = 0.023  # 3,696 of them
NUM_DATASETS = 33
LIMITS = {"open_s": 1.0, "open_mb": 300.0, "draw_us": 50.0, "info_s": 5.0}
# Assumptions of the simulation: a mean volume of the paper's sets is not published. 512 x 512 slices, 150 of them, is the middle of
# chest CT at 2 mm and abdominal CT at 2.5 to 5 mm; the lower and upper case halve and double the slices.
SLICES = (75, 150, 300)
CORES = (1, 2, 16, 64, 256)
GZIP_BYTES_PER_VOXEL = 0.95  # of the phantoms of bench/convert.py
PARALLEL_EFFICIENCY = (
    0.85  # of the ideal: an assumption, what the goal of 1.7 for two workers means; not measured at these sizes
)


def example_rows(folder: Path, shapes_zyx: Sequence[IntZYX]) -> list[dict[str, Any]]:
    """Real index rows of converted abdomen phantoms, every second one with tumours."""
    region = Config.preset("abdomen").region
    location = create_store(folder / "examples.zarr", region)
    rows = []
    for number, shape in enumerate(shapes_zyx):
        phantom = make_phantom(
            "abdomen",
            seed=2,
            case=number,
            shape_zyx=shape,
            spacing_mm_zyx=region.spacing_mm_zyx,
            tumors=TumorSpec() if number % 2 == 0 else None,
        )
        provenance = Provenance("ct.nii.gz", "0" * 64, "label.nii.gz", "1" * 64, source_stat="2" * 32, conversion="{}")
        grid = phantom.grid
        rows.append(
            write_volume(location, f"b/{number}", phantom.image_hu, phantom.label, grid, grid, region, provenance)
        )
    return rows


Vary: TypeAlias = Callable[[dict[str, Any], str, np.random.Generator], dict[str, Any]]


def synthetic_index(
    store: Path, examples: Sequence[dict[str, Any]], num_volumes: int, *, vary: Vary | None = None
) -> dict[str, float]:
    """Fill a store's compacted index with ``num_volumes`` rows: lists of the examples, with voxel counts and anchors drawn anew.

    vary: makes the row of a case's name from an example instead.
    """
    vary = vary or _vary
    rng = np.random.default_rng(0)
    create_store(store, Config.preset("abdomen").region)
    names = sorted(f"set{n % NUM_DATASETS:02d}/case_{n:06d}" for n in range(num_volumes))
    entries = [sum(len(c["chunk"]) for c in row["class_chunks"]) for row in examples]
    with (
        (store / index.COMPACTED).open("wb") as stream,
        pq.ParquetWriter(stream, index.SCHEMA, compression="zstd") as out,
    ):
        for start in range(0, num_volumes, index.ROW_GROUP):
            rows = [
                vary(examples[int(rng.integers(len(examples)))], name, rng)
                for name in names[start : start + index.ROW_GROUP]
            ]
            out.write_table(pa.Table.from_pylist(rows, schema=index.SCHEMA), row_group_size=index.ROW_GROUP)
    return {
        "index_mb": (store / index.COMPACTED).stat().st_size / 1e6,
        "labelled_chunks_per_row": statistics.mean(entries),
        "chunks_per_row": statistics.mean(float(np.prod(chunks_per_axis(tuple(r["shape_zyx"])))) for r in examples),
    }


def _vary(example: dict[str, Any], name: str, rng: np.random.Generator) -> dict[str, Any]:
    tumor = rng.random() < ANNOTATED_SHARE
    classes = []
    for entry in example["class_chunks"]:
        count = len(entry["chunk"])
        classes.append(
            {
                "value": entry["value"],
                "chunk": entry["chunk"],
                "voxels": np.minimum(np.asarray(entry["voxels"]) + rng.integers(0, 50, count), 32**3).astype(np.int32),
                "anchor": rng.integers(0, 32**3, count).astype(np.uint16),
            }
        )
    return {
        **example,
        "case": name,
        "dataset": name.split("/", maxsplit=1)[0],
        "path": volume_path(name),
        "source_sha256": rng.bytes(32).hex(),
        "label_sha256": rng.bytes(32).hex(),
        "source_stat": rng.bytes(16).hex(),
        "annotation": "tumor" if tumor else "organ",
        "class_chunks": classes,
    }


# what a user's own program does: nothing but the package is imported
_OPEN = """
import json, sys, time
import ftengine
ftengine.open_store
peak_mb = lambda: int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1e3
imports_mb, started = peak_mb(), time.perf_counter()
store = ftengine.open_store(sys.argv[1])
print(json.dumps({"s": time.perf_counter() - started, "rows": len(store), "imports_mb": imports_mb, "peak_mb": peak_mb()}))
"""


def measure_draws(store: str, draws: int) -> dict[str, float]:
    """Patch requests of random addresses, after the first 2,000; the plan is made and warmed before."""
    opened = open_store(store)
    config = Config.preset("abdomen")
    started = time.perf_counter()
    plan = Plan(config, opened, mix="mixed")
    plan.request(0, 0)
    plan_s = time.perf_counter() - started
    rng = np.random.default_rng(1)
    addresses = rng.integers(0, plan.batches_per_epoch * plan.batch_size, draws + 2000).tolist()
    samples = []
    for address in addresses:
        started = time.perf_counter()
        plan.request(0, address)
        samples.append(time.perf_counter() - started)
    samples_us = np.array(samples[2000:]) * 1e6
    median, high = np.percentile(samples_us, (50, 95))
    return {"us": float(median), "p95_us": float(high), "plan_s": plan_s, "peak_mb": peak_bytes() / 1e6}


def _run_apart(temporary: Path, *arguments: str) -> dict[str, float]:
    """Run Python with its own temporary folder: a cache of lists left by an earlier run must not make the first plan look fast."""
    environ = os.environ | {"TMPDIR": str(temporary)}
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True, env=environ)  # noqa: S603 - this very module
    result: dict[str, float] = json.loads(done.stdout)
    return result


def _open_apart(store: Path) -> dict[str, float]:
    return _run_apart(store.parent, "-c", _OPEN, str(store))


def _draw_apart(store: Path, draws: int) -> dict[str, float]:
    return _run_apart(store.parent, "-m", "ftengine.bench.scale", "--measure-draws", str(store), "--draws", str(draws))


def _info_s(store: Path) -> float:
    started = time.perf_counter()
    command = [sys.executable, "-m", "ftengine.cli.main", "store", "info", str(store), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603 - the command measured
    seconds = time.perf_counter() - started
    if json.loads(done.stdout)["num_volumes"] < 1:
        raise AssertionError("the store that was described is empty: nothing was measured")
    return seconds


def simulate(seconds_per_mvox: float, stored_bytes_per_mvox: float, num_volumes: int) -> list[dict[str, Any]]:
    """Hours and terabytes of converting ``num_volumes`` of 512 x 512 x SLICES, from measured costs per million voxels of the file.

    seconds_per_mvox: of one core. Cores beyond one do PARALLEL_EFFICIENCY of their share; the disks are assumed to keep up.
    """
    results = []
    for slices in SLICES:
        mvox = 512 * 512 * slices / 1e6
        hours = seconds_per_mvox * mvox * num_volumes / 3600
        results.append(
            {
                "slices": slices,
                "hours": {n: hours if n == 1 else hours / (n * PARALLEL_EFFICIENCY) for n in CORES},
                "store_tb": stored_bytes_per_mvox * mvox * num_volumes / 1e12,
                "read_tb": GZIP_BYTES_PER_VOXEL * mvox * 1e6 * num_volumes / 1e12,
            }
        )
    return results


def run(
    *,
    num_volumes: int = NUM_VOLUMES,
    example_shapes: Sequence[IntZYX] = ((167, 256, 256), (133, 256, 256), (240, 234, 234), (100, 267, 267)),
    draws: int = 20_000,
    rounds: int = 3,
    costs: tuple[float, float] | None = None,
    as_json: bool = False,
) -> dict[str, Any]:
    """Build the index, measure in fresh processes, print. costs: seconds and stored bytes per million voxels of a file, for the simulation."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store = folder / "scale.zarr"
        started = time.perf_counter()
        sizes = synthetic_index(store, example_rows(folder, example_shapes), num_volumes)
        build_s = time.perf_counter() - started
        first = _draw_apart(store, draws)  # fills the cache of lists
        opened, drawn, info_s = [], [], []
        for _ in range(rounds):
            opened.append(_open_apart(store))
            drawn.append(_draw_apart(store, draws))
            info_s.append(_info_s(store))
        if any(s["rows"] != num_volumes for s in opened):
            raise AssertionError("the store that was opened does not hold all rows: nothing was measured")
    document = {
        "title": f"an index of {num_volumes:,} volumes",
        "environment": environment(),
        "num_volumes": num_volumes,
        **sizes,
        "build_s": build_s,
        "first_plan_s": first["plan_s"],
        "open_s": statistics.median(s["s"] for s in opened),
        "open_mb": statistics.median(s["peak_mb"] for s in opened),
        "imports_mb": statistics.median(s["imports_mb"] for s in opened),
        "draw_us": statistics.median(s["us"] for s in drawn),
        "draw_p95_us": statistics.median(s["p95_us"] for s in drawn),
        "plan_s": statistics.median(s["plan_s"] for s in drawn),
        "draws_mb": statistics.median(s["peak_mb"] for s in drawn),
        "info_s": statistics.median(info_s),
        "samples": {"open": opened, "draws": drawn, "info_s": info_s},
        "conversion": None if costs is None else simulate(*costs, NUM_VOLUMES),
    }
    print(json.dumps(document, indent=2) if as_json else _as_text(document))
    return document


def _as_text(document: dict[str, Any]) -> str:
    lines = [
        f"### {document['title']}",
        "",
        (
            f"index.parquet {document['index_mb']:.0f} MB; {document['labelled_chunks_per_row']:.0f} labelled of "
            f"{document['chunks_per_row']:.0f} chunks a row; built in {document['build_s']:.0f} s; first plan {document['first_plan_s']:.1f} s, "
            f"later ones {document['plan_s']:.2f} s"
        ),
        "",
        "| what | median | limit |",
        "|---|---|---|",
    ]
    lines += [f"| {name} | {document[name]:.3g} | {limit:g} |" for name, limit in LIMITS.items()]
    lines += [f"| {name} | {document[name]:.3g} | |" for name in ("imports_mb", "draw_p95_us", "draws_mb")]
    if document["conversion"]:
        lines += ["", _simulation_table(document["conversion"])]
    return "\n".join(lines)


def _simulation_table(results: list[dict[str, Any]]) -> str:
    lines = [
        "| slices of 512 x 512 | " + " | ".join(f"hours, {n} cores" for n in CORES) + " | store TB | files TB (gzip) |",
        "|---|" + "---|" * (len(CORES) + 2),
    ]
    for row in results:
        hours = " | ".join(f"{row['hours'][n]:.1f}" for n in CORES)
        lines.append(f"| {row['slices']} | {hours} | {row['store_tb']:.2f} | {row['read_tb']:.1f} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """``ftengine bench scale``."""
    parser = argparse.ArgumentParser(prog="ftengine bench scale", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--draws", type=int, default=20_000)
    parser.add_argument("--volumes", type=int, default=NUM_VOLUMES)
    parser.add_argument(
        "--costs", nargs=2, type=float, metavar=("S", "BYTES"), help="per million voxels, of bench/convert.py"
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--measure-draws", metavar="STORE", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.measure_draws:
        print(json.dumps(measure_draws(options.measure_draws, options.draws)))
        return
    costs = None if options.costs is None else (options.costs[0], options.costs[1])
    run(num_volumes=options.volumes, draws=options.draws, rounds=options.rounds, costs=costs, as_json=options.json)


if __name__ == "__main__":
    main()
