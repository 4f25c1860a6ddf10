"""The site: `make docs` builds these pages and a reference of all names into _build/html. Nothing is fetched."""

from __future__ import annotations

import importlib.metadata
import os
import re
from pathlib import Path
from typing import Any

project = "loraplus"
author = "the loraplus contributors"
release = importlib.metadata.version("loraplus")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]

myst_heading_anchors = 3  # as GitHub names them, so a link to a heading works in both

html_theme = "furo"
html_title = "loraplus"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
html_domain_indices = False
html_show_search_summary = False  # summaries are fetched, which a page read from the disk may not do
pygments_style, pygments_dark_style = "default", "github-dark"

default_role = "code"  # `names` in docstrings
maximum_signature_line_length = 90
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_display_short_literal_types = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False

nitpicky = True
nitpick_ignore_regex = [
    # Types in signatures: those of other libraries, whose inventories would have to be fetched, and our inner ones.
    ("py:(class|exc|obj)", r"(?!loraplus\.(errors\.)?\w+$).*"),
]

ROOT = Path(__file__).parents[1]
# Files outside docs/ that the site shows, and the pages that include them.
SHOWN_AS = {
    "README.md": "index.md",
    "docs/migrate": "migrating.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "examples/decoder": "example-decoder.md",
    "examples/decoder/README.md": "example-decoder.md",
}


def links_within_the_site(text: str, file: Path) -> str:
    """Links as they work in the repository, turned to where the site has their targets."""
    page = (ROOT / "docs" / SHOWN_AS.get(file.relative_to(ROOT).as_posix(), file)).parent

    def turned(match: re.Match[str]) -> str:
        target, anchor = match[1], match[2] or ""
        if ":" in target or not target:
            return match[0]
        path = Path(os.path.normpath(file.parent / target)).relative_to(ROOT).as_posix()
        shown = ROOT / "docs" / SHOWN_AS[path] if path in SHOWN_AS else ROOT / path
        return f"]({os.path.relpath(shown, page)}{anchor})"

    return re.sub(r"\]\(([^)#\s]*)(#[^)\s]*)?\)", turned, text)


def setup(app: Any) -> None:
    def page(app: Any, name: str, content: list[str]) -> None:
        file = Path(app.env.doc2path(name))
        if file.suffix == ".md":
            content[0] = links_within_the_site(content[0], file)

    def included(app: Any, path: Path, parent: str, content: list[str]) -> None:
        content[0] = links_within_the_site(content[0], Path(os.path.normpath(ROOT / "docs" / path)))

    def signature(*event: Any) -> tuple[str, str] | None:
        """A class as a default is shown by its name."""
        arguments, returns = event[-2:]
        return (re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", arguments), returns) if arguments else None

    app.connect("autodoc-process-signature", signature)
    app.connect("source-read", page)
    app.connect("include-read", included)
