"""The abdomen of the phantoms: liver, pancreas and kidneys among everything that a CT of them shows. Frame and units: ``_anatomy``."""

import numpy as np

from ftengine.volume._anatomy import (
    FAT_HU,
    MUSCLE_HU,
    Canvas,
    Scanner,
    Segment,
    Shape,
    jitter,
    paint_hollow,
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


def paint_abdomen(canvas: Canvas, rng: np.random.Generator, look: Scanner) -> dict[str, Shape]:
    """Paint an abdomen (z = 0 at about L1) and return its organs by name: liver, pancreas, kidney. Labels 1, 3 and 5."""
    paint_wall(canvas, rng, (88, 128), 6, 13)
    cavity = canvas.column((6, 0), (88, 128))
    canvas.paint(cavity, FAT_HU, texture=1)
    right = canvas.vault(jitter(rng, (12, 8, 62), 4), sizes(rng, (98, 90, 88), 0.04))
    left = canvas.vault(jitter(rng, (10, 6, -64), 4), sizes(rng, (90, 88, 84), 0.04))
    abdomen = Shape(canvas.full, smooth_union(right.level, left.level, 30))
    _paint_lung_bases(canvas, rng, look, cavity, abdomen)

    inner = cavity.grown(-2.5).within(abdomen.grown(-2))
    for side in (1, -1):  # psoas and quadratus lumborum widen downwards
        canvas.paint(
            canvas.tubes(path((25, -58, side * 27, 5), (-40, -56, side * 38, 15), (-170, -38, side * 52, 24))),
            MUSCLE_HU + 5,
            texture=1.5,
        )
        canvas.paint(canvas.ellipsoid((-70, -76, side * 66), (75, 11, 22)), MUSCLE_HU, texture=1.5)
        canvas.paint(
            canvas.tubes(path((-300, -92, side * 32, 20), (300, -92, side * 30, 19))), MUSCLE_HU + 2, texture=2
        )
    paint_spine(canvas, rng, -52, (17, 23), 34)
    ribs = [rib(side, 20 + 27 * k, 75, 4, (93, 134), 62 + 22 * min(k, 4)) for k in range(9) for side in (1, -1)]
    paint_ribs(canvas, ribs)

    _paint_bowel(canvas, rng, inner)
    stomach = canvas.tubes(
        path(
            *[
                (*jitter(rng, p[:3], 3), p[3] * rng.uniform(0.85, 1.1))
                for p in ((72, -8, -62, 31), (40, 30, -66, 26), (8, 50, -40, 19), (-2, 54, -8, 14), (2, 46, 26, 10))
            ]
        ),
        bump_mm=2,
        room_mm=4,
    )
    paint_hollow(
        canvas, stomach.within(inner), rng, content_hu=float(rng.uniform(5, 60)), gas_y_mm=float(rng.uniform(38, 62))
    )
    spleen = canvas.ellipsoid(
        jitter(rng, (52, -34, -101), 4),
        sizes(rng, (50, 37, 25), 0.1),
        rotation(turn_z_deg=-25, turn_y_deg=-12),
        bump_mm=2,
    )
    canvas.paint(spleen.within(inner), look.spleen_hu, texture=1, halo_mm=1.5)

    liver = _liver(canvas, rng).within(inner)
    canvas.paint(liver, look.liver_hu, texture=1, label=1, halo_mm=1.5)
    hepatic = [
        ((20, 62, 0.2), 5.5, (-0.5, 0.0, 1.0)),
        ((14, 40, 0.2), 5.0, (-0.5, 1.0, 0.6)),
        ((10, 20, 0.2), 4.5, (-0.2, 1.0, -0.5)),
    ]
    veins: list[Segment] = []
    for (off, _, _), radius, toward in hepatic:
        veins += tree(rng, (88, -18, 12 + 0.3 * off), jitter(rng, toward, 0.1), 34, radius, 5)
    hilum = jitter(rng, (26, 12, 42), 2)
    for toward in ((0.5, -0.3, 1.0), (-0.3, 0.2, 1.0), (0.7, 0.9, -0.6)):
        veins += tree(rng, hilum, jitter(rng, toward, 0.1), 30, 5.5, 5)
    canvas.paint(canvas.tubes(veins).within(liver.grown(-2)), look.venous_hu, texture=0.5)
    gallbladder = canvas.ellipsoid(
        jitter(rng, (-12, 50, 50), 3), sizes(rng, (26, 15, 14), 0.12), rotation(turn_x_deg=25)
    )
    canvas.paint(gallbladder, 55, label=0)
    canvas.paint(gallbladder.grown(-1.5), 8, texture=0.3)

    kidneys = [_paint_kidney(canvas, rng, look, side) for side in (1, -1)]
    box = canvas.full
    kidney = Shape(box, np.minimum(kidneys[0].on(box), kidneys[1].on(box)))

    aorta = canvas.tubes(path((300, -24, -10, 12), (40, -24, -9, 11), (-85, -28, -4, 9), (-200, -32, 24, 6)))
    cava = canvas.tubes(
        path((-200, -34, 26, 9), (-60, -30, 20, 11), (30, -26, 22, 12), (92, -18, 20, 13), (140, -8, 16, 13))
    )
    splenic = path((20, 2, 12, 6.5), (16, 4, -20, 4.5), (24, -10, -52, 4.5), (42, -22, -82, 3.5))
    portal = canvas.tubes([*splenic, *path((-130, 26, 20, 4), (-40, 14, 16, 5.5), (18, 4, 14, 7), (*hilum, 6.5))])
    renal_veins = canvas.tubes(
        [*path((-8, -36, 44, 5), (-2, -28, 22, 5)), *path((4, -36, -44, 4.5), (4, -10, -10, 4.5), (0, -22, 18, 5))]
    )
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
    lung = Shape(
        canvas.full,
        np.maximum(np.maximum(cavity.level + 1, np.float32(3) - abdomen.level), -np.float32(30) * mediastinum),
    )
    canvas.paint(Shape(canvas.full, np.maximum(cavity.level, -abdomen.level)), MUSCLE_HU - 10, texture=1)
    canvas.paint(lung, look.lung_hu, texture=2)
    vessels: list[Segment] = []
    for side in (1, -1):
        for toward in ((-1.0, -0.5, 0.5), (-0.8, 0.4, 0.7)):
            vessels += tree(
                rng, (190, -10, side * 45), jitter(rng, (toward[0], toward[1], side * toward[2]), 0.1), 45, 4, 5, 0.6
            )
    canvas.paint(canvas.tubes(vessels).within(lung), 30)
    above = Shape(canvas.full, np.maximum(np.float32(30) * mediastinum, -abdomen.level))
    canvas.paint(above.within(cavity), FAT_HU, texture=1)
    heart = canvas.ellipsoid(
        jitter(rng, (126, 32, -20), 4), (46, 48, 64), rotation(turn_z_deg=-25), bump_mm=2, room_mm=6
    )
    heart = Shape(heart.box, np.maximum(heart.level, np.float32(2) - abdomen.on(heart.box)))
    canvas.paint(heart.grown(5).within(cavity), FAT_HU, texture=1)
    canvas.paint(heart.within(cavity), 0.5 * look.liver_hu + 45, texture=1)


def _liver(canvas: Canvas, rng: np.random.Generator) -> Shape:
    """Right and left lobe, hollowed from below and from the midline by the other organs."""
    right = canvas.ellipsoid(jitter(rng, (26, 0, 74), 4), sizes(rng, (84, 90, 72), 0.07), bump_mm=2.5)
    left = canvas.ellipsoid(
        jitter(rng, (60, 46, 4), 5), sizes(rng, (34, 34, 74), 0.1), rotation(turn_y_deg=12), bump_mm=2.5
    )
    low = [min(a.start, b.start) for a, b in zip(right.box, left.box, strict=True)]
    high = [max(a.stop, b.stop) for a, b in zip(right.box, left.box, strict=True)]
    box = (slice(low[0], high[0]), slice(low[1], high[1]), slice(low[2], high[2]))
    lobes = Shape(box, smooth_union(right.on(box), left.on(box), 18))
    below = canvas.ellipsoid(jitter(rng, (-48, 18, -2), 3), sizes(rng, (84, 76, 66), 0.05))
    fissure = canvas.ellipsoid((44, 78, 24), (34, 26, 5), rotation(turn_z_deg=-12))
    behind = canvas.ellipsoid((60, -52, -28), (70, 62, 46))  # stomach, aorta and spine
    renal = canvas.ellipsoid((-16, -62, 58), (60, 34, 40))  # the bed of the right kidney: no liver behind it
    midline = canvas.tubes(path((300, -62, 0, 40), (-300, -62, 0, 40)))
    return lobes.without(below).without(fissure).without(behind).without(renal).without(midline)


def _pancreas(canvas: Canvas, rng: np.random.Generator) -> Shape:
    """A thin curved tube: head in the duodenum's curve, body over the aorta, tail to the spleen."""
    thick = float(np.exp(0.12 * np.clip(rng.standard_normal(), -2, 2)))
    lift = float(rng.normal(0, 4))
    points = (
        (-34, 4, 32, 10),
        (-18, 8, 34, 14.5),
        (-2, 16, 24, 12),
        (10, 22, 6, 9),
        (16, 20, -18, 11),
        (22, 6, -44, 11),
        (34, -6, -68, 10),
        (40, -10, -84, 7),
    )
    line = [(*jitter(rng, p[:3], 2), p[3] * thick) for p in points]
    return canvas.tubes(path(*[(p[0] + lift * k / 7, *p[1:]) for k, p in enumerate(line)]), bump_mm=1.6, room_mm=3)


def _paint_kidney(canvas: Canvas, rng: np.random.Generator, look: Scanner, side: int) -> Shape:
    """One kidney (side 1 right, -1 left) with cortex, medulla, sinus fat and pelvis; returns its parenchyma."""
    center = jitter(rng, (-14 if side > 0 else 2, -42, side * 64), 3)
    radii = sizes(rng, (54, 25, 28), 0.07)
    turn = rotation(turn_z_deg=side * 28, turn_y_deg=-side * 12, turn_x_deg=8)
    whole = canvas.ellipsoid(center, radii, turn, bump_mm=1.2, room_mm=5)
    inward = np.array([0.0, 6.0, -side * 14.0])
    sinus = canvas.ellipsoid(
        list(np.array(center) + inward), (0.52 * radii[0], 0.36 * radii[1], 0.62 * radii[2]), turn, bump_mm=2
    )
    kidney = whole.without(sinus)
    canvas.paint(whole.grown(3), FAT_HU, texture=0.7, label=0)
    canvas.paint(whole, look.cortex_hu, texture=1, label=5)
    # pyramids: the inside without columns of cortex between them
    columns = np.float32(2.4) * canvas.bumps[whole.box] - np.float32(1.2)
    canvas.paint(Shape(whole.box, np.maximum(whole.level + np.float32(6.5), columns)), look.medulla_hu, texture=1)
    canvas.paint(sinus.within(whole.grown(2)), FAT_HU + 20, texture=1, label=0)
    pelvis = canvas.tubes(
        path(
            (*(np.array(center) + 0.2 * inward), 3),
            (*(np.array(center) + 1.4 * inward), 5.5),
            (-60, -40, side * 34, 2.5),
        )
    )
    canvas.paint(pelvis, look.pelvis_hu)
    return kidney


def _paint_bowel(canvas: Canvas, rng: np.random.Generator, inner: Shape) -> None:
    """Small bowel loops, colon with gas and stool, duodenum, and mesenteric vessels, all in the fat of the cavity."""
    mesentery: list[Segment] = []
    for _ in range(9):
        mesentery += tree(rng, (-20, 12, 10), jitter(rng, (-1, 0.6, 0), 0.7), 34, 2.4, 4, 0.7)
    canvas.paint(canvas.tubes(mesentery).within(inner), 70)
    for _ in range(20):
        point = np.array([-66.0, 36.0, -10.0]) + rng.uniform(-1, 1, 3) * (52, 32, 66)
        heading = rng.standard_normal(3)
        radius = float(rng.uniform(9, 13.5))
        points = []
        for _ in range(5):
            points.append((*point, radius * rng.uniform(0.85, 1.15)))
            heading = heading + 0.8 * rng.standard_normal(3) - 0.015 * (point - (-70, 36, -10))
            point = point + 22 * heading / np.linalg.norm(heading)
        gas = point[1] + float(rng.uniform(-4, 14)) if rng.random() < 0.3 else None
        loop = canvas.tubes(path(*points), bump_mm=1, room_mm=3).within(inner)
        paint_hollow(canvas, loop, rng, content_hu=float(rng.uniform(5, 45)), gas_y_mm=gas, wall_mm=2)
    duodenum = path(
        (4, 44, 30, 11), (6, 20, 48, 12), (-34, 2, 54, 12), (-48, -4, 30, 11), (-44, 0, -10, 10), (-16, 8, -34, 10)
    )
    paint_hollow(canvas, canvas.tubes(duodenum, bump_mm=1, room_mm=3).within(inner), rng, content_hu=30, gas_y_mm=None)
    sag = float(rng.uniform(-22, 12))
    turns = (
        (-130, -26, 96, 24), (-60, -22, 98, 23), (-44, 30, 92, 20), (-50 + sag, 62, 50, 18), (-56 + sag, 70, 0, 17), (-36 + sag / 2, 62, -50, 17),
        (14, 18, -98, 17), (-20, -30, -101, 15), (-80, -36, -99, 14), (-150, -30, -92, 14),
    )  # fmt: skip
    for part in range(3):  # the content changes along the colon
        line: list[tuple[float, ...]] = []
        for a, b in zip(turns[3 * part : 3 * part + 3], turns[3 * part + 1 : 3 * part + 4], strict=True):
            for t in np.arange(0, 1, 0.2):
                haustra = 1.1 if len(line) % 2 else 0.88
                line.append(
                    (
                        *(np.array(a[:3]) * (1 - t) + np.array(b[:3]) * t),
                        haustra * (a[3] * (1 - t) + b[3] * t) * rng.uniform(0.94, 1.06),
                    )
                )
        line.append(turns[3 * part + 3])
        gas = float(rng.uniform(56, 72)) if part == 1 else float(rng.uniform(-26, 0))
        colon = canvas.tubes(path(*line), bump_mm=1, room_mm=3).within(inner)
        paint_hollow(
            canvas,
            colon,
            rng,
            content_hu=float(rng.uniform(-20, 40)),
            gas_y_mm=gas if rng.random() < 0.75 else None,
            wall_mm=2,
        )
