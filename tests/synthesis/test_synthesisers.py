"""Every synthesiser: M inside the organ, nothing else touched, a function of the address; and the formulas of each in float64."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import scipy.ndimage as ndi
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ftengine.assemble import build_judge, synthesize
from ftengine.bench.experiments.few_labels import arms as few_labels
from ftengine.bench.experiments.few_labels.protocol import load_protocol
from ftengine.config import DIVERSE, MANY_TUMORS, Config
from ftengine.errors import ConfigError
from ftengine.synthesis import paste
from ftengine.synthesis.bank import BankTumor, PastedTumor, TumorBank, turns_between
from ftengine.synthesis.engine import Address, Synthesizer
from ftengine.synthesis.paste import _paste_on_cpu, _paste_on_gpu, paste_tumors
from ftengine.synthesis.shape import draw_patch
from ftengine.training.networks import build_segmenter
from tests.kernels.support import KernelsOnCpu
from tests.support import host_syncs_forbidden
from tests.synthesis.test_painting import _reads as reads

SHAPE = (32, 36, 40)
BASE = Config.preset("abdomen").with_overrides(
    {
        "region.patch_zyx": SHAPE,
        "augment.rot90_probability": 0.0,
        "synthesis.size_weights": {"tiny": 0.7, "small": 0.3},
        "network.name": "unet",
        "network.channels": (4, 8, 8),
    }
)
SOFT = {"synthesis.edge_sigma_mm": 1.2}
ARMS: Mapping[str, Mapping[str, Any]] = {
    "constant": {"synthesis.synthesizer": "constant"},
    "copy-paste": {"synthesis.synthesizer": "copy-paste"},
    "copy-paste, contrast": {"synthesis.synthesizer": "copy-paste", "synthesis.paste": "contrast", **SOFT},
    "copy-paste, two": {"synthesis.synthesizer": "copy-paste", "synthesis.num_tumors": 2, **SOFT},
    "syntumor": {"synthesis.synthesizer": "syntumor"},
    "syntumor, many": {"synthesis.synthesizer": "syntumor", "synthesis.syntumor_tumors": "many"},
    "diverse": {"synthesis.synthesizer": "constant", **DIVERSE},
    "diverse, all on": {
        "synthesis.synthesizer": "constant",
        **DIVERSE,
        "synthesis.rim_fraction": 1.0,
        "synthesis.hyperdense_fraction": 1.0,
    },
}
ADDRESSES = [Address(1, i) for i in range(4)]
WIDTH_HU = 425.0


def _bank() -> TumorBank:
    """Two tumours of the liver and one of the kidney, without any symmetry."""
    rng = np.random.default_rng(8)
    tumors: dict[str, list[BankTumor]] = {"liver": [], "kidney": []}
    for organ, shape in (("liver", (9, 7, 12)), ("liver", (5, 6, 4)), ("kidney", (6, 9, 8))):
        mask = np.zeros(shape, dtype=np.uint8)
        mask[1:-1, 1:-1, 1:-1] = rng.random([n - 2 for n in shape]) < 0.7
        mask[1, 1, 1] = mask[-2, -2, -2] = 1
        image = rng.integers(-40, 90, shape).astype(np.int16)
        tumors[organ].append(BankTumor("case", image, mask, surround_hu=80.0))
    return TumorBank({organ: tuple(found) for organ, found in tumors.items()}, (1.5, 1.5, 1.5))


BANK = _bank()


def _config(arm: str) -> Config:
    return BASE.with_overrides(dict(ARMS[arm]))


def _synthesizer(config: Config, **options: Any) -> Synthesizer:
    bank = BANK if config.synthesis.synthesizer == "copy-paste" else None
    return Synthesizer(config.region, config.synthesis, seed=3, bank=bank, **options)


def _batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A liver, a thin pancreas, a kidney, a liver with a real tumour."""
    rng = np.random.default_rng(seed)
    image = torch.from_numpy(rng.uniform(0.4, 0.8, (4, 1, *SHAPE)).astype(np.float32))
    label = torch.zeros((4, 1, *SHAPE), dtype=torch.uint8)
    label[0, 0, 4:28, 4:32, 4:36] = 1
    label[1, 0, 6:26, 18:21, 18:22] = 3
    label[2, 0, 8:24, 8:30, 8:30] = 5
    label[3, 0, 4:28, 4:32, 4:36] = 1
    label[3, 0, 20:25, 20:25, 20:25] = 2
    return image, label


