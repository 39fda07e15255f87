"""Phantoms: repeatable, anatomically plausible at any grid, with tumours of the size and contrast that were asked for."""

from functools import cache
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import scipy.ndimage as ndi
from numpy.typing import ArrayLike, NDArray

from ftengine.errors import ConfigError
from ftengine.geometry import FloatZYX, Grid, IntZYX, grid_from_matrix, int_zyx, reverse_axes, to_ras
from ftengine.volume import _anatomy
from ftengine.volume.phantom import (
    KINDS,
    LABELS,
    SCANNERS,
    Phantom,
    Tumor,
    TumorSpec,
    make_phantom,
    write_phantom_dataset,
)

SMALL: IntZYX = (48, 64, 64)
SMALL_SPACING: FloatZYX = (1.5, 1.5, 1.5)
ORGANS = {"abdomen": ("liver", "pancreas", "kidney"), "chest": ("lung",)}
# life size: the field of view is longer than the organs on every axis
FULL: dict[str, tuple[IntZYX, FloatZYX]] = {
    "abdomen": ((75, 80, 108), (3.0, 3.0, 3.0)),
    "chest": ((64, 76, 92), (4.5, 3.5, 3.5)),
}


@cache
def full(
    region: str, case: int, scanner: int | None = None, tumors: tuple[Tumor, ...] | TumorSpec | None = None
) -> Phantom:
    shape, spacing = FULL[region]
    return make_phantom(
        region, seed=2, case=case, shape_zyx=shape, spacing_mm_zyx=spacing, scanner=scanner, tumors=tumors
    )


def small(region: str, seed: int, case: int, tumors: TumorSpec | None = None, scanner: int | None = None) -> Phantom:
    return make_phantom(
        region, seed=seed, case=case, shape_zyx=SMALL, spacing_mm_zyx=SMALL_SPACING, tumors=tumors, scanner=scanner
    )


def organ_mask(phantom: Phantom, organ: str) -> NDArray[np.bool_]:
    """The organ with its tumours: a tumour's value follows its organ's."""
    value = LABELS[phantom.region][organ]
    return (phantom.label == value) | (phantom.label == value + 1)


def volume_ml(phantom: Phantom, mask: NDArray[np.bool_]) -> float:
    return float(mask.sum() * np.prod(phantom.grid.spacing_mm_zyx)) / 1000


def index_of(center_mm_zyx: FloatZYX, grid: Grid) -> IntZYX:
    x, y, z, _ = np.linalg.solve(grid.matrix, [*reversed(center_mm_zyx), 1.0])
    return int_zyx(np.rint((z, y, x)))


@pytest.mark.parametrize("region", LABELS)
def test_equal_arguments_give_equal_bits_and_any_other_address_another_patient(region: str) -> None:
    first, again = (small(region, 3, 4, TumorSpec()) for _ in range(2))
    assert np.array_equal(first.image_hu, again.image_hu)
    assert np.array_equal(first.label, again.label)
    assert (first.tumors, first.scanner, first.grid) == (again.tumors, again.scanner, again.grid)
    for seed, case in ((3, 5), (4, 4)):
        assert np.mean(small(region, seed, case).label != first.label) > 0.01


@pytest.mark.parametrize("region", LABELS)
def test_tumors_and_scanner_leave_the_anatomy_alone(region: str) -> None:
    healthy = small(region, 1, 0, scanner=0)
    ill = small(region, 1, 0, tumors=TumorSpec(num_tumors=(2, 2)), scanner=0)
    other = small(region, 1, 0, scanner=4)
    for organ in ORGANS[region]:
        assert np.array_equal(organ_mask(healthy, organ), organ_mask(ill, organ))
    assert np.array_equal(healthy.label, other.label)
    assert not np.array_equal(healthy.image_hu, other.image_hu)
    far = ~ndi.binary_dilation(healthy.label != ill.label, iterations=8)  # tumour edges and blur reach about 6 mm
    assert np.array_equal(healthy.image_hu[far], ill.image_hu[far])


