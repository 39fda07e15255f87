"""Shapes of our tumour masks against those of real tumours: distributions of size and shape, Kolmogorov-Smirnov distances, one picture.

Real: the masks of DATA/tumor_masks/<organ>_*/*.npz (keys as in the README there), resampled by nearest neighbour to a grid of 1.5 mm, as a
store of the abdomen holds them; every 26-connected component of at least 64 voxels is one tumour; components that the scan's border may cut
are left out and counted. Cases alternate in name order: every other one was seen by the fit of ``shape: realistic``
(``ftengine.bench.shape_fit``), the rest is held out, and only that rest is compared here.

Ours: draws of ``synthesis.shape`` paper and realistic, whole, not cut by an organ, made visible in two ways:

- ``slices``: through the slices of the real scans. Each of our masks is made in slices of a real case's thickness, then resampled as the
  real one was. Slices of 5 mm leave steps on a tumour; with the same steps on both sides the distance is one of shape.
- ``direct``: on the 1.5 mm grid at once, as training gets them. Here steps of thick slices count as a difference.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.ndimage as ndi
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.stats import ks_2samp

from ftengine.bench.timing import environment
from ftengine.config import Config, SynthesisConfig
from ftengine.errors import ConfigError, FtengineError
from ftengine.evaluation.shape_measures import MEASURES, MIN_VOXELS, ShapeMeasures, column, measure_shape
from ftengine.geometry import (
    FloatZYX,
    float_zyx,
    grid_from_matrix,
    int_zyx,
    resampled_grid,
    reverse_axes,
    to_ras,
)
from ftengine.kernels import tumor_mask
from ftengine.pictures.panels import png_bytes
from ftengine.synthesis.shape import TumorDraw, draw_patch, size_class_of
from ftengine.volume.resample import resample_to

GRID_MM = 1.5  # of the abdomen's stores
MIN_TUMORS = 10  # fewer make no distribution
SHAPES = ("paper", "realistic")
VIEWS = ("slices", "direct")
_LINES = {
    "real": ((0.0, 0.0, 0.0), 1.8),
    "paper": ((230 / 255, 159 / 255, 0.0), 1.4),
    "realistic": ((0.0, 114 / 255, 178 / 255), 1.4),
}
_LOGARITHMIC = ("volume_ml", "diameter_mm")
_TUMOR = 2  # its value in the npz files


@dataclass(frozen=True)
class RealTumors:
    """The tumours of one organ: ``fit`` of every other case, ``held_out`` of the rest; the thickness of each case's slices."""

    organ: str
    folder: Path
    num_cases: int
    num_left_out: int  # components that are too small
    num_cut: int  # components at the border of the scan
    fit: list[ShapeMeasures]
    held_out: list[ShapeMeasures]
    fit_slices_mm: list[float]
    held_out_slices_mm: list[float]


def data_folder() -> Path:
    """FTENGINE_TEST_DATA, else ../shared/data beside the repository."""
    named = os.environ.get("FTENGINE_TEST_DATA")
    return Path(named) if named else Path(__file__).resolve().parents[2] / "shared" / "data"


def read_real(data: Path, organ: str) -> RealTumors:
    """Measure the real tumours of an organ. Raises ConfigError where there are none, or too few to compare."""
    root = data / "tumor_masks"
    if not root.is_dir():
        raise ConfigError(
            f"{root}: there is no such folder; want real tumour masks in <organ>_<source>/*.npz. Set FTENGINE_TEST_DATA to the folder above."
        )
    folders = sorted(p for p in root.iterdir() if p.is_dir())
    folder = next((p for p in folders if p.name.split("_")[0] == organ), None)
    if folder is None:
        have = ", ".join(sorted({p.name.split("_")[0] for p in folders})) or "no organ at all"
        raise ConfigError(f"{root}: no real tumours of {organ!r}; there are {have}. Choose one with --organs.")
    files = sorted(folder.glob("*.npz"))
    if not files:
        raise ConfigError(f"{folder}: holds no .npz file; want one mask a case. Fill it or choose other --organs.")
    halves: tuple[list[ShapeMeasures], list[ShapeMeasures]] = ([], [])
    slices: tuple[list[float], list[float]] = ([], [])
    small = cut = 0
    for number, file in enumerate(files):
        mask, slice_mm = _read_mask(file)
        slices[number % 2].append(slice_mm)
        measured, too_small, at_border = measure_mask(mask)
        halves[number % 2].extend(measured)
        small, cut = small + too_small, cut + at_border
    if min(map(len, halves)) < MIN_TUMORS:
        raise ConfigError(
            f"{folder}: {len(halves[0])} and {len(halves[1])} tumours of at least {MIN_VOXELS} voxels of {GRID_MM} mm in its two halves; want "
            f"{MIN_TUMORS} in each. Leave {organ} out."
        )
    return RealTumors(organ, folder, len(files), small, cut, *halves, *slices)


