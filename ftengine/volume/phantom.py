"""Phantoms: analytic CT volumes of an abdomen or a chest with organ and tumour labels, for tests, demos and benches.

A phantom is synthetic. It is drawn from formulas, it shows no patient, and neither a phantom nor a number measured on one may ever be
presented as real data or as evidence about real CT. What it is good for: code that needs CT-like volumes with a known truth, and trends
between methods on a task that is neither trivial nor hopeless (organs with vessels and texture, six scanners, tumours whose contrast
overlaps with both).

A phantom is a function of (seed, case, arguments) alone. The anatomy does not depend on scanner or tumours: the same case without
tumours is the same patient before falling ill.

Field of view. Anatomy is defined in millimetres and shown at life size where the field of view (shape times spacing) holds the organs of
the region: 190 x 185 x 262 mm (z y x) for the abdomen, 250 x 190 x 262 mm for the chest. Where an axis is shorter, the patient is scaled
down along that axis by field of view / needed length, but no axis is left more than 1.3 times larger than the smallest: a small volume
shows a small patient with all organs, not a corner of a large one. Tumour diameters, blur and noise are never scaled. A longer field of
view shows more of the patient, then air; beyond about 200 mm above and below the middle the body simply continues.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from scipy.ndimage import label as find_pieces

from ftengine.errors import ConfigError
from ftengine.geometry import FloatZYX, Grid, IntZYX, float_zyx, from_ras, grid_from_matrix, int_zyx, reverse_axes
from ftengine.rng import Purpose, patch_rng
from ftengine.volume._abdomen import paint_abdomen
from ftengine.volume._anatomy import (
    Canvas,
    Floats,
    Scanner,
    Shape,
    drawn_tissues,
    lattice_field,
    random_lattice,
)
from ftengine.volume._chest import paint_chest
from ftengine.volume._tumors import KINDS, LABELS, TUMOR_OF, PlacedTumor, Scene, Tumor, TumorSpec, paint_tumors

__all__ = [
    "KINDS",
    "LABELS",
    "SCANNERS",
    "Phantom",
    "PlacedTumor",
    "Scanner",
    "Tumor",
    "TumorSpec",
    "make_phantom",
    "write_phantom_dataset",
]

# Liver and vein HU follow the five scanners of the first trial (few labels, many scanners); the sixth is a delayed phase. Columns:
# name; HU of liver, veins, arteries, pancreas, spleen, cortex, medulla, pelvis, lung; blur mm, noise HU, noise mm; radius of view mm.
SCANNERS: tuple[Scanner, ...] = (
    Scanner("portal-a", 105, 145, 150, 100, 118, 185, 170, 20, -855, 0.7, 6.5, 0.8),
    Scanner("portal-b", 95, 120, 130, 88, 108, 165, 145, 15, -835, 1.0, 7.5, 1.1, 190.0),
    Scanner("native", 75, 61, 45, 46, 52, 36, 31, 8, -870, 0.9, 6.0, 1.2),
    Scanner("portal-100kv", 120, 178, 180, 112, 130, 205, 190, 25, -845, 0.6, 9.0, 0.7, 200.0),
    Scanner("arterial", 85, 75, 310, 112, 124, 200, 95, 15, -860, 0.8, 8.0, 1.0),
    Scanner("delayed", 90, 104, 110, 80, 95, 140, 150, 420, -825, 1.2, 5.5, 1.4, 185.0),
)
NEED_MM_ZYX: Mapping[str, FloatZYX] = {"abdomen": (190.0, 185.0, 262.0), "chest": (250.0, 190.0, 262.0)}
VIEW_MM_ZYX: Mapping[str, FloatZYX] = {"abdomen": (14.0, 2.0, 2.0), "chest": (-22.0, 2.0, 0.0)}
PAINTERS: Mapping[str, Callable[[Canvas, np.random.Generator, Scanner], dict[str, Shape]]] = {
    "abdomen": paint_abdomen,
    "chest": paint_chest,
}
MAX_STRETCH = 1.3
LUNG_KERNEL_NOISE = 1.8  # chest scans are reconstructed sharper
GEOMETRY_DRAW, TUMOR_DRAW = 3, 4  # draws of the case's stream: 0 anatomy, 1 scanner, 2 noise; one per tumour from 4 on
PADDING_HU, MAX_HU = -1024, 3071


@dataclass(frozen=True)
class Phantom:
    """One synthetic CT; never to be presented as real data.

    image_hu: int16 [z, y, x], -1024 to 3071 HU. label: uint8 [z, y, x], values ``LABELS[region]``. grid: RAS+, the patient's own origin
    (midline, near the middle of the field of view). scanner: the nominal HU, blur and noise; a patient's tissues are off by up to 6 HU.
    """

    region: str
    seed: int
    case: int
    image_hu: NDArray[np.int16]
    label: NDArray[np.uint8]
    grid: Grid
    tumors: tuple[PlacedTumor, ...]
    scanner: Scanner


def make_phantom(
    region: str,
    *,
    seed: int,
    case: int = 0,
    shape_zyx: IntZYX = (96, 128, 128),
    spacing_mm_zyx: FloatZYX = (2.0, 2.0, 2.0),
    tumors: TumorSpec | Sequence[Tumor] | None = None,
    scanner: int | None = None,
) -> Phantom:
    """Draw one synthetic CT of ``region`` ("abdomen" or "chest").

    tumors: None for a healthy patient, a ``TumorSpec`` to draw them, or the tumours themselves. scanner: index into ``SCANNERS``; None
    draws one. Bit-identical for equal arguments; a case keeps its anatomy when tumours, scanner, shape or spacing change, apart from the
    scale that the field of view asks for (module docstring). Raises ConfigError.
    """
    shape_zyx, spacing_mm_zyx = int_zyx(shape_zyx), float_zyx(spacing_mm_zyx)
    _check(region, seed, case, shape_zyx, spacing_mm_zyx, tumors, scanner)
    anatomy_rng, look_rng, noise_rng = (patch_rng(seed, Purpose.PHANTOM, index=case, draw=k) for k in range(3))
    drawn = int(look_rng.integers(len(SCANNERS)))
    nominal = SCANNERS[drawn if scanner is None else scanner]
    look = drawn_tissues(nominal, look_rng)

    scale = _body_scale(
        region, shape_zyx, spacing_mm_zyx, float(np.exp(0.045 * np.clip(anatomy_rng.standard_normal(), -2, 2)))
    )
    shift_mm = np.clip(anatomy_rng.standard_normal(3), -2, 2) * (4, 3, 4)
    middle_mm = (np.array(VIEW_MM_ZYX[region]) + shift_mm) * scale  # of the field of view, in patient coordinates
    world_mm = tuple(
        m + s * (np.arange(n) - (n - 1) / 2) for m, s, n in zip(middle_mm, spacing_mm_zyx, shape_zyx, strict=True)
    )
    texture = 4.5 * lattice_field(random_lattice(look_rng, 96), world_mm, 4.0) + 4.0 * lattice_field(
        random_lattice(look_rng, 32), world_mm, 13.0
    )
    canvas = Canvas(tuple(w / s for w, s in zip(world_mm, scale, strict=True)), anatomy_rng, texture)
    organs = PAINTERS[region](canvas, anatomy_rng, look)
    _drop_specks(canvas, region, organs)
    # what other tissue was painted over belongs to the organ no more; lengths are mm of the image from here on
    room = {
        name: Shape(
            s.box,
            np.where(canvas.label[s.box] == LABELS[region][name], np.float32(scale.mean()) * s.level, np.float32(0.1)),
        )
        for name, s in organs.items()
    }
    scene = Scene(region, canvas, room, look, world_mm, spacing_mm_zyx)
    placed = paint_tumors(
        scene, tumors, lambda k: patch_rng(seed, Purpose.PHANTOM, index=case, draw=TUMOR_DRAW + 1 + k)
    )

    x0, y0, z0 = (float(w[0]) for w in reversed(world_mm))
    matrix = np.diag([*reversed(spacing_mm_zyx), 1.0])
    matrix[:3, 3] = x0, y0, z0
    image = _scanned(canvas.hu, nominal, spacing_mm_zyx, noise_rng, LUNG_KERNEL_NOISE if region == "chest" else 1.0)
    return Phantom(region, seed, case, image, canvas.label, grid_from_matrix(shape_zyx, matrix), placed, nominal)


def write_phantom_dataset(
    folder: Path,
    *,
    region: str,
    num_volumes: int,
    seed: int,
    num_with_tumors: int | None = None,
    annotate_tumors: bool = True,
    tumors: TumorSpec | None = None,
    first_case: int = 0,
    scanners: Sequence[int] | None = None,
    shape_zyx: IntZYX = (96, 128, 128),
    spacing_mm_zyx: FloatZYX = (2.0, 2.0, 2.0),
    vary_geometry: bool = False,
    prefix: str = "phantom",
) -> list[Path]:
    """Write phantoms as NIfTI pairs ``PREFIX_CASE_ct.nii.gz`` (int16 HU) and ``PREFIX_CASE_label.nii.gz`` (uint8); returns the image paths.

    Cases are ``first_case`` and following: sets of one seed that must not share patients take ranges of cases that do not overlap. The
    first ``num_with_tumors`` (None: all) hold tumours after ``tumors`` (None: ``TumorSpec()``); for healthy volumes pass 0. With
    ``annotate_tumors`` False tumours stay in the image but their voxels carry the organ's value, as in a set labelled for organs only.
    scanners: indices used in turn; None draws one per case. ``vary_geometry``: every second case is stored in LPS axes and two of three at
    another spacing (up to 1.6 times along z, 0.8 to 1.2 in plane) with the same field of view. Raises ConfigError.
    """
    wanted = num_volumes if num_with_tumors is None else num_with_tumors
    if num_volumes < 1:
        raise ConfigError(f"write_phantom_dataset: num_volumes={num_volumes}; want at least 1.")
    if not 0 <= wanted <= num_volumes:
        raise ConfigError(f"write_phantom_dataset: num_with_tumors={wanted}; want 0 to num_volumes={num_volumes}.")
    if scanners is not None and not scanners:
        raise ConfigError(
            "write_phantom_dataset: scanners=() names no scanner; want at least one index, or None to draw one per case."
        )
    folder.mkdir(parents=True, exist_ok=True)
    images: list[Path] = []
    for k in range(num_volumes):
        case = first_case + k
        shape, spacing = (
            _varied(seed, case, shape_zyx, spacing_mm_zyx) if vary_geometry else (shape_zyx, spacing_mm_zyx)
        )
        phantom = make_phantom(
            region,
            seed=seed,
            case=case,
            shape_zyx=shape,
            spacing_mm_zyx=spacing,
            tumors=(tumors or TumorSpec()) if k < wanted else None,
            scanner=None if scanners is None else scanners[k % len(scanners)],
        )
        label = phantom.label
        if not annotate_tumors:
            label = label.copy()
            for organ, tumor in TUMOR_OF[region].items():
                label[label == LABELS[region][tumor]] = LABELS[region][organ]
        native = _lps(phantom.grid) if vary_geometry and case % 2 else phantom.grid
        image_path = folder / f"{prefix}_{case:03d}_ct.nii.gz"
        _write_nifti(image_path, from_ras(phantom.image_hu, native), native)
        _write_nifti(folder / f"{prefix}_{case:03d}_label.nii.gz", from_ras(label, native), native)
        images.append(image_path)
    return images


def _check(
    region: str,
    seed: int,
    case: int,
    shape_zyx: IntZYX,
    spacing_mm_zyx: FloatZYX,
    tumors: TumorSpec | Sequence[Tumor] | None,
    scanner: int | None,
) -> None:
    if region not in LABELS:
        raise ConfigError(f"make_phantom: region={region!r}; want one of {', '.join(LABELS)}.")
    if not 0 <= min(seed, case) <= max(seed, case) < 2**63:
        raise ConfigError(f"make_phantom: seed={seed}, case={case}; want numbers from 0 to 2**63 - 1.")
    if min(shape_zyx) < 8:
        raise ConfigError(f"make_phantom: shape_zyx={shape_zyx}; want at least 8 voxels on each axis.")
    if not all(np.isfinite(s) and 0 < s <= 20 for s in spacing_mm_zyx):
        raise ConfigError(
            f"make_phantom: spacing_mm_zyx={spacing_mm_zyx}; want three lengths above 0 and at most 20 mm."
        )
    if scanner is not None and not 0 <= scanner < len(SCANNERS):
        raise ConfigError(f"make_phantom: scanner={scanner}; want None or 0 to {len(SCANNERS) - 1}.")
    if tumors is None:
        return
    organs = (tumors.organs or ()) if isinstance(tumors, TumorSpec) else tuple(t.organ for t in tumors)
    for organ in organs:
        if organ not in TUMOR_OF[region]:
            raise ConfigError(
                f"make_phantom: tumour organ {organ!r} in region {region!r}; want one of {', '.join(TUMOR_OF[region])}."
            )
    for tumor in () if isinstance(tumors, TumorSpec) else tumors:
        if tumor.kind not in KINDS[region]:
            raise ConfigError(
                f"make_phantom: tumour kind {tumor.kind!r} in region {region!r}; want one of {', '.join(KINDS[region])}."
            )


def _body_scale(region: str, shape_zyx: IntZYX, spacing_mm_zyx: FloatZYX, patient: float) -> NDArray[np.float64]:
    """Millimetres of the image per millimetre of the body frame, z y x: the patient's own size, or what the field of view allows."""
    fits = np.array([n * s / need for n, s, need in zip(shape_zyx, spacing_mm_zyx, NEED_MM_ZYX[region], strict=True)])
    scale = np.minimum(fits, patient)
    return np.asarray(np.minimum(scale, MAX_STRETCH * scale.min()))


