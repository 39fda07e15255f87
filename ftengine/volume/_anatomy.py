"""The anatomy behind the phantoms: level sets in millimetres of a body frame, painted on a voxel grid.

Frame: z superior, y anterior, x towards the patient's right, millimetres; x = 0 is the midline. Every number of a shape below is such
a length, so an organ looks the same at any spacing. A ``Shape`` is a level set (negative inside, about the distance to the surface in
mm) on the part of the grid where it can matter; the ``Canvas`` bends all of them by one smooth random displacement and paints them one
over the other with a border as wide as a voxel, which is the partial volume of a real scan.

Random numbers are drawn whether or not a shape is in view, so the anatomy of a case does not depend on the field of view.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ftengine.geometry import FloatZYX, IntZYX

Floats: TypeAlias = NDArray[np.float32]
Slices: TypeAlias = tuple[slice, slice, slice]
Segment: TypeAlias = tuple[NDArray[np.float64], NDArray[np.float64], float, float]  # start, end (z y x mm), radius at both

AIR_HU, LUNG_GAS_HU, FAT_HU, SKIN_HU, MUSCLE_HU, FLUID_HU, CORTICAL_HU, MARROW_HU = -1000, -950, -102, 15, 55, 15, 520, 190
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
    changes: dict[str, Any] = {name: getattr(scanner, name) + float(np.clip(3 * rng.standard_normal(), -6, 6)) for name in names}
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
        common = [slice(max(a.start, b.start), max(a.start, b.start, min(a.stop, b.stop))) for a, b in zip(box, self.box, strict=True)]
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


class Canvas:
    """A voxel grid on which shapes are evaluated and painted.

    positions_mm: body coordinates of the grid's planes along z, y and x. texture: HU added where a tissue is painted with ``texture``.
    Holds ``hu`` (float32) and ``label`` (uint8), both [z, y, x].
    """

    def __init__(self, positions_mm: tuple[NDArray[np.float64], ...], rng: np.random.Generator, texture: Floats) -> None:
        self.positions_mm = positions_mm
        self.shape_zyx: IntZYX = (len(positions_mm[0]), len(positions_mm[1]), len(positions_mm[2]))
        self.full: Slices = (slice(0, self.shape_zyx[0]), slice(0, self.shape_zyx[1]), slice(0, self.shape_zyx[2]))
        steps = [float(p[1] - p[0]) if len(p) > 1 else 1.0 for p in positions_mm]
        self.edge_mm = max(0.8, float(np.mean(steps)))
        self._warp = [WARP_SD_MM * random_lattice(rng, 12) for _ in range(3)]
        self.coordinates = tuple(
            lattice_field(w, positions_mm, WARP_PITCH_MM) + np.expand_dims(p, [a for a in range(3) if a != axis]).astype(np.float32)
            for axis, (w, p) in enumerate(zip(self._warp, positions_mm, strict=True))
        )
        self.bumps = lattice_field(random_lattice(rng, 32), positions_mm, BUMP_PITCH_MM)
        self.texture = texture
        self.hu = np.full(self.shape_zyx, AIR_HU, dtype=np.float32)
        self.label = np.zeros(self.shape_zyx, dtype=np.uint8)

    def window(self, low_mm: ArrayLike, high_mm: ArrayLike) -> Slices:
        """The voxels that a shape between two corners (before bending) can reach, with room for its border; may be empty."""
        low, high = np.asarray(low_mm, dtype=np.float64), np.asarray(high_mm, dtype=np.float64)
        middle = (low + high) / 2
        # Bending moves the middle by its own displacement and the rest by little more: the displacement changes by < 0.25 mm per mm.
        shift = [float(lattice_field(w, [middle[a : a + 1] for a in range(3)], WARP_PITCH_MM)[0, 0, 0]) for w in self._warp]
        reach = 1.25 * (high - low) / 2 + 0.06 * float((high - low).max()) + 2 + self.edge_mm
        start = [int(np.searchsorted(p, m - s - r)) for p, m, s, r in zip(self.positions_mm, middle, shift, reach, strict=True)]
        stop = [int(np.searchsorted(p, m - s + r, "right")) for p, m, s, r in zip(self.positions_mm, middle, shift, reach, strict=True)]
        return slice(start[0], stop[0]), slice(start[1], stop[1]), slice(start[2], stop[2])

    def ellipsoid(
        self, center: Sequence[float], radii: Sequence[float], turn: NDArray[np.float64] | None = None, *, bump_mm: float = 0, room_mm: float = 0
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
        boxes = []
        for a, b, ra, rb in segments:
            reach = max(ra, rb) + 2.5 * bump_mm + room_mm
            boxes.append(self.window(np.minimum(a, b) - reach, np.maximum(a, b) + reach))
        filled = [b for b in boxes if all(s.stop > s.start for s in b)] or [(slice(0, 0),) * 3]
        start = [min(b[a].start for b in filled) for a in range(3)]
        stop = [max(b[a].stop for b in filled) for a in range(3)]
        level = np.full([e - s for s, e in zip(start, stop, strict=True)], FAR_MM, dtype=np.float32)
        for box, (a, b, ra, rb) in zip(boxes, segments, strict=True):
            if any(s.stop <= s.start for s in box):
                continue
            d = b - a
            p = [c[box] - np.float32(o) for c, o in zip(self.coordinates, a, strict=True)]
            t = sum(np.float32(d[i] / max(float(d @ d), 1e-6)) * p[i] for i in range(3))
            t = np.clip(t, np.float32(0), np.float32(1))
            distance = np.sqrt(sum((p[i] - np.float32(d[i]) * t) ** 2 for i in range(3)))
            part = level[tuple(slice(s.start - o, s.stop - o) for s, o in zip(box, start, strict=True))]
            np.minimum(part, distance - (np.float32(ra) + np.float32(rb - ra) * t), out=part)
        union = (slice(start[0], stop[0]), slice(start[1], stop[1]), slice(start[2], stop[2]))
        return Shape(union, level + np.float32(bump_mm) * self.bumps[union] if bump_mm else level)

    def column(self, center_yx: tuple[float, float], half_yx: tuple[float, float], width: Floats | None = None) -> Shape:
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

    def paint(self, shape: Shape, hu: float | Floats, *, texture: float = 0, label: int | None = None, halo_mm: float = 0) -> None:
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
    return [(a[:3], b[:3], float(a[3]), float(b[3])) for a, b in zip(p[:-1], p[1:], strict=True)]


def tree(
    rng: np.random.Generator, root: ArrayLike, toward: ArrayLike, length_mm: float, radius_mm: float, generations: int, spread: float = 0.75
) -> list[Segment]:
    """A branching vessel: each branch bends once and splits in two thinner, shorter ones."""
    start, direction = np.asarray(root, dtype=np.float64), np.asarray(toward, dtype=np.float64)
    direction = direction / np.linalg.norm(direction)
    bent = direction + 0.25 * rng.standard_normal(3)
    middle = start + 0.5 * length_mm * direction
    end = middle + 0.5 * length_mm * bent / np.linalg.norm(bent)
    segments: list[Segment] = [(start, middle, radius_mm, 0.93 * radius_mm), (middle, end, 0.93 * radius_mm, 0.86 * radius_mm)]
    if generations > 1:
        side = rng.standard_normal(3)
        side -= direction * (side @ direction)
        side *= spread / np.linalg.norm(side)
        for sign, share in ((1, rng.uniform(0.65, 0.82)), (-1, rng.uniform(0.72, 0.86))):
            segments += tree(rng, end, direction + sign * side, length_mm * rng.uniform(0.68, 0.9), radius_mm * share, generations - 1, spread)
    return segments


def _jitter(rng: np.random.Generator, point: Iterable[float], sd_mm: float) -> list[float]:
    return [float(v + sd_mm * np.clip(rng.standard_normal(), -2, 2)) for v in point]


def _sizes(rng: np.random.Generator, radii: Iterable[float], sd: float) -> list[float]:
    """Radii times one common and three own random factors."""
    common = np.exp(sd * np.clip(rng.standard_normal(), -2, 2))
    return [float(r * common * np.exp(0.5 * sd * np.clip(rng.standard_normal(), -2, 2))) for r in radii]


def _paint_table(canvas: Canvas, back_y_mm: float, half_width_mm: float) -> None:
    """The couch: a curved shell under the back, straight along z and not bent with the patient."""
    _, y, x = canvas.positions_mm
    surface = back_y_mm - 4 + 18 * np.clip((np.abs(x) / half_width_mm), 0, 1.4) ** 2
    depth = (surface[None, :] - y[:, None]).astype(np.float32)
    inside = (depth > 0) & (depth < 26) & (np.abs(x)[None, :] < 1.2 * half_width_mm)
    shell = inside & ((depth < 3) | (depth > 22))
    canvas.hu[:, inside] = -860
    canvas.hu[:, shell] = -180


def _paint_spine(canvas: Canvas, rng: np.random.Generator, y_mm: float, half_yx: tuple[float, float], pitch_mm: float) -> None:
    """Vertebral bodies, discs, canal, arches and spinous and transverse processes around (y, x) = (y_mm, 0)."""
    phase = rng.uniform(0, pitch_mm)
    half_y, half_x = half_yx
    canal_y = y_mm - half_y - 10
    box = canvas.window((-FAR_MM, canal_y - 45, -half_x - 45), (FAR_MM, y_mm + half_y + 4, half_x + 45))
    z, y, x = (c[box] for c in canvas.coordinates)
    along = np.abs((z + np.float32(phase)) % np.float32(pitch_mm) - np.float32(pitch_mm / 2))  # 0 in the middle of a vertebra
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
    spinous = np.maximum(np.maximum(np.abs(x) - np.float32(3.5), np.abs(y - np.float32(canal_y - 22)) - np.float32(17)), along - np.float32(9))
    wing = np.sqrt((y - np.float32(canal_y + 2) + np.float32(0.12) * np.abs(x)) ** 2 + along**2) - np.float32(5.5)
    wing = np.maximum(wing, np.abs(x) - np.float32(half_x + 16))
    bone = Shape(box, np.minimum(np.minimum(arch, spinous), wing))
    canvas.paint(bone, CORTICAL_HU - 90)
    canvas.paint(bone.grown(-2.2), MARROW_HU + 60, texture=3)
    canvas.paint(Shape(box, ring - np.float32(8.5)), FLUID_HU + 15, texture=0.5)


def _rib(side: int, top_z: float, drop_mm: float, center_y: float, half_yx: tuple[float, float], end_deg: float) -> NDArray[np.float64]:
    """Points (z, y, x) of one rib from the spine around the chest to ``end_deg``; it falls by ``drop_mm`` on its way to the front."""
    turn = np.deg2rad(np.linspace(14, end_deg, 11))
    u, v = np.sin(turn), -np.cos(turn)
    norm = 0.5 * (np.hypot(u, v) + (u**4 + v**4) ** 0.25)
    fall = drop_mm * (1 - np.cos(turn)) / 2
    return np.stack([top_z - fall, center_y + half_yx[0] * v / norm, side * half_yx[1] * u / norm], axis=1)


def _paint_ribs(canvas: Canvas, curves: Iterable[NDArray[np.float64]]) -> None:
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


def _paint_wall(canvas: Canvas, rng: np.random.Generator, cavity_yx: tuple[float, float], center_y: float, wall_mm: float, width: Floats | None) -> None:
    """Table, skin, subcutaneous fat and muscle; the muscle wall lies ``wall_mm`` around the cavity."""
    fat_mm = float(rng.uniform(9, 30))
    half_y, half_x = cavity_yx[0] + wall_mm, cavity_yx[1] + wall_mm
    behind = 10.0  # the back muscles
    muscle_y, muscle_half_y = center_y - behind / 2, half_y + behind / 2
    _paint_table(canvas, muscle_y - muscle_half_y - 0.7 * fat_mm, half_x + fat_mm)
    body = canvas.column((muscle_y + 0.1 * fat_mm, 0), (muscle_half_y + 0.75 * fat_mm, half_x + fat_mm), width)
    canvas.paint(body, SKIN_HU)
    canvas.paint(body.grown(-2), FAT_HU, texture=1)
    muscle = canvas.column((muscle_y, 0), (muscle_half_y, half_x), width)
    canvas.paint(muscle, MUSCLE_HU, texture=1.5)
    canvas.paint(Shape(muscle.box, np.abs(muscle.level + np.float32(wall_mm * 0.5)) - np.float32(0.7)), -40)  # fascia between the layers


def paint_abdomen(canvas: Canvas, rng: np.random.Generator, look: Scanner) -> dict[str, Shape]:
    """Paint an abdomen (z = 0 at about L1) and return its organs by name: liver, pancreas, kidney. Labels 1, 3 and 5."""
    z, y, x = canvas.coordinates
    _paint_wall(canvas, rng, (88, 128), 6, 13, None)
    cavity = canvas.column((6, 0), (88, 128))
    canvas.paint(cavity, FAT_HU, texture=1)
    right = canvas.vault(_jitter(rng, (12, 8, 62), 4), _sizes(rng, (98, 90, 88), 0.04))
    left = canvas.vault(_jitter(rng, (10, 6, -64), 4), _sizes(rng, (90, 88, 84), 0.04))
    abdomen = Shape(canvas.full, smooth_union(right.level, left.level, 30))
    _paint_lung_bases(canvas, rng, look, cavity, abdomen)

    inner = cavity.grown(-2.5).within(abdomen.grown(-2))
    for side in (1, -1):  # psoas and quadratus lumborum widen downwards
        canvas.paint(canvas.tubes(path((25, -58, side * 27, 5), (-40, -56, side * 38, 15), (-170, -38, side * 52, 24))), MUSCLE_HU + 5, texture=1.5)
        canvas.paint(canvas.ellipsoid((-70, -76, side * 66), (75, 11, 22)), MUSCLE_HU, texture=1.5)
        canvas.paint(canvas.tubes(path((-300, -92, side * 32, 20), (300, -92, side * 30, 19))), MUSCLE_HU + 2, texture=2)
    _paint_spine(canvas, rng, -52, (17, 23), 34)
    ribs = [_rib(side, 20 + 27 * k, 75, 4, (93, 134), 62 + 22 * min(k, 4)) for k in range(9) for side in (1, -1)]
    _paint_ribs(canvas, ribs)

    _paint_bowel(canvas, rng, inner)
    stomach = canvas.tubes(
        path(
            *[
                (*_jitter(rng, p[:3], 3), p[3] * rng.uniform(0.85, 1.1))
                for p in ((72, -8, -62, 31), (40, 30, -66, 26), (8, 50, -40, 19), (-2, 54, -8, 14), (2, 46, 26, 10))
            ]
        ),
        bump_mm=2,
        room_mm=4,
    )
    _paint_hollow(canvas, stomach.within(inner), rng, content_hu=float(rng.uniform(5, 60)), gas_y_mm=float(rng.uniform(38, 62)))
    spleen = canvas.ellipsoid(_jitter(rng, (52, -34, -101), 4), _sizes(rng, (50, 37, 25), 0.1), rotation(turn_z_deg=-25, turn_y_deg=-12), bump_mm=2)
    canvas.paint(spleen.within(inner), look.spleen_hu, texture=1, halo_mm=1.5)

    liver = _liver(canvas, rng).within(inner)
    canvas.paint(liver, look.liver_hu, texture=1, label=1, halo_mm=1.5)
    hepatic = [((20, 62, 0.2), 5.5, (-0.5, 0.0, 1.0)), ((14, 40, 0.2), 5.0, (-0.5, 1.0, 0.6)), ((10, 20, 0.2), 4.5, (-0.2, 1.0, -0.5))]
    veins: list[Segment] = []
    for (off, _, _), radius, toward in hepatic:
        veins += tree(rng, (88, -18, 12 + 0.3 * off), _jitter(rng, toward, 0.1), 34, radius, 5)
    hilum = _jitter(rng, (26, 12, 42), 2)
    for toward in ((0.5, -0.3, 1.0), (-0.3, 0.2, 1.0), (0.7, 0.9, -0.6)):
        veins += tree(rng, hilum, _jitter(rng, toward, 0.1), 30, 5.5, 5)
    canvas.paint(canvas.tubes(veins).within(liver.grown(-2)), look.venous_hu, texture=0.5)
    gallbladder = canvas.ellipsoid(_jitter(rng, (-12, 50, 50), 3), _sizes(rng, (26, 15, 14), 0.12), rotation(turn_x_deg=25))
    canvas.paint(gallbladder, 55, label=0)
    canvas.paint(gallbladder.grown(-1.5), 8, texture=0.3)

    kidneys = [_paint_kidney(canvas, rng, look, side) for side in (1, -1)]
    box = canvas.full
    kidney = Shape(box, np.minimum(kidneys[0].on(box), kidneys[1].on(box)))

    aorta = canvas.tubes(path((300, -24, -10, 12), (40, -24, -9, 11), (-85, -28, -4, 9), (-200, -32, 24, 6)))
    cava = canvas.tubes(path((-200, -34, 26, 9), (-60, -30, 20, 11), (30, -26, 22, 12), (92, -18, 20, 13), (140, -8, 16, 13)))
    splenic = path((20, 2, 12, 6.5), (16, 4, -20, 4.5), (24, -10, -52, 4.5), (42, -22, -82, 3.5))
    portal = canvas.tubes([*splenic, *path((-130, 26, 20, 4), (-40, 14, 16, 5.5), (18, 4, 14, 7), (*hilum, 6.5))])
    renal_veins = canvas.tubes([*path((-8, -36, 44, 5), (-2, -28, 22, 5)), *path((4, -36, -44, 4.5), (4, -10, -10, 4.5), (0, -22, 18, 5))])
    arteries = canvas.tubes(
        [
            *path((28, -18, -9, 4), (32, 2, -6, 3.5), (30, 8, 22, 2.5), (30, 12, 40, 2)),
            *path((32, 2, -6, 3), (36, -6, -45, 2.5), (46, -22, -80, 2)),
            *path((14, -16, -8, 4), (0, 2, -4, 3.5), (-120, 22, 6, 2.5)),
            *path((2, -24, -12, 3), (0, -36, -44, 2.5)),
            *path((0, -26, -2, 3), (-10, -40, 20, 2.5), (-12, -38, 44, 2.5)),
        ]
    )
    cava_hu = 0.5 * (look.venous_hu + look.liver_hu) if look.arterial_hu > 250 else look.venous_hu
    pancreas = _pancreas(canvas, rng).within(inner)
    canvas.paint(cava, cava_hu, texture=0.5, label=0)
    canvas.paint(renal_veins, 0.5 * (look.venous_hu + look.cortex_hu), texture=0.5)
    canvas.paint(portal.grown(1.5), FAT_HU, label=0)
    canvas.paint(pancreas, look.pancreas_hu, texture=1.2, label=3, halo_mm=1.5)
    canvas.paint(portal, look.venous_hu, texture=0.5, label=0)
    canvas.paint(aorta.grown(1.2), 45, label=0)
    canvas.paint(aorta, look.arterial_hu, texture=0.5, label=0)
    canvas.paint(arteries, 0.85 * look.arterial_hu + 10, texture=0.5, label=0)
    return {"liver": liver, "pancreas": pancreas, "kidney": kidney}


def _paint_lung_bases(canvas: Canvas, rng: np.random.Generator, look: Scanner, cavity: Shape, abdomen: Shape) -> None:
    """Lungs, heart and lower mediastinum above the diaphragm."""
    _, y, x = canvas.coordinates
    mediastinum = np.sqrt(((y - np.float32(10)) * np.float32(1 / 105)) ** 2 + (x * np.float32(1 / 30)) ** 2) - 1
    lung = Shape(canvas.full, np.maximum(np.maximum(cavity.level + 1, np.float32(3) - abdomen.level), -np.float32(30) * mediastinum))
    canvas.paint(Shape(canvas.full, np.maximum(cavity.level, -abdomen.level)), MUSCLE_HU - 10, texture=1)
    canvas.paint(lung, look.lung_hu, texture=2)
    vessels: list[Segment] = []
    for side in (1, -1):
        for toward in ((-1.0, -0.5, 0.5), (-0.8, 0.4, 0.7)):
            vessels += tree(rng, (190, -10, side * 45), _jitter(rng, (toward[0], toward[1], side * toward[2]), 0.1), 45, 4, 5, 0.6)
    canvas.paint(canvas.tubes(vessels).within(lung), 30)
    above = Shape(canvas.full, np.maximum(np.float32(30) * mediastinum, -abdomen.level))
    canvas.paint(above.within(cavity), FAT_HU, texture=1)
    heart = canvas.ellipsoid(_jitter(rng, (138, 30, -24), 4), (46, 46, 62), rotation(turn_z_deg=-25), bump_mm=2, room_mm=6)
    heart = Shape(heart.box, np.maximum(heart.level, np.float32(2) - abdomen.on(heart.box)))
    canvas.paint(heart.grown(5).within(cavity), FAT_HU, texture=1)
    canvas.paint(heart.within(cavity), 0.5 * look.liver_hu + 45, texture=1)


def _liver(canvas: Canvas, rng: np.random.Generator) -> Shape:
    """Right and left lobe, hollowed from below and from the midline by the other organs."""
    right = canvas.ellipsoid(_jitter(rng, (26, 0, 74), 4), _sizes(rng, (84, 90, 72), 0.07), bump_mm=2.5)
    left = canvas.ellipsoid(_jitter(rng, (60, 46, 4), 5), _sizes(rng, (34, 34, 74), 0.1), rotation(turn_y_deg=12), bump_mm=2.5)
    low = [min(a.start, b.start) for a, b in zip(right.box, left.box, strict=True)]
    high = [max(a.stop, b.stop) for a, b in zip(right.box, left.box, strict=True)]
    box = (slice(low[0], high[0]), slice(low[1], high[1]), slice(low[2], high[2]))
    lobes = Shape(box, smooth_union(right.on(box), left.on(box), 18))
    below = canvas.ellipsoid(_jitter(rng, (-48, 18, -2), 3), _sizes(rng, (84, 76, 66), 0.05))
    fissure = canvas.ellipsoid((44, 78, 24), (34, 26, 5), rotation(turn_z_deg=-12))
    behind = canvas.ellipsoid((60, -52, -28), (70, 62, 46))  # stomach, aorta and spine
    return lobes.without(below).without(fissure).without(behind)


def _pancreas(canvas: Canvas, rng: np.random.Generator) -> Shape:
    """A thin curved tube: head in the duodenum's curve, body over the aorta, tail to the spleen."""
    thick = float(np.exp(0.12 * np.clip(rng.standard_normal(), -2, 2)))
    lift = float(rng.normal(0, 4))
    points = ((-34, 4, 32, 10), (-18, 8, 34, 14.5), (-2, 16, 24, 12), (10, 22, 6, 9), (16, 20, -18, 11), (22, 6, -44, 11), (34, -6, -68, 10), (40, -10, -84, 7))
    line = [(*_jitter(rng, p[:3], 2), p[3] * thick) for p in points]
    return canvas.tubes(path(*[(p[0] + lift * k / 7, *p[1:]) for k, p in enumerate(line)]), bump_mm=1.6, room_mm=3)


