"""The pages of the documentation, and the code blocks and links that stand in them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
OUTSIDE = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", ROOT / "examples/decoder/README.md"]
PAGES = [*OUTSIDE, *sorted(path for path in DOCS.rglob("*.md") if "_build" not in path.parts)]

_MARKDOWN = MarkdownIt("commonmark").enable("table")


@dataclass(frozen=True)
class Block:
    """A code block: where it stands, its language (none if it is indented), its lines."""

    page: Path
    line: int
    language: str
    code: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def tokens(page: Path) -> list[Token]:
    return _MARKDOWN.parse(page.read_text(encoding="utf-8"))


def inline(page: Path, kind: str) -> list[tuple[int, Token]]:
    """Parts of running text of a kind ("code_inline", "link_open", "image", "text"), with their lines."""
    found = []
    for token in tokens(page):
        line = token.map[0] + 1 if token.map else 0
        found += [(line, child) for child in token.children or [] if child.type == kind]
    return found


def blocks(page: Path) -> list[Block]:
    return [
        Block(page, (token.map or [0])[0] + 1, token.info.strip(), token.content)
        for token in tokens(page)
        if token.type in ("fence", "code_block")
    ]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))
