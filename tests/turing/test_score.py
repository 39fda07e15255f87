"""Scoring: what was scripted comes out, in every format, and nothing is scored that cannot be trusted."""

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ftengine.errors import ConfigError, StoreError
from ftengine.store.reader import Store
from ftengine.turing.answers import GivenAnswer, Journal
from ftengine.turing.build import ReaderName
from ftengine.turing.score import Attendance, Score, ScoredAnswer, answers_csv, score_studies, write_score
from ftengine.turing.study import Key, Showing, StudyFolder, read_key
from tests.turing.support import TWO_READERS, answer_of, make_study

Say = Callable[[Showing, bool], tuple[bool, int]]


def answer_all(folder: StudyFolder, key: Key, reader: int, say: Say, *, stop: int | None = None, **more: Any) -> None:
    """One reader answers in order: ``say`` (showing, is synthetic) -> (called synthetic, confidence)."""
    journal = Journal(folder, folder.study.readers[reader])
    for number, showing in enumerate(folder.study.readers[reader].showings[:stop]):
        synthetic, confidence = say(showing, key.truth[showing.case].synthetic)
        given = answer_of(folder, reader, number, synthetic=synthetic, confidence=confidence, **more)
        journal.submit(GivenAnswer.model_validate(given))
    journal.close()


def test_scripted_answers_come_out_as_they_were_meant(turing_store: Store, tmp_path: Path) -> None:
    built, folder = make_study(turing_store, tmp_path, per_type=6, repeats=4, training_cases=2)
    key = read_key(built.key)
    answer_all(folder, key, 0, lambda _s, truth: (truth, 5))  # always right, and certain
    answer_all(folder, key, 1, lambda s, _t: (s.repeat, 1))  # everything is real, and the second time synthetic
    score = score_studies([folder.path], [built.key])
    document = score.to_json()
    ada, ben = document["readers"]
    assert [ada[n]["mean"] for n in ("sensitivity", "specificity", "accuracy", "auc")] == [1.0] * 4
    assert [ben[n]["mean"] for n in ("sensitivity", "specificity", "accuracy", "auc")] == [0.0, 1.0, 0.5, 0.5]
    assert (ada["accuracy"]["num"], ada["accuracy"]["of"]) == (6, 6)
    assert ada["accuracy"]["low"] == pytest.approx(0.025 ** (1 / 6))  # Clopper-Pearson of 6 of 6
    assert (ada["kappa_of_repeats"], ada["num_repeats"]) == (1.0, 4)
    assert (ben["kappa_of_repeats"], ben["num_repeats"]) == (0.0, 4)
    assert document["groups"] == {
        "Junior": {"num_readers": 1, "sensitivity": 1.0, "specificity": 1.0, "accuracy": 1.0},
        "Senior": {"num_readers": 1, "sensitivity": 0.0, "specificity": 1.0, "accuracy": 0.5},
    }
    # each synthetic tumour: one of two readers called it real, which is not more than half
    assert document["passed"] == {
        "liver": {"passed": 0, "undecided": 3, "synthetic": 3},
        "Total": {"passed": 0, "undecided": 3, "synthetic": 3},
    }
    # 3 cases with two votes alike, 3 with one each: P = 0.5, categories 9 of 12 and 3 of 12, P_e = 0.625
    assert document["fleiss_kappa"] == pytest.approx((0.5 - 0.625) / (1 - 0.625))
    assert document["num_cases_of_all_readers"] == 6
    assert document["total"]["intervals"]["accuracy"]["mean"] == pytest.approx(0.75)
    assert ada["median_s"] == pytest.approx(_median_time(folder, 0))
    assert document["notes"] == []
    json.dumps(document, allow_nan=False)


def _median_time(folder: StudyFolder, reader: int) -> float:
    shown = folder.study.readers[reader].showings
    times = sorted(1.5 + n for n, s in enumerate(shown) if not s.training and not s.repeat)
    return (times[2] + times[3]) / 2