@pytest.mark.parametrize("arm", ARMS)
def test_only_the_organ_changes_and_the_label_follows(arm: str) -> None:
    image, label = _batch()
    before = image.clone(), label.clone()
    out = _synthesizer(_config(arm)).paint(image, label, ADDRESSES)
    assert torch.equal(image, before[0])
    assert torch.equal(label, before[1])
    pastes = "copy-paste" in arm
    assert [p is not None for p in out.records()] == [True, not pastes, True, False]  # the bank has no pancreas
    has_edge = _config(arm).synthesis.edge_sigma_mm > 0 or "syntumor" in arm
    for row, (organ, tumor) in enumerate([(1, 2), (3, 4), (5, 6), (1, 2)]):
        inside = out.mask[row] > 0
        assert (label[row][inside] == organ).all()
        assert (out.label[row][inside] == tumor).all()
        assert torch.equal(out.label[row][~inside], label[row][~inside])
        may_change = label[row] == organ if has_edge else inside
        assert torch.equal(out.image[row][~may_change], image[row][~may_change])
        assert torch.isfinite(out.image[row]).all()
        record = out.records()[row]
        if record is not None:
            assert record.num_voxels == int(inside.sum()) > 0
            assert (out.image[row][inside] != image[row][inside]).float().mean() > 0.9
            assert all(out.mask[row, 0].shape[a] > c[a] >= 0 for c in record.center_zyx for a in range(3))


@pytest.mark.parametrize("arm", ARMS)
def test_a_batch_paints_what_its_members_paint_bit_by_bit(arm: str) -> None:
    image, label = _batch()
    whole = _synthesizer(_config(arm)).paint(image, label, ADDRESSES)
    for row in range(4):
        part = slice(row, row + 1)
        alone = _synthesizer(_config(arm)).paint(image[part], label[part], ADDRESSES[part])
        assert torch.equal(alone.image[0], whole.image[row])
        assert torch.equal(alone.label[0], whole.label[row])
        assert repr(alone.records()) == repr(whole.records()[part])  # P is NaN, which differs from itself


@settings(max_examples=25, deadline=None)
@given(
    arm=st.sampled_from(sorted(ARMS)),
    index=st.integers(0, 2**40),
    low=st.tuples(*(st.integers(0, n - 6) for n in SHAPE)),
    size=st.tuples(*(st.integers(5, n) for n in SHAPE)),
)
def test_any_organ_and_address_keep_the_invariants(
    arm: str, index: int, low: tuple[int, int, int], size: tuple[int, int, int]
) -> None:
    image, _ = _batch()
    label = torch.zeros((1, 1, *SHAPE), dtype=torch.uint8)
    z, y, x = (slice(a, a + n) for a, n in zip(low, size, strict=True))
    label[0, 0, z, y, x] = 1
    out = _synthesizer(_config(arm)).paint(image[:1], label, [Address(0, index)])
    again = _synthesizer(_config(arm)).paint(image[:1], label, [Address(0, index)])
    assert torch.equal(out.image, again.image)
    assert (label[out.mask > 0] == 1).all()
    assert torch.equal(out.image[label == 0], image[:1][label == 0])
    assert torch.equal(out.label == 2, out.mask > 0)
    assert torch.isfinite(out.image).all()


@pytest.mark.parametrize("arm", ["copy-paste", "syntumor", "diverse"])
def test_judges_boxes_and_redraws_work_for_every_synthesiser(arm: str) -> None:
    config = _config(arm).with_overrides(
        {"synthesis.box": "auto", "synthesis.box_least_vox": 32, "synthesis.box_context_mm": 1.5, "qc.threshold": 1.0}
    )
    image, label = _batch()
    segmenter = build_segmenter(config).eval()
    out = _synthesizer(config, judge=build_judge(config, segmenter), retries=2).paint(image, label, ADDRESSES)
    records = [r for r in out.records() if r is not None]
    assert records
    for record in records:
        assert record.passed or record.num_draws == 3
        assert 0 <= record.proportion <= 1
    failed = [row for row, r in enumerate(out.records()) if r is not None and not r.passed]
    for row in failed:
        assert torch.equal(out.image[row], image[row])
        assert torch.equal(out.label[row], label[row])


# copy-paste


