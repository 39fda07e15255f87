"""The report: one file that loads nothing, escapes everything and says what the data are."""

import base64
import hashlib
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from ftengine.errors import ConfigError
from ftengine.evaluation.pictures import Sheet
from ftengine.evaluation.report import PHANTOM_NOTICE, ArmResult, ReportData, write_report

EVIL = "<img src=x onerror=1>\"'&"


class Page(HTMLParser):
    """Tags with their attributes, in order, and the texts between them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def report_data(folder: Path, *, name: str = "a/0") -> ReportData:
    run = folder / "run"
    run.mkdir()
    lines = [{"step": s, "loss": 2.0 / (s + 1), "loss_fools": 0.7, "wait_s": 0.01} for s in range(9, 100, 10)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    sheet = Sheet(2.0, width_px=320)
    sheet.text(0.1, 0.1, "picture")
    sheet.save(folder / "sheet.png")
    return ReportData(
        title=f"demo {name}",
        tumor_class="liver_tumor",
        arms={
            "baseline": ArmResult({"liver": 0.9, "liver_tumor": 0.4}, 0.75, 1.0, [(name, 0.5), ("b/1", 0.3)]),
            "with synthesis": ArmResult({"liver": 0.88, "liver_tumor": 0.55}, None, 0.5, [(name, 0.4), ("b/1", 0.7)]),
        },
        quality={
            "by_organ": {"liver": {"painted": 8, "passed": 6, "draws": 10}},
            "by_size": {name: {"painted": 0, "passed": 0, "draws": 0}},
        },
        qc_pass_rate=0.75,
        stage_seconds={"convert": 12.34, name: 5.0},
        stall={name: {"wait_fraction": 0.0123, "patches_per_s": 17.5, "median_step_s": 0.123}},
        slowest={name: f"synthesis of {name}"},
        runs={name: run},
        sheets=[(name, folder / "sheet.png")],
        config_yaml=f"seed: 0\nname: {name}\n",
        versions={"ftengine": "0.1.0", name: name},
        notes=[f"note on {name}"],
    )


def written(tmp_path: Path, data: ReportData) -> str:
    path = tmp_path / "deep" / "report.html"
    write_report(path, data)
    return path.read_text(encoding="utf-8")


def test_every_text_from_outside_is_escaped(tmp_path: Path) -> None:
    text = written(tmp_path, report_data(tmp_path, name=EVIL))
    assert "<img src=x" not in text
    page = Page(text)
    assert all((image["src"] or "").startswith("data:image/png;base64,") for image in page.all("img"))
    assert not [a for _, attributes in page.tags for a in attributes if a.startswith("on")]
    assert sum(EVIL in data for data in page.texts) >= 10  # and yet it is readable, everywhere
    assert any(EVIL in (image["alt"] or "") for image in page.all("img"))


def test_file_stands_alone(tmp_path: Path) -> None:
    text = written(tmp_path, report_data(tmp_path))
    assert not re.search(r"https?:|//[a-z]", re.sub(r"base64,[A-Za-z0-9+/=]+", "", text))
    page = Page(text)
    assert not {"script", "link", "iframe", "object", "form"} & {tag for tag, _ in page.tags}
    sources = [a.get("src") or a.get("srcset") or "" for a in page.all("img") + page.all("source")]
    assert len(sources) == 5  # a chart in four versions, a sheet
    for source in sources:
        assert base64.b64decode(source.removeprefix("data:image/png;base64,"), validate=True).startswith(b"\x89PNG")


def test_policy_allows_its_own_style_sheet_and_nothing_else(tmp_path: Path) -> None:
    text = written(tmp_path, report_data(tmp_path))
    policy = next(m["content"] for m in Page(text).all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    style = text.split("<style>", 1)[1].split("</style>", 1)[0]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert (
        policy == f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )
    assert not [attributes for _, attributes in Page(text).tags if "style" in attributes]  # the policy would ignore it


def test_page_is_accessible(tmp_path: Path) -> None:
    page = Page(written(tmp_path, report_data(tmp_path)))
    assert page.all("html")[0]["lang"] == "en"
    assert all(image.get("alt") for image in page.all("img"))
    assert page.all("th")
    assert all(cell.get("scope") in {"row", "col"} for cell in page.all("th"))
    assert len(page.all("caption")) == len(page.all("table")) >= 6
    headings = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert headings[0] == 1
    assert headings.count(1) == 1
    assert set(headings[1:]) == {2}
    assert any(m.get("name") == "viewport" for m in page.all("meta"))


def rows(text: str) -> list[list[str]]:
    found = re.findall(r"<tr>(.*?)</tr>", text, flags=re.DOTALL)
    return [[re.sub(r"<.*?>", "", cell) for cell in re.findall(r"<t[hd].*?>.*?</t[hd]>", row)] for row in found]


def test_tables_hold_the_figures_and_their_differences(tmp_path: Path) -> None:
    table = rows(written(tmp_path, report_data(tmp_path)))
    assert ["Figure", "baseline", "with synthesis", "difference"] in table
    assert ["Dice, liver", "0.900", "0.880", "&minus;0.020"] in table
    assert ["Dice, liver_tumor", "0.400", "0.550", "+0.150"] in table
    assert ["Sensitivity, liver_tumor", "0.75", "&ndash;", "&ndash;"] in table
    assert ["Specificity, liver_tumor", "1.00", "0.50", "&minus;0.50"] in table
    assert ["a/0", "0.500", "0.400", "&minus;0.100"] in table
    assert ["liver", "8", "6", "75.0%", "1.25"] in table
    assert ["a/0", "0", "0", "&ndash;", "&ndash;"] in table
    assert ["a/0", "1.2%", "17.5", "0.123", "synthesis of a/0"] in table
    assert ["all stages", "17.3"] in table


def test_says_plainly_what_the_data_are(tmp_path: Path) -> None:
    data = report_data(tmp_path)
    text = written(tmp_path, data)
    assert PHANTOM_NOTICE in text
    assert "synthetic phantoms" in PHANTOM_NOTICE
    assert "nothing here says how well it works on patients" in PHANTOM_NOTICE
    assert text.index(PHANTOM_NOTICE) < text.index("<h2>")
    assert "quick run" not in text
    assert "quick run" in written(tmp_path, replace(data, quick=True))
    assert "On the 2 held-out volumes with liver_tumor" in text
    assert "on 1 and lower on 1; the mean difference is +0.150" in text


def test_difference_that_rounds_to_nothing_has_no_sign(tmp_path: Path) -> None:
    data = report_data(tmp_path)
    arms = {
        "one": ArmResult({"liver": 0.9}, 0.5, 0.5, [("a/0", 0.5)]),
        "two": ArmResult({"liver": 0.89999}, 0.5, 0.5, [("a/0", 0.5)]),
    }
    table = rows(written(tmp_path, replace(data, arms=arms, qc_pass_rate=0.0)))
    assert ["Dice, liver", "0.900", "0.900", "0.000"] in table
    assert ["a/0", "0.500", "0.500", "0.000"] in table


def test_says_so_where_no_painted_tumour_passed(tmp_path: Path) -> None:
    data = report_data(tmp_path)
    sentence = "no painted tumour reached training"
    assert sentence not in written(tmp_path, data)
    assert sentence in written(tmp_path, replace(data, qc_pass_rate=0.0))


def test_empty_parts_are_left_out(tmp_path: Path) -> None:
    data = replace(
        report_data(tmp_path),
        arms={"only": ArmResult({"liver": None}, None, None, [])},
        quality={},
        qc_pass_rate=None,
        stage_seconds={},
        stall={},
        runs={},
        sheets=[],
        notes=(),
    )
    text = written(tmp_path, data)
    assert re.findall(r"<h2>(.*?)</h2>", text) == ["What was done", "Results", "Configuration and versions"]
    assert ["Dice, liver", "&ndash;"] in rows(text)


def test_run_without_a_loss_has_no_chart(tmp_path: Path) -> None:
    data = report_data(tmp_path)
    (tmp_path / "run" / "metrics.jsonl").write_text("", encoding="utf-8")
    assert "<picture>" not in written(tmp_path, data)


def test_files_that_cannot_be_shown_are_named(tmp_path: Path) -> None:
    data = report_data(tmp_path)
    (tmp_path / "page.png").write_text("<svg onload=alert(1)>", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"page\.png: is not a PNG"):
        written(tmp_path, replace(data, sheets=[("x", tmp_path / "page.png")]))
    with pytest.raises(ConfigError, match=r"missing\.png: cannot be read"):
        written(tmp_path, replace(data, sheets=[("x", tmp_path / "missing.png")]))
    with pytest.raises(ConfigError, match=r"run lost: .*metrics\.jsonl cannot be read"):
        written(tmp_path, replace(data, runs={"lost": tmp_path / "lost"}))