def test_a_majority_of_readers_decides_who_passes(turing_store: Store, tmp_path: Path) -> None:
    readers = [ReaderName(f"r{n}") for n in range(3)]
    built, folder = make_study(turing_store, tmp_path, per_type=4, readers=readers)
    key = read_key(built.key)
    first, second = sorted(case for case, truth in key.truth.items() if truth.synthetic)
    for reader in range(3):
        # the first is called real by two of three, the second by one
        real = {first} if reader else {first, second}
        called_real = real if reader < 2 else set()
        answer_all(folder, key, reader, lambda s, t, r=frozenset(called_real): (t and s.case not in r, 3))  # type: ignore[misc]  # a default binds the loop's value
    score = score_studies([folder.path], [built.key])
    assert score.passed() == (1, 0, 2)
    table = score.tables["passed"]
    assert [table.text("Total", c) for c in table.columns] == ["1", "0", "2"]


def test_fig_2_f_is_28_of_45_which_is_62_2_and_not_the_printed_62_3() -> None:
    """13 readers: seven who call a tumour real make it pass, six do not."""
    readers = [f"R{n}" for n in range(13)]
    answers = tuple(
        _said(reader, f"case {case}", real=place < (7 if case < 28 else 6))
        for case in range(45)
        for place, reader in enumerate(readers)
    )
    score = Score(answers, tuple(Attendance(r, "", 45, 45) for r in readers), ("all",), ("paper",))
    assert score.passed() == (28, 0, 45)
    assert score.tables["passed"].notes[-1] == "Total: 62.2 % (28 of 45, exact 95 % interval 46.5 to 76.2)"


def _said(reader: str, case: str, *, real: bool) -> ScoredAnswer:
    return ScoredAnswer(
        study="paper",
        reader=reader,
        group="",
        type="all",
        case=case,
        repeat=False,
        is_synthetic=True,
        said_synthetic=not real,
        confidence=3,
        reading_s=1.0,
        diameter_mm=10.0,
        click_mm=None,
        click_hit=None,
        comment="",
    )


def test_clicks_are_measured_in_millimetres(turing_store: Store, tmp_path: Path) -> None:
    built, folder = make_study(turing_store, tmp_path, per_type=2, readers=TWO_READERS[:1])
    center = [10, 12, 14]
    journal = Journal(folder, folder.study.readers[0])
    journal.submit(GivenAnswer.model_validate(answer_of(folder, 0, 0, click_zyx=[center[0], center[1] + 1, center[2]])))
    journal.submit(GivenAnswer.model_validate(answer_of(folder, 0, 1, click_zyx=[0, 0, 0])))
    journal.close()
    near, far = score_studies([folder.path], [built.key]).answers
    assert near.click_mm == pytest.approx(3.0)
    assert near.click_hit
    assert far.click_mm == pytest.approx(3.0 * (100 + 144 + 196) ** 0.5)
    assert not far.click_hit
    (reader,) = score_studies([folder.path], [built.key]).to_json()["readers"]
    assert (reader["num_clicks"], reader["num_clicks_inside"]) == (2, 1)


def test_who_has_not_finished_is_named(turing_store: Store, tmp_path: Path) -> None:
    built, folder = make_study(turing_store, tmp_path, training_cases=2, repeats=2)
    key = read_key(built.key)
    with pytest.raises(ConfigError, match="no reader has answered anything yet"):
        score_studies([folder.path], [built.key])
    answer_all(folder, key, 1, lambda _s, t: (t, 2), stop=5)
    score = score_studies([folder.path], [built.key])
    assert score.readers == ("Ben",)
    assert score.notes == ("Not finished: Ada 0 of 6, Ben 3 of 6. Figures are of what was answered.",)
    assert score.to_json()["readers"][0]["accuracy"] is None
    assert "Not finished" in score.tables["sensitivity_specificity"].to_markdown()
    assert score.fleiss() == (None, 3)