def _expected_paste(
    synthesizer: Synthesizer, image: torch.Tensor, label: torch.Tensor, row: int, *, relative: bool, sigma: float
) -> NDArray[np.float64]:
    """Written voxel by voxel in float64 from the draw and the centre."""
    drawn = synthesizer.draw(label, ADDRESSES)
    placement = synthesizer.place(label, drawn)
    place = placement.rows.index(row)
    x = image[row, 0].double().numpy()
    organ = placement.organ[place].numpy() > 0
    mask, pasted = np.zeros(SHAPE), np.zeros(SHAPE)
    for tumor, center in zip(drawn[row].tumors, placement.centers[place].tolist(), strict=True):
        assert tumor.pasted is not None
        middle = tumor.pasted.middle
        for at in np.ndindex(tumor.pasted.mask.shape):
            voxel = tuple(c + a - m for c, a, m in zip(center, at, middle, strict=True))
            if not all(0 <= v < n for v, n in zip(voxel, SHAPE, strict=True)):
                continue
            unit = min(max((float(tumor.pasted.image_hu[at]) + 175.0) / WIDTH_HU, 0.0), 1.0)
            if relative:
                unit -= (80.0 + 175.0) / WIDTH_HU
            if tumor.pasted.mask[at] or not mask[voxel]:
                pasted[voxel] = unit
            mask[voxel] = max(mask[voxel], tumor.pasted.mask[at])
    mask *= organ
    np.testing.assert_array_equal(mask, placement.mask[place].numpy())
    if relative:
        pasted = pasted + x[mask > 0].mean()
    soft = ndi.gaussian_filter(mask, sigma, mode="reflect") if sigma else mask
    return np.where(organ, x + soft * (pasted - x), x)


@pytest.mark.parametrize("arm", ["copy-paste", "copy-paste, contrast", "copy-paste, two"])
def test_copy_paste_equals_its_formula(arm: str) -> None:
    config = _config(arm)
    image, label = _batch()
    synthesizer = _synthesizer(config)
    out = synthesizer.paint(image, label, ADDRESSES)
    for row in (0, 2):
        expected = _expected_paste(
            synthesizer,
            image,
            label,
            row,
            relative=config.synthesis.paste == "contrast",
            sigma=config.synthesis.edge_sigma_mm / 1.5,
        )
        painted = out.image[row, 0].numpy()
        # where a soft edge reaches further than the crop the HU below is not the tumour's: the margin of a real bank is that reach
        near = out.mask[row, 0].numpy() > 0
        np.testing.assert_allclose(painted[near], expected[near], rtol=0, atol=3e-6)
        np.testing.assert_allclose(painted, expected, rtol=0, atol=3e-6)


def test_pasting_on_the_device_equals_pasting_by_slices() -> None:
    """The GPU's way runs on CPU tensors too."""
    rng = np.random.default_rng(1)
    orders = turns_between((1.5, 1.5, 1.5))
    for _ in range(20):
        tumors = [
            [
                PastedTumor(
                    BANK.tumors["liver"][int(rng.integers(2))], orders[int(rng.integers(6))], tuple(rng.random(3) < 0.5)
                )
                for _ in range(count)
            ]
            for count in rng.integers(1, 4, 3)
        ]
        organ = torch.from_numpy((rng.random((3, 14, 12, 16)) < 0.8).astype(np.uint8))
        centers = torch.from_numpy(rng.integers(-3, 18, (3, 3, 3)))
        values = [[t.image_hu.astype(np.float32) for t in row] for row in tumors]
        by_slices, on_device = (
            _paste_on_cpu(tumors, values, centers, organ),
            _paste_on_gpu(tumors, values, centers, organ),
        )
        assert torch.equal(by_slices[0], on_device[0])
        assert torch.equal(by_slices[1], on_device[1])
        box = paste_tumors(tumors, centers, organ, (-175.0, 250.0), relative=False).box
        for row in range(3):
            outside = torch.ones(organ.shape[1:], dtype=torch.bool)
            (z0, y0, x0), (z1, y1, x1) = box[row].tolist()
            outside[z0:z1, y0:y1, x0:x1] = False
            assert not by_slices[0][row][outside].any()


