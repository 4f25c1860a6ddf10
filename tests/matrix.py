"""What ran of the stacks' contract as a table, stack × property: ✓, skipped, or ✗; and how work is shared out."""

from __future__ import annotations

import re
from typing import Any

import pytest

_ID = re.compile(r"::test_stack\[(?P<stack>.+)-(?P<property>[^-]+)\]$")
_cells: dict[tuple[str, str], str] = {}
_skipped: dict[str, str] = {}


def scope(nodeid: str) -> str:
    """What one process has to run together: the tests of a stack, or of a file, which share runs and fixtures."""
    found = _ID.search(nodeid)
    return found["stack"] if found else nodeid.split("::")[0]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    # Not xdist's own groups: xdist 3.8 writes them into names that pytest 9.2 does not read, so nothing is grouped.
    from xdist.scheduler import LoadScopeScheduling

    class ByStackAndFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return scope(nodeid)

    return ByStackAndFile(config, log)


def pytest_runtest_logreport(report: Any) -> None:
    found = _ID.search(report.nodeid)
    if not found:
        return
    key = found["stack"], found["property"]
    if report.skipped:
        _cells[key] = "skipped"
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        _skipped[found["stack"]] = reason.removeprefix("Skipped: ")
    elif report.failed:
        _cells[key] = "✗"
    elif report.when == "call":
        _cells.setdefault(key, "✓")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not _cells:
        return
    # In the order of the suite, which xdist's reports do not keep.
    properties = _ordered([property_ for _, property_ in _cells])
    stacks = sorted({stack for stack, _ in _cells})
    width = max(map(len, stacks))
    terminalreporter.section("stack × property")
    terminalreporter.write_line("  ".join([" " * width, *properties]))
    for stack in stacks:
        cells = [_cells.get((stack, name), "·").center(len(name)) for name in properties]
        why = f"  skipped: {_skipped[stack]}" if stack in _skipped else ""
        terminalreporter.write_line("  ".join([stack.ljust(width), *cells]) + why)


def _ordered(properties: list[str]) -> list[str]:
    known = (
        "rates ratio_one scheduler accumulation clipping resume other_ratio logs verify tampered same_adapter"
    ).split()
    found = set(properties)
    return [name for name in known if name in found] + sorted(found - set(known))
