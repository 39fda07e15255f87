"""tumor_mask: the released code's golden masks, both paths against the reference, and what holds for any draw."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from ftengine.errors import KernelInputError
from ftengine.geometry import Box
from ftengine.kernels import tumor_mask
from ftengine.kernels.tumor_mask import tumor_boxes
from ftengine.kernels.tumor_mask_ref import tumor_mask_ref
from tests.kernels.cuda_cpu import THREAD_ORDERS
from tests.kernels.support import (
    PROPERTY,
    Guarded,
    KernelsOnCpu,
    missing,
    past_2_to_31_voxels,
    run_behind_a_late_copy,
    same_bits,
    vectors_file,
)

NUM_GOLDEN = 16
NO_WARP = np.zeros((3, 2, 3, 3))


@dataclass(frozen=True)
class Tumor:
    """One sample's arguments, z y x (the warp as the law has it: x y z), and the mask that is known for them."""

    center_zyx: tuple[int, int, int]
    radii_zyx: tuple[float, float, float]
    warp: NDArray[np.float64]
    shape_zyx: tuple[int, int, int]
    organ: NDArray[np.uint8] | None = None
    golden: NDArray[np.uint8] | None = None

    def drawn(self, *, device: torch.device | None = None, **kwargs: Any) -> NDArray[np.uint8]:
        """The mask by the public function."""
        organ = None if self.organ is None else torch.from_numpy(self.organ)[None].to(device or "cpu")
        mask = tumor_mask([self.center_zyx], [self.radii_zyx], self.warp[None], self.shape_zyx, organ, **kwargs)
        assert (mask.dtype, mask.shape) == (torch.uint8, (1, *self.shape_zyx))
        return np.asarray(mask[0].cpu().numpy())

    def reference(self) -> NDArray[np.uint8]:
        return tumor_mask_ref(self.center_zyx, self.radii_zyx, self.warp, self.shape_zyx, self.organ)


def golden_tumor(k: int) -> Tumor:
    """Tumour k of the released code's masks; the file's axes are x, y, z."""
    with np.load(vectors_file("mask_law.npz")) as file:
        if int(file["n"]) != NUM_GOLDEN:
            missing(f"mask_law.npz holds {file['n']} masks; want {NUM_GOLDEN}. Use the file this test was written for.")
        shape_xyz = tuple(int(n) for n in file["shape"])
        organ, mask = (
            np.ascontiguousarray(
                np.unpackbits(file[f"{name}_{k}"], count=int(np.prod(shape_xyz))).reshape(shape_xyz).transpose(2, 1, 0)
            )
            for name in ("organ", "mask")
        )
        x, y, z = (int(c) for c in file[f"center_{k}"])
        rx, ry, rz = (float(r) for r in file[f"radii_{k}"])
        return Tumor(
            (z, y, x), (rz, ry, rx), file[f"warp_{k}"], (shape_xyz[2], shape_xyz[1], shape_xyz[0]), organ, mask
        )


def num_different(mask: NDArray[np.uint8], wanted: NDArray[np.uint8] | None) -> int:
    assert wanted is not None
    return int(np.count_nonzero(mask != wanted))


@pytest.mark.parametrize("k", range(NUM_GOLDEN))
def test_golden_masks_by_the_cpu_path(k: int) -> None:
    tumor = golden_tumor(k)
    assert num_different(tumor.drawn(), tumor.golden) == 0


@pytest.mark.parametrize("k", range(NUM_GOLDEN))
def test_golden_masks_by_the_kernel(on_cpu: KernelsOnCpu, k: int) -> None:
    tumor = golden_tumor(k)
    with on_cpu(THREAD_ORDERS[k % 3]):
        assert num_different(tumor.drawn(), tumor.golden) == 0


@pytest.mark.parametrize("k", range(NUM_GOLDEN))
def test_golden_masks_by_the_reference(k: int) -> None:
    tumor = golden_tumor(k)
    assert num_different(tumor.reference(), tumor.golden) == 0


LENGTHS = st.integers(1, 24)
WHOLE_RADII = st.integers(1, 6).map(float)
ANY_RADII = WHOLE_RADII | st.floats(0.05, 6.0)