def test_studies_of_two_regions_are_scored_as_one(turing_store: Store, tmp_path: Path) -> None:
    parts = [make_study(turing_store, tmp_path, name=str(n), seed=n) for n in range(2)]
    for built, folder in parts:
        for reader in range(2):
            answer_all(folder, read_key(built.key), reader, lambda _s, t: (t, 4))
    places, keys = [f.path for _, f in parts], [b.key for b, _ in parts]
    score = score_studies(places, keys)
    assert [r["num_answered"] for r in score.to_json()["readers"]] == [8, 8]
    assert score.passed() == (0, 0, 4)
    with pytest.raises(ConfigError, match="2 studies and 1 keys"):
        score_studies(places, keys[:1])
    with pytest.raises(StoreError, match="is the key of study"):
        score_studies(places, keys[::-1])
    with pytest.raises(ConfigError, match="given twice"):
        score_studies([places[0]] * 2, [keys[0]] * 2)


def test_changed_answers_and_cases_are_not_scored(turing_store: Store, tmp_path: Path) -> None:
    built, folder = make_study(turing_store, tmp_path)
    answer_all(folder, read_key(built.key), 0, lambda _s, _t: (True, 3))
    journal = folder.answers_file(folder.study.readers[0])
    good = journal.read_bytes()
    journal.write_bytes(good.replace(b'"synthetic":true', b'"synthetic":false', 1))
    with pytest.raises(StoreError, match="line 1: was changed since it was stored"):
        score_studies([folder.path], [built.key])
    journal.write_bytes(good)
    folder.case_file(folder.study.cases[0].id).unlink()
    with pytest.raises(StoreError, match="Restore the study from a copy"):
        score_studies([folder.path], [built.key])


HOSTILE = '=cmd|"x"!A1 <script>alert(1)</script> & 50 % _a_ | \\input{x}'


def test_texts_from_outside_do_no_harm_in_any_format(turing_store: Store, tmp_path: Path) -> None:
    readers = [ReaderName(HOSTILE[:60], "@group|<b>"), ReaderName("-B", "+x")]
    built, folder = make_study(turing_store, tmp_path, readers=readers)
    for reader in range(2):
        answer_all(folder, read_key(built.key), reader, lambda _s, t: (t, 4), comment=f"{HOSTILE}\r\n=1+1")
    score = score_studies([folder.path], [built.key])
    files = {path.name: path.read_text(encoding="utf-8") for path in write_score(score, tmp_path / "out")}
    assert set(files) == {
        *("score.json", "tables.md", "tables.tex", "answers.csv"),
        *(f"{name}.csv" for name in ("sensitivity_specificity", "accuracy", "groups", "passed", "readers", "sizes")),
    }
    for name, text in files.items():
        if name.endswith(".csv"):
            cells = [cell for row in csv.reader(io.StringIO(text)) for cell in row]
            assert not any(c.startswith(("=", "@", "+")) for c in cells), name
            assert not any(c.startswith("-") and not _is_number(c) for c in cells), name
    assert "<script>" not in files["tables.md"].replace("\\<script\\>", "")
    assert "\\input{" not in files["tables.tex"]
    rows = list(csv.DictReader(io.StringIO(files["answers.csv"])))
    assert len(rows) == 8
    assert {row["comment"] for row in rows} == {f"'{HOSTILE} =1+1"}
    assert json.loads(files["score.json"])["readers"][0]["name"] == HOSTILE[:60]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def test_answers_are_listed_for_other_programs(turing_store: Store, tmp_path: Path) -> None:
    built, folder = make_study(turing_store, tmp_path, repeats=2)
    answer_all(folder, read_key(built.key), 0, lambda _s, t: (not t, 5))
    score: Score = score_studies([folder.path], [built.key])
    rows = list(csv.DictReader(io.StringIO(answers_csv(score.answers))))
    assert [row["showing"] for row in rows].count("2") == 2
    assert all(int(row["answer"]) == 1 - int(row["truth"]) for row in rows)
    assert {int(row["rating"]) for row in rows} == {-5, 5}
