"""tumor_mask: the released code's golden masks, both paths against the reference, and what holds for any draw."""

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from ftengine.errors import KernelInputError
from ftengine.geometry import mm_to_vox
from ftengine.kernels import tumor_mask, tumor_mask_and_box
from ftengine.kernels.tumor_mask_ref import tumor_mask_ref
from tests.kernels.cuda_cpu import THREAD_ORDERS
from tests.kernels.support import (
    FEW,
    PROPERTY,
    Guarded,
    KernelsOnCpu,
    check_operator,
    compiled,
    missing,
    past_2_to_31_voxels,
    run_behind_a_late_copy,
    same_bits,
    vectors_file,
)

NUM_GOLDEN = 16
NO_WARP = np.zeros((3, 2, 3, 3))
MODULE = sys.modules["ftengine.kernels.tumor_mask"]  # the package's name of it is the function


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


def union_of(tumors: Sequence[Tumor], *, device: torch.device | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The mask and box of one sample that holds all these tumours, in the volume and organ of the first."""
    organ = None if tumors[0].organ is None else torch.from_numpy(tumors[0].organ)[None].to(device or "cpu")
    return tumor_mask_and_box(
        [[t.center_zyx for t in tumors]],
        [[t.radii_zyx for t in tumors]],
        np.stack([t.warp for t in tumors])[None],
        tumors[0].shape_zyx,
        organ,
        out=torch.full((1, *tumors[0].shape_zyx), 7, dtype=torch.uint8, device=device),
    )


def box_of(mask: torch.Tensor) -> NDArray[np.int64]:
    """By NumPy: for each sample the first voxel and the one behind the last; zeros where there is none."""
    boxes = np.zeros((len(mask), 2, 3), dtype=np.int64)
    for sample, box in zip(mask.cpu().numpy(), boxes, strict=True):
        found = np.stack(np.nonzero(sample))
        if found.size:
            box[0], box[1] = found.min(axis=1), found.max(axis=1) + 1
    return boxes


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
    half = np.ceil(2 * np.array(tumor.radii_zyx)).astype(int)
    mask[tuple(slice(max(0, c - h), max(0, c + h)) for c, h in zip(tumor.center_zyx, half, strict=True))] = 0
    assert not mask.any()


@st.composite
def several_tumors(draw: st.DrawFn) -> list[Tumor]:
    """Up to five tumours in one volume and organ, some of them left out by radii of 0."""
    first = draw(tumors())
    others = draw(st.lists(tumors() | awkward_tumors(), max_size=4))
    nothing = st.sampled_from([False, False, True])
    return [
        replace(
            t, shape_zyx=first.shape_zyx, organ=first.organ, radii_zyx=(0.0, 0.0, 0.0) if draw(nothing) else t.radii_zyx
        )
        for t in [first, *others]
    ]


def check_union(together: list[Tumor], device: torch.device) -> None:
    mask, box = union_of(together, device=device)
    assert (box.dtype, box.device, mask.device) == (torch.int64, device, device)
    wanted = np.zeros(together[0].shape_zyx, dtype=np.uint8)
    for tumor in together:
        if tumor.radii_zyx != (0, 0, 0):
            wanted |= tumor.drawn()
    assert num_different(mask[0].cpu().numpy(), wanted) == 0
    assert np.array_equal(box.cpu().numpy(), box_of(mask))


@PROPERTY
@given(together=several_tumors())
def test_union_is_any_of_the_tumours_and_the_box_is_tight(together: list[Tumor]) -> None:
    check_union(together, torch.device("cpu"))


@FEW
@given(together=several_tumors(), by_voxel=st.booleans())
def test_union_and_box_by_the_kernel(on_cpu: KernelsOnCpu, together: list[Tumor], by_voxel: bool) -> None:
    """``by_voxel``: without tables, as a tumour too large for them."""
    wanted_mask, wanted_box = union_of(together)
    for order in THREAD_ORDERS:
        with on_cpu(order), pytest.MonkeyPatch.context() as patch:
            if by_voxel:
                patch.setattr(MODULE, "_MAX_TABLE_BYTES", 0)
            mask, box = union_of(together)
        assert torch.equal(mask, wanted_mask)
        assert torch.equal(box, wanted_box)


def test_a_tumour_too_large_for_tables_is_drawn_beside_a_small_one(on_cpu: KernelsOnCpu) -> None:
    """Its surface crosses the volume; the small one lies outside it."""
    rng = np.random.default_rng(8)
    shape = (9, 12, 70)
    giant = Tumor((4, 6, -560), (500.0, 610.0, 603.0), 5 * rng.standard_normal((3, 2, 3, 3)), shape)
    small = Tumor((4, 6, 60), (3.0, 4.0, 5.0), rng.standard_normal((3, 2, 3, 3)), shape)
    mask, box = union_of([giant, small])
    assert 0 < int(giant.drawn().sum()) < int(mask.sum()) < mask.numel()
    assert num_different(mask[0].numpy(), giant.drawn() | small.drawn()) == 0
    with on_cpu("shuffled"):
        same, same_box = union_of([giant, small])
    assert torch.equal(mask, same)
    assert torch.equal(box, same_box)


@PROPERTY
@given(
    radii_mm=st.tuples(*[st.floats(1.0, 9.0)] * 3),
    spacing_mm=st.tuples(*[st.sampled_from([1, 2, 3])] * 3),
    center=st.tuples(*[st.integers(0, 4)] * 3),
)
def test_an_anisotropic_grid_holds_the_same_shape_in_millimetres(
    radii_mm: tuple[float, float, float], spacing_mm: tuple[int, int, int], center: tuple[int, int, int]
) -> None:
    """Every voxel of the coarse grid is one of the 1 mm grid; on the surface, within 1e-12, rounding decides."""
    sz, sy, sx = spacing_mm
    spacing = (float(sz), float(sy), float(sx))
    shape_mm = (15, 15, 15)
    cz, cy, cx = center
    fine = Tumor((cz * sz, cy * sy, cx * sx), radii_mm, NO_WARP, shape_mm)
    coarse = Tumor(center, mm_to_vox(radii_mm, spacing), NO_WARP, (-(-15 // sz), -(-15 // sy), -(-15 // sx)))
    grids = np.indices(shape_mm)
    level = sum(((i - c) / r) ** 2 for i, c, r in zip(grids, fine.center_zyx, radii_mm, strict=True))
    clear = (np.abs(level - 1) > 1e-12 * level)[::sz, ::sy, ::sx]
    assert np.array_equal(coarse.drawn()[clear], fine.drawn()[::sz, ::sy, ::sx][clear])


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
    together, boxes = tumor_mask_and_box(**args)
    assert together.device == device
    assert np.array_equal(boxes.cpu().numpy(), box_of(together))
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


def test_tables_on_the_device_are_read_there(on_cpu: KernelsOnCpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors that the launch takes as they lie, far centres and NaN among them: those paint nothing."""
    args = batch()
    far = np.iinfo(np.int64)
    args["center_zyx"] = torch.tensor([[10, 9, 14], [far.max, 17, 1], [-20, 5, far.min]])
    args["warp"] = torch.from_numpy(args["warp"])
    by_cpu_path, box = tumor_mask_and_box(**args)
    assert by_cpu_path[0].any()
    assert not by_cpu_path[1:].any()
    monkeypatch.setattr(MODULE, "_on_host", lambda _table: False)
    with on_cpu("forward"):
        for mask, same_box in (tumor_mask_and_box(**args), tumor_mask_and_box(**args, box_out=torch.full_like(box, 5))):
            assert torch.equal(mask, by_cpu_path)
            assert torch.equal(same_box, box)
        args["warp"][0, 0, 1, 2, 0] = torch.nan
        mask, same_box = tumor_mask_and_box(**args)
        assert not mask.any()
        assert not same_box.any()


def test_empty_batch_and_no_tumour_at_all(on_cpu: KernelsOnCpu) -> None:
    nothing = np.empty((0, 3))
    nowhere = np.zeros((2, 1, 3))
    for context in (None, "forward"):
        with nullcontext() if context is None else on_cpu(context):
            mask, box = tumor_mask_and_box(nothing.astype(int), nothing, np.empty((0, 3, 2, 3, 3)), (4, 5, 6))
            assert (mask.shape, box.shape) == ((0, 4, 5, 6), (0, 2, 3))
            for num_tumors in (0, 1):  # none in the batch at all, and none but fillers
                table = nowhere[:, :num_tumors]
                mask, box = tumor_mask_and_box(
                    table.astype(int),
                    table,
                    np.zeros((2, num_tumors, 3, 2, 3, 3)),
                    (4, 5, 6),
                    out=torch.ones(2, 4, 5, 6, dtype=torch.uint8),
                    box_out=torch.ones(2, 2, 3, dtype=torch.int64),
                )
                assert not mask.any()
                assert not box.any()


@pytest.mark.parametrize("offset", range(9))
def test_every_byte_is_cleared_wherever_memory_begins(on_cpu: KernelsOnCpu, offset: int) -> None:
    for shape in ((1, 1, 3), (3, 1, 5), (3, 7, 11)):
        buffer = torch.full((300,), 9, dtype=torch.uint8)
        out = buffer[offset : offset + int(np.prod(shape))].view(1, *shape)
        with on_cpu("reverse"):
            tumor_mask([(0, 0, 0)], [(1, 1, 1)], NO_WARP[None], shape, out=out)
        assert int(out[0, 0, 0, 0]) == 1
        assert int(out.sum()) == 1
        assert int((buffer != 9).sum()) == out.numel()


def operator_arguments(with_organ: bool) -> list[Any]:
    args = batch()
    center, radii, warp = (torch.from_numpy(args[k])[:, None] for k in ("center_zyx", "radii_zyx", "warp"))
    return [center, radii, warp, args["organ"] if with_organ else None]


@pytest.mark.parametrize("with_organ", [False, True])
def test_operator_keeps_torchs_rules(with_organ: bool) -> None:
    center, radii, warp, organ = operator_arguments(with_organ)
    check_operator(torch.ops.ftengine.tumor_mask.default, (center, radii, warp, [20, 18, 30], organ))
    buffers = torch.empty(3, 20, 18, 30, dtype=torch.uint8), torch.empty(3, 2, 3, dtype=torch.int64)
    check_operator(torch.ops.ftengine.tumor_mask_out.default, (center, radii, warp, organ, *buffers))


def test_compiled_in_one_graph_it_gives_the_same() -> None:
    center, radii, warp, organ = operator_arguments(with_organ=True)
    wanted, wanted_box = tumor_mask_and_box(center, radii, warp, (20, 18, 30), organ)
    function = compiled(lambda c, r, w, o, **k: tumor_mask_and_box(c + 0, r * 1, w * 1, (20, 18, 30), o > 0, **k))
    mask, box = function(center, radii, warp, organ)
    assert torch.equal(mask, wanted)
    assert torch.equal(box, wanted_box)
    out, box_out = torch.ones_like(wanted), torch.ones_like(wanted_box)
    function(center, radii, warp, organ, out=out, box_out=box_out)
    assert torch.equal(out, wanted)
    assert torch.equal(box_out, wanted_box)
    with pytest.raises(KernelInputError, match="radii_zyx holds -2"):
        function(center, radii - 4, warp, organ)


def test_threads_change_no_bit() -> None:
    args = batch()
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(tumor_mask_and_box(**args))
    torch.set_num_threads(threads)
    for mask, box in results[1:]:
        assert torch.equal(mask, results[0][0])
        assert torch.equal(box, results[0][1])


GOOD: dict[str, Any] = {
    "center_zyx": [(1, 1, 1)],
    "radii_zyx": [(2, 2, 2)],
    "warp": NO_WARP[None],
    "shape_zyx": (4, 5, 6),
}
ORGAN = torch.ones(1, 4, 5, 6, dtype=torch.uint8)
MEMORY = torch.zeros(128, dtype=torch.uint8)
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("fractional centre", {"center_zyx": [(1.0, 1, 1)]}, r"tumor_mask: center_zyx holds float64; want integers"),
    ("centre without a batch", {"center_zyx": (1, 1, 1)}, r"center_zyx has shape \(3,\); want \(B, 3\) or \(B, N, 3\)"),
    (
        "centre elsewhere",
        {"center_zyx": torch.ones(1, 3, device="meta")},
        r"center_zyx is on meta; want cpu or cuda",
    ),
    ("radii elsewhere", {"radii_zyx": torch.ones(1, 3, device="meta")}, r"radii_zyx is on meta; want it on the host"),
    (
        "centre not where organ is",
        {"center_zyx": torch.ones(1, 3, device="meta"), "organ": ORGAN},
        r"center_zyx is on meta; want cpu, as",
    ),
    ("centre of floats in a tensor", {"center_zyx": torch.ones(1, 3)}, r"center_zyx holds float32; want integers"),
    ("radii in a tensor of booleans", {"radii_zyx": torch.ones(1, 3) > 0}, r"radii_zyx holds bool; want real numbers"),
    ("radii NaN in a tensor", {"radii_zyx": torch.full((1, 3), torch.nan)}, r"radii_zyx holds NaN or infinity"),
    ("warp NaN in a tensor", {"warp": torch.full((1, 3, 2, 3, 3), torch.nan)}, r"warp holds NaN or infinity"),
    (
        "warp of one tumour for several",
        {"center_zyx": [[(1, 1, 1)]], "radii_zyx": [[(1, 1, 1)]]},
        r"want \(1, 1, 3, 2, 3, 3\)",
    ),
    ("negative radius", {"radii_zyx": [(1, -2, 1)]}, r"radii_zyx holds -2\.0; want more than 0 voxels, or three zeros"),
    (
        "box of another shape",
        {"box_out": torch.zeros(1, 3, 2, dtype=torch.int64)},
        r"box_out is torch\.int64 of shape \(1, 3, 2\) on cpu; want",
    ),
    ("box of another dtype", {"box_out": torch.zeros(1, 2, 3)}, r"box_out is torch\.float32"),
    (
        "box out of order",
        {"box_out": torch.zeros(1, 3, 2, dtype=torch.int64).transpose(1, 2)},
        r"Call box_out\.contiguous\(\)",
    ),
    (
        "box in out's memory",
        {"out": MEMORY[:120].view(1, 4, 5, 6), "box_out": MEMORY[80:128].view(torch.int64).view(1, 2, 3)},
        r"out shares memory with box_out",
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
        tumor_mask_and_box(**(GOOD | change))


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
    with pytest.raises(KernelInputError, match="radii_zyx is on cuda:0; want it on the host"):
        tumor_mask(**batch(cuda, radii_zyx=torch.ones(3, 3, device=cuda)))
    with pytest.raises(KernelInputError, match="warp is on cuda:0; want cpu"):
        tumor_mask(**batch(warp=warp))


@pytest.mark.gpu
def test_gpu_takes_centres_from_the_device(cuda: torch.device) -> None:
    args = batch(cuda)
    wanted, wanted_box = tumor_mask_and_box(**args)
    center = torch.from_numpy(args["center_zyx"]).to(cuda)
    mask, box = tumor_mask_and_box(**batch(cuda, center_zyx=center))
    assert same_bits(mask, wanted)
    assert same_bits(box, wanted_box)
    assert tumor_mask(**batch(organ=None, center_zyx=center)).device == cuda
    center[0, 0], center[1, 2] = 2**63 - 1, -(2**63)
    assert not tumor_mask(**batch(cuda, center_zyx=center)).any()


@pytest.mark.gpu
@FEW
@given(together=several_tumors())
def test_gpu_unites_tumours_and_finds_the_box(cuda: torch.device, together: list[Tumor]) -> None:
    check_union(together, cuda)


@pytest.mark.gpu
def test_gpu_works_on_the_current_stream_without_a_sync(cuda: torch.device) -> None:
    expected = tumor_mask(**batch(cuda))
    late = run_behind_a_late_copy(batch(cuda)["organ"], lambda organ: tumor_mask(**batch(organ=organ)))
    assert same_bits(late, expected)
    on_gpu = batch(cuda)
    center = torch.from_numpy(on_gpu["center_zyx"]).to(cuda)

    def masks_at(late_center: torch.Tensor) -> torch.Tensor:
        on_gpu["center_zyx"] = late_center
        return tumor_mask(**on_gpu)

    late = run_behind_a_late_copy(center, masks_at)
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