@pytest.mark.parametrize("region", LABELS)
def test_form_of_a_phantom(region: str) -> None:
    phantom = full(region, 0)
    assert phantom.image_hu.dtype == np.dtype(np.int16)
    assert phantom.label.dtype == np.dtype(np.uint8)
    assert phantom.image_hu.shape == phantom.label.shape == phantom.grid.shape_zyx == FULL[region][0]
    assert phantom.image_hu.flags.c_contiguous
    assert phantom.label.flags.c_contiguous
    assert phantom.grid.is_ras
    assert phantom.grid.spacing_mm_zyx == FULL[region][1]
    assert -1024 <= phantom.image_hu.min() < -900
    assert 300 < phantom.image_hu.max() <= 3071
    assert set(np.unique(phantom.label)) == {0, *(LABELS[region][organ] for organ in ORGANS[region])}
    assert phantom.tumors == ()


# Adults, widened by the drawn sizes: liver 1.0 to 2.2 l, pancreas 40 to 130 ml, both kidneys 180 to 420 ml, lungs 2.5 to 6 l
PLAUSIBLE_ML = {"liver": (900, 2500), "pancreas": (30, 160), "kidney": (150, 480), "lung": (2200, 6500)}


@pytest.mark.parametrize("case", range(3))
@pytest.mark.parametrize("region", LABELS)
def test_organs_have_plausible_volumes_and_lie_where_they_belong(region: str, case: int) -> None:
    phantom = full(region, case)
    middle: dict[str, NDArray[np.float64]] = {}
    for organ in ORGANS[region]:
        mask = organ_mask(phantom, organ)
        low, high = PLAUSIBLE_ML[organ]
        assert low < volume_ml(phantom, mask) < high, organ
        z, y, x = (float(v) for v in np.argwhere(mask).mean(axis=0))
        middle[organ] = (phantom.grid.matrix @ (x, y, z, 1.0))[:3]
        pieces = np.sort(np.bincount(ndi.label(mask)[0].ravel())[1:])[::-1]
        parts = 2 if organ in ("kidney", "lung") else 1
        assert pieces[:parts].sum() > 0.95 * mask.sum()  # no crumbs
    if region == "abdomen":
        assert middle["liver"][0] > 30  # on the right, and the kidneys behind it and the pancreas
        assert middle["kidney"][1] < min(middle["liver"][1], middle["pancreas"][1]) - 20
        assert not organ_mask(phantom, "liver")[:, :, 0].any()
        assert not organ_mask(phantom, "liver")[:, :, -1].any()


@pytest.mark.parametrize("scanner", range(len(SCANNERS)))
def test_hu_of_organs_and_noise_follow_the_scanner(scanner: int) -> None:
    phantom, look = full("abdomen", scanner, scanner), SCANNERS[scanner]
    nominal = {"liver": look.liver_hu, "pancreas": look.pancreas_hu, "kidney": look.kidney_hu}
    # A patient is off by up to 6 HU. Texture (sd 6 HU over blobs of 13 mm) averages to at most about 3 HU in the pancreas. Veins fill
    # under a tenth of the liver; the share of cortex in the kidney is between 0.3 and 0.7; neighbours blur into the thin pancreas.
    allowed = {
        "liver": 8 + 0.1 * abs(look.venous_hu - look.liver_hu),
        "pancreas": 12 + 0.05 * abs(look.venous_hu - look.pancreas_hu),
        "kidney": 9 + 0.2 * abs(look.cortex_hu - look.medulla_hu),
    }
    for organ, hu in nominal.items():
        inside = ndi.binary_erosion(organ_mask(phantom, organ), iterations=1 if organ == "pancreas" else 2)
        assert abs(float(np.median(phantom.image_hu[inside])) - hu) < allowed[organ], (organ, look.name)


