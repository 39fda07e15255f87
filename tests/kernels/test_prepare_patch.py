"""prepare_patch: bit by bit the loader's DALI graph, on both paths, in every orientation and dtype."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from nvidia.dali import fn
from nvidia.dali.pipeline import pipeline_def
from nvidia.dali.types import DALIDataType
from torch.utils.dlpack import from_dlpack

from ftengine.config import Config
from ftengine.errors import KernelInputError
from ftengine.geometry import Box, IntZYX
from ftengine.kernels import _launch, prepare_patch
from ftengine.kernels.prepare_patch import _launch_kernel
from ftengine.kernels.prepare_patch_ref import prepare_patch_ref
from ftengine.types import Augmentation, Patch
from tests.kernels.cuda_cpu import THREAD_ORDERS
from tests.kernels.dali_graph import DaliGraph
from tests.kernels.support import (
    EPS32,
    FEW,
    PROPERTY,
    Guarded,
    KernelsOnCpu,
    as_array,
    check_operator,
    compiled,
    past_2_to_31_voxels,
    run_behind_a_late_copy,
    same_bits,
)
from tests.support import small_config

CONFIG = small_config()
WINDOW: tuple[float, float] = CONFIG.region.window_hu
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BATCH = 3

# numpy.rot90 in the plane y, x: the table of the module's docstring
QUARTER_TURNS = {
    0: (False, (False, False, False)),
    1: (True, (False, True, False)),
    2: (False, (False, True, True)),
    3: (True, (False, False, True)),
}


@dataclass(frozen=True)
class Case:
    image: torch.Tensor
    label: torch.Tensor
    shape_zyx: IntZYX
    origin_zyx: NDArray[np.int64]
    transpose_yx: NDArray[np.bool_]
    flip_zyx: NDArray[np.bool_]
    scale: NDArray[np.float64]
    shift: NDArray[np.float64]
    window_hu: tuple[float, float] = WINDOW

    @property
    def parameters(self) -> dict[str, Any]:
        names = ("shape_zyx", "window_hu", "origin_zyx", "transpose_yx", "flip_zyx", "scale", "shift")
        return {name: getattr(self, name) for name in names}

    def prepared(self, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
        return prepare_patch(self.image, self.label, **self.parameters, dtype=dtype)

    def part(self, b: int) -> "Case":
        """One sample alone."""
        one = slice(b, b + 1)
        arrays = {
            name: getattr(self, name)[one] for name in ("image", "label", "origin_zyx", "transpose_yx", "flip_zyx")
        }
        return replace(self, **arrays, scale=self.scale[one], shift=self.shift[one])

    def to(self, device: torch.device) -> "Case":
        return replace(self, image=self.image.to(device), label=self.label.to(device))

    def on_device(self, device: torch.device) -> dict[str, Any]:
        """The parameters as tensors of the operator's own dtypes."""
        tensors: dict[str, Any] = {
            "origin_zyx": torch.from_numpy(self.origin_zyx),
            "transpose_yx": torch.from_numpy(self.transpose_yx),
            "flip_zyx": torch.from_numpy(self.flip_zyx),
            "scale": torch.from_numpy(self.scale).float(),
            "shift": torch.from_numpy(self.shift).float(),
        }
        return {name: tensor.to(device) for name, tensor in tensors.items()}


def case_of(seed: int, batch: int, shape: IntZYX, *, margin: int = 3, transpose: str = "mixed") -> Case:
    """Whole range of HU, most of it around the window; a crop anywhere in a read that is larger by up to the margin."""
    rng = np.random.default_rng(seed)
    z, y, x = shape
    turned = {"no": np.zeros(batch, bool), "yes": np.ones(batch, bool), "mixed": rng.random(batch) < 0.5}[transpose]
    crops = np.array([(z, x, y) if t else (z, y, x) for t in turned], dtype=np.int64).reshape(batch, 3)
    read = crops.max(axis=0, initial=1) + rng.integers(0, margin + 1, 3)
    origin = rng.integers(0, read - crops + 1)
    hu = np.where(
        rng.random((batch, *read)) < 0.1,
        rng.integers(-(2**15), 2**15, (batch, *read)),
        rng.integers(-300, 400, (batch, *read)),
    )
    scale, shift = rng.uniform(0.8, 1.2, batch), rng.uniform(-0.2, 0.2, batch)
    drawn = rng.random(batch)
    scale, shift = np.where(drawn < 0.2, 1.0, scale), np.where(drawn < 0.2, 0.0, shift)
    scale, shift = (
        np.where(drawn > 0.8, rng.choice([-1.0, -0.0, 0.0, 7.0], batch), scale),
        np.where(drawn > 0.9, -0.0, shift),
    )
    return Case(
        torch.from_numpy(hu.astype(np.int16)),
        torch.from_numpy(rng.integers(0, 256, (batch, *read)).astype(np.uint8)),
        shape,
        origin,
        turned,
        rng.random((batch, 3)) < 0.5,
        scale,
        shift,
    )


