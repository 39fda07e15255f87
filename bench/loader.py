"""The loader beside those of MONAI, nnU-Net and TorchIO over the same phantoms; what a read costs, how fast a step may be, slow storage, memory.

Every candidate runs in a process of its own that sleeps between its turns; a turn takes batches that do not count until everything made
ahead is used up, then counts for some seconds. Figures are medians over rounds in which every candidate had one turn. ``CPU ms`` are those
of the process with all its workers. Volumes are healthy phantoms, so every patch that holds an organ is painted.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from ftengine.bench import slow_s3
from ftengine.bench.peers import PEERS, Batches, Setup, batches_of
from ftengine.bench.peers.process import Child, serve
from ftengine.bench.phantoms import draw, write_store
from ftengine.bench.timing import environment, peak_bytes
from ftengine.config import Config
from ftengine.errors import ConfigError
from ftengine.geometry import IntZYX, int_zyx

GOALS = {
    "crops, times nnU-Net": 2.0,
    "painted, times MONAI PersistentDataset augmented": 10.0,
    "painted, times nnU-Net augmented": 10.0,
    "read cost of blosc2": 1.25,
    "share of the undelayed rate": 0.8,
    "memory growth": 0.05,
    "peak_gb": 1.5,
    "first_batch_s": 5.0,
    "plan_s": 60.0,
    "wait_share": 0.01,
}
VOLUME_ZYX: IntZYX = (200, 256, 256)
PATCH_ZYX: IntZYX = (96, 96, 96)
OUR_MODES = ("crops", "augmented", "painted", "networks")
_NO_AUGMENTATION = {f"augment.{name}_probability": 0.0 for name in ("flip", "rot90", "scale", "shift")}
_WARM_BATCHES, _LEAST_BATCHES = 16, 16
_BISECTIONS = 3
_EARLY_BATCHES = 500
NUM_ROWS = 161_310


# ---- our own candidate ----


def config_of(mode: str, patch_zyx: IntZYX, batch_size: int, assignments: Sequence[str] = ()) -> Config:
    """The preset without a device, for one of OUR_MODES."""
    config = Config.preset("abdomen").with_overrides(
        {
            "device": "cpu",
            "region.patch_zyx": patch_zyx,
            "training.batch_size": batch_size,
            "loader.patches_per_epoch": 1 << 24,
            "qc.min_pass_rate": 0.0,
            **(_NO_AUGMENTATION if mode == "crops" else {}),
        }
    )
    return _allowing_absent_classes(config).with_assignments(assignments)


def _allowing_absent_classes(config: Config) -> Config:
    """Healthy phantoms hold no tumour class, which newer versions refuse unless told."""
    keys = type(config.loader).model_fields
    return config.with_overrides({"loader.absent_classes": "allow"}) if "absent_classes" in keys else config


def our_loader(options: Mapping[str, Any]) -> Any:
    """The loader of a part's options: store, mode, patch_zyx, batch_size, set."""
    from ftengine.assemble import build_judge, build_loader, build_synthesis_stage
    from ftengine.store.reader import open_store

    mode = options["mode"]
    config = config_of(mode, int_zyx(options["patch_zyx"]), options["batch_size"], options["set"])
    stages: tuple[Any, ...] = ()
    if mode == "painted":
        stages = (build_synthesis_stage(config, None, None),)
    elif mode == "networks":
        from ftengine.training.networks import build_generator, build_segmenter

        generator = build_generator(config).eval().requires_grad_(requires_grad=False)
        segmenter = build_segmenter(config).eval().requires_grad_(requires_grad=False)
        stages = (build_synthesis_stage(config, generator, build_judge(config, segmenter)),)
    return build_loader(config, open_store(options["store"]), mix="mixed", stages=stages)