@pytest.mark.parametrize("scanner", range(len(SCANNERS)))
def test_noise_in_air_follows_the_scanner(scanner: int) -> None:
    phantom = make_phantom(
        "abdomen", seed=2, case=0, shape_zyx=(24, 60, 60), spacing_mm_zyx=(8.0, 7.0, 7.0), scanner=scanner
    )
    offset = 7.0 * (np.arange(60) - 29.5)
    front = np.ix_(
        np.arange(24), (offset > 150) & (offset < 182), np.abs(offset) < 40
    )  # above the belly, inside every circle
    air = phantom.image_hu[front].astype(float)
    # -1024 lies 2.7 sd or more below the air, so clipping hardly touches the sd. At 7 mm the noise of neighbours is independent: over
    # 1000 samples, whose sd is known to 1 / sqrt(2 * 1000) = 2.2 %; 4.5 times that is allowed.
    assert air.size > 1000
    assert abs(float(np.std(air)) / SCANNERS[scanner].noise_hu - 1) < 0.1
    assert abs(float(np.mean(air)) + 1000) < 1.5


def test_padding_outside_the_circle_of_a_scanner() -> None:
    padded = next(i for i, s in enumerate(SCANNERS) if s.fov_radius_mm is not None and s.fov_radius_mm < 188)
    phantom = make_phantom("abdomen", seed=0, shape_zyx=(16, 96, 96), spacing_mm_zyx=(12.0, 4.2, 4.2), scanner=padded)
    offset = 4.2 * (np.arange(96) - 47.5)
    outside = np.hypot(offset[:, None], offset[None, :]) > max(SCANNERS[padded].fov_radius_mm or 0, offset[-1])
    assert outside.any()
    assert (phantom.image_hu[:, outside] == -1024).all()
    assert (phantom.image_hu[:, ~outside] > -1024).mean() > 0.99


@pytest.mark.parametrize(
    ("region", "tumor"),
    [
        *[("abdomen", Tumor("liver", d, -40.0)) for d in (8.0, 14.0, 30.0)],
        ("abdomen", Tumor("kidney", 9.0, 30.0, "hyper")),
        ("abdomen", Tumor("pancreas", 8.0, -30.0, "rim")),
        ("chest", Tumor("lung", 20.0, 800.0, "solid")),
    ],
)
def test_a_tumor_has_the_asked_volume_and_lies_in_its_organ(region: str, tumor: Tumor) -> None:
    healthy, ill = full(region, 1), full(region, 1, None, (tumor,))
    (placed,) = ill.tumors
    value = LABELS[region][tumor.organ]
    mask = ill.label == value + 1
    assert (placed.organ, placed.diameter_mm, placed.contrast_hu, placed.kind) == (
        tumor.organ,
        tumor.diameter_mm,
        tumor.contrast_hu,
        tumor.kind,
    )
    assert mask[index_of(placed.center_mm_zyx, ill.grid)]
    assert (healthy.label[mask] == value).all()
    assert placed.num_voxels == mask.sum()
    voxel_mm3 = float(np.prod(ill.grid.spacing_mm_zyx))
    asked_mm3 = np.pi / 6 * tumor.diameter_mm**3
    if placed.inside_fraction == 1:  # exact to the rounding of the number of voxels
        assert abs(mask.sum() * voxel_mm3 - asked_mm3) <= voxel_mm3 / 2 + 1e-6
    assert placed.inside_fraction > 0.6
    assert abs(placed.inside_fraction - mask.sum() / round(asked_mm3 / voxel_mm3)) < 1e-9


def test_most_tumors_of_exact_size_fit_wholly() -> None:
    tumors = tuple(Tumor("liver", 10.0) for _ in range(8))
    placed = full("abdomen", 2, None, tumors).tumors
    assert sum(t.inside_fraction == 1 for t in placed) >= 6
    for i, a in enumerate(placed):  # there is room, so they keep clear of one another
        for b in placed[:i]:
            assert np.linalg.norm(np.subtract(a.center_mm_zyx, b.center_mm_zyx)) > 10


@pytest.mark.parametrize("contrast", [-40.0, 35.0])
def test_contrast_in_the_core_of_a_tumor(contrast: float) -> None:
    tumor = Tumor("liver", 34.0, contrast, "hypo" if contrast < 0 else "hyper")
    healthy, ill = full("abdomen", 1, 0), full("abdomen", 1, 0, (tumor,))
    # the edge is at most 0.35 radii wide, half of it inside (3 mm); 3 sd of the blur are 2.1 mm: 2 voxels of 3 mm
    core = ndi.binary_erosion(ill.label == 2, iterations=2)
    assert core.sum() > 50
    difference = ill.image_hu[core].astype(float) - healthy.image_hu[core]
    # noise is the same in both; a fifth of the texture (sd 6) and the vessels that the tumour replaced remain
    assert abs(float(np.median(difference)) - contrast) < 3


