"""Subsets: rows of another store, its voxels, folds; nothing copied, nothing guessed."""

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftengine.config import Config
from ftengine.errors import ConfigError, StoreError
from ftengine.loader.plan import Plan
from ftengine.store.export import export_case
from ftengine.store.folds import assign_folds, rows_in
from ftengine.store.info import describe_store
from ftengine.store.reader import Store, open_store
from ftengine.store.subset import make_subset, read_case_list
from ftengine.store.writer import Provenance, create_store, write_volume
from tests.support import coordinate_volume, make_store, organ_volume, ras_grid_at, small_config

CONFIG = small_config()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(tmp_path_factory.mktemp("subset"), CONFIG, num_annotated=3, num_organs=4, shape_zyx=(20, 22, 24))


def test_a_subset_reads_the_voxels_of_its_store(store: Store, tmp_path: Path) -> None:
    report = make_subset(store, tmp_path / "a.zarr", datasets=["a"])
    assert (report.num_volumes, report.is_written) == (3, True)
    subset = open_store(tmp_path / "a.zarr")
    assert subset.cases == ["a/0", "a/1", "a/2"]
    for case in subset.cases:
        np.testing.assert_array_equal(subset.read_volume(case).image, store.read_volume(case).image)
        np.testing.assert_array_equal(subset.read_volume(case).label, store.read_volume(case).label)
        assert subset.row(case) == store.row(case)
    assert sorted(p.name for p in subset.path.rglob("*")) == ["index.parquet", "zarr.json"]
    assert (subset.region, subset.spacing_mm_zyx, subset.labels) == (store.region, store.spacing_mm_zyx, store.labels)


def test_the_other_commands_work_on_it(store: Store, tmp_path: Path) -> None:
    make_subset(store, tmp_path / "a.zarr", datasets=["a"])
    subset = open_store(tmp_path / "a.zarr")
    assert describe_store(subset, list_cases=True)["num_volumes"] == 3
    assert export_case(subset, "a/1", tmp_path / "out")[0].exists()
    plan = Plan(CONFIG, subset, mix="annotated")
    assert {r.case for step in range(plan.batches_per_epoch) for r in plan.batch(0, step)} == {"a/0", "a/1", "a/2"}


def test_a_subset_of_a_subset_points_at_the_volumes(store: Store, tmp_path: Path) -> None:
    make_subset(store, tmp_path / "deep" / "a.zarr", datasets=["a"])
    (tmp_path / "list.txt").write_text("# chosen by hand\na/2\n\na/0\n", encoding="utf-8")
    cases = read_case_list(tmp_path / "list.txt")
    make_subset(open_store(tmp_path / "deep" / "a.zarr"), tmp_path / "b.zarr", cases=cases)
    shutil.rmtree(tmp_path / "deep")
    assert open_store(tmp_path / "b.zarr").cases == ["a/0", "a/2"]
    assert open_store(tmp_path / "b.zarr").read_volume("a/2").label.max() == 2


def test_store_and_subset_may_move_together(store: Store, tmp_path: Path) -> None:
    shutil.copytree(store.path, tmp_path / "here" / "s.zarr")
    make_subset(open_store(tmp_path / "here" / "s.zarr"), tmp_path / "here" / "a.zarr", datasets=["a"])
    (tmp_path / "here").rename(tmp_path / "there")
    assert open_store(tmp_path / "there" / "a.zarr").read_volume("a/0").label.max() == 2
    (tmp_path / "there" / "s.zarr").rename(tmp_path / "elsewhere.zarr")
    with pytest.raises(StoreError, match=r"is a subset of .*s\.zarr, where there is no store"):
        open_store(tmp_path / "there" / "a.zarr")
    create_store(tmp_path / "there" / "s.zarr", Config.preset("chest").region)
    with pytest.raises(StoreError, match="holds other volumes now"):
        open_store(tmp_path / "there" / "a.zarr")


