"""A few hundred of the bad inputs that benchmarks/faults tries by the thousand: read, or refused in one line."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks" / "faults"))

from bad_input import try_inputs
from mutations import CHANGES, changed


@pytest.mark.parametrize("seed", [20])
def test_bad_input_is_read_or_refused_in_one_line(tmp_path, seed):
    results = []
    try_inputs(tmp_path, 300, seed, lambda reader, name, content, *result: results.append((reader, name, *result)))
    assert [result for result in results if result[2] not in ("read", "refused")] == []
    assert len(results) >= 300 and len({reader for reader, *_ in results}) > 12
    assert {result for _, _, result, *_ in results} == {"read", "refused"}


def _name(change):
    return change.__name__


@pytest.mark.parametrize("change", sorted(set(CHANGES), key=_name), ids=_name)
@pytest.mark.parametrize("content", [b"", b"a", b'{"a": 1, "b": [2]}'])
def test_a_change_makes_another_file_at_every_place(change, content):
    for part in (0.0, 0.3, 1.0):
        for length in range(9):
            assert isinstance(changed(content, [(change, part, length, b"x")]), bytes)
    assert changed(b'{"a": 1, "b": [2]}', [(change, 0.3, 5, b"x")]) != b'{"a": 1, "b": [2]}'
