"""The report in a browser: on a desk and on a phone, light and dark, by keyboard, without any network."""

import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from ftengine.report.report import write_report
from tests.report.report_data import EVIL, report_data

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

SIZES = {"desk": (1280, 900), "phone": (390, 844)}
FOCUSABLE = 'a[href], summary, [tabindex="0"]'

# WCAG 2 contrast of every text with the background that it stands on; texts over CT have a halo of their own
CONTRAST = """() => {
  const parts = (c) => c.match(/[\\d.]+/g).map(Number);
  const light = (c) => {
    const [r, g, b] = parts(c).map((v) => v / 255).map((v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (e) => {
    for (; e; e = e.parentElement) {
      const c = parts(getComputedStyle(e).backgroundColor);
      if (c.length === 3 || c[3] === 1) return getComputedStyle(e).backgroundColor;
    }
    return "rgb(255, 255, 255)";
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const e = node.parentElement;
    if (!node.textContent.trim() || e.closest(".ct") || e.tagName === "title" || !e.getClientRects().length) continue;
    const color = e instanceof SVGElement ? getComputedStyle(e).fill : getComputedStyle(e).color;
    const [a, b] = [light(color), light(ground(e))].sort((x, y) => y - x);
    found.push({text: node.textContent.trim().slice(0, 60), ratio: (a + 0.05) / (b + 0.05)});
  }
  return found;
}"""

DECODE = """async () => {
  const sources = [...document.images].map((i) => i.currentSrc || i.src)
    .concat([...document.querySelectorAll("svg image")].map((i) => i.getAttribute("href")));
  const broken = [];
  for (const source of sources) {
    const image = new Image();
    image.src = source;
    try { await image.decode(); } catch (error) { broken.push(source.slice(0, 60)); }
    if (!image.naturalWidth) broken.push(source.slice(0, 60));
  }
  return {count: sources.length, broken};
}"""


@pytest.fixture(scope="module")
def browser() -> "Iterator[Browser]":
    """Debian's Chromium, headless."""
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("no chromium on this machine (apt install chromium)")
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (pip install playwright)")
    with api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report in which everything has a hostile and long name."""
    folder = tmp_path_factory.mktemp("report")
    path = folder / "report.html"
    write_report(path, report_data(folder, name=f"{EVIL}{'long' * 20}/case 1"))
    return path


@pytest.fixture(params=[f"{size} {scheme}" for size in SIZES for scheme in ("light", "dark")])
def shown(browser: "Browser", report: Path, request: pytest.FixtureRequest) -> "Iterator[Page]":
    """The report on a screen; afterwards: nothing was asked of any network, and the console is empty."""
    size, scheme = request.param.split()
    width, height = SIZES[size]
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    page = context.new_page()
    asked: list[str] = []
    said: list[str] = []
    page.on("request", lambda r: asked.append(r.url))
    page.on("console", lambda m: said.append(m.text))
    page.on("pageerror", lambda e: said.append(str(e)))
    page.goto(report.as_uri())
    yield page
    context.close()
    assert [url for url in asked if not url.startswith("data:")] == [report.as_uri()]
    assert said == []


def test_nothing_is_wider_than_the_screen(shown: "Page") -> None:
    for opened in (False, True):
        shown.evaluate("(open) => document.querySelectorAll('details').forEach((d) => { d.open = open; })", opened)
        measured: dict[str, Any] = shown.evaluate(
            "() => ({page: document.documentElement.scrollWidth, screen: document.documentElement.clientWidth})"
        )
        assert measured["page"] <= measured["screen"]
        outside = shown.evaluate(
            "() => [...document.querySelectorAll('main *')].filter((e) => !e.closest('.scroll, pre, svg') &&"
            " e.getBoundingClientRect().right > innerWidth + 1).map((e) => e.outerHTML.slice(0, 120))"
        )
        assert outside == []


def test_texts_have_contrast(shown: "Page") -> None:
    shown.evaluate("() => document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    texts = shown.evaluate(CONTRAST)
    assert len(texts) > 200
    assert [t for t in texts if t["ratio"] < 4.5] == []


def test_pictures_decode_and_have_names(shown: "Page") -> None:
    found = shown.evaluate(DECODE)
    assert found["count"] > 30
    assert found["broken"] == []
    assert shown.evaluate("() => [...document.images].filter((i) => !i.alt).length") == 0
    assert (
        shown.evaluate(
            "() => [...document.querySelectorAll('svg')].filter((s) => !s.getAttribute('aria-label') && s.getAttribute('aria-hidden') !== 'true').length"
        )
        == 0
    )


def test_keyboard_reaches_everything_in_order(shown: "Page") -> None:
    count = shown.evaluate(
        f"() => {{ window.found = [...document.querySelectorAll('{FOCUSABLE}')].filter((e) => e.checkVisibility()); return window.found.length; }}"
    )
    assert count > 20
    order, unseen = [], []
    for _ in range(count):
        shown.keyboard.press("Tab")
        index, visible = shown.evaluate(
            "() => [window.found.indexOf(document.activeElement), getComputedStyle(document.activeElement).outlineStyle !== 'none']"
        )
        order.append(index)
        if not visible:
            unseen.append(index)
    assert order == list(range(count))
    assert unseen == []
    regions = shown.evaluate(
        "() => [...document.querySelectorAll('.scroll, pre')].every((e) => e.tabIndex === 0 && e.getAttribute('aria-label'))"
    )
    assert regions


def test_targets_are_large_enough(shown: "Page") -> None:
    small = shown.evaluate(
        "() => [...document.querySelectorAll('a[href], summary')].filter((e) => e.checkVisibility()).map((e) => [e.textContent,"
        " e.getBoundingClientRect()]).filter(([, b]) => b.width < 24 || b.height < 24).map(([t]) => t)"
    )
    assert small == []


def test_skip_link_and_landmarks(shown: "Page") -> None:
    shown.keyboard.press("Tab")
    assert shown.evaluate("() => document.activeElement.className") == "skip"
    shown.wait_for_function("() => document.activeElement.getBoundingClientRect().top >= 0")
    shown.keyboard.press("Enter")
    assert shown.evaluate("() => document.activeElement.id") == "main"
    for role in ("banner", "navigation", "main", "contentinfo"):
        assert shown.get_by_role(role).count() == 1
    levels = shown.evaluate("() => [...document.querySelectorAll('h1, h2, h3, h4')].map((h) => Number(h.tagName[1]))")
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))


def test_wide_tables_scroll_by_keyboard_in_their_own_box(browser: "Browser", report: Path) -> None:
    page = browser.new_page(viewport={"width": 390, "height": 844})
    page.goto(report.as_uri())
    box = page.locator(".scroll").first
    box.focus()
    assert box.evaluate("(e) => e.scrollWidth > e.clientWidth")
    page.keyboard.press("ArrowRight")
    page.wait_for_function("() => document.querySelector('.scroll').scrollLeft > 0")
    page.close()


def test_prints(browser: "Browser", report: Path) -> None:
    page = browser.new_page(color_scheme="dark")
    page.goto(report.as_uri())
    page.emulate_media(media="print")
    assert not page.locator("nav").is_visible()
    ground, ink = page.evaluate(
        "() => [getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
    )
    assert (ground, ink) == ("rgb(255, 255, 255)", "rgb(0, 0, 0)")
    pdf = page.pdf(format="A4")
    assert pdf.startswith(b"%PDF")
    assert pdf.count(b"/Type /Page\n") + pdf.count(b"/Type /Page ") >= 3
    page.close()
