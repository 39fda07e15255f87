"""From the results of units to tables: methods down, tasks and targets across; mean and range over folds, or deviation over repeats; paired tests.

A figure of one fold and repeat is that of the volumes of the fold together. With several repeats a cell has one value a repeat, the mean of
its folds; otherwise one a fold.
"""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ftengine.config import Config, EvaluationConfig
from ftengine.errors import ConfigError
from ftengine.evaluation.compare import PAIRED
from ftengine.evaluation.evaluate import Evaluation
from ftengine.evaluation.metrics import ClassScore, is_small
from ftengine.evaluation.statistics import PairedTests, paired_tests
from ftengine.evaluation.tables import Cell, ResultTable, csv_document
from ftengine.experiments.figures import as_printed
from ftengine.experiments.folder import PLAN, is_done, read_result, result_file
from ftengine.experiments.plan import Measure, Plan, parse_plan
from ftengine.experiments.stores import overlap_notes
from ftengine.experiments.units import Score
from ftengine.files import read_json, write_json_whole, write_text_whole

SCORES = "scores.json"
_TITLES: Mapping[Measure, str] = {
    "dice": "Dice",
    "surface_dice": "Surface Dice",
    "hd95_mm": "HD95, mm",
    "sensitivity": "Sensitivity, volumes",
    "specificity": "Specificity, volumes",
    "f1": "F1, volumes",
    "lesion_sensitivity": "Sensitivity, lesions",
    "small_sensitivity": "Sensitivity, small lesions",
}
_FEW_NOTES = 10


@dataclass(frozen=True)
class Column:
    """A column of the tables. members: (task, column of its scores). tumors: classes by task. paper: the paper's name of it."""

    title: str
    paper: str
    members: tuple[tuple[str, str], ...]
    tumors: Mapping[str, tuple[str, ...]]


@dataclass
class Results:
    """All tables by name, the paired tests against the baseline, and what is not done."""

    tables: dict[str, ResultTable] = field(default_factory=dict)
    tests: list[dict[str, Any]] = field(default_factory=list)
    num_scores: int = 0
    num_done: int = 0

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "num_evaluations": self.num_scores,
            "num_done": self.num_done,
            "tables": {name: table.to_json() for name, table in self.tables.items()},
            "tests": self.tests,
        }


def keep_scores(folder: Path, scores: Sequence[Score]) -> None:
    """Write down where each figure comes from, so that tables can be made without the stores."""
    write_json_whole(folder / SCORES, {"scores": [asdict(score) for score in scores]})


def collect(folder: Path) -> Results:
    """The tables of an experiment's folder, from what is done. Raises ConfigError where it is none."""
    if not (folder / PLAN).is_file() or not (folder / SCORES).is_file():
        raise ConfigError(f"{folder}: holds no experiment; want the --out of 'ftengine experiment run'.")
    plan = parse_plan((folder / PLAN).read_text(encoding="utf-8"), where=str(folder / PLAN))
    scores = [Score(**document) for document in read_json(folder / SCORES)["scores"]]
    return tables_of(plan, scores, _Evaluations(folder))


def write_results(folder: Path, results: Results) -> None:
    """Write ``table.md``, ``table.tex``, ``table.csv`` and ``table.json``, each with all tables."""
    tables = results.tables.values()
    write_text_whole(folder / "table.md", "\n".join(table.to_markdown() for table in tables))
    write_text_whole(folder / "table.tex", "\n".join(table.to_latex() for table in tables))
    write_text_whole(folder / "table.csv", csv_document(tables))
    write_json_whole(folder / "table.json", results.to_json())


def columns_of(plan: Plan) -> list[Column]:
    """The columns: tasks (or what the plan pools them to), class by class where a task has several, then their targets."""
    tumors = {name: _tumors(plan, name) for name in plan.tasks}
    columns = []
    if plan.columns:
        for title, tasks in plan.columns.items():
            columns.append(Column(title, title, tuple((t, t) for t in tasks), {t: tumors[t] for t in tasks}))
    else:
        for name, task in plan.tasks.items():
            if plan.folds is not None or task.test_split is not None:
                columns += _by_class(task.title or name, name, (name, name), tumors[name])
    for name, task in plan.tasks.items():
        for target in task.targets:
            title = f"{task.title or name} to {plan.targets[target].title or target}"
            columns += _by_class(title, f"{name}/{target}", (name, f"{name}/{target}"), tumors[name])
    return columns


def _by_class(title: str, paper: str, member: tuple[str, str], tumors: tuple[str, ...]) -> Iterator[Column]:
    for tumor in tumors:
        suffix = f", {tumor}" if len(tumors) > 1 else ""
        yield Column(f"{title}{suffix}", f"{paper}{suffix}", (member,), {member[0]: (tumor,)})


