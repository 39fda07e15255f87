"""Tables: the paper's figures in the paper's shape, and nothing from outside taken for markup."""

import csv
import io
import json
import math

import pytest
from rich.console import Console

from ftengine.evaluation.tables import Cell, ResultTable

# Table A5, LiTS and IRCAD, as three folds whose mean, worst and best are the printed ones
A5 = {
    ("nnUNet", "LiTS"): Cell((0.520, 0.645, 0.644)),
    ("SwinUNETR", "LiTS"): Cell((0.543, 0.651, 0.564)),
    ("FreeTumor", "LiTS"): Cell((0.616, 0.714, 0.635)),
    ("nnUNet", "IRCAD"): Cell((0.317, 0.508, 0.438)),
    ("FreeTumor", "IRCAD"): Cell((0.590, 0.700, 0.639)),
}


def _a5(**changes: object) -> ResultTable:
    fields: dict[str, object] = {
        "title": "Dice (%)",
        "corner": "Method",
        "rows": ("nnUNet", "SwinUNETR", "FreeTumor"),
        "columns": ("LiTS", "IRCAD"),
        "cells": A5,
    }
    return ResultTable(**(fields | changes))  # type: ignore[arg-type]


def test_markdown_has_the_shape_of_table_a5() -> None:
    lines = _a5(notes=("5 folds",)).to_markdown().splitlines()
    assert lines == [
        "**Dice (%)**",
        "",
        "| Method | LiTS | IRCAD |",
        "|---|---:|---:|",
        "| nnUNet | <u>60.3</u> (52.0, 64.5) | <u>42.1</u> (31.7, 50.8) |",
        "| SwinUNETR | 58.6 (54.3, 65.1) | \N{EN DASH} |",
        "| FreeTumor | **65.5** (61.6, 71.4) | **64.3** (59.0, 70.0) |",
        "",
        "- 5 folds",
    ]


def test_latex_has_the_shape_of_table_a5() -> None:
    text = _a5().to_latex()
    assert r"FreeTumor & \textbf{65.5} (61.6, 71.4) & \textbf{64.3} (59.0, 70.0) \\" in text
    assert r"SwinUNETR & 58.6 (54.3, 65.1) & -- \\" in text
    assert r"\begin{tabular}{lcc}" in text


def test_deviations_have_the_shape_of_table_a10() -> None:
    table = _a5(spread="deviation")
    assert table.text("FreeTumor", "LiTS") == "65.5 \N{PLUS-MINUS SIGN} 5.2"
    assert r"\textbf{65.5} $\pm$ 5.2" in table.to_latex()


def test_a_distance_is_best_where_it_is_lowest() -> None:
    cells = {("a", "HD95"): Cell((4.0, 6.0)), ("b", "HD95"): Cell((10.0, 12.0))}
    table = ResultTable("t", "Method", ("a", "b"), ("HD95",), cells, scale=1.0, order="lower")
    assert "| a | **5.0** (6.0, 4.0) |" in table.to_markdown()
    assert table.to_json()["cells"][0]["worst"] == 6.0


def test_counts_have_no_best() -> None:
    cells = {("d < 2 cm", "liver"): Cell((147,)), ("d >= 2 cm", "liver"): Cell((505,))}
    table = ResultTable("A9", "Diameter", ("d < 2 cm", "d >= 2 cm"), ("liver",), cells, 1.0, 0, order="none")
    assert "| d \\< 2 cm | 147 |" in table.to_markdown()
    assert r"d \textless{} 2 cm & 147 \\" in table.to_latex()


def test_ties_share_their_mark_and_one_value_has_none() -> None:
    cells = {("a", "x"): Cell((0.50001,)), ("b", "x"): Cell((0.5,)), ("c", "x"): Cell((0.4,)), ("a", "y"): Cell((1.0,))}
    text = ResultTable("t", "m", ("a", "b", "c"), ("x", "y"), cells).to_markdown()
    assert "| a | **50.0** | 100.0 |" in text
    assert "| b | **50.0** |" in text
    assert "| c | <u>40.0</u> |" in text


def test_csv_and_json_hold_the_unscaled_values() -> None:
    rows = list(csv.DictReader(io.StringIO(_a5().to_csv())))
    assert len(rows) == 6
    assert float(rows[0]["mean"]) == pytest.approx(0.603)
    assert [float(v) for v in rows[0]["values"].split(";")] == [0.520, 0.645, 0.644]
    assert rows[3]["row"] == "SwinUNETR"
    assert rows[3]["mean"] == ""
    document = json.loads(json.dumps(_a5().to_json(), allow_nan=False))
    assert document["cells"][4]["best"] == 0.714
    assert document["cells"][3]["mean"] is None


EVIL = "=cmd|' /C calc'!A0_50%&$#{}~^\\ [red]<b>*x*\n@"


def test_names_from_outside_stay_text() -> None:
    table = ResultTable(EVIL, EVIL, (EVIL,), ("c",), {(EVIL, "c"): Cell((0.5,))}, notes=(EVIL,))
    assert all(not row[0].startswith("=") for row in csv.reader(io.StringIO(table.to_csv())))
    body = table.to_markdown().splitlines()
    assert body[4].replace("\\|", "").count("|") == 3
    assert r"\<b\>" in body[4]
    latex = table.to_latex()
    assert r"A0\_50\%\&\$\#\{\}\textasciitilde{}\textasciicircum{}\textbackslash{}" in latex
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(table.to_rich())
    assert "[red]" in console.export_text()


def test_latex_takes_no_name_for_an_argument() -> None:
    rows = ("[5cm]", "*b", " [c", "d [e]")
    lines = ResultTable("t", "[2pt]", rows, ("c",), {}).to_latex().splitlines()
    assert [line for line in lines if "&" in line] == [
        r"{}[2pt] & c \\", r"{}[5cm] & -- \\", r"{}*b & -- \\", r"{}[c & -- \\", r"d [e] & -- \\",
    ]  # fmt: skip


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="want finite numbers"):
        Cell((0.5, value))


def test_cells_outside_the_table_and_doubled_names_are_refused() -> None:
    with pytest.raises(ValueError, match="in no row and column"):
        _a5(columns=("LiTS",))
    with pytest.raises(ValueError, match="occurs twice"):
        _a5(rows=("nnUNet", "nnUNet", "SwinUNETR", "FreeTumor"))
