"""Study, key and answers to figures: rates in the shape of Tables A1 to A3, pass counts (Fig. 2 f), intervals, agreement, times.

Only the first showing of a case counts; repeats are for intra-reader agreement, training cases for nothing. Several studies of the same
readers are scored as one: a study holds one region, and the paper's five types lie in two.
"""

import csv
import io
import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ftengine.errors import ConfigError
from ftengine.evaluation.statistics import Interval, proportion_interval
from ftengine.evaluation.tables import Cell, ResultTable, csv_text
from ftengine.turing.agreement import Ratings, cohen_kappa, fleiss_kappa, rating
from ftengine.turing.answers import Answers
from ftengine.turing.rates import (
    TOTAL,
    Counts,
    RateTable,
    accuracy_table,
    averages,
    group_table,
    sensitivity_table,
)
from ftengine.turing.study import Key, StudyFolder, check_key, read_key

SMALL_MM = 20.0  # the paper's bound between small tumours and others (Table A9)
_UNNAMED = "readers"


@dataclass(frozen=True)
class ScoredAnswer:
    """One answer beside the truth. reading_s: pauses taken out. click_mm: from the pointed voxel to the tumour's central one, None
    without a click; click_hit: inside the ball that holds the tumour. diameter_mm: of the sphere of its volume.
    """

    study: str
    reader: str
    group: str
    type: str
    case: str
    repeat: bool
    is_synthetic: bool
    said_synthetic: bool
    confidence: int
    reading_s: float
    diameter_mm: float
    click_mm: float | None
    click_hit: bool | None
    comment: str

    @property
    def rating(self) -> int:
        """-5, surely real, to 5, surely synthetic."""
        return rating(synthetic=self.said_synthetic, confidence=self.confidence)


@dataclass(frozen=True)
class Attendance:
    """How much a reader has answered of what they are shown, training left out."""

    reader: str
    group: str
    num_answered: int
    num_shown: int


