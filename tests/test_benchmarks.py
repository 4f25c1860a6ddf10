"""The plan of the rates benchmark: the grid stops only when its optimum lies inside."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

from rates_grid import RATIOS, lr_of, next_point
from rates_settings import SETTINGS


def searched(loss):
    losses = {}
    while (point := next_point(losses)) is not None:
        assert point not in losses and len(losses) < 200
        losses[point] = loss(*point)
    return losses


@pytest.mark.parametrize("best_k", [-4, 0, 1, 5])
def test_every_ratio_has_its_best_rate_between_worse_ones(best_k):
    losses = searched(lambda ratio, k: abs(k - best_k) + abs(math.log(ratio / 4)) / 10)
    for ratio in RATIOS[:4]:
        column = {k: loss for (r, k), loss in losses.items() if r == ratio}
        best = min(column, key=lambda k: column[k])
        assert best == best_k and {best - 1, best + 1} <= set(column)
    assert {r for r, _ in losses} == set(RATIOS[:4])


def test_the_grid_grows_while_the_largest_ratio_is_best():
    losses = searched(lambda ratio, k: abs(k) + abs(math.log(ratio / 200)))
    assert max(r for r, _ in losses) == 1024  # 256 is best, so the next larger one was tried


def test_diverged_points_are_passed_on_the_way():
    losses = searched(lambda ratio, k: math.inf if k >= 0 else abs(k + 2))
    assert min(losses, key=lambda point: losses[point])[1] == -2


def test_a_point_is_named_by_its_geometric_mean():
    assert lr_of((16.0, 1)) == pytest.approx(1e-3 * 10**0.5 / 4, rel=1e-3)


def test_half_of_the_settings_were_set_aside():
    halves = [setting.half for setting in SETTINGS.values()]
    assert halves.count("tuned") == halves.count("untouched") == 7
