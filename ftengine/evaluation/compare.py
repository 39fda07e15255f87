"""Several evaluations side by side: tables in the shape of the paper's, and paired tests of each method against the first.

A method is a list of evaluations, one a fold (or a repeat, or a run with another seed). A cell of a table is the mean over the folds' own
figures, with the worst and the best fold. Tests pair by case name: a case that several folds of a method hold gives the mean of its values.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

from ftengine.config import EvaluationConfig
from ftengine.errors import ConfigError
from ftengine.evaluation.evaluate import Evaluation, dataset_of, lesion_sizes
from ftengine.evaluation.metrics import CaseScore, ClassScore, summarize
from ftengine.evaluation.statistics import PairedTests, paired_tests
from ftengine.evaluation.tables import Cell, ResultTable

Methods = Mapping[str, Sequence[Evaluation]]
Row = Mapping[str, Any]
PAIRED: Mapping[str, Callable[[ClassScore], float | None]] = {
    "dice": lambda c: c.dice,
    "hd95_mm": lambda c: c.hd95_mm,
    "surface_dice": lambda c: c.surface_dice,
}


@dataclass(frozen=True)
class ClassTest:
    """One measure of one class: a method against the reference, method minus reference."""

    method: str
    reference: str
    class_name: str
    measure: str
    tests: PairedTests


@dataclass(frozen=True)
class Comparison:
    """Tables of all methods, tests of each against the first, and by method the cases that have no partner in the first, or in it."""

    tables: tuple[ResultTable, ...]
    tests: tuple[ClassTest, ...]
    unpaired: dict[str, dict[str, list[str]]]

    def to_json(self) -> dict[str, Any]:
        """Plain values for ``--json``."""
        tests = [
            {
                "method": t.method,
                "reference": t.reference,
                "class": t.class_name,
                "measure": t.measure,
                **t.tests.to_json(),
            }
            for t in self.tests
        ]
        return {"tables": [t.to_json() for t in self.tables], "tests": tests, "unpaired": self.unpaired}


@dataclass(frozen=True)
class _Figure:
    """A table: what it takes of a class's summary, and how it prints it."""

    title: str
    value: Callable[[Row], float | None]
    tumors_only: bool = True
    scale: float = 100.0
    digits: int = 1
    order: Literal["higher", "lower"] = "higher"
    spread: Literal["range", "deviation"] = "range"


def compare(methods: Methods) -> Comparison:
    """Tables and tests of methods, the first of which is the reference. Raises ConfigError where the definitions or classes differ."""
    _check(methods)
    reference, *others = methods
    tests: list[ClassTest] = []
    unpaired: dict[str, dict[str, list[str]]] = {}
    of_reference = _by_case(methods[reference])
    for method in others:
        own = _by_case(methods[method])
        unpaired[method] = {
            f"only in {method}": sorted(set(own) - set(of_reference)),
            f"only in {reference}": sorted(set(of_reference) - set(own)),
        }
        confidence = methods[method][0].settings.confidence
        for name in _classes(methods):
            for measure, value in PAIRED.items():
                pairs = _pairs(own, of_reference, name, value)
                result = paired_tests([a for a, _ in pairs], [b for _, b in pairs], confidence=confidence)
                tests.append(ClassTest(method, reference, name, measure, result))
    return Comparison(result_tables(methods), tuple(tests), unpaired)


def result_tables(methods: Methods) -> tuple[ResultTable, ...]:
    """Dice (Table A5), HD95, surface Dice, detection by volume (Fig. 6, A7) and by lesion, of small lesions (A10), and lesions by size (A9).

    Columns are the classes, by data set where the cases are of several; a table without any figure is left out. Failed cases have no
    figures: the notes of each table count them. Raises ConfigError where the evaluations have different definitions or classes.
    """
    _check(methods)
    settings = _settings(methods)
    columns = _columns(methods)
    summaries = {
        (method, column): [_summary_of(e, *place) for e in evaluations]
        for method, evaluations in methods.items()
        for column, place in columns.items()
    }
    tables = [_table(figure, methods, columns, summaries) for figure in _figures(settings)]
    tables.append(_sizes_table(methods, columns, settings))
    return tuple(t for t in tables if any(c.values for c in t.cells.values()))