@dataclass(frozen=True)
class Score:
    """All answers of one or more studies, and what follows from them."""

    answers: tuple[ScoredAnswer, ...]
    attendance: tuple[Attendance, ...]
    types: tuple[str, ...]
    studies: tuple[str, ...]

    @property
    def first(self) -> list[ScoredAnswer]:
        """The answers that count."""
        return [a for a in self.answers if not a.repeat]

    @property
    def readers(self) -> tuple[str, ...]:
        """Names of the readers who answered anything, in the study's order."""
        answered = {a.reader for a in self.first}
        return tuple(dict.fromkeys(a.reader for a in self.attendance if a.reader in answered))

    @property
    def groups(self) -> dict[str, list[str]]:
        """Readers by group, in the study's order."""
        found: dict[str, list[str]] = {}
        for person in self.attendance:
            names = found.setdefault(person.group, [])
            if person.reader in self.readers and person.reader not in names:
                names.append(person.reader)
        return {group: names for group, names in found.items() if names}

    @cached_property
    def rates(self) -> RateTable:
        """Eq. 7-8 by reader and type."""
        keys = dict.fromkeys((a.reader, a.type) for a in self.first)
        return {key: _counts(a for a in self.first if (a.reader, a.type) == key).rates for key in keys}

    @cached_property
    def tables(self) -> dict[str, ResultTable]:
        """By file name: Tables A1, A2, A3, Fig. 2 f, then what the paper does not print."""
        made = {
            "sensitivity_specificity": sensitivity_table(self.rates, self.readers, self.types),
            "accuracy": accuracy_table(self.rates, self.readers, self.types),
            "groups": group_table(self.rates, self.groups),
            "passed": self._pass_table(),
            "readers": self._reader_table(),
            "sizes": self._size_table(),
        }
        first = next(iter(made))
        made[first] = _with_notes(made[first], self.notes)
        return made

    @property
    def notes(self) -> tuple[str, ...]:
        """What limits the figures."""
        late = [
            f"{a.reader} {a.num_answered} of {a.num_shown}" for a in self.attendance if a.num_answered < a.num_shown
        ]
        return (f"Not finished: {', '.join(late)}. Figures are of what was answered.",) if late else ()

    def passed(self, kind: str | None = None) -> tuple[int, int, int]:
        """Synthetic tumours that pass the test, that are undecided, and all, of a type or of all (Fig. 2 f).

        One passes where more than half of its readers called it real; the paper's other half is "fewer than 1/2", so that one with exactly half,
        which an odd number of readers cannot give, is neither.
        """
        called: dict[tuple[str, str], list[bool]] = {}
        for a in self.first:
            if a.is_synthetic and kind in (None, a.type):
                called.setdefault((a.study, a.case), []).append(not a.said_synthetic)
        return (
            sum(2 * sum(votes) > len(votes) for votes in called.values()),
            sum(2 * sum(votes) == len(votes) for votes in called.values()),
            len(called),
        )

    def kappa_of_repeats(self, reader: str) -> tuple[float | None, int]:
        """Cohen's kappa of a reader with themselves, and over how many cases."""
        mine = [a for a in self.answers if a.reader == reader]
        before = {(a.study, a.case): a.said_synthetic for a in mine if not a.repeat}
        pairs = [(before[a.study, a.case], a.said_synthetic) for a in mine if a.repeat]
        return cohen_kappa([p[0] for p in pairs], [p[1] for p in pairs]), len(pairs)

    def fleiss(self) -> tuple[float | None, int]:
        """Fleiss' kappa over the cases that all readers answered, and how many these are."""
        votes: dict[tuple[str, str], list[bool]] = {}
        for a in self.first:
            votes.setdefault((a.study, a.case), []).append(a.said_synthetic)
        shared = [v for v in votes.values() if len(v) == len(self.readers)]
        counts = np.array([[len(v) - sum(v), sum(v)] for v in shared], dtype=np.int64).reshape(-1, 2)
        return fleiss_kappa(counts), len(shared)

    def ratings(self, readers: Sequence[str]) -> Ratings:
        """The ratings of some readers on all cases."""
        chosen = [a for a in self.first if a.reader in readers]
        truth = {(a.study, a.case): a.is_synthetic for a in chosen}
        row, column = ({name: i for i, name in enumerate(names)} for names in (readers, truth))
        values = np.full((len(readers), len(truth)), np.nan)
        for a in chosen:
            values[row[a.reader], column[a.study, a.case]] = a.rating
        return Ratings(values, np.array(list(truth.values()), dtype=bool))

    def to_json(self) -> dict[str, Any]:
        """Plain values; what is not defined is None."""
        fleiss, num_shared = self.fleiss()
        whole = self.ratings(self.readers).intervals()
        return {
            "studies": list(self.studies),
            "types": list(self.types),
            "readers": list(self._figures.values()),
            "groups": {group or _UNNAMED: self._rates_json(names) for group, names in self.groups.items()},
            "total": self._rates_json(self.readers)
            | {"intervals": {name: None if i is None else i.to_json() for name, i in whole.items()}},
            "by_type": {kind: _pooled_json(a for a in self.first if a.type == kind) for kind in self.types},
            "by_size": {name: _pooled_json(filter(holds, self.first)) for name, holds in _SIZES.items()},
            "passed": {
                kind or TOTAL: dict(zip(("passed", "undecided", "synthetic"), self.passed(kind), strict=True))
                for kind in (*self.types, None)
            },
            "fleiss_kappa": fleiss,
            "num_cases_of_all_readers": num_shared,
            "notes": list(self.notes),
            "tables": {name: table.to_json() for name, table in self.tables.items()},
        }

    @cached_property
    def _figures(self) -> dict[str, dict[str, Any]]:
        """What is said of each reader, by name."""
        return {person.reader: self._reader_json(person) for person in self.attendance}

    def _reader_json(self, person: Attendance) -> dict[str, Any]:
        mine = [a for a in self.first if a.reader == person.reader]
        kappa, num_repeats = self.kappa_of_repeats(person.reader)
        clicks = [a.click_hit for a in mine if a.click_hit is not None]
        return {
            "name": person.reader,
            "group": person.group,
            "num_answered": person.num_answered,
            "num_shown": person.num_shown,
            **_exact(_counts(mine)),
            "auc": _json_of(self._auc(person.reader)),
            "kappa_of_repeats": kappa,
            "num_repeats": num_repeats,
            "median_s": statistics.median(a.reading_s for a in mine) if mine else None,
            "total_s": sum(a.reading_s for a in self.answers if a.reader == person.reader),
            "num_clicks": len(clicks),
            "num_clicks_inside": sum(clicks),
        }

    def _rates_json(self, readers: Sequence[str]) -> dict[str, Any]:
        return {"num_readers": len(readers), **{n: c.mean for n, c in averages(self.rates, readers).items()}}

    def _auc(self, reader: str) -> Interval | None:
        return self.ratings([reader]).intervals()["auc"] if reader in self.readers else None

    def _pass_table(self) -> ResultTable:
        rows = {**{kind: self.passed(kind) for kind in self.types}, TOTAL: self.passed()}
        cells = {
            (row, name): Cell((float(count),))
            for row, counts in rows.items()
            for name, count in zip(_PASS_COUNTS, counts, strict=True)
        }
        return ResultTable(
            title="Synthetic tumours that pass the Visual Turing Test: more than half of the readers call them real (Fig. 2 f)",
            corner="",
            rows=tuple(rows),
            columns=_PASS_COUNTS,
            cells=cells,
            scale=1.0,
            digits=0,
            order="none",
            notes=tuple(f"{row}: {_share_text(passed, count)}" for row, (passed, _, count) in rows.items() if count),
        )

    def _reader_table(self) -> ResultTable:
        cells: dict[tuple[str, str], Cell] = {}
        for reader, figures in self._figures.items():
            row = {
                "accuracy": _percent(figures["accuracy"], "mean"),
                "low": _percent(figures["accuracy"], "low"),
                "high": _percent(figures["accuracy"], "high"),
                "AUC": _percent(figures["auc"], "mean"),
                "AUC low": _percent(figures["auc"], "low"),
                "AUC high": _percent(figures["auc"], "high"),
                "kappa of repeats": figures["kappa_of_repeats"],
                "median s": figures["median_s"],
                "minutes": figures["total_s"] / 60,
            }
            cells |= {(reader, name): Cell((value,)) for name, value in row.items() if value is not None}
        fleiss, num_shared = self.fleiss()
        agreement = "not defined" if fleiss is None else f"{fleiss:.2f}"
        return ResultTable(
            title="Readers: accuracy in % with its exact 95 % interval, area under the ROC curve in % with a resampled one, agreement, time",
            corner="Reader",
            rows=tuple(self._figures),
            columns=(
                "accuracy",
                "low",
                "high",
                "AUC",
                "AUC low",
                "AUC high",
                "kappa of repeats",
                "median s",
                "minutes",
            ),
            cells=cells,
            scale=1.0,
            digits=2,
            order="none",
            notes=(f"Fleiss' kappa of {len(self.readers)} readers over {num_shared} cases: {agreement}.",),
        )

    def _size_table(self) -> ResultTable:
        cells = {}
        for name, holds in _SIZES.items():
            figures = _pooled_json(filter(holds, self.first))
            for column in ("sensitivity", "specificity", "accuracy"):
                if figures[column] is not None:
                    cells[name, column] = Cell((figures[column]["mean"],))
        return ResultTable(
            title="Rates in % by the diameter of the sphere of the tumour's volume, over all answers",
            corner="",
            rows=tuple(_SIZES),
            columns=("sensitivity", "specificity", "accuracy"),
            cells=cells,
            order="none",
        )


