"""The page in a real browser: headless Chromium, driven by Playwright."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from folders import HOSTILE, complete_run, poison, rewrite, write_boundary, write_comparison

from farss.report import write_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
api = pytest.importorskip("playwright.sync_api", reason="the browser tests need Playwright: pip install -e '.[test]'")
if CHROMIUM is None:
    pytest.skip("the browser tests need Chromium: apt-get install chromium", allow_module_level=True)

PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
DESKTOP = {"viewport": {"width": 1280, "height": 900}}

FITS = "width => [...document.querySelectorAll('.plot .svg-container')].every((drawn) => drawn.offsetWidth < width)"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run, a comparison, and a run full of hostile texts."""
    root = tmp_path_factory.mktemp("pages")
    run, comparison, hostile = complete_run(root / "run"), write_comparison(root / "comparison"), complete_run(root / "hostile")
    write_boundary(run)
    poison(hostile)
    rewrite(hostile / "plan.json", rename_layers)
    return {folder.name: write_report(folder, figures=False) for folder in (run, comparison, hostile)}


def rename_layers(values: dict[str, Any]) -> None:
    """Hostile names for every layer of a plan."""
    values["layers"] = {f"{HOSTILE}.{layer['block']}.{name}": layer for name, layer in values["layers"].items()}


