"""Boxes around tumours: they hold the mask and its surroundings, come in few sizes, and change nothing that they need not change."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ftengine.config import Config
from ftengine.errors import ConfigError
from ftengine.geometry import IntZYX
from ftengine.kernels import tumor_mask
from ftengine.quality.judge import SegmenterJudge
from ftengine.synthesis.box import BUCKET_VOX, box_shape, choose_regions, margin_for, tumor_extent_vox
from ftengine.synthesis.engine import Address, Synthesizer
from ftengine.synthesis.shape import PatchDraw, TumorDraw, draw_patch

PATCH = (64, 64, 80)
CONFIG = Config.preset("abdomen").with_overrides(
    {
        "region.patch_zyx": (64, 64, 64),
        "synthesis.size_weights": {"tiny": 1.0},
        "synthesis.edge_sigma_mm": 0.6,
        "synthesis.box_least_vox": 32,
        "synthesis.box_context_mm": 4.5,  # three voxels: what three convolutions reach
        "qc.threshold": 0.3,
    }
)
BOXED = CONFIG.with_overrides({"synthesis.box": "auto"})
ADDRESSES = [Address(1, i) for i in range(6)]


class _Convolutions(torch.nn.Sequential):
    """Three convolutions: a voxel of the result depends on no voxel further than three away."""

    def __init__(self, out_channels: int, *, seed: int, scale: float) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            layers: list[torch.nn.Module] = []
            for a, b in ((1, 4), (4, 4), (4, out_channels)):
                layers += [torch.nn.Conv3d(a, b, 3, padding=1), torch.nn.Tanh()]
        super().__init__(*layers[:-1])
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.mul_(scale)


def _batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Livers in corners, in the middle and everywhere, so that boxes are moved inwards and are not."""
    rng = np.random.default_rng(4)
    image = torch.from_numpy(rng.uniform(0.3, 0.9, (6, 1, *PATCH)).astype(np.float32))
    label = torch.zeros((6, 1, *PATCH), dtype=torch.uint8)
    label[0, 0, :12, :12, :12] = 1
    label[1, 0, 52:, 50:, 66:] = 1
    label[2, 0, 20:44, 20:44, 20:44] = 1
    label[3, 0] = 3
    label[4, 0, 25:40, :10, 70:] = 5
    return image, label


def _synthesizer(config: Config, **options: Any) -> Synthesizer:
    judge = SegmenterJudge(_Convolutions(7, seed=1, scale=3.0), config.qc, config.region)
    networks: dict[str, Any] = {"generator": _Convolutions(3, seed=2, scale=2.0), "judge": judge}
    return Synthesizer(config.region, config.synthesis, seed=6, **(networks | options))


def _draw(index: int, config: Config, organ: str = "liver") -> PatchDraw:
    drawn = draw_patch([organ], config.synthesis, (1.5, 1.5, 1.5), seed=5, epoch=0, index=index)
    assert drawn is not None
    return drawn


@settings(max_examples=40, deadline=None, derandomize=True)
@given(radii=st.tuples(*[st.floats(0.6, 9.0)] * 3), strength=st.floats(0.0, 12.0), seed=st.integers(0, 2**20))
def test_a_tumor_stays_in_its_extent_however_it_is_warped(
    radii: tuple[float, float, float], strength: float, seed: int
) -> None:
    warp = np.random.default_rng(seed).standard_normal((3, 2, 3, 3)) * strength
    low, high = tumor_extent_vox(TumorDraw("any", radii, warp, (0.5, 0.5)))
    found = np.argwhere(tumor_mask([[24, 24, 24]], [radii], warp[None], (48, 48, 48))[0].numpy()) - 24
    assert (found >= low).all()
    assert (found < high).all()


def test_a_tumor_with_lobes_stays_in_its_extent() -> None:
    config = CONFIG.with_overrides({"synthesis.shape": "realistic"})
    num_lobes = 0
    for index in range(30):
        (tumor,) = _draw(index, config, "kidney").tumors
        num_lobes += len(tumor.lobes)
        low, high = np.array(tumor_extent_vox(tumor))
        shape = tuple(int(n) for n in high - low + 4)
        centers = [[e.center_zyx(tuple(int(v) for v in 2 - low)) for e in tumor.ellipsoids]]  # type: ignore[arg-type]
        radii, warps = [[e.radii_vox_zyx for e in tumor.ellipsoids]], np.array([[e.warp for e in tumor.ellipsoids]])
        mask = tumor_mask(centers, radii, warps, shape)[0].numpy()
        assert mask.any()
        assert not any(mask.take([0, 1, -2, -1], axis=axis).any() for axis in range(3))
    assert num_lobes > 0


