"""The loader beside those of MONAI, nnU-Net and TorchIO over the same phantoms; what a read costs, how fast a step may be, slow storage, memory.

Every candidate runs in a process of its own that sleeps between its turns; a turn takes batches that do not count until everything made
ahead is used up, then counts for some seconds. Figures are medians over rounds in which every candidate had one turn. ``CPU ms`` are those
of the process with all its workers. Volumes are healthy phantoms, so every patch that holds an organ is painted.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from ftengine.bench import slow_s3
from ftengine.bench.loader_parts import OUR_MODES, WARM_BATCHES, apart, command
from ftengine.bench.loader_report import as_text, draw_chart, figures
from ftengine.bench.peers import PEERS, Setup
from ftengine.bench.peers.process import Child
from ftengine.bench.phantoms import draw, write_store
from ftengine.bench.timing import environment
from ftengine.config import Config
from ftengine.errors import ConfigError
from ftengine.geometry import IntZYX

VOLUME_ZYX: IntZYX = (200, 256, 256)
PATCH_ZYX: IntZYX = (96, 96, 96)
NUM_ROWS = 161_310
_LEAST_BATCHES = 16


def make_sources(folder: Path, count: int, shape_zyx: IntZYX) -> tuple[Path, Path]:
    """The same healthy phantoms as a store and as ``.nii.gz`` files: (store, folder of files); what is there is kept."""
    from ftengine.volume.nifti import write_nifti

    region = Config.preset("abdomen").region
    store = write_store(folder / "store.zarr", region, [shape_zyx] * count, with_tumors=False)
    files = folder / "nifti"
    files.mkdir(exist_ok=True)
    for case in range(count):
        label = files / f"p{case}_label.nii.gz"
        if not label.exists():
            phantom = draw(case, shape_zyx, region, with_tumors=False)
            write_nifti(files / f"p{case}_ct.nii.gz", phantom.image_hu, phantom.grid)
            write_nifti(label, phantom.label, phantom.grid)
    return store, files


def _start(name: str, part: str, options: Mapping[str, Any], environ: Mapping[str, str] | None = None) -> Child:
    return Child(name, command(part, options), environ=environ)


def fastest(name: str, setups: Sequence[Setup], *, seconds: float) -> tuple[Child, dict[str, float]]:
    """The peer with the number of workers that is fastest here: its process, and patches a second of every number."""
    rates: dict[str, float] = {}
    best: Child | None = None
    for setup in setups:
        child = _start(name, "peer", json.loads(setup.to_json()))
        turn = child.run(seconds=seconds, batches=_LEAST_BATCHES, warm=WARM_BATCHES)
        rates[str(setup.workers)] = turn["patches"] / turn["s"]
        if best is None or rates[str(setup.workers)] == max(rates.values()):
            best, child = child, best
        if child is not None:
            child.close()
    assert best is not None  # noqa: S101 - every peer has a number of workers
    return best, rates


def rates(
    store: Path,
    files: Path,
    work: Path,
    *,
    peers: Sequence[str],
    modes: Sequence[str],
    patch_zyx: IntZYX,
    batch_size: int,
    rounds: int,
    seconds: float,
    assignments: Sequence[str] = (),
) -> dict[str, Any]:
    """Patches a second and CPU ms a patch of every candidate, by round."""
    tried: dict[str, dict[str, float]] = {}
    described: dict[str, Any] = {}
    samples: dict[str, list[dict[str, float]]] = {}
    with ExitStack() as stack:
        children: list[Child] = []
        ours = {"store": str(store), "patch_zyx": patch_zyx, "batch_size": batch_size, "set": list(assignments)}
        for mode in modes:
            children.append(_start(f"ftengine, {mode}", "ours", {**ours, "mode": mode}))
            stack.callback(children[-1].close)
        for peer in peers:
            for mode in ("crops", "augmented"):
                setups = [
                    Setup(peer, mode, str(files), str(work / peer), patch_zyx, batch_size, workers)  # type: ignore[arg-type]  # the two modes
                    for workers in PEERS[peer][1]
                ]
                child, tried[f"{peer}, {mode}"] = fastest(f"{peer}, {mode}", setups, seconds=seconds)
                stack.callback(child.close)
                children.append(child)
        for _ in range(rounds):
            for child in children:
                turn = child.run(seconds=seconds, batches=_LEAST_BATCHES, warm=WARM_BATCHES)
                samples.setdefault(child.name, []).append({k: turn[k] for k in ("s", "cpu_s", "patches")})
                described[child.name] = {k: v for k, v in turn.items() if k not in {"s", "cpu_s", "patches"}}
        checked = {child.name: child.description["checked"] for child in children}
    return {
        "rows": {
            name: {
                "patches_per_s": statistics.median(s["patches"] / s["s"] for s in kept),
                "cpu_ms_a_patch": statistics.median(1e3 * s["cpu_s"] / s["patches"] for s in kept),
                "samples": kept,
                "checked": checked[name],
                **described[name],
            }
            for name, kept in samples.items()
        },
        "workers_tried": tried,
    }


def slow_storage(
    store: Path,
    *,
    delay_ms: float,
    in_flight: Sequence[int],
    patch_zyx: IntZYX,
    batch_size: int,
    rounds: int,
    seconds: float,
    assignments: Sequence[str],
) -> dict[str, Any]:
    """Patches a second from S3 without and with a delay on every request, by reads in flight, interleaved."""
    options = {"store": f"s3://{slow_s3.BUCKET}", "mode": "crops", "patch_zyx": patch_zyx, "batch_size": batch_size}
    samples: dict[str, list[float]] = {}
    with ExitStack() as stack:
        server = stack.enter_context(slow_s3.serving(store))
        children = []
        for delay in (0.0, delay_ms):
            port = stack.enter_context(slow_s3.delayed(server, delay))
            for count in in_flight:
                sets = [f"loader.reads_in_flight={count}", *assignments]
                child = _start(
                    f"{delay:g} ms | {count}", "ours", {**options, "set": sets}, slow_s3.environment_for(port)
                )
                stack.callback(child.close)
                children.append(child)
        for _ in range(rounds):
            for child in children:
                # what was read ahead must be used up before the clock runs
                warm = max(WARM_BATCHES, 2 * max(in_flight) // batch_size)
                turn = child.run(seconds=seconds, batches=_LEAST_BATCHES, warm=warm)
                samples.setdefault(child.name, []).append(turn["patches"] / turn["s"])
    medians = {name: statistics.median(kept) for name, kept in samples.items()}
    undelayed = max(rate for name, rate in medians.items() if name.startswith("0 ms"))
    return {
        "delay_ms": delay_ms,
        "patches_per_s": medians,
        "samples": samples,
        "share_of_undelayed": {
            name.split(" | ")[1]: rate / undelayed for name, rate in medians.items() if not name.startswith("0 ms")
        },
    }


def replicated_index(folder: Path, store: Path, num_rows: int) -> Path:
    """A store of ``num_rows`` rows whose volumes are links to those of ``store``; its lists are the true ones."""
    from ftengine.bench import scale
    from ftengine.store.layout import volume_path
    from ftengine.store.reader import open_store

    rows = open_store(store).index.to_pylist()
    place = folder / "replicated.zarr"

    def linked(row: dict[str, Any], name: str, _rng: np.random.Generator) -> dict[str, Any]:
        link = place / volume_path(name)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to((store / row["path"]).resolve())
        return {**row, "case": name, "dataset": name.split("/", maxsplit=1)[0], "path": volume_path(name)}

    scale.synthetic_index(place, rows, num_rows, vary=linked)
    return place


def run(
    *,
    peers: Sequence[str] = (),
    modes: Sequence[str] = ("crops", "augmented", "painted"),
    work: Path | None = None,
    volumes: int = 4,
    shape_zyx: IntZYX = VOLUME_ZYX,
    patch_zyx: IntZYX = PATCH_ZYX,
    batch_size: int = 4,
    rounds: int = 5,
    seconds: float = 3.0,
    reads: int = 0,
    step_ms: Sequence[float] = (),
    delay_ms: float | None = None,
    in_flight: Sequence[int] = (16, 64),
    soak_batches: int = 0,
    num_rows: int = NUM_ROWS,
    plan_patches: int = 0,
    first: bool = False,
    assignments: Sequence[str] = (),
    chart: Path | None = None,
    as_json: bool = False,
) -> dict[str, Any]:
    """Measure what is asked for, print, return. work: a folder where phantoms and caches are kept; None: a temporary one."""
    document: dict[str, Any] = {
        "title": f"loader, {volumes} phantoms of {shape_zyx}, patch {patch_zyx}, batch {batch_size}",
        "environment": environment(),
        "volume_zyx": shape_zyx,
        "patch_zyx": patch_zyx,
        "batch_size": batch_size,
        "set": list(assignments),
    }
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) if work is None else work
        folder.mkdir(parents=True, exist_ok=True)
        store, files = make_sources(folder, volumes, shape_zyx)
        common = {"patch_zyx": patch_zyx, "batch_size": batch_size, "set": list(assignments)}
        ours = {"store": str(store), **common}
        if modes:
            document["rates"] = rates(
                store,
                files,
                folder,
                peers=peers,
                modes=modes,
                patch_zyx=patch_zyx,
                batch_size=batch_size,
                rounds=rounds,
                seconds=seconds,
                assignments=assignments,
            )
        if reads:
            with tempfile.TemporaryDirectory() as blosc:
                document["reads"] = apart("reads", {**ours, "work": blosc, "patches": reads, "rounds": rounds})
        if step_ms:
            by_mode = {
                m: apart("waits", {**ours, "mode": m, "step_ms": list(step_ms), "batches": 50})
                for m in modes or ["painted"]
            }
            document["step_ms"] = by_mode
        if first:
            turns = [apart("first", {**ours, "mode": "painted", "started": time.time()}) for _ in range(rounds)]
            document["first_batch"] = {
                "s": statistics.median(t["s"] for t in turns),
                "since_process_start_s": statistics.median(t["since_process_start_s"] for t in turns),
                "samples": turns,
            }
        if delay_ms is not None:
            document["slow_storage"] = slow_storage(
                store,
                delay_ms=delay_ms,
                in_flight=in_flight,
                patch_zyx=patch_zyx,
                batch_size=batch_size,
                rounds=rounds,
                seconds=seconds,
                assignments=assignments,
            )
        if soak_batches or plan_patches:
            with tempfile.TemporaryDirectory() as name:
                many = {**common, "store": str(replicated_index(Path(name), store, num_rows)), "mode": "painted"}
                document["num_rows"] = num_rows
                if plan_patches:
                    document["plan"] = apart("plan", {**many, "patches": plan_patches})
                if soak_batches:
                    document["soak"] = apart("soak", {**many, "batches": soak_batches})
    document["figures"] = figures(document)
    if chart is not None and "rates" in document:
        draw_chart(document, chart)
    print(json.dumps(document, indent=2) if as_json else as_text(document))
    return document


def main(arguments: Sequence[str] | None = None) -> None:
    """``ftengine bench loader``."""
    parser = argparse.ArgumentParser(prog="ftengine bench loader", description=__doc__.splitlines()[0])
    parser.add_argument("--peer", nargs="+", choices=[*PEERS, "all"], default=[], help="other loaders (extra 'peers')")
    parser.add_argument("--mode", nargs="+", choices=OUR_MODES, default=["crops", "augmented", "painted"])
    parser.add_argument("--no-rates", action="store_true", help="only what the other options ask for")
    parser.add_argument("--work", type=Path, help="folder where phantoms and caches are kept between runs")
    parser.add_argument("--volumes", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="least length of a turn")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--reads", type=int, default=0, metavar="PATCHES", help="read cost beside blosc2, e.g. 100")
    parser.add_argument("--step-ms", type=float, nargs="+", default=[], help="lengths of a simulated device step")
    parser.add_argument("--delay-ms", type=float, help="S3 with this delay added to each request, e.g. 20")
    parser.add_argument(
        "--in-flight", type=int, nargs="+", default=[16, 64], help="loader.reads_in_flight for --delay-ms"
    )
    parser.add_argument("--soak", type=int, default=0, metavar="BATCHES", help="memory over many batches, e.g. 10000")
    parser.add_argument("--plan", type=int, default=0, metavar="PATCHES", help="requests without reads, e.g. 1000000")
    parser.add_argument("--rows", type=int, default=NUM_ROWS, help="rows of the index for --soak and --plan")
    parser.add_argument("--first", action="store_true", help="time to the first batch")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="of our configuration")
    parser.add_argument("--chart", type=Path, metavar="FILE", help="patches a second as a PNG")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    if options.no_rates and options.peer:
        raise ConfigError("--no-rates with --peer: peers are only measured by their rates; leave one of the two out.")
    run(
        peers=list(PEERS) if "all" in options.peer else options.peer,
        modes=() if options.no_rates else options.mode,
        work=options.work,
        volumes=options.volumes,
        batch_size=options.batch,
        rounds=options.rounds,
        seconds=options.seconds,
        reads=options.reads,
        step_ms=options.step_ms,
        delay_ms=options.delay_ms,
        in_flight=options.in_flight,
        soak_batches=options.soak,
        num_rows=options.rows,
        plan_patches=options.plan,
        first=options.first,
        assignments=options.set,
        chart=options.chart,
        as_json=options.json,
    )


if __name__ == "__main__":
    main()
