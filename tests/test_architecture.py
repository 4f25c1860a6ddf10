"""What docs/architecture.md promises about imports."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import loraplus

# Left to right, as in the picture.
ORDER = (
    "errors files notices wrappers parts group_rates twin step_probe layouts axes weight_trace partners orientation "
    "structure adapter_types memory roles rates rate_keywords schedulers model_changes membership watch "
    "existing_groups groups paper movement speed recorder step_watcher proposal compiled owned_groups layer_updates "
    "rate_rule auto optimizer variants feature_updates integrations tasks export inspection diagnosis study report "
    "compare reproduce bench cli"
).split()


def test_no_module_imports_one_to_its_right():
    root = Path(loraplus.__file__).parent
    wrong = []
    for path in root.rglob("*.py"):
        part = path.relative_to(root).with_suffix("").parts[0]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", None)]
            for name in names:
                imported = (name or "").removeprefix("loraplus.").split(".")[0]
                known = {part, imported} <= set(ORDER) and (name or "").startswith("loraplus.")
                if known and ORDER.index(imported) > ORDER.index(part):
                    wrong.append(f"{path.relative_to(root)} imports {name}")
    assert not wrong


@pytest.mark.parametrize("page", ["docs/architecture.md", "docs/decisions.md", "CONTRIBUTING.md"])
def test_every_file_that_a_page_names_is_there(page):
    root = Path(loraplus.__file__).parents[2]
    named = re.findall(r"`([\w/]+\.py|(?:\w+/)+)`", (root / page).read_text(encoding="utf-8"))
    there = [
        f"/{path.relative_to(root)}" for room in ("src", "tests", "benchmarks") for path in (root / room).rglob("*")
    ]
    missing = [name for name in named if not any(path.endswith(f"/{name.rstrip('/')}") for path in there)]
    assert named
    assert not [name for name in missing if "NAME" not in name and not (root / name).exists()]
