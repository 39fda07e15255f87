"""Plans cut into units: what is shared, what a change renames, what a training reads."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ftengine.errors import ConfigError
from ftengine.experiments.plan import Plan, choose, load_plan, plan_names
from ftengine.experiments.run import opened
from ftengine.experiments.stores import (
    draw_phantoms,
    find_stores,
    keep_paths,
    make_subset,
    overlap_notes,
    phantom_store,
    subset_path,
)
from ftengine.experiments.units import Work, cut
from ftengine.store.reader import Store, open_store
from tests.experiments.support import plan_of, plan_values, rows_of_many, store_of

FREE = plan_values()["methods"]["free"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return store_of(tmp_path_factory.mktemp("s"), "demo", {"a": (5, "tumor"), "b": (2, "tumor"), "o": (3, "organ")})


def _cut(store: Store, plan: Plan | None = None, **changes: Any) -> Work:
    plan = plan_of(**changes) if plan is None else plan
    return cut(plan, choose(plan), dict.fromkeys(plan.stores, store))


def _keys(work: Work, kind: str) -> set[str]:
    return {key for key, unit in work.units.items() if unit.kind == kind}


def test_s_is_trained_once_for_all_that_need_it(store: Store) -> None:
    work = _cut(store)
    assert Counter(u.kind for u in work.units.values()) == {
        "segmenter": 2,
        "generator": 2,
        "student": 2,
        "evaluation": 4,
    }
    for key in _keys(work, "student"):
        unit = work.units[key]
        generator = work.units[unit.spec["generator"]]
        assert unit.spec["judge"] == generator.spec["baseline"]
        assert unit.spec["fold"] == generator.spec["fold"] == work.units[unit.spec["judge"]].spec["fold"]
    places = list(work.units)
    assert all(places.index(need) < places.index(key) for key, unit in work.units.items() for need in unit.needs)


def test_methods_that_differ_in_the_student_alone_share_g(store: Store) -> None:
    methods = {"plain": {}, "free": FREE, "strict": {**FREE, "set": {"qc.threshold": 0.9}}}
    work = _cut(store, methods=methods)
    assert (len(_keys(work, "generator")), len(_keys(work, "student"))) == (2, 4)


def test_a_change_renames_what_it_changes_and_what_comes_of_it(store: Store) -> None:
    before = _cut(store)
    cases: tuple[tuple[dict[str, Any], set[str]], ...] = (
        ({"methods": {"plain": {}, "free": {**FREE, "set": {"qc.threshold": 0.9}}}}, {"student"}),
        (
            {
                "methods": {
                    "plain": {},
                    "free": {**FREE, "generator": {**FREE["generator"], "set": {"generator.width": 6}}},
                }
            },
            {"generator", "student"},
        ),
        ({"set": {"training.steps": 5, "synthesis.fraction": 0.5}}, {"generator", "student"}),
        ({"set": {"training.steps": 6}}, {"segmenter", "generator", "student"}),
        ({"seed": 1}, {"segmenter", "generator", "student"}),
        ({"folds": {"number": 2, "seed": 3}}, {"segmenter", "generator", "student"}),
    )
    for changes, renamed in cases:
        after = _cut(store, **changes)
        for kind in ("segmenter", "generator", "student"):
            assert (_keys(before, kind) != _keys(after, kind)) == (kind in renamed), (changes, kind)
        assert _keys(before, "evaluation") != _keys(after, "evaluation")


@pytest.mark.parametrize(
    "changes",
    [
        {"title": "Another"},
        {"set": {"training.steps": 5, "training.log_every": 3, "loader.reader_threads": 4, "tracking.use": []}},
        {"set": {"training.steps": 5, "qc.threshold": 0.5}},  # that of the preset
        {"measures": ["dice", "f1"]},
        {"methods": {"plain": {"title": "S"}, "free": {**FREE, "title": "F"}}},
    ],
)
def test_what_decides_nothing_renames_nothing(store: Store, changes: dict[str, Any]) -> None:
    assert set(_cut(store, **changes).units) == set(_cut(store).units)


def test_how_a_model_is_scored_renames_evaluations_alone(store: Store) -> None:
    before, after = (
        _cut(store),
        _cut(store, set={"training.steps": 5, "inference.overlap": 0.5, "evaluation.small_mm": 10.0}),
    )
    for kind in ("segmenter", "generator", "student"):
        assert _keys(before, kind) == _keys(after, kind)
    assert not _keys(before, "evaluation") & _keys(after, "evaluation")


def test_names_do_not_depend_on_where_a_store_lies(store: Store, tmp_path: Path) -> None:
    other = store_of(tmp_path, "demo", {"a": (5, "tumor"), "b": (2, "tumor"), "o": (3, "organ")}, name="elsewhere")
    assert set(_cut(store).units) == set(_cut(other).units)


def test_a_store_with_other_volumes_renames_what_reads_them(store: Store, tmp_path: Path) -> None:
    more = store_of(tmp_path, "demo", {"a": (5, "tumor"), "b": (2, "tumor"), "o": (4, "organ")})
    before, after = _cut(store), _cut(more)
    assert _keys(before, "segmenter") == _keys(after, "segmenter")  # it reads the annotated ones alone
    assert not _keys(before, "generator") & _keys(after, "generator")


def test_a_training_reads_its_task_in_folds_and_unlabelled_volumes_in_none(store: Store, tmp_path: Path) -> None:
    work = _cut(store)
    student = work.units[next(iter(_keys(work, "student")))]
    make_subset(tmp_path, store, work.rows[student.spec["store"]])
    subset = open_store(subset_path(tmp_path, student.spec["store"]))
    folds = dict(zip(subset.cases, subset.column("fold").to_pylist(), strict=True))
    assert {c for c, f in folds.items() if f == -1} == {"o/0", "o/1", "o/2"}
    assert sorted(f for c, f in folds.items() if c.startswith("a/")) in ([0, 0, 0, 1, 1], [0, 0, 1, 1, 1])
    assert not any(c.startswith("b/") for c in folds)
    held_out = [work.units[s.unit].spec["cases"] for s in work.scores if s.method == "free"]
    assert sorted(c for cases in held_out for c in cases) == [f"a/{k}" for k in range(5)]
    fold = student.spec["fold"]
    assert set(held_out[fold]) == {c for c, f in folds.items() if f == fold}
    np.testing.assert_array_equal(subset.read_volume("a/0").label, store.read_volume("a/0").label)


def test_a_subset_is_kept_and_made_anew_when_its_store_has_moved(store: Store, tmp_path: Path) -> None:
    work = _cut(store)
    rows = next(iter(work.rows.values()))
    make_subset(tmp_path, store, rows)
    file = subset_path(tmp_path, rows.key) / "zarr.json"
    written = file.stat().st_mtime_ns
    make_subset(tmp_path, store, rows)
    assert file.stat().st_mtime_ns == written
    moved = store_of(tmp_path / "new", "demo", {"a": (5, "tumor"), "b": (2, "tumor"), "o": (3, "organ")})
    make_subset(tmp_path, moved, rows)
    assert open_store(file.parent).volumes.seen_from(moved.location) == "."


def test_targets_are_scored_whole_and_once_a_model(store: Store) -> None:
    work = _cut(
        store,
        tasks={"home": {"store": "liver", "datasets": ["a"], "targets": ["away"]}},
        targets={"away": {"store": "liver", "datasets": ["b"]}},
        folds=None,
        repeats=2,
    )
    scores = [s for s in work.scores if s.column == "home/away"]
    assert {(s.method, s.fold, s.repeat) for s in scores} == {(m, None, r) for m in ("plain", "free") for r in (0, 1)}
    assert all(work.units[s.unit].spec["cases"] == ["b/0", "b/1"] for s in scores)
    assert len(work.scores) == len(scores)  # nothing of home is held out


def test_folds_of_the_store(store: Store) -> None:
    with pytest.raises(ConfigError, match=r"fold 0 of 2 empty.*folds.dealt: here"):
        _cut(store, folds={"number": 2, "dealt": "store"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"tasks": {"home": {"store": "liver", "datasets": ["lits"]}}},
            "holds no volume of lits .*LiTS is published: https",
        ),
        ({"tasks": {"home": {"store": "liver", "datasets": ["a"], "split": "x"}}}, "in split 'x'"),
        ({"folds": {"number": 7}}, "5 annotated volumes leave fold 5 of 7 empty"),
        ({"methods": {"plain": {}, "c": {"paints": "constant", "unlabelled": {"datasets": ["z"]}}}}, "no volume of z"),
        (
            {"methods": {"plain": {}, "c": {"paints": "constant", "unlabelled": {"scales": ["8K"]}}}},
            "no unlabelled volume",
        ),
        ({"set": {"training.stepz": 5}}, "segmenter of home, fold 0: .*Did you mean training.steps"),
        (
            {"methods": {"plain": {}, "c": {"paints": "syntumor", "set": {"synthesis.paste": "contrast"}}}},
            "paste with synthesizer=syntumor",
        ),
    ],
)
def test_what_the_stores_cannot_give_is_refused_before_anything_runs(
    store: Store, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        _cut(store, **changes)


def test_a_missing_store_is_named_with_its_tasks_and_sources(tmp_path: Path) -> None:
    plan = load_plan("table-a8")
    with pytest.raises(ConfigError) as caught:
        find_stores(plan, ["lits", "msd06"], tmp_path, {"chest": "c.zarr"})
    text = str(caught.value)
    assert "store 'liver': no path is known; the tasks lits need it: a store of the region abdomen-liver" in text
    assert "hcc-tace: HCC-TACE is published: https://cancerimagingarchive.net/collection/hcc-tace (CC BY 4.0)" in text
    assert "unlabelled volumes of the scale 20K" in text
    assert "chest" not in text
    with pytest.raises(ConfigError, match="--store lung: the plan has the stores liver, pancreas, kidney, chest"):
        find_stores(plan, ["lits"], tmp_path, {"lung": "x"})


def test_paths_are_remembered_and_can_be_replaced(tmp_path: Path) -> None:
    plan = plan_of()
    paths = find_stores(plan, ["home"], tmp_path, {"liver": str(tmp_path / "a.zarr")})
    keep_paths(tmp_path, paths)
    assert find_stores(plan, ["home"], tmp_path, {}) == paths
    assert find_stores(plan, ["home"], tmp_path, {"liver": "s3://b/c"}) == {"liver": "s3://b/c"}


def test_phantoms_are_drawn_once_and_anew_where_the_plan_changes(tmp_path: Path) -> None:
    def draw(seed: int) -> str:
        drawn = {
            "seed": seed,
            "shape_zyx": [16, 20, 20],
            "spacing_mm_zyx": [8.0, 8.0, 8.0],
            "sets": {"a": {"num_volumes": 1, "num_ill": 1, "first_case": 0}},
        }
        plan = plan_of(stores={"liver": {"preset": "demo", "phantoms": drawn}})
        path = draw_phantoms(plan, tmp_path, find_stores(plan, ["home"], tmp_path, {}))["liver"]
        sha: str = open_store(path).column("source_sha256")[0].as_py()
        return sha

    first, file = draw(0), phantom_store(tmp_path, "liver") / "zarr.json"
    written = file.stat().st_mtime_ns
    assert draw(0) == first
    assert file.stat().st_mtime_ns == written
    assert draw(1) != first  # as many volumes, but others


def test_predictions_are_named_by_what_their_files_hold(store: Store, tmp_path: Path) -> None:
    def key(place: Path) -> str:
        external = {"x": {"note": "n", "predictions": str(place / "p"), "truth": str(place / "t")}}
        return next(iter(_keys(_cut(store, external=external, methods={"plain": {}}), "predictions")))

    def fill(place: Path) -> Path:
        for name in ("p/a.nii", "p/b.mhd", "p/b.raw", "t/a.nii", "t/a_ct.nii"):
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_bytes(name.encode())
        return place

    empty = key(tmp_path / "one")
    one = fill(tmp_path / "one")
    first = key(one)
    assert first != empty
    assert key(one) == first
    (one / "t" / "a_ct.nii").write_bytes(b"a CT is not scored")
    assert key(one) == first
    seen = {empty, first}
    for name in ("p/a.nii", "p/b.raw", "t/a.nii"):
        (one / name).write_bytes(b"another")
        seen.add(key(one))
    assert len(seen) == 5


def test_data_sets_that_share_volumes_are_told() -> None:
    assert overlap_notes(load_plan("table-a8"), ["lits", "msd07"]) == [
        "lits to ircad: the training volumes of LiTS hold those of 3D-IRCADb-01",
        "msd07 to panorama: 194 of its volumes come from MSD07-Pancreas",
    ]


def test_what_a_store_lacks_is_left_out_of_a_status(store: Store, tmp_path: Path) -> None:
    plan = plan_of(
        stores={"liver": {"preset": "demo"}, "other": {"preset": "demo"}},
        tasks={
            "home": {"store": "liver", "datasets": ["a"]},
            "lits": {"store": "liver", "datasets": ["lits"]},  # not in the store
            "far": {"store": "other", "datasets": ["a"]},  # no store is known
        },
    )
    given = {"liver": str(store.path)}
    with opened(plan, tmp_path, given=given, writes=False, known_only=True) as experiment:
        assert {s.task for s in experiment.chosen.scores} == {"home"}
        assert len(experiment.status().missing) == 10
    with pytest.raises(ConfigError, match="store 'other': no path"), opened(plan, tmp_path, given=given, writes=False):
        pass


@pytest.fixture(scope="module")
def paper_stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Store]:
    folder = tmp_path_factory.mktemp("paper")
    holds = {
        "liver": ("abdomen-liver", ("lits", "hcc-tace", "ircad"), ("msd07", "btcv", "abdomenatlas", "mela")),
        "pancreas": ("abdomen-pancreas", ("msd07", "panorama", "qubiq"), ("lits", "btcv", "abdomenatlas", "mela")),
        "kidney": ("abdomen-kidney", ("kits21", "kits23", "kipa"), ("lits", "btcv", "abdomenatlas", "mela")),
        "chest": ("chest", ("msd06", "rider", "cv19-20"), ("lidc", "ct-rate", "nlst")),
    }
    return {
        name: rows_of_many(
            folder, preset, {**dict.fromkeys(ill, (5, "tumor")), **dict.fromkeys(organs, (1, "organ"))}, name=name
        )
        for name, (preset, ill, organs) in holds.items()
    }


NUM_UNITS = {  # segmenters, generators, students, evaluations
    "table-a5": (4 * 60, 60, 60, 5 * 60),
    "table-a6": (60, 60, 2 * 60 + 15, 3 * 60 + 15),
    "table-a8": (4 * 20, 20, 20 + 5, (5 * 6 + 2) * 5),
    "table-a10": (4 * 60, 60, 60, 5 * 60),
    "table-a12": (75, 75, 4 * 75, 5 * 75),
    "table-a13": (50, 50, 3 * 50, 4 * 50),
    "table-a14": (75, 75, 75 + 2 * 25, 2 * 75 + 2 * 25),
    "table-a15": (25, 25, 5 * 25, 6 * 25),
    "table-a16": (25, 3 * 25, 4 * 25, 5 * 25),
}


@pytest.mark.parametrize("name", [n for n in plan_names() if n != "phantoms"])
def test_every_shipped_table_can_be_cut(name: str, paper_stores: dict[str, Store]) -> None:
    plan = load_plan(name)
    work = cut(plan, choose(plan), paper_stores)
    counts = Counter(u.kind for u in work.units.values())
    assert tuple(counts[kind] for kind in ("segmenter", "generator", "student", "evaluation")) == NUM_UNITS[name]


def test_tables_share_what_they_have_in_common(paper_stores: dict[str, Store]) -> None:
    def keys(name: str, *kinds: str) -> set[str]:
        plan = load_plan(name)
        units = cut(plan, choose(plan), paper_stores).units
        return {key for key, unit in units.items() if unit.kind in kinds}

    trained = ("segmenter", "generator", "student")
    assert keys("table-a10", *trained, "evaluation") == keys("table-a5", *trained, "evaluation")
    assert keys("table-a6", "generator") == keys("table-a5", "generator")
    shared = keys("table-a15", *trained) & keys("table-a16", *trained)
    assert Counter(key.split("-", maxsplit=1)[0] for key in shared) == {"segmenter": 25, "generator": 25, "student": 50}


def test_no_target_is_among_the_unlabelled_volumes(paper_stores: dict[str, Store]) -> None:
    plan = load_plan("table-a8")
    work = cut(plan, choose(plan, tasks=["lits"], methods=["freetumor"]), paper_stores)
    student = next(u for u in work.units.values() if u.kind == "student")
    rows = work.rows[student.spec["store"]].rows
    names = {paper_stores["liver"].cases[row].split("/")[0] for row in rows.tolist()}
    assert names == {"lits", "msd07", "btcv", "abdomenatlas", "mela"}