def _read_mask(file: Path) -> tuple[NDArray[np.bool_], float]:
    """A real tumour mask [z, y, x] on a RAS+ grid of 1.5 mm, and the distance of its slices in mm."""
    try:
        with np.load(file) as content:
            mask, affine = content["mask"], content["affine"].astype(np.float64)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"{file}: cannot be read ({error}); want an npz with mask and affine. Leave it out."
        ) from error
    array = reverse_axes(mask)
    ras, grid = to_ras((array == _TUMOR).astype(np.uint8), grid_from_matrix(int_zyx(array.shape), affine))
    moved = resample_to(ras, grid, resampled_grid(grid, (GRID_MM,) * 3), nearest=True, outside=0)
    return moved.astype(bool), grid.spacing_mm_zyx[0]


def measure_mask(mask: NDArray[np.bool_], grid_mm: float = GRID_MM) -> tuple[list[ShapeMeasures], int, int]:
    """The tumours of a mask [z, y, x] on a grid of ``grid_mm``; how many components were too small, and how many touch the border."""
    components, _ = ndi.label(mask, structure=np.ones((3, 3, 3)))
    found, small, cut = [], 0, 0
    for number, place in enumerate(ndi.find_objects(components), start=1):
        voxels = components[place] == number
        if any(s.start == 0 or s.stop == n for s, n in zip(place, mask.shape, strict=True)):
            cut += 1
        elif np.count_nonzero(voxels) < MIN_VOXELS:
            small += 1
        else:
            found.append(measure_shape(voxels, (grid_mm,) * 3))
    return found, small, cut


def whole_mask(draw: TumorDraw) -> NDArray[np.uint8]:
    """A drawn tumour alone, [z, y, x] at the spacing it was drawn for, in a volume that holds all of it, with background around."""
    reach = [np.ceil(2 * np.array(e.radii_vox_zyx)).astype(int) for e in draw.ellipsoids]
    offsets = [np.array(e.offset_vox_zyx) for e in draw.ellipsoids]
    low = np.min([o - r for o, r in zip(offsets, reach, strict=True)], axis=0) - 1
    high = np.max([o + r for o, r in zip(offsets, reach, strict=True)], axis=0) + 2
    whole = np.zeros(int_zyx(high - low), dtype=np.uint8)
    for ellipsoid, offset, half in zip(draw.ellipsoids, offsets, reach, strict=True):
        alone = tumor_mask([half.tolist()], [ellipsoid.radii_vox_zyx], ellipsoid.warp[None], (2 * half).tolist())[
            0
        ].numpy()
        start = offset - low - half
        whole[tuple(slice(int(s), int(s) + n) for s, n in zip(start, alone.shape, strict=True))] |= alone
    return whole


def drawn_mask(draw: TumorDraw, spacing_mm_zyx: FloatZYX, grid_mm: float = GRID_MM) -> NDArray[np.bool_]:
    """A drawn tumour on the grid of ``grid_mm``, brought there from ``spacing_mm_zyx`` as real masks are."""
    mask = whole_mask(draw)
    z, y, x = spacing_mm_zyx
    grid = grid_from_matrix(int_zyx(mask.shape), np.diag([x, y, z, 1.0]))
    moved = resample_to(mask, grid, resampled_grid(grid, (grid_mm,) * 3), nearest=True, outside=0)
    return moved.astype(bool)


def draw_tumors(config: SynthesisConfig, organ: str, spacings: Iterable[FloatZYX], seed: int) -> Iterable[TumorDraw]:
    """One tumour a spacing, as patches with the addresses (seed, 0, 0), (seed, 0, 1), ... get them."""
    for index, spacing in enumerate(spacings):
        drawn = draw_patch([organ], config, spacing, seed=seed, epoch=0, index=index)
        if drawn is not None:
            yield drawn.tumors[0]


