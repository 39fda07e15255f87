"""Tables from results: cells, folds and repeats, pools, tests, what is not done."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from ftengine.errors import ConfigError
from ftengine.evaluation.evaluate import Evaluation
from ftengine.evaluation.metrics import CaseScore, FullScoring, score_case, summarize
from ftengine.experiments.collect import Results, collect, keep_scores, write_results
from ftengine.experiments.folder import PLAN, result_file
from ftengine.experiments.units import Score
from ftengine.files import write_json_whole, write_text_whole
from tests.experiments.support import plan_values

FULL = FullScoring((3.0, 3.0, 3.0), (2,))
LABELS = {"background": 0, "liver": 1, "liver_tumor": 2}
FEW = {"plain": {"title": "Plain"}, "other": {"title": "Other"}}


def _scored(case: str, seed: int, *, healthy: bool = False) -> CaseScore:
    rng = np.random.default_rng(seed)
    truth = np.zeros((10, 20, 20), dtype=np.uint8)
    if not healthy:
        truth[2:5, 2:6, 2:6] = 2
        truth[6:9, 8 : 9 + rng.integers(2, 10), 8:16] = 2
    predicted = np.where(rng.random(truth.shape) < 0.7, truth, 0).astype(np.uint8)
    if seed % 3 == 0:
        predicted[:5] = 0  # one lesion is missed
    return score_case(case, predicted, truth, LABELS, FULL)


def _experiment(folder: Path, evaluations: Mapping[Any, list[CaseScore]], **changes: Any) -> Results:
    """A folder as a run leaves it. evaluations: (method, column, fold, repeat) -> scored cases; an empty list is not done."""
    import yaml

    write_text_whole(folder / PLAN, yaml.safe_dump(plan_values(**{"methods": FEW, **changes}), sort_keys=False))
    scores = []
    for number, ((method, column, fold, repeat), cases) in enumerate(evaluations.items()):
        scores.append(Score(method, column, column.split("/")[0], fold, repeat, f"evaluation-{number}"))
        if cases:
            write_json_whole(result_file(folder, f"evaluation-{number}"), {"evaluation": Evaluation(cases).to_json()})
    keep_scores(folder, scores)
    return collect(folder)


def _cases(seed: int, number: int = 4, prefix: str = "a") -> list[CaseScore]:
    return [_scored(f"{prefix}/{k}", 10 * seed + k) for k in range(number)]


def _dice(cases: list[CaseScore]) -> list[float]:
    return [c.classes["liver_tumor"].dice or 0.0 for c in cases]


def test_a_cell_has_a_value_a_fold(tmp_path: Path) -> None:
    folds = [_cases(1), _cases(2, prefix="b")]
    results = _experiment(tmp_path, {("plain", "home", f, 0): folds[f] for f in (0, 1)})
    cell = results.tables["dice"].cell("Plain", "home")
    assert cell.values == pytest.approx([np.mean(_dice(f)) for f in folds])
    assert results.tables["dice"].cell("Other", "home").values == ()


@pytest.mark.parametrize("measure", ["dice", "surface_dice", "hd95_mm", "sensitivity", "specificity", "f1"])
def test_measures_are_those_of_evaluate(tmp_path: Path, measure: str) -> None:
    cases = [*_cases(1), _scored("a/9", 9, healthy=True)]
    results = _experiment(tmp_path, {("plain", "home", 0, 0): cases}, measures=[measure])
    expected = summarize(cases)["liver_tumor"][measure]
    assert results.tables[measure].cell("Plain", "home").values == pytest.approx((expected,))


def test_lesions_and_small_lesions_are_those_of_evaluate(tmp_path: Path) -> None:
    cases = _cases(3, 6)
    results = _experiment(
        tmp_path, {("plain", "home", 0, 0): cases}, measures=["lesion_sensitivity", "small_sensitivity"]
    )
    lesions = summarize(cases)["liver_tumor"]["lesions"]
    assert lesions["by_size"]["small"]["num_truth"] not in (0, lesions["num_truth"])
    assert results.tables["lesion_sensitivity"].cell("Plain", "home").mean == lesions["sensitivity"]
    assert results.tables["small_sensitivity"].cell("Plain", "home").mean == lesions["by_size"]["small"]["sensitivity"]


def test_with_repeats_a_value_is_the_mean_of_a_repeats_folds(tmp_path: Path) -> None:
    values = {("plain", "home", f, r): _cases(2 * r + f + 1) for r in range(3) for f in (0, 1)}
    values["plain", "home", 1, 2] = []  # the last repeat is not whole
    results = _experiment(tmp_path, values, repeats=3, spread="deviation")
    expected = [np.mean([np.mean(_dice(values["plain", "home", f, r])) for f in (0, 1)]) for r in (0, 1)]
    table = results.tables["dice"]
    assert table.cell("Plain", "home").values == pytest.approx(expected)
    assert "Plain, home: 5 of 6 evaluations are done." in table.notes
    assert (results.num_scores, results.num_done) == (6, 5)


def test_a_column_may_pool_tasks(tmp_path: Path) -> None:
    tasks = {"home": {"store": "liver", "datasets": ["a"]}, "away": {"store": "liver", "datasets": ["b"]}}
    here, there = _cases(1, 2), _cases(2, 5, "b")
    values = {
        ("plain", "home", 0, 0): here,
        ("plain", "away", 0, 0): there,
        ("plain", "home", 1, 0): _cases(3),
        ("plain", "away", 1, 0): [],
    }
    results = _experiment(tmp_path, values, tasks=tasks, columns={"Both": ["home", "away"]})
    assert results.tables["dice"].columns == ("Both",)
    assert results.tables["dice"].cell("Plain", "Both").values == pytest.approx(
        [np.mean(_dice([*here, *there]))]
    )  # fold 1 is not whole


def test_a_pool_without_one_of_its_tasks_is_empty_and_noted(tmp_path: Path) -> None:
    tasks = {"home": {"store": "liver", "datasets": ["a"]}, "away": {"store": "liver", "datasets": ["b"]}}
    methods = {"plain": {"title": "Plain"}, "other": {"title": "Other", "tasks": ["home"]}}
    cases = _cases(1)
    results = _experiment(
        tmp_path,
        {(m, "home", 0, 0): cases for m in methods},
        tasks=tasks,
        methods=methods,
        columns={"Both": ["home", "away"]},
    )
    table = results.tables["dice"]
    assert table.cell("Plain", "Both").values == ()
    assert table.cell("Other", "Both").values == pytest.approx([np.mean(_dice(cases))])  # away is none of its tasks
    assert table.notes[0] == "Plain, Both: empty, for away cannot be scored."
    assert not any(text.startswith("Other, Both") for text in table.notes)
    assert results.tests == []


def test_methods_are_tested_against_the_baseline_case_by_case(tmp_path: Path) -> None:
    ours = {f: _cases(4 + f, 5, str(f)) for f in (0, 1)}
    theirs = {f: list(reversed(_cases(1 + f, 5, str(f)))) for f in (0, 1)}  # pairs go by name, not by place
    results = _experiment(
        tmp_path, {(m, "home", f, 0): v[f] for m, v in (("other", ours), ("plain", theirs)) for f in (0, 1)}
    )
    a = [d for f in (0, 1) for d in _dice(ours[f])]
    b = [d for f in (0, 1) for d in _dice(theirs[f][::-1])]
    test = results.tests[0]
    assert (test["method"], test["column"], test["num_pairs"]) == ("other", "home", 10)
    assert test["mean_difference"] == pytest.approx(np.mean(a) - np.mean(b))
    assert test["t_pvalue"] == pytest.approx(stats.ttest_rel(a, b).pvalue)
    assert test["wilcoxon_pvalue"] == pytest.approx(stats.wilcoxon(a, b).pvalue)
    assert results.tables["dice-difference"].cell("Other", "home").mean == test["mean_difference"]
    assert results.tables["dice-t-test"].cell("Other", "home").mean == test["t_pvalue"]


def test_targets_have_columns_of_their_own_and_overlaps_are_noted(tmp_path: Path) -> None:
    tasks = {"lits": {"title": "LiTS", "store": "liver", "datasets": ["lits"], "targets": ["ircad"]}}
    targets = {"ircad": {"title": "IRCAD", "store": "liver", "datasets": ["ircad"]}}
    results = _experiment(
        tmp_path, {("plain", "lits/ircad", None, 0): _cases(1)}, tasks=tasks, targets=targets, folds=None, paper="A8"
    )
    table = results.tables["dice"]
    assert table.columns == ("LiTS to IRCAD",)
    assert "lits to ircad: the training volumes of LiTS hold those of 3D-IRCADb-01" in table.notes
    paper = results.tables["paper"]
    assert paper.cell("FreeTumor", "LiTS to IRCAD").values == (0.716,)
    assert "as printed" in paper.title


def test_others_without_predictions_are_named_and_have_no_row(tmp_path: Path) -> None:
    results = _experiment(
        tmp_path, {("plain", "home", 0, 0): _cases(1)}, external={"nn": {"title": "nnUNet", "note": "not trained here"}}
    )
    assert "nnUNet: not trained here." in results.tables["dice"].notes
    assert results.tables["dice"].rows == ("Plain", "Other")


def test_files_hold_all_tables_and_escape_titles(tmp_path: Path) -> None:
    methods = {"plain": {"title": "=A1 <b>|_x"}, "other": {"title": "Other"}}
    results = _experiment(
        tmp_path, {(m, "home", 0, 0): _cases(k) for k, m in enumerate(methods, 1)}, methods=methods, paper="A5"
    )
    write_results(tmp_path, results)
    assert r"=A1 \<b\>\|\_x" in (tmp_path / "table.md").read_text()
    assert r"=A1 \textless{}b\textgreater{}\textbar{}\_x" in (tmp_path / "table.tex").read_text()
    assert "'=A1" in (tmp_path / "table.csv").read_text()
    document = json.loads((tmp_path / "table.json").read_text())
    assert set(document["tables"]) == {"dice", "dice-difference", "dice-t-test", "dice-wilcoxon", "paper"}


def test_a_folder_that_holds_no_experiment_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no experiment"):
        collect(tmp_path)