_PASS_COUNTS = ("passed", "undecided", "synthetic")
_SIZES: dict[str, Callable[[ScoredAnswer], bool]] = {
    f"below {SMALL_MM:g} mm": lambda a: a.diameter_mm < SMALL_MM,
    f"{SMALL_MM:g} mm and above": lambda a: a.diameter_mm >= SMALL_MM,
}


def score_studies(places: Sequence[str | Path], keys: Sequence[str | Path]) -> Score:
    """Score one or more studies, each with its key. Readers of one name are one reader, types of one name one type.

    Raises ConfigError where a study or key is missing or no reader has answered; StoreError where a key belongs to another study, and where study, key,
    cases or answers were changed.
    """
    if len(places) != len(keys):
        raise ConfigError(
            f"{len(places)} studies and {len(keys)} keys; want one --key for each study, in the same order."
        )
    answers: list[ScoredAnswer] = []
    shown: dict[str, Attendance] = {}
    types: dict[str, None] = {}
    ids = []
    for place, key_path in zip(places, keys, strict=True):
        folder, key = StudyFolder.open(place), read_key(key_path)
        check_key(folder, key, key_path)
        folder.check_cases()
        if folder.study.id in ids:
            raise ConfigError(f"{place}: is given twice; want each study once.")
        ids.append(folder.study.id)
        types |= dict.fromkeys(folder.study.types)
        for reader in folder.study.readers:
            said = Answers.read(folder, reader)
            answers += _scored(folder, key, said)
            counted = [s for s in reader.showings if not s.training]
            before = shown.get(reader.name, Attendance(reader.name, reader.group, 0, 0))
            if before.group != reader.group:
                raise ConfigError(
                    f"{place}: {reader.name} is of group {reader.group!r} here and {before.group!r} in another study."
                )
            shown[reader.name] = Attendance(
                reader.name,
                reader.group,
                before.num_answered + sum(s.item in said.by_item for s in counted),
                before.num_shown + len(counted),
            )
    score = Score(tuple(answers), tuple(shown.values()), tuple(types), tuple(ids))
    if not score.readers:
        raise ConfigError(
            f"{', '.join(map(str, places))}: no reader has answered anything yet; there is nothing to score."
        )
    return score


