"""The report in headless Chromium: it opens without a word on the console, sorts, filters, switches and answers."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

Open = Callable[..., Any]


@pytest.fixture
def open_page(browser: Any, report: Any) -> Iterator[Open]:
    """Return a function that opens the report; afterwards, nothing may have been said on the console or fetched."""
    contexts, said, fetched = [], [], []

    def open_it(*, width: int = 1280, height: int = 900, **options: Any) -> Any:
        how = {"viewport": {"width": width, "height": height}, "reduced_motion": "reduce"}
        context = browser.new_context(**how, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: (said.append(f"dialog {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda request: fetched.append(request.url))
        page.goto(report.file.as_uri())
        return page

    yield open_it
    for context in contexts:
        context.close()
    assert said == []
    assert {url.partition(":")[0] for url in fetched} <= {"file", "data"}
    assert len([url for url in fetched if url.startswith("file:")]) == len(contexts)


def column(page: Any, table: str, number: int) -> list[str]:
    return page.locator(f"#{table} tbody tr:visible > :nth-child({number + 1})").all_inner_texts()


def number_of(page: Any, table: str, name: str) -> int:
    return page.locator(f"#{table} thead th").all_inner_texts().index(name)


def test_a_hundred_runs_make_a_small_page_soon(report: Any):
    assert report.n_runs == 100
    assert report.file.stat().st_size < 5_000_000
    assert report.seconds < 10


def test_heads_sort(open_page: Open):
    page = open_page()
    average = number_of(page, "g0-source", "average")
    head = page.locator(f"#g0-source thead th:nth-child({average + 1})")
    before = column(page, "g0-source", average)
    for order in ("descending", "ascending"):
        head.get_by_role("button").click()
        assert head.get_attribute("aria-sort") == order
        shown = column(page, "g0-source", average)
        known = [float(text.split()[0]) for text in shown if text != "–"]
        assert known == sorted(known, reverse=order == "descending")
        assert len(known) < len(shown) == len(before)
        assert set(shown[len(known) :]) == {"–"}  # what is missing comes last in either order
    page.locator("#g0-source thead th:first-child button").click()
    methods = column(page, "g0-source", 0)
    assert methods == sorted(methods, key=str.lower) != before
    assert page.locator("#g0-source [aria-sort]").count() == 1


def test_the_filter_hides_rows_and_counts(open_page: Open):
    page = open_page()
    page.get_by_label("Filter rows").nth(-2).fill("LSQ 4 bit, photo")
    found = page.locator("#g0-runs tbody tr:visible")
    assert found.count() == 3
    assert all("erm + lsq 4 bit" in text and "photo" in text for text in found.all_inner_texts())
    assert page.locator("[data-count='g0-runs']").inner_text() == "3 of 100 rows"
    page.get_by_label("Filter rows").nth(-2).fill("")
    assert found.count() == 100


def test_the_switch_changes_tables_and_charts(open_page: Open):
    page = open_page()
    size = page.locator("#g0-size")
    before = size.locator("svg[role=img]").inner_html()
    assert page.locator("#g0-source").is_visible()
    assert not page.locator("#g0-mean").is_visible()
    page.get_by_label("mean", exact=True).check(force=True)
    assert page.locator("#g0-mean").is_visible()
    assert not page.locator("#g0-source").is_visible()
    assert size.locator("svg[role=img]").inner_html() != before


@pytest.mark.parametrize("chart", ["g0-size", "g0-curves", "g0-latency", "g0-risk"])
def test_names_switch_their_lines(open_page: Open, chart: str):
    page = open_page()
    name = "erm + lsq 6 bit" if chart == "g0-curves" else "erm + lsq 4 bit"
    lines = page.locator(f"#{chart} svg[role=img] [data-name='{name}']")
    button = page.locator(f"#{chart} button[data-name='{name}']")
    n = lines.count()
    assert n > 0
    button.click()
    assert button.get_attribute("aria-pressed") == "false"
    assert lines.count() == 0
    button.press("Enter")
    assert button.get_attribute("aria-pressed") == "true"
    assert lines.count() == n
    page.locator(f"#{chart}").get_by_role("button", name="none").click()
    assert page.locator(f"#{chart} svg[role=img] .series").count() == 0


def test_the_sources_can_be_hidden(open_page: Open):
    page = open_page()
    assert page.locator("#g0-curves .dash").count() > 0
    page.locator("#g0-curves").get_by_role("button", name="sources (dashed)").click()
    assert page.locator("#g0-curves .dash").count() == 0
    assert page.locator("#g0-curves .line").count() > 0


def test_points_answer_to_the_pointer(open_page: Open):
    page = open_page()
    dot = page.locator("#g0-size svg[role=img] [data-name='erm + lsq 3 bit'] .dot")
    dot.scroll_into_view_if_needed()
    box = dot.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    tip = page.locator("#tip")
    assert tip.is_visible()
    assert "file (MB)" in tip.inner_text()
    assert page.locator("#g0-size svg.pick .series.on").count() == 1
    page.mouse.move(2, 2)
    assert not tip.is_visible()


def test_points_answer_to_the_keyboard_and_are_read_out(open_page: Open):
    page = open_page()
    chart = page.locator("#g0-dots svg[role=img]")
    chart.focus()
    chart.press("ArrowRight")
    first = page.locator("#live").inner_text()
    chart.press("ArrowRight")
    second = page.locator("#live").inner_text()
    assert "%" in first
    assert "%" in second
    assert first != second
    chart.press("Escape")
    assert not page.locator("#tip").is_visible()


def test_behind_each_chart_stands_its_table(open_page: Open):
    page = open_page()
    page.get_by_label("last", exact=True).check(force=True)
    for chart in ("g0-dots", "g0-size", "g0-latency", "g0-curves"):
        page.locator(f"#{chart} summary").click()
        page.locator(f"#{chart}-data tbody tr").first.wait_for()  # made when it is opened
        assert page.locator(f"#{chart}-data caption").count() == 1
    page.locator("#g0-size-data thead button").nth(1).click()
    sizes = [float(text) for text in column(page, "g0-size-data", 1)]
    assert sizes == sorted(sizes, reverse=True)
    n_methods = page.locator("#g0-size-data tbody tr").count()
    # the table shows what the switch chose: 'last' knows no ensemble
    assert n_methods == len({*column(page, "g0-size-data", 0)})


def test_names_from_files_are_text(open_page: Open):
    page = open_page()
    assert page.title() == "</script><img src=x onerror=alert(1)>"
    assert page.locator("img").count() == 1  # the figure of the analysis
    assert page.locator("img").get_attribute("src").startswith("data:image/png;base64,")
    assert "(backbone=</script><img src=x onerror=alert(1)>)" in page.locator("#g0-source").inner_text()
    page.locator("#g0-curves").get_by_role("button", name="all").click()
    assert page.locator("img").count() == 1
    assert page.locator("#g0-runs a[href*='%3Cimg%20src%3Dx']").count() == 3


def test_no_element_is_injected_and_no_file_from_elsewhere_is_shown(open_page: Open, report: Any):
    page = open_page()
    page.locator("#g0-curves").get_by_role("button", name="all").click()
    strange = "iframe, object, embed, base, form, audio, video, [onerror], [onload], [src^=file], [src^=http]"
    strange += ', link:not([href="data:,"])'
    assert page.evaluate(f"[...document.querySelectorAll('{strange}')].map((e) => e.outerHTML.slice(0, 100))") == []
    assert page.locator("script").count() == 2  # the numbers, and the program
    pictures = page.evaluate("[...document.images].map((image) => atob(image.src.split(',')[1]))")
    assert [text.encode("latin-1") for text in pictures] == [report.pixel]
    assert base64.b64encode(report.secret).decode()[:-4] not in page.content()
    links = page.evaluate("[...document.links].map((one) => one.getAttribute('href'))")
    assert [one for one in links if one.startswith(("/", "..", "file:", "javascript:", "http"))] == []


def test_it_is_readable_on_a_phone(open_page: Open):
    page = open_page(width=390, height=844, is_mobile=True, has_touch=True)
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert page.locator("#g0-dots .name").first.is_visible()


@pytest.mark.parametrize(("scheme", "dark"), [("light", False), ("dark", True)])
def test_it_follows_the_readers_scheme(open_page: Open, scheme: str, dark: bool):
    page = open_page(color_scheme=scheme)
    color = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, color.strip("rgb()").split(","))) < 150) == dark


@pytest.mark.parametrize(("scheme", "other"), [("light", "Dark page"), ("dark", "Light page")])
def test_the_reader_may_choose_the_other_scheme(open_page: Open, scheme: str, other: str):
    page = open_page(color_scheme=scheme)
    background = "getComputedStyle(document.body).backgroundColor"
    before = page.evaluate(background)
    page.get_by_role("button", name=other).click()
    assert page.evaluate(background) != before
    page.get_by_role("button", name="Light page" if scheme == "light" else "Dark page").click()
    assert page.evaluate(background) == before


def test_the_table_of_results_fits_the_window_and_costs_stand_apart(open_page: Open):
    page = open_page()
    assert page.evaluate("document.querySelector('#g0-source').parentElement.scrollWidth <= innerWidth")
    assert "file" not in page.locator("#g0-source thead").inner_text()
    assert "file" in page.locator("#g0-costs thead").inner_text()
    assert page.locator("#g0-mistakes tbody tr").count() == 15


def test_no_axis_of_accuracy_spans_less_than_ten_points(open_page: Open):
    page = open_page()
    for chart, anchor in (("g0-dots", "middle"), ("g0-size", "end")):
        texts = page.locator(f"#{chart} svg[role=img] > text[text-anchor={anchor}]").all_text_contents()
        ticks = [float(text) for text in texts if re.fullmatch(r"[0-9.]+", text)]
        step = sorted(ticks)[1] - sorted(ticks)[0]
        assert max(ticks) - min(ticks) + 2 * step >= 10


def test_paper_shows_every_table_and_no_control(open_page: Open):
    page = open_page()
    page.emulate_media(media="print")
    for selection in ("source", "mean", "last", "oracle"):
        assert page.locator(f"#g0-{selection}").is_visible()
    assert not page.locator("nav").is_visible()
    assert not page.locator("#switch").is_visible()


def test_without_scripts_every_table_is_there(open_page: Open):
    page = open_page(java_script_enabled=False)
    for selection in ("source", "mean", "last", "oracle"):
        assert page.locator(f"#g0-{selection}").is_visible()
    assert not page.locator("#switch").is_visible()


def test_everything_has_a_name_for_those_who_listen(open_page: Open):
    page = open_page()
    wrong = page.evaluate(
        """() => [
          ...[...document.querySelectorAll("table")].filter((t) => !t.caption || !t.querySelector("th[scope=row]")),
          ...[...document.querySelectorAll("thead th")].filter((h) => h.scope !== "col"),
          ...[...document.querySelectorAll("button")].filter((b) => !b.textContent.trim()),
          ...[...document.querySelectorAll("input")].filter((i) => !i.labels.length),
          ...[...document.querySelectorAll("svg")].filter((s) => !s.getAttribute("aria-label") && !s.ariaHidden),
          ...[...document.querySelectorAll("img")].filter((i) => !i.alt),
        ].map((e) => e.outerHTML.slice(0, 100))"""
    )
    assert wrong == []
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map((e) => e.id)")
    assert len(ids) == len(set(ids))
    targets = page.evaluate("[...document.querySelectorAll('a[href^=\"#\"]')].map((a) => a.hash.slice(1))")
    assert set(targets) <= set(ids)