def test_nothing_is_converted_into_a_subset(store: Store, tmp_path: Path) -> None:
    make_subset(store, tmp_path / "a.zarr")
    with pytest.raises(ConfigError, match=r"is a subset of .* and holds no volumes of its own"):
        create_store(tmp_path / "a.zarr", CONFIG.region)


def test_a_volume_lost_in_the_store_is_named(store: Store, tmp_path: Path) -> None:
    shutil.copytree(store.path, tmp_path / "s.zarr")
    make_subset(open_store(tmp_path / "s.zarr"), tmp_path / "a.zarr")
    subset = open_store(tmp_path / "a.zarr")
    shutil.rmtree(tmp_path / "s.zarr" / "volumes" / "a" / "1")
    with pytest.raises(StoreError, match=r"s\.zarr/volumes/a/1: a chunk is missing"):
        subset.read_volume("a/1")


def test_dry_run_writes_nothing(store: Store, tmp_path: Path) -> None:
    report = make_subset(store, tmp_path / "x" / "a.zarr", num_folds=2, dry_run=True)
    assert (report.num_volumes, report.is_written, sum(report.folds.values())) == (7, False, 7)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_chosen_is_refused(store: Store, tmp_path: Path) -> None:
    out = tmp_path / "a.zarr"
    with pytest.raises(ConfigError, match=r"--dataset lits: .* holds no such data set; it holds a, o"):
        make_subset(store, out, datasets=["lits"])
    with pytest.raises(ConfigError, match=r"1 of 2 cases are not in .*, such as 'a/9'"):
        make_subset(store, out, cases=["a/0", "a/9"])
    with pytest.raises(ConfigError, match="no volume is left for the subset; it holds the data sets a, o"):
        make_subset(store, out, split="test")
    with pytest.raises(ConfigError, match="no volume is left"):
        make_subset(store, out, subset="0.7K")
    with pytest.raises(ConfigError, match="is a scale of the chest"):
        make_subset(store, out, subset="6K")
    with pytest.raises(ConfigError, match="--folds 1"):
        make_subset(store, out, num_folds=1)
    with pytest.raises(ConfigError, match="lies inside the store"):
        make_subset(store, store.path / "volumes" / "sub.zarr")
    assert not out.exists()
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="exists and is not empty"):
        make_subset(store, tmp_path)
    (tmp_path / "empty.txt").write_text("# nothing\n")
    with pytest.raises(ConfigError, match="holds no case name"):
        read_case_list(tmp_path / "empty.txt")


def test_a_scale_of_the_paper_takes_its_data_sets(tmp_path: Path) -> None:
    root = create_store(tmp_path / "s.zarr", CONFIG.region)
    grid = ras_grid_at((8, 8, 8))
    for case in ("LiTS/0", "LiTS/1", "Task07_Pancreas/0", "btcv/0", "private/0"):
        write_volume(root, case, coordinate_volume((8, 8, 8)), None, grid, grid, CONFIG.region, Provenance("x", ""))
    store = open_store(root)
    small = make_subset(store, tmp_path / "small.zarr", subset="0.7K")
    assert open_store(tmp_path / "small.zarr").cases == ["LiTS/0", "LiTS/1", "Task07_Pancreas/0"]
    assert (small.expected["lits"], small.expected["msd07"], small.expected["ircad"]) == ((2, 131), (1, 281), (0, 22))
    larger = make_subset(store, tmp_path / "large.zarr", subset="8K", dry_run=True)
    assert larger.num_volumes == 4
    only = make_subset(store, tmp_path / "x.zarr", subset="8K", datasets=["BTCV"], dry_run=True)
    assert only.num_volumes == 1


# folds


