"""Several evaluations side by side: folds in a cell, paired tests by case, and evaluations that do not fit each other."""

import json
from dataclasses import replace
from statistics import fmean

import numpy as np
import pytest
from scipy import stats

from ftengine.config import EvaluationConfig
from ftengine.errors import ConfigError
from ftengine.evaluation.compare import compare, result_tables
from ftengine.evaluation.evaluate import Evaluation
from ftengine.evaluation.lesions import Lesions, ScoredLesion
from ftengine.evaluation.metrics import CaseScore, ClassScore
from ftengine.evaluation.tables import ResultTable


def _case(name: str, dice: float, *, found: bool = True, diameter_mm: float = 10.0, hd95_mm: float = 3.0) -> CaseScore:
    lesions = Lesions((ScoredLesion(diameter_mm, 1.0, found),), (ScoredLesion(9.0, 1.0, found),))
    tumor = ClassScore(dice, 10, 10, 5 if found else 0, hd95_mm if found else None, dice, lesions)
    return CaseScore(name, {"liver": ClassScore(0.9, 100, 100, 90, 1.0, 0.95), "liver_tumor": tumor})


def _healthy(name: str) -> CaseScore:
    tumor = ClassScore(None, 0, 0, 0, None, None, Lesions((), ()))
    return CaseScore(name, {"liver": ClassScore(0.9, 100, 100, 90, 1.0, 0.95), "liver_tumor": tumor})


def _folds(offset: float, dataset: str = "lits") -> list[Evaluation]:
    """Three folds of three ill volumes and a healthy one each."""
    rng = np.random.default_rng(3)
    folds = []
    for fold in range(3):
        dice = np.clip(rng.uniform(0.3, 0.8, 3) + offset, 0, 1).tolist()
        cases = [
            _case(f"{dataset}/{fold}{n}", d, found=n > 0, diameter_mm=10.0 + 20.0 * (n == 2), hd95_mm=9 - 8 * d)
            for n, d in enumerate(dice)
        ]
        folds.append(Evaluation([*cases, _healthy(f"{dataset}/{fold}h")]))
    return folds


def _by_title(tables: tuple[ResultTable, ...], start: str) -> ResultTable:
    return next(t for t in tables if t.title.startswith(start))


def test_a_cell_holds_the_figures_of_the_folds() -> None:
    methods = {"baseline": _folds(0.0), "FreeTumor": _folds(0.1)}
    tables = result_tables(methods)
    dice = _by_title(tables, "Dice")
    assert (dice.rows, dice.columns) == (("baseline", "FreeTumor"), ("liver", "liver_tumor"))
    means = [
        fmean(d for s in e.cases if (d := s.classes["liver_tumor"].dice) is not None) for e in methods["FreeTumor"]
    ]
    assert dice.cell("FreeTumor", "liver_tumor").values == pytest.approx(means)
    text = dice.text("FreeTumor", "liver_tumor")
    assert text == f"{100 * np.mean(means):.1f} ({100 * min(means):.1f}, {100 * max(means):.1f})"
    hd95 = _by_title(tables, "HD95")
    assert hd95.order == "lower"
    assert hd95.digits == 2
    small = _by_title(tables, "Sensitivity for small lesions, d < 2 cm")
    assert small.columns == ("liver_tumor",)
    assert small.text("baseline", "liver_tumor") == "50.0 \N{PLUS-MINUS SIGN} 0.0"
    sizes = _by_title(tables, "True lesions by size")
    assert [sizes.cell(row, "liver_tumor").mean for row in sizes.rows] == [6, 3]  # each case once, whatever the methods
    assert "detection" not in {t.title.lower() for t in tables}
    json.dumps([t.to_json() for t in tables], allow_nan=False)


def test_data_sets_have_columns_of_their_own() -> None:
    both = [Evaluation([*a.cases, *b.cases]) for a, b in zip(_folds(0.0), _folds(0.1, "ircad"), strict=True)]
    tables = result_tables({"baseline": both})
    dice = _by_title(tables, "Dice")
    assert dice.columns == ("ircad liver", "lits liver", "ircad liver_tumor", "lits liver_tumor")
    alone = _by_title(result_tables({"baseline": _folds(0.1, "ircad")}), "Dice")
    assert dice.cell("baseline", "ircad liver_tumor") == alone.cell("baseline", "liver_tumor")


