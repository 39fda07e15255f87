"""A web page that stands alone: one file, no script, nothing loaded from anywhere. Tables, figures and numbers as HTML.

Every text from outside (case names come from files, and files from strangers) goes through ``html.escape`` before it is put into the page:
functions here escape what they call texts and take what they call HTML as it is.
"""

import base64
import hashlib
from collections.abc import Iterable, Sequence
from html import escape
from importlib import resources
from typing import NamedTuple

NONE = "&ndash;"


class Section(NamedTuple):
    """A part of the page with a heading. key: its address; html: what is under the heading."""

    key: str
    title: str
    html: str


def document(title: str, lead: str, sections: Sequence[Section]) -> str:
    """The page. title: text; lead: HTML under the title."""
    style = resources.files("ftengine.report").joinpath("report.css").read_text(encoding="utf-8")
    links = "".join(f'<li><a href="#{escape(s.key)}">{escape(s.title)}</a></li>' for s in sections)
    parts = "\n".join(
        f'<section id="{escape(s.key)}" aria-labelledby="{escape(s.key)}-title"><h2 id="{escape(s.key)}-title">{escape(s.title)}</h2>\n{s.html}</section>'
        for s in sections
    )
    return _PAGE.format(
        csp=escape(_content_security_policy(style)),
        title=escape(title),
        style=style,
        lead=lead,
        links=links,
        body=parts,
    )


def table(caption: str, header: Sequence[str], rows: Iterable[Sequence[str]], *, texts: int = 1) -> str:
    """A table in a box that scrolls by itself. caption, header: texts; rows: HTML cells, the first of a row being its header.

    texts: how many columns, from the left, hold words; the others hold numbers.
    """

    def kind(column: int) -> str:
        return ' class="word"' if column < texts else ""

    head = "".join(f'<th scope="col"{kind(n)}>{escape(name)}</th>' for n, name in enumerate(header))
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>'
        + "".join(f"<td{kind(n)}>{cell}</td>" for n, cell in enumerate(row[1:], start=1))
        + "</tr>"
        for row in rows
    )
    label = escape(caption)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{label}"><table><caption><span>{label}</span></caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def tiles(entries: Iterable[tuple[str, str, str]]) -> str:
    """Key figures: (name: text, value: HTML, remark: text)."""
    parts = "".join(
        f'<div class="tile"><dt>{escape(name)}</dt><dd><span class="value">{value}</span>'
        f'<span class="remark">{escape(remark)}</span></dd></div>'
        for name, value, remark in entries
    )
    return f'<dl class="tiles">{parts}</dl>' if parts else ""


def note(html: str, kind: str = "note") -> str:
    """A sentence that stands out. kind: note, missing (what is not there, and how to get it) or warning."""
    return f'<p class="{kind}">{html}</p>'


def missing(text: str, command: str = "") -> str:
    """Says plainly that a part has nothing to show, and the command that would change that."""
    how = f" <code>{escape(command)}</code>" if command else ""
    return note(f"{escape(text)}{how}", "missing")


def details(summary: str, html: str) -> str:
    """A part that is folded away. summary: text."""
    return f"<details><summary>{escape(summary)}</summary>{html}</details>"


def preformatted(label: str, text: str) -> str:
    """Text in lines, in a box that scrolls by itself."""
    return f'<pre tabindex="0" role="region" aria-label="{escape(label)}">{escape(text)}</pre>'


def number(value: float | None, style: str = "{:.3f}") -> str:
    """A number as HTML, with a true minus; a dash where there is none."""
    if value is None:
        return NONE
    text = style.format(value)
    if float(text.rstrip("%").replace(",", "")) == 0.0:
        text = text.lstrip("+-")  # what rounds to nothing has no direction
    return text.replace("-", "&minus;")


def percent(value: float | None) -> str:
    """A share of 1 as HTML."""
    return number(value, "{:.1%}")


def _content_security_policy(style: str) -> str:
    """Nothing may be loaded or run; the one style sheet is allowed by its hash."""
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode("ascii")
    return f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{csp}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="referrer" content="no-referrer">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<a class="skip" href="#main">Skip to the content</a>
<header class="top">{lead}</header>
<div class="columns">
<nav aria-label="Contents"><ol>{links}</ol></nav>
<main id="main" tabindex="-1">
{body}
</main>
</div>
<footer><p>Made by ftengine. This file loads nothing and runs nothing; it can be kept, mailed and printed.</p></footer>
</body>
</html>
"""
