"""The page of a report in a browser: `make page`, or where playwright, plotly and Chromium are installed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from duallora.grid import report

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: make page")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ROOT = Path(__file__).parents[2]
WIDTHS = {"phone": 390, "desk": 1280}


@pytest.fixture(scope="module")
def browser():
    if not report.plotly():
        pytest.skip("needs plotly: make page")
    with playwright.sync_playwright() as run:
        try:
            opened = run.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"no Chromium: {str(error).splitlines()[0]}")
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    studies = []
    for name in ("table2-mini", "table4-mini"):
        summary = json.loads((ROOT / "results" / "studies" / f"{name}.json").read_text())
        for curve in summary["curves"][:1]:
            curve["loss"][3] = 1000.0  # one that went away
        studies.append(summary)
    path = tmp_path_factory.mktemp("page") / "report.html"
    report.report(studies, path)
    return path


@pytest.fixture(params=WIDTHS)
def page(request, browser, file):
    """The page, at a width, with all it asked for and complained about."""
    context = browser.new_context(viewport={"width": WIDTHS[request.param], "height": 900}, color_scheme="dark")
    opened = context.new_page()
    opened.asked, opened.said = [], []
    opened.on("request", lambda request: opened.asked.append(request.url))
    opened.on(
        "console", lambda message: opened.said.append(message.text) if message.type in ("error", "warning") else None
    )
    opened.on("pageerror", lambda error: opened.said.append(str(error)))
    opened.goto(file.as_uri())
    for element in opened.query_selector_all("[data-plot]"):  # drawn when they come near
        element.scroll_into_view_if_needed()
        opened.wait_for_function("e => e.querySelector('.main-svg')", arg=element)
    yield opened
    context.close()


def test_the_page_works_by_itself_at_every_width(page, file):
    """No request but for the file, no complaint, nothing wider than the screen, every plot with words for those who see none."""
    assert page.asked == [file.as_uri()]
    assert page.said == []
    assert page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"]
    plots = page.query_selector_all("[data-plot]")
    assert len(plots) >= 6
    for plot in plots:
        assert len(plot.get_attribute("aria-label")) > 40
        assert plot.bounding_box()["width"] <= page.viewport_size["width"]
    colors = page.evaluate("[...document.querySelectorAll('[data-plot]')].map(e => e.layout.font.color)")
    assert {*colors} == {page.evaluate("getComputedStyle(document.documentElement).getPropertyValue('--soft').trim()")}


def test_tables_sort_by_number_up_and_down_from_the_keyboard(page):
    head = page.locator("table").first.locator("thead button").nth(1)
    head.focus()
    columns = []
    for sort in ("ascending", "descending"):
        page.keyboard.press("Enter")
        assert page.locator("table").first.locator("thead th").nth(1).get_attribute("aria-sort") == sort
        texts = page.locator("table").first.locator("tbody tr td:nth-child(2) span").all_text_contents()
        columns.append([int(text.replace(",", "")) for text in texts])
    assert columns == [sorted(columns[0]), sorted(columns[0], reverse=True)]
    assert columns[0][0] < columns[0][-1]


def test_a_method_is_toggled_in_all_plots_and_an_outlier_does_not_flatten_its_panel(page):
    section = page.locator("section").first
    visible = "(e, name) => e.data.filter(t => t.name === name).map(t => t.visible)"
    one = section.locator(".variants button").nth(1)
    name = one.text_content()
    one.click()
    assert one.get_attribute("aria-pressed") == "false"
    found = [plot.evaluate(visible, name) for plot in section.locator("[data-plot]").all()]
    assert sum(map(len, found)) >= 2
    assert not any(any(shown) for shown in found)
    one.click()
    loss = section.locator("[data-plot=loss]")
    top = "e => e._fullLayout.yaxis.range[1]"
    assert loss.evaluate(top) < 10
    outside = section.locator("figure", has=page.locator("[data-plot=loss]")).locator(
        "button", has_text="all points (1 outside)"
    )
    outside.click()
    assert loss.evaluate(top) > 900
    outside.click()
    log = section.locator("figure", has=page.locator("[data-plot=loss]")).locator("button", has_text="log y")
    log.click()
    assert loss.evaluate("e => e._fullLayout.yaxis.type") == "log"
    choice = section.locator("figure", has=page.locator("[data-plot=tradeoff]")).locator("select")
    choice.select_option("1")
    assert "over" in section.locator("[data-plot=tradeoff]").get_attribute("aria-label")
