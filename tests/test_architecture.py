"""What docs/architecture.md promises about imports."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import loraplus

# Left to right, as in the picture; the files of the core's rooms, too.
ORDER = (
    "errors files notices parts adapters.layouts adapters.axes adapters.weight_trace adapters.partners "
    "adapters.orientation adapters.structure adapters.adapter_types adapters.memory roles rates rate_keywords "
    "steps.group_rates steps.wrappers steps.twin steps.step_probe watching.schedulers watching.model_changes "
    "watching.membership watching.watch existing_groups groups paper steps.movement speed steps.recorder "
    "steps.step_watcher steps.layer_updates automatic.compiled automatic.proposal automatic.owned_groups "
    "automatic.checks automatic.rate_rule automatic.growth auto optimizer variants feature_updates integrations "
    "tasks export inspection diagnosis study report compare reproduce bench cli"
).split()


def place(module: str) -> int | None:
    """Where a module stands, by its own name below `loraplus` or that of its room; None for the package itself."""
    room, _, file = module.partition(".")
    known = [name for name in (f"{room}.{file.partition('.')[0]}", room) if name in ORDER]
    return ORDER.index(known[0]) if known else None


def test_every_file_of_the_core_has_a_place():
    root = Path(loraplus.__file__).parent
    modules = [".".join(path.relative_to(root).with_suffix("").parts) for path in root.rglob("*.py")]
    assert [name for name in modules if place(name) is None and "__" not in name] == []


def test_no_module_imports_one_to_its_right():
    root = Path(loraplus.__file__).parent
    wrong = []
    for path in root.rglob("*.py"):
        here = place(".".join(path.relative_to(root).with_suffix("").parts))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", None)]
            for name in names:
                there = place((name or "").removeprefix("loraplus."))
                known = here is not None and there is not None and (name or "").startswith("loraplus.")
                if known and there > here:
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
