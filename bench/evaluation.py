"""Evaluation of folders of label maps: ours against the same metrics by MONAI, both from the files on, in as many worker processes.

Cases: abdomen phantoms of seven classes; a prediction is the truth warped by a smooth random field of about 1.5 voxels with a false piece
of tumour. ``--distinct`` of them are drawn, the others are copies under other names: both sides read and score every file.
MONAI: ``LoadImage`` (nibabel), ``one_hot``, ``compute_dice``, ``compute_hausdorff_distance(percentile=95)``, ``compute_surface_dice``. Ours, ``voxels``:
the same three by the same definitions, which must agree to 1e-6, and all that ``ftengine evaluate`` finds besides (lesions, diameters,
detection). ``elements``: its default definition. Each block of cases is scored by all in turn; starting the workers is part of the time.
"""

import argparse
import math
import multiprocessing
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from ftengine.bench.timing import Row, report
from ftengine.config import Config, EvaluationConfig, RegionConfig
from ftengine.evaluation.evaluate import evaluate_folders
from ftengine.geometry import IntZYX
from ftengine.volume.nifti import write_nifti

GOAL_TIMES_FASTER = 3.0
TOLERANCE_MM = 2.0
WARP_VOX, WARP_NODES = 2.0, 17  # of the field that a prediction is off by, and its nodes on each axis
Scores = dict[str, list[tuple[float | None, float | None, float | None]]]


def write_pairs(folder: Path, region: RegionConfig, shape_zyx: IntZYX, *, cases: int, distinct: int) -> None:
    """``folder/truth`` and ``folder/pred`` with ``cases`` pairs of ``.nii.gz``; a folder that is there already is kept as it is."""
    if folder.exists():
        return
    for name in ("truth", "pred"):
        (folder / name).mkdir(parents=True)
    for case in range(cases):
        files = [folder / name / f"{case:03d}.nii.gz" for name in ("truth", "pred")]
        if case >= distinct:
            for file in files:
                shutil.copyfile(file.with_name(f"{case % distinct:03d}.nii.gz"), file)
            continue
        from ftengine.bench.phantoms import draw

        phantom = draw(case, shape_zyx, region, with_tumors=True)
        for file, label in zip(files, (phantom.label, _predicted(phantom.label, case)), strict=True):
            write_nifti(file, label, phantom.grid)


