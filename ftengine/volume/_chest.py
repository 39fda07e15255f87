"""The chest of the phantoms: two lungs with vessels and airways around heart and great vessels. Frame and units: ``_anatomy``."""

import numpy as np
from numpy.typing import NDArray

from ftengine.volume._anatomy import (
    AIR_HU,
    CORTICAL_HU,
    FAT_HU,
    LUNG_GAS_HU,
    MARROW_HU,
    MUSCLE_HU,
    Canvas,
    Scanner,
    Segment,
    Shape,
    jitter,
    paint_ribs,
    paint_spine,
    paint_wall,
    path,
    rib,
    rotation,
    sizes,
    smooth_union,
    tree,
)  # fmt: skip

CAVITY_YX_MM, CAVITY_Y_MM = (84.0, 118.0), 4.0
HILUM_MM = (-16.0, -12.0, 40.0)  # of the right lung; the left one mirrors x


def _taper(z_mm: NDArray[np.float64]) -> NDArray[np.float64]:
    """Width of the rib cage at a height: 1 below the carina, closing in a dome 140 mm above it."""
    return np.asarray(np.sqrt(np.clip(1 - (np.clip(z_mm + 10, 0, None) / 150) ** 2, 0.01, 1)))


def paint_chest(canvas: Canvas, rng: np.random.Generator, look: Scanner) -> dict[str, Shape]:
    """Paint a chest (z = 0 at the carina) and return its organs by name: lung. Label 1, without heart, mediastinum and diaphragm."""
    z, y, x = canvas.coordinates
    height = canvas.positions_mm[0]
    neck = (1 - 0.55 * np.clip((height - 125) / 60, 0, 1)).astype(np.float32)
    body = paint_wall(canvas, rng, CAVITY_YX_MM, CAVITY_Y_MM, 14, neck)
    for side in (1, -1):
        spot, turn = jitter(rng, (50, -74, side * 96), 3), rotation(turn_z_deg=-side * 38)
        canvas.paint(canvas.ellipsoid(spot, (74, 13, 44), turn).within(body.grown(-5)), MUSCLE_HU, texture=1.5)
        canvas.paint(canvas.ellipsoid(spot, (66, 4, 34), turn).within(body.grown(-7)), CORTICAL_HU - 60)
        pectoral = canvas.ellipsoid((45, 90, side * 68), (60, 15, 46), rotation(turn_z_deg=-side * 22)).within(
            body.grown(-6)
        )
        canvas.paint(pectoral, MUSCLE_HU, texture=1.5)
        canvas.paint(canvas.tubes(path((300, -96, side * 28, 17), (-300, -96, side * 28, 17))), MUSCLE_HU, texture=2)
        clavicle = canvas.tubes(
            path((70, 84, side * 18, 6), (84, 76, side * 60, 5.5), (98, 50, side * 105, 5.5), (100, 20, side * 122, 6))
        )
        canvas.paint(clavicle, CORTICAL_HU)
        canvas.paint(clavicle.grown(-2), MARROW_HU, texture=2)
    cavity = canvas.column((CAVITY_Y_MM, 0), CAVITY_YX_MM, _taper(height).astype(np.float32))
    canvas.paint(cavity, FAT_HU, texture=1)
    right = canvas.vault(jitter(rng, (-176, 4, 58), 5), sizes(rng, (96, 88, 86), 0.04))
    left = canvas.vault(jitter(rng, (-180, 4, -60), 5), sizes(rng, (88, 86, 84), 0.04))
    abdomen = Shape(canvas.full, smooth_union(right.level, left.level, 30))
    _paint_below(canvas, rng, look, cavity, abdomen)

    heart = canvas.ellipsoid(
        jitter(rng, (-72, 22, -20), 4),
        sizes(rng, (50, 46, 60), 0.07),
        rotation(turn_z_deg=-28, turn_y_deg=22),
        bump_mm=2,
        room_mm=9,
    )
    heart = Shape(heart.box, np.maximum(heart.level, np.float32(3) - abdomen.on(heart.box)))
    middle = Shape(
        canvas.full,
        np.float32(28)
        * (np.sqrt(((y - np.float32(4)) * np.float32(1 / 104)) ** 2 + (x * np.float32(1 / 27)) ** 2) - 1),
    )
    lung = cavity.grown(-3).without(abdomen.grown(3)).without(middle).without(heart.grown(5))
    lung = Shape(lung.box, lung.level + np.float32(1.2) * canvas.bumps)
    # the dependent (posterior) lung holds more blood: the patient lies on the back
    canvas.paint(lung, np.float32(look.lung_hu) - np.float32(0.3) * y, texture=2.5, label=1)
    for side in (1, -1):
        fissure = np.abs(z * np.float32(0.78) + y * np.float32(0.62) + np.float32(22) + 4 * canvas.bumps) - np.float32(
            0.3
        )
        half = np.maximum(fissure, np.float32(10) - np.float32(side) * x)
        canvas.paint(Shape(canvas.full, half).within(lung), look.lung_hu + 160)
    _paint_lung_vessels(canvas, rng, look, lung)

    paint_spine(canvas, rng, -64, (14, 18), 27)
    curves = [
        rib(
            side,
            118 - 25 * k,
            40 + 6 * min(k, 7),
            CAVITY_Y_MM,
            (CAVITY_YX_MM[0] + 5, CAVITY_YX_MM[1] + 5),
            152 - 9 * max(0, k - 6),
            _taper,
        )
        for k in range(13)
        for side in (1, -1)
    ]
    paint_ribs(canvas, curves)
    sternum = canvas.ellipsoid((-12, CAVITY_Y_MM + CAVITY_YX_MM[0] + 5, 0), (78, 6.5, 17))
    canvas.paint(sternum, CORTICAL_HU - 120)
    canvas.paint(sternum.grown(-1.8), MARROW_HU - 40, texture=3)
    _paint_mediastinum(canvas, rng, look, heart, cavity)
    return {"lung": lung}


