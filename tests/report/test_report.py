"""The report: one file that loads nothing, escapes everything and says what is missing."""

import base64
import hashlib
import itertools
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from ftengine.errors import ConfigError
from ftengine.report.data import ReportData
from ftengine.report.report import write_report
from ftengine.report.run_folder import read_run
from tests.report.report_data import EVIL, NOTICE, case_html, painted, report_data

VOID = {"meta", "img", "source", "br", "image", "path", "rect", "circle", "polyline", "link", "input", "hr"}


class Page(HTMLParser):
    """Tags with their attributes, in order, the texts between them, and whether each tag is closed where it should be."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def written(tmp_path: Path, data: ReportData) -> str:
    path = tmp_path / "deep" / "report.html"
    write_report(path, data)
    return path.read_text(encoding="utf-8")


def test_every_text_from_outside_is_escaped(tmp_path: Path) -> None:
    text = written(tmp_path, report_data(tmp_path, name=EVIL))
    assert "<img src=x" not in text
    page = Page(text)
    assert page.open == []
    assert all((image["src"] or "").startswith("data:image/png;base64,") for image in page.all("img"))
    assert not [a for _, attributes in page.tags for a in attributes if a.startswith("on")]
    assert sum(EVIL in data for data in page.texts) >= 25  # and yet it is readable, everywhere
    assert sum(EVIL in (svg.get("aria-label") or "") for svg in page.all("svg")) >= 10


def test_file_stands_alone(tmp_path: Path) -> None:
    text = written(tmp_path, report_data(tmp_path))
    assert not re.search(r"https?:|//[a-z]", re.sub(r"base64,[A-Za-z0-9+/=]+", "", text))
    page = Page(text)
    assert not {"script", "link", "iframe", "object", "form"} & {tag for tag, _ in page.tags}
    pictures = [a["src"] for a in page.all("img")] + [a["href"] for a in page.all("image")]
    assert len(pictures) > 30
    for picture in pictures:
        content = base64.b64decode((picture or "").removeprefix("data:image/png;base64,"), validate=True)
        assert content.startswith(b"\x89PNG")
    assert all((a["href"] or "").startswith("#") for a in page.all("a"))
    assert len(text) < 500_000


def test_same_data_give_the_same_file(tmp_path: Path) -> None:
    data = report_data(tmp_path)
    assert written(tmp_path, data) == written(
        tmp_path, replace(data, cases=[case_html("a/0"), case_html("b/1", truth=False)])
    )


def test_policy_allows_its_own_style_sheet_and_nothing_else(tmp_path: Path) -> None:
    text = written(tmp_path, report_data(tmp_path))
    policy = next(m["content"] for m in Page(text).all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    style = text.split("<style>", 1)[1].split("</style>", 1)[0]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert (
        policy == f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )
    assert not [attributes for _, attributes in Page(text).tags if "style" in attributes]  # the policy would ignore it


def test_page_has_the_structure_that_screen_readers_use(tmp_path: Path) -> None:
    page = Page(written(tmp_path, report_data(tmp_path)))
    assert page.all("html")[0]["lang"] == "en"
    assert [len(page.all(tag)) for tag in ("header", "nav", "main", "footer", "h1")] == [1, 1, 1, 1, 1]
    assert all(image.get("alt") for image in page.all("img"))
    assert all(svg.get("aria-label") or svg.get("aria-hidden") == "true" for svg in page.all("svg"))
    assert all(svg.get("role") == "img" for svg in page.all("svg") if svg.get("aria-label"))
    assert all(cell.get("scope") in {"row", "col"} for cell in page.all("th"))
    assert len(page.all("caption")) == len(page.all("table")) >= 12
    headings = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert headings[0] == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(headings))
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    assert {(a["href"] or "")[1:] for a in page.all("a")} <= set(ids)
    assert {a["aria-labelledby"] for a in page.all("section")} <= set(ids)


def rows(text: str) -> list[list[str]]:
    found = re.findall(r"<tr>(.*?)</tr>", text, flags=re.DOTALL)
    return [[re.sub(r"<.*?>", "|", c).strip("|") for c in re.findall(r"<t[hd].*?>.*?</t[hd]>", row)] for row in found]


def test_tables_hold_the_figures_and_their_differences(tmp_path: Path) -> None:
    text = written(tmp_path, report_data(tmp_path))
    table = rows(text)
    assert ["Volume", "baseline", "with a/0", "difference"] in table
    assert ["a/0", "0.500", "0.400", "&minus;0.100"] in table
    assert ["b/1", "0.300", "0.700", "+0.400"] in table
    assert ["Class", "Evaluation", "Dice", "HD95, mm", "volumes", "sensitivity"] in table
    assert ["liver_tumor", "baseline", "0.333|0.23 to 0.43", "12.3", "3", "0.750"] in table
    assert ["liver", "with a/0", "0.900", "&ndash;", "2", "&ndash;"] in table
    assert ["liver_tumor", "baseline", *["75.0%|3 of 4"] * 3, "0.500", "0.600", "&ndash;"] in table
    assert ["liver", "tiny", "8", "6", "75.0%", "1.25"] in table
    assert ["a/0", "synthesis of a/0", "5.0%", "8.0", "0.250", "50"] in table
    assert ["synthesis + qc", "90.0%", "&ndash;"] in table
    assert ["all stages", "17.3"] in table
    assert "higher than that of <q>baseline</q> on 2 and lower on 1; the mean difference is +0.333" in text
    assert "paired t-test p = 0.289" in text


def test_difference_that_rounds_to_nothing_has_no_sign(tmp_path: Path) -> None:
    data = report_data(tmp_path)
    first = data.evaluations[0]
    second = replace(first, name="second", dice={"a/0": {"liver_tumor": 0.50001}})
    assert ["a/0", "0.500", "0.500", "0.000"] in rows(written(tmp_path, replace(data, evaluations=[first, second])))


def test_says_first_what_the_data_are_and_what_is_wrong(tmp_path: Path) -> None:
    text = written(tmp_path, report_data(tmp_path))
    before_results = text.split('id="results"')[0]
    assert NOTICE in before_results
    assert "Unfinished: 200 of 200 steps are logged" in before_results
    assert "beware of a/0" in before_results


def test_parts_without_anything_say_so(tmp_path: Path) -> None:
    text = written(tmp_path, ReportData(title="empty"))
    for sentence in (
        "Nothing was given to report on",
        "No evaluation was given",
        "No case is drawn",
        "No painted tumour is drawn",
        "The judge was not calibrated here",
        "No run was given",
        "has logged its speed",
        "there is no configuration to show",
    ):
        assert sentence in text
    assert len(re.findall(r"<h2", text)) == 8
    assert Page(text).open == []


def test_run_that_has_logged_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"step": 9, "lo', encoding="utf-8")
    text = written(tmp_path, ReportData(title="t", runs=[read_run(folder)]))
    assert "No step has been logged yet" in text
    assert "last line of metrics.jsonl is cut off" in text
    assert "No loss was logged" in text
    assert "config.yaml is not there" in text


@pytest.mark.parametrize(("truth", "predicted"), [(True, False), (False, True), (False, False)])
def test_case_without_a_true_or_a_predicted_tumour(*, truth: bool, predicted: bool) -> None:
    html = case_html("a", truth=truth, predicted=predicted)
    assert html.count('class="truth"') == (4 if truth else 0)
    assert html.count('class="prediction"') == (4 if predicted else 0)
    assert ("the truth holds none" in html) == (predicted and not truth)
    assert ("neither truth nor prediction" in html) == (not predicted and not truth)


def test_painted_figure_has_all_panels_and_says_window_millimetres_and_verdict() -> None:
    tiles, figures = painted("a/0")
    assert [t.info.size_class for t in tiles] == ["tiny", "small"]
    html = figures[0].html
    assert html.count('role="img" aria-label="') == 16  # 3 planes of 5 panels, the scale of colours
    for words in ("liver window \N{MINUS SIGN}45 to 105 HU", "P = 0.80, passed", "3 x 3 x 3 mm", "50 HU", "index 0"):
        assert words in html
    assert "badge bad" in painted("a/0", proportion=0.1)[1][0].html
    assert "not judged" in painted("a/0", proportion=float("nan"))[1][0].html


def test_picture_that_is_none_is_named(tmp_path: Path) -> None:
    data = report_data(tmp_path)
    picture = data.runs[0].pictures[0]
    picture.write_text("<svg onload=alert(1)>", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"sheet-000\.png: is not a PNG"):
        written(tmp_path, data)
    picture.unlink()
    with pytest.raises(ConfigError, match=r"sheet-000\.png: cannot be read"):
        written(tmp_path, data)