@st.composite
def tumors(draw: st.DrawFn, *, radii: st.SearchStrategy[float] = ANY_RADII, warped: bool = True) -> Tumor:
    """Centres in and around the volume; warps of normal displacements, as drawn in use, or none."""
    shape = draw(st.tuples(LENGTHS, LENGTHS, LENGTHS))
    center = draw(st.tuples(*(st.integers(-5, n + 5) for n in shape)))
    sigma = draw(st.sampled_from([0.0, 0.5, 1.0, 3.0, 10.0])) if warped else 0.0
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    organ = rng.integers(0, 3, size=shape, dtype=np.uint8) if draw(st.booleans()) else None
    return Tumor(center, draw(st.tuples(radii, radii, radii)), sigma * rng.standard_normal((3, 2, 3, 3)), shape, organ)


@st.composite
def awkward_tumors(draw: st.DrawFn) -> Tumor:
    """Warps of round numbers: their lookups fall exactly between two voxels or on the box's face; rounding decides."""
    nodes = st.sampled_from([-2.0, -1.0, -0.5, -0.25, 0.0, 1 / 3, 0.5, 1.0, 1.5, 4.0])
    warp = np.array(draw(st.lists(nodes, min_size=54, max_size=54))).reshape(3, 2, 3, 3)
    if draw(st.booleans()):
        warp[...] = warp[:, :, :1, :1]  # one displacement for the whole plane
    return replace(draw(tumors(radii=WHOLE_RADII | st.sampled_from([0.5, 1.5, 2.5]))), warp=warp)


@PROPERTY
@given(tumor=tumors())
def test_cpu_path_equals_reference(tumor: Tumor) -> None:
    """In every voxel: normal displacements do not fall into the rounding band."""
    assert num_different(tumor.drawn(), tumor.reference()) == 0


@PROPERTY
@given(tumor=awkward_tumors() | tumors())
def test_kernel_equals_cpu_path_in_every_voxel(on_cpu: KernelsOnCpu, tumor: Tumor) -> None:
    """Also inside the rounding band: the paths do the same operations in the same order."""
    wanted = tumor.drawn()
    for order in THREAD_ORDERS:
        out = Guarded((1, *tumor.shape_zyx), torch.uint8)
        with on_cpu(order):
            assert num_different(tumor.drawn(out=out.tensor), wanted) == 0
        assert out.is_intact()


@PROPERTY
@given(tumor=tumors(warped=False), growth=st.tuples(*[st.just(0.0) | st.floats(1e-6, 3.0)] * 3))
def test_larger_radii_never_lose_a_voxel(tumor: Tumor, growth: tuple[float, ...]) -> None:
    """Without a warp. Growth above zero is large against a coordinate's rounding (1e-15), so no tie can turn."""
    rz, ry, rx = (r + g for r, g in zip(tumor.radii_zyx, growth, strict=True))
    assert np.all(tumor.drawn() <= replace(tumor, radii_zyx=(rz, ry, rx)).drawn())


@PROPERTY
@given(tumor=tumors(radii=ANY_RADII, warped=False))
def test_unwarped_mask_is_the_ellipsoid(tumor: Tumor) -> None:
    """By exact arithmetic on the voxels clearly inside or outside, 1e-12 from the surface being clear."""
    grids = np.indices(tumor.shape_zyx)
    level = sum(((i - c) / r) ** 2 for i, c, r in zip(grids, tumor.center_zyx, tumor.radii_zyx, strict=True))
    organ = np.ones(tumor.shape_zyx) if tumor.organ is None else tumor.organ
    clear = np.abs(level - 1) > 1e-12 * level
    assert np.array_equal(tumor.drawn()[clear], ((level < 1) & (organ > 0))[clear])


@PROPERTY
@given(tumor=tumors())
def test_mask_lies_in_the_organ_and_in_its_box(tumor: Tumor) -> None:
    mask = tumor.drawn()
    assert set(np.unique(mask)) <= {0, 1}
    if tumor.organ is not None:
        assert np.all(tumor.organ[mask == 1] > 0)
        assert np.array_equal(mask, replace(tumor, organ=None).drawn() & (tumor.organ > 0))
    (box,) = tumor_boxes([tumor.center_zyx], [tumor.radii_zyx], tumor.shape_zyx)
    mask[box.slices()] = 0
    assert not mask.any()