def test_a_rim_is_brighter_than_the_liver_and_its_core_darker() -> None:
    healthy, ill = full("abdomen", 1, 0), full("abdomen", 1, 0, (Tumor("liver", 40.0, -50.0, "rim"),))
    mask = ill.label == 2
    core = ndi.binary_erosion(mask, iterations=4)
    rim = ndi.binary_erosion(mask) & ~ndi.binary_erosion(mask, iterations=2)
    difference = ill.image_hu.astype(float) - healthy.image_hu
    assert float(np.median(difference[core])) == pytest.approx(-50, abs=4)
    assert 8 < float(np.median(difference[rim])) < 34  # +30, mixed with liver and core


@pytest.mark.parametrize(("kind", "contrast"), [("solid", 800.0), ("ground_glass", 300.0)])
def test_contrast_of_lung_lesions(kind: str, contrast: float) -> None:
    healthy, ill = full("chest", 1, 0), full("chest", 1, 0, (Tumor("lung", 36.0, contrast, kind),))
    core = ndi.binary_erosion(ill.label == 2, iterations=2)
    assert core.sum() > 20
    difference = float(np.median(ill.image_hu[core].astype(float) - healthy.image_hu[core]))
    # ground glass is added to the lung; a nodule replaces it, and the lung is off its nominal HU by up to 0.3 HU/mm * 85 mm + texture
    assert abs(difference - contrast) < (5 if kind == "ground_glass" else 60)


@pytest.mark.parametrize("region", LABELS)
def test_spec_draws_tumors_as_it_says(region: str) -> None:
    spec = TumorSpec(num_tumors=(1, 4), diameter_mm=(6.0, 12.0), organs=ORGANS[region][:1], contrast_factor=1.5)
    drawn = [small(region, 5, case, spec).tumors for case in range(4)]
    assert len({len(tumors) for tumors in drawn}) > 1
    for tumor in (t for tumors in drawn for t in tumors):
        assert tumor.organ == ORGANS[region][0]
        assert 6 <= tumor.diameter_mm <= 12
        low, high = KINDS[region][tumor.kind][1]
        assert 1.5 * low <= tumor.contrast_hu <= 1.5 * high
        assert tumor.num_voxels > 0


def test_a_diameter_gives_way_where_the_organ_is_thin() -> None:
    spec = TumorSpec(num_tumors=(3, 3), diameter_mm=(5.0, 120.0), organs=("pancreas",))
    tumors = full("abdomen", 0, None, spec).tumors
    assert max(t.diameter_mm for t in tumors) < 45
    assert min(t.inside_fraction for t in tumors) > 0.2


@pytest.mark.parametrize("region", LABELS)
def test_spacing_does_not_change_the_anatomy(region: str) -> None:
    # both fields of view are 192 x 192 x 264 mm
    fine = make_phantom(region, seed=0, case=3, shape_zyx=(80, 80, 110), spacing_mm_zyx=(2.4, 2.4, 2.4))
    coarse = make_phantom(region, seed=0, case=3, shape_zyx=(48, 64, 88), spacing_mm_zyx=(4.0, 3.0, 3.0))
    # Counting voxels errs by the surface's random part; a one-voxel crumb rule and the thin pancreas (12 mm, 3 voxels) err most.
    percent = {"liver": 1.5, "kidney": 4, "pancreas": 6, "lung": 1.5}
    for organ in ORGANS[region]:
        a, b = (volume_ml(p, organ_mask(p, organ)) for p in (fine, coarse))
        assert abs(a / b - 1) < percent[organ] / 100, organ


