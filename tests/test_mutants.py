"""Mutation testing itself: what it changes, and that it tells tests that notice from tests that do not."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from mutants import NEAREST, ROOT, mutants

pytest.importorskip("cosmic_ray")

CODE = '''
LIMIT = 4.0

def capped(value: float | None, more: bool = False) -> float | None:
    """At most LIMIT."""
    if value is None or more:
        return None
    note(value)
    return min(value, LIMIT)
'''


def test_numbers_conditions_extremes_and_calls_are_changed_and_types_are_not():
    changed = {mutant.after for mutant in mutants(CODE) if mutant}
    assert {"LIMIT = (4.0 * 2)", "LIMIT = (4.0 / 2)", "return max(value, LIMIT)", "pass"} <= changed
    assert {"if value is None and more:", "if value is not None or more:"} <= changed
    assert not any(after.startswith("def capped(value: float +") for after in changed)


def test_every_place_is_changed_once_before_any_is_twice():
    lines = [mutant.line for mutant in mutants(CODE) if mutant]
    assert set(lines[: len(set(lines)) + 2]) == set(lines)
    assert list(mutants(CODE)) == list(mutants(CODE))


def test_changes_that_no_test_notices_are_shown():
    lease = ROOT / "src/loraplus/study/lease.py"
    code = lease.read_text()
    words = f"tests/mutants.py {lease} --changes 6 --tests tests/study/test_lease.py -k forgotten".split()
    told = subprocess.run([sys.executable, *words], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    noticed, survived = map(int, re.search(r"lease: (\d) of 6 changes noticed, (\d) survived; \d+ more", told).groups())
    assert noticed and survived and noticed + survived == 6
    assert told.count("\n  - ") == told.count("\n  + ") == survived
    assert lease.read_text() == code, "the tree is as it was"


def test_the_nearest_tests_of_a_module_that_is_there_are_there():
    for name, tests in NEAREST.items():
        if (ROOT / "src/loraplus" / f"{name}.py").exists():
            assert any((ROOT / test).exists() for test in tests), name
