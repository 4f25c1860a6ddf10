"""What ran, as two tables: stack × property of the contract, and each plugin against its library or its interface.

And how work is shared out between processes.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from typing import Any

import pytest

_ID = re.compile(r"::test_stack\[(?P<stack>.+)-(?P<property>[^-]+)\]$")
_cells: dict[tuple[str, str], str] = {}
_skipped: dict[str, str] = {}
_KINDS = "the library", "its published interface"
_plugins: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
_absent: dict[tuple[str, str], str] = {}


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


def pytest_runtest_setup(item: Any) -> None:
    mark = item.get_closest_marker("plugin")
    if mark is not None:  # reports of xdist's processes have no marks
        item.user_properties.append(("plugin", mark.args[0]))


def pytest_runtest_logreport(report: Any) -> None:
    plugin = dict(report.user_properties).get("plugin")
    if plugin is not None and (report.when == "call" or report.outcome != "passed"):
        key = plugin, _KINDS["published_interface" in report.nodeid]
        _plugins[key][report.outcome] += 1
        if report.skipped:
            _absent[key] = _reason(report)
    found = _ID.search(report.nodeid)
    if not found:
        return
    key = found["stack"], found["property"]
    if report.skipped:
        _cells[key] = "skipped"
        _skipped[found["stack"]] = _reason(report)
    elif report.failed:
        _cells[key] = "✗"
    elif report.when == "call":
        _cells.setdefault(key, "✓")


def _reason(report: Any) -> str:
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return reason.removeprefix("Skipped: ")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if _cells:
        _write_stacks(terminalreporter)
    if _plugins:
        _write_plugins(terminalreporter)


def _write_plugins(terminalreporter: Any) -> None:
    names = sorted({plugin for plugin, _ in _plugins}, key=str.casefold)
    width = max(map(len, names))
    terminalreporter.section("plugin × what it was tested against")
    for name in names:
        told = [f"{kind}: {_in_words((name, kind))}" for kind in _KINDS if (name, kind) in _plugins]
        terminalreporter.write_line(f"{name.ljust(width)}  {'; '.join(told)}")


def _in_words(key: tuple[str, str]) -> str:
    counts = _plugins[key]
    ran = counts["passed"] + counts["failed"]
    if not ran:
        return f"skipped, {_absent[key]}"
    return f"✗ {counts['failed']} of {ran} failed" if counts["failed"] else f"✓ {ran} test{'s' * (ran > 1)}"


def _write_stacks(terminalreporter: Any) -> None:
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
