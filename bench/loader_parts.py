"""What ``ftengine bench loader`` runs in processes of its own: our loader and its peers as candidates, and what needs a fresh process.

``python -m ftengine.bench.loader_parts NAME OPTIONS`` runs one part of ``PARTS``; OPTIONS are JSON.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from ftengine.bench.loader_report import GOALS
from ftengine.bench.peers import Batches, Setup, batches_of
from ftengine.bench.peers.process import serve
from ftengine.bench.timing import peak_bytes
from ftengine.config import Config
from ftengine.geometry import IntZYX, int_zyx

OUR_MODES = ("crops", "augmented", "painted", "networks")
WARM_BATCHES = 16
_NO_AUGMENTATION = {f"augment.{name}_probability": 0.0 for name in ("flip", "rot90", "scale", "shift")}
_BISECTIONS = 3
_EARLY_BATCHES = 500


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
        for _ in range(WARM_BATCHES):
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


def command(part: str, options: Mapping[str, Any]) -> list[str]:
    """Arguments of Python that run a part."""
    return ["-m", "ftengine.bench.loader_parts", part, json.dumps(options)]


def apart(part: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Run a part in a fresh process; AssertionError with the end of its stderr where it fails."""
    done = subprocess.run(  # noqa: S603 - this very module
        [sys.executable, *command(part, options)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise AssertionError(f"{part} failed:\n{done.stderr[-4000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    """Run the part that the command line names; print what it gives as JSON."""
    name, given = sys.argv[1:]
    result = PARTS[name](json.loads(given))
    if result is not None:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