def measure_ours(config: SynthesisConfig, organ: str, slices_mm: Sequence[float], seed: int) -> list[ShapeMeasures]:
    """Draw one tumour for each thickness of slices (below the grid's spacing: that) and measure it on the 1.5 mm grid."""
    # in the plane real voxels are finer than the grid, and finer voxels sample the same shape at the same points
    spacings = [float_zyx((max(thick, GRID_MM), GRID_MM, GRID_MM)) for thick in slices_mm]
    found = []
    for spacing, draw in zip(spacings, draw_tumors(config, organ, spacings, seed), strict=True):
        mask = drawn_mask(draw, spacing)
        box = ndi.find_objects(mask.astype(np.uint8))[:1]  # none where the warps left nothing
        found.extend(measure_mask(np.pad(mask[box[0]], 1))[0] if box else [])
    return found


def compare(real: Sequence[ShapeMeasures], ours: Sequence[ShapeMeasures]) -> dict[str, float]:
    """The two-sample Kolmogorov-Smirnov distance of each measure: 0 for equal distributions, 1 for disjoint ones."""
    return {name: float(ks_2samp(column(real, name), column(ours, name)).statistic) for name in MEASURES}


def by_size_class(tumors: Sequence[ShapeMeasures], config: SynthesisConfig) -> dict[str, list[ShapeMeasures]]:
    """Tumours by the size class of their volume (``synthesis.shape.size_class_of``), smallest class first; empty classes too."""
    ordered = sorted(config.sizes, key=lambda name: config.sizes[name].radius_mm)
    classes: dict[str, list[ShapeMeasures]] = {name: [] for name in ordered}
    for tumor in tumors:
        classes[size_class_of(tumor.equivalent_radius_mm, config.sizes)].append(tumor)
    return classes


