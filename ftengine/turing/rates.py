"""Sensitivity, specificity and accuracy of readers (Eq. 7-8), and their averages as the paper's Tables A1 to A3 print them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from ftengine.evaluation.tables import Cell, ResultTable

AVERAGE = "Average"
TOTAL = "Total"


@dataclass(frozen=True)
class Counts:
    """Answers by truth; positive is synthetic, as in the paper: TP, a synthetic tumour called synthetic; FN, called real."""

    tp: int = 0
    fn: int = 0
    tn: int = 0
    fp: int = 0

    @classmethod
    def of(cls, answers: Iterable[tuple[bool, bool]]) -> "Counts":
        """Count (is synthetic, was called synthetic)."""
        pairs = list(answers)
        return cls(
            tp=pairs.count((True, True)),
            fn=pairs.count((True, False)),
            tn=pairs.count((False, False)),
            fp=pairs.count((False, True)),
        )

    @property
    def rates(self) -> "Rates":
        """Eq. 7 and 8; None where the denominator is 0."""
        return Rates(
            sensitivity=_share(self.tp, self.tp + self.fn),
            specificity=_share(self.tn, self.tn + self.fp),
            accuracy=_share(self.tp + self.tn, self.tp + self.fn + self.tn + self.fp),
        )


@dataclass(frozen=True)
class Rates:
    """Of one reader on one type, between 0 and 1; None where there was nothing to judge."""

    sensitivity: float | None
    specificity: float | None
    accuracy: float | None


RateTable: TypeAlias = Mapping[tuple[str, str], Rates]  # by (reader, type)


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def averages(rates: RateTable, readers: Sequence[str]) -> dict[str, Cell]:
    """``sensitivity``, ``specificity`` and ``accuracy`` of some readers: one value a reader and type, so that the mean is Table A3's.

    With equally many cases a type, and all answered, that is also the mean over readers, and over types.
    """
    chosen = [rates[key] for key in rates if key[0] in readers]
    return {
        name: Cell(tuple(v for r in chosen if (v := getattr(r, name)) is not None))
        for name in ("sensitivity", "specificity", "accuracy")
    }


def sensitivity_table(rates: RateTable, readers: Sequence[str], types: Sequence[str]) -> ResultTable:
    """Table A1: a row a reader, sensitivity and specificity a type; the last row averages the readers, with the sample's deviation."""
    columns = {
        f"{kind} {short}": (kind, name)
        for kind in types
        for short, name in (("sen.", "sensitivity"), ("spe.", "specificity"))
    }
    return _by_reader(
        "Sensitivity (sen.) and specificity (spe.) in %, synthetic being positive (Eq. 7)", rates, readers, columns
    )


def accuracy_table(rates: RateTable, readers: Sequence[str], types: Sequence[str]) -> ResultTable:
    """Table A2: a row a reader, the accuracy a type; the last row averages the readers, with the sample's deviation."""
    return _by_reader("Accuracy in % (Eq. 8)", rates, readers, {kind: (kind, "accuracy") for kind in types})


def group_table(rates: RateTable, groups: Mapping[str, Sequence[str]]) -> ResultTable:
    """Table A3: a row a group of readers and one for all. groups: {name: readers}."""
    everybody = [reader for readers in groups.values() for reader in readers]
    rows = {f"{len(readers)} {name or 'readers'}": readers for name, readers in groups.items()}
    if len(groups) > 1:
        rows[TOTAL] = everybody
    cells = {}
    for row, readers in rows.items():
        for name, cell in averages(rates, readers).items():
            cells[row, f"Avg. {name}"] = Cell(() if cell.mean is None else (cell.mean,))
    return ResultTable(
        title="Average sensitivity, specificity and accuracy in % over readers and types",
        corner="",
        rows=tuple(rows),
        columns=("Avg. sensitivity", "Avg. specificity", "Avg. accuracy"),
        cells=cells,
        order="none",
    )


def _by_reader(
    title: str, rates: RateTable, readers: Sequence[str], columns: Mapping[str, tuple[str, str]]
) -> ResultTable:
    average = AVERAGE
    while average in readers:
        average += " "
    cells: dict[tuple[str, str], Cell] = {}
    for column, (kind, name) in columns.items():
        values = {r: getattr(rates[r, kind], name) for r in readers if (r, kind) in rates}
        defined = {r: v for r, v in values.items() if v is not None}
        cells |= {(r, column): Cell((v,)) for r, v in defined.items()}
        cells[average, column] = Cell(tuple(defined.values()))
    return ResultTable(
        title=title,
        corner="Reader",
        rows=(*readers, average),
        columns=tuple(columns),
        cells=cells,
        spread="deviation",
        order="none",
    )
