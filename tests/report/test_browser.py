"""The page in a real browser: offline, narrow and wide, light and dark, and while a study runs."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import made_run
import pytest

from headwater.report import page as report
from headwater.report.watch import serving

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")

CONTRAST = """() => {
  const rgb = (text) => text.match(/[\\d.]+/g).slice(0, 3).map(Number);
  const light = (c) => c.map((v) => (v /= 255) <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const back = (e) => { for (; e; e = e.parentElement) {
    const c = getComputedStyle(e).backgroundColor; if (c !== "rgba(0, 0, 0, 0)") return rgb(c); }
    return [255, 255, 255]; };
  const low = [];
  for (const e of document.querySelectorAll("body *")) {
    const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!own || !e.checkVisibility() || ["SCRIPT", "STYLE", "NOSCRIPT", "TITLE", "title"].includes(e.tagName)) continue;
    const style = getComputedStyle(e), ink = e instanceof SVGElement ? style.fill : style.color;
    const [a, b] = [light(rgb(ink)), light(back(e))].sort((x, y) => y - x);
    const ratio = (a + .05) / (b + .05);
    if (ratio < 4.5) low.push([e.tagName, e.className.baseVal ?? e.className, ratio, e.textContent.slice(0, 30)]);
  }
  return low;
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        # Root, as in many containers, cannot use Chromium's own sandbox; the page is ours.
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = made_run.make(tmp_path_factory.mktemp("browser"), budgets=(32, 128), failed=True)
    return report.write(root)


def visit(browser: Any, url: str, complaints: list[str], **context: Any) -> Any:
    """A page that notes every message on its console, every error and every request beyond its own address."""
    seen = browser.new_context(**context).new_page()
    seen.on("console", lambda message: complaints.append(message.text))
    seen.on("pageerror", lambda error: complaints.append(str(error)))
    seen.on("dialog", lambda dialog: complaints.append(f"dialog {dialog.message}"))
    seen.on(
        "request",
        lambda request: complaints.append(request.url) if not request.url.startswith(("data:", url)) else None,
    )
    seen.goto(url)
    return seen


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [(390, 844), (360, 740), (1440, 900)], ids=str)
def test_it_fits_and_reads(browser: Any, written: Path, size: tuple[int, int], scheme: str):
    complaints: list[str] = []
    viewport = {"width": size[0], "height": size[1]}
    page = visit(
        browser,
        written.as_uri(),
        complaints,
        viewport=viewport,
        color_scheme=scheme,
        offline=True,
        reduced_motion="reduce",
    )
    for opened in (False, True):
        if opened:
            page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
            for button in page.query_selector_all("button.fold"):
                button.click()
        assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
        # What is wider than the page scrolls in its own box, never under the edge.
        parts = "[...document.querySelectorAll('main > section > *')]"
        assert page.evaluate(f"{parts}.filter((e) => e.getBoundingClientRect().right > innerWidth).length") == 0
        assert page.evaluate(CONTRAST) == []
    back = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", back)[:3])) > 384) is (scheme == "light")
    assert complaints == []
    page.context.close()


def test_everything_is_reached_by_keyboard_in_order(browser: Any, written: Path):
    complaints: list[str] = []
    page = visit(browser, written.as_uri(), complaints, viewport={"width": 1440, "height": 900})
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    assert page.evaluate("document.activeElement.getBoundingClientRect().left") >= 0
    stops = "[...document.querySelectorAll('a, button, select, summary, .scroll')]"
    wanted = page.evaluate(f"{stops}.filter((e) => e.checkVisibility()).length")
    tops, seen = [], 0
    for _ in range(wanted * 2):
        kind, top, outline = page.evaluate(
            "(() => { const e = document.activeElement; return [e.tagName, e.getBoundingClientRect().top + scrollY,"
            " getComputedStyle(e).outlineStyle]; })()"
        )
        if kind == "BODY":
            break
        assert outline != "none", kind
        seen += 1
        if not page.evaluate("document.activeElement.closest('.multiples, .answers, nav, .choose') !== null"):
            tops.append(top)
        page.keyboard.press("Tab")
    assert seen >= wanted and tops[1:] == sorted(tops[1:])
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    assert complaints == []
    page.context.close()