def _scanned(
    hu: Floats, scanner: Scanner, spacing_mm_zyx: FloatZYX, rng: np.random.Generator, noise_factor: float
) -> NDArray[np.int16]:
    """Blur, correlated noise of the scanner's sd, padding outside its circle, int16."""

    def blurred(x: Floats, sigma_mm: float) -> Floats:
        return gaussian_filter(x, [sigma_mm / s for s in spacing_mm_zyx], truncate=3.0, mode="nearest")

    image = blurred(hu, scanner.blur_mm)
    noise = blurred(rng.standard_normal(hu.shape, dtype=np.float32), scanner.noise_sigma_mm)
    image += noise * np.float32(noise_factor * scanner.noise_hu / float(noise.std()))
    if scanner.fov_radius_mm is not None:
        # never narrower than the volume itself: a small volume is a cut-out of the scan
        offset = [s * (np.arange(n) - (n - 1) / 2) for n, s in zip(hu.shape[1:], spacing_mm_zyx[1:], strict=True)]
        radius = max(scanner.fov_radius_mm, min(float(o[-1]) for o in offset))
        image[:, np.hypot(offset[0][:, None], offset[1][None, :]) > radius] = PADDING_HU
    return np.clip(np.rint(image), PADDING_HU, MAX_HU).astype(np.int16)