# An axis (z y x), the warp that moves a lookup along it first, and the one that moves it next, as (plane, component).
TWICE_WARPED = [(0, (2, 1), (1, 1)), (1, (1, 0), (0, 1)), (2, (2, 0), (0, 0))]


@pytest.mark.parametrize(("axis", "there", "back"), TWICE_WARPED)
@pytest.mark.parametrize("shift", [5.0, 5.4, 4.6, -6.0, -5.3, -4.5, -4.7])
def test_what_leaves_the_box_on_the_way_is_lost(
    on_cpu: KernelsOnCpu, axis: int, there: tuple[int, int], back: tuple[int, int], shift: float
) -> None:
    """Shift along an axis, then back by the rounded shift: the ellipsoid, less what was outside the box in between.

    The ellipsoid of radius 4 holds the voxels 5..11 of its box 0..15. Shifts by halves lie in the rounding band: there
    the reference has its own opinion.
    """
    warp = NO_WARP.copy()
    warp[there], warp[back] = shift, -np.floor(shift + 0.5)
    plain = Tumor((8, 8, 8), (4.0, 4.0, 4.0), NO_WARP, (16, 16, 16))
    index = np.indices(plain.shape_zyx)[axis]
    wanted = plain.drawn() & (index + shift >= 0) & (index + shift <= 15)
    warped = replace(plain, warp=warp)
    by_cpu_path = warped.drawn()
    if 2 * shift != round(2 * shift):
        assert num_different(by_cpu_path, wanted) == 0
        assert num_different(warped.reference(), wanted) == 0
    with on_cpu("forward"):
        assert num_different(warped.drawn(), by_cpu_path) == 0


def test_box_of_a_tumour_is_cut_to_the_volume() -> None:
    boxes = tumor_boxes([(5, 5, 5), (0, 9, 30)], [(1, 2, 1.2), (1, 1, 1)], (10, 10, 10))
    assert boxes == [Box((3, 1, 2), (4, 8, 6)), Box((0, 7, 10), (2, 3, 0))]


def batch(device: torch.device | None = None, **changes: Any) -> dict[str, Any]:
    """Arguments for three tumours in volumes of one size, inside, at a corner and outside; the organ on ``device``."""
    rng = np.random.default_rng(11)
    args: dict[str, Any] = {
        "center_zyx": np.array([[10, 9, 14], [0, 17, 1], [-20, 5, 5]]),
        "radii_zyx": np.array([[3.0, 4.0, 5.0], [2.0, 6.5, 3.0], [2.0, 2.0, 2.0]]),
        "warp": rng.standard_normal((3, 3, 2, 3, 3)),
        "shape_zyx": (20, 18, 30),
        "organ": torch.from_numpy(rng.integers(0, 3, (3, 20, 18, 30), dtype=np.uint8)).to(device or "cpu"),
    }
    return {**args, **changes}


def check_batch_equals_its_samples(device: torch.device) -> None:
    args = batch(device)
    together = tumor_mask(**args)
    assert together.device == device
    assert together[0].any()
    assert together[1].any()
    assert not together[2].any()
    for b in range(3):
        alone = tumor_mask(
            args["center_zyx"][b : b + 1],
            args["radii_zyx"][b : b + 1],
            args["warp"][b : b + 1],
            args["shape_zyx"],
            args["organ"][b : b + 1],
        )
        assert same_bits(alone[0], together[b])