def tables_of(plan: Plan, scores: Sequence[Score], evaluations: "_Evaluations") -> Results:
    """All tables from the scores that are done."""
    results = Results(num_scores=len(scores), num_done=sum(evaluations.of(s.unit) is not None for s in scores))
    columns, titles = columns_of(plan), dict(plan.rows())
    gathered = _Gathered(plan, scores, evaluations)
    rows = [name for name in titles if name in plan.methods or any(s.method == name for s in scores)]
    for measure in plan.measures:
        cells = {(titles[row], c.title): gathered.cell(measure, row, c) for row in rows for c in columns}
        results.tables[measure] = ResultTable(
            f"{plan.title}: {_TITLES[measure]}",
            "Method",
            tuple(titles[row] for row in rows),
            tuple(c.title for c in columns),
            {key: cell for key, cell in cells.items() if cell.values},
            notes=(*gathered.notes(rows, columns, titles), *_about(plan)),
            spread=plan.spread,
            **_look(measure),
        )
        tests = {
            (row, c.title): gathered.test(measure, row, c) for row in rows if row != plan.baseline for c in columns
        }
        results.tests += [
            {"measure": measure, "method": row, "column": column, **test.to_json()}
            for (row, column), test in tests.items()
            if test.num_pairs
        ]
        results.tables |= _test_tables(plan, measure, titles, columns, tests)
    if plan.paper is not None:
        printed = {c.paper: c.title for c in columns}
        results.tables["paper"] = as_printed(plan.paper, printed)
    return results


def _test_tables(
    plan: Plan,
    measure: Measure,
    titles: Mapping[str, str],
    columns: Sequence[Column],
    tests: Mapping[tuple[str, str], PairedTests],
) -> dict[str, ResultTable]:
    """The difference to the baseline and the p values of both tests, as tables of their own; none where nothing is paired yet."""
    rows = tuple(titles[row] for row in dict.fromkeys(row for row, _ in tests))
    what = "volumes" if measure in PAIRED else "folds"
    scale = _look(measure)["scale"]
    about = f"{_TITLES[measure]}, against {titles[plan.baseline]}, paired by {what}"
    figures: tuple[tuple[str, str, float, int, Callable[[PairedTests], float | None]], ...] = (
        ("difference", "mean difference", scale, 1, lambda t: t.mean_difference),
        ("t-test", "p of the two-sided paired t-test", 1.0, 5, lambda t: t.t_pvalue),
        ("wilcoxon", "p of Wilcoxon's two-sided signed-rank test", 1.0, 5, lambda t: t.wilcoxon_pvalue),
    )
    tables = {}
    for name, title, factor, digits, figure in figures:
        cells = {
            (titles[row], column): Cell((value,))
            for (row, column), test in tests.items()
            if (value := figure(test)) is not None
        }
        if cells:
            tables[f"{measure}-{name}"] = ResultTable(
                f"{about}: {title}",
                "Method",
                rows,
                tuple(c.title for c in columns),
                cells,
                scale=factor,
                digits=digits,
                order="none",
                notes=() if name == "difference" else ("Not corrected for the number of tests.",),
            )
    return tables


def _about(plan: Plan) -> Iterator[str]:
    """What a reader of any of the tables must know."""
    for name, other in plan.external.items():
        if other.predictions is None:
            yield f"{other.title or name}: {other.note}."
    yield from plan.notes
    yield from overlap_notes(plan, list(plan.tasks))


def _look(measure: Measure) -> dict[str, Any]:
    """How a measure is printed."""
    return {"scale": 1.0, "order": "lower"} if measure == "hd95_mm" else {"scale": 100.0, "order": "higher"}


