"""How patches are dealt out: over ranks, over data sets by weight, several from one read."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftengine.errors import ConfigError
from ftengine.geometry import IntZYX
from ftengine.loader.counting import count_values
from ftengine.loader.plan import Plan
from ftengine.store.reader import Store
from ftengine.types import PatchRequest
from tests.support import make_store, small_config


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Six annotated and ten organ-labelled volumes, longer than a patch and a chunk together."""
    return make_store(
        tmp_path_factory.mktemp("sharing"), small_config(), num_annotated=6, num_organs=10, shape_zyx=(50, 60, 70)
    )


def _epochs(plan: Plan, count: int) -> list[PatchRequest]:
    return [r for epoch in range(count) for step in range(plan.batches_per_epoch) for r in plan.batch(epoch, step)]


# ---- ranks ----


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_deal_out_one_large_batch(store: Store, world_size: int) -> None:
    config = small_config(training__batch_size=2, loader__patches_per_epoch=24)
    large = Plan(config.with_overrides({"training.batch_size": 2 * world_size}), store, mix="mixed")
    plans = [Plan(config, store, mix="mixed", rank=rank, world_size=world_size) for rank in range(world_size)]
    for epoch in range(2):
        for step in range(large.batches_per_epoch):
            batches = [plan.batch(epoch, step) for plan in plans]
            dealt = [batches[index % world_size][index // world_size] for index in range(2 * world_size)]
            assert dealt == large.batch(epoch, step)
    indices = Counter(r.index for plan in plans for r in _epochs(plan, 1))
    assert set(indices.values()) == {1}


def test_every_rank_has_its_share_of_annotated_volumes(store: Store) -> None:
    config = small_config(training__batch_size=2, loader__patches_per_epoch=80)
    for rank in range(2):
        plan = Plan(config, store, mix="mixed", rank=rank, world_size=2)
        assert all(sum(r.annotated for r in plan.batch(0, step)) == 1 for step in range(plan.batches_per_epoch))


def test_a_rank_too_many_is_refused(store: Store) -> None:
    assert Plan(small_config(), store, mix="mixed", rank=15, world_size=16).batches_per_epoch == 1
    with pytest.raises(ConfigError, match="16 volumes to draw from and 17 ranks; want at least one volume a rank"):
        Plan(small_config(), store, mix="mixed", world_size=17)
    with pytest.raises(ConfigError, match=r"rank=2, world_size=2: want 0 <= rank < world_size"):
        Plan(small_config(), store, mix="mixed", rank=2, world_size=2)


# ---- weights ----


@pytest.mark.parametrize("weight", [0.25, 1.0, 2.5, 4.0])
def test_a_data_set_is_visited_as_often_as_its_weight_says(store: Store, weight: float) -> None:
    config = small_config(loader__dataset_weights={"a": weight}, loader__annotated_fraction=None)
    plan = Plan(config, store, mix="mixed")
    assert plan.batches_per_epoch * 2 == -(-(round(6 * weight) + 10) // 2) * 2
    visits = Counter(r.case for r in _epochs(plan, 60))
    of_a, of_o = ([visits[case] for case in store.cases if case.startswith(f"{name}/")] for name in "ao")
    # length of a pass is whole: 6 x 0.25 volumes come as 2
    assert np.mean(of_a) / np.mean(of_o) == pytest.approx(max(1, round(6 * weight)) / 6, rel=0.05)
    assert max(of_o) - min(of_o) <= 1
    # a pass rounds each weight up or down: a coin of at most 1/4 of variance for each volume, 4 standard deviations
    assert np.abs(np.array(of_a) - np.mean(of_a)).max() <= 4 * np.sqrt(60 / 4) + 1


def test_a_weight_changes_nothing_else(store: Store) -> None:
    plain = Plan(small_config(), store, mix="mixed")
    ones = Plan(small_config(loader__dataset_weights={"a": 1.0, "o": 1}), store, mix="mixed")
    assert _epochs(plain, 2) == _epochs(ones, 2)


def test_a_data_set_of_weight_0_is_left_out(store: Store) -> None:
    config = small_config(loader__dataset_weights={"o": 0.0})
    plan = Plan(config, store, mix="mixed")
    assert plan.num_volumes == 6
    assert {r.case[0] for r in _epochs(plan, 3)} == {"a"}


def test_weights_of_nothing_are_refused(store: Store) -> None:
    with pytest.raises(ConfigError, match=r"no volume with a weight above 0 in loader\.dataset_weights to draw from"):
        Plan(small_config(loader__dataset_weights={"a": 0.0, "o": 0.0}), store, mix="mixed")
    with pytest.raises(ConfigError, match=r"dataset_weights names \['lits'\]; .* holds a, o"):
        Plan(small_config(loader__dataset_weights={"lits": 2.0}), store, mix="mixed")
    with pytest.raises(ConfigError, match="greater than or equal to 0"):
        small_config(loader__dataset_weights={"a": -1.0})


# ---- several crops of one read ----


@given(
    crops=st.integers(2, 5),
    patch=st.sampled_from([(16, 16, 16), (32, 32, 32), (48, 64, 64), (64, 8, 8)]),
    positive=st.sampled_from([0.0, 1.0]),
    number=st.integers(0, 200),
)
@settings(max_examples=60, deadline=None)
def test_crops_lie_in_their_read_and_in_the_volume(
    store: Store, crops: int, patch: IntZYX, positive: float, number: int
) -> None:
    config = small_config(
        region__patch_zyx=patch,
        loader__crops_per_read=crops,
        loader__positive_fraction=positive,
        loader__patches_per_epoch=300,
        augment__rot90_probability=0.0,
    )
    plan = Plan(config, store, mix="mixed")
    request = plan.request(0, number)
    shape = store.shape_zyx(request.case)
    for o, n, ro, rn, length in zip(
        request.box.origin_zyx, patch, request.read.origin_zyx, request.read.shape_zyx, shape, strict=True
    ):
        assert ro <= o <= o + n <= ro + rn
        if length > n:
            assert 0 <= o <= length - n
            assert ro % 32 == 0
            assert rn == n + 32
        else:
            assert (o, rn) == (-((n - length) // 2), n)
    if positive:
        assert store.read(request.case, request.box.origin_zyx, patch).label.any()


def test_batches_of_a_block_share_their_reads_and_differ(store: Store) -> None:
    config = small_config(loader__crops_per_read=3, loader__patches_per_epoch=22)  # 11 batches: the last block has two
    plan = Plan(config, store, mix="mixed")
    seen: set[tuple[object, ...]] = set()
    for epoch in range(2):
        for block in range(4):
            batches = [plan.batch(epoch, step) for step in range(3 * block, min(3 * block + 3, 11))]
            for slot in range(2):
                assert len({(b[slot].case, b[slot].read) for b in batches}) == 1
                assert len({b[slot].index for b in batches}) == len(batches)
                seen.update((b[slot].case, b[slot].box.origin_zyx, b[slot].augmentation) for b in batches)
    assert len(seen) > 40  # of 44 patches


def test_volumes_are_visited_evenly_with_shared_reads_too(store: Store) -> None:
    plan = Plan(small_config(loader__crops_per_read=4, loader__patches_per_epoch=64), store, mix="mixed")
    visits = Counter(r.case for r in _epochs(plan, 15))
    assert set(visits) == set(store.cases)
    for name in "ao":
        counts = [n for case, n in visits.items() if case.startswith(name)]
        assert max(counts) - min(counts) <= 4  # one visit is four patches


# ---- another volume for one that cannot be read ----


def test_a_replacement_is_of_the_same_kind_and_a_function_of_its_address(store: Store) -> None:
    for crops in (1, 3):
        plan = Plan(small_config(loader__crops_per_read=crops, loader__patches_per_epoch=60), store, mix="mixed")
        for number in range(24):
            drawn = [plan.request(1, number, attempt=attempt) for attempt in range(6)]
            assert len({r.annotated for r in drawn}) == 1
            assert len({r.case for r in drawn}) > 1
            assert drawn[4] == plan.request(1, number, attempt=4)
            assert {(r.epoch, r.index) for r in drawn} == {(1, number)}


# ---- what a plan refuses ----


def test_volumes_smaller_than_the_patch_are_told_or_refused(store: Store) -> None:
    config = small_config(region__patch_zyx=(56, 56, 56))
    plan = Plan(config, store, mix="mixed")
    assert plan.notes[0].startswith(
        "16 of 16 volumes are smaller than the patch (56, 56, 56) on some axis: centred in it"
    )
    with pytest.raises(ConfigError, match=r"the first is a/0 with \(50, 60, 70\) voxels. Lower region.patch_zyx"):
        Plan(config.with_overrides({"loader.small_volumes": "refuse"}), store, mix="mixed")
    assert Plan(small_config(), store, mix="mixed").notes == ()


def test_a_class_that_is_never_present_is_refused_or_told(tmp_path: Path) -> None:
    config = small_config(
        region__labels={"background": 0, "liver": 1, "liver_tumor": 2, "kidney": 3, "kidney_tumor": 4},
        region__organs={"liver": {"organ": 1, "tumor": 2}, "kidney": {"organ": 3, "tumor": 4}},
    )
    store = make_store(tmp_path, config, num_annotated=0, num_organs=2)  # no tumour, but a liver to paint one on
    with pytest.raises(
        ConfigError, match=r"no volume of this run holds a voxel of kidney, kidney_tumor, and the network"
    ):
        Plan(config, store, mix="mixed")
    allowed = Plan(config.with_overrides({"loader.absent_classes": "allow"}), store, mix="mixed")
    assert allowed.notes == (
        "no volume of this run holds a voxel of kidney, kidney_tumor (loader.absent_classes=allow)",
    )


@given(seed=st.integers(0, 1000), shape=st.tuples(*[st.integers(1, 9)] * 3))
@settings(max_examples=40, deadline=None)
def test_values_are_counted_as_bincount_does(seed: int, shape: IntZYX) -> None:
    label = np.random.default_rng(seed).integers(0, 1 + seed % 256, shape, dtype=np.uint8)
    for view in (label, label[:, ::-1], label.transpose(2, 0, 1)):
        np.testing.assert_array_equal(count_values(view), np.bincount(view.ravel()))