def check_forms_of_arguments(device: torch.device) -> None:
    """Lists, arrays, tensors; a bool organ; a float32 warp, also on the device; an out that held something."""
    args = batch(device)
    expected = tumor_mask(**args)
    out = Guarded((3, 20, 18, 30), torch.uint8, device=device)
    assert tumor_mask(**args, out=out.tensor) is out.tensor
    assert same_bits(out.tensor, expected)
    assert out.is_intact()
    others = {
        "center_zyx": torch.from_numpy(args["center_zyx"]),
        "radii_zyx": args["radii_zyx"].tolist(),
        "warp": torch.from_numpy(args["warp"]).to(device),
        "shape_zyx": torch.Size(args["shape_zyx"]),
        "organ": args["organ"] > 0,
    }
    assert same_bits(tumor_mask(**others), expected)
    single = args["warp"].astype(np.float32)
    rounded = tumor_mask(**batch(device, warp=single.astype(np.float64)))
    assert same_bits(tumor_mask(**batch(device, warp=single)), rounded)
    assert same_bits(tumor_mask(**batch(device, warp=torch.from_numpy(single).to(device))), rounded)


def test_batch_equals_its_samples(on_cpu: KernelsOnCpu) -> None:
    check_batch_equals_its_samples(torch.device("cpu"))
    with on_cpu("forward"):
        check_batch_equals_its_samples(torch.device("cpu"))


def test_arguments_may_come_in_many_forms(on_cpu: KernelsOnCpu) -> None:
    check_forms_of_arguments(torch.device("cpu"))
    with on_cpu("reverse"):
        check_forms_of_arguments(torch.device("cpu"))


def test_empty_batch_is_returned_empty() -> None:
    nothing = np.empty((0, 3))
    assert tumor_mask(nothing.astype(int), nothing, np.empty((0, 3, 2, 3, 3)), (4, 5, 6)).shape == (0, 4, 5, 6)


GOOD: dict[str, Any] = {
    "center_zyx": [(1, 1, 1)],
    "radii_zyx": [(2, 2, 2)],
    "warp": NO_WARP[None],
    "shape_zyx": (4, 5, 6),
}
ORGAN = torch.ones(1, 4, 5, 6, dtype=torch.uint8)
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("fractional centre", {"center_zyx": [(1.0, 1, 1)]}, r"tumor_mask: center_zyx holds float64; want integers"),
    ("centre without a batch", {"center_zyx": (1, 1, 1)}, r"center_zyx has shape \(3,\); want \(B, 3\)"),
    (
        "centre elsewhere",
        {"center_zyx": torch.ones(1, 3, device="meta")},
        r"center_zyx is on meta; want it on the host",
    ),
    ("radii of another batch", {"radii_zyx": np.ones((2, 3))}, r"radii_zyx has shape \(2, 3\); want \(1, 3\)"),
    ("zero radius", {"radii_zyx": [(1, 0, 1)]}, r"radii_zyx holds 0\.0; want more than 0 voxels"),
    ("radius in micrometres", {"radii_zyx": [(1, 9000, 1)]}, r"radii_zyx holds 9000\.0; want at most 4096"),
    ("radius NaN", {"radii_zyx": [(1, np.nan, 1)]}, r"radii_zyx holds NaN or infinity"),
    ("warp of one sample", {"warp": NO_WARP}, r"warp has shape \(3, 2, 3, 3\); want \(1, 3, 2, 3, 3\)"),
    ("warp infinite", {"warp": NO_WARP[None] + np.inf}, r"warp holds NaN or infinity"),
    ("warp of booleans", {"warp": NO_WARP[None] > 0}, r"warp holds bool; want real numbers"),
    ("shape with a batch", {"shape_zyx": (1, 4, 5, 6)}, r"shape_zyx=\(1, 4, 5, 6\); want three positive lengths"),
    ("empty shape", {"shape_zyx": (4, 0, 6)}, r"shape_zyx=\(4, 0, 6\); want three positive lengths"),
    ("organ of another shape", {"organ": ORGAN[:, :3]}, r"organ has shape \(1, 3, 5, 6\); want \(1, 4, 5, 6\)"),
    ("organ of another dtype", {"organ": ORGAN.float()}, r"organ is float32; want uint8 or bool"),
    (
        "organ out of order",
        {"organ": ORGAN.transpose(1, 3).contiguous().transpose(1, 3)},
        r"Call organ\.contiguous\(\)",
    ),
    ("organ elsewhere", {"organ": ORGAN.to("meta")}, r"organ is on meta; want cpu or cuda"),
    ("out elsewhere", {"organ": ORGAN, "out": ORGAN.to("meta")}, r"out is on meta; want cpu or cuda"),
    ("out of another dtype", {"out": ORGAN.bool()}, r"out is bool; want uint8"),
    ("out is organ", {"organ": ORGAN, "out": ORGAN}, r"out shares memory with organ"),
]


