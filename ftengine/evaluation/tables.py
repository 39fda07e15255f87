r"""Tables in the shape of the paper's Tables A5 to A10: methods down, data sets across, in each cell a mean and its range over the folds.

What each format does with text from outside: Markdown and LaTeX escape what they would take for markup, CSV puts an apostrophe before
what a spreadsheet would take for a formula.
"""

import csv
import io
import math
import re
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from rich.table import Table
from rich.text import Text

NO_VALUE = "\N{EN DASH}"
_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    **{c: f"\\{c}" for c in "&%$#_{}"},
    "\N{PLUS-MINUS SIGN}": r"$\pm$",
    "\N{GREATER-THAN OR EQUAL TO}": r"$\geq$",
    "\N{MULTIPLICATION SIGN}": r"$\times$",
    NO_VALUE: "--",
}
Wrap = Callable[[str], str]


@dataclass(frozen=True)
class Cell:
    """The values of a cell, one a fold (or repeat), unscaled; none: the method does not apply. Raises ValueError for NaN and infinity."""

    values: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not all(math.isfinite(v) for v in self.values):
            raise ValueError(f"Cell: {self.values}; want finite numbers. A fold without a value is left out.")

    @property
    def mean(self) -> float | None:
        """Mean over the folds."""
        return statistics.fmean(self.values) if self.values else None

    @property
    def worst(self) -> float | None:
        """Lowest fold; of a table where lower is better this is the best one, and the table prints it last."""
        return min(self.values, default=None)

    @property
    def best(self) -> float | None:
        """Highest fold."""
        return max(self.values, default=None)

    @property
    def deviation(self) -> float | None:
        """Standard deviation of the folds as a sample (divided by N - 1)."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None


@dataclass(frozen=True)
class ResultTable:
    """A table of results.

    cells: by (row, column); a missing one is drawn as a dash. scale: what values are multiplied with for print (100: per cent). spread: beside
    a mean over several folds, ``range`` prints (worst, best) as Tables A5 to A7, ``deviation`` prints the standard deviation as A8 and A10
    do. order: which values of a column are good; the best mean is bold, the second underlined, ties alike (``none``: no marks, for counts).
    Raises ValueError for a cell that is in no row or column, and for names that occur twice.
    """

    title: str
    corner: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cells: Mapping[tuple[str, str], Cell]
    scale: float = 100.0
    digits: int = 1
    notes: tuple[str, ...] = ()
    spread: Literal["range", "deviation"] = "range"
    order: Literal["higher", "lower", "none"] = "higher"
    _marks: dict[tuple[str, str], str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if len(set(self.rows)) != len(self.rows) or len(set(self.columns)) != len(self.columns):
            raise ValueError(f"ResultTable {self.title!r}: a row or column occurs twice; want different names.")
        foreign = [key for key in self.cells if key[0] not in self.rows or key[1] not in self.columns]
        if foreign:
            raise ValueError(f"ResultTable {self.title!r}: cell {foreign[0]} is in no row and column.")
        object.__setattr__(self, "_marks", self._ranked())

    def cell(self, row: str, column: str) -> Cell:
        """A cell; one without values where none was given."""
        return self.cells.get((row, column), Cell())

    def text(self, row: str, column: str) -> str:
        """A cell as it is printed, without markup: ``65.5 (61.6, 71.4)``."""
        return self._joined(row, column, str)

    def to_markdown(self) -> str:
        """A Markdown table (GitHub's), title above, notes below."""
        marks: dict[str, Wrap] = {"best": "**{}**".format, "second": "<u>{}</u>".format}
        lines = [f"**{_markdown(self.title)}**", ""]
        lines += ["| " + " | ".join(map(_markdown, (self.corner, *self.columns))) + " |"]
        lines += ["|---" + "|---:" * len(self.columns) + "|"]
        for row in self.rows:
            cells = (self._joined(row, c, marks.get(self._marks.get((row, c), ""), str)) for c in self.columns)
            lines.append("| " + " | ".join((_markdown(row), *cells)) + " |")
        lines += ["", *(f"- {_markdown(note)}" for note in self.notes)]
        return "\n".join(lines).rstrip() + "\n"

    def to_latex(self) -> str:
        """A LaTeX table environment; needs ``\\usepackage{booktabs}`` and T1 fonts (``\\usepackage[T1]{fontenc}``)."""
        marks: dict[str, Wrap] = {"best": r"\textbf{{{}}}".format, "second": r"\underline{{{}}}".format}
        lines = [r"\begin{table}", r"\centering", rf"\caption{{{_latex(self.title)}}}"]
        lines += [rf"\begin{{tabular}}{{l{'c' * len(self.columns)}}}", r"\toprule"]
        lines += [_latex_row(self.corner, map(_latex, self.columns)), r"\midrule"]
        for row in self.rows:
            cells = (self._joined(row, c, marks.get(self._marks.get((row, c), ""), str), _latex) for c in self.columns)
            lines.append(_latex_row(row, cells))
        lines += [r"\bottomrule", r"\end{tabular}"]
        lines += [rf"\par\footnotesize {_latex(note)}" for note in self.notes]
        return "\n".join([*lines, r"\end{table}", ""])

    def to_csv(self) -> str:
        """One line a cell with its unscaled mean, range, deviation and number of values; the values themselves with ``;`` between."""
        return csv_document([self])

    def to_json(self) -> dict[str, Any]:
        """Plain values, unscaled; a cell without values has None for its figures."""
        cells = []
        for row in self.rows:
            for column in self.columns:
                cell = self.cell(row, column)
                worst, best = self._range(cell)
                cells.append(
                    {
                        "row": row,
                        "column": column,
                        "mean": cell.mean,
                        "worst": worst,
                        "best": best,
                        "deviation": cell.deviation,
                        "values": list(cell.values),
                    }
                )
        names = ("title", "corner", "rows", "columns", "scale", "digits", "spread", "order", "notes")
        plain = {n: list(v) if isinstance(v := getattr(self, n), tuple) else v for n in names}
        return plain | {"cells": cells}

    def to_rich(self) -> Table:
        """For a terminal."""
        styles = {"best": "bold", "second": "underline"}
        table = Table(title=Text(self.title), title_justify="left", caption=Text("\n".join(self.notes)) or None)
        table.caption_justify = "left"
        table.add_column(Text(self.corner))
        for column in self.columns:
            table.add_column(Text(column), justify="right")
        for row in self.rows:
            cells = (Text(self.text(row, c), styles.get(self._marks.get((row, c), ""), "")) for c in self.columns)
            table.add_row(Text(row), *cells)
        return table

    def _range(self, cell: Cell) -> tuple[float | None, float | None]:
        """(worst, best) as this table sees it."""
        return (cell.best, cell.worst) if self.order == "lower" else (cell.worst, cell.best)

    def _joined(self, row: str, column: str, mark: Wrap, escape: Wrap = str) -> str:
        cell = self.cell(row, column)
        if cell.mean is None:
            return escape(NO_VALUE)
        mean = mark(escape(self._number(cell.mean)))
        worst, best = self._range(cell)
        if len(cell.values) < 2 or worst is None or best is None or cell.deviation is None:
            return mean
        if self.spread == "deviation":
            return f"{mean} {escape(f'{chr(0xB1)} {self._number(cell.deviation)}')}"
        return f"{mean} ({escape(self._number(worst))}, {escape(self._number(best))})"

    def _number(self, value: float) -> str:
        return f"{value * self.scale:.{self.digits}f}"

    def _ranked(self) -> dict[tuple[str, str], str]:
        """``best`` and ``second`` by cell: compared as printed, so that equal figures look equal; a column of one value has no best."""
        marks: dict[tuple[str, str], str] = {}
        if self.order == "none":
            return marks
        for column in self.columns:
            means = {row: mean for row in self.rows if (mean := self.cell(row, column).mean) is not None}
            printed = {row: float(self._number(mean)) for row, mean in means.items()}
            ranks = sorted(set(printed.values()), reverse=self.order == "higher")
            if len(printed) < 2:
                continue
            for name, rank in zip(("best", "second"), ranks, strict=False):
                marks |= {(row, column): name for row, value in printed.items() if value == rank}
        return marks


def csv_document(tables: Iterable[ResultTable]) -> str:
    """The cells of several tables, one a line, with the table's title first."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["table", "row", "column", "mean", "worst", "best", "deviation", "num", "values"])
    for table in tables:
        for cell in table.to_json()["cells"]:
            names = (csv_text(text) for text in (table.title, cell["row"], cell["column"]))
            figures = ("" if (v := cell[key]) is None else repr(v) for key in ("mean", "worst", "best", "deviation"))
            writer.writerow([*names, *figures, len(cell["values"]), ";".join(map(repr, cell["values"]))])
    return stream.getvalue()


def csv_text(text: str) -> str:
    """Text for a CSV cell: what a spreadsheet would take for a formula gets a leading apostrophe."""
    return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t", "\r") else text


def _markdown(text: str) -> str:
    return re.sub(r"([\\`*_\[\]|~#$&<>])", r"\\\1", _one_line(text))


def _latex(text: str) -> str:
    return "".join(_LATEX.get(c, c) for c in _one_line(text))


def _latex_row(name: str, cells: Iterable[str]) -> str:
    r"""A row; ``{}`` before a name that ``\toprule``, ``\midrule`` or the ``\\`` above would take for an argument."""
    first = _latex(name)
    guard = "{}" if first.startswith(("[", "*")) else ""
    return " & ".join((guard + first, *cells)) + r" \\"


def _one_line(text: str) -> str:
    return " ".join(text.split())