def run(
    *, organs: Sequence[str], num_drawn: int, seed: int = 0, as_json: bool = False, out: Path | None = None
) -> dict[str, Any]:
    """Compare, print Markdown or JSON, and with ``out`` write shapes.md, shapes.json and shapes.png there. Returns the JSON document."""
    config = Config.preset("abdomen").synthesis
    reals = [read_real(data_folder(), organ) for organ in organs]
    results, drawn = {}, {}
    for real in reals:
        ours = {}
        thick = np.random.default_rng(seed).choice(real.held_out_slices_mm, num_drawn)
        for shape in SHAPES:
            shaped = config.model_copy(update={"shape": shape})
            for view, slices in (("slices", thick), ("direct", np.full(num_drawn, GRID_MM))):
                ours[shape, view] = measure_ours(shaped, real.organ, [float(s) for s in slices], seed)
        results[real.organ] = _result(real, ours, config)
        drawn[real.organ] = ours
    document = {
        "title": "shapes of tumour masks, ours and real",
        "environment": environment(),
        "grid_mm": GRID_MM,
        "min_voxels": MIN_VOXELS,
        "num_drawn": num_drawn,
        "seed": seed,
        "organs": results,
    }
    text = as_markdown(document)
    print(json.dumps(document, indent=2) if as_json else text)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "shapes.md").write_text(text + "\n", encoding="utf-8")
        (out / "shapes.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        (out / "shapes.png").write_bytes(png_bytes(figure(reals, drawn)))
    return document


def _result(
    real: RealTumors, ours: Mapping[tuple[str, str], Sequence[ShapeMeasures]], config: SynthesisConfig
) -> dict[str, Any]:
    classes = by_size_class(real.held_out, config)
    result: dict[str, Any] = {
        "folder": real.folder.name,
        "cases": real.num_cases,
        "tumors_fit": len(real.fit),
        "tumors_held_out": len(real.held_out),
        "too_small": real.num_left_out,
        "at_border": real.num_cut,
        "real": _percentiles(real.held_out, config),
        "halves": compare(real.held_out, real.fit),  # what two samples of one distribution differ by
    }
    for shape in SHAPES:
        result[shape] = {}
        for view in VIEWS:
            tumors = ours[shape, view]
            own = by_size_class(tumors, config)
            result[shape][view] = {
                "tumors": len(tumors),
                "ks": compare(real.held_out, tumors),
                "ks_by_size_class": {
                    name: compare(classes[name], own[name])
                    for name in classes
                    if min(len(classes[name]), len(own[name])) >= MIN_TUMORS
                },
                "percentiles": _percentiles(tumors, config),
            }
    return result


def _percentiles(tumors: Sequence[ShapeMeasures], config: SynthesisConfig) -> dict[str, Any]:
    """{"all" or size class: {"tumors": N, measure: [10th, 50th, 90th percentile]}}; empty classes are left out."""
    parts = {"all": list(tumors), **by_size_class(tumors, config)}
    return {
        name: {
            "tumors": len(part),
            **{m: [float(v) for v in np.percentile(column(part, m), (10, 50, 90))] for m in MEASURES},
        }
        for name, part in parts.items()
        if part
    }


def as_markdown(document: Mapping[str, Any]) -> str:
    """The tables of a document of ``run``."""
    lines = []
    for organ, result in document["organs"].items():
        left_out = f"{result['too_small']} components too small, {result['at_border']} at the scan's border"
        counts = f"{result['tumors_fit']} tumours were seen by the fit. Left out: {left_out}. {document['num_drawn']} drawn of each shape."
        lines += [
            f"### {organ}: Kolmogorov-Smirnov distance to {result['tumors_held_out']} held-out real tumours",
            "",
            f"{result['folder']}, {result['cases']} cases; {counts}",
            "",
            "| measure | paper, slices | realistic, slices | paper, direct | realistic, direct | real: one half to the other |",
            "|---|---|---|---|---|---|",
        ]
        kinds = [result[shape][view]["ks"] for view in VIEWS for shape in SHAPES]
        for name in MEASURES:
            cells = " | ".join(f"{ks[name]:.2f}" for ks in (*kinds, result["halves"]))
            lines.append(f"| {name} | {cells} |")
        means = " | ".join(f"{np.mean(list(ks.values())):.2f}" for ks in (*kinds, result["halves"]))
        lines += [f"| mean | {means} |", "", f"10th, 50th, 90th percentile by size class, {organ}, slices:", ""]
        lines += [f"| class | whose | tumours | {' | '.join(MEASURES)} |", f"|{'---|' * (3 + len(MEASURES))}"]
        tables = {"real": result["real"], **{shape: result[shape]["slices"]["percentiles"] for shape in SHAPES}}
        for size_class in dict.fromkeys(name for table in tables.values() for name in table):
            for whose, table in tables.items():
                part = table.get(size_class)
                if part:
                    cells = " | ".join(" ".join(f"{v:.3g}" for v in part[m]) for m in MEASURES)
                    lines.append(f"| {size_class} | {whose} | {part['tumors']} | {cells} |")
        lines.append("")
    return "\n".join(lines).rstrip()


def figure(
    reals: Sequence[RealTumors], drawn: Mapping[str, Mapping[tuple[str, str], Sequence[ShapeMeasures]]]
) -> Figure:
    """The cumulative distributions: a row an organ, a column a measure; real, paper and realistic, through the real slices."""
    picture = Figure(figsize=(15.0, 2.9 * len(reals) + 0.6), dpi=80, layout="constrained", facecolor="white")
    axes = picture.subplots(len(reals), len(MEASURES), squeeze=False, sharey=True)
    for row, real in enumerate(reals):
        kinds = {"real": real.held_out, **{shape: drawn[real.organ][shape, "slices"] for shape in SHAPES}}
        for axis, name in zip(axes[row], MEASURES, strict=True):
            for kind, tumors in kinds.items():
                values = np.sort(column(tumors, name))
                color, width = _LINES[kind]
                axis.step(
                    values, np.arange(1, len(values) + 1) / len(values), where="post", color=color, lw=width, label=kind
                )
            if name in _LOGARITHMIC:
                axis.set_xscale("log")
            axis.set_title(name, fontsize=10)
            axis.grid(visible=True, color="0.9")
        axes[row][0].set_ylabel(f"{real.organ}: share of tumours")
    axes[0][0].legend(fontsize=9, loc="upper left")
    return picture


def main(arguments: Sequence[str] | None = None) -> None:
    """``ftengine bench shapes``."""
    parser = argparse.ArgumentParser(
        prog="ftengine bench shapes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--organs", nargs="+", default=["kidney", "pancreas"], metavar="ORGAN")
    parser.add_argument("--drawn", type=int, default=400, metavar="N", help="tumours drawn of each shape")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write shapes.md, shapes.json and shapes.png here")
    options = parser.parse_args(arguments)
    if options.drawn < MIN_TUMORS:
        parser.error(f"--drawn {options.drawn}: want at least {MIN_TUMORS}")
    try:
        run(organs=options.organs, num_drawn=options.drawn, seed=options.seed, as_json=options.json, out=options.out)
    except FtengineError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