def _drop_specks(canvas: Canvas, region: str, organs: Mapping[str, Shape]) -> None:
    """Clear the crumbs of an organ that its neighbours cut off: pieces below 2 % of its largest."""
    for name, shape in organs.items():
        label_zyx = canvas.label[shape.box]
        pieces, _ = find_pieces(label_zyx == LABELS[region][name])
        sizes = np.bincount(pieces.ravel())[1:]
        if sizes.size > 1:
            small = np.concatenate([[False], sizes < 0.02 * sizes.max()])
            label_zyx[small[pieces]] = 0


def _varied(seed: int, case: int, shape_zyx: IntZYX, spacing_mm_zyx: FloatZYX) -> tuple[IntZYX, FloatZYX]:
    """Another spacing for two of three cases, with the same field of view to within half a voxel."""
    if case % 3 == 0:
        return shape_zyx, spacing_mm_zyx
    rng = patch_rng(seed, Purpose.PHANTOM, index=case, draw=GEOMETRY_DRAW)
    along, in_plane = float(rng.uniform(1.0, 1.6)), float(rng.uniform(0.8, 1.2))
    spacing = float_zyx(round(s * f, 3) for s, f in zip(spacing_mm_zyx, (along, in_plane, in_plane), strict=True))
    return int_zyx(
        max(8, round(n * a / b)) for n, a, b in zip(shape_zyx, spacing_mm_zyx, spacing, strict=True)
    ), spacing


def _lps(grid: Grid) -> Grid:
    """The grid of the same voxels stored with x and y reversed, as most scanners do."""
    flip = np.diag([-1.0, -1.0, 1.0, 1.0])
    flip[:2, 3] = grid.shape_zyx[2] - 1, grid.shape_zyx[1] - 1
    return grid_from_matrix(grid.shape_zyx, grid.matrix @ flip)


def _write_nifti(path: Path, array: NDArray[np.int16] | NDArray[np.uint8], grid: Grid) -> None:
    image = nib.Nifti1Image(reverse_axes(array), grid.matrix)
    image.header.set_xyzt_units("mm")
    image.set_qform(grid.matrix, code=1)
    image.set_sform(grid.matrix, code=1)
    nib.save(image, path)