def test_turns_keep_the_tumor_and_its_spacing() -> None:
    assert len(turns_between((1.5, 1.5, 1.5))) == 6
    assert turns_between((5.0, 1.25, 1.25)) == [(0, 1, 2), (0, 2, 1)]
    tumor = BANK.tumors["liver"][0]
    seen = set()
    for axes in turns_between(BANK.spacing_mm_zyx):
        for flips in np.ndindex(2, 2, 2):
            turned = PastedTumor(tumor, axes, (bool(flips[0]), bool(flips[1]), bool(flips[2])))
            assert sorted(turned.image_hu[turned.mask > 0]) == sorted(tumor.image_hu[tumor.mask > 0])
            (first, end), mask = turned.extent_vox, turned.mask
            z, y, x = (slice(m + a, m + b) for m, a, b in zip(turned.middle, first, end, strict=True))
            assert mask[z, y, x].sum() == mask.sum()
            seen.add(mask.tobytes() + bytes(mask.shape))
    assert len(seen) == 48


def test_draws_of_the_bank_reach_every_tumor_and_stay_as_cut_without_turns() -> None:
    config = _config("copy-paste")
    plain = config.with_overrides({"synthesis.paste_turns": False})
    reached = set()
    for index in range(40):
        draws = [
            draw_patch(
                ["liver", "pancreas", "kidney"], c.synthesis, (1.5, 1.5, 1.5), seed=1, epoch=0, index=index, bank=BANK
            )
            for c in (config, plain)
        ]
        turned, cut = (d.tumors[0].pasted for d in draws if d is not None)
        assert turned is not None
        assert cut is not None
        assert turned.tumor is cut.tumor
        assert (cut.axes, cut.flips) == ((0, 1, 2), (False, False, False))
        reached.add(id(cut.tumor))
    assert len(reached) == 3


def test_the_size_class_is_that_of_the_cut_volume() -> None:
    config = _config("copy-paste")
    mask = np.ones((20, 20, 20), dtype=np.uint8)
    ball = BankTumor("case", np.zeros_like(mask, dtype=np.int16), mask, 0.0)  # 27 ml: as a ball of 18.6 mm radius
    bank = TumorBank({"liver": (ball,)}, (1.5, 1.5, 1.5))
    drawn = draw_patch(["liver"], config.synthesis, (1.5, 1.5, 1.5), seed=0, epoch=0, index=0, bank=bank)
    assert drawn is not None
    assert drawn.tumors[0].size_class == "medium"
    assert drawn.tumors[0].radii_vox_zyx == (10.0, 10.0, 10.0)


# syntumor


@pytest.mark.parametrize("arm", ["syntumor", "syntumor, many"])
def test_syntumor_equals_its_formula(arm: str) -> None:
    """Inside the organ x - Gs(M) D T / W, elsewhere x; in float64 with SciPy's blur."""
    image, label = _batch()
    synthesizer = _synthesizer(_config(arm))
    drawn = synthesizer.draw(label, ADDRESSES)
    out = synthesizer.paint(image, label, ADDRESSES)
    for row, draw in drawn.items():
        assert 65 <= draw.syntumor_contrast_hu <= 145
        assert 1 <= draw.syntumor_edge_mm <= 2
        x = image[row, 0].double().numpy()
        field = synthesizer._noise.crop(draw.texture_draw, SHAPE).double().numpy()
        soft = ndi.gaussian_filter(out.mask[row, 0].double().numpy(), draw.syntumor_edge_mm / 1.5, mode="reflect")
        organ = label[row, 0].numpy() == BASE.region.organs[draw.organ].organ
        expected = np.where(organ, x - soft * (draw.syntumor_contrast_hu / WIDTH_HU) * field, x)
        np.testing.assert_allclose(out.image[row, 0].numpy(), expected, rtol=0, atol=2e-6)


def test_syntumor_subtracts_what_the_prose_says() -> None:
    """Its fields have a mean of about 0.5, so that 65 to 145 HU become 33 to 73 (few-labels 1)."""
    synthesizer = _synthesizer(_config("syntumor"))
    for number in range(10):
        field = synthesizer._noise.crop((number / 10, 0.3, 0.3, 0.3), SHAPE)
        assert 0.35 < float(field.mean()) < 0.65
        assert 0 <= float(field.min()) <= float(field.max()) <= 1


