"""Numbers as the report writes them."""

import pytest

from ftengine.report.page import number


@pytest.mark.parametrize(
    ("value", "style", "text"),
    [
        (1234.0, "{:,.0f}", "1,234"),
        (-1234.5, "{:,.1f}", "&minus;1,234.5"),
        (-0.0001, "{:+.3f}", "0.000"),
        (0.0, "{:.1%}", "0.0%"),
        (0.25, "{:.1%}", "25.0%"),
        (None, "{:.3f}", "&ndash;"),
    ],
)
def test_numbers_have_a_true_minus_and_any_size(value: float | None, style: str, text: str) -> None:
    assert number(value, style) == text