@pytest.mark.parametrize(
    ("patch", "sides"),
    [
        ((96, 96, 96), {64}),
        ((128, 128, 128), {64, 96}),
        ((48, 96, 96), {64}),
        ((64, 64, 64), set[int]()),
        ((40, 40, 40), set()),
    ],
)
def test_boxes_come_in_few_sizes(patch: IntZYX, sides: set[int]) -> None:
    config = Config.preset("abdomen")
    margin = margin_for(config.synthesis.box_context_mm, (0, 0, 0), (1.5, 1.5, 1.5))
    found: dict[str, set[IntZYX | None]] = {}
    for index in range(200):
        draw = _draw(index, config)
        found.setdefault(draw.tumors[0].size_class, set()).add(box_shape(draw, patch, margin, 64))
    shapes = set.union(*found.values())
    assert shapes - {None} == {tuple(min(side, n) for n in patch) for side in sides}
    assert found["large"] == {None}
    if 64 in sides:
        assert None not in found["tiny"] | found["small"]
    for shape in shapes:
        assert shape is None or all(n % BUCKET_VOX == 0 or n == whole for n, whole in zip(shape, patch, strict=True))


def test_several_tumors_take_the_whole_patch() -> None:
    two = _draw(0, CONFIG.with_overrides({"synthesis.num_tumors": 2}))
    assert box_shape(two, (96, 96, 96), (0, 0, 0), 32) is None
    assert box_shape(_draw(0, CONFIG), (96, 96, 96), (0, 0, 0), 32) == (32, 32, 32)


def test_every_box_holds_its_mask_and_the_margin() -> None:
    _, label = _batch()
    synthesizer = _synthesizer(BOXED)
    margin = (4, 4, 4)
    moved = 0
    for epoch in range(12):
        placement = synthesizer.place(label, synthesizer.draw(label, [Address(epoch, i) for i in range(6)]))
        shapes = [box_shape(d, PATCH, margin, 32) for d in placement.draws]
        assert shapes == [synthesizer.box_of(d, PATCH) for d in placement.draws]
        regions = choose_regions(placement.draws, shapes, placement.centers, PATCH)
        assert sorted(regions.order) == list(range(len(placement.rows)))
        assert regions.whole == []
        for boxes in regions.boxes:
            inside = boxes.crop(placement.mask)
            assert torch.equal(inside.flatten(1).sum(1), placement.mask[boxes.members].flatten(1).sum(1))
            for i, member in enumerate(boxes.members):
                low, high = placement.box[member].tolist()
                first = [int(axis[i].min() if axis.shape[0] > 1 else axis.min()) for axis in boxes.index[1:]]
                for axis, (start, length) in enumerate(zip(first, inside.shape[1:], strict=True)):
                    end = start + length
                    assert start >= 0
                    assert end <= PATCH[axis]
                    assert start == 0 or low[axis] - start >= margin[axis]
                    assert end == PATCH[axis] or end - high[axis] >= margin[axis]
                    moved += start == 0 or end == PATCH[axis]
    assert moved > 20


