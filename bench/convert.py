"""Conversion against the usual MONAI chain on the same volumes in one process; its stages, its memory, two workers, the size of the store.

MONAI: LoadImaged, EnsureChannelFirstd, Orientationd(RAS), Spacingd(bilinear, nearest), then ``torch.save`` of float32 image and label, as its
PersistentDataset caches them. Ours: ``convert_cases`` into a fresh store, with everything that it does besides (hashes, checks, index rows,
fsync). Each mode runs in a process of its own that is bound to its cores from the start, candidates interleaved.
"""

import argparse
import gc
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from ftengine.bench.timing import Row, as_table, environment, peak_bytes
from ftengine.config import Config, RegionConfig
from ftengine.geometry import FloatZYX, Grid, IntZYX, grid_from_matrix, reverse_axes
from ftengine.store import case as case_module
from ftengine.store import index, writer
from ftengine.store.convert import Resources, convert_cases
from ftengine.store.location import LocalLocation
from ftengine.store.reader import open_store
from ftengine.volume.discover import Source
from ftengine.volume.nifti import write_nifti
from ftengine.volume.values import MAX_HU, MIN_HU

CLINICAL_SHAPE_ZYX, CLINICAL_SPACING_MM_ZYX = (100, 512, 512), (2.5, 0.75, 0.75)
GOALS = {"times_monai": 3.0, "times_smaller": 7.0, "peak_gb": 3.0, "two_workers": 1.7}
INTERIOR_VOX = 2  # voxels from the edge: MONAI pads borders another way
SAME_HU, SAME_SHARE = 1.0, 0.999  # MONAI computes positions in float32: next to a steep edge this is more than a HU
SAME_LABEL_SHARE = 0.999
HALF_WAY_VOX = 1e-3  # 0.75 to 1.5 mm puts every position half-way between two voxels: either neighbour is right
LARGE_SLICES = 1000
# (name, spacing of the file): at 1.5 mm the first shrinks to a tenth; the second is a whole body in 2 mm slices of the widest field of view
LARGE_SPACINGS_MM_ZYX: Mapping[str, FloatZYX] = {"shrinks": (1.0, 0.75, 0.75), "worst": (2.0, 0.977, 0.977)}

Pair = tuple[Path, Path | None]


def write_volumes(folder: Path, shapes_zyx: Sequence[IntZYX], spacing_mm_zyx: FloatZYX) -> list[Pair]:
    """Abdomen phantoms with tumours and all organ labels as ``.nii.gz``."""
    # here and below: processes that only convert must not pay for these imports, nor hold them in memory
    from ftengine.volume.phantom import TumorSpec, make_phantom

    pairs: list[Pair] = []
    for number, shape in enumerate(shapes_zyx):
        phantom = make_phantom(
            "abdomen", seed=1, case=number, shape_zyx=shape, spacing_mm_zyx=spacing_mm_zyx, tumors=TumorSpec()
        )
        image, label = folder / f"p{number}_ct.nii.gz", folder / f"p{number}_label.nii.gz"
        write_nifti(image, phantom.image_hu, phantom.grid)
        write_nifti(label, phantom.label, phantom.grid)
        pairs.append((image, label))
    return pairs


def sources_of(pairs: Sequence[Pair], repeat: int = 1) -> list[Source]:
    """One source a pair, ``repeat`` times under other names."""
    return [
        Source(f"b/{number:03d}_{again:03d}", "b", image, label)
        for again in range(repeat)
        for number, (image, label) in enumerate(pairs)
    ]


def monai_chain(spacing_mm_zyx: FloatZYX, *, has_label: bool) -> Callable[[dict[str, str]], dict[str, Any]]:
    """The transforms of the usual training script, up to the cache."""
    from monai.transforms.compose import Compose
    from monai.transforms.io.dictionary import LoadImaged
    from monai.transforms.spatial.dictionary import Orientationd, Spacingd
    from monai.transforms.utility.dictionary import EnsureChannelFirstd

    keys = ["image", "label"] if has_label else ["image"]
    mode = ["bilinear", "nearest"] if has_label else ["bilinear"]
    return Compose(
        [
            LoadImaged(keys),
            EnsureChannelFirstd(keys),
            Orientationd(keys, axcodes="RAS"),
            Spacingd(keys, pixdim=spacing_mm_zyx[::-1], mode=mode),
        ]
    )


