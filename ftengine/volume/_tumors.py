"""The tumours of the phantoms: how they are drawn, where they are placed, how they are painted and labelled."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from ftengine.errors import ConfigError
from ftengine.geometry import FloatZYX
from ftengine.volume._anatomy import Canvas, Scanner, Shape, Slices, lattice_field, random_lattice, rotation

Positions: TypeAlias = tuple[NDArray[np.float64], ...]  # patient coordinates of the planes along z, y and x, mm

LABELS: Mapping[str, Mapping[str, int]] = {
    "abdomen": {"liver": 1, "liver_tumor": 2, "pancreas": 3, "pancreas_tumor": 4, "kidney": 5, "kidney_tumor": 6},
    "chest": {"lung": 1, "lesion": 2},
}
TUMOR_OF: Mapping[str, Mapping[str, str]] = {
    "abdomen": {"liver": "liver_tumor", "pancreas": "pancreas_tumor", "kidney": "kidney_tumor"},
    "chest": {"lung": "lesion"},
}
# share of drawn tumours and range of their contrast to the organ; rim is the contrast of the core, its rim has -0.6 times that
KINDS: Mapping[str, Mapping[str, tuple[float, tuple[float, float]]]] = {
    "abdomen": {"hypo": (0.75, (-60.0, -15.0)), "hyper": (0.12, (15.0, 45.0)), "rim": (0.13, (-60.0, -20.0))},
    "chest": {"solid": (0.65, (700.0, 900.0)), "ground_glass": (0.35, (200.0, 400.0))},
}


@dataclass(frozen=True)
class Tumor:
    """A tumour to paint: organ, diameter of the sphere of its volume in mm, contrast to the organ in HU, kind.

    Kinds: abdomen ``hypo``, ``hyper`` (homogeneous; both take any contrast), ``rim`` (core of ``contrast_hu``, rim of -0.6 times that);
    chest ``solid`` (replaces the lung) and ``ground_glass`` (added to it). Raises ConfigError.
    """

    organ: str
    diameter_mm: float
    contrast_hu: float = -40.0
    kind: str = "hypo"

    def __post_init__(self) -> None:
        if not (np.isfinite(self.diameter_mm) and 0 < self.diameter_mm <= 200):
            raise ConfigError(f"Tumor: diameter_mm={self.diameter_mm}; want a length above 0 and at most 200 mm.")
        if not np.isfinite(self.contrast_hu):
            raise ConfigError(f"Tumor: contrast_hu={self.contrast_hu}; want a finite number of HU.")
        kinds = [kind for of_region in KINDS.values() for kind in of_region]
        if self.kind not in kinds:
            raise ConfigError(f"Tumor: kind={self.kind!r}; want one of {', '.join(kinds)}.")


@dataclass(frozen=True)
class PlacedTumor(Tumor):
    """A tumour as it lies in a phantom.

    center_mm_zyx: patient coordinates (RAS+ mm, order z y x) of its centre. num_voxels: voxels it got in the label. inside_fraction: the
    share of its own voxels that lie in its organ and in view; 1 means the labelled volume is that of ``diameter_mm``.
    """

    center_mm_zyx: FloatZYX = (0.0, 0.0, 0.0)
    num_voxels: int = 0
    inside_fraction: float = 1.0


@dataclass(frozen=True)
class TumorSpec:
    """How tumours are drawn: number per volume (both ends included), log-uniform diameter in mm, organs (None: all of the region).

    Kinds and contrasts follow ``KINDS``, contrasts times ``contrast_factor`` (above 1: an easier task, for demos that train for minutes).
    A diameter is lowered, at most to the smallest asked, where the organ is too thin for it. Raises ConfigError.
    """

    num_tumors: tuple[int, int] = (1, 3)
    diameter_mm: tuple[float, float] = (8.0, 30.0)
    organs: tuple[str, ...] | None = None
    contrast_factor: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.num_tumors[0] <= self.num_tumors[1]:
            raise ConfigError(f"TumorSpec: num_tumors={self.num_tumors}; want 0 <= low <= high.")
        if not 0 < self.diameter_mm[0] <= self.diameter_mm[1] <= 200:
            raise ConfigError(f"TumorSpec: diameter_mm={self.diameter_mm}; want 0 < low <= high <= 200, in mm.")
        if not (np.isfinite(self.contrast_factor) and self.contrast_factor > 0):
            raise ConfigError(f"TumorSpec: contrast_factor={self.contrast_factor}; want a number above 0.")
        if self.organs is not None and not self.organs:
            raise ConfigError("TumorSpec: organs=() names no organ; want at least one, or None for all of the region.")


@dataclass(frozen=True)
class Scene:
    """A healthy patient on a grid: what the tumours are painted into.

    organs: where each organ can hold a tumour, as shapes in mm of the image. world_mm: patient coordinates of the grid's planes, z y x.
    """

    region: str
    canvas: Canvas
    organs: Mapping[str, Shape]
    look: Scanner
    world_mm: Positions
    spacing_mm_zyx: FloatZYX

    @property
    def base_hu(self) -> Mapping[str, float]:
        """The HU that a tumour's contrast is relative to."""
        look = self.look
        return {"liver": look.liver_hu, "pancreas": look.pancreas_hu, "kidney": look.kidney_hu, "lung": look.lung_hu}