def test_networks_that_see_less_than_the_context_paint_and_judge_as_on_the_whole_patch() -> None:
    image, label = _batch()
    full = _synthesizer(CONFIG).paint(image, label, ADDRESSES)
    boxed = _synthesizer(BOXED).paint(image, label, ADDRESSES)
    assert torch.equal(boxed.mask, full.mask)
    assert torch.equal(boxed.label, full.label)
    torch.testing.assert_close(boxed.image, full.image, rtol=0, atol=1e-6)
    assert torch.equal(
        boxed.image[boxed.mask == 0] != image[boxed.mask == 0], full.image[full.mask == 0] != image[full.mask == 0]
    )
    verdicts = []
    for one, other in zip(boxed.records(), full.records(), strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert (one.center_zyx, one.num_voxels, one.passed) == (other.center_zyx, other.num_voxels, other.passed)
            assert one.proportion == other.proportion
            verdicts.append(one.passed)
    assert len(verdicts) == 5
    assert 0 < sum(verdicts) < 5  # both kinds


class _Seeing:
    """Notes what a network is given."""

    def __init__(self, network: Any) -> None:
        self.network, self.shapes = network, list[tuple[int, ...]]()

    def __call__(self, x: torch.Tensor, *args: Any) -> Any:
        self.shapes.append(tuple(x.shape))
        return self.network(x, *args)


def test_patches_of_one_size_are_evaluated_together() -> None:
    config = BOXED.with_overrides({"synthesis.size_weights": {"tiny": 0.5, "large": 0.5}, "qc.threshold": None})
    generator = _Seeing(_Convolutions(3, seed=2, scale=2.0))
    segmenter = _Seeing(_Convolutions(7, seed=1, scale=3.0))
    judge = SegmenterJudge(segmenter, config.qc, config.region)
    synthesizer = _synthesizer(config, generator=generator, judge=judge)
    records = [r for r in synthesizer.paint(*_batch(), ADDRESSES).records() if r is not None]
    num_tiny = sum(r.size_class == "tiny" for r in records)
    assert 0 < num_tiny < len(records)
    wanted = [(len(records) - num_tiny, 1, *PATCH), (num_tiny, 1, 32, 32, 32)]
    assert generator.shapes == wanted
    assert segmenter.shapes == wanted


def test_a_patch_does_not_depend_on_its_batch_mates() -> None:
    config = BOXED.with_overrides({"synthesis.size_weights": {"tiny": 0.5, "large": 0.5}})
    image, label = _batch()
    whole = _synthesizer(config).paint(image, label, ADDRESSES)
    for row, record in enumerate(whole.records()):
        part = slice(row, row + 1)
        alone = _synthesizer(config).paint(image[part], label[part], ADDRESSES[part])
        assert torch.equal(alone.mask[0], whole.mask[row])
        torch.testing.assert_close(alone.image[0], whole.image[row], rtol=0, atol=1e-6)
        assert alone.records()[0] == record


def test_redraws_get_boxes_of_their_own() -> None:
    generator = _Seeing(_Convolutions(3, seed=2, scale=2.0))
    config = BOXED.with_overrides({"qc.threshold": 1.0})
    judge = SegmenterJudge(_Convolutions(7, seed=1, scale=3.0), config.qc, config.region)
    boxed = _synthesizer(config, generator=generator, judge=judge, retries=2).paint(*_batch(), ADDRESSES)
    full = _synthesizer(CONFIG.with_overrides({"qc.threshold": 1.0}), judge=judge, retries=2).paint(
        *_batch(), ADDRESSES
    )
    assert generator.shapes == [(5, 1, 32, 32, 32)] * 3
    assert torch.equal(boxed.mask, full.mask)
    assert boxed.records() == full.records()


class _Passing:
    def __call__(
        self, image: torch.Tensor, mask: torch.Tensor, tumor_values: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """P says which patch it was: the mask's voxels, modulo 1000."""
        assert image.shape[2:] == mask.shape[1:]
        assert len(image) == len(mask) == len(tumor_values)
        proportion = mask.flatten(1).sum(1).float() % 1000
        return proportion, proportion >= 0


def test_verdicts_go_back_to_their_own_patches() -> None:
    config = BOXED.with_overrides({"synthesis.size_weights": {"tiny": 0.4, "small": 0.3, "large": 0.3}})
    records = _synthesizer(config, judge=_Passing()).paint(*_batch(), ADDRESSES).records()
    assert {r.size_class for r in records if r is not None} >= {"tiny", "large"}
    for record in records:
        assert record is None or record.proportion == record.num_voxels % 1000


def test_without_networks_there_is_nothing_to_crop() -> None:
    image, label = _batch()
    plain = {"generator": None, "judge": None}
    full = _synthesizer(CONFIG, **plain).paint(image, label, ADDRESSES)
    assert torch.equal(_synthesizer(BOXED, **plain).paint(image, label, ADDRESSES).image, full.image)


def test_the_released_variant_has_no_boxes() -> None:
    with pytest.raises(ConfigError, match="box=auto with variant=released"):
        BOXED.with_overrides({"synthesis.variant": "released"})
    with pytest.raises(ConfigError, match="box_least_vox"):
        BOXED.with_overrides({"synthesis.box_least_vox": 48})