@st.composite
def cases(draw: st.DrawFn, *, max_length: int = 40) -> Case:
    """Small patches of all proportions; now and then one longer than a tile."""
    z, y, x = draw(st.integers(1, 4)), draw(st.integers(1, max_length)), draw(st.integers(1, max_length))
    case = case_of(draw(st.integers(0, 2**32 - 1)), draw(st.integers(1, 9)), (z, y, x))
    window = draw(st.sampled_from([WINDOW, (-1000.0, 400.0), (-160.3, 240.7), (0.0, 0.1)]))
    return replace(case, window_hu=window)


def assert_equals_reference(case: Case) -> None:
    out = (
        Guarded((len(case.image), *case.shape_zyx), torch.float32, device=case.image.device),
        Guarded((len(case.image), *case.shape_zyx), torch.uint8, device=case.image.device),
    )
    given = (out[0].tensor, out[1].tensor)
    image, label = prepare_patch(case.image, case.label, **case.parameters, out=given)
    assert image is given[0]
    assert label is given[1]
    assert all(guard.is_intact() for guard in out)
    wanted_image, wanted_label = prepare_patch_ref(case.image.cpu(), case.label.cpu(), **case.parameters)
    assert np.array_equal(label.cpu().numpy(), wanted_label)
    # low, HU - low, the reciprocal and the product are rounded, then scale, shift, product and sum; clipping only helps
    low, high = case.window_hu
    scale, shift = (np.abs(v)[:, None, None, None] for v in (case.scale, case.shift))
    tolerance = (scale * (abs(low) / (high - low) + 3) + 3 * scale + 2 * shift) * EPS32 * (1 + 1e-5)
    assert np.all(np.abs(as_array(image) - wanted_image) <= tolerance)
    assert all(same_bits(a, b) for a, b in zip(case.prepared(), (image, label), strict=True))
    for dtype in DTYPES[1:]:
        half, label_again = case.prepared(dtype)
        assert same_bits(half, image.to(dtype))
        assert same_bits(label_again, label)


@PROPERTY
@given(case=cases())
def test_cpu_path_equals_reference(case: Case) -> None:
    assert_equals_reference(case)


@FEW
@given(case=cases(max_length=37))
def test_kernel_equals_reference_and_the_cpu_path_bit_by_bit(on_cpu: KernelsOnCpu, case: Case) -> None:
    by_cpu = case.prepared()
    for order in THREAD_ORDERS:
        with on_cpu(order):
            assert_equals_reference(case)
            assert all(same_bits(a, b) for a, b in zip(case.prepared(), by_cpu, strict=True))


@pytest.mark.parametrize("shape", [(1, 130, 1), (2, 1, 130), (1, 97, 65), (1, 64, 64)])
@pytest.mark.parametrize("transpose", ["no", "yes"])
def test_longer_patches_equal_reference(on_cpu: KernelsOnCpu, shape: IntZYX, transpose: str) -> None:
    case = case_of(1, 2, shape, transpose=transpose)
    assert_equals_reference(case)
    by_cpu = case.prepared()
    with on_cpu("reverse"):
        assert_equals_reference(case)
        assert all(same_bits(a, b) for a, b in zip(case.prepared(), by_cpu, strict=True))