def test_many_tumors_come_in_the_numbers_of_their_class() -> None:
    config = Config.preset("abdomen").with_overrides(dict(ARMS["syntumor, many"]))
    kinds: dict[str, list[int]] = {}
    for index in range(300):
        drawn = draw_patch(["liver"], config.synthesis, (1.5, 1.5, 1.5), seed=2, epoch=0, index=index)
        assert drawn is not None
        names = [t.size_class for t in drawn.tumors]
        counts = {name: names.count(name) for name in dict.fromkeys(names)}
        for name, count in counts.items():
            assert MANY_TUMORS[name][0] <= count <= MANY_TUMORS[name][1]
        kinds.setdefault("mix" if len(counts) > 1 else names[0], []).append(len(names))
    assert set(kinds) == {*MANY_TUMORS, "mix"}
    for found in kinds.values():  # 60 each expected, binomial deviation 7
        assert 30 < len(found) < 95


def test_many_tumors_are_painted_and_reported_each() -> None:
    image, label = _batch()
    out = _synthesizer(_config("syntumor, many")).paint(image, label, ADDRESSES)
    drawn = _synthesizer(_config("syntumor, many")).draw(label, ADDRESSES)
    counts = [len(d.tumors) for d in drawn.values()]
    assert len(set(counts)) > 1  # patches of one batch have different numbers
    records = [r for r in out.records() if r is not None]
    assert [len(r.center_zyx) for r in records] == counts == [len(r.radii_vox_zyx) for r in records]


# what does not fit together


@pytest.mark.parametrize(
    ("keys", "finding"),
    [
        ({"synthesizer": "syntumor", "variant": "released"}, "variant=released with synthesizer=syntumor"),
        ({"synthesizer": "copy-paste", "shape": "realistic"}, "cut tumours have their own shapes"),
        ({"synthesizer": "syntumor", "rim_fraction": 0.1}, "rim_fraction with synthesizer=syntumor"),
        ({"synthesizer": "copy-paste", "heterogeneity": (0, 1)}, "heterogeneity with synthesizer=copy-paste"),
        (
            {"variant": "released", "hyperdense_fraction": 0.2},
            "hyperdense_fraction with synthesizer=freetumor, variant=rel",
        ),
        ({"target_contrast_hu": (10, 50), "contrast_factor": (0.5, 2)}, "both decide the contrast"),
        ({"target_contrast_hu": (50, 10)}, "want 0 <= low <= high"),
        ({"heterogeneity": (0, 2)}, "at most 1"),
        ({"rim_width_mm": (0, 2)}, "want 0 < low"),
        ({"syntumor_tumors": "many"}, "syntumor_tumors=many with synthesizer=freetumor"),
        ({"synthesizer": "syntumor", "syntumor_tumors": "many", "num_tumors": 2}, "num_tumors=2"),
        ({"synthesizer": "difftumor"}, "freetumor"),
        (
            {"synthesizer": "syntumor", "contrast_factor": (0.5, 2), "edge_sigma_mm": 1.2},
            r"contrast_factor, edge_sigma_mm with synthesizer=syntumor.*set them back: contrast_factor=\[1\.0, 1\.0\], edge_sigma_mm=0\.0",
        ),
        ({"synthesizer": "copy-paste", "contrast_factor": (0.5, 2)}, "contrast_factor with synthesizer=copy-paste"),
        ({"synthesizer": "copy-paste", "texture_sigma_mm": (1, 2)}, "texture_sigma_mm with synthesizer=copy-paste"),
        ({"variant": "released", "edge_sigma_mm": 1.2}, "edge_sigma_mm with synthesizer=freetumor, variant=released"),
        (
            {"variant": "released", "contrast_factor": (0.5, 2)},
            "contrast_factor with synthesizer=freetumor, variant=rel",
        ),
        ({"variant": "released", "texture_sigma_mm": (1, 2)}, "texture_sigma_mm with synthesizer=freetumor, variant=r"),
        ({"paste": "contrast"}, "paste with synthesizer=freetumor.*set them back: paste=absolute"),
        ({"synthesizer": "constant", "paste_turns": False}, "paste_turns with synthesizer=constant"),
        ({"syntumor_contrast_hu": (30, 70)}, "syntumor_contrast_hu with synthesizer=freetumor"),
    ],
)
def test_combinations_that_mean_nothing_are_refused(keys: dict[str, Any], finding: str) -> None:
    with pytest.raises(ConfigError, match=finding):
        BASE.with_overrides({f"synthesis.{key}": value for key, value in keys.items()})


