"""Which patch: a function of the address, labelled tissue in every positive patch, all volumes once a pass."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ftengine.config import AugmentConfig
from ftengine.errors import ConfigError
from ftengine.geometry import IntZYX
from ftengine.loader.plan import Plan, draw_augmentation
from ftengine.rng import Purpose, patch_rng
from ftengine.store import index
from ftengine.store.reader import Store, open_store
from ftengine.store.writer import Provenance, create_store, write_volume
from tests.support import make_store, ras_grid_at, small_config


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(tmp_path_factory.mktemp("plan"), small_config(), num_annotated=3, num_organs=5)


@given(epoch=st.integers(0, 50), number=st.integers(0, 3), seed=st.integers(0, 2**40))
@settings(max_examples=30, deadline=None)
def test_a_request_is_a_function_of_its_address(store: Store, epoch: int, number: int, seed: int) -> None:
    config = small_config(seed=seed, training__batch_size=4)
    first = Plan(config, store, mix="mixed").request(epoch, number)
    other = Plan(config, open_store(store.path), mix="mixed")
    other.batch(epoch + 1, 0)  # what was asked before changes nothing
    assert other.request(epoch, number) == first


def test_different_addresses_differ(store: Store) -> None:
    plan = Plan(small_config(loader__patches_per_epoch=40), store, mix="mixed")
    boxes = {(r.case, r.box.origin_zyx) for step in range(plan.batches_per_epoch) for r in plan.batch(0, step)}
    assert len(boxes) > 30


@given(index_=st.integers(0, 400))
@settings(max_examples=60, deadline=None)
def test_a_positive_patch_holds_labelled_tissue(store: Store, index_: int) -> None:
    plan = Plan(small_config(loader__positive_fraction=1.0, loader__patches_per_epoch=500), store, mix="mixed")
    request = plan.request(0, index_)
    assert store.read(request.case, request.box.origin_zyx, request.box.shape_zyx).label.any()


@pytest.mark.parametrize("patch", [(8, 16, 16), (16, 64, 64), (96, 96, 96)])
def test_positive_patches_of_any_size_hold_a_single_labelled_voxel(tmp_path: Path, patch: IntZYX) -> None:
    config = small_config(
        region__patch_zyx=patch,
        loader__positive_fraction=1.0,
        loader__patches_per_epoch=40,
        loader__absent_classes="allow",
    )
    shape = (40, 70, 70)
    label = np.zeros(shape, dtype=np.uint8)
    label[33, 5, 68] = 2
    grid = ras_grid_at(shape)
    root = create_store(tmp_path / "s.zarr", config.region)
    write_volume(root, "d/x", np.zeros(shape, dtype=np.int16), label, grid, grid, config.region, Provenance("x", "y"))
    store = open_store(root)
    plan = Plan(config, store, mix="annotated")
    for number in range(40):
        box = plan.request(0, number).box
        assert store.read("d/x", box.origin_zyx, box.shape_zyx).label.any()
        for origin, size, length in zip(box.origin_zyx, patch, shape, strict=True):
            assert origin == -((size - length) // 2) if size >= length else 0 <= origin <= length - size


def test_class_balanced_patches_meet_small_tumors_as_often_as_organs(store: Store) -> None:
    config = small_config(loader__positive_fraction=1.0, loader__patches_per_epoch=200, region__patch_zyx=(8, 8, 8))
    shares = []
    for balanced in (False, True):
        plan = Plan(config.with_overrides({"loader.class_balanced": balanced}), store, mix="annotated")
        boxes = [plan.request(0, number) for number in range(200)]
        labels = [store.read(r.case, r.box.origin_zyx, r.box.shape_zyx).label for r in boxes]
        assert all(label.any() for label in labels)
        shares.append(np.mean([(label == 2).any() for label in labels]))
    assert shares[0] < 0.25  # 125 of 21,000 labelled voxels are tumour
    assert shares[1] > 0.45  # half of the draws ask for one


def test_positive_and_negative_patches_come_in_the_asked_ratio(store: Store) -> None:
    plan = Plan(small_config(loader__positive_fraction=0.0, loader__patches_per_epoch=200), store, mix="mixed")
    centers = []
    for number in range(200):
        box = plan.request(0, number).box
        label = store.read(plan.request(0, number).case, box.origin_zyx, box.shape_zyx).label
        centers.append(label[8, 8, 8] > 0)
    assert np.mean(centers) < 0.6  # the liver fills an eighth of the volume, but most chunks touch it


def test_every_volume_comes_once_a_pass(store: Store) -> None:
    plan = Plan(small_config(training__batch_size=4), store, mix="mixed")
    visits = Counter(
        r.case for epoch in range(15) for step in range(plan.batches_per_epoch) for r in plan.batch(epoch, step)
    )
    annotated = [n for case, n in visits.items() if case.startswith("a/")]
    organs = [n for case, n in visits.items() if case.startswith("o/")]
    assert (len(annotated), len(organs)) == (3, 5)
    assert max(annotated) - min(annotated) <= 1
    assert max(organs) - min(organs) <= 1


@pytest.mark.parametrize("batch_size", [1, 3, 4])
@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_a_mixed_run_has_the_asked_share_of_annotated_volumes(store: Store, batch_size: int, fraction: float) -> None:
    config = small_config(
        training__batch_size=batch_size, loader__annotated_fraction=fraction, loader__patches_per_epoch=120
    )
    plan = Plan(config, store, mix="mixed")
    drawn = [r for epoch in range(2) for step in range(plan.batches_per_epoch) for r in plan.batch(epoch, step)]
    assert sum(r.annotated for r in drawn) == int(240 * fraction)
    for number in range(0, 240 - 40, 40):  # spread evenly, not bunched
        assert abs(sum(r.annotated for r in drawn[number : number + 40]) - 40 * fraction) <= batch_size
    assert all(r.annotated for r in Plan(config, store, mix="annotated").batch(0, 0))


def test_only_the_asked_split_is_drawn(store: Store) -> None:
    assert Plan(small_config(), store, mix="mixed", split="train").num_volumes == 8
    with pytest.raises(ConfigError, match="no volume in split 'test'"):
        Plan(small_config(), store, mix="mixed", split="test")


def test_a_store_without_annotated_volumes_says_so(tmp_path: Path) -> None:
    store = make_store(tmp_path, small_config(), num_annotated=0, num_organs=1)
    with pytest.raises(ConfigError, match="tumours annotated: 0, organs only: 1"):
        Plan(small_config(), store, mix="annotated")
    assert Plan(small_config(), store, mix="mixed").num_volumes == 1


def test_a_volume_of_air_can_be_drawn_from(tmp_path: Path) -> None:
    config = small_config(loader__absent_classes="allow")
    grid = ras_grid_at((20, 20, 20))
    root = create_store(tmp_path / "s.zarr", config.region)
    air = np.full((20, 20, 20), -1024, dtype=np.int16)
    label = np.zeros((20, 20, 20), dtype=np.uint8)
    write_volume(root, "d/x", air, label, grid, grid, config.region, Provenance("x", "y", annotation="tumor"))
    index.compact_index(root)
    assert Plan(config, open_store(root), mix="annotated").request(0, 0).case == "d/x"


def _by_numpy(volume: NDArray[np.int64], rng: np.random.Generator, augment: AugmentConfig) -> NDArray[np.int64]:
    """The released order written with numpy: flip x, y, z, then quarter turns in the (y, x) plane."""
    for axis in (2, 1, 0):
        if rng.random() < augment.flip_probability:
            volume = np.flip(volume, axis)
    if rng.random() < augment.rot90_probability:
        volume = np.rot90(volume, int(rng.integers(1, 4)), axes=(1, 2))
    return volume


@given(number=st.integers(0, 2000))
@settings(deadline=None)
def test_one_transpose_and_one_flip_equal_the_flips_and_turns(number: int) -> None:
    augment = AugmentConfig(flip_probability=0.5, rot90_probability=0.8)
    volume = np.arange(4 * 5 * 5).reshape(4, 5, 5)
    drawn = draw_augmentation(patch_rng(1, Purpose.CROP_AND_AUGMENT, index=number), augment)
    ours = volume.transpose(0, 2, 1) if drawn.transpose_yx else volume
    ours = np.flip(ours, tuple(axis for axis in range(3) if drawn.flip_zyx[axis]))
    expected = _by_numpy(volume, patch_rng(1, Purpose.CROP_AND_AUGMENT, index=number), augment)
    np.testing.assert_array_equal(ours, expected)


def test_augmentations_come_with_the_released_probabilities() -> None:
    drawn = [draw_augmentation(patch_rng(0, Purpose.CROP_AND_AUGMENT, index=i), AugmentConfig()) for i in range(4000)]
    # 4 standard deviations of a binomial of 4000
    assert abs(np.mean([d.intensity_scale != 1.0 for d in drawn]) - 0.1) < 0.019
    assert abs(np.mean([d.intensity_shift != 0.0 for d in drawn]) - 0.1) < 0.019
    assert abs(np.mean([d.flip_zyx[0] for d in drawn]) - 0.2) < 0.026
    assert abs(np.mean([d.transpose_yx for d in drawn]) - 0.2 * 2 / 3) < 0.022
    assert max(abs(d.intensity_scale - 1) for d in drawn) <= 0.1
