"""The paper's own figures, as printed (``paper/*.yaml``): facts to put beside a table of ours, never mixed into it."""

from functools import cache
from importlib import resources
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict

from ftengine.evaluation.tables import Cell, ResultTable

_FOLDER = "paper"


class PaperTable(BaseModel):
    """One table. rows: method -> column -> per cent: mean, worst and best fold (spread ``range``), or mean and standard deviation."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    title: str
    spread: Literal["range", "deviation"]
    notes: tuple[str, ...] = ()
    rows: dict[str, dict[str, tuple[float, ...]]]

    def mean(self, row: str, column: str) -> float | None:
        """A mean as a share, None for a cell that the paper leaves empty."""
        cell = self.rows.get(row, {}).get(column)
        return None if cell is None else cell[0] / 100.0


@cache
def paper_tables() -> dict[str, PaperTable]:
    """All shipped tables by name (``A5``)."""
    files = resources.files("ftengine.experiments").joinpath(_FOLDER).iterdir()
    return {
        file.name.removesuffix(".yaml"): PaperTable.model_validate(yaml.safe_load(file.read_text(encoding="utf-8")))
        for file in sorted(files, key=lambda f: f.name)
        if file.name.endswith(".yaml")
    }


def as_printed(name: str, columns: dict[str, str]) -> ResultTable:
    """The means of a table of the paper. columns: column of the paper -> title, in order; others are left out."""
    table = paper_tables()[name]
    cells = {
        (row, title): Cell((mean,))
        for row in table.rows
        for column, title in columns.items()
        if (mean := table.mean(row, column)) is not None
    }
    return ResultTable(
        f"Paper, Table {name}, as printed (means): {table.title}",
        "Method",
        tuple(table.rows),
        tuple(columns.values()),
        cells,
        notes=table.notes,
    )
