"""The anatomy behind the phantoms: level sets in millimetres of a body frame, painted on a voxel grid.

Frame: z superior, y anterior, x towards the patient's right, millimetres; x = 0 is the midline. Every number of a shape below is such
a length, so an organ looks the same at any spacing. A ``Shape`` is a level set (negative inside, about the distance to the surface in
mm) on the part of the grid where it can matter; the ``Canvas`` bends all of them by one smooth random displacement and paints them one
over the other with a border as wide as a voxel, which is the partial volume of a real scan.

Random numbers are drawn whether or not a shape is in view, so the anatomy of a case does not depend on the field of view.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ftengine.geometry import IntZYX

Floats: TypeAlias = NDArray[np.floating[Any]]
Slices: TypeAlias = tuple[slice, slice, slice]
Segment: TypeAlias = tuple[
    NDArray[np.float64], NDArray[np.float64], float, float
]  # start, end (z y x mm), radius at both

AIR_HU, LUNG_GAS_HU, FAT_HU, SKIN_HU, MUSCLE_HU, FLUID_HU, CORTICAL_HU, MARROW_HU = (
    -1000,
    -950,
    -102,
    15,
    55,
    15,
    520,
    190,
)
WARP_PITCH_MM, WARP_SD_MM = 70.0, 3.5
BUMP_PITCH_MM = 21.0
FAR_MM = 1e3  # the level where a shape was not evaluated
# A cubic B-spline lattice of unit normal numbers has variance (151/315)^3 between and on its nodes, averaged.
_LATTICE_SD = (151 / 315) ** 1.5


@dataclass(frozen=True)
class Scanner:
    """How one scanner and its contrast phase show the tissues: mean HU, blur and noise (sigmas in mm, noise in HU).

    ``venous_hu`` is the hepatic and portal veins, ``arterial_hu`` the aorta and the left heart. ``fov_radius_mm``: outside this circle
    around the middle of the field of view the image is -1024; None for a scanner that shows the whole square.
    """

    name: str
    liver_hu: float
    venous_hu: float
    arterial_hu: float
    pancreas_hu: float
    spleen_hu: float
    cortex_hu: float
    medulla_hu: float
    pelvis_hu: float
    lung_hu: float
    blur_mm: float
    noise_hu: float
    noise_sigma_mm: float
    fov_radius_mm: float | None = None

    @property
    def kidney_hu(self) -> float:
        """Mean HU of the parenchyma: cortex and medulla in about equal shares."""
        return 0.5 * (self.cortex_hu + self.medulla_hu)


def drawn_tissues(scanner: Scanner, rng: np.random.Generator) -> Scanner:
    """The scanner with the HU of one patient: each enhancing tissue off by a normal number of sd 3 HU, at most 6."""
    names = [f.name for f in fields(Scanner) if f.name.endswith("_hu") and f.name != "noise_hu"]
    changes: dict[str, Any] = {
        name: getattr(scanner, name) + float(np.clip(3 * rng.standard_normal(), -6, 6)) for name in names
    }
    return replace(scanner, **changes)


@dataclass(frozen=True)
class Shape:
    """A level set in mm (negative inside) on the voxels ``box`` of the grid; outside the box the shape is absent."""

    box: Slices
    level: Floats

    def grown(self, length_mm: float) -> "Shape":
        """The shape with its surface moved outwards."""
        return Shape(self.box, self.level - np.float32(length_mm))

    def on(self, box: Slices) -> Floats:
        """The level on another box."""
        if box == self.box:
            return self.level
        level = np.full([s.stop - s.start for s in box], FAR_MM, dtype=np.float32)
        common = [
            slice(max(a.start, b.start), max(a.start, b.start, min(a.stop, b.stop)))
            for a, b in zip(box, self.box, strict=True)
        ]
        to = tuple(slice(c.start - a.start, c.stop - a.start) for c, a in zip(common, box, strict=True))
        of = tuple(slice(c.start - b.start, c.stop - b.start) for c, b in zip(common, self.box, strict=True))
        level[to] = self.level[of]
        return level

    def within(self, other: "Shape") -> "Shape":
        """The part of the shape that lies inside another."""
        return Shape(self.box, np.maximum(self.level, other.on(self.box)))

    def without(self, other: "Shape") -> "Shape":
        """The part of the shape that lies outside another."""
        return Shape(self.box, np.maximum(self.level, -other.on(self.box)))


def smooth_union(a: Floats, b: Floats, reach_mm: float) -> Floats:
    """Union of two level sets whose crease is filled over about ``reach_mm``."""
    k = np.float32(reach_mm)
    h = np.maximum(k - np.abs(a - b), np.float32(0))
    return np.minimum(a, b) - h * h * np.float32(0.25) / k


def rotation(turn_z_deg: float = 0, turn_y_deg: float = 0, turn_x_deg: float = 0) -> NDArray[np.float64]:
    """3 x 3 rotation of (z, y, x) vectors about the z, then y, then x axis."""
    a, b, c = np.deg2rad([turn_z_deg, turn_y_deg, turn_x_deg])
    about_z = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    about_y = np.array([[np.cos(b), 0, -np.sin(b)], [0, 1, 0], [np.sin(b), 0, np.cos(b)]])
    about_x = np.array([[np.cos(c), -np.sin(c), 0], [np.sin(c), np.cos(c), 0], [0, 0, 1]])
    return np.asarray(about_x @ about_y @ about_z, dtype=np.float64)


def lattice_field(lattice: Floats, positions_mm: Sequence[NDArray[np.float64]], pitch_mm: float) -> Floats:
    """Cubic B-spline through a periodic lattice of random numbers, on the grid of three position vectors (z, y, x), sd about 1."""
    field = lattice
    for axis in (2, 1, 0):  # z last: its slabs are contiguous
        cell = np.floor(positions_mm[axis] / pitch_mm)
        t = positions_mm[axis] / pitch_mm - cell
        weights = np.stack([(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3]) / 6
        nodes = (cell.astype(np.int64)[None] + np.arange(-1, 3)[:, None]) % lattice.shape[axis]
        moved = np.moveaxis(field, axis, 0)
        out = np.empty((len(t), *moved.shape[1:]), dtype=np.float32)
        for i in range(len(t)):
            w, n = weights[:, i].astype(np.float32), nodes[:, i]
            out[i] = w[0] * moved[n[0]] + w[1] * moved[n[1]] + w[2] * moved[n[2]] + w[3] * moved[n[3]]
        field = np.moveaxis(out, 0, axis)
    return np.ascontiguousarray(field * np.float32(1 / _LATTICE_SD))


def random_lattice(rng: np.random.Generator, num_nodes: int) -> Floats:
    """Unit normal numbers for ``lattice_field``; the field repeats after ``num_nodes`` pitches."""
    return rng.standard_normal((num_nodes,) * 3, dtype=np.float32)


def _slices(start: NDArray[np.int64], stop: NDArray[np.int64]) -> Slices:
    return slice(int(start[0]), int(stop[0])), slice(int(start[1]), int(stop[1])), slice(int(start[2]), int(stop[2]))


class Canvas:
    """A voxel grid on which shapes are evaluated and painted.

    positions_mm: body coordinates of the grid's planes along z, y and x. texture: HU added where a tissue is painted with ``texture``.
    Holds ``hu`` (float32) and ``label`` (uint8), both [z, y, x].
    """

    def __init__(
        self, positions_mm: tuple[NDArray[np.float64], ...], rng: np.random.Generator, texture: Floats
    ) -> None:
        self.positions_mm = positions_mm
        self.shape_zyx: IntZYX = (len(positions_mm[0]), len(positions_mm[1]), len(positions_mm[2]))
        self.full: Slices = (slice(0, self.shape_zyx[0]), slice(0, self.shape_zyx[1]), slice(0, self.shape_zyx[2]))
        self._first_mm = np.array([p[0] for p in positions_mm])
        self._step_mm = np.array([p[1] - p[0] for p in positions_mm])
        self.edge_mm = max(0.8, float(self._step_mm.mean()))
        warp = [WARP_SD_MM * random_lattice(rng, 12) for _ in range(3)]
        self.coordinates = tuple(
            lattice_field(w, positions_mm, WARP_PITCH_MM)
            + np.expand_dims(p, [a for a in range(3) if a != axis]).astype(np.float32)
            for axis, (w, p) in enumerate(zip(warp, positions_mm, strict=True))
        )
        self.bumps = lattice_field(random_lattice(rng, 32), positions_mm, BUMP_PITCH_MM)
        self.texture = texture
        self.hu = np.full(self.shape_zyx, AIR_HU, dtype=np.float32)
        self.label = np.zeros(self.shape_zyx, dtype=np.uint8)

    def windows(self, low_mm: ArrayLike, high_mm: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """First and last + 1 voxel (N, 3) that shapes between pairs of corners (N, 3) can reach; an axis without overlap is empty."""
        low, high = np.asarray(low_mm, dtype=np.float64), np.asarray(high_mm, dtype=np.float64)
        middle = (low + high) / 2
        size = np.array(self.shape_zyx)
        # Bending moves the middle by its own displacement and the rest by little more: the displacement changes by < 0.25 mm per mm.
        at = np.clip(np.rint((middle - self._first_mm) / self._step_mm), 0, size - 1).astype(np.int64)
        bent = np.stack([c[at[:, 0], at[:, 1], at[:, 2]] for c in self.coordinates], axis=1)
        middle -= bent - (self._first_mm + at * self._step_mm)
        length = high - low
        reach = 0.625 * length + 0.06 * length.max(axis=1, keepdims=True) + 2 + self.edge_mm
        start = np.clip(np.ceil((middle - reach - self._first_mm) / self._step_mm), 0, size).astype(np.int64)
        stop = np.clip(np.floor((middle + reach - self._first_mm) / self._step_mm) + 1, 0, size).astype(np.int64)
        return start, np.maximum(start, stop)

    def window(self, low_mm: ArrayLike, high_mm: ArrayLike) -> Slices:
        """The voxels that one shape between two corners (before bending) can reach, with room for its border; may be empty."""
        start, stop = self.windows(np.asarray(low_mm)[None], np.asarray(high_mm)[None])
        return _slices(start[0], stop[0])

    def ellipsoid(
        self,
        center: Sequence[float],
        radii: Sequence[float],
        turn: NDArray[np.float64] | None = None,
        *,
        bump_mm: float = 0,
        room_mm: float = 0,
    ) -> Shape:
        """An ellipsoid with radii along the (turned) z, y, x axes; ``room_mm`` widens its box for a later ``grown``."""
        r = np.asarray(radii, dtype=np.float64)
        axes = np.eye(3) if turn is None else turn
        reach = np.sqrt(((axes * r) ** 2).sum(axis=1)) + 2.5 * bump_mm + room_mm
        box = self.window(np.asarray(center) - reach, np.asarray(center) + reach)
        p = [c[box] - np.float32(o) for c, o in zip(self.coordinates, center, strict=True)]
        k0, k1 = np.zeros((), dtype=np.float32), np.zeros((), dtype=np.float32)
        for j in range(3):
            q = p[j] if turn is None else sum(np.float32(axes[i, j]) * p[i] for i in range(3))
            q2 = (q * np.float32(1 / r[j])) ** 2
            k0, k1 = k0 + q2, k1 + q2 * np.float32(1 / r[j] ** 2)
        k0 = np.sqrt(k0)
        level = k0 * (k0 - 1) / np.sqrt(k1 + np.float32(1e-9))  # first-order distance to an ellipsoid
        return Shape(box, level + np.float32(bump_mm) * self.bumps[box] if bump_mm else level)

    def tubes(self, segments: Sequence[Segment], *, bump_mm: float = 0, room_mm: float = 0) -> Shape:
        """Union of round cones: a tube, or a tree of them."""
        ends = np.array([(a, b) for a, b, _, _ in segments])
        radii = np.array([(ra, rb) for _, _, ra, rb in segments])
        reach = radii.max(axis=1, keepdims=True) + 2.5 * bump_mm + room_mm
        start, stop = self.windows(ends.min(axis=1) - reach, ends.max(axis=1) + reach)
        seen = np.flatnonzero((stop > start).all(axis=1))
        first, last = (
            (start[seen].min(axis=0), stop[seen].max(axis=0)) if seen.size else (np.zeros(3, int), np.zeros(3, int))
        )
        level = np.full(last - first, FAR_MM, dtype=np.float32)
        for k in seen:
            box, part = _slices(start[k], stop[k]), _slices(start[k] - first, stop[k] - first)
            (a, b), (ra, rb) = ends[k].astype(np.float32), radii[k].astype(np.float32)
            z, y, x = self.coordinates[0][box] - a[0], self.coordinates[1][box] - a[1], self.coordinates[2][box] - a[2]
            d = b - a
            length2 = max(d @ d, np.float32(1e-6))
            along = d[0] * z + d[1] * y + d[2] * x
            t = np.clip(along / length2, np.float32(0), np.float32(1))
            # |p - t d|^2 multiplied out; rounding may leave a little below 0 on the axis
            distance = np.sqrt(np.maximum(z * z + y * y + x * x - t * (2 * along - t * length2), np.float32(0)))
            np.minimum(level[part], distance - (ra + (rb - ra) * t), out=level[part])
        union = _slices(first, last)
        return Shape(union, level + np.float32(bump_mm) * self.bumps[union] if bump_mm else level)

    def column(
        self, center_yx: tuple[float, float], half_yx: tuple[float, float], width: Floats | None = None
    ) -> Shape:
        """An endless column along z whose section is between an ellipse and a rounded box; ``width`` scales it by z plane."""
        _, y, x = self.coordinates
        inverse = np.float32(1) if width is None else (1 / np.maximum(width, np.float32(0.05)))[:, None, None]
        v = (((y - np.float32(center_yx[0])) * np.float32(1 / half_yx[0])) * inverse) ** 2
        u = (((x - np.float32(center_yx[1])) * np.float32(1 / half_yx[1])) * inverse) ** 2
        # the mean of the 2-norm and the 4-norm is a norm
        norm = np.float32(0.5) * (np.sqrt(u + v) + np.sqrt(np.sqrt(u * u + v * v)))
        return Shape(self.full, (norm - 1) * np.float32(min(half_yx)))

    def vault(self, center: Sequence[float], radii: Sequence[float]) -> Shape:
        """The upper half of an ellipsoid standing on the column of its equator: one half of the diaphragm, abdomen inside."""
        z, y, x = self.coordinates
        q = (np.maximum(z - np.float32(center[0]), np.float32(0)) * np.float32(1 / radii[0])) ** 2
        q += ((y - np.float32(center[1])) * np.float32(1 / radii[1])) ** 2
        q += ((x - np.float32(center[2])) * np.float32(1 / radii[2])) ** 2
        return Shape(self.full, (np.sqrt(q) - 1) * np.float32(min(radii)))

    def paint(
        self, shape: Shape, hu: float | Floats, *, texture: float = 0, label: int | None = None, halo_mm: float = 0
    ) -> None:
        """Lay a shape over what is there; ``label`` is written where the level is negative, ``halo_mm`` parts it by fat first."""
        if halo_mm:
            self.paint(shape.grown(halo_mm), FAT_HU, texture=0.7, label=0)
        view = self.hu[shape.box]
        alpha = np.clip(np.float32(0.5) - shape.level * np.float32(1 / self.edge_mm), np.float32(0), np.float32(1))
        value = hu + np.float32(texture) * self.texture[shape.box] if texture else hu
        view += alpha * (value - view)
        if label is not None:
            self.label[shape.box][shape.level < 0] = label


def path(*points: Sequence[float]) -> list[Segment]:
    """A tube through points (z, y, x, radius)."""
    p = np.asarray(points, dtype=np.float64)
    return [(a[:3], b[:3], float(a[3]), float(b[3])) for a, b in pairwise(p)]


def tree(
    rng: np.random.Generator,
    root: ArrayLike,
    toward: ArrayLike,
    length_mm: float,
    radius_mm: float,
    generations: int,
    spread: float = 0.75,
) -> list[Segment]:
    """A branching vessel: each branch bends once and splits in two thinner, shorter ones."""
    start, direction = np.asarray(root, dtype=np.float64), np.asarray(toward, dtype=np.float64)
    direction = direction / np.linalg.norm(direction)
    bent = direction + 0.25 * rng.standard_normal(3)
    middle = start + 0.5 * length_mm * direction
    end = middle + 0.5 * length_mm * bent / np.linalg.norm(bent)
    segments: list[Segment] = [
        (start, middle, radius_mm, 0.96 * radius_mm),
        (middle, end, 0.96 * radius_mm, 0.92 * radius_mm),
    ]
    if generations > 1:
        side = rng.standard_normal(3)
        side -= direction * (side @ direction)
        side *= spread / np.linalg.norm(side)
        for sign, share in ((1, rng.uniform(0.62, 0.8)), (-1, rng.uniform(0.72, 0.88))):
            segments += tree(
                rng,
                end,
                direction + sign * side,
                length_mm * rng.uniform(0.68, 0.9),
                radius_mm * share,
                generations - 1,
                spread,
            )
    return segments


def jitter(rng: np.random.Generator, point: Iterable[float], sd_mm: float) -> list[float]:
    return [float(v + sd_mm * np.clip(rng.standard_normal(), -2, 2)) for v in point]


def sizes(rng: np.random.Generator, radii: Iterable[float], sd: float) -> list[float]:
    """Radii times one common and three own random factors."""
    common = np.exp(sd * np.clip(rng.standard_normal(), -2, 2))
    return [float(r * common * np.exp(0.5 * sd * np.clip(rng.standard_normal(), -2, 2))) for r in radii]


def paint_table(canvas: Canvas, back_y_mm: float, half_width_mm: float) -> None:
    """The couch: a curved shell under the back, straight along z and not bent with the patient."""
    _, y, x = canvas.positions_mm
    surface = back_y_mm - 4 + 18 * np.clip((np.abs(x) / half_width_mm), 0, 1.4) ** 2
    depth = (surface[None, :] - y[:, None]).astype(np.float32)
    inside = (depth > 0) & (depth < 26) & (np.abs(x)[None, :] < 1.2 * half_width_mm)
    shell = inside & ((depth < 3) | (depth > 22))
    canvas.hu[:, inside] = -860
    canvas.hu[:, shell] = -180


def paint_spine(
    canvas: Canvas, rng: np.random.Generator, y_mm: float, half_yx: tuple[float, float], pitch_mm: float
) -> None:
    """Vertebral bodies, discs, canal, arches and spinous and transverse processes around (y, x) = (y_mm, 0)."""
    phase = rng.uniform(0, pitch_mm)
    half_y, half_x = half_yx
    canal_y = y_mm - half_y - 10
    box = canvas.window((-FAR_MM, canal_y - 45, -half_x - 45), (FAR_MM, y_mm + half_y + 4, half_x + 45))
    z, y, x = (c[box] for c in canvas.coordinates)
    along = np.abs(
        (z + np.float32(phase)) % np.float32(pitch_mm) - np.float32(pitch_mm / 2)
    )  # 0 in the middle of a vertebra
    # bodies are waisted: the end plates are wider than the middle
    waist = np.float32(0.9) + np.float32(0.1) * (along * np.float32(2 / pitch_mm)) ** 2
    radial = np.sqrt(((y - np.float32(y_mm)) * np.float32(1 / half_y)) ** 2 + ((x * np.float32(1 / half_x)) ** 2))
    column = (radial / waist - 1) * np.float32(half_y)
    canvas.paint(Shape(box, column), 85, texture=1)
    body = np.maximum(column, along - np.float32(pitch_mm / 2 - 3.5))
    canvas.paint(Shape(box, body), CORTICAL_HU)
    canvas.paint(Shape(box, body + np.float32(1.8)), MARROW_HU, texture=4)
    ring = np.sqrt((y - np.float32(canal_y)) ** 2 + (x * np.float32(0.85)) ** 2)
    arch_z = np.abs(along - np.float32(2)) - np.float32(pitch_mm * 0.33)
    arch = np.maximum(ring - np.float32(14), arch_z)
    spinous = np.maximum(
        np.maximum(np.abs(x) - np.float32(3.5), np.abs(y - np.float32(canal_y - 22)) - np.float32(17)),
        along - np.float32(9),
    )
    wing = np.sqrt((y - np.float32(canal_y + 2) + np.float32(0.12) * np.abs(x)) ** 2 + along**2) - np.float32(5.5)
    wing = np.maximum(wing, np.abs(x) - np.float32(half_x + 16))
    bone = Shape(box, np.minimum(np.minimum(arch, spinous), wing))
    canvas.paint(bone, CORTICAL_HU - 90)
    canvas.paint(bone.grown(-2.2), MARROW_HU + 60, texture=3)
    canvas.paint(Shape(box, ring - np.float32(8.5)), FLUID_HU + 15, texture=0.5)


def rib(
    side: int,
    top_z: float,
    drop_mm: float,
    center_y: float,
    half_yx: tuple[float, float],
    end_deg: float,
    width: Callable[[NDArray[np.float64]], NDArray[np.float64]] | None = None,
) -> NDArray[np.float64]:
    """Points (z, y, x) of one rib from the spine around the chest to ``end_deg``, falling by ``drop_mm``; ``width`` scales it by height."""
    turn = np.deg2rad(np.linspace(14, end_deg, 11))
    u, v = np.sin(turn), -np.cos(turn)
    norm = 0.5 * (np.hypot(u, v) + (u**4 + v**4) ** 0.25)
    z = top_z - drop_mm * (1 - np.cos(turn)) / 2
    scale = (np.ones_like(z) if width is None else width(z)) / norm
    return np.stack([z, center_y + half_yx[0] * v * scale, side * half_yx[1] * u * scale], axis=1)


def paint_ribs(canvas: Canvas, curves: Iterable[NDArray[np.float64]]) -> None:
    """Cortical shell and marrow of each curve; its front fifth is cartilage."""
    bone: list[Segment] = []
    cartilage: list[Segment] = []
    for points in curves:
        pieces = path(*[(*p, 5.6) for p in points])
        bone += pieces[:-2]
        cartilage += pieces[-2:]
    canvas.paint(canvas.tubes(cartilage), 95, texture=1)
    shape = canvas.tubes(bone)
    canvas.paint(shape, CORTICAL_HU)
    canvas.paint(shape.grown(-1.9), MARROW_HU, texture=3)


def paint_wall(
    canvas: Canvas,
    rng: np.random.Generator,
    cavity_yx: tuple[float, float],
    center_y: float,
    wall_mm: float,
    width: Floats | None = None,
) -> Shape:
    """Table, skin, subcutaneous fat and muscle; the muscle wall lies ``wall_mm`` around the cavity. Returns the body."""
    fat_mm = float(rng.uniform(9, 30))
    half_y, half_x = cavity_yx[0] + wall_mm, cavity_yx[1] + wall_mm
    behind = 10.0  # the back muscles
    muscle_y, muscle_half_y = center_y - behind / 2, half_y + behind / 2
    paint_table(canvas, muscle_y - muscle_half_y - 0.7 * fat_mm, half_x + fat_mm)
    body = canvas.column((muscle_y + 0.1 * fat_mm, 0), (muscle_half_y + 0.75 * fat_mm, half_x + fat_mm), width)
    canvas.paint(body, SKIN_HU)
    canvas.paint(body.grown(-2), FAT_HU, texture=1)
    muscle = canvas.column((muscle_y, 0), (muscle_half_y, half_x), width)
    canvas.paint(muscle, MUSCLE_HU, texture=1.5)
    canvas.paint(
        Shape(muscle.box, np.abs(muscle.level + np.float32(wall_mm * 0.5)) - np.float32(0.7)), -40
    )  # fascia between the layers
    return body


def paint_hollow(
    canvas: Canvas,
    shape: Shape,
    rng: np.random.Generator,
    *,
    content_hu: float,
    gas_y_mm: float | None,
    wall_mm: float = 2.5,
) -> None:
    """Stomach or bowel: wall, content and, in front of ``gas_y_mm``, gas with a level surface (the patient lies on the back)."""
    canvas.paint(shape.grown(1.5), FAT_HU, texture=0.7)
    canvas.paint(shape, 75 + float(rng.uniform(-10, 20)), texture=1)
    canvas.paint(shape.grown(-wall_mm), content_hu, texture=1)
    if gas_y_mm is not None:
        front = (np.float32(gas_y_mm) - canvas.positions_mm[1][shape.box[1]]).astype(np.float32)[None, :, None]
        canvas.paint(Shape(shape.box, np.maximum(shape.level + np.float32(wall_mm), front)), LUNG_GAS_HU)
