"""``RandTumorSynthesisd`` paints what the engine paints, in whatever form and orientation a MONAI pipeline holds its samples."""

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.data.dataloader import DataLoader
from monai.data.dataset import Dataset
from monai.data.meta_tensor import MetaTensor
from monai.transforms.compose import Compose
from monai.transforms.intensity.dictionary import ScaleIntensityRanged
from monai.transforms.spatial.dictionary import Flipd, Orientationd, RandFlipd
from torch import nn

from ftengine.adapters.monai_transform import RandTumorSynthesisd
from ftengine.assemble import build_judge
from ftengine.errors import ConfigError
from ftengine.geometry import FloatZYX
from ftengine.synthesis.engine import Address, Synthesizer
from ftengine.training.checkpoint import load_generator, load_segmenter
from tests.support import organ_volume, small_config

CONFIG = small_config(device="cpu")
LOW, HIGH = CONFIG.region.window_hu
SPACING_MM = 3.0

Sample = dict[str, Any]


def _arrays(*, tumor: bool = False, edge: int = 16, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """HU float32 and label uint8, [1, x, y, z], RAS+; two voxels lie far outside the window."""
    image, label = organ_volume((edge, edge, edge), tumor=tumor, seed=seed)
    image[0, 0, 0], image[0, 0, 1] = -1024, 2000
    return image.transpose(2, 1, 0)[None].astype(np.float32), label.transpose(2, 1, 0)[None].copy()


def _meta(array: np.ndarray, spacing_mm: float = SPACING_MM) -> MetaTensor:
    affine = torch.diag(torch.tensor([spacing_mm, spacing_mm, spacing_mm, 1.0], dtype=torch.float64))
    return MetaTensor(torch.from_numpy(np.ascontiguousarray(array)), affine=affine, meta={"filename_or_obj": "case_7"})


def _sample(**options: Any) -> Sample:
    image, label = _arrays(**options)
    return {"image": _meta(image), "label": _meta(label)}


def _transform(**options: Any) -> RandTumorSynthesisd:
    given: dict[str, Any] = {"config": CONFIG, "mask_key": "mask"} | options
    return RandTumorSynthesisd(**given).set_random_state(3)


def _address(seed: int = 3) -> Address:
    """What the transform draws first from ``set_random_state(seed)``."""
    state = np.random.RandomState(seed)
    state.rand()
    epoch, index = state.randint(0, 2**63 - 1, size=2, dtype=np.int64).tolist()
    return Address(epoch, index)


def _zyx(array: Any) -> np.ndarray:
    return np.asarray(array)[0].transpose(2, 1, 0)


def _numbers(array: Any) -> np.ndarray:
    return np.asarray(array.cpu() if isinstance(array, torch.Tensor) else array)


@pytest.mark.parametrize("with_networks", [False, True])
@pytest.mark.parametrize("spacing_zyx", [(3.0, 3.0, 3.0), (3.0, 3.0, 2.9)])
def test_it_paints_what_the_engine_paints(
    painters: tuple[Path, Path], with_networks: bool, spacing_zyx: FloatZYX
) -> None:
    hu, label = _arrays()
    unit = ((hu - LOW) / (HIGH - LOW)).clip(0, 1).astype(np.float32)
    config = CONFIG.with_overrides({"qc.threshold": None})
    generator = load_generator(painters[0])[0].requires_grad_(False) if with_networks else None
    judge = build_judge(config, load_segmenter(painters[1])[0].requires_grad_(False)) if with_networks else None
    engine = Synthesizer(
        config.region,
        config.synthesis,
        seed=config.seed,
        generator=generator,
        judge=judge,
        retries=config.qc.retries,
        spacing_mm_zyx=spacing_zyx,
    )
    unit_batch, label_batch = (torch.from_numpy(_zyx(a).copy())[None, None] for a in (unit, label))
    expected = engine.paint(unit_batch, label_batch, [_address()])
    transform = _transform(
        config=config,
        input="unit",
        pixdim=spacing_zyx[::-1],
        generator=painters[0] if with_networks else None,
        judge=painters[1] if with_networks else None,
    )
    got = transform({"image": unit, "label": label})
    assert got["synthesis"]["passed"]
    assert np.array_equal(_zyx(got["image"]), expected.image[0, 0].numpy())
    assert np.array_equal(_zyx(got["label"]), expected.label[0, 0].numpy())
    assert np.array_equal(_zyx(got["mask"]), expected.mask[0, 0].numpy())
    assert np.isnan(got["synthesis"]["proportion"]) != with_networks


def test_hu_change_by_what_was_painted_and_keep_all_else() -> None:
    hu, label = _arrays()
    hu[0, 1, 0, 0] = -0.0
    unit = ((hu - LOW) / (HIGH - LOW)).clip(0, 1).astype(np.float32)
    painted = _transform(pixdim=(3, 3, 3))({"image": hu, "label": label})
    as_unit = _transform(pixdim=(3, 3, 3), input="unit")({"image": unit, "label": label})
    change = (as_unit["image"] - unit).astype(np.float64) * (HIGH - LOW)
    # float32 HU below 2048: rounded to 2**-14 at most
    assert np.abs(painted["image"] - hu - change).max() < 2**-12
    outside = label != 1
    assert painted["image"][outside].tobytes() == hu[outside].tobytes()
    assert (painted["image"] != hu).sum() > 20
    rounded = _transform(pixdim=(3, 3, 3))({"image": hu.astype(np.int16), "label": label})
    assert np.abs(rounded["image"] - painted["image"]).max() <= 0.5 + 2**-12


@pytest.mark.parametrize("image_dtype", ["float32", "float64", "float16", "int16", "int32"])
@pytest.mark.parametrize("label_dtype", ["uint8", "int64", "float32", "uint16"])
@pytest.mark.parametrize("kind", ["numpy", "torch", "meta"])
def test_type_dtype_and_meta_data_are_kept(kind: str, image_dtype: str, label_dtype: str) -> None:
    image, label = _arrays()
    image, label = image.astype(image_dtype), label.astype(label_dtype)
    if kind == "numpy":
        given: Sample = {"image": image, "label": label}
    elif kind == "torch":
        given = {"image": torch.from_numpy(image), "label": torch.from_numpy(label)}
    else:
        given = {"image": _meta(image), "label": _meta(label)}
        given["image"].applied_operations = [{"class": "Something"}]
    before = copy.deepcopy(given)
    got = _transform(pixdim=(3, 3, 3))(given)
    for key in ("image", "label"):
        assert type(got[key]) is type(given[key])
        assert got[key].dtype == given[key].dtype
        assert got[key].shape == given[key].shape
        assert np.array_equal(_numbers(given[key]), _numbers(before[key]))  # not painted in place
        assert not np.array_equal(_numbers(got[key]), _numbers(given[key]))
    assert type(got["mask"]) is type(given["label"])
    assert got["mask"].dtype == given["label"].dtype
    assert np.array_equal(_numbers(got["mask"]) == 1, _numbers(got["label"]) == 2)
    if kind == "meta":
        assert torch.equal(got["image"].affine, given["image"].affine)
        assert got["image"].meta["filename_or_obj"] == "case_7"
        assert got["image"].applied_operations == [{"class": "Something"}]


@pytest.mark.parametrize("codes", ["LPS", "SAR", "ARS", "IPL"])
def test_the_order_and_direction_of_the_axes_change_nothing(codes: str) -> None:
    given = _sample()
    expected = _transform()(given)
    turn: Any = Orientationd(("image", "label"), axcodes=codes, labels=None)
    turn_back: Any = Orientationd(("image", "label", "mask"), axcodes="RAS", labels=None)
    turned = _transform()(turn(given))
    back = turn_back(turned)
    for key in ("image", "label", "mask"):
        assert torch.equal(back[key].as_tensor(), expected[key].as_tensor())
    # the same without meta data: codes and pixdim say it
    bare = turn(given)
    got = _transform(pixdim=(3, 3, 3), axcodes=codes)({k: np.asarray(bare[k]) for k in ("image", "label")})
    assert np.array_equal(got["image"], np.asarray(turned["image"]))


def test_earlier_transforms_stay_invertible() -> None:
    given = _sample()
    pipeline: Any = Compose([Flipd(("image", "label"), spatial_axis=0), _transform()])
    painted = pipeline(given)
    undone = pipeline.inverse({k: painted[k] for k in ("image", "label")})
    assert torch.equal(undone["label"].as_tensor(), painted["label"].as_tensor().flip(1))
    assert torch.equal(undone["label"].affine, given["label"].affine)


def test_a_seed_reproduces_and_another_does_not() -> None:
    given = _sample()
    pipeline: Any = Compose([RandFlipd(("image", "label"), prob=0.5), RandTumorSynthesisd(config=CONFIG)])
    runs = []
    for seed in (5, 5, 6):
        pipeline.set_random_state(seed)
        runs.append([pipeline(given)["image"].as_tensor() for _ in range(3)])
    assert all(torch.equal(a, b) for a, b in zip(runs[0], runs[1], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(runs[0], runs[2], strict=True))
    assert not torch.equal(runs[0][0], runs[0][1])


def test_what_a_sample_holds_does_not_move_the_stream() -> None:
    a, b = _transform(), _transform()
    a(_sample(tumor=True))
    b(_sample())
    given = _sample(seed=4)
    assert torch.equal(a(given)["image"].as_tensor(), b(given)["image"].as_tensor())


def test_prob_is_the_share_that_is_painted() -> None:
    given = _sample()
    half = _transform(prob=0.5)
    painted = [half(given)["synthesis"]["painted"] for _ in range(40)]
    assert 8 < sum(painted) < 32  # 4 standard deviations
    assert not any(_transform(prob=0.0)(given)["synthesis"]["painted"] for _ in range(3))


@pytest.mark.parametrize("why", ["tumour", "no organ", "too little organ", "prob 0"])
def test_ineligible_samples_pass_unchanged(why: str) -> None:
    given = _sample(tumor=why == "tumour")
    if why == "no organ":
        given["label"] = given["label"] * 0
    if why == "too little organ":
        given["label"][:, 5:] = 0
        given["label"][:, :, 5:] = 0  # 8 voxels of 64 are left
    got = _transform(prob=0.0 if why == "prob 0" else 1.0)(given)
    assert got["image"] is given["image"]
    assert got["label"] is given["label"]
    assert got["mask"].sum() == 0
    assert got["synthesis"]["painted"] is got["synthesis"]["passed"] is False
    assert got["synthesis"]["organ"] == ""
    assert np.isnan(got["synthesis"]["proportion"])


def test_a_tumour_that_the_judge_does_not_see_is_thrown_away(painters: tuple[Path, Path]) -> None:
    given = _sample()
    config = CONFIG.with_overrides({"qc.threshold": 1.0, "qc.retries": 2})
    got = _transform(config=config, judge=painters[1])(given)
    verdict = got["synthesis"]
    assert (verdict["painted"], verdict["passed"], verdict["organ"]) == (True, False, "liver")
    assert 0 <= verdict["proportion"] < 1
    assert got["image"] is given["image"]
    assert got["label"] is given["label"]
    assert got["mask"].sum() > 0


def test_networks_given_as_modules_are_copied_and_equal_their_files(painters: tuple[Path, Path]) -> None:
    given = _sample()
    config = CONFIG.with_overrides({"qc.threshold": None})
    generator, segmenter = load_generator(painters[0])[0].train(), load_segmenter(painters[1])[0].train()
    from_modules = _transform(config=config, generator=generator, judge=segmenter)(given)
    from_files = _transform(config=config, generator=painters[0], judge=painters[1])(given)
    assert torch.equal(from_modules["image"].as_tensor(), from_files["image"].as_tensor())
    assert from_modules["synthesis"] == from_files["synthesis"]
    for network in (generator, segmenter):
        assert network.training
        assert all(p.requires_grad for p in network.parameters())


def test_a_large_sample_is_painted_in_one_patch() -> None:
    given = _sample(edge=48)
    got = _transform()(given)
    changed = (got["image"] != given["image"]).as_tensor()[0].nonzero()
    assert got["synthesis"]["passed"]
    assert (changed.amax(0) - changed.amin(0)).max() < 16
    assert torch.equal(got["mask"].as_tensor() == 1, got["label"].as_tensor() == 2)
    assert got["mask"].sum() > 0
    places = {tuple(_transform().set_random_state(s)(given)["mask"][0].nonzero()[0].tolist()) for s in range(4)}
    assert len(places) == 4
    assert not _transform()(_sample(edge=48, tumor=True))["synthesis"]["painted"]


def test_labels_may_have_values_of_their_own() -> None:
    given = _sample()
    expected = _transform()(given)
    other: MetaTensor = given["label"].masked_fill(given["label"] == 1, 40)
    other[0, 0, 0, :] = 7  # a class that we know nothing about
    got = _transform(organs={"liver": (40, 41)})(given | {"label": other})
    assert torch.equal(got["image"].as_tensor(), expected["image"].as_tensor())
    assert torch.equal(got["label"].as_tensor() == 41, expected["label"].as_tensor() == 2)
    kept = got["label"] != 41
    assert torch.equal(got["label"].as_tensor()[kept], other.as_tensor()[kept])
    other[0, 1, 1, 1] = 41
    assert not _transform(organs={"liver": (40, 41)})(given | {"label": other})["synthesis"]["painted"]


def test_only_named_organs_are_painted_but_every_tumour_forbids() -> None:
    image, label = _arrays()
    config = small_config(
        region__labels={"background": 0, "liver": 1, "liver_tumor": 2, "kidney": 3, "kidney_tumor": 4},
        region__organs={"liver": {"organ": 1, "tumor": 2}, "kidney": {"organ": 3, "tumor": 4}},
    )
    label[:, :8] *= 3
    painted = {
        _transform(config=config, organs=organs, pixdim=(3, 3, 3)).set_random_state(s)(
            {"image": image, "label": label}
        )["synthesis"]["organ"]
        for organs in ("kidney", ["kidney"])
        for s in range(4)
    }
    assert painted == {"kidney"}
    label[0, 15, 15, 15] = 2
    assert not _transform(config=config, organs="kidney", pixdim=(3, 3, 3))({"image": image, "label": label})[
        "synthesis"
    ]["painted"]


def test_organs_may_share_a_tumour_value() -> None:
    image, label = _arrays(tumor=True)
    config = small_config(
        region__labels={"background": 0, "liver": 1, "tumor": 2, "kidney": 3},
        region__organs={"liver": {"organ": 1, "tumor": 2}, "kidney": {"organ": 3, "tumor": 2}},
    )
    transform = _transform(config=config, pixdim=(3, 3, 3))
    assert not transform({"image": image, "label": label})["synthesis"]["painted"]
    image, label = _arrays()
    assert transform({"image": image, "label": label * 3})["synthesis"]["organ"] == "kidney"


def test_a_preset_is_named(painters: tuple[Path, Path]) -> None:
    got = RandTumorSynthesisd(config="demo").set_random_state(0)(_sample(edge=32))
    assert got["synthesis"]["passed"]
    assert "mask" not in got
    assert RandTumorSynthesisd().config.region.name == "abdomen"


@pytest.mark.parametrize("context", ["spawn", "fork"])
def test_workers_of_monais_loader_paint(painters: tuple[Path, Path], context: str) -> None:
    config = CONFIG.with_overrides({"qc.threshold": None})
    transform = RandTumorSynthesisd(config=config, generator=painters[0], judge=painters[1])
    samples = [{key: value.clone() for key, value in _sample(seed=s).items()} for s in range(4)]
    transform(samples[0])  # this process has painted before
    loader = DataLoader(
        Dataset(samples, Compose([transform])), batch_size=2, num_workers=2, multiprocessing_context=context
    )
    runs = []
    for _ in range(2):
        torch.manual_seed(11)  # from which MONAI seeds the transforms of its workers
        runs.append(list(loader))
    for a, b in zip(*runs, strict=True):
        assert a["image"].shape == (2, 1, 16, 16, 16)
        assert a["synthesis"]["painted"].all()
        assert torch.equal(a["image"].as_tensor(), b["image"].as_tensor())
        assert (a["synthesis"]["proportion"] >= 0).all()


def test_a_pickle_goes_on_as_its_original() -> None:
    transform, given = _transform(), _sample()
    transform(given)
    for other in (pickle.loads(pickle.dumps(transform)), copy.deepcopy(transform)):  # noqa: S301 - our own
        other.R.set_state(transform.R.get_state())
        assert torch.equal(other(given)["image"].as_tensor(), _next(transform, given))


def _next(transform: RandTumorSynthesisd, given: Sample) -> torch.Tensor:
    """The next image, with the state of the stream put back."""
    state = transform.R.get_state()
    image: torch.Tensor = transform(given)["image"].as_tensor()
    transform.R.set_state(state)
    return image


def test_missing_keys() -> None:
    given = {"image": _sample()["image"]}
    with pytest.raises(KeyError, match="no 'label'; it has"):
        _transform()(given)
    assert _transform(allow_missing_keys=True)(given) == given


class _Nothing(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"organs": "spleen"}, "want at least one of liver"),
        ({"organs": {"spleen": (1, 2)}}, "want at least one of liver"),
        ({"organs": []}, "want at least one of liver"),
        ({"organs": {"liver": (1, 1)}}, "each value for one organ"),
        ({"organs": {"liver": (0, 2)}}, "each 1 to 255"),
        ({"organs": {"liver": 1}}, "each 1 to 255"),
        ({"keys": "image"}, "want two"),
        ({"input": "HU"}, "want 'hu' or 'unit'"),
        ({"pixdim": (0, 1, 1)}, "pixdim="),
        ({"pixdim": (1, 1)}, "want three numbers"),
        ({"axcodes": "RAX"}, "want three letters"),
        ({"config": "knee"}, "preset 'knee' does not exist"),
    ],
)
def test_arguments_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _transform(**options)