def convert_by_monai(pairs: Sequence[Pair], folder: Path, region: RegionConfig) -> int:
    """Every pair through the chain into ``folder``; bytes written."""
    import torch

    folder.mkdir()
    for number, (image, label) in enumerate(pairs):
        data = {"image": str(image)} | ({} if label is None else {"label": str(label)})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its own deprecations
            torch.save(monai_chain(region.spacing_mm_zyx, has_label=label is not None)(data), folder / f"{number}.pt")
    return sum(f.stat().st_size for f in folder.iterdir())


def convert_by_us(sources: Sequence[Source], store: Path, region: RegionConfig, workers: int = 1) -> int:
    """Every source into a fresh store; bytes of the volumes written. Raises AssertionError where one fails."""
    report = convert_cases(sources, store, region, resources=Resources(workers=workers))
    if report.count("converted") != len(sources):
        raise AssertionError(f"not converted: {[o.reason for o in report.outcomes if o.status != 'converted']}")
    return sum(o.stored_bytes for o in report.outcomes)


# the same voxels?


def check_equal(pairs: Sequence[Pair], store: Path, region: RegionConfig) -> dict[str, float]:
    """Voxels of the store against MONAI's resampler on the store's grid, and against what was resampled (lossless).

    Spacingd keeps the first voxel where it is, the store keeps the centre of the volume: so MONAI is asked for the store's grid here.
    Rule: at least SAME_SHARE of the voxels that are INTERIOR_VOX from every edge within SAME_HU; SAME_LABEL_SHARE of the
    labelled ones equal, where a position half-way between two voxels may take either.
    """
    opened = open_store(store)
    shares, label_shares, worst = [], [], 0.0
    inner = (slice(INTERIOR_VOX, -INTERIOR_VOX),) * 3
    for source in sources_of(pairs):
        patch, grid = opened.read_volume(source.case), opened.grid(source.case)
        wanted = case_module.prepare(
            source, case_module.ConvertOptions(), region.spacing_mm_zyx, region.labels.values()
        )
        if not np.array_equal(patch.image, wanted.image_hu):
            raise AssertionError(f"{source.case}: the store is not lossless")
        theirs = _monai_on_grid(source.image, grid, "bilinear")
        difference = np.abs(theirs - patch.image)[inner]
        shares.append(float((difference <= SAME_HU).mean()))
        worst = max(worst, float(difference.max()))
        if source.label is not None:
            label_shares.append(_label_share(source.label, grid, patch.label, inner))
    result = {"hu_share": min(shares), "hu_worst": worst, "label_share": min(label_shares, default=1.0)}
    if result["hu_share"] < SAME_SHARE or result["label_share"] < SAME_LABEL_SHARE:
        raise AssertionError(f"the two conversions differ: {result}; there is nothing to time")
    return result


def _label_share(file: Path, grid: Grid, ours: NDArray[np.uint8], inner: tuple[slice, ...]) -> float:
    """Share of the labelled voxels that MONAI gives, too, at a position up to HALF_WAY_VOX away in plane and along z."""
    equal, labelled = np.zeros(grid.shape_zyx, dtype=bool), ours > 0
    for along_z in (-HALF_WAY_VOX, HALF_WAY_VOX):
        for in_plane in (-HALF_WAY_VOX, HALF_WAY_VOX):
            matrix = grid.matrix.copy()
            matrix[:, 3] += grid.matrix @ np.array([in_plane, in_plane, along_z, 0.0])
            theirs = _monai_on_grid(file, grid_from_matrix(grid.shape_zyx, matrix), "nearest")
            equal |= theirs == ours
            labelled |= theirs > 0
    return float(equal[inner][labelled[inner]].mean())


def _monai_on_grid(file: Path, grid: Grid, mode: str) -> NDArray[Any]:
    import torch
    from monai.transforms.compose import Compose
    from monai.transforms.io.dictionary import LoadImaged
    from monai.transforms.spatial.array import SpatialResample
    from monai.transforms.spatial.dictionary import Orientationd
    from monai.transforms.utility.dictionary import EnsureChannelFirstd

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = Compose([LoadImaged("x"), EnsureChannelFirstd("x"), Orientationd("x", axcodes="RAS")])(
            {"x": str(file)}
        )
        loaded["x"].clamp_(
            MIN_HU, MAX_HU
        )  # padding below air is air before anything is interpolated: a rule of ours, not of MONAI's chain
        moved = SpatialResample(mode=mode, padding_mode="border")(
            loaded["x"], dst_affine=torch.from_numpy(grid.matrix), spatial_size=grid.shape_zyx[::-1]
        )
    return reverse_axes(np.asarray(moved[0]))