def test_tests_pair_by_case_and_list_who_has_no_partner() -> None:
    baseline, better = _folds(0.0), _folds(0.07)
    better[1].cases[0] = _case("lits/10", 0.95)
    better[0].cases.append(_case("lits/extra", 0.5))
    del baseline[2].cases[1]
    comparison = compare({"baseline": baseline, "better": better})
    test = next(t for t in comparison.tests if (t.class_name, t.measure) == ("liver_tumor", "dice"))
    a, b = (
        {s.case: dice for e in m for s in e.cases if (dice := s.classes["liver_tumor"].dice) is not None}
        for m in (better, baseline)
    )
    shared = sorted(set(a) & set(b))
    assert test.tests.num_pairs == len(shared) == 8
    expected = stats.ttest_rel([a[c] for c in shared], [b[c] for c in shared]).pvalue
    assert test.tests.t_pvalue == pytest.approx(expected, rel=1e-9)
    assert test.tests.mean_difference == pytest.approx(np.mean([a[c] - b[c] for c in shared]))
    assert comparison.unpaired == {
        "better": {"only in better": ["lits/21", "lits/extra"], "only in baseline": []},
    }
    hd95 = next(t for t in comparison.tests if (t.class_name, t.measure) == ("liver_tumor", "hd95_mm"))
    assert hd95.tests.num_pairs == 5  # found by both; one of six is gone
    same = next(t for t in comparison.tests if (t.class_name, t.measure) == ("liver", "dice"))
    assert (same.tests.t_pvalue, same.tests.wilcoxon_pvalue, same.tests.mean_difference) == (None, None, 0.0)
    json.dumps(comparison.to_json(), allow_nan=False)


def test_repeats_of_a_case_count_as_their_mean() -> None:
    once = [Evaluation([_case("a", 0.5), _case("b", 0.25)])]
    twice = [Evaluation([_case("a", 0.25), _case("b", 0.5)]), Evaluation([_case("a", 0.75), _case("b", 1.0)])]
    comparison = compare({"once": once, "twice": twice})
    test = next(t for t in comparison.tests if (t.class_name, t.measure) == ("liver_tumor", "dice"))
    assert (test.tests.num_pairs, test.tests.mean_difference) == (2, 0.25)


def test_failed_cases_are_counted_in_every_table() -> None:
    whole = Evaluation([_case("a", 0.5), _case("b", 0.25)], {"c": "broken"})
    lacking = Evaluation([_case("b", 0.75)], {"a": "has no prediction", "c": "broken"})
    *tables, sizes = result_tables({"whole": [whole], "lack_ing": [lacking]})
    wanted = (
        "whole: 1 of 3 cases failed and are not in these figures.",
        "lack_ing: 2 of 3 cases failed and are not in these figures.",
    )
    for table in tables:
        assert table.notes == wanted
        assert r"lack\_ing: 2 of 3 cases failed" in table.to_markdown()
        assert r"lack\_ing: 2 of 3 cases failed" in table.to_latex()
        assert table.to_json()["notes"] == list(wanted)
        assert wanted[1] in str(table.to_rich().caption)
    assert sizes.notes[1] == "1 of 3 cases failed for every method and are not in these figures."  # a is counted
    assert not any("failed" in n for t in result_tables({"m": _folds(0.0)}) for n in t.notes)


def test_evaluations_that_do_not_fit_are_refused() -> None:
    fold = _folds(0.0)[0]
    other = replace(fold, settings=EvaluationConfig(tolerance_mm=1.0))
    with pytest.raises(ConfigError, match=r"different definitions \(tolerance_mm: 1.0 against 2.0\)"):
        compare({"a": [fold], "b": [other]})
    chest = Evaluation([CaseScore("x", {"lung": ClassScore(0.9, 1, 1, 1)})])
    with pytest.raises(ConfigError, match="scores the classes lung, "):
        compare({"a": [fold], "b": [chest]})
    with pytest.raises(ConfigError, match="holds no scored case"):
        compare({"a": [fold], "b": [Evaluation()]})