@pytest.fixture
def visit(browser: Any, pages: dict[str, Path]) -> Iterator[Callable[..., Any]]:
    """Open a page; when the test ends, nothing may have gone wrong in it and nothing may have been asked of a network."""
    troubles: list[str] = []
    contexts = []

    def opened(name: str, **options: Any) -> Any:
        context = browser.new_context(**(DESKTOP | options))
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: troubles.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("dialog", lambda dialog: (troubles.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda request: troubles.append(request.url) if request.url.startswith(("http", "ws")) else None)
        page.goto(pages[name].as_uri())
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not troubles


def plotted(page: Any, name: str) -> dict[str, Any]:
    """What plotly has drawn: names and visibility of the traces, ranges of the axes."""
    script = """(place) => JSON.stringify({
      names: place.data.map((trace) => trace.name),
      hidden: place.data.filter((trace) => trace.visible === "legendonly").map((trace) => trace.name),
      x: place._fullLayout.xaxis.range, y: place.data.map((trace) => trace.y), ink: place._fullLayout.font.color,
    })"""
    found: dict[str, Any] = json.loads(page.locator(f"#plot-{name}").evaluate(script))
    return found


def hover(page: Any, name: str, selector: str, at: float = 0.5) -> str:
    """Point at something in a figure, `at` this share of its width and height, and read what appears."""
    page.locator(f"#plot-{name}").evaluate("(place) => place.scrollIntoView({behavior: 'instant'})")
    box = page.locator(f"#plot-{name} {selector}").first.bounding_box()
    x, y = box["x"] + at * box["width"], box["y"] + at * box["height"]
    page.mouse.move(x - 3, y)
    page.mouse.move(x, y, steps=2)
    label = page.locator(f"#plot-{name} .hoverlayer .hovertext")
    label.wait_for()
    return str(label.text_content())


# --- drawn -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["run", "comparison", "hostile"])
def test_every_figure_is_drawn_and_nothing_sticks_out(visit: Callable[..., Any], name: str) -> None:
    page = visit(name)
    plots = page.locator(".plot")
    assert plots.count() >= 5
    for width in (1280, 390):
        page.set_viewport_size({"width": width, "height": 844})
        page.wait_for_function(
            "width => [...document.querySelectorAll('.plot .svg-container')].every((p) => p.offsetWidth < width)", arg=width
        )
        assert all(plots.nth(place).locator(".main-svg").count() for place in range(plots.count()))
        assert page.evaluate("document.documentElement.scrollWidth") == width


def test_dark_and_light_have_their_own_colours(visit: Callable[..., Any]) -> None:
    page = visit("run", color_scheme="dark")
    paper = "getComputedStyle(document.body).backgroundColor"
    dark = (page.evaluate(paper), plotted(page, "loss")["ink"])
    page.emulate_media(color_scheme="light")
    assert page.evaluate(paper) != dark[0]
    assert plotted(page, "loss")["ink"] != dark[1]


def test_without_scripts_the_tables_and_texts_are_there(visit: Callable[..., Any]) -> None:
    page = visit("run", java_script_enabled=False)
    assert page.locator("#scores table").is_visible()
    assert page.locator("noscript p").is_visible()
    assert not page.locator("[data-save]").first.is_visible()


def test_print_is_light_and_complete(visit: Callable[..., Any]) -> None:
    page = visit("comparison", color_scheme="dark")
    dark, closed = plotted(page, "loss")["ink"], page.locator("details:not([open])").count()
    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    assert plotted(page, "loss")["ink"] != dark
    assert page.locator("details:not([open])").count() == 0 < closed
    page.evaluate("window.dispatchEvent(new Event('afterprint'))")
    assert plotted(page, "loss")["ink"] == dark
    assert page.locator("details:not([open])").count() == closed
    assert page.pdf(format="A4").startswith(b"%PDF")


# --- used ------------------------------------------------------------------------------------------------------------


def test_pointing_tells_what_stands_there(visit: Callable[..., Any]) -> None:
    page = visit("comparison")
    assert "rank 2, least important directions" in hover(page, "plan", ".heatmaplayer image", at=0.02)
    assert "% of all" in hover(page, "plan", ".barlayer .point path")
    assert "KT 95.6" in hover(page, "balance", ".scatterlayer .trace .points path")


def test_a_click_in_the_legend_hides_a_method_and_a_second_one_brings_it_back(visit: Callable[..., Any]) -> None:
    page = visit("comparison")
    entry = page.locator("#plot-balance .legend .traces").filter(has_text="lora").locator(".legendtoggle")
    shown = page.locator("#plot-balance .scatterlayer .trace").count()
    entry.click()
    page.wait_for_function("place => place.data.some((trace) => trace.visible === 'legendonly')", arg=page.query_selector("#plot-balance"))
    assert plotted(page, "balance")["hidden"] == ["lora"]
    assert page.locator("#plot-balance .scatterlayer .trace").count() == shown - 1
    page.emulate_media(color_scheme="dark")
    page.wait_for_timeout(200)
    assert page.locator("#plot-balance .scatterlayer .trace").count() == shown - 1, "new colours bring nothing back"
    page.wait_for_timeout(400)  # two clicks close together are a double click
    entry.click()
    page.wait_for_function("shown => document.querySelectorAll('#plot-balance .scatterlayer .trace').length === shown", arg=shown)


def test_a_chooser_shows_another_layer(visit: Callable[..., Any]) -> None:
    page = visit("run")
    first = plotted(page, "spectrum")
    page.locator('select[data-for="spectrum"]').select_option("41")
    last = plotted(page, "spectrum")
    assert first["names"][1] == "least important directions"
    assert last["names"][1] == "most important directions"
    assert first["y"] != last["y"]


def test_dragging_zooms_and_a_double_click_goes_back(visit: Callable[..., Any]) -> None:
    page = visit("run")
    whole = plotted(page, "importance")["x"]
    page.locator("#plot-importance").scroll_into_view_if_needed()
    box = page.locator("#plot-importance .nsewdrag").bounding_box()
    page.mouse.move(box["x"] + 0.3 * box["width"], box["y"] + 0.2 * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + 0.6 * box["width"], box["y"] + 0.8 * box["height"], steps=4)
    page.mouse.up()
    low, high = plotted(page, "importance")["x"]
    assert whole[0] < low < high < whole[1]
    for _ in range(5):  # on a busy machine two clicks may come too far apart for plotly
        page.mouse.dblclick(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        page.wait_for_timeout(500)
        if plotted(page, "importance")["x"][0] < 0:
            break
    assert plotted(page, "importance")["x"] == pytest.approx(whole)


def test_a_figure_is_saved_as_a_file(visit: Callable[..., Any]) -> None:
    page = visit("run", color_scheme="dark")
    for kind, start in {"svg": b"<svg", "png": b"\x89PNG"}.items():
        with page.expect_download() as waiting:
            page.locator(f'[data-save="boundary"][data-kind="{kind}"]').click()
        assert waiting.value.suggested_filename == f"boundary.{kind}"
        content = Path(waiting.value.path()).read_bytes()
        assert content.startswith(start)
        assert kind == "png" or b"rgb(255, 255, 255)" in content, "on white, also from a dark page"


# --- hostile ---------------------------------------------------------------------------------------------------------


def test_hostile_texts_do_no_harm(visit: Callable[..., Any]) -> None:
    page = visit("hostile", **PHONE)
    assert page.locator("img, iframe, form").count() == 0
    assert page.locator("script").count() == 3
    assert "alert(1)" in page.locator("#examples").text_content()
    assert f"{100_000 + len(HOSTILE):,} characters" in page.locator("#examples").text_content()
    assert page.locator("#examples bdi").first.evaluate("place => getComputedStyle(place).unicodeBidi") == "isolate"


def test_hostile_names_are_shown_as_they_are(visit: Callable[..., Any]) -> None:
    assert "</script><script>alert(1)</script>" in hover(visit("hostile"), "plan", ".heatmaplayer image", at=0.02)