@pytest.mark.parametrize("region", LABELS)
@pytest.mark.parametrize(
    ("shape", "spacing"),
    [
        ((48, 64, 64), (1.5, 1.5, 1.5)),
        ((64, 64, 64), (3.0, 3.0, 3.0)),
        ((32, 48, 48), (2.0, 2.0, 2.0)),
        ((24, 96, 96), (5.0, 2.5, 2.5)),
        ((40, 20, 30), (6.0, 6.0, 6.0)),
    ],
)
def test_a_small_field_of_view_shows_every_organ(region: str, shape: IntZYX, spacing: FloatZYX) -> None:
    phantom = make_phantom(region, seed=9, case=1, shape_zyx=shape, spacing_mm_zyx=spacing, tumors=TumorSpec())
    total = phantom.label.size
    for organ in ORGANS[region]:
        mask = organ_mask(phantom, organ)
        assert mask.sum() > (0.001 if organ == "pancreas" else 0.01) * total, organ
        # not a corner of it: little of the organ touches the border of the volume
        inside = mask[1:-1, 1:-1, 1:-1].sum()
        assert inside > 0.85 * mask.sum(), organ
    assert len(phantom.tumors) >= 1
    assert all(t.num_voxels > 0 for t in phantom.tumors)


@pytest.mark.parametrize("region", LABELS)
def test_evaluating_shapes_in_their_boxes_changes_nothing(region: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def draw() -> Phantom:
        return make_phantom(
            region,
            seed=6,
            case=1,
            shape_zyx=(36, 40, 54),
            spacing_mm_zyx=(6.0, 5.0, 5.0),
            tumors=TumorSpec(),
            scanner=0,
        )

    fast = draw()

    def everywhere(
        canvas: _anatomy.Canvas, low_mm: ArrayLike, _high_mm: ArrayLike
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        stop = np.tile(np.array(canvas.shape_zyx, dtype=np.int64), (len(np.asarray(low_mm)), 1))
        return np.zeros_like(stop), stop

    monkeypatch.setattr(_anatomy.Canvas, "windows", everywhere)
    slow = draw()
    assert np.array_equal(fast.label, slow.label)
    # a shape adds nothing outside its box; tumours are placed by boxes, so their points may differ in the last bit of a coordinate
    assert np.abs(fast.image_hu.astype(int) - slow.image_hu).max() <= 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"region": "head"}, "abdomen, chest"),
        ({"seed": -1}, "0 to 2"),
        ({"shape_zyx": (4, 64, 64)}, "at least 8"),
        ({"spacing_mm_zyx": (1.0, 0.0, 1.0)}, "20"),
        ({"spacing_mm_zyx": (1.0, float("nan"), 1.0)}, "20"),
        ({"scanner": len(SCANNERS)}, f"0 to {len(SCANNERS) - 1}"),
        ({"tumors": [Tumor("spleen", 10.0)]}, "liver, pancreas, kidney"),
        ({"tumors": TumorSpec(organs=("lung",))}, "liver, pancreas, kidney"),
        ({"tumors": [Tumor("liver", 10.0, 800.0, "solid")]}, "hypo, hyper, rim"),
        ({"tumors": [Tumor("liver", 90.0)]}, "72 mm wide"),
    ],
)
def test_a_wrong_argument_is_refused_with_what_is_allowed(changes: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {
        "region": "abdomen",
        "seed": 0,
        "shape_zyx": SMALL,
        "spacing_mm_zyx": SMALL_SPACING,
        **changes,
    }
    with pytest.raises(ConfigError, match=message):
        make_phantom(**arguments)  # type: ignore[arg-type]  # wrong on purpose


def test_wrong_tumors_and_sets_are_refused(tmp_path: Path) -> None:
    for wrong in (0.0, -3.0, float("nan"), 500.0):
        with pytest.raises(ConfigError, match="200 mm"):
            Tumor("liver", wrong)
    with pytest.raises(ConfigError, match="finite"):
        Tumor("liver", 10.0, float("inf"))
    with pytest.raises(ConfigError, match="hypo, hyper, rim, solid, ground_glass"):
        Tumor("liver", 10.0, -40.0, "cyst")
    with pytest.raises(ConfigError, match="num_tumors"):
        TumorSpec(num_tumors=(3, 1))
    with pytest.raises(ConfigError, match="diameter_mm"):
        TumorSpec(diameter_mm=(30.0, 8.0))
    with pytest.raises(ConfigError, match="contrast_factor"):
        TumorSpec(contrast_factor=0.0)
    with pytest.raises(ConfigError, match="organs"):
        TumorSpec(organs=())
    with pytest.raises(ConfigError, match="num_volumes"):
        write_phantom_dataset(tmp_path, region="abdomen", num_volumes=0, seed=0)
    with pytest.raises(ConfigError, match="num_with_tumors"):
        write_phantom_dataset(tmp_path, region="abdomen", num_volumes=1, num_with_tumors=2, seed=0)
    with pytest.raises(ConfigError, match="scanners"):
        write_phantom_dataset(tmp_path, region="abdomen", num_volumes=1, scanners=(), seed=0)
    assert not list(tmp_path.iterdir())


def read(path: Path) -> tuple[NDArray[Any], Grid, Any]:
    image: Any = nib.load(path)
    array: NDArray[Any] = reverse_axes(np.asarray(image.dataobj))
    return array, grid_from_matrix(int_zyx(array.shape), image.affine), image


def test_dataset_round_trips_through_nibabel(tmp_path: Path) -> None:
    spec = TumorSpec(num_tumors=(2, 2))
    paths = write_phantom_dataset(
        tmp_path / "set", region="abdomen", num_volumes=4, num_with_tumors=2, seed=8, first_case=10, tumors=spec, scanners=(1, 3),
        shape_zyx=SMALL, spacing_mm_zyx=SMALL_SPACING, vary_geometry=True, prefix="demo",
    )  # fmt: skip
    assert [p.name for p in paths] == [f"demo_{case:03d}_ct.nii.gz" for case in range(10, 14)]
    assert len(list((tmp_path / "set").iterdir())) == 8
    spacings, orientations = set(), set()
    for k, path in enumerate(paths):
        image_hu, grid, header = read(path)
        label, label_grid, label_header = read(path.with_name(path.name.replace("_ct", "_label")))
        assert image_hu.dtype == np.dtype(np.int16)
        assert label.dtype == np.dtype(np.uint8)
        assert grid == label_grid
        assert header.header.get_xyzt_units()[0] == "mm"
        assert np.allclose(header.get_qform(), header.get_sform(), atol=1e-3)
        assert label_header.get_data_dtype() == np.uint8
        orientations.add("".join(nib.aff2axcodes(header.affine)))
        spacings.add(tuple(np.round(grid.spacing_mm_zyx, 3)))
        ras_image, ras_grid = to_ras(image_hu, grid)
        ras_label, _ = to_ras(label, grid)
        expected = make_phantom(
            "abdomen", seed=8, case=10 + k, shape_zyx=ras_grid.shape_zyx, tumors=spec if k < 2 else None, scanner=(1, 3)[k % 2],
            spacing_mm_zyx=tuple(float(round(s, 3)) for s in ras_grid.spacing_mm_zyx),  # type: ignore[arg-type]  # three of them
        )  # fmt: skip
        assert np.array_equal(ras_image, expected.image_hu)
        assert np.array_equal(ras_label, expected.label)
        assert np.allclose(ras_grid.matrix, expected.grid.matrix, atol=1e-3)  # NIfTI holds float32
        assert bool((label % 2 == 0).any() and (label[label > 0] % 2 == 0).any()) == (k < 2)
    assert orientations == {"RAS", "LPS"}
    assert len(spacings) >= 3


def test_tumors_can_stay_unannotated(tmp_path: Path) -> None:
    for name, annotate in (("with", True), ("without", False)):
        write_phantom_dataset(
            tmp_path,
            region="chest",
            num_volumes=1,
            seed=1,
            annotate_tumors=annotate,
            shape_zyx=(24, 48, 48),
            spacing_mm_zyx=(6.0, 4.0, 4.0),
            prefix=name,
        )
    seen, hidden = (read(tmp_path / f"{name}_000_label.nii.gz")[0] for name in ("with", "without"))
    assert (seen == 2).any()
    assert not (hidden == 2).any()
    assert np.array_equal(np.where(seen == 2, 1, seen), hidden)
    assert np.array_equal(read(tmp_path / "with_000_ct.nii.gz")[0], read(tmp_path / "without_000_ct.nii.gz")[0])
