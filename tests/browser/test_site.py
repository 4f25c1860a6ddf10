"""The site in Chromium, read from the disk: nothing is fetched, nothing fails, nothing is cut off on a phone."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from pages.site import built

from browser.conftest import NARROW, SCREENSHOTS

# Text that ends beyond the window's right edge, where nothing within the article scrolls to show it.
CUT_OFF = """width => [...document.querySelectorAll("article :is(p, li, h1, h2, h3, td, th, pre, img, dt, code, span)")]
    .filter(each => each.getBoundingClientRect().right > width + 1)
    .filter(each => {
        for (let around = each; around.tagName !== "ARTICLE"; around = around.parentElement)
            if (["auto", "scroll"].includes(getComputedStyle(around).overflowX)) return false;
        return true;
    })
    .map(each => each.tagName + " " + each.textContent.slice(0, 60))"""
# Flags in sentences that are broken where a line ends; columns of tables are too narrow for some.
BROKEN = """() => [...document.querySelectorAll("article :is(p, li) > code .pre")]
    .filter(each => !each.closest("td, th") && /^--[a-z-]{1,25}$/.test(each.textContent))
    .filter(each => each.getClientRects().length > 1 || each.offsetHeight > 30)
    .map(each => "broken: " + each.textContent)"""
BRIGHTNESS = """what => getComputedStyle(document.querySelector(what)).backgroundColor.match(/[\\d.]+/g)
    .slice(0, 3).reduce((sum, part) => sum + Number(part), 0) / 765"""


class Watched:
    """A window, and what went wrong in it."""

    def __init__(self, browser: Any, **options: Any) -> None:
        self.page = browser.new_page(**options)
        self.errors: list[str] = []
        self.page.on("console", lambda said: self.errors.append(said.text) if said.type == "error" else None)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda asked: self._ask(asked.url))

    def _ask(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("data", "blob") and not (
            parts.scheme == "file" and Path(parts.path).is_relative_to(built())
        ):
            self.errors.append(f"asks for {url}")

    def open(self, name: str) -> Any:
        self.page.goto(f"file://{built()}/{name}")
        return self.page


def names() -> list[str]:
    site = built()
    return sorted(str(path.relative_to(site)) for path in site.rglob("*.html"))


def test_no_page_asks_for_anything_fails_or_is_cut_off_at_375_pixels(browser):
    watched = Watched(browser, viewport={"width": NARROW, "height": 800})
    wrong = {}
    assert len(names()) > 60
    for name in names():
        page = watched.open(name)
        cut = page.evaluate(CUT_OFF, NARROW) + page.evaluate(BROKEN)
        if page.evaluate("document.documentElement.scrollWidth") > NARROW:
            cut.append("the page scrolls sideways")
        if watched.errors or cut:
            wrong[name] = [*watched.errors, *cut]
            watched.errors.clear()
    assert not wrong
    SCREENSHOTS.mkdir(exist_ok=True)
    for name in ("index", "stacks", "claims", "api/index"):
        watched.open(f"{name}.html").screenshot(path=SCREENSHOTS / f"site-{name.replace('/', '-')}-375.png")


def test_the_search_finds_names_and_words(browser):
    watched = Watched(browser)
    page = watched.open("index.html")
    page.locator("input[name=q]").first.fill("attach")
    page.locator("input[name=q]").first.press("Enter")
    page.wait_for_url("**/search.html?*")
    page.locator("#search-results li a").first.wait_for()
    found = page.locator("#search-results li a").all_inner_texts()
    assert "loraplus.attach" in found
    watched.open("search.html?q=perplexity").locator("#search-results li a").first.wait_for()
    assert not watched.errors


def test_links_of_the_contents_lead_to_their_pages(browser):
    watched = Watched(browser, viewport={"width": 1500, "height": 900})  # wide enough for the page's own contents
    page = watched.open("index.html")
    page.locator(".sidebar-tree a", has_text="Questions").first.click()
    assert page.locator("h1").inner_text().startswith("Questions")
    page.locator(".toc-tree a", has_text="Which factor is B?").first.click()
    assert page.url.endswith("#which-factor-is-b")
    assert not watched.errors


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_follow_the_reader(browser, scheme):
    watched = Watched(browser, color_scheme=scheme, viewport={"width": 1200, "height": 900})
    SCREENSHOTS.mkdir(exist_ok=True)
    for name in ("index", "start", "api/index"):
        page = watched.open(f"{name}.html")
        bright = [page.evaluate(BRIGHTNESS, what) for what in ("body", ".highlight" if name != "api/index" else "body")]
        assert all(each > 0.8 if scheme == "light" else each < 0.25 for each in bright), (name, bright)
        page.screenshot(path=SCREENSHOTS / f"site-{name.replace('/', '-')}-{scheme}.png")
    assert not watched.errors


def test_the_switch_changes_the_colours(browser):
    page = Watched(browser, color_scheme="light", viewport={"width": 1200, "height": 900}).open("index.html")
    themes = set()
    for _ in range(3):
        page.locator(".theme-toggle:visible").first.click()
        themes.add(page.evaluate("document.body.dataset.theme"))
    assert themes == {"light", "dark", "auto"}