def _paint_below(canvas: Canvas, rng: np.random.Generator, look: Scanner, cavity: Shape, abdomen: Shape) -> None:
    """Diaphragm, liver, stomach with gas and spleen."""
    canvas.paint(abdomen.within(cavity), MUSCLE_HU, texture=1)
    inside = abdomen.grown(-3).within(cavity.grown(-2))
    canvas.paint(inside, FAT_HU, texture=1)
    liver = canvas.ellipsoid(jitter(rng, (-178, 6, 62), 4), (104, 92, 92)).within(inside)
    lobe = canvas.ellipsoid((-140, 42, 0), (34, 40, 66)).within(inside)
    spleen = canvas.ellipsoid((-150, -40, -92), (46, 34, 26), rotation(turn_z_deg=-25)).within(inside)
    stomach = canvas.ellipsoid(jitter(rng, (-136, 14, -58), 4), (36, 42, 36), bump_mm=2, room_mm=2).within(inside)
    canvas.paint(stomach, 80, texture=1)
    canvas.paint(stomach.grown(-3), 25, texture=1)
    gas = (np.float32(rng.uniform(5, 30)) - canvas.positions_mm[1][stomach.box[1]]).astype(np.float32)[None, :, None]
    canvas.paint(Shape(stomach.box, np.maximum(stomach.level + np.float32(3), gas)), LUNG_GAS_HU)
    canvas.paint(spleen, look.spleen_hu, texture=1)
    canvas.paint(lobe, look.liver_hu, texture=1)
    canvas.paint(liver, look.liver_hu, texture=1)
    veins: list[Segment] = []
    for toward in ((-0.3, 0.2, 1.0), (-0.4, 1.0, 0.5), (-1.0, -0.2, 0.8)):
        veins += tree(rng, (-128, -16, 20), jitter(rng, toward, 0.1), 32, 5, 4)
    canvas.paint(canvas.tubes(veins).within(liver.grown(-2)), look.venous_hu)


def _paint_lung_vessels(canvas: Canvas, rng: np.random.Generator, look: Scanner, lung: Shape) -> None:
    """Arteries, veins and bronchi, branching from the two hila into every part of the lungs."""
    vessels: list[Segment] = []
    bronchi: list[Segment] = []
    ways = (
        (1.0, 0.35, 0.45),
        (1.0, -0.5, 0.4),
        (0.3, 1.0, 0.55),
        (0.2, -0.7, 1.0),
        (-0.2, 0.5, 1.0),
        (-1.0, 0.5, 0.7),
        (-1.0, -0.3, 0.75),
        (-1.0, -0.8, 0.35),
    )
    for side in (1, -1):
        hilum = np.array(HILUM_MM) * (1, 1, side)
        for k, way in enumerate(ways):
            toward = np.array(jitter(rng, way, 0.12)) * (1, 1, side)
            vessels += tree(rng, hilum + jitter(rng, (0, 0, 0), 4), toward, float(rng.uniform(32, 42)), 4.6, 6, 0.6)
            if k % 2 == 0:
                bronchi += tree(rng, hilum + np.array([4.0, -4.0, 0.0]), toward + 0.1, 28, 3.6, 3, 0.55)
    canvas.paint(canvas.tubes(vessels).within(lung.grown(-1.5)), 0.5 * look.arterial_hu + 20)
    airways = canvas.tubes(bronchi, room_mm=2).within(lung)
    canvas.paint(airways.grown(0.8), -260)
    canvas.paint(airways, AIR_HU + 15)


