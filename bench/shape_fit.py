"""Fit the laws of ``synthesis.shape: realistic`` (ftengine/shapes.yaml) to one half of the real tumours; ``ftengine.bench.shapes`` compares with the other.

Size: median and standard deviation of the logarithm of the real volumes. Shape: the other numbers are searched (differential evolution) for
the smallest mean Kolmogorov-Smirnov distance of diameter, sphericity, elongation, flatness, solidity and roughness, of all tumours and of the smaller and
the larger half each, so that size and shape go together. Drawn tumours are seen through the slices of the real ones. The search
draws large tumours on a coarse grid (7 voxels a radius), which hides some of their roughness; a simplex (Nelder-Mead) on a finer one
(14) goes on from what it found.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from scipy.optimize import Bounds, differential_evolution, minimize
from scipy.stats import ks_2samp

from ftengine.bench.shapes import GRID_MM, RealTumors, data_folder, draw_tumors, drawn_mask, measure_mask, read_real
from ftengine.config import POOLED_SHAPE, Config, RealisticShapeConfig
from ftengine.errors import FtengineError
from ftengine.evaluation.shape_measures import MEASURES, MIN_VOXELS, ShapeMeasures, column
from ftengine.geometry import float_zyx
from ftengine.synthesis.shape import TumorDraw, union_volume

ORGANS = ("kidney", "pancreas")
NUM_DRAWN = 100
VOLUME_CUT = 2.5  # the log-normal ends this many standard deviations from its median
_COARSE, _FINE = 7.0, 14.0  # voxels a radius; where 1.5 mm are coarser, 1.5 mm
_SIMPLEX_STEP = 0.12  # of the width that is searched
_SEED = 2026

_HEADER = """\
# Laws of synthesis.shape: realistic, written by `ftengine bench shape_fit --out FILE`: edit that, or give your own in synthesis.realistic_shapes.
# Numbers only, no masks. Fitted to every other case of KiTS19 (kidney) and PANORAMA (pancreas); the rest is held out (docs/shapes.md).
# Fields: RealisticShapeConfig in config.py. An organ that is not named here has the law "pooled".
"""

# name, lowest, highest; a range is searched as its middle and half its width
SEARCHED = (
    ("axis_z", 0.0, 0.6),
    ("axis_y", 0.0, 0.6),
    ("axis_x", 0.0, 0.6),
    ("lobes", 0.0, 5.0),
    ("lobes_power", -0.5, 1.0),
    ("lobe_offset", 0.3, 1.0),
    ("lobe_offset_half", 0.0, 0.3),
    ("lobe_radius", 0.25, 0.9),
    ("lobe_radius_half", 0.0, 0.25),
    ("warp_sigma", 0.0, 0.35),
    ("warp_sigma_half", 0.0, 0.15),
)


def size_law(tumors: Sequence[ShapeMeasures]) -> dict[str, Any]:
    """Median, spread and range of the log-normal volume."""
    logs = np.log(column(tumors, "volume_ml"))
    middle, sigma = float(logs.mean()), float(logs.std(ddof=1))
    smallest = MIN_VOXELS * GRID_MM**3 / 1000.0
    return {
        "volume_ml": round(math.exp(middle), 2),
        "volume_log_sigma": round(sigma, 3),
        "volume_range_ml": [
            round(max(smallest, math.exp(middle - VOLUME_CUT * sigma)), 2),
            round(math.exp(middle + VOLUME_CUT * sigma), 1),
        ],
    }


def shape_law(values: Sequence[float] | NDArray[np.float64]) -> dict[str, Any]:
    """The searched numbers as fields of a law."""
    v = dict(zip((name for name, _, _ in SEARCHED), (float(x) for x in values), strict=True))
    law: dict[str, Any] = {
        "axis_log_sigma_zyx": [round(v[f"axis_{axis}"], 3) for axis in "zyx"],
        "lobes": round(v["lobes"], 2),
        "lobes_power": round(v["lobes_power"], 2),
    }
    for name in ("lobe_offset", "lobe_radius", "warp_sigma"):
        middle, half = v[name], v[f"{name}_half"]
        law[name] = [round(max(0.0, middle - half), 3), round(max(0.0, middle + half), 3)]
    law["lobe_radius"][0] = max(0.05, law["lobe_radius"][0])
    return law


def distance(real: Sequence[ShapeMeasures], ours: Sequence[ShapeMeasures]) -> float:
    """The mean of the Kolmogorov-Smirnov distances that the search makes small."""
    border = float(np.median(column(real, "volume_ml")))
    total = []
    for low, high in ((0.0, math.inf), (0.0, border), (border, math.inf)):
        a, b = ([t for t in tumors if low <= t.volume_ml < high] for tumors in (real, ours))
        if not b:
            return 1.0
        total += [
            float(ks_2samp(column(a, name), column(b, name)).statistic) for name in MEASURES if name != "volume_ml"
        ]
    return float(np.mean(total))


def drawn_tumors(
    law: RealisticShapeConfig, slices_mm: Sequence[float], seed: int, voxels_a_radius: float
) -> Iterator[ShapeMeasures]:
    """Draw and measure one tumour for each slice thickness, large ones on a grid coarser than 1.5 mm."""
    config = Config.preset("abdomen").synthesis.model_copy(
        update={"shape": "realistic", "realistic_shapes": {POOLED_SHAPE: law}}
    )
    in_mm = list(draw_tumors(config, "any", [(1.0, 1.0, 1.0)] * len(slices_mm), seed))
    grids_mm = [max(GRID_MM, _radius(draw) / voxels_a_radius) for draw in in_mm]
    spacings = [float_zyx((max(thick, g), g, g)) for thick, g in zip(slices_mm, grids_mm, strict=True)]
    for draw, spacing, grid_mm in zip(draw_tumors(config, "any", spacings, seed), spacings, grids_mm, strict=True):
        yield from measure_mask(np.pad(drawn_mask(draw, spacing, grid_mm), 1), grid_mm)[0]


def _radius(draw: TumorDraw) -> float:
    centers = np.array([e.offset_vox_zyx for e in draw.ellipsoids], dtype=np.float64)
    volume = union_volume(centers, np.array([e.radii_vox_zyx for e in draw.ellipsoids]))
    return (3.0 * volume / (4.0 * math.pi)) ** (1.0 / 3.0)


def fit(real: Sequence[ShapeMeasures], slices_mm: Sequence[float], source: str, *, generations: int) -> dict[str, Any]:
    """The law of these tumours, as plain values; a function of its arguments alone."""
    size = size_law(real)
    thick = [float(t) for t in np.random.default_rng(_SEED).choice(slices_mm, NUM_DRAWN)]

    def cost(values: NDArray[np.float64], voxels_a_radius: float) -> float:
        law = RealisticShapeConfig(source=source, **size, **shape_law(values))
        return distance(real, list(drawn_tumors(law, thick, _SEED, voxels_a_radius)))

    low, high = (np.array(bounds) for bounds in zip(*((a, b) for _, a, b in SEARCHED), strict=True))
    found = differential_evolution(
        cost,
        Bounds(low, high),
        args=(_COARSE,),
        maxiter=generations,
        popsize=2,
        rng=_SEED,
        polish=False,
        tol=0.0,
        callback=lambda intermediate_result: print(f"  {intermediate_result.fun:.4f}", file=sys.stderr, flush=True),
    )
    return {"source": source, **size, **refined(shape_law(found.x), cost, evaluations=4 * generations)}


def refined(
    law: dict[str, Any], cost: Callable[[NDArray[np.float64], float], float], *, evaluations: int
) -> dict[str, Any]:
    """Go on from a searched law on the finer grid; the best law that was met."""
    low, high = (np.array(bounds) for bounds in zip(*((a, b) for _, a, b in SEARCHED), strict=True))
    start = np.clip(values_of(law), low, high)
    step = _SIMPLEX_STEP * (high - low)
    corners = start + np.diag(np.where(start + step <= high, step, -step))
    best = minimize(
        cost,
        start,
        args=(_FINE,),
        method="Nelder-Mead",
        bounds=Bounds(low, high),
        options={"initial_simplex": np.vstack([start, corners]), "maxfev": evaluations, "adaptive": True},
    )
    print(f"  {best.fun:.4f} on the finer grid", file=sys.stderr, flush=True)
    return shape_law(best.x)


def values_of(law: dict[str, Any]) -> NDArray[np.float64]:
    """The searched numbers of a law: ``shape_law`` backwards."""
    values = [*law["axis_log_sigma_zyx"], law["lobes"], law["lobes_power"]]
    for name in ("lobe_offset", "lobe_radius", "warp_sigma"):
        low, high = law[name]
        values += [(low + high) / 2, (high - low) / 2]
    return np.array(values, dtype=np.float64)


def fit_organ(real: RealTumors, *, generations: int) -> dict[str, Any]:
    """The law of one organ, from the half that may be seen."""
    source = f"{len(real.fit)} tumours of {len(real.fit_slices_mm)} cases of {real.folder.name}"
    return fit(real.fit, real.fit_slices_mm, source, generations=generations)


def pooled_law(reals: Sequence[RealTumors], laws: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The law of organs without one: sizes of all the tumours together, every other number the mean of the organs'."""
    size = size_law([tumor for real in reals for tumor in real.fit])
    shape = {
        name: np.round(np.mean([law[name] for law in laws], axis=0), 3).tolist()
        for name in laws[0]
        if name not in {"source", *size}
    }
    return {
        "source": "sizes of all tumours seen, the rest the mean of " + " and ".join(r.organ for r in reals),
        **size,
        **shape,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """``ftengine bench shape_fit --out ftengine/shapes.yaml``."""
    import torch

    parser = argparse.ArgumentParser(prog="ftengine bench shape_fit", description=__doc__)
    parser.add_argument("--generations", type=int, default=14)
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="write the laws here when all are done; else print them"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    try:
        reals = [read_real(data_folder(), organ) for organ in ORGANS]
    except FtengineError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    laws = [fit_organ(real, generations=options.generations) for real in reals]
    shapes = {real.organ: law for real, law in zip(reals, laws, strict=True)} | {POOLED_SHAPE: pooled_law(reals, laws)}
    if options.out is None:
        print(as_yaml(shapes), end="")
    else:  # not by a shell's >, which would empty the file that this program itself reads
        options.out.write_text(as_yaml(shapes), encoding="utf-8")


def as_yaml(shapes: dict[str, dict[str, Any]]) -> str:
    """The text of ftengine/shapes.yaml."""
    return _HEADER + "".join(yaml.safe_dump({name: law}, sort_keys=False, width=140) for name, law in shapes.items())


if __name__ == "__main__":
    main()