def _paint_kidney(canvas: Canvas, rng: np.random.Generator, look: Scanner, side: int) -> Shape:
    """One kidney (side 1 right, -1 left) with cortex, medulla, sinus fat and pelvis; returns its parenchyma."""
    center = _jitter(rng, (-14 if side > 0 else 2, -42, side * 64), 3)
    radii = _sizes(rng, (54, 25, 28), 0.07)
    turn = rotation(turn_z_deg=side * 28, turn_y_deg=-side * 12, turn_x_deg=8)
    whole = canvas.ellipsoid(center, radii, turn, bump_mm=1.2, room_mm=5)
    inward = np.array([0.0, 6.0, -side * 14.0])
    sinus = canvas.ellipsoid(np.array(center) + inward, (0.52 * radii[0], 0.36 * radii[1], 0.62 * radii[2]), turn, bump_mm=2)
    kidney = whole.without(sinus)
    canvas.paint(whole.grown(3), FAT_HU, texture=0.7, label=0)
    canvas.paint(whole, look.cortex_hu, texture=1, label=5)
    # pyramids: the inside without columns of cortex between them
    columns = np.float32(2.4) * canvas.bumps[whole.box] - np.float32(1.2)
    canvas.paint(Shape(whole.box, np.maximum(whole.level + np.float32(6.5), columns)), look.medulla_hu, texture=1)
    canvas.paint(sinus.within(whole.grown(2)), FAT_HU + 20, texture=1, label=0)
    pelvis = canvas.tubes(path((*(np.array(center) + 0.2 * inward), 3), (*(np.array(center) + 1.4 * inward), 5.5), (-60, -40, side * 34, 2.5)))
    canvas.paint(pelvis, look.pelvis_hu)
    return kidney