def _broken(**changes: Any) -> Sample:
    return _sample() | changes


@pytest.mark.parametrize(
    ("sample", "options", "message"),
    [
        (_broken(image="case.nii.gz"), {}, "is a str; want a numpy array"),
        (_broken(image=torch.zeros(2, 16, 16, 16)), {}, r"\(2, 16, 16, 16\); want one channel"),
        (_broken(label=torch.zeros(16, 16, 16)), {}, "EnsureChannelFirstd"),
        (_broken(label=torch.zeros(1, 16, 16, 15)), {}, "want the same grid"),
        (_broken(label=_meta(_arrays()[1], 2.0)), {}, "voxels apart"),
        ({k: v.as_tensor() for k, v in _sample().items()}, {}, "Give pixdim"),
        ({k: MetaTensor(v.as_tensor()) for k, v in _sample().items()}, {}, "Give pixdim"),
        ({k: _meta(np.asarray(v), 30.0) for k, v in _sample().items()}, {}, "of 0.1 to 20.0 mm"),
        (_broken(image=_sample()["image"].to(torch.uint8)), {}, "want signed HU"),
        (_broken(image=_sample()["image"].to(torch.int16)), {"input": "unit"}, "want floats"),
        (_broken(label=_sample()["label"] > 0), {}, "which can hold an organ and its tumour"),
        (_broken(label=_sample()["label"] * 0.5), {}, "holds fractions"),
        (_broken(image=_sample()["image"].clamp(0, 1)), {}, "give input='unit'"),
        (_broken(image=_sample()["image"] * float("nan")), {}, "want HU"),
        (_sample(), {"input": "unit"}, r"ScaleIntensityRanged\(keys, -175, 250, 0, 1, clip=True\)"),
        (
            {k: _meta(np.asarray(v), 2.0) for k, v in _sample().items()},
            {"judge": _Nothing()},
            r"Spacingd\(keys, pixdim=\(3.0, 3.0, 3.0\)",
        ),
    ],
)
def test_samples_that_do_not_fit_are_refused(sample: Sample, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _transform(**options)(sample)


def test_checkpoints_of_another_region_are_refused(painters: tuple[Path, Path]) -> None:
    config = CONFIG.with_overrides({"region.window_hu": (-100, 200)})
    with pytest.raises(ConfigError, match="was trained with region"):
        _transform(config=config, generator=painters[0])(_sample())


def test_scaled_by_monai() -> None:
    scale = ScaleIntensityRanged("image", LOW, HIGH, 0, 1, clip=True)
    pipeline: Any = Compose([scale, _transform(input="unit")])
    got = pipeline(_sample())
    assert got["synthesis"]["passed"]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["on the GPU", "numpy, painted on the GPU"])