# where our time goes

# stage -> (owner, name) of the functions that make it up, called one after the other for each case
STAGES: Mapping[str, tuple[tuple[Any, str], ...]] = {
    "hash": ((case_module, "source_hashes"),),
    "read (gunzip, checks, axes)": ((case_module, "read_volume"),),
    "resample": ((case_module, "resample"),),
    "compress, write": ((writer, "_build"),),
    "index row (lesions, chunks)": ((writer, "_row"),),
    "fsync, publish, commit": ((LocalLocation, "publish"), (index, "append_row")),
}


def split(pairs: Sequence[Pair], region: RegionConfig, folder: Path) -> dict[str, float]:
    """Seconds a volume of each stage of one conversion; "rest" is what no stage accounts for."""
    spent = dict.fromkeys(STAGES, 0.0)
    with ExitStack() as stack:
        for stage, functions in STAGES.items():
            for owner, name in functions:
                stack.enter_context(_timed(owner, name, stage, spent))
        started = time.perf_counter()
        convert_by_us(sources_of(pairs), folder / "split.zarr", region)
        total = time.perf_counter() - started
    return {stage: seconds / len(pairs) for stage, seconds in (spent | {"rest": total - sum(spent.values())}).items()}


@contextmanager
def _timed(owner: Any, name: str, stage: str, spent: dict[str, float]) -> Iterator[None]:
    original: Callable[..., Any] = getattr(owner, name)

    def wrapper(*arguments: Any, **keywords: Any) -> Any:
        started = time.perf_counter()
        try:
            return original(*arguments, **keywords)
        finally:
            spent[stage] += time.perf_counter() - started

    setattr(owner, name, wrapper)
    try:
        yield
    finally:
        setattr(owner, name, original)


# parts that run in processes of their own


def compare(pairs: Sequence[Pair], rounds: int, *, one_core: bool) -> dict[str, Any]:
    """Both conversions of all pairs, interleaved; in this process."""
    if one_core:
        import torch

        torch.set_num_threads(1)
        sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    region = Config.preset("abdomen").region
    rows = {"ftengine convert": Row("ftengine convert"), "MONAI chain": Row("MONAI chain")}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store, cache = folder / "s.zarr", folder / "cache"
        convert_by_us(sources_of(pairs), store, region)  # warms up
        equal = check_equal(pairs, store, region)
        convert_by_monai(pairs, cache, region)
        for _ in range(rounds):
            shutil.rmtree(store)
            shutil.rmtree(cache)
            gc.collect()
            for row, call in (
                (rows["ftengine convert"], lambda: convert_by_us(sources_of(pairs), store, region)),
                (rows["MONAI chain"], lambda: convert_by_monai(pairs, cache, region)),
            ):
                started = time.perf_counter()
                call()
                row.samples_s.append(time.perf_counter() - started)
        stored_bytes = sum(f.stat().st_size for f in (store / "volumes").rglob("*") if f.is_file())
        cache_bytes = sum(f.stat().st_size for f in cache.iterdir())
        parts = split(pairs, region, folder)
    return {
        "equal": equal,
        "rows": [{"name": r.name, "median_s": r.median_s, "samples_s": r.samples_s} for r in rows.values()],
        "times_monai": rows["MONAI chain"].median_s / rows["ftengine convert"].median_s,
        "volumes_per_s": {name: len(pairs) / row.median_s for name, row in rows.items()},
        "split_s": parts,
        "stored_bytes": stored_bytes,
        "cache_bytes": cache_bytes,
        "times_smaller": cache_bytes / stored_bytes,
    }


def convert_large(pair: Pair) -> dict[str, float]:
    """Peak memory of this process after converting one volume."""
    before_gb = peak_bytes() / 1e9
    with tempfile.TemporaryDirectory() as name:
        started = time.perf_counter()
        convert_by_us(sources_of([pair]), Path(name) / "s.zarr", Config.preset("abdomen").region)
        seconds = time.perf_counter() - started
    return {"peak_gb": peak_bytes() / 1e9, "imports_gb": before_gb, "s": seconds}