def test_a_grid_smaller_than_the_batch_walks_over_it(on_cpu: KernelsOnCpu, monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_of(2, 5, (7, 5, 6))
    monkeypatch.setattr(_launch, "MAX_BLOCKS_YZ", 2)
    with on_cpu("shuffled"):
        assert_equals_reference(case)


# ---- DALI's own operators ----


def by_dali(pipeline: DaliGraph, case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """What DALI makes of the case, cropped before."""
    z, y, x = case.shape_zyx
    patches, augmentations = [], []
    for b, (oz, oy, ox) in enumerate(case.origin_zyx.tolist()):
        cy, cx = (x, y) if case.transpose_yx[b] else (y, x)
        box = (slice(oz, oz + z), slice(oy, oy + cy), slice(ox, ox + cx))
        read = (case.image[b].cpu().numpy()[box].copy(), case.label[b].cpu().numpy()[box].copy())
        patches.append(Patch("case", Box((oz, oy, ox), (z, cy, cx)), *read))
        flip_z, flip_y, flip_x = case.flip_zyx[b].tolist()
        turned, scale, shift = bool(case.transpose_yx[b]), float(case.scale[b]), float(case.shift[b])
        augmentations.append(Augmentation(turned, (flip_z, flip_y, flip_x), scale, shift))
    image, label = pipeline(patches, augmentations)
    return image[:, 0], label[:, 0]


@pytest.fixture(scope="module")
def pipeline() -> DaliGraph:
    return DaliGraph(CONFIG, BATCH)


@PROPERTY
@given(seed=st.integers(0, 2**32 - 1), z=st.integers(1, 5), y=st.integers(1, 40), x=st.integers(1, 40))
def test_float32_is_bit_by_bit_what_dali_gives(
    pipeline: DaliGraph, on_cpu: KernelsOnCpu, seed: int, z: int, y: int, x: int
) -> None:
    case = case_of(seed, BATCH, (z, y, x))
    wanted = by_dali(pipeline, case)
    assert all(same_bits(a, b) for a, b in zip(case.prepared(), wanted, strict=True))
    with on_cpu("forward"):
        assert all(same_bits(a, b) for a, b in zip(case.prepared(), wanted, strict=True))


@pytest.mark.parametrize("preset", ["abdomen", "chest", "demo"])
def test_every_hu_is_windowed_as_dali_does_it(on_cpu: KernelsOnCpu, preset: str) -> None:
    """All of int16 in the windows of the presets, with intensities of all signs."""
    config = Config.preset(preset)
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(1, 16, 64, 64)
    intensities = [
        (1.0, 0.0),
        (0.9, 0.1),
        (1.1, -0.1),
        (1.0371, 0.0219),
        (-1.0, 1.0),
        (-1.0, -0.0),
        (-0.0, -0.0),
        (1e30, -1e30),
    ]
    batch = len(intensities)
    scale, shift = (np.array(values) for values in zip(*intensities, strict=True))
    hu = every.expand(batch, -1, -1, -1).contiguous()
    none = np.zeros((batch, 3))
    case = Case(
        hu, hu.to(torch.uint8), (16, 64, 64), none.astype(np.int64), none[:, 0] > 0, none > 0, scale, shift, config.region.window_hu
    )  # fmt: skip
    wanted = by_dali(DaliGraph(config, batch), case)
    assert all(same_bits(a, b) for a, b in zip(case.prepared(), wanted, strict=True))
    with on_cpu("forward"):
        assert all(same_bits(a, b) for a, b in zip(case.prepared(), wanted, strict=True))


@pytest.mark.parametrize("inside", ["batch", "sample"])
def test_inside_a_python_function_of_dali_it_gives_the_same(pipeline: DaliGraph, inside: str) -> None:
    """DLPack both ways; the crop is made here instead of in the store."""
    case = case_of(4, BATCH, (3, 20, 20))

    def prepare(*capsules: Any) -> Any:
        """image, label, origin, transpose, flip, scale, shift, of a batch as lists or of one sample."""
        if inside == "batch":
            tensors = [torch.stack([from_dlpack(capsule) for capsule in column]) for column in capsules]
        else:
            tensors = [from_dlpack(capsule)[None] for capsule in capsules]
        image, label, origin, transpose, flip, scale, shift = tensors
        patch = prepare_patch(
            image,
            label,
            shape_zyx=case.shape_zyx,
            window_hu=WINDOW,
            origin_zyx=origin,
            transpose_yx=transpose,
            flip_zyx=flip,
            scale=scale,
            shift=shift,
        )
        if inside == "batch":
            return tuple([sample.__dlpack__() for sample in part] for part in patch)
        return tuple(part[0].__dlpack__() for part in patch)

    kinds = [("image", DALIDataType.INT16, 3), ("label", DALIDataType.UINT8, 3), ("origin", DALIDataType.INT64, 1)]
    kinds += [("transpose", DALIDataType.BOOL, 0), ("flip", DALIDataType.BOOL, 1)]
    kinds += [("scale", DALIDataType.FLOAT, 0), ("shift", DALIDataType.FLOAT, 0)]

    @pipeline_def
    def graph() -> tuple[Any, Any]:
        inputs = [fn.external_source(name=name, dtype=kind, ndim=ndim) for name, kind, ndim in kinds]
        outputs: Any = fn.dl_tensor_python_function(
            *inputs, function=prepare, num_outputs=2, batch_processing=inside == "batch"
        )
        image, label = outputs
        return image, label

    built = graph(batch_size=BATCH, device_id=None, num_threads=2, prefetch_queue_depth=1, exec_dynamic=True)
    built.build()
    values: list[Any] = [case.image.numpy(), case.label.numpy(), case.origin_zyx, case.transpose_yx, case.flip_zyx]
    values += [case.scale.astype(np.float32), case.shift.astype(np.float32)]
    fed = {name: [np.asarray(v) for v in column] for (name, _, _), column in zip(kinds, values, strict=True)}
    found = [from_dlpack(part.as_tensor()).clone() for part in built.run(**fed)]
    assert all(same_bits(a, b) for a, b in zip(found, by_dali(pipeline, case), strict=True))


# ---- orientations ----


@PROPERTY
@given(seed=st.integers(0, 2**32 - 1), quarter_turns=st.integers(0, 3), flips=st.tuples(*[st.booleans()] * 3))
def test_transpose_and_flips_make_every_turn(seed: int, quarter_turns: int, flips: tuple[bool, bool, bool]) -> None:
    """The docstring's table, also behind flips that came before the turn."""
    rng = np.random.default_rng(seed)
    z, y, x = rng.integers(1, 7, 3).tolist()
    label = rng.integers(0, 256, (1, z, y, x)).astype(np.uint8)
    axes = tuple(axis + 1 for axis in range(3) if flips[axis])
    wanted = np.rot90(np.flip(label, axes), quarter_turns, axes=(-2, -1))
    transpose, turn = QUARTER_TURNS[quarter_turns]
    first = (flips[0], flips[2], flips[1]) if transpose else flips
    combined = [a != b for a, b in zip(first, turn, strict=True)]
    image = torch.zeros(label.shape, dtype=torch.int16)
    _, found = prepare_patch(
        image,
        torch.from_numpy(label),
        shape_zyx=wanted.shape[1:],
        window_hu=WINDOW,
        transpose_yx=[transpose],
        flip_zyx=[combined],
    )
    assert np.array_equal(found.numpy(), wanted)


def test_there_are_eight_orientations_of_a_plane() -> None:
    label = torch.arange(6 * 6, dtype=torch.uint8).view(1, 1, 6, 6)
    image = label.to(torch.int16)
    found = set()
    for transpose in (False, True):
        for flip in ([False, y, x] for y in (False, True) for x in (False, True)):
            patch = prepare_patch(
                image, label, shape_zyx=(1, 6, 6), window_hu=(0, 35), transpose_yx=[transpose], flip_zyx=[flip]
            )
            found.add(bytes(patch[1].numpy().tobytes()))
            assert torch.equal(patch[0], patch[1].float() * float(np.float32(1 / 35)))  # image and label turn alike
    assert len(found) == 8


def test_voxels_come_from_where_the_crop_is(on_cpu: KernelsOnCpu) -> None:
    """Voxels that hold their own place turn an error into a number."""
    places = torch.arange(4 * 6 * 8, dtype=torch.int16).view(1, 4, 6, 8).repeat(2, 1, 1, 1)

    def check() -> None:
        image, _ = prepare_patch(
            places,
            places.to(torch.uint8),
            shape_zyx=(2, 5, 3),
            window_hu=(0, 256),
            origin_zyx=[[1, 1, 2], [2, 3, 3]],
            transpose_yx=[False, True],
        )
        assert torch.equal(image[0] * 256, places[0, 1:3, 1:6, 2:5].float())
        assert torch.equal(image[1] * 256, places[1, 2:4, 3:6, 3:8].transpose(1, 2).float())

    check()
    with on_cpu("reverse"):
        check()


# ---- what does not matter ----


def test_parameters_may_be_sequences_arrays_or_tensors_of_any_width(on_cpu: KernelsOnCpu) -> None:
    case = case_of(5, 3, (2, 5, 6))
    shift = np.array([0.25, -0.5, 0.0])
    case = replace(case, scale=np.array([1.5, 0.5, 1.0]), shift=shift)  # exact in every float
    wanted = case.prepared()
    tensors = case.on_device(torch.device("cpu"))
    forms: list[dict[str, Any]] = [
        {name: value.tolist() for name, value in tensors.items()},
        tensors,
        {"origin_zyx": tensors["origin_zyx"].to(torch.uint8), "scale": tensors["scale"].half(), "shift": shift},
    ]
    for form in forms:
        assert all(same_bits(a, b) for a, b in zip(_prepared_by(case, form), wanted, strict=True))
        with on_cpu("forward"):
            assert all(same_bits(a, b) for a, b in zip(_prepared_by(case, form), wanted, strict=True))


def _prepared_by(case: Case, parameters: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    return prepare_patch(case.image, case.label, **(case.parameters | parameters))


def test_what_is_left_out_changes_nothing(on_cpu: KernelsOnCpu) -> None:
    case = case_of(6, 2, (3, 4, 5), margin=0, transpose="no")
    case = replace(case, flip_zyx=np.zeros((2, 3), bool), scale=np.ones(2), shift=np.zeros(2))
    plain = prepare_patch(case.image, case.label, shape_zyx=case.shape_zyx, window_hu=WINDOW)
    assert all(same_bits(a, b) for a, b in zip(plain, case.prepared(), strict=True))
    with on_cpu("forward"):
        again = prepare_patch(case.image, case.label, shape_zyx=case.shape_zyx, window_hu=WINDOW)
    assert all(same_bits(a, b) for a, b in zip(plain, again, strict=True))


def test_samples_do_not_depend_on_their_batch_nor_on_threads() -> None:
    case = case_of(7, 5, (6, 33, 34))
    together = case.prepared()
    for b in range(5):
        alone = case.part(b).prepared()
        assert all(same_bits(one, many[b : b + 1]) for one, many in zip(alone, together, strict=True))
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert all(same_bits(a, b) for a, b in zip(case.prepared(), together, strict=True))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_every_rounding_to_a_half_is_torchs(on_cpu: KernelsOnCpu, dtype: torch.dtype) -> None:
    """Values down to the smallest subnormal numbers, and -0: 65,536 HU at scales from 1 to 2^-26."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(1, 16, 64, 64)
    scale = [*(2.0**-k for k in range(0, 27, 2)), 1 / 3, 3e-5, 1e-7, -1e-9]
    hu = every.expand(len(scale), -1, -1, -1).contiguous()

    def prepared(wanted: torch.dtype) -> torch.Tensor:
        parameters: dict[str, Any] = {"shape_zyx": (16, 64, 64), "window_hu": (-(2**15), 2**15 - 1), "scale": scale}
        shift = [-0.0] * len(scale)  # keeps the -0 that a negative scale makes of 0
        return prepare_patch(hu, hu.to(torch.uint8), **parameters, shift=shift, dtype=wanted)[0]

    expected = prepared(torch.float32).to(dtype)
    assert same_bits(prepared(dtype), expected)
    assert bool((torch.signbit(expected) & (expected == 0)).any())
    with on_cpu("forward"):
        assert same_bits(prepared(dtype), expected)


def test_unseen_parameters_reach_no_voxel_outside_their_read(on_cpu: KernelsOnCpu) -> None:
    """As on a GPU with parameters on the device, where nobody looks at them: origins far off, NaN as scale and shift."""
    nan = float("nan")
    case = case_of(8, 4, (2, 5, 6), margin=2)
    lengths = np.where(case.transpose_yx[:, None], (2, 6, 5), (2, 5, 6))
    far = np.array([[-9, -(2**62), 99], [2**62, 1, -1], [0, 99, 99], [-1, -1, -1]])
    moved = np.clip(far, 0, np.array(case.image.shape[1:]) - lengths)
    for dtype in DTYPES:
        tensors = case.on_device(torch.device("cpu")) | {"origin_zyx": torch.from_numpy(far)}
        image, label = torch.empty((4, 2, 5, 6), dtype=dtype), torch.empty((4, 2, 5, 6), dtype=torch.uint8)
        low, per_hu = np.float32(WINDOW[0]), np.float32(1.0 / (WINDOW[1] - WINDOW[0]))
        with on_cpu("forward"):
            _launch_kernel(case.image, case.label, low, per_hu, list(tensors.values()), image, label)
        wanted = replace(case, origin_zyx=moved).prepared(dtype)
        assert same_bits(image, wanted[0])
        assert same_bits(label, wanted[1])
        tensors["shift"] = torch.full((4,), nan)
        with on_cpu("forward"):
            _launch_kernel(case.image, case.label, low, per_hu, list(tensors.values()), image, label)
        assert bool(image.isnan().all())


def test_empty_batch_gives_nothing(on_cpu: KernelsOnCpu) -> None:
    image, label = torch.empty(0, 4, 5, 6, dtype=torch.int16), torch.empty(0, 4, 5, 6, dtype=torch.uint8)
    parameters: dict[str, Any] = {"shape_zyx": (2, 3, 4), "window_hu": WINDOW}
    empty = {"origin_zyx": np.empty((0, 3), np.int64), "transpose_yx": [], "flip_zyx": np.empty((0, 3)), "scale": []}
    for given_parameters in (parameters, parameters | empty):
        assert prepare_patch(image, label, **given_parameters)[0].shape == (0, 2, 3, 4)
        with on_cpu("forward"):
            assert prepare_patch(image, label, **given_parameters)[1].shape == (0, 2, 3, 4)


# ---- torch's rules ----


def test_operators_keep_torchs_rules() -> None:
    case = case_of(9, 2, (3, 4, 5))
    given_parameters = tuple(case.on_device(torch.device("cpu")).values())
    for parameters in (given_parameters, (None,) * 5):
        origin_or_shape = (list(case.shape_zyx), *WINDOW, *parameters)
        check_operator(
            torch.ops.ftengine.prepare_patch.default, (case.image, case.label, *origin_or_shape, torch.float16)
        )
        out = (torch.empty((2, *case.shape_zyx)), torch.empty((2, *case.shape_zyx), dtype=torch.uint8))
        check_operator(torch.ops.ftengine.prepare_patch_out.default, (case.image, case.label, *origin_or_shape, *out))


def test_compiled_in_one_graph_it_gives_the_same() -> None:
    case = case_of(10, 2, (3, 4, 5))
    tensors = case.on_device(torch.device("cpu"))

    def prepare(image: torch.Tensor, tensors: dict[str, Any]) -> torch.Tensor:
        patch = prepare_patch(image, case.label, shape_zyx=case.shape_zyx, window_hu=WINDOW, **tensors)
        return patch[0] * 2 + patch[1]

    assert same_bits(compiled(prepare)(case.image, tensors), prepare(case.image, tensors))
    out = (torch.empty((2, *case.shape_zyx)), torch.empty((2, *case.shape_zyx), dtype=torch.uint8))

    def into(image: torch.Tensor) -> torch.Tensor:
        prepare_patch(image, case.label, shape_zyx=case.shape_zyx, window_hu=WINDOW, **tensors, out=out)
        return out[0] * 1

    assert same_bits(compiled(into)(case.image), case.prepared()[0])
    assert same_bits(out[1], case.prepared()[1])


# ---- what is refused ----

HU = torch.zeros(2, 4, 6, 8, dtype=torch.int16)
U = torch.zeros(2, 4, 6, 8, dtype=torch.uint8)
MEMORY = torch.zeros(4096, dtype=torch.uint8)
OUT = (torch.empty(2, 3, 4, 5), torch.empty(2, 3, 4, 5, dtype=torch.uint8))
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("an image in [0, 1]", {"image": HU.float()}, r"prepare_patch: image is float32; want int16"),
    ("an image with a channel", {"image": HU[:, None]}, r"image has shape .*; want four axes, batch z y x"),
    ("an image out of order", {"image": HU.transpose(1, 3)}, r"Call image\.contiguous\(\)"),
    ("an image elsewhere", {"image": HU.to("meta")}, r"image is on meta; want cpu or cuda"),
    ("an array", {"image": HU.numpy()}, r"image is a ndarray; want a torch tensor"),
    ("a label of 64 bit", {"label": U.long()}, r"label is int64; want uint8"),
    ("a label of another shape", {"label": U[:1]}, r"label has shape .*; want \(2, 4, 6, 8\), that of image"),
    ("a patch of two axes", {"shape_zyx": (3, 4)}, r"shape_zyx=\(3, 4\); want three positive lengths"),
    ("a patch of nothing", {"shape_zyx": (3, 0, 5)}, r"shape_zyx=\(3, 0, 5\); want three positive lengths"),
    ("a patch too deep", {"shape_zyx": (5, 4, 5)}, r"shape_zyx=\(5, 4, 5\), and a read has \(4, 6, 8\) voxels"),
    ("a patch too wide", {"shape_zyx": (3, 8, 6)}, r"shape_zyx=\(3, 8, 6\), and a read has \(4, 6, 8\) voxels"),
    (
        "a patch too wide both ways",
        {"shape_zyx": (3, 7, 7), "transpose_yx": [True, False]},
        r"shape_zyx=\(3, 7, 7\), and a read has",
    ),
    (
        "a patch that fits only transposed",
        {"shape_zyx": (3, 8, 6), "transpose_yx": [True, False]},
        r"sample 1 is cropped from 0 to 8 on y of the read, which has 6 voxels there; want a crop inside it",
    ),
    (
        "a crop that begins outside",
        {"origin_zyx": [[0, 0, 0], [0, -1, 0]]},
        r"sample 1 is cropped from -1 to 3 on y of the read",
    ),
    (
        "a crop that ends outside",
        {"origin_zyx": [[0, 0, 4], [0, 0, 0]]},
        r"sample 0 is cropped from 4 to 9 on x of the read, which has 8",
    ),
    (
        "a transposed crop that ends outside",
        {"origin_zyx": [[0, 2, 0], [0, 2, 0]], "transpose_yx": torch.tensor([False, True])},
        r"sample 1 is cropped from 2 to 7 on y of the read, which has 6",
    ),
    ("an origin between voxels", {"origin_zyx": [[0.5, 0, 0]] * 2}, r"origin_zyx holds float64; want integers"),
    ("one origin for all", {"origin_zyx": [1, 2, 3]}, r"origin_zyx has shape \(3,\); want \(2, 3\), z y x of each sample"),
    ("a float tensor as origin", {"origin_zyx": torch.zeros(2, 3)}, r"origin_zyx is float32; want int64"),
    ("an origin elsewhere", {"origin_zyx": torch.zeros(2, 3).long().to("meta")}, r"is on meta; want the host or cpu"),
    ("quarter turns", {"transpose_yx": [1, 3]}, r"transpose_yx holds int64; want bool"),
    ("quarter turns in a tensor", {"transpose_yx": torch.tensor([1, 3])}, r"transpose_yx is int64; want bool"),
    ("one transpose for all", {"transpose_yx": True}, r"transpose_yx has shape \(\); want \(2,\), a value a sample"),
    ("flips of two axes", {"flip_zyx": [[True, False]] * 2}, r"flip_zyx has shape \(2, 2\); want \(2, 3\)"),
    ("a scale that is not finite", {"scale": [1.0, float("nan")]}, r"scale holds NaN or infinity; want finite numbers"),
    ("a shift past float32", {"shift": torch.tensor([1e39, 0.0], dtype=torch.float64)}, r"shift holds NaN or infinity \(in f"),
    ("a scale of bool", {"scale": torch.tensor([True, False])}, r"scale is bool; want float32"),
    ("a scale that learns", {"scale": torch.ones(2).requires_grad_()}, r"scale requires a gradient; the intensity is not"),
    ("a window upside down", {"window_hu": (250, -175)}, r"window_hu=\(250, -175\); want two finite HU, the lower one first"),
    ("a window of no width", {"window_hu": (40.0, 40.0)}, r"window_hu=\(40\.0, 40\.0\); want two finite HU"),
    ("a window without an end", {"window_hu": (0.0, float("inf"))}, r"want two finite HU"),
    ("a window of three", {"window_hu": (0, 40, 80)}, r"window_hu=\(0, 40, 80\); want two finite HU"),
    ("a dtype too wide", {"dtype": torch.float64}, r"dtype is torch\.float64; want float32 or float16 or bfloat16"),
    ("one out", {"out": OUT[0]}, r"out is a Tensor; want a tuple of two tensors, image and label"),
    ("out of another dtype", {"out": OUT, "dtype": torch.float16}, r"out\[0\] is float32; want float16"),
    ("out of another shape", {"out": (OUT[0], OUT[1][:1])}, r"out\[1\] has shape .*; want \(2, 3, 4, 5\)"),
    ("out that wants a gradient", {"out": (torch.empty(2, 3, 4, 5).requires_grad_(), OUT[1])}, r"out\[0\] requires a grad"),
    (
        "out on the label",
        {"label": MEMORY[:384].view(2, 4, 6, 8), "out": (OUT[0], MEMORY[:120].view(2, 3, 4, 5))},
        r"out shares memory with label",
    ),
    (
        "out on the image",
        {"image": MEMORY[:768].view(torch.int16).view(2, 4, 6, 8), "out": (MEMORY[:480].view(torch.float32).view(2, 3, 4, 5), OUT[1])},
        r"out shares memory with image",
    ),
    (
        "out on out",
        {"out": (MEMORY[:480].view(torch.float32).view(2, 3, 4, 5), MEMORY[:120].view(2, 3, 4, 5))},
        r"out shares memory with out\[0\]",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), [pytest.param(*row[1:], id=row[0]) for row in REFUSED])
def test_wrong_input_is_refused(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"image": HU, "label": U, "shape_zyx": (3, 4, 5), "window_hu": WINDOW}
    with pytest.raises(KernelInputError, match=message):
        prepare_patch(**(arguments | change))


# ---- on a GPU ----


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(3, 17, 70), (1, 1, 1), (4, 64, 64)])
def test_gpu_equals_reference_and_the_cpu_path(cuda: torch.device, shape: IntZYX) -> None:
    case = case_of(11, 5, shape, margin=7)
    on_gpu = case.to(cuda)
    assert_equals_reference(on_gpu)
    for dtype in DTYPES:
        by_cpu, by_gpu = case.prepared(dtype), on_gpu.prepared(dtype)
        by_tensors = prepare_patch(on_gpu.image, on_gpu.label, **(case.parameters | case.on_device(cuda)), dtype=dtype)
        for a, b, c in zip(by_cpu, by_gpu, by_tensors, strict=True):
            assert same_bits(a, b)
            assert same_bits(a, c)


@pytest.mark.gpu
def test_gpu_equals_dali_on_the_cpu(cuda: torch.device, pipeline: DaliGraph) -> None:
    case = case_of(12, BATCH, (5, 40, 40))
    for a, b in zip(case.to(cuda).prepared(), by_dali(pipeline, case), strict=True):
        assert same_bits(a, b)


@pytest.mark.gpu
def test_gpu_refuses_a_crop_that_fits_one_way_only(cuda: torch.device) -> None:
    turned = torch.tensor([True, False], device=cuda)
    with pytest.raises(KernelInputError, match="and with y and x exchanged, as transpose_yx is on the device"):
        prepare_patch(HU.to(cuda), U.to(cuda), shape_zyx=(3, 8, 6), window_hu=WINDOW, transpose_yx=turned)
    scale = torch.ones(2, dtype=torch.float64, device=cuda)
    with pytest.raises(KernelInputError, match="scale is float64; want float32"):
        prepare_patch(HU.to(cuda), U.to(cuda), shape_zyx=(3, 4, 5), window_hu=WINDOW, scale=scale)


@pytest.mark.gpu
def test_gpu_works_on_the_current_stream_without_a_sync(cuda: torch.device) -> None:
    case = case_of(13, 3, (8, 40, 41)).to(cuda)

    def image_of(late: torch.Tensor) -> torch.Tensor:
        return prepare_patch(late, case.label, **case.parameters)[0]

    expected = image_of(case.image)
    assert same_bits(run_behind_a_late_copy(case.image, image_of), expected)


@pytest.mark.gpu
def test_gpu_is_captured_in_a_graph(cuda: torch.device) -> None:
    case = case_of(14, 3, (4, 33, 34)).to(cuda)
    image, tensors = torch.zeros_like(case.image), case.on_device(cuda)
    parameters = case.parameters | tensors
    out = prepare_patch(image, case.label, **parameters)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        prepare_patch(image, case.label, **parameters, out=out)
    image.copy_(case.image)
    tensors["shift"].add_(0.125)
    graph.replay()
    wanted = replace(case, shift=(case.shift.astype(np.float32) + np.float32(0.125)).astype(np.float64)).prepared()
    assert all(same_bits(a, b) for a, b in zip(out, wanted, strict=True))


@pytest.mark.gpu
def test_gpu_reaches_past_2_to_31_voxels(cuda: torch.device) -> None:
    """The very last voxel of the read is the very last of the patch, in both orientations."""
    batch, z, y, x = past_2_to_31_voxels(cuda, 2 + 1 + 2 + 1)
    image = torch.zeros((batch, z, y, x), dtype=torch.int16, device=cuda)
    label = torch.zeros((batch, z, y, x), dtype=torch.uint8, device=cuda)
    image[-1, -1, -1, -1], label[-1, -1, -1, -1] = 2, 9
    for transposed, shape in ((False, (z, y, x)), (True, (z, x, y))):
        patch, classes = prepare_patch(
            image, label, shape_zyx=shape, window_hu=(0, 4), transpose_yx=[transposed] * batch, dtype=torch.float16
        )
        assert (float(patch[-1, -1, -1, -1]), int(classes[-1, -1, -1, -1])) == (0.5, 9)
        patch[-1, -1, -1, -1] = 0
        assert not any(bool(part.any()) for part in patch)
        del patch, classes