def test_selectors_and_folds(browser: Any, written: Path):
    page = visit(browser, written.as_uri(), [], viewport={"width": 1440, "height": 900})
    shown = "[...document.querySelectorAll('{}')].filter((e) => e.checkVisibility()).length"
    assert page.evaluate(shown.format("[data-stage]")) == 1 and page.evaluate(shown.format(".case")) == 1
    page.select_option("#stage-choice", "warmup")
    assert page.inner_text("[data-stage]:not([hidden]) h3") == "warmup"
    page.select_option("#problem-1", index=2)
    page.select_option("#model-1", "bridge@128")
    assert page.evaluate(shown.format(".answer")) == 1 and "two of 2" in page.inner_text(".case:not([hidden])")
    assert page.evaluate(shown.format("tr.stage")) == 0
    button = page.locator("button.fold").first
    assert button.get_attribute("aria-expanded") == "false" and button.inner_text().strip() == "3 stages"
    button.click()
    assert button.get_attribute("aria-expanded") == "true" and page.evaluate(shown.format("tr.stage")) == 3
    page.context.close()


def test_without_javascript_everything_is_there(browser: Any, written: Path):
    page = visit(browser, written.as_uri(), [], java_script_enabled=False)
    for selector in ("[data-stage]", ".case", "tr.stage"):
        found = page.locator(selector)
        assert found.count() > 1 and all(found.nth(i).is_visible() for i in range(found.count()))
    assert not page.locator("#stage-choice").is_visible() and not page.locator("button.fold").first.is_visible()
    page.context.close()


def test_on_paper_nothing_is_hidden(browser: Any, written: Path):
    page = visit(browser, written.as_uri(), [])
    page.emulate_media(media="print")
    assert not page.locator("nav").is_visible() and page.locator("tr.stage").first.is_visible()
    assert page.locator("[data-stage]").nth(1).is_visible()
    page.context.close()


def test_the_live_page_follows_the_run(browser: Any, tmp_path: Path):
    root = made_run.make(tmp_path / "run", at_work=True)
    complaints: list[str] = []
    with serving(root) as url:
        page = visit(browser, url, complaints, viewport={"width": 390, "height": 844})
        assert page.inner_text("#progress .big") == "36 of 42 nodes done"
        page.locator("#cost-n1 summary").click()
        page.locator("#progress").evaluate("e => { window.kept = document.querySelector('#graph'); }")
        page.locator("#cost-n1 summary").focus()
        place = page.evaluate("document.querySelector('#cost-n1').getBoundingClientRect().top")
        before = page.evaluate("scrollY")
        assert before > 1000
        running = next(
            r["key"] for r in map(json.loads, reversed((root / "events.jsonl").read_text().splitlines())) if r["key"]
        )
        results = json.loads((root / "results.json").read_text())
        results["arms"]["bridge"]["seeds"]["0"]["cost"]["flops"] = 9e12
        (root / "results.json").write_text(json.dumps(results))
        with (root / "events.jsonl").open("a") as file:
            file.write(json.dumps({"time": made_run.START + 900, "kind": "done", "key": running, "error": ""}) + "\n")
        sync_api.expect(page.locator("#progress .big")).to_have_text("37 of 42 nodes done", timeout=30000)
        assert page.inner_text("#news") == "37 of 42 nodes done"
        assert page.evaluate("document.querySelector('#cost-n1').open")
        assert abs(page.evaluate("document.querySelector('#cost-n1').getBoundingClientRect().top") - place) < 2
        assert page.evaluate("document.activeElement.closest('details')?.id") == "cost-n1"
        assert page.evaluate("document.querySelectorAll('[data-stage]:not([hidden])').length") == 1
        # What did not change was not touched.
        assert page.evaluate("document.querySelector('#bills').dataset.seen = 'yes'") == "yes"
        shutil.rmtree(root / "nodes" / running)
        page.wait_for_timeout(6500)
        assert page.evaluate("document.querySelector('#bills').dataset.seen") == "yes"
        made_run.make(root)
        sync_api.expect(page.locator("#progress")).to_have_count(0, timeout=30000)
        assert page.inner_text("#news") == "The study is finished."
        assert page.locator("nav a").first.inner_text() == "What it found"
        page.context.close()
    assert complaints == []
