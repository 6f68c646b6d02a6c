"""The page in a real browser without a window: clicks, keys, narrow screens, hostile text."""

from __future__ import annotations

import random
import shutil
import statistics

import pytest

from filtrun.report.page.gather import gather
from filtrun.report.page.html import SCRIPTS, page

sync = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser: pip install 'filtrun[dev]'")
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="there is no Chromium: apt-get install chromium")


@pytest.fixture(scope="module")
def browser():
    with sync.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def address(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("html") / "report.html"
    path.write_bytes(page(gather(folder), "today"))
    return path.as_uri()


@pytest.fixture
def opened(browser, address):
    """Opens the page; afterwards no request, error or message of the browser may have been seen."""
    contexts, seen = [], []

    def start(width: int = 1280, **more):
        context = browser.new_context(viewport={"width": width, "height": 800}, **more)
        contexts.append(context)
        tab = context.new_page()
        tab.on("console", lambda message: seen.append(message.text))
        tab.on("pageerror", lambda error: seen.append(str(error)))
        tab.on("request", lambda request: seen.append(request.url) if request.url[:5] not in ("file:", "data:") else 0)
        tab.goto(address)
        tab.wait_for_selector("html[data-ready]")
        return tab

    yield start
    for context in contexts:
        context.close()
    assert seen == []


def count(tab, text: str) -> None:
    """Waits until the line above the table says so."""
    sync.expect(tab.locator("#count")).to_have_text(text, timeout=10_000)


def cells(tab, title: str) -> list[str]:
    """The texts of a column of the table of runs."""
    heads = [text.strip(" ↑↓▴▾") for text in tab.locator("#table thead th").all_inner_texts()]
    place = heads.index(title) + 1
    return tab.locator(f"#table tbody tr > :nth-child({place})").all_inner_texts()


def test_a_click_on_a_heading_sorts_and_says_so(opened) -> None:
    tab = opened()
    assert tab.locator("#count").inner_text() == "8 of 8 runs"
    tab.click("[data-sort='test/fid']")
    head = tab.locator("th:has([data-sort='test/fid'])")
    assert head.get_attribute("aria-sort") == "ascending"
    assert cells(tab, "FID") == ["12.00", "13.00", "14.00", "20.00", "21.00", "22.00", "–", "–"]
    tab.click("[data-sort='test/fid']")
    assert head.get_attribute("aria-sort") == "descending"
    assert cells(tab, "FID") == ["22.00", "21.00", "20.00", "14.00", "13.00", "12.00", "–", "–"]
    assert tab.locator("[aria-sort='none']").count() == tab.locator("#table thead th[aria-sort]").count() - 1


def test_filters_by_words_conditions_and_choices(opened) -> None:
    tab = opened()
    for words, methods in (
        ("lora", ["lora"] * 3), ("sara seed>=1", ["sara"] * 2), ("test/fid<20.5", ["lora", "sara", "sara", "sara"]),
        ("method.sara.rank=4000 seed!=0", ["sara"] * 2), ("status=failed finite", ["full"]), ("constructor", []),
    ):  # fmt: skip
        tab.fill("#words", words)
        count(tab, f"{len(methods)} of 8 runs")
        assert cells(tab, "Method") == methods, words
    tab.click("#clear")
    count(tab, "8 of 8 runs")
    tab.select_option("#choose-methods", "sara")
    assert cells(tab, "Method") == ["sara"] * 3


def test_tuning_budgets_are_told(opened, browser, sweeps, make_record, searches, tmp_path) -> None:
    tab = opened()
    assert "Tuning" not in tab.inner_text("#table thead")
    assert tab.inner_text("#tuning-note") == "tuning budget: no search on record for any row."
    assert tab.is_hidden("#tuning-warning")
    root = sweeps.sweep(tmp_path / "sweeps", make_record)
    setting = {"methods": ["sara"], "task": "diffuse", "data": "digits", "model": "unet", "scale": "laptop"}
    searches.write_search(tmp_path, "s", ["complete"] * 7, setting=setting)
    path = tmp_path / "report.html"
    path.write_bytes(page(gather(root), "today"))
    context = browser.new_context()
    tab = context.new_page()
    tab.goto(path.as_uri())
    tab.wait_for_selector("html[data-ready]")
    tab.fill("#words", "seed=0")
    count(tab, "2 of 8 runs")
    assert cells(tab, "Tuning") == ["no search on record", "7 trials"]
    assert "sara: 7 trials of 1 seed over trainer.lr" in tab.inner_text("#tuning-note")
    warning = "unlike tuning budgets: no search on record (lora), 7 trials of 1 seed (sara)"
    assert tab.inner_text("#tuning-warning") == warning and tab.is_visible("#tuning-warning")
    context.close()


def test_means_over_seeds(opened) -> None:
    tab = opened()
    tab.click("#means")
    assert tab.get_attribute("#means", "aria-pressed") == "true"
    spread = statistics.stdev([12.0, 13.0, 14.0])
    assert cells(tab, "FID") == [f"{21:.2f} ± {spread:.2f}", f"{13:.2f} ± {spread:.2f}"]
    assert cells(tab, "Seeds") == ["3", "3"]


def test_picked_runs_are_compared(opened) -> None:
    tab = opened()
    tab.fill("#words", "seed=0")
    count(tab, "2 of 8 runs")
    for box in tab.locator("#table tbody input").all():
        box.check()
    settings = tab.locator("#difference tbody th").all_inner_texts()
    assert settings == ["method.lora.rank", "method.sara.rank"]
    assert tab.locator("#difference tbody tr:first-child td").all_inner_texts() == ["1000", "absent"]
    name = tab.get_attribute("#curve-chart svg[role=img]", "aria-label")
    assert name.startswith("Line chart of train/loss") and "lora" in name and "sara" in name
    assert tab.locator("#curve-chart polyline").count() == 2
    assert tab.locator("#pictures img").evaluate_all("all => all.map(i => i.alt)") == [
        "Samples after training of lora, digits, unet, seed 0"
    ]
    tab.locator("#pictures img").scroll_into_view_if_needed()
    assert tab.locator("#pictures img").evaluate("async (i) => { await i.decode(); return i.naturalWidth; }") > 100


def test_the_scatter_plot_marks_and_lists_the_front(opened) -> None:
    tab = opened()
    tab.select_option("#scatter-metric", "test/fid")
    tab.select_option("#scatter-cost", "cost/trainable_params")
    assert tab.locator("#front tbody tr").evaluate_all("all => all.map(r => r.innerText.split('\\t'))") == [
        ["lora", "digits", "unet", "0, 1, 2", "1,000", "21.00"],
        ["sara", "digits", "unet", "0, 1, 2", "4,000", "13.00"],
    ]
    assert "2 points, 2 on the Pareto front" in tab.get_attribute("#scatter-chart svg[role=img]", "aria-label")
    tab.select_option("#scatter-points", "runs")
    assert tab.locator("#scatter-chart svg[role=img] .mark").count() == 6


def slow_front(points, higher):
    sign = 1 if higher else -1

    def beats(p, q):
        a, b = (-p["x"], sign * p["y"]), (-q["x"], sign * q["y"])
        return a != b and a[0] >= b[0] and a[1] >= b[1]

    return [i for i, p in enumerate(points) if not any(beats(q, p) for q in points)]


def test_the_pareto_front_is_that_of_a_comparison_of_all_pairs(browser) -> None:
    from importlib import resources

    script = resources.files("filtrun.report.page").joinpath("assets", "scatter.js").read_text()
    tab = browser.new_page()
    draw = random.Random(1)
    for size in (1, 2, 5, 40, 200):
        for higher in (True, False):
            points = [{"x": draw.randint(0, 12), "y": draw.randint(-6, 6)} for _ in range(size)]
            found = tab.evaluate(f"([p, h]) => {{ {script}; return pareto(p, h); }}", [points, higher])
            assert sorted(found) == slow_front(points, higher)
    assert "scatter.js" in SCRIPTS
    tab.close()


def test_dark_mode_follows_the_system_and_the_button(opened) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    light, dark = opened(color_scheme="light"), opened(color_scheme="dark")
    shades = [light.evaluate(ground), dark.evaluate(ground)]
    assert shades == ["rgb(250, 250, 250)", "rgb(17, 20, 24)"]
    assert [tab.get_attribute("#theme", "aria-pressed") for tab in (light, dark)] == ["false", "true"]
    light.click("#theme")
    dark.click("#theme")
    assert [light.evaluate(ground), dark.evaluate(ground)] == shades[::-1]
    assert [tab.get_attribute("#theme", "aria-pressed") for tab in (light, dark)] == ["true", "false"]


def test_everything_is_reached_by_keyboard(opened) -> None:
    tab = opened()
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.className") == "skip"
    assert tab.evaluate("document.activeElement.getBoundingClientRect().left") >= 0
    tab.keyboard.press("Enter")
    assert tab.evaluate("document.activeElement.id") == "runs"
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.id") == "words"
    for _ in range(60):
        tab.keyboard.press("Tab")
        if tab.evaluate("document.activeElement.dataset.sort") == "test/fid":
            break
    assert tab.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    tab.keyboard.press("Enter")
    assert cells(tab, "FID")[0] == "12.00"
    assert tab.evaluate("document.activeElement.dataset.sort") == "test/fid"
    tab.keyboard.press("Space")
    assert cells(tab, "FID")[0] == "22.00"


@pytest.mark.parametrize("width", [360, 390, 1280])
def test_no_page_scrolls_sideways(opened, width: int) -> None:
    tab = opened(width)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    if width < 500:  # the table is wider than the screen, and scrolls in its box
        assert tab.locator("#runs .box").evaluate("box => box.scrollWidth > box.clientWidth")
    assert tab.locator("svg[role=img]").evaluate_all(
        "all => all.every(s => s.getBoundingClientRect().right <= innerWidth)"
    )


def test_hostile_text_is_shown_and_never_run(opened, sweeps) -> None:
    tab = opened()
    assert tab.evaluate("window.hurt") is None
    assert tab.locator("img:not([src^='data:image/webp'])").count() == 0
    assert sweeps.HOSTILE in tab.locator("#failures pre").evaluate_all("all => all.map(p => p.textContent)")
    assert "the loss is not finite at step 12" in tab.inner_text("#failures")
    assert "torn" in tab.inner_text("#failures")


def test_every_control_has_a_name_and_print_leaves_controls_out(opened) -> None:
    tab = opened()
    unnamed = """[...document.querySelectorAll('button, input, select, [role=img], [role=region]')].filter((e) =>
        !(e.innerText || '').trim() && !e.getAttribute('aria-label') && !e.getAttribute('aria-labelledby')
        && !(e.labels && e.labels.length)).map((e) => e.outerHTML)"""
    assert tab.evaluate(unnamed) == []
    tab.emulate_media(media="print")
    assert not tab.is_visible("#filter") and not tab.is_visible("nav") and tab.is_visible("#table")
