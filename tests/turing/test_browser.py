"""Two readers in a real browser, one with keys alone, one with fingers: what they answer is what is scored."""

import json
import re
import shutil
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ftengine.bench.turing import Server
from ftengine.pictures.panels import radiological, windowed
from ftengine.store.reader import Store
from ftengine.turing.score import score_studies
from ftengine.turing.study import StudyFolder, read_key
from tests.turing.support import make_study

playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install 'ftengine[dev]'")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")
DESKTOP, TABLET, PHONE = {"width": 1280, "height": 900}, {"width": 820, "height": 1180}, {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright.expect.set_options(
        timeout=20_000
    )  # an answer is on the disk before the page goes on: seconds on a busy disk
    with playwright.sync_playwright() as api:
        browser = api.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture
def served(turing_store: Store, tmp_path: Path) -> Iterator[tuple[StudyFolder, Path, Server]]:
    built, folder = make_study(turing_store, tmp_path, repeats=2, training_cases=2)
    server = Server(folder.path)
    yield folder, built.key, server
    server.end()


class Seen:
    """All that a page asked for and got, and what it complained of."""

    def __init__(self, page: Any) -> None:
        self.urls: list[str] = []
        self.responses: list[Any] = []
        self.complaints: list[str] = []
        page.on("request", lambda request: self.urls.append(request.url))
        page.on("response", lambda response: self.responses.append(response))  # noqa: PLW0108 - playwright marks its handlers
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("console", lambda message: self.complaints.append(message.text))


def _open(browser: Any, link: str, viewport: dict[str, int], **options: Any) -> tuple[Any, Seen]:
    page = browser.new_context(viewport=viewport, **options).new_page()
    page.set_default_timeout(20_000)
    seen = Seen(page)
    page.goto(link)
    _loaded(page)
    return page, seen


def _loaded(page: Any) -> None:
    playwright.expect(page.get_by_label("CT viewer")).to_have_attribute("aria-busy", "false")


def _heading(page: Any, text: str) -> None:
    playwright.expect(page.get_by_role("heading", level=1)).to_have_text(text)


def test_two_readers_answer_a_whole_study(browser: Any, served: tuple[StudyFolder, Path, Server]) -> None:
    folder, key_path, server = served
    base = f"http://127.0.0.1:{server.port}/"
    truth = read_key(key_path).truth
    script = {r.id: [(n % 3 == 0, 1 + n % 5, f"{r.name} {n}") for n in range(8)] for r in folder.study.readers}

    headers: dict[bool, set[str]] = {True: set(), False: set()}
    desktop, seen_there = _open(browser, server.links["Ada"], DESKTOP)
    assert desktop.url == base  # the link is gone from the address
    _heading(desktop, "Training case 1 of 2")
    for number, (synthetic, confidence, comment) in enumerate(script["r01"]):
        _answer_with_keys(desktop, synthetic, confidence, comment)
        if number < 2:
            case = folder.study.readers[0].showings[number].case
            name = {True: "synthetic", False: "real"}
            heading = f"This tumour is {name[truth[case].synthetic]}"
            playwright.expect(desktop.locator("#feedback-title")).to_have_text(heading)
            playwright.expect(desktop.locator("#feedback-text")).to_contain_text(f"You answered {name[synthetic]}")
            desktop.keyboard.press("Enter")
            _heading(desktop, ("Training case 2 of 2", "Case 1 of 6")[number])
        if number == 4:
            _heading(desktop, "Case 4 of 6")
            desktop.keyboard.press("s")  # not saved yet: a reload brings it back
            headers = _headers_by_truth(seen_there, folder, truth)  # a reload takes the bodies away
            desktop.reload()
            _heading(desktop, "Case 4 of 6")
            _loaded(desktop)
            playwright.expect(desktop.locator('input[name="synthetic"][value="true"]')).to_be_checked()
    playwright.expect(desktop.get_by_text("All cases are answered").last).to_be_visible()

    touch = {"has_touch": True, "is_mobile": True, "device_scale_factor": 2}
    tablet, seen_on_tablet = _open(browser, server.links["Ben"], TABLET, **touch)
    seen = [seen_there, seen_on_tablet]
    for number, (synthetic, confidence, comment) in enumerate(script["r02"]):
        if number == 4:  # on another device
            tablet.context.close()
            tablet, seen_on_phone = _open(browser, server.links["Ben"], PHONE, **touch)
            seen.append(seen_on_phone)
            _heading(tablet, "Case 3 of 6")
        _answer_with_fingers(tablet, synthetic, confidence, comment)
        if number < 2:
            tablet.get_by_role("button", name="Next case").tap()
            _heading(tablet, ("Training case 2 of 2", "Case 1 of 6")[number])
    playwright.expect(tablet.get_by_text("All cases are answered").last).to_be_visible()

    for page in seen:
        assert all(url.startswith(base) for url in page.urls)
        assert page.complaints == []
    for synthetic, more in _headers_by_truth(seen_there, folder, truth).items():
        headers[synthetic] |= more
    assert len(headers[True]) == 1
    assert headers[True] == headers[False]
    answers = score_studies([folder.path], [key_path]).answers
    assert len(answers) == 12
    for reader in folder.study.readers:
        mine = [a for a in answers if a.reader == reader.name]
        counted = [s for s in reader.showings if not s.training]
        said = [(a.said_synthetic, a.confidence, a.comment) for a in mine]
        assert said == script[reader.id][2:]
        assert [a.is_synthetic for a in mine] == [truth[s.case].synthetic for s in counted]
        assert all(0 < a.reading_s < 60 for a in mine)
    assert all(a.click_hit for a in answers if a.reader == "Ada")  # the middle of the view is the marked voxel


def _answer_with_keys(page: Any, synthetic: bool, confidence: int, comment: str) -> None:
    _loaded(page)
    before = page.get_by_label("Slice", exact=True).input_value()
    page.keyboard.press("x")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowDown")
    assert int(page.get_by_label("Slice", exact=True).input_value()) == int(before) + 1
    page.keyboard.press("w")
    page.keyboard.press("s" if synthetic else "r")
    page.keyboard.press(str(confidence))
    page.get_by_label("What gave it away?").focus()
    page.keyboard.type(comment)
    heading = page.get_by_role("heading", level=1).inner_text()
    page.keyboard.press("Control+Enter")
    if not heading.startswith("Training"):
        playwright.expect(page.locator("#heading")).not_to_have_text(heading)


def _answer_with_fingers(page: Any, synthetic: bool, confidence: int, comment: str) -> None:
    _loaded(page)
    page.locator(".choice", has_text="Synthetic" if synthetic else "Real").tap()
    page.locator(".five .choice", has_text=str(confidence)).tap()
    page.get_by_label("What gave it away?").fill(comment)
    heading = page.get_by_role("heading", level=1).inner_text()
    page.get_by_role("button", name="Save and go on").tap()
    if not heading.startswith("Training"):
        playwright.expect(page.locator("#heading")).not_to_have_text(heading)


def _headers_by_truth(seen: Seen, folder: StudyFolder, truth: Any) -> dict[bool, set[str]]:
    """What the headers of real and of synthetic cases were, sizes included; no body tells the truth but after a training answer."""
    shown = folder.study.readers[0].by_item
    headers: dict[bool, set[str]] = {True: set(), False: set()}
    for response in seen.responses:
        item = response.url.rsplit("/", 1)[1]
        if "/api/case/" in response.url:
            told = {k: v for k, v in response.all_headers().items() if k != "date"}
            headers[truth[shown[item].case].synthetic].add(json.dumps(told, sort_keys=True))
        elif response.url.endswith("/api/answer"):
            document = response.json()
            posted = json.loads(response.request.post_data)
            assert (document["truth_of_training_case"] is None) != shown[posted["item"]].training
            assert "synthetic" not in json.dumps(document["state"])
        elif response.url.endswith("/api/state"):
            assert not re.search(r"synthetic|truth|real", response.text())
    seen.responses.clear()
    return headers


def test_the_picture_is_the_slice_in_radiological_view(browser: Any, served: tuple[StudyFolder, Path, Server]) -> None:
    folder, _, server = served
    page, _ = _open(browser, server.links["Ada"], DESKTOP)
    image = folder.image_hu(folder.study.readers[0].showings[0].case)
    page.keyboard.press("m")  # without the ring
    for plane, key, edges in (("axial", "a", "RLAP"), ("coronal", "c", "RLSI"), ("sagittal", "g", "APSI")):
        page.keyboard.press(key)
        axis = ("axial", "coronal", "sagittal").index(plane)
        page.get_by_label("Slice", exact=True).fill(str(7 + axis))
        playwright.expect(page.locator("#where")).to_contain_text(f"Slice {7 + axis} of {image.shape[axis]}")
        assert [page.locator(f"#edge-{s}").inner_text() for s in ("left", "right", "top", "bottom")] == list(edges)
        wanted = windowed(radiological(image, plane, 6 + axis), folder.study.window_hu)  # type: ignore[arg-type]  # one of the planes
        found = _greys_at_voxels(page, wanted.shape)
        inner = np.s_[2:-2, 2:-2]  # away from letters and the scale bar
        assert np.corrcoef(found[inner].ravel(), wanted[inner].ravel())[0, 1] > 0.98
        assert np.abs(found[inner] - wanted[inner]).mean() < 6  # smoothed when it is enlarged


def _greys_at_voxels(page: Any, shape: tuple[int, ...]) -> Any:
    """Grey values of the canvas where the middles of a slice's voxels lie; all spacings are equal."""
    return np.array(
        page.evaluate(
            """([rows, columns]) => {
              const canvas = document.getElementById("image"), pen = canvas.getContext("2d");
              const scale = Math.min(canvas.width / columns, canvas.height / rows);
              const left = (canvas.width - columns * scale) / 2, top = (canvas.height - rows * scale) / 2;
              const grey = (r, c) => pen.getImageData(Math.floor(left + (c + 0.5) * scale), Math.floor(top + (r + 0.5) * scale), 1, 1).data[0];
              return Array.from({ length: rows }, (_, r) => Array.from({ length: columns }, (_, c) => grey(r, c)));
            }""",
            list(shape),
        ),
        dtype=np.float64,
    )


def test_fingers_scroll_zoom_and_window(browser: Any, served: tuple[StudyFolder, Path, Server]) -> None:
    page, seen = _open(browser, served[2].links["Ben"], TABLET, has_touch=True)
    touch = page.context.new_cdp_session(page)
    box = page.locator("#image").bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    slider = page.get_by_label("Slice", exact=True)
    before = int(slider.input_value())
    _swipe(touch, [(x, y)], [(x, y - 150)])
    assert int(slider.input_value()) > before  # up is towards the head
    _swipe(touch, [(x - 40, y), (x + 40, y)], [(x - 120, y), (x + 120, y)])
    playwright.expect(page.locator("#zoom")).to_have_text("300 %")  # the fingers are three times as far apart
    page.locator(".tab", has_text="Window").tap()
    width, level = (int(page.get_by_label(name).input_value()) for name in ("Width", "Level"))
    _swipe(touch, [(x, y)], [(x + 80, y + 30)])
    assert int(page.get_by_label("Width").input_value()) > width
    assert int(page.get_by_label("Level").input_value()) > level
    page.get_by_role("button", name="Reset view").tap()
    playwright.expect(page.locator("#zoom")).to_have_text("100 %")
    page.locator(".tab", has_text="Point").tap()
    page.touchscreen.tap(x, y)
    playwright.expect(page.locator("#point-note")).to_contain_text("Point set in axial slice")
    assert seen.complaints == []


def _swipe(touch: Any, start: list[tuple[float, float]], end: list[tuple[float, float]], steps: int = 12) -> None:
    def points(part: float) -> list[dict[str, float]]:
        return [
            {"x": a[0] + part * (b[0] - a[0]), "y": a[1] + part * (b[1] - a[1])}
            for a, b in zip(start, end, strict=True)
        ]

    touch.send("Input.dispatchTouchEvent", {"type": "touchStart", "touchPoints": points(0)})
    for step in range(1, steps + 1):
        touch.send("Input.dispatchTouchEvent", {"type": "touchMove", "touchPoints": points(step / steps)})
    touch.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    time.sleep(0.5)  # Chromium takes no tap for a click while it may still be part of the gesture before


_PLACES = """window.places = () => [...document.querySelectorAll("#reading button, #reading .tab, #reading .choice, #reading input, textarea")]
  .filter((e) => e.checkVisibility()).map((e) => {
    const box = e.getBoundingClientRect(), panel = document.getElementById("answer");
    const down = scrollY + (panel.contains(e) ? panel.scrollTop : 0);
    return [e.id || e.textContent || e.value, ...[box.x, box.y + down, box.right, box.bottom + down].map(Math.round)].join(" ");
  });
  document.addEventListener("DOMContentLoaded", () => new MutationObserver(() => { window.first ??= places(); })
    .observe(document.getElementById("viewer"), { attributeFilter: ["aria-busy"] }));"""


@pytest.mark.parametrize(
    "viewport",
    [DESKTOP, TABLET, PHONE, {"width": 1024, "height": 768}, {"width": 360, "height": 740}],
    ids=lambda v: str(v["width"]),
)
def test_nothing_moves_under_a_finger_while_a_case_is_shown(
    browser: Any, served: tuple[StudyFolder, Path, Server], viewport: dict[str, int]
) -> None:
    """A button that moves between touch and release takes no tap, or its neighbour takes it."""
    page = browser.new_context(viewport=viewport).new_page()
    page.add_init_script(_PLACES)
    page.goto(served[2].links["Ada"])
    _loaded(page)
    first = page.evaluate("first")  # of the moment in which the case can be answered
    assert len(first) > 30
    page.wait_for_timeout(400)  # what comes late
    assert page.evaluate("places()") == first
    slider = page.get_by_label("Slice", exact=True)
    for act in (
        *(button.click for button in page.locator("#presets button").all()),
        *(tab.click for tab in page.locator("#viewer .tab").all()),
        *(partial(slider.fill, str(number)) for number in (1, 9, 10, 20)),
        page.locator("#zoom-in").click,
        page.locator("#point-set").click,
        page.locator("#point-clear").click,
        *(choice.click for choice in page.locator(".choice").all()),
    ):
        act()
        assert page.evaluate("places()") == first


def test_a_pause_stops_the_clock_and_is_kept(browser: Any, served: tuple[StudyFolder, Path, Server]) -> None:
    folder, _, server = served
    page, _ = _open(browser, server.links["Ada"], DESKTOP)
    with page.expect_response("**/api/time"):
        page.keyboard.press("p")
    playwright.expect(page.get_by_role("heading", name="Paused")).to_be_visible()
    playwright.expect(page.locator("#stage")).not_to_be_visible()
    page.get_by_role("button", name="Sign out here").click()
    playwright.expect(page.get_by_role("alert")).to_contain_text("open your link again")
    page.reload()
    playwright.expect(page.get_by_role("alert")).to_contain_text("open the link that you were given")
    page.goto(server.links["Ada"])
    _heading(page, "Training case 1 of 2")
    lines = folder.answers_file(folder.study.readers[0]).read_text().splitlines()
    assert all(json.loads(line)["kind"] == "time" for line in lines)
    assert lines


def test_an_answer_survives_the_death_of_the_server(browser: Any, turing_store: Store, tmp_path: Path) -> None:
    _, folder = make_study(turing_store, tmp_path)
    server = Server(folder.path)
    page, _ = _open(browser, server.links["Ada"], DESKTOP)
    server.process.kill()
    server.process.communicate()
    for key in ("r", "4", "Enter"):
        page.keyboard.press(key)
    playwright.expect(page.locator("#status")).to_contain_text("Not saved yet")
    server = Server(folder.path, server.port)
    _heading(page, "Case 2 of 4")
    server.end()
    (line,) = [json.loads(t) for t in folder.answers_file(folder.study.readers[0]).read_text().splitlines()]
    assert (line["synthetic"], line["confidence"]) == (False, 4)


@pytest.mark.parametrize(
    "viewport", [DESKTOP, TABLET, PHONE, {"width": 320, "height": 640}], ids=lambda v: str(v["width"])
)
def test_everything_can_be_reached_seen_and_named(
    browser: Any, served: tuple[StudyFolder, Path, Server], viewport: dict[str, int]
) -> None:
    """Targets of 44 px, nothing cut at the side (320 px is 1280 at 400 %), a name for each control, a visible focus."""
    page, _ = _open(browser, served[2].links["Ada"], viewport)
    assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
    small = page.evaluate(
        """() => [...document.querySelectorAll("button, .tab, .choice, input[type=number], input[type=range], textarea")]
          .filter((e) => e.checkVisibility() && !e.closest("dialog"))
          .filter((e) => e.getBoundingClientRect().height < 44 || e.getBoundingClientRect().width < 44).map((e) => e.outerHTML)"""
    )
    assert small == []
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll("button, input, textarea, canvas, progress")].filter((e) =>
          !(e.getAttribute("aria-label") || e.textContent.trim() || e.labels?.[0]?.textContent.trim())).map((e) => e.outerHTML)"""
    )
    assert unnamed == []
    outlined = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        outlined.add(
            page.evaluate(
                """() => { const e = document.activeElement, shown = e.nextElementSibling ?? e;
                  const wide = (n) => parseFloat(getComputedStyle(n).outlineWidth) >= 3 && getComputedStyle(n).outlineStyle === "solid";
                  return e === document.body || wide(e) || wide(shown); }"""
            )
        )
    assert outlined == {True}


def test_the_link_that_skips_to_the_answer_keeps_the_reader_in(
    browser: Any, served: tuple[StudyFolder, Path, Server]
) -> None:
    page, seen = _open(browser, served[2].links["Ada"], DESKTOP)
    page.keyboard.press("Tab")
    playwright.expect(page.get_by_text("Skip to the answer")).to_be_focused()
    page.keyboard.press("Enter")
    playwright.expect(page.locator("#answer")).to_be_focused()
    page.keyboard.press("Tab")
    playwright.expect(page.locator('input[name="synthetic"]').first).to_be_focused()
    page.evaluate("location.hash = 'answer'")  # as an address that was kept
    page.keyboard.press("s")
    for _ in range(2):
        _loaded(page)
        _heading(page, "Training case 1 of 2")
        playwright.expect(page.locator("#problem")).to_be_hidden()
        playwright.expect(page.locator('input[name="synthetic"][value="true"]')).to_be_checked()
        page.reload()
    assert page.url.endswith("#answer")
    assert sum(url.endswith("/api/session") for url in seen.urls) == 1
    assert seen.complaints == []
    _loaded(page)
    page.evaluate("(link) => location.assign(link)", served[2].links["Ben"])  # another reader's link in the same tab
    playwright.expect(page.locator("#reader")).to_have_text("Reader Ben")


def test_a_case_is_on_screen_in_good_time(browser: Any, served: tuple[StudyFolder, Path, Server]) -> None:
    page, _ = _open(browser, served[2].links["Ada"], DESKTOP)
    took_ms = page.evaluate(
        """() => { const of = (part) => performance.getEntriesByType("resource").filter((e) => e.name.includes(part));
          return of("/api/case/")[0].responseEnd - of("/api/state")[0].startTime; }"""
    )
    assert 0 < took_ms < 5000  # wanted: below 1000; a machine that runs tests beside others gets more


def _luminance(color: str) -> float:
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_contrasts_are_those_of_wcag_aa() -> None:
    style = (Path(__file__).parents[2] / "ftengine/turing/page/app.css").read_text()
    colors = dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6})", style))

    def ratio(a: str, b: str) -> float:
        high, low = sorted((_luminance(colors[a]), _luminance(colors[b])), reverse=True)
        return (high + 0.05) / (low + 0.05)

    for back in ("back", "panel", "raised"):
        for text in ("text", "faint", "bad"):
            assert ratio(text, back) >= 4.5, (text, back)
        for part in ("line", "accent", "mark"):
            assert ratio(part, back) >= 3, (part, back)
    assert ratio("on-accent", "accent") >= 4.5