def test_on_the_gpu(cuda: torch.device, painters: tuple[Path, Path], kind: str) -> None:
    """Within float32's rounding of the CPU: the networks sum in another order; everything else is bit-identical outside the organ."""
    config = CONFIG.with_overrides({"qc.threshold": None, "synthesis.precision": "fp32"})
    given = _sample()
    expected = _transform(config=config, generator=painters[0], judge=painters[1])(given)
    if kind == "on the GPU":
        given = {key: value.to(cuda) for key, value in given.items()}
        got = _transform(config=config, generator=painters[0], judge=painters[1])(given)
        assert {got[key].device.type for key in ("image", "label", "mask")} == {"cuda"}
        assert type(got["image"]) is MetaTensor
    else:
        given = {key: np.asarray(value) for key, value in given.items()}
        got = _transform(config=config, generator=painters[0], judge=painters[1], pixdim=(3, 3, 3), device="cuda")(
            given
        )
        assert type(got["image"]) is np.ndarray
    assert np.array_equal(_numbers(got["mask"]), _numbers(expected["mask"]))
    assert np.array_equal(_numbers(got["label"]), _numbers(expected["label"]))
    # TF32 convolutions: 2**-11 of tanh(G) times the texture, over 425 HU
    assert np.abs(_numbers(got["image"]) - _numbers(expected["image"])).max() < 1.0
    outside = _numbers(given["label"]) != 1
    assert np.array_equal(_numbers(got["image"])[outside], _numbers(given["image"])[outside])