def convert_many(pair: Pair, count: int) -> dict[str, float]:
    """Resident memory of this process after a tenth and after all of ``count`` conversions of one small volume."""
    resident_mb = []

    with tempfile.TemporaryDirectory() as name:
        convert_cases(
            sources_of([pair], repeat=count),
            Path(name) / "s.zarr",
            Config.preset("abdomen").region,
            on_outcome=lambda _outcome: resident_mb.append(_resident_mb()),
        )
    early = max(1, count // 10)
    return {"count": count, "early": early, "early_mb": resident_mb[early - 1], "late_mb": resident_mb[-1]}


def _resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def _apart(what: str, pairs: Sequence[Pair], number: int, *, one_core: bool = False) -> dict[str, Any]:
    """Run a part in a fresh process, bound to one core from its first instruction where asked."""
    core = min(os.sched_getaffinity(0))
    files = [str(file) for image, label in pairs for file in (image, label or "-")]
    done = subprocess.run(  # noqa: S603 - this very module
        [sys.executable, "-m", "ftengine.bench.convert", "--part", what, "--rounds", str(number), "--files", *files],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=(lambda: os.sched_setaffinity(0, {core})) if one_core else None,
    )
    if done.returncode:
        raise AssertionError(f"{what} failed:\n{done.stderr[-4000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def two_workers(pairs: Sequence[Pair], rounds: int, repeat: int) -> dict[str, Any]:
    """One worker against two, interleaved, each in a fresh process over ``repeat`` times all pairs; the start of workers is part of it.

    A worker is one core: the one is bound to it. Without ``--workers`` a conversion uses the threads of all cores; that is timed, too.
    """
    many = [*pairs] * repeat
    samples: dict[str, list[float]] = {"one core": [], "one process, all threads": [], "two workers": []}
    for _ in range(rounds):
        samples["one core"].append(_apart("workers", many, 1, one_core=True)["s"])
        samples["one process, all threads"].append(_apart("workers", many, 1)["s"])
        samples["two workers"].append(_apart("workers", many, 2)["s"])
    two = statistics.median(samples["two workers"])
    times = {name: statistics.median(kept) / two for name, kept in samples.items()}
    return {
        "volumes": len(many),
        "times_one_worker": times["one core"],
        "times_one_process": times["one process, all threads"],
        "samples_s": samples,
    }


def convert_with(pairs: Sequence[Pair], workers: int) -> dict[str, Any]:
    """Seconds of one conversion of all pairs, which may name a file again and again."""
    with tempfile.TemporaryDirectory() as name:
        started = time.perf_counter()
        convert_by_us(sources_of(pairs), Path(name) / "s.zarr", Config.preset("abdomen").region, workers)
        return {"s": time.perf_counter() - started}


def large_volume(folder: Path, name: str, slices: int, shape_yx: tuple[int, int]) -> Pair:
    """A volume of ``slices`` slices: one phantom repeated along z."""
    from ftengine.volume.phantom import TumorSpec, make_phantom

    spacing = LARGE_SPACINGS_MM_ZYX[name]
    block = min(slices, 100)
    phantom = make_phantom(
        "abdomen", seed=4, shape_zyx=(block, *shape_yx), spacing_mm_zyx=(190 / block, *spacing[1:]), tumors=TumorSpec()
    )
    repeat = (math.ceil(slices / block), 1, 1)
    grid = grid_from_matrix((slices, *shape_yx), np.diag([spacing[2], spacing[1], spacing[0], 1.0]))
    image, label = folder / f"{name}_ct.nii.gz", folder / f"{name}_label.nii.gz"
    write_nifti(image, np.tile(phantom.image_hu, repeat)[:slices], grid)
    write_nifti(label, np.tile(phantom.label, repeat)[:slices], grid)
    return image, label


def run(
    *,
    shapes_zyx: Sequence[IntZYX] = (CLINICAL_SHAPE_ZYX, (80, 512, 512), (120, 512, 512)),
    spacing_mm_zyx: FloatZYX = CLINICAL_SPACING_MM_ZYX,
    rounds: int = 5,
    large_slices: int = LARGE_SLICES,
    large_shape_yx: tuple[int, int] = (512, 512),
    num_small: int = 500,
    worker_repeat: int = 8,
    data: Sequence[Path] = (),
    as_json: bool = False,
) -> dict[str, Any]:
    """All parts; data: real CT files to compare on as well."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pairs = write_volumes(folder, shapes_zyx, spacing_mm_zyx)
        mvox = sum(math.prod(shape) for shape in shapes_zyx) / 1e6
        modes = {
            "one core": _apart("compare-one-core", pairs, rounds, one_core=True),
            "default threads": _apart("compare", pairs, rounds),
        }
        if data:
            modes["real CT, one core"] = _apart(
                "compare-one-core", [(file, None) for file in data], rounds, one_core=True
            )
        workers = two_workers(pairs, max(1, rounds // 2), worker_repeat)
        memory = {}
        for kind in LARGE_SPACINGS_MM_ZYX if large_slices else ():
            pair = large_volume(folder, kind, large_slices, large_shape_yx)
            memory[kind] = _apart("large", [pair], 1)
            for file in filter(None, pair):
                file.unlink()
        small = folder / "small"
        small.mkdir()
        many = _apart("many", write_volumes(small, [(40, 64, 64)], (5.0, 5.0, 5.0)), num_small)
    alone = modes["one core"]
    document = {
        "title": f"conversion of {len(pairs)} abdomen phantoms, {mvox:.0f} million voxels",
        "environment": environment(),
        "shapes_zyx": list(shapes_zyx),
        "spacing_mm_zyx": spacing_mm_zyx,
        "num_volumes": len(pairs),
        "modes": modes,
        "seconds_per_mvox": alone["rows"][0]["median_s"] / mvox,
        "stored_bytes_per_mvox": alone["stored_bytes"] / mvox,
        "two_workers": workers,
        "memory": memory,
        "many": many,
    }
    print(json.dumps(document, indent=2) if as_json else _as_text(document))
    return document


def _as_text(document: dict[str, Any]) -> str:
    lines = [f"## {document['title']}"]
    for name, mode in document["modes"].items():
        rows = [Row(r["name"], r["samples_s"]) for r in mode["rows"]]
        lines += ["", as_table(name, rows, "MONAI chain"), ""]
        lines += [
            (
                f"volumes a second: {', '.join(f'{who} {rate:.2f}' for who, rate in mode['volumes_per_s'].items())}; "
                f"times MONAI {mode['times_monai']:.2f} (goal {GOALS['times_monai']}). "
                f"Same voxels: {mode['equal']['hu_share']:.5f} within {SAME_HU} HU, worst {mode['equal']['hu_worst']:.1f}, labels {mode['equal']['label_share']:.4f}."
            ),
            f"Store {mode['stored_bytes'] / 1e6:.1f} MB, MONAI's cache {mode['cache_bytes'] / 1e6:.1f} MB: {mode['times_smaller']:.2f} times smaller (goal {GOALS['times_smaller']}).",
            "Seconds a volume: " + ", ".join(f"{stage} {seconds:.3f}" for stage, seconds in mode["split_s"].items()),
        ]
    workers, many = document["two_workers"], document["many"]
    lines += [
        "",
        (
            f"Two workers: {workers['times_one_worker']:.2f} times one of a core each, {workers['volumes']} volumes "
            f"(goal {GOALS['two_workers']}); {workers['times_one_process']:.2f} times one process with the threads of all cores."
        ),
        *(
            f"Large volume ({kind}): peak {m['peak_gb']:.2f} GB in {m['s']:.1f} s (goal {GOALS['peak_gb']} GB)."
            for kind, m in document["memory"].items()
        ),
        f"{many['count']} small volumes: {many['early_mb']:.0f} MB resident after {many['early']}, {many['late_mb']:.0f} MB after all.",
        f"Costs of one core: {document['seconds_per_mvox']:.4f} s and {document['stored_bytes_per_mvox']:.0f} stored bytes a million voxels.",
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """``ftengine bench convert``."""
    parser = argparse.ArgumentParser(prog="ftengine bench convert", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--volumes", type=int, default=3)
    parser.add_argument("--data", nargs="*", type=Path, default=[], help="real CT files to compare on as well")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--files", nargs="*", default=[], help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.part:
        files = [None if name == "-" else Path(name) for name in options.files]
        pairs = [(image, label) for image, label in zip(files[::2], files[1::2], strict=True) if image is not None]
        parts: Mapping[str, Callable[[], dict[str, Any]]] = {
            "compare": lambda: compare(pairs, options.rounds, one_core=False),
            "compare-one-core": lambda: compare(pairs, options.rounds, one_core=True),
            "large": lambda: convert_large(pairs[0]),
            "workers": lambda: convert_with(pairs, options.rounds),
            "many": lambda: convert_many(pairs[0], options.rounds),
        }
        print(json.dumps(parts[options.part]()))
        return
    shapes = [(80 + 20 * (number % 3), 512, 512) for number in range(options.volumes)]
    run(shapes_zyx=shapes, rounds=options.rounds, data=options.data, as_json=options.json)


if __name__ == "__main__":
    main()