def _predicted(truth: np.ndarray[Any, np.dtype[np.uint8]], seed: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    from scipy import ndimage as ndi

    rng = np.random.default_rng(seed)
    places = np.indices(truth.shape, dtype=np.float32)
    for axis in range(3):
        nodes = rng.normal(0, WARP_VOX, (WARP_NODES,) * 3)
        places[axis] += ndi.zoom(nodes, np.array(truth.shape) / WARP_NODES, order=1)
    predicted: np.ndarray[Any, np.dtype[np.uint8]] = ndi.map_coordinates(truth, places, order=0)
    middle = tuple(slice(n // 2, n // 2 + max(2, n // 64)) for n in truth.shape)
    predicted[middle] = 2
    return predicted


def score_by_monai(pair: tuple[Path, Path], num_classes: int) -> list[tuple[float, float, float]]:
    """(Dice, HD95, surface Dice) of each class but the background, as a user of MONAI computes them; in a worker process."""
    import torch
    from monai.metrics.hausdorff_distance import compute_hausdorff_distance
    from monai.metrics.meandice import compute_dice
    from monai.metrics.surface_dice import compute_surface_dice
    from monai.networks.utils import one_hot
    from monai.transforms.io.array import LoadImage

    torch.set_num_threads(1)
    load: Any = LoadImage("NibabelReader", image_only=True, ensure_channel_first=True, dtype=np.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of itself, and of classes that are not there
        predicted, truth = (load(str(file)) for file in pair)
        spacing = tuple(float(side) for side in truth.pixdim)
        p, t = (one_hot(v.as_tensor()[None], num_classes, dtype=torch.bool) for v in (predicted, truth))
        dice = compute_dice(p, t, include_background=False)[0]
        hd95 = compute_hausdorff_distance(p, t, percentile=95, spacing=spacing)[0]
        surface = compute_surface_dice(p, t, [TOLERANCE_MM] * (num_classes - 1), spacing=spacing)[0]
    return [(float(a), float(b), float(c)) for a, b, c in zip(dice, hd95, surface, strict=True)]


def monai(folder: Path, names: Sequence[str], region: RegionConfig, workers: int) -> Scores:
    """All cases by MONAI in ``workers`` processes."""
    pairs = [(folder / "pred" / name, folder / "truth" / name) for name in names]
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        scored = pool.map(score_by_monai, pairs, [region.num_classes] * len(pairs))
        return {name.removesuffix(".nii.gz"): list(of_case) for name, of_case in zip(names, scored, strict=True)}


def ours(folder: Path, region: RegionConfig, surface: str, workers: int) -> Scores:
    """All cases of a folder by ``ftengine evaluate``. Raises AssertionError where one fails."""
    settings = EvaluationConfig.model_validate({"surface": surface, "tolerance_mm": TOLERANCE_MM})
    result = evaluate_folders(folder / "pred", folder / "truth", region, settings, workers=workers)
    if result.failed:
        raise AssertionError(f"not scored: {result.failed}")
    return {s.case: [(c.dice, c.hd95_mm, c.surface_dice) for c in s.classes.values()] for s in result.cases}


def check_equal(own: Scores, of_monai: Scores) -> float:
    """The largest difference where both have a value. Raises AssertionError above 1e-6, and where one alone is defined.

    MONAI's float32 bounds what can be asked for: differences are relative above 1.
    """
    worst = 0.0
    if set(own) != set(of_monai):
        raise AssertionError(f"other cases: {sorted(set(own) ^ set(of_monai))}")
    for case, classes in own.items():
        for a, b in zip(classes, of_monai[case], strict=True):
            for mine, theirs in zip(a, b, strict=True):
                if mine is None or theirs is None or not math.isfinite(theirs):
                    is_absent = mine in {None, 0.0} and (theirs is None or not math.isfinite(theirs))
                    if not is_absent:
                        raise AssertionError(f"{case}: {mine} where MONAI has {theirs}")
                    continue
                worst = max(worst, abs(mine - theirs) / max(1.0, abs(theirs)))
    if worst > 1e-6:
        raise AssertionError(f"metrics differ by {worst:.2e}; want at most 1e-6")
    return worst


def run(
    *,
    cases: int = 100,
    distinct: int = 10,
    shape_zyx: IntZYX = (256, 256, 256),
    blocks: int = 4,
    workers: int = 2,
    work: Path | None = None,
    as_json: bool = False,
) -> dict[str, Any]:
    """Write the pairs, score them each way in blocks, check that the values agree; prints and returns the figures."""
    region = Config.preset("abdomen").region
    distinct = min(distinct, cases)
    with tempfile.TemporaryDirectory() as temporary:
        name = f"evaluation-{cases}-{distinct}-{'x'.join(map(str, shape_zyx))}"
        whole = (Path(temporary) if work is None else work.resolve()) / name
        write_pairs(whole, region, shape_zyx, cases=cases, distinct=distinct)
        names = sorted(file.name for file in (whole / "truth").iterdir())
        rows = {name: Row(name) for name in ("monai", "ours, voxels", "ours, elements")}
        worst = 0.0
        for block in range(blocks):
            chosen = names[block::blocks]
            folder = _linked(whole, Path(temporary) / f"block{block}", chosen)
            candidates: Mapping[str, Callable[[], Scores]] = {
                "monai": lambda f=folder, n=chosen: monai(f, n, region, workers),  # type: ignore[misc]
                "ours, voxels": lambda f=folder: ours(f, region, "voxels", workers),  # type: ignore[misc]
                "ours, elements": lambda f=folder: ours(f, region, "elements", workers),  # type: ignore[misc]
            }
            found = {name: _timed(call, rows[name]) for name, call in candidates.items()}
            worst = max(worst, check_equal(found["ours, voxels"], found["monai"]))
        total_s = {row.name: sum(row.samples_s) for row in rows.values()}
        extra = {
            "cases": cases,
            "distinct": distinct,
            "shape_zyx": list(shape_zyx),
            "workers": workers,
            "total_s": total_s,
            "times_faster": {
                name: statistics.median(
                    a / b for a, b in zip(rows["monai"].samples_s, rows[name].samples_s, strict=True)
                )
                for name in rows
            },
            "largest_difference": worst,
            "goal_times_faster": GOAL_TIMES_FASTER,
        }
    document = report("Evaluation, a block of cases", list(rows.values()), "monai", as_json=as_json, extra=extra)
    if not as_json:
        totals = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in total_s.items())
        print(f"\n{cases} cases: {totals}; largest difference from MONAI {worst:.1e}")
    return document


def _linked(whole: Path, folder: Path, names: Sequence[str]) -> Path:
    """A folder with some of the pairs, as links."""
    for side in ("truth", "pred"):
        (folder / side).mkdir(parents=True)
        for name in names:
            (folder / side / name).symlink_to(whole / side / name)
    return folder


def _timed(call: Callable[[], Scores], row: Row) -> Scores:
    started = time.perf_counter()
    scores = call()
    row.samples_s.append(time.perf_counter() - started)
    return scores


def main(arguments: list[str]) -> None:
    """``ftengine bench evaluation``."""
    parser = argparse.ArgumentParser(prog="ftengine bench evaluation", description=__doc__)
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument("--distinct", type=int, default=10, help="cases that are drawn; the others are copies")
    parser.add_argument("--shape", type=int, nargs=3, default=(256, 256, 256), metavar=("Z", "Y", "X"))
    parser.add_argument("--blocks", type=int, default=4, help="blocks that all candidates score in turn")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--work", type=Path, help="folder that keeps the files for another run (default: they go)")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    z, y, x = options.shape
    run(
        cases=options.cases,
        distinct=options.distinct,
        shape_zyx=(z, y, x),
        blocks=options.blocks,
        workers=options.workers,
        work=options.work,
        as_json=options.json,
    )


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