def _figures(settings: EvaluationConfig) -> tuple[_Figure, ...]:
    small = f"d < {settings.small_mm / 10:g} cm"
    surface = f"Normalised surface Dice (%) at {settings.tolerance_mm:g} mm"
    return (
        _Figure("Dice (%)", lambda row: row["dice"], tumors_only=False),
        _Figure("HD95 (mm)", lambda row: row["hd95_mm"], tumors_only=False, scale=1.0, digits=2, order="lower"),
        _Figure(surface, lambda row: row["surface_dice"], tumors_only=False),
        _Figure("Detection by volume: F1 (%)", lambda row: row["f1"]),
        _Figure("Detection by volume: sensitivity (%)", lambda row: row["sensitivity"]),
        _Figure("Detection by volume: specificity (%)", lambda row: row["specificity"]),
        _Figure("Detection by lesion: F1 (%)", lambda row: row["lesions"]["f1"]),
        _Figure("Detection by lesion: sensitivity (%)", lambda row: row["lesions"]["sensitivity"]),
        _Figure(
            "False positive lesions per volume",
            lambda row: row["lesions"]["false_positives_per_volume"],
            scale=1.0,
            digits=2,
            order="lower",
        ),
        _Figure(
            f"Sensitivity for small lesions, {small} (%)",
            lambda row: row["lesions"]["by_size"]["small"]["sensitivity"],
            spread="deviation",
        ),
    )


def _table(
    figure: _Figure,
    methods: Methods,
    columns: Mapping[str, tuple[str | None, str]],
    summaries: Mapping[tuple[str, str], Sequence[Row | None]],
) -> ResultTable:
    tumors = _tumors(methods)
    shown = tuple(c for c, (_, name) in columns.items() if name in tumors or not figure.tumors_only)
    cells = {}
    for method in methods:
        for column in shown:
            rows = [row for row in summaries[method, column] if row is not None]
            values = (figure.value(row) for row in rows)
            cells[method, column] = Cell(tuple(v for v in values if v is not None))
    num_folds = max(len(e) for e in methods.values())
    range_of = "worst and best" if figure.spread == "range" else "standard deviation"
    folds_notes = (f"Mean and {range_of} of up to {num_folds} evaluations.",) if num_folds > 1 else ()
    return ResultTable(
        figure.title,
        "Method",
        tuple(methods),
        shown,
        cells,
        scale=figure.scale,
        digits=figure.digits,
        notes=(*folds_notes, *_failed_notes(methods)),
        spread=figure.spread,
        order=figure.order,
    )


def _sizes_table(
    methods: Methods, columns: Mapping[str, tuple[str | None, str]], settings: EvaluationConfig
) -> ResultTable:
    """Table A9: the true lesions of all cases that any method was evaluated on, each case once."""
    cases = {score.case: score for evaluations in methods.values() for e in evaluations for score in e.cases}
    sizes = lesion_sizes(list(cases.values()), settings)
    bound = f"{settings.small_mm / 10:g} cm"
    rows = {"small": f"d < {bound}", "large": f"d \N{GREATER-THAN OR EQUAL TO} {bound}"}
    tumors = _tumors(methods)
    shown = tuple(c for c, (_, name) in columns.items() if name in tumors)
    cells = {}
    for size, row in rows.items():
        for column in shown:
            dataset, name = columns[column]
            counts = [s[name][size] for d, s in sizes.items() if name in s and dataset in (None, d)]
            cells[row, column] = Cell((float(sum(counts)),) if counts else ())
    notes = [f"Diameter: {settings.diameter}; lesions are {settings.connectivity}-connected components of the truth."]
    num_failed = len({case for evaluations in methods.values() for e in evaluations for case in e.failed} - set(cases))
    if num_failed:
        notes.append(
            f"{num_failed} of {num_failed + len(cases)} cases failed for every method and are not in these figures."
        )
    return ResultTable(
        "True lesions by size",
        "Diameter",
        tuple(rows.values()),
        shown,
        cells,
        scale=1.0,
        digits=0,
        notes=tuple(notes),
        order="none",
    )


