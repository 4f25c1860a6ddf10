"""Links between pages lead somewhere, headings included, as GitHub shows them; every page is reached from README.md."""

from __future__ import annotations

import re
from functools import cache
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote

import pytest

from pages.blocks import DOCS, PAGES, ROOT, blocks, inline, name_of, tokens

INCLUDED = {block.page: block for page in DOCS.glob("*.md") for block in blocks(page) if "{include}" in block.language}


def targets(page: Path) -> list[tuple[int, str]]:
    links = [(line, str(token.attrs["href"])) for line, token in inline(page, "link_open")]
    return links + [(line, str(token.attrs["src"])) for line, token in inline(page, "image")]


@cache
def anchors(page: Path) -> set[str]:
    """Headings as GitHub names them."""
    found: set[str] = set()
    listed = tokens(page)
    for token, title in pairwise(listed):
        if token.type == "heading_open":
            text = "".join(child.content for child in title.children or [])
            found.add(re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_of_a_page_leads_somewhere(page):
    for line, target in targets(page):
        if re.match(r"https?://|mailto:", target):
            continue
        path, _, anchor = unquote(target).partition("#")
        file = page.parent / path if path else page
        assert file.exists(), f"{name_of(page)}:{line}: {target}"
        if anchor:
            assert anchor in anchors(file.resolve()), f"{name_of(page)}:{line}: {target}"


def test_every_page_is_reached_from_the_readme():
    """By links alone, so that a reader of the repository finds them, too."""
    reached, ahead = set(), [ROOT / "README.md"]
    while ahead:
        page = ahead.pop()
        page = page / "README.md" if page.is_dir() else page
        if page in reached or page.suffix != ".md" or not page.is_file():
            continue
        reached.add(page)
        ahead += [(page.parent / unquote(target).partition("#")[0]).resolve() for _, target in targets(page)]
    assert not [name_of(page) for page in PAGES if page not in reached | INCLUDED.keys()]


def test_images_say_what_they_show():
    for page in PAGES:
        for line, image in inline(page, "image"):
            assert len(image.content) > 3, f"{name_of(page)}:{line}"