@given(
    strata=st.lists(st.integers(1, 12), min_size=1, max_size=6),
    num_folds=st.integers(2, 6),
    seed=st.integers(0, 1000),
    order=st.randoms(use_true_random=False),
)
@settings(max_examples=60, deadline=None)
def test_folds_are_even_disjoint_and_a_function_of_the_names(
    strata: list[int], num_folds: int, seed: int, order: "np.random.Generator"
) -> None:
    rows = [
        (f"d{s // 2}/{n}-{s}", f"d{s // 2}", "tumor" if s % 2 else "organ")
        for s, size in enumerate(strata)
        for n in range(size)
    ]
    dealt = assign_folds(*(list(c) for c in zip(*rows, strict=True)), num_folds=num_folds, seed=seed)
    assert dealt.dtype == np.int8
    assert set(dealt.tolist()) <= set(range(num_folds))
    for key in {r[1:] for r in rows}:
        sizes = Counter(int(f) for f, r in zip(dealt, rows, strict=True) if r[1:] == key)
        counts = [sizes[fold] for fold in range(num_folds)]
        assert max(counts) - min(counts) <= 1
    whole = np.bincount(dealt, minlength=num_folds)
    assert whole.max() - whole.min() <= 1
    shuffled = list(rows)
    order.shuffle(shuffled)
    again = assign_folds(*(list(c) for c in zip(*shuffled, strict=True)), num_folds=num_folds, seed=seed)
    assert dict(zip([r[0] for r in shuffled], again.tolist(), strict=True)) == dict(
        zip([r[0] for r in rows], dealt.tolist(), strict=True)
    )


def test_another_seed_deals_otherwise() -> None:
    cases = [f"d/{n}" for n in range(40)]
    dealt = [assign_folds(cases, ["d"] * 40, ["tumor"] * 40, num_folds=5, seed=seed).tolist() for seed in (0, 0, 1)]
    assert dealt[0] == dealt[1] != dealt[2]
    assert dealt[0][:8] == [1, 3, 0, 0, 2, 3, 2, 3]  # part of every published split: must never change


def test_training_holds_a_fold_out(store: Store, tmp_path: Path) -> None:
    make_subset(store, tmp_path / "f.zarr", num_folds=3)
    folded = open_store(tmp_path / "f.zarr")
    fold_of = dict(zip(folded.cases, folded.index.column("fold").to_pylist(), strict=True))
    for fold in range(3):
        plan = Plan(CONFIG, folded, mix="mixed", held_out_fold=fold)
        seen = {r.case for epoch in range(4) for step in range(plan.batches_per_epoch) for r in plan.batch(epoch, step)}
        assert seen == {case for case, its_fold in fold_of.items() if its_fold != fold}
        plan = Plan(CONFIG, folded, mix="mixed", fold=fold)
        seen = {r.case for epoch in range(4) for step in range(plan.batches_per_epoch) for r in plan.batch(epoch, step)}
        assert seen == {case for case, its_fold in fold_of.items() if its_fold == fold}
        inside = rows_in(folded.index, fold=fold)
        outside = rows_in(folded.index, held_out_fold=fold)
        np.testing.assert_array_equal(inside, ~outside)
    with pytest.raises(ConfigError, match=r"--fold 3: no volume is in it \(folds of this store: 0, 1, 2\)"):
        Plan(CONFIG, folded, mix="mixed", held_out_fold=3)
    with pytest.raises(ConfigError, match="folds of this store: none"):
        Plan(CONFIG, store, mix="mixed", held_out_fold=-1)


def test_folds_stay_where_none_are_dealt(store: Store, tmp_path: Path) -> None:
    make_subset(store, tmp_path / "f.zarr", num_folds=3, seed=4)
    folded = open_store(tmp_path / "f.zarr")
    report = make_subset(folded, tmp_path / "g.zarr", datasets=["o"])
    assert sum(report.folds.values()) == 4
    again = open_store(tmp_path / "g.zarr")
    assert again.row("o/2")["fold"] == folded.row("o/2")["fold"]


def test_a_store_that_was_never_dealt_is_as_before(store: Store) -> None:
    image, label = organ_volume((20, 22, 24), tumor=True, seed=0)
    np.testing.assert_array_equal(store.read_volume("a/0").image, image)
    np.testing.assert_array_equal(store.read_volume("a/0").label, label)
    assert set(store.index.column("fold").to_pylist()) == {-1}
    assert store.volumes is store.location