class Counted:
    """Batches of our loader as (image, label), with the painted patches counted."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader
        self.patches = self.painted = 0

    def batches(self) -> Batches:
        """Endless."""
        while True:
            for batch in self._loader:
                self.patches += len(batch.records)
                self.painted += sum(r.painted is not None for r in batch.records)
                yield batch.image, batch.label

    def describe(self) -> dict[str, Any]:
        """What the parent is told with each turn."""
        return {"painted_share": self.painted / max(1, self.patches), "busy_s": self._loader.clock.seconds()}


def serve_ours(options: Mapping[str, Any]) -> None:
    """Part: our loader as a candidate."""
    counted = Counted(our_loader(options))
    serve(counted.batches(), int_zyx(options["patch_zyx"]), counted.describe)


def serve_peer(options: Mapping[str, Any]) -> None:
    """Part: a peer as a candidate."""
    setup = Setup.from_json(json.dumps(options))
    serve(batches_of(setup), setup.patch_zyx)


# ---- parts that run alone in a fresh process ----


def first_batch(options: Mapping[str, Any]) -> dict[str, float]:
    """Part: seconds from opening the store to the first batch, and since the process began."""
    import ftengine.assemble  # noqa: F401 - a training program has imported it before it starts

    started = time.perf_counter()
    with our_loader(options) as loader:
        next(iter(loader))
        seconds = time.perf_counter() - started
    return {"s": seconds, "since_process_start_s": time.time() - options["started"]}


def plan_only(options: Mapping[str, Any]) -> dict[str, float]:
    """Part: requests of many patches, no reads."""
    with our_loader(options) as loader:
        plan = loader.plan
        started, patches, step, volumes = time.perf_counter(), 0, 0, set()
        while patches < options["patches"]:
            requests = plan.batch(0, step)
            volumes.add(requests[0].case)
            patches, step = patches + len(requests), step + 1
        seconds = time.perf_counter() - started
    return {"s": seconds, "patches": patches, "volumes_met": len(volumes), "peak_gb": peak_bytes() / 1e9}


def soak(options: Mapping[str, Any]) -> dict[str, Any]:
    """Part: resident memory over many batches."""
    resident_mb: list[tuple[int, float]] = []
    every = max(1, options["batches"] // 40)
    early = min(_EARLY_BATCHES, options["batches"] // 2)
    started, done = time.perf_counter(), 0
    with our_loader(options) as loader:
        while done < options["batches"]:
            for _ in loader:
                done += 1
                if done % every == 0 or done in {early, options["batches"]}:
                    resident_mb.append((done, resident_bytes() / 1e6))
                if done == options["batches"]:
                    break
    after = dict(resident_mb)
    growth = after[options["batches"]] / after[early] - 1
    return {
        "batches": done,
        "early": early,
        "early_mb": after[early],
        "late_mb": after[done],
        "growth": growth,
        # the kernel's own peak lags behind by what its threads have not yet reported
        "peak_gb": max(peak_bytes() / 1e9, max(mb for _, mb in resident_mb) / 1e3),
        "s": time.perf_counter() - started,
        "resident_mb": resident_mb,
    }


def resident_bytes() -> int:
    """Memory of this process that is resident now."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def waits(options: Mapping[str, Any]) -> dict[str, Any]:
    """Part: share of the time that a consumer waits whose step is a sleep, for each step asked for, and the shortest that waits little.

    Between the longest step that waits too much and the shortest that does not, a few more are tried, each half-way.
    """
    counted = Counted(our_loader(options))
    source = counted.batches()
    shares: dict[float, float] = {}

    def measure(step_ms: float) -> bool:
        for _ in range(_WARM_BATCHES):
            next(source)
            time.sleep(step_ms / 1e3)
        waited, started = 0.0, time.perf_counter()
        for _ in range(options["batches"]):
            asked = time.perf_counter()
            next(source)
            waited += time.perf_counter() - asked
            time.sleep(step_ms / 1e3)
        shares[step_ms] = waited / (time.perf_counter() - started)
        return shares[step_ms] < GOALS["wait_share"]

    for step_ms in sorted(options["step_ms"]):
        measure(step_ms)
    for _ in range(_BISECTIONS):
        enough = [ms for ms, share in shares.items() if share < GOALS["wait_share"]]
        short = [
            ms for ms, share in shares.items() if share >= GOALS["wait_share"] and (not enough or ms < min(enough))
        ]
        if not enough or not short:
            break
        measure((min(enough) + max(short)) / 2)
    enough = [ms for ms, share in shares.items() if share < GOALS["wait_share"]]
    return {
        "shares": {f"{ms:g}": shares[ms] for ms in sorted(shares)},
        "shortest_ms": min(enough, default=None),
        **counted.describe(),
    }