def _paint_mediastinum(canvas: Canvas, rng: np.random.Generator, look: Scanner, heart: Shape, cavity: Shape) -> None:
    """Heart with chambers, great vessels, oesophagus, trachea and main bronchi."""
    blood, right_blood = look.arterial_hu, 0.5 * (look.arterial_hu + look.venous_hu)
    vessels = _great_vessels()
    canvas.paint(heart.grown(5).within(cavity), FAT_HU, texture=0.7, label=0)
    canvas.paint(heart, 0.25 * blood + 62, texture=1)
    turn = rotation(turn_z_deg=-28, turn_y_deg=22)
    for center, radii, hu in (
        ((-82, 10, -42), (32, 22, 30), blood),  # left ventricle
        ((-84, 42, -8), (30, 18, 36), right_blood),
        ((-52, -6, -14), (22, 18, 28), blood),  # left atrium
        ((-62, 22, 22), (28, 20, 18), right_blood),
    ):
        chamber = canvas.ellipsoid(jitter(rng, center, 2), sizes(rng, radii, 0.06), turn, bump_mm=1.5)
        canvas.paint(chamber.within(heart.grown(-3)), hu, texture=0.5)
    oesophagus = canvas.tubes(path((150, -26, -3, 6), (0, -38, -6, 6), (-90, -36, -10, 6.5), (-150, -24, -22, 7)))
    canvas.paint(oesophagus, 42, texture=1, label=0)
    for name, arterial in (("lung_arteries", False), ("veins", False), ("aorta", True), ("arch", True)):
        tube = canvas.tubes(vessels[name], room_mm=2)
        canvas.paint(tube.grown(1.2), 42, label=0)
        canvas.paint(tube, blood if arterial else right_blood, texture=0.5)
    main = [(12.0, -20.0, 3.0)]
    trachea = [
        *path((160, -12, 2, 8.5), (*main[0], 8.5)),
        *path((*main[0], 7), (-14, -18, 30, 6), (-22, -16, 46, 4.5)),
        *path((*main[0], 6.5), (-18, -22, -32, 5.5), (-26, -20, -48, 4)),
    ]
    tube = canvas.tubes(trachea, room_mm=2)
    canvas.paint(tube.grown(1.8), 35, label=0)
    canvas.paint(tube, AIR_HU + 5)


def _great_vessels() -> dict[str, list[Segment]]:
    return {
        "aorta": path((-46, 16, -2, 14), (-20, 26, 12, 15), (12, 24, 18, 15), (34, 12, 10, 14), (40, -8, -4, 13), (30, -28, -18, 12.5), (0, -40, -22, 12), (-300, -38, -12, 11)),
        "arch": [*path((40, 10, 8, 5.5), (80, 4, 12, 5), (150, 12, 22, 4)), *path((42, -4, 0, 4), (150, 2, -22, 3.5)), *path((38, -14, -8, 4.5), (90, -10, -17, 4.5), (150, 2, -36, 4))],
        "veins": [*path((-60, 16, 30, 10), (0, 12, 32, 9), (50, 18, 26, 8.5), (90, 22, 24, 7), (150, 10, 36, 6)), *path((50, 20, 26, 6), (64, 28, -14, 6), (110, 20, -20, 5.5), (150, 10, -36, 5)), *path((-85, 6, 24, 12), (-150, -12, 20, 12))],
        "lung_arteries": [*path((-46, 42, -14, 12), (-18, 32, -16, 13), (0, 10, -18, 12), (-4, -10, -36, 9), (-18, -16, -46, 7)), *path((-8, 14, -14, 10), (-12, 2, 18, 9.5), (-12, -6, 38, 8), (-22, -12, 48, 6))],
    }  # fmt: skip