def paint_tumors(
    scene: Scene, tumors: TumorSpec | Sequence[Tumor] | None, rng_of: Callable[[int], np.random.Generator]
) -> tuple[PlacedTumor, ...]:
    """Place and paint tumours one after the other, away from one another where there is room.

    rng_of: the stream of each tumour by its number, and of -1 for how many there are. Raises ConfigError for an organ that is not in view
    and for a tumour wider than the field of view.
    """
    if tumors is None:
        return ()
    if isinstance(tumors, TumorSpec):
        low, high = tumors.num_tumors
        num = int(rng_of(-1).integers(low, high + 1))
    else:
        num = len(tumors)
    narrowest_mm = min(n * s for n, s in zip(scene.canvas.shape_zyx, scene.spacing_mm_zyx, strict=True))
    placed: list[PlacedTumor] = []
    for k in range(num):
        rng = rng_of(k)
        tumor = _drawn_tumor(scene, tumors, rng) if isinstance(tumors, TumorSpec) else tumors[k]
        if not (scene.organs[tumor.organ].level < 0).any():
            raise ConfigError(
                f"make_phantom: no voxel of {tumor.organ} in {scene.canvas.shape_zyx} voxels of {scene.spacing_mm_zyx} mm; "
                "want a larger field of view or smaller voxels."
            )
        if tumor.diameter_mm > narrowest_mm:
            raise ConfigError(
                f"make_phantom: tumour diameter_mm={tumor.diameter_mm:g} in a field of view {narrowest_mm:g} mm wide; want at most that."
            )
        placed.append(_paint_tumor(scene, tumor, _center(scene, tumor, placed, rng), rng))
    return tuple(placed)


def _drawn_tumor(scene: Scene, spec: TumorSpec, rng: np.random.Generator) -> Tumor:
    names = spec.organs or tuple(TUMOR_OF[scene.region])
    organ = names[int(rng.integers(len(names)))]
    low, high = spec.diameter_mm
    diameter = float(np.exp(rng.uniform(np.log(low), np.log(high))))
    room = -2.4 * float(scene.organs[organ].level.min(initial=0.0))
    kinds = KINDS[scene.region]
    kind = list(kinds)[int(rng.choice(len(kinds), p=[share for share, _ in kinds.values()]))]
    return Tumor(organ, max(low, min(diameter, room)), spec.contrast_factor * float(rng.uniform(*kinds[kind][1])), kind)


def _center(scene: Scene, tumor: Tumor, placed: Sequence[PlacedTumor], rng: np.random.Generator) -> NDArray[np.float64]:
    """A point (mm, z y x) deep in the organ, in view and clear of other tumours; the wishes are dropped in reverse order.

    Points are drawn in millimetres and the first that falls on an allowed voxel wins, so that another spacing hardly moves the tumour.
    """
    organ = scene.organs[tumor.organ]
    depth, box, world_mm = -organ.level, organ.box, scene.world_mm
    radius = tumor.diameter_mm / 2
    axes = [w[s] for w, s in zip(world_mm, box, strict=True)]
    allowed = depth >= min(rng.uniform(0.8, 1.4) * radius, 0.85 * float(depth.max()))
    z, y, x = axes[0][:, None, None], axes[1][None, :, None], axes[2][None, None, :]
    border = [np.minimum(a - w[0], w[-1] - a) for a, w in zip((z, y, x), world_mm, strict=True)]
    in_view = (border[0] >= radius) & (border[1] >= radius) & (border[2] >= radius)
    clear = np.ones_like(allowed)
    for other in placed:
        o = other.center_mm_zyx
        clear &= (z - o[0]) ** 2 + (y - o[1]) ** 2 + (x - o[2]) ** 2 > (radius + other.diameter_mm / 2 + 4) ** 2
    for wish in (in_view & clear, in_view, clear):
        if (allowed & wish).any():
            allowed &= wish
            break
    found = np.argwhere(allowed)
    low = np.array([a[i] for a, i in zip(axes, found.min(axis=0), strict=True)])
    high = np.array([a[i] for a, i in zip(axes, found.max(axis=0), strict=True)])
    points = low + rng.random((400, 3)) * (high - low)
    nearest = [
        np.clip(np.rint((points[:, i] - a[0]) / (a[1] - a[0] if len(a) > 1 else 1.0)), 0, len(a) - 1).astype(int)
        for i, a in enumerate(axes)
    ]
    hits = np.flatnonzero(allowed[nearest[0], nearest[1], nearest[2]])
    if hits.size:
        return points[hits[0]]
    index = found[int(rng.integers(len(found)))]
    return np.array([a[i] for a, i in zip(axes, index, strict=True)])