def read_cost(options: Mapping[str, Any]) -> dict[str, Any]:
    """Part: CPU ms of a patch (image and label) by our store and by blosc2 at nnU-Net's chunks, interleaved, one thread and two."""
    import blosc2

    from ftengine.bench.peers.nnunet import write_case
    from ftengine.store.reader import open_store

    store, patch = open_store(options["store"]), int_zyx(options["patch_zyx"])
    cases = store.cases
    folder = Path(options["work"])
    for number, case in enumerate(cases):
        volume = store.read_volume(case)
        write_case(folder, str(number), volume.image, volume.label, patch, sorted(store.labels.values())[1:])
    blosc2.set_nthreads(1)

    def opened(number: int) -> list[Any]:
        files = (folder / f"{number}.b2nd", folder / f"{number}_seg.b2nd")
        return [blosc2.open(urlpath=str(f), mode="r", mmap_mode="r", dparams={"nthreads": 1}) for f in files]

    kept = [opened(number) for number in range(len(cases))]
    rng = np.random.default_rng(0)
    boxes = [
        (
            n % len(cases),
            int_zyx(
                int(rng.integers(0, s - p + 1))
                for s, p in zip(store.shape_zyx(cases[n % len(cases)]), patch, strict=True)
            ),
        )
        for n in range(options["patches"])
    ]

    def by_us(place: tuple[int, IntZYX]) -> tuple[Any, Any]:
        read = store.read(cases[place[0]], place[1], patch)
        return read.image, read.label

    def sliced(arrays: Sequence[Any], origin: IntZYX) -> tuple[Any, Any]:
        where = (0, *(slice(o, o + n) for o, n in zip(origin, patch, strict=True)))
        return arrays[0][where], arrays[1][where]

    readers: dict[str, Callable[[tuple[int, IntZYX]], tuple[Any, Any]]] = {
        "ftengine store": by_us,
        "blosc2, arrays kept open": lambda place: sliced(kept[place[0]], place[1]),
        "blosc2, opened for each patch": lambda place: sliced(opened(place[0]), place[1]),
    }
    for place in boxes[:4]:
        for a, b in zip(by_us(place), readers["blosc2, arrays kept open"](place), strict=True):
            if not np.array_equal(a, b):
                raise AssertionError("the two stores hold other voxels: nothing to time")
    samples: dict[str, list[dict[str, float]]] = {}
    for threads in (1, 2):
        with ThreadPoolExecutor(threads) as pool:
            for turn in range(options["rounds"] + 1):
                for name, read in readers.items():
                    cpu, wall = time.process_time(), time.perf_counter()
                    for _ in pool.map(read, boxes):
                        pass
                    sample = {
                        "cpu_ms": (time.process_time() - cpu) * 1e3 / len(boxes),
                        "wall_ms": (time.perf_counter() - wall) * 1e3 / len(boxes),
                    }
                    if turn:  # the first warms up
                        samples.setdefault(f"{name} | {threads}", []).append(sample)
    sizes = {
        "store": sum(f.stat().st_size for f in (Path(options["store"]) / "volumes").rglob("*") if f.is_file()),
        "blosc2": sum(f.stat().st_size for f in folder.glob("*.b2nd")),
    }
    shape = {
        "chunks": kept[0][0].chunks,
        "blocks": kept[0][0].blocks,
        "label_chunks": kept[0][1].chunks,
        "label_blocks": kept[0][1].blocks,
    }
    return {"patches": len(boxes), "samples": samples, "bytes": sizes, "blosc2": shape}


PARTS: Mapping[str, Callable[[Mapping[str, Any]], dict[str, Any] | None]] = {
    "ours": serve_ours,
    "peer": serve_peer,
    "first": first_batch,
    "plan": plan_only,
    "soak": soak,
    "waits": waits,
    "reads": read_cost,
}


def _command(part: str, options: Mapping[str, Any]) -> list[str]:
    return ["-m", "ftengine.bench.loader", "--part", part, json.dumps(options)]


