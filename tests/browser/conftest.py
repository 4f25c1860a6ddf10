"""Headless Chromium for tests of pages: what a page logs and asks for, how it looks. Skipped where there is none."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

SCREENSHOTS = Path(__file__).parent / "screenshots"
"""Looked at by a person; git ignores it."""
NARROW, WIDE = 375, 1280
_CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
# What reaches past the right edge of the window, without the parts of a picture and what is hidden.
_CUT_OFF = """() => [...document.querySelectorAll("body *")]
  .filter(e => !e.closest("svg svg, svg *") && e.checkVisibility() && e.getBoundingClientRect().width > 0)
  .filter(e => e.getBoundingClientRect().right > innerWidth + 1)
  .map(e => e.tagName + ": " + e.textContent.trim().slice(0, 60))"""


@dataclass
class Visit:
    """A page that is open.

    Args:
        page: playwright's.
        errors: what its console and its scripts complained about.
        requests: addresses that it asked for, its own aside.
    """

    page: Any
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def cut_off(self) -> list[str]:
        """What reaches past the right edge of the window; empty if nothing does and nothing scrolls sideways."""
        beyond = self.page.evaluate(_CUT_OFF)
        scrolls = self.page.evaluate("() => document.documentElement.scrollWidth > innerWidth")
        return beyond or (["the page scrolls sideways"] if scrolls else [])

    def keep(self, name: str) -> Path:
        """A screenshot of the whole page, for review."""
        SCREENSHOTS.mkdir(exist_ok=True)
        path = SCREENSHOTS / f"{re.sub(r'[^a-z0-9]+', '-', name.lower())}.png"
        self.page.screenshot(path=path, full_page=True)
        return path


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Chromium of the machine, or the one that playwright has installed."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    found = next(filter(None, map(shutil.which, _CHROMIUM)), None)
    with playwright.sync_playwright() as started:
        if found is None and not Path(started.chromium.executable_path).exists():
            pytest.skip("there is no Chromium on this machine")
        chromium = started.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Visit]]:
    """Opens a file or an address: `visit(path, width=375, dark=True)`."""
    contexts = []

    def call(where: Path | str, width: int = WIDE, *, dark: bool = False, height: int = 800) -> Visit:
        context = browser.new_context(
            viewport={"width": width, "height": height},
            color_scheme="dark" if dark else "light",
            accept_downloads=True,
        )
        contexts.append(context)
        seen = Visit(context.new_page())
        address = where.absolute().as_uri() if isinstance(where, Path) else where
        seen.page.on("console", lambda said: seen.errors.append(said.text) if said.type == "error" else None)
        seen.page.on("pageerror", lambda error: seen.errors.append(str(error)))
        seen.page.on(
            "request",
            lambda asked: (
                seen.requests.append(asked.url) if not asked.url.startswith((address, "blob:", "data:")) else None
            ),
        )
        seen.page.goto(address)
        return seen

    yield call
    for context in contexts:
        context.close()