@pytest.mark.parametrize(("change", "message"), [pytest.param(*row[1:], id=row[0]) for row in REFUSED])
def test_wrong_input_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(KernelInputError, match=message):
        tumor_mask(**(GOOD | change))


def test_boxes_name_themselves_in_errors() -> None:
    with pytest.raises(KernelInputError, match=r"^tumor_boxes: radii_zyx holds"):
        tumor_boxes([(1, 1, 1)], [(1, -1, 1)], (4, 5, 6))


@pytest.mark.gpu
@pytest.mark.parametrize("k", range(NUM_GOLDEN))
def test_gpu_draws_the_golden_masks(cuda: torch.device, k: int) -> None:
    tumor = golden_tumor(k)
    assert num_different(tumor.drawn(device=cuda), tumor.golden) == 0


@pytest.mark.gpu
@PROPERTY
@given(tumor=awkward_tumors() | tumors())
def test_gpu_equals_cpu_path_in_every_voxel(cuda: torch.device, tumor: Tumor) -> None:
    out = Guarded((1, *tumor.shape_zyx), torch.uint8, device=cuda)
    assert num_different(tumor.drawn(device=cuda, out=out.tensor), tumor.drawn()) == 0
    assert out.is_intact()


@pytest.mark.gpu
def test_gpu_equals_reference(cuda: torch.device) -> None:
    args = batch()
    masks = tumor_mask(**batch(cuda)).cpu().numpy()
    for b in range(3):
        wanted = tumor_mask_ref(
            args["center_zyx"][b], args["radii_zyx"][b], args["warp"][b], args["shape_zyx"], args["organ"][b]
        )
        assert num_different(masks[b], wanted) == 0


@pytest.mark.gpu
def test_gpu_keeps_the_promises(cuda: torch.device) -> None:
    check_batch_equals_its_samples(cuda)
    check_forms_of_arguments(cuda)
    warp = torch.full((3, 3, 2, 3, 3), torch.nan, dtype=torch.float64, device=cuda)
    assert not tumor_mask(**batch(organ=None, warp=warp)).any(), "a warp that is not a number finds no voxel"
    with pytest.raises(KernelInputError, match="center_zyx is on cuda:0; want it on the host"):
        tumor_mask(**batch(cuda, center_zyx=torch.zeros(3, 3, dtype=torch.int64, device=cuda)))
    with pytest.raises(KernelInputError, match="warp is on cuda:0; want cpu"):
        tumor_mask(**batch(warp=warp))


@pytest.mark.gpu
def test_gpu_works_on_the_current_stream_without_a_sync(cuda: torch.device) -> None:
    expected = tumor_mask(**batch(cuda))
    late = run_behind_a_late_copy(batch(cuda)["organ"], lambda organ: tumor_mask(**batch(organ=organ)))
    assert same_bits(late, expected)


@pytest.mark.gpu
def test_gpu_reaches_past_2_to_31_voxels(cuda: torch.device) -> None:
    """The last corner of the batch is that of a small volume."""
    shape = past_2_to_31_voxels(cuda, 2)
    warp = np.random.default_rng(5).standard_normal((2, 3, 2, 3, 3))
    out = torch.ones(shape, dtype=torch.uint8, device=cuda)
    center = [[0, 0, 0], [n - 3 for n in shape[1:]]]
    tumor_mask(center, [[2, 2, 2], [4, 5, 6]], warp, shape[1:], out=out)
    corner = tumor_mask([[21, 21, 21]], [[4, 5, 6]], warp[1:], (24, 24, 24))
    assert same_bits(out[-1, -24:, -24:, -24:], corner[0])
    assert int(out[-1].sum(dtype=torch.int64)) == int(corner.sum())