def apart(part: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Run a part in a fresh process; AssertionError with the end of its stderr where it fails."""
    done = subprocess.run(  # noqa: S603 - this very module
        [sys.executable, *_command(part, options)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise AssertionError(f"{part} failed:\n{done.stderr[-4000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


# ---- what is measured ----


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
    return Child(name, _command(part, options), environ=environ)


def fastest(name: str, setups: Sequence[Setup], *, seconds: float) -> tuple[Child, dict[str, float]]:
    """The peer with the number of workers that is fastest here: its process, and patches a second of every number."""
    rates: dict[str, float] = {}
    best: Child | None = None
    for setup in setups:
        child = _start(name, "peer", json.loads(setup.to_json()))
        turn = child.run(seconds=seconds, batches=_LEAST_BATCHES, warm=_WARM_BATCHES)
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
                turn = child.run(seconds=seconds, batches=_LEAST_BATCHES, warm=_WARM_BATCHES)
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
                warm = max(_WARM_BATCHES, 2 * max(in_flight) // batch_size)
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


# ---- what is printed ----


def figures(document: Mapping[str, Any]) -> dict[str, float]:
    """The figures that the goals are about, by the goal's name; what was not measured is left out."""
    found: dict[str, float] = {}
    rows = document.get("rates", {}).get("rows", {})

    def times(goal: str, ours: str, theirs: str) -> None:
        if ours in rows and theirs in rows:
            found[goal] = rows[ours]["patches_per_s"] / rows[theirs]["patches_per_s"]

    times("crops, times nnU-Net", "ftengine, crops", "nnunet, crops")
    times("painted, times MONAI PersistentDataset augmented", "ftengine, painted", "monai-persistent, augmented")
    times("painted, times nnU-Net augmented", "ftengine, painted", "nnunet, augmented")
    if "reads" in document:
        cost = read_medians(document["reads"])
        found["read cost of blosc2"] = max(
            cost[f"ftengine store | {n}"] / cost[f"blosc2, arrays kept open | {n}"] for n in (1, 2)
        )
    if "slow_storage" in document:
        found["share of the undelayed rate"] = max(document["slow_storage"]["share_of_undelayed"].values())
    if "soak" in document:
        found["memory growth"], found["peak_gb"] = document["soak"]["growth"], document["soak"]["peak_gb"]
    if "first_batch" in document:
        found["first_batch_s"] = document["first_batch"]["s"]
    if "plan" in document:
        found["plan_s"] = document["plan"]["s"]
    return found


def read_medians(reads: Mapping[str, Any], what: str = "cpu_ms") -> dict[str, float]:
    """Median of a patch by reader and threads."""
    return {name: statistics.median(s[what] for s in kept) for name, kept in reads["samples"].items()}


def as_text(document: Mapping[str, Any]) -> str:
    """Markdown."""
    lines = [f"### {document['title']}", ""]
    if "rates" in document:
        lines += ["| candidate | patches/s | CPU ms a patch | painted |", "|---|---|---|---|"]
        for name, row in document["rates"]["rows"].items():
            painted = f"{row['painted_share']:.0%}" if "painted_share" in row else ""
            lines.append(f"| {name} | {row['patches_per_s']:.1f} | {row['cpu_ms_a_patch']:.1f} | {painted} |")
        for name, tried in document["rates"]["workers_tried"].items():
            shown = ", ".join(f"{workers} workers {rate:.1f}" for workers, rate in tried.items())
            lines += ["", f"{name}: patches/s with {shown}; the fastest ran."]
    if "reads" in document:
        cpu, wall = read_medians(document["reads"]), read_medians(document["reads"], "wall_ms")
        lines += ["", "| image and label of one patch, threads | CPU ms | ms |", "|---|---|---|"]
        lines += [f"| {name.replace(' | ', ', ')} | {cpu[name]:.2f} | {wall[name]:.2f} |" for name in cpu]
    for mode, part in document.get("step_ms", {}).items():
        shown = ", ".join(f"{ms} ms {share:.1%}" for ms, share in part["shares"].items())
        lines += ["", f"Waiting by length of the step, {mode}: {shown}; shortest under 1 %: {part['shortest_ms']} ms."]
    if "slow_storage" in document:
        part = document["slow_storage"]
        shown = ", ".join(
            f"{name.replace(' | ', ', ')} in flight: {rate:.1f}" for name, rate in part["patches_per_s"].items()
        )
        lines += ["", f"S3, delay of each request, patches/s: {shown}."]
    if "first_batch" in document:
        part = document["first_batch"]
        lines += [
            "",
            f"First batch {part['s']:.2f} s after opening began, {part['since_process_start_s']:.2f} s after the process did.",
        ]
    if "plan" in document:
        part = document["plan"]
        lines += ["", f"Plan of {part['patches']:,} patches over {document['num_rows']:,} rows: {part['s']:.1f} s."]
    if "soak" in document:
        part = document["soak"]
        lines += [
            "",
            (
                f"{part['batches']:,} batches over {document['num_rows']:,} rows in {part['s']:.0f} s: {part['early_mb']:.0f} MB resident after "
                f"{part['early']}, {part['late_mb']:.0f} MB at the end, peak {part['peak_gb']:.2f} GB."
            ),
        ]
    lines += ["", "| figure | measured | goal |", "|---|---|---|"]
    lines += [f"| {name} | {value:.3g} | {GOALS[name]:g} |" for name, value in document["figures"].items()]
    return "\n".join(lines)


def draw_chart(document: Mapping[str, Any], file: Path) -> None:
    """Patches a second of every candidate as bars, ours dark."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib.figure import Figure

    rows = document["rates"]["rows"]
    names = sorted(rows, key=lambda name: rows[name]["patches_per_s"])
    values = [rows[name]["patches_per_s"] for name in names]
    figure = Figure(figsize=(8, 0.4 * len(names) + 1.2), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh(names, values, color=["#0072b2" if n.startswith("ftengine") else "#b0b0b0" for n in names])
    axes.bar_label(bars, labels=[f"{v:.1f}" for v in values], padding=3)
    axes.set_xlabel(f"patches a second, {document['environment']['cores']} cores, no GPU")
    axes.set_title(document["title"], fontsize=9)
    axes.margins(x=0.12)
    figure.savefig(file, dpi=120)


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
    parser.add_argument("--part", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.part:
        name, given = options.part
        result = PARTS[name](json.loads(given))
        if result is not None:
            print(json.dumps(result))
        return
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