def _scored(folder: StudyFolder, key: Key, said: Answers) -> Iterable[ScoredAnswer]:
    study = folder.study
    for showing in said.reader.showings:
        line = said.by_item.get(showing.item)
        if line is None or showing.training:
            continue
        truth = key.truth[showing.case]
        click_mm = None
        if line.click_zyx is not None:
            click_mm = math.dist(
                [c * s for c, s in zip(line.click_zyx, study.spacing_mm_zyx, strict=True)],
                [c * s for c, s in zip(truth.mark.center_zyx, study.spacing_mm_zyx, strict=True)],
            )
        yield ScoredAnswer(
            study=study.id,
            reader=said.reader.name,
            group=said.reader.group,
            type=study.by_id[showing.case].type,
            case=showing.case,
            repeat=showing.repeat,
            is_synthetic=truth.synthetic,
            said_synthetic=line.synthetic,
            confidence=line.confidence,
            reading_s=said.reading_s(showing.item),
            diameter_mm=truth.diameter_mm,
            click_mm=click_mm,
            click_hit=None if click_mm is None else click_mm <= truth.mark.radius_mm,
            comment=line.comment,
        )


def write_score(score: Score, out: str | Path) -> list[Path]:
    """``score.json``, ``tables.md``, ``tables.tex``, a CSV a table, and ``answers.csv``: one line an answer, for other programs."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    files = {
        "score.json": json.dumps(score.to_json(), indent=2, allow_nan=False) + "\n",
        "tables.md": "\n".join(table.to_markdown() for table in score.tables.values()),
        "tables.tex": "\n".join(table.to_latex() for table in score.tables.values()),
        **{f"{name}.csv": table.to_csv() for name, table in score.tables.items()},
        "answers.csv": answers_csv(score.answers),
    }
    for name, text in files.items():
        (out / name).write_text(text, encoding="utf-8", newline="")
    return [out / name for name in files]


def answers_csv(answers: Iterable[ScoredAnswer]) -> str:
    """One line an answer. truth and answer: 1 synthetic, 0 real; rating: -5 to 5, as RJafroc and iMRMC take it after sorting by columns."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    names = ["study", "reader", "group", "type", "case", "showing", "truth", "answer", "confidence", "rating"]
    writer.writerow([*names, "reading_s", "diameter_mm", "click_mm", "click_hit", "comment"])
    for a in answers:
        texts = (csv_text(" ".join(t.split())) for t in (a.reader, a.group, a.type))
        writer.writerow(
            [
                a.study,
                *texts,
                a.case,
                2 if a.repeat else 1,
                int(a.is_synthetic),
                int(a.said_synthetic),
                a.confidence,
                a.rating,
                f"{a.reading_s:.1f}",
                f"{a.diameter_mm:.2f}",
                "" if a.click_mm is None else f"{a.click_mm:.1f}",
                "" if a.click_hit is None else int(a.click_hit),
                csv_text(" ".join(a.comment.split())),
            ]
        )
    return stream.getvalue()


def _counts(answers: Iterable[ScoredAnswer]) -> Counts:
    return Counts.of((a.is_synthetic, a.said_synthetic) for a in answers)


def _pooled_json(answers: Iterable[ScoredAnswer]) -> dict[str, Any]:
    """Rates over all answers of all readers. Their exact intervals take answers as independent, which those on one case are not."""
    return _exact(_counts(answers))


def _exact(counts: Counts) -> dict[str, dict[str, Any] | None]:
    """Rates with their counts and exact intervals."""
    parts = {
        "sensitivity": (counts.tp, counts.tp + counts.fn),
        "specificity": (counts.tn, counts.tn + counts.fp),
        "accuracy": (counts.tp + counts.tn, counts.tp + counts.fn + counts.tn + counts.fp),
    }
    return {
        name: None if not whole else {"num": part, "of": whole, **proportion_interval(part, whole).to_json()}
        for name, (part, whole) in parts.items()
    }


def _json_of(interval: Interval | None) -> dict[str, float | None] | None:
    return None if interval is None else interval.to_json()


def _percent(figures: Mapping[str, Any] | None, name: str) -> float | None:
    value = None if figures is None else figures[name]
    return None if value is None else 100 * float(value)


def _share_text(part: int, whole: int) -> str:
    """``62.2 % (28 of 45, exact 95 % interval 46.5 to 76.2)``."""
    exact = proportion_interval(part, whole)
    assert exact.low is not None  # noqa: S101 - exact intervals have both ends
    assert exact.high is not None  # noqa: S101
    return f"{100 * exact.mean:.1f} % ({part} of {whole}, exact 95 % interval {100 * exact.low:.1f} to {100 * exact.high:.1f})"


def _with_notes(table: ResultTable, notes: tuple[str, ...]) -> ResultTable:
    return replace(table, notes=(*table.notes, *notes))
