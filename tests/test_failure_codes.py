"""Failure codes: each is raised somewhere, and each has its section on the page that users are sent to."""

import ast
import pickle
from pathlib import Path

import pytest

from ftengine.errors import CaseError, FailureCode

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "bring-your-own-ct.md"


def codes_in(file: Path) -> set[str]:
    """The members of FailureCode that a module names."""
    return {
        node.attr
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "FailureCode"
    }


def sources() -> list[Path]:
    return [p for p in (ROOT / "ftengine").rglob("*.py") if p.name != "errors.py"]


def test_every_code_is_raised_somewhere_and_no_other_is_named() -> None:
    assert set().union(*map(codes_in, sources())) == {code.name for code in FailureCode}


def test_every_code_has_a_section_and_every_section_a_code() -> None:
    sections = PAGE.read_text().split("\n## Failure codes\n")[1].split("\n### ")[1:]
    anchors = [section.split("\n", 1)[0] for section in sections]
    assert sorted(anchors) == sorted(code.value for code in FailureCode)
    for section in sections:
        assert len(section.split("\n", 1)[1].strip()) > 60, section


@pytest.mark.parametrize("code", FailureCode)
def test_a_code_is_its_name_in_kebab_case(code: FailureCode) -> None:
    assert code.value == code.name.lower().replace("_", "-")


def raises_case_error(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "CaseError"


def test_every_case_error_states_an_advice_and_a_code() -> None:
    found = 0
    for file in sources():
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and raises_case_error(node):
                found += 1
                assert len(node.args) == 2, f"{file.name}:{node.lineno}: want a reason and an advice"
                assert [k.arg for k in node.keywords] == ["code"], f"{file.name}:{node.lineno}: want a code"
    assert found > 50


def test_an_error_crosses_a_process_border_whole() -> None:
    error = pickle.loads(pickle.dumps(CaseError("a.nii: cut.", "Copy it again.", code=FailureCode.TRUNCATED)))  # noqa: S301 - our own bytes
    assert (error.reason, error.advice, error.code) == ("a.nii: cut.", "Copy it again.", FailureCode.TRUNCATED)
    assert str(error) == "a.nii: cut. Copy it again."
