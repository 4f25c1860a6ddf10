"""benchmarks/gpu_rates.py at a size that says nothing: every run is there, and what time does not allow is listed."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import gpu_rates

TINY = {"width": 32, "layers": 1, "heads": 2, "length": 16, "batch": 2, "pretrained": 3, "tuned": 3}


def measured(monkeypatch, tmp_path, *arguments):
    monkeypatch.setitem(gpu_rates.SIZES, "toy", TINY)
    output = tmp_path / "rates.json"
    monkeypatch.setattr(sys, "argv", ["gpu_rates.py", "--toy", *arguments, "--output", str(output)])
    gpu_rates.main()
    return json.loads(output.read_text())


def test_a_grid_of_twelve_points_is_run_beside_three_automatic_runs(monkeypatch, tmp_path):
    found = measured(monkeypatch, tmp_path)
    assert len({(row["lr"], row["lr_ratio"]) for row in found["grid"]}) == 12 and not found["left_out"]
    assert [row["seed"] for row in found["auto"]] == [0, 1, 2] and [row["seed"] for row in found["again"]] == [1, 2]
    assert all(": " in row["auto"] and row["loss"] < math.log(256) + 1 for row in found["auto"])
    best = min(row["loss"] for row in found["grid"])
    assert found["conclusion"]["auto_over_best"] == pytest.approx(found["auto"][0]["loss"] / best)


def test_runs_that_there_is_no_time_for_are_listed(monkeypatch, tmp_path):
    found = measured(monkeypatch, tmp_path, "--minutes", "0")
    assert len(found["left_out"]) == 15 and not found["grid"] and found["conclusion"] == {}