def _paint_tumor(scene: Scene, tumor: Tumor, center: NDArray[np.float64], rng: np.random.Generator) -> PlacedTumor:
    """Paint a warped ellipsoid whose volume, on an endless grid, is that of the sphere of ``diameter_mm``."""
    canvas, organ, world_mm, spacing_mm_zyx = (
        scene.canvas,
        scene.organs[tumor.organ],
        scene.world_mm,
        scene.spacing_mm_zyx,
    )
    value = LABELS[scene.region][tumor.organ]
    radius = tumor.diameter_mm / 2
    stretch = np.exp(np.clip(0.16 * rng.standard_normal(3), -0.25, 0.25))
    axes = radius * stretch / np.prod(stretch) ** (1 / 3)
    turn = rotation(*rng.uniform(0, 180, 3))
    lattice = random_lattice(rng, 8)
    edge_mm = max(float(np.mean(spacing_mm_zyx)), float(rng.uniform(0.1, 0.35)) * radius)

    # the voxels around the tumour, also those out of view: its volume must not depend on the border
    first = [
        int(np.floor((c - 1.9 * radius - w[0]) / s)) for c, w, s in zip(center, world_mm, spacing_mm_zyx, strict=True)
    ]
    last = [
        int(np.ceil((c + 1.9 * radius - w[0]) / s)) for c, w, s in zip(center, world_mm, spacing_mm_zyx, strict=True)
    ]
    offset = [
        w[0] + s * np.arange(a, b + 1) - c
        for a, b, c, w, s in zip(first, last, center, world_mm, spacing_mm_zyx, strict=True)
    ]
    p = np.stack(np.meshgrid(*offset, indexing="ij"), axis=-1) @ turn / axes
    level = (np.sqrt((p**2).sum(axis=-1)) - 1 + 0.1 * lattice_field(lattice, offset, 0.9 * radius)) * radius
    num_asked = max(1, round(np.pi / 6 * tumor.diameter_mm**3 / float(np.prod(spacing_mm_zyx))))
    level -= np.partition(level.ravel(), num_asked - 1)[num_asked - 1]

    seen = [
        slice(max(a, s.start), max(a, s.start, min(b + 1, s.stop)))
        for a, b, s in zip(first, last, organ.box, strict=True)
    ]
    view: Slices = (seen[0], seen[1], seen[2])
    level = level[tuple(slice(s.start - a, s.stop - a) for s, a in zip(view, first, strict=True))].astype(np.float32)
    organ_level = organ.level[
        tuple(slice(s.start - b.start, s.stop - b.start) for s, b in zip(view, organ.box, strict=True))
    ]

    contrast = np.full(level.shape, tumor.contrast_hu, dtype=np.float32)
    if tumor.kind == "rim":
        contrast[level > -0.3 * radius] *= -0.6
    hu = canvas.hu[view]
    target = (
        np.maximum(hu, np.minimum(hu + contrast, 60))
        if tumor.kind == "ground_glass"
        else scene.base_hu[tumor.organ] + contrast + np.float32(0.8) * canvas.texture[view]
    )
    alpha = np.clip(np.float32(0.5) - level / edge_mm, 0, 1) * np.clip(np.float32(0.5) - organ_level / edge_mm, 0, 1)
    hu += alpha * (target - hu)
    label = canvas.label[view]
    labelled = (level <= 0) & (label == value)
    label[labelled] = LABELS[scene.region][TUMOR_OF[scene.region][tumor.organ]]
    num = int(labelled.sum())
    z, y, x = (float(c) for c in center)
    return PlacedTumor(tumor.organ, tumor.diameter_mm, tumor.contrast_hu, tumor.kind, (z, y, x), num, num / num_asked)