def _paint_hollow(canvas: Canvas, shape: Shape, rng: np.random.Generator, *, content_hu: float, gas_y_mm: float | None, wall_mm: float = 2.5) -> None:
    """Stomach or bowel: wall, content and, in front of ``gas_y_mm``, gas with a level surface (the patient lies on the back)."""
    canvas.paint(shape.grown(1.5), FAT_HU, texture=0.7)
    canvas.paint(shape, 75 + float(rng.uniform(-10, 20)), texture=1)
    canvas.paint(shape.grown(-wall_mm), content_hu, texture=1)
    if gas_y_mm is not None:
        front = (np.float32(gas_y_mm) - canvas.positions_mm[1][shape.box[1]]).astype(np.float32)[None, :, None]
        canvas.paint(Shape(shape.box, np.maximum(shape.level + np.float32(wall_mm), front)), LUNG_GAS_HU)


def _paint_bowel(canvas: Canvas, rng: np.random.Generator, inner: Shape) -> None:
    """Small bowel loops, colon with gas and stool, duodenum, and mesenteric vessels, all in the fat of the cavity."""
    mesentery: list[Segment] = []
    for _ in range(9):
        mesentery += tree(rng, (-20, 12, 10), _jitter(rng, (-1, 0.6, 0), 0.7), 34, 2.4, 4, 0.7)
    canvas.paint(canvas.tubes(mesentery).within(inner), 70)
    for _ in range(12):
        point = np.array([-78.0, 34.0, -4.0]) + rng.uniform(-1, 1, 3) * (42, 30, 62)
        heading = rng.standard_normal(3)
        radius = float(rng.uniform(9, 14))
        points = []
        for _ in range(5):
            points.append((*point, radius * rng.uniform(0.85, 1.15)))
            heading = heading + 0.8 * rng.standard_normal(3) - 0.012 * (point - (-82, 34, -4))
            point = point + 22 * heading / np.linalg.norm(heading)
        gas = point[1] + float(rng.uniform(-4, 14)) if rng.random() < 0.3 else None
        loop = canvas.tubes(path(*points), bump_mm=1, room_mm=3).within(inner)
        _paint_hollow(canvas, loop, rng, content_hu=float(rng.uniform(5, 45)), gas_y_mm=gas, wall_mm=2)
    duodenum = path((4, 44, 30, 11), (6, 20, 48, 12), (-34, 2, 54, 12), (-48, -4, 30, 11), (-44, 0, -10, 10), (-16, 8, -34, 10))
    _paint_hollow(canvas, canvas.tubes(duodenum, bump_mm=1, room_mm=3).within(inner), rng, content_hu=30, gas_y_mm=None)
    sag = float(rng.uniform(-22, 12))
    turns = (
        (-130, -26, 96, 24), (-60, -22, 98, 23), (-44, 30, 92, 20), (-50 + sag, 62, 50, 18), (-56 + sag, 70, 0, 17), (-36 + sag / 2, 62, -50, 17),
        (14, 18, -98, 17), (-20, -30, -101, 15), (-80, -36, -99, 14), (-150, -30, -92, 14),
    )  # fmt: skip
    for part in range(3):  # the content changes along the colon
        line = []
        for a, b in zip(turns[3 * part : 3 * part + 3], turns[3 * part + 1 : 3 * part + 4], strict=True):
            for t in np.arange(0, 1, 0.2):
                haustra = 1.1 if len(line) % 2 else 0.88
                line.append((*(np.array(a[:3]) * (1 - t) + np.array(b[:3]) * t), haustra * (a[3] * (1 - t) + b[3] * t) * rng.uniform(0.94, 1.06)))
        line.append(turns[3 * part + 3])
        gas = float(rng.uniform(56, 72)) if part == 1 else float(rng.uniform(-26, 0))
        colon = canvas.tubes(path(*line), bump_mm=1, room_mm=3).within(inner)
        _paint_hollow(canvas, colon, rng, content_hu=float(rng.uniform(-20, 40)), gas_y_mm=gas if rng.random() < 0.75 else None, wall_mm=2)