def test_every_arm_of_the_few_labels_experiment_is_a_valid_configuration() -> None:
    for quick in (False, True):
        protocol = load_protocol(quick=quick)
        for arm in few_labels.ARMS.values():
            recipe = {} if arm.generator is None else few_labels.GENERATORS[arm.generator]
            config = protocol.config({**recipe, **arm.keys})
            assert config.synthesis.idle_keys == []


def test_a_generator_or_a_bank_where_none_is_taken_is_refused() -> None:
    generator = torch.nn.Conv3d(1, 3, 1)
    for name in ("constant", "syntumor"):
        config = _config(name)
        with pytest.raises(ConfigError, match=f"synthesizer={name}, which takes none"):
            Synthesizer(config.region, config.synthesis, seed=0, generator=generator)
        with pytest.raises(ConfigError, match=f"a tumour bank with synthesis.synthesizer={name}"):
            Synthesizer(config.region, config.synthesis, seed=0, bank=BANK)
    config = _config("copy-paste")
    with pytest.raises(ConfigError, match="without a tumour bank"):
        Synthesizer(config.region, config.synthesis, seed=0)
    with pytest.raises(ConfigError, match="the tumour bank is empty"):
        Synthesizer(config.region, config.synthesis, seed=0, bank=TumorBank({}, (1.5, 1.5, 1.5)))
    with pytest.raises(ConfigError, match=r"voxels of \(1.5, 1.5, 1.5\) mm"):
        Synthesizer(config.region, config.synthesis, seed=0, bank=BANK, spacing_mm_zyx=(3.0, 1.5, 1.5))


@pytest.mark.parametrize("arm", ARMS)
def test_synthesize_paints_one_ct_with_each(arm: str) -> None:
    image, label = _batch()
    image_hu = np.rint(image[2, 0].numpy() * WIDTH_HU - 175).astype(np.int16)
    config, bank = _config(arm), BANK if "copy-paste" in arm else None
    result = synthesize(image_hu, label[2, 0].numpy(), "kidney", seed=4, config=config, bank=bank)
    assert result.passed
    assert math.isnan(result.proportion)
    assert result.mask.any()
    assert (label[2, 0].numpy()[result.mask > 0] == 5).all()
    assert (result.image_hu != image_hu)[result.mask > 0].mean() > 0.8
    if bank is not None:
        with pytest.raises(ConfigError, match="the bank holds no tumour of pancreas"):
            synthesize(image_hu, label[1, 0].numpy(), "pancreas", config=config, bank=bank)


@pytest.mark.parametrize("arm", ARMS)
def test_nothing_is_read_back_before_the_records(
    arm: str, on_cpu: KernelsOnCpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The CUDA kernels and the device's way to paste, run on the CPU."""
    config = _config(arm)
    image, label = _batch()
    voxels = [tuple(np.bincount(patch.numpy().ravel()).tolist()) for patch in label]
    wanted = _synthesizer(config).paint(image, label, ADDRESSES)
    synthesizer = _synthesizer(config)
    synthesizer.paint(image, label, ADDRESSES, label_voxels=voxels)  # makes noise fields
    monkeypatch.setattr(paste, "_paste_on_cpu", _paste_on_gpu)
    with on_cpu("forward"), reads() as found:
        painting = synthesizer.paint(image, label, ADDRESSES, label_voxels=voxels)
        assert found == []
    assert torch.equal(painting.mask, wanted.mask)
    torch.testing.assert_close(painting.image, wanted.image, rtol=0, atol=2e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("arm", ARMS)
def test_on_a_gpu_nothing_is_waited_for_and_masks_are_those_of_the_cpu(arm: str, cuda: torch.device) -> None:
    config = _config(arm)
    image, label = _batch()
    voxels = [tuple(np.bincount(patch.numpy().ravel()).tolist()) for patch in label]
    wanted = _synthesizer(config).paint(image, label, ADDRESSES)
    synthesizer, batch = _synthesizer(config), (image.to(cuda), label.to(cuda))
    synthesizer.paint(*batch, ADDRESSES, label_voxels=voxels).records()  # compiles kernels, makes noise fields
    torch.cuda.synchronize()
    with host_syncs_forbidden():
        painting = synthesizer.paint(*batch, ADDRESSES, label_voxels=voxels)
    assert torch.equal(painting.mask.cpu(), wanted.mask)
    assert torch.equal(painting.label.cpu(), wanted.label)
    torch.testing.assert_close(painting.image.cpu(), wanted.image, rtol=0, atol=5e-6)