class _Evaluations:
    """The evaluations that are done, read once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._read: dict[str, Evaluation | None] = {}

    def of(self, key: str) -> Evaluation | None:
        """An evaluation; None where it is not done."""
        if key not in self._read:
            file = result_file(self._folder, key)
            done = is_done(self._folder, key)
            self._read[key] = (
                Evaluation.from_json(read_result(self._folder, key)["evaluation"], str(file)) if done else None
            )
        return self._read[key]


class _Gathered:
    """Scores by method and column."""

    def __init__(self, plan: Plan, scores: Sequence[Score], evaluations: _Evaluations) -> None:
        self._plan, self._evaluations = plan, evaluations
        self._scores: dict[tuple[str, str], list[Score]] = {}
        for score in scores:
            self._scores.setdefault((score.method, score.column), []).append(score)

    def cell(self, measure: Measure, method: str, column: Column) -> Cell:
        """The values of a cell."""
        by_place = self._values(measure, method, column)
        if self._plan.repeats == 1:
            return Cell(tuple(by_place.values()))
        repeats: dict[int, list[float]] = {}
        for (repeat, _), value in by_place.items():
            repeats.setdefault(repeat, []).append(value)
        whole = max(map(len, repeats.values()), default=0)
        return Cell(tuple(statistics.fmean(values) for values in repeats.values() if len(values) == whole))

    def test(self, measure: Measure, method: str, column: Column) -> PairedTests:
        """A method against the baseline: by volume where each has a value, else by fold and repeat."""
        ours, theirs = (self._paired(measure, name, column) for name in (method, self._plan.baseline))
        both = [key for key in ours if key in theirs]
        return paired_tests([ours[key] for key in both], [theirs[key] for key in both])

    def notes(self, rows: Sequence[str], columns: Sequence[Column], titles: Mapping[str, str]) -> list[str]:
        """Which cells are not whole."""
        notes = []
        for row in rows:
            for column in columns:
                scores = list(self._of(row, column))
                done = sum(self._evaluations.of(s.unit) is not None for s in scores)
                lacking = self._lacking(row, column, [s.column for s in scores])
                if scores and lacking:
                    notes.append(f"{titles[row]}, {column.title}: empty, for {', '.join(lacking)} cannot be scored.")
                elif done < len(scores):
                    notes.append(f"{titles[row]}, {column.title}: {done} of {len(scores)} evaluations are done.")
        return (
            notes if len(notes) <= _FEW_NOTES else [f"{len(notes)} cells lack evaluations: the experiment is not done."]
        )

    def _lacking(self, method: str, column: Column, present: Sequence[str]) -> list[str]:
        """Members of a column that apply to a method but are not among those present."""
        ours = self._plan.methods.get(method) or self._plan.external[method]
        return [
            name for task, name in column.members if (ours.tasks is None or task in ours.tasks) and name not in present
        ]

    def _of(self, method: str, column: Column) -> Iterator[Score]:
        for _, name in column.members:
            yield from self._scores.get((method, name), ())

    def _values(self, measure: Measure, method: str, column: Column) -> dict[tuple[int, int | None], float]:
        """Value by repeat and fold; only where all tasks of the column that apply to the method are there and done."""
        places: dict[tuple[int, int | None], list[Score]] = {}
        for score in self._of(method, column):
            places.setdefault((score.repeat, score.fold), []).append(score)
        values = {}
        for place, scores in places.items():
            evaluations = [self._evaluations.of(s.unit) for s in scores]
            if any(e is None for e in evaluations) or self._lacking(method, column, [s.column for s in scores]):
                continue
            pooled = [c for s in scores for _, _, c in self._classes(s, column)]
            settings = next(e.settings for e in evaluations if e is not None)
            value = _measured(measure, pooled, settings)
            if value is not None:
                values[place] = value
        return values

    def _paired(self, measure: Measure, method: str, column: Column) -> dict[Any, float]:
        if measure not in PAIRED:
            return dict(self._values(measure, method, column))
        if self._lacking(method, column, [s.column for s in self._of(method, column)]):
            return {}
        of_case: dict[tuple[str, str, str], list[float]] = {}
        for score in self._of(method, column):
            for case, tumor, found in self._classes(score, column):
                value = PAIRED[measure](found) if found.truth_voxels else None
                if value is not None:
                    of_case.setdefault((score.task, case, tumor), []).append(value)
        return {key: statistics.fmean(values) for key, values in of_case.items()}

    def _classes(self, score: Score, column: Column) -> Iterator[tuple[str, str, ClassScore]]:
        """(case, class, score) of what the column takes of an evaluation."""
        evaluation = self._evaluations.of(score.unit)
        for case in () if evaluation is None else evaluation.cases:
            for tumor in column.tumors[score.task]:
                yield case.case, tumor, case.classes[tumor]


def _measured(measure: Measure, classes: Sequence[ClassScore], settings: EvaluationConfig) -> float | None:
    """A figure of these classes of volumes together, as ``metrics.summarize`` defines it; None where nothing gives it."""
    if measure in PAIRED:
        values = [v for c in classes if c.truth_voxels and (v := PAIRED[measure](c)) is not None]
        return statistics.fmean(values) if values else None
    if measure in {"lesion_sensitivity", "small_sensitivity"}:
        lesions = [lesion for c in classes if c.lesions is not None for lesion in c.lesions.truth]
        if measure == "small_sensitivity":
            lesions = [lesion for lesion in lesions if is_small(lesion, settings)]
        return _ratio(sum(lesion.matched for lesion in lesions), len(lesions))
    tp, fp, tn, fn = (sum(c.outcome == name for c in classes) for name in ("tp", "fp", "tn", "fn"))
    parts = {"sensitivity": (tp, tp + fn), "specificity": (tn, tn + fp), "f1": (2 * tp, 2 * tp + fp + fn)}
    return _ratio(*parts[measure])


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _tumors(plan: Plan, task: str) -> tuple[str, ...]:
    spec = plan.tasks[task]
    if spec.tumors:
        return spec.tumors
    region = Config.preset(plan.stores[spec.store].preset).region
    return tuple(name for name, value in region.labels.items() if value in region.tumor_values)