def _failed_notes(methods: Methods) -> tuple[str, ...]:
    """How many cases each method's figures lack because they failed: without a word a missing prediction would flatter."""
    notes = []
    for method, evaluations in methods.items():
        num_failed = sum(len(e.failed) for e in evaluations)
        num_cases = num_failed + sum(len(e.cases) for e in evaluations)
        if num_failed:
            notes.append(f"{method}: {num_failed} of {num_cases} cases failed and are not in these figures.")
    return tuple(notes)


def _columns(methods: Methods) -> dict[str, tuple[str | None, str]]:
    """Column title -> (data set, or None where there is one alone, and class), for what any truth holds."""
    held: dict[tuple[str, str], None] = {}
    for score in _scores(methods):
        for name, of_class in score.classes.items():
            if of_class.truth_voxels:
                held.setdefault((dataset_of(score.case), name))
    classes, datasets = _classes(methods), sorted({d for d, _ in held})
    if len(datasets) == 1:
        return {name: (None, name) for name in classes if (datasets[0], name) in held}
    return {f"{d} {name}".strip(): (d, name) for name in classes for d in datasets if (d, name) in held}


def _summary_of(evaluation: Evaluation, dataset: str | None, name: str) -> Row | None:
    cases = [s for s in evaluation.cases if dataset is None or dataset_of(s.case) == dataset]
    one_class = [CaseScore(s.case, {name: s.classes[name]}) for s in cases]
    return summarize(one_class, evaluation.settings)[name] if one_class else None


def _by_case(evaluations: Sequence[Evaluation]) -> dict[str, list[CaseScore]]:
    by_case: dict[str, list[CaseScore]] = defaultdict(list)
    for evaluation in evaluations:
        for score in evaluation.cases:
            by_case[score.case].append(score)
    return by_case


def _pairs(
    own: Mapping[str, Sequence[CaseScore]],
    reference: Mapping[str, Sequence[CaseScore]],
    name: str,
    value: Callable[[ClassScore], float | None],
) -> list[tuple[float, float]]:
    """(method, reference) of the cases that both have a value for and whose truth holds the class, in the order of names."""
    pairs = []
    for case in sorted(set(own) & set(reference)):
        both = [_mean_of(scores[case], name, value) for scores in (own, reference)]
        if both[0] is not None and both[1] is not None:
            pairs.append((both[0], both[1]))
    return pairs


def _mean_of(scores: Sequence[CaseScore], name: str, value: Callable[[ClassScore], float | None]) -> float | None:
    values = [v for s in scores if s.classes[name].truth_voxels and (v := value(s.classes[name])) is not None]
    return fmean(values) if values else None


def _check(methods: Methods) -> None:
    """ConfigError unless all evaluations score the same classes by the same definitions, and none is without a case."""
    every = [(f"{method} ({n + 1})", e) for method, evaluations in methods.items() for n, e in enumerate(evaluations)]
    for where, evaluation in every:
        if not evaluation.cases:
            raise ConfigError(
                f"{where}: holds no scored case, and {len(evaluation.failed)} that failed; want at least one scored. Evaluate it again, or leave it out."
            )
    first_where, first = every[0]
    for where, evaluation in every[1:]:
        own, wanted = evaluation.settings.model_dump(), first.settings.model_dump()
        different = [f"{key}: {own[key]} against {wanted[key]}" for key in own if own[key] != wanted[key]]
        if different:
            raise ConfigError(
                f"{where} and {first_where} were scored by different definitions ({', '.join(different)}). Evaluate one of them again."
            )
        classes = [list(e.cases[0].classes) for e in (evaluation, first)]
        if classes[0] != classes[1]:
            raise ConfigError(
                f"{where} scores the classes {', '.join(classes[0])}, {first_where} {', '.join(classes[1])}; want the same."
            )


def _settings(methods: Methods) -> EvaluationConfig:
    return next(iter(methods.values()))[0].settings


def _scores(methods: Methods) -> Iterable[CaseScore]:
    return (score for evaluations in methods.values() for e in evaluations for score in e.cases)


def _classes(methods: Methods) -> list[str]:
    return list(next(iter(_scores(methods))).classes)


def _tumors(methods: Methods) -> set[str]:
    return {name for score in _scores(methods) for name, c in score.classes.items() if c.lesions is not None}
