"""The plan of the rates benchmark: the grid stops when its optimum lies inside. What `compare` finds in nothing."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

from null_comparisons import Setting, accuracies, beside, verdicts
from rates import GRID
from rates_settings import SETTINGS

from loraplus.study.search.grid import HALF_DECADE, RATIOS, lr_of


def searched(loss):
    losses = {}
    while points := GRID.next(losses):
        (ratio, step) = points[0]
        assert points[0] not in losses and len(losses) < 200 and step % HALF_DECADE == 0
        losses[ratio, step] = loss(ratio, step // HALF_DECADE)
    return {(ratio, step // HALF_DECADE): loss for (ratio, step), loss in losses.items()}


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
    assert lr_of((16.0, HALF_DECADE)) == pytest.approx(1e-3 * 10**0.5 / 4, rel=1e-3)


def test_half_of_the_settings_were_set_aside():
    halves = [setting.part for setting in SETTINGS.values()]
    assert halves.count("tuned") == halves.count("untouched") == 7


@pytest.mark.parametrize("setting", [Setting(3, 400), Setting(3, 20_000), Setting(5, 20_000, 3.0, 0.0)])
def test_compare_finds_a_difference_in_one_of_twenty_comparisons_of_nothing(setting):
    shares = verdicts(np.random.default_rng(0), setting, 1500)
    assert 0.035 <= shares["alone"] <= 0.065
    assert shares["family"] <= 0.065


def test_two_seeds_find_nothing_ever():
    assert verdicts(np.random.default_rng(0), Setting(2, 400), 300) == {"alone": 0, "family": 0}


def test_a_large_difference_is_found_and_more_often_with_more_seeds():
    few, many = (verdicts(np.random.default_rng(1), Setting(seeds, 20_000), 200, 8.0) for seeds in (3, 10))
    assert few["alone"] + 0.2 < many["alone"] and many["family"] > 0.9


def test_test_examples_would_find_a_difference_in_most_comparisons_of_nothing():
    shares = beside(np.random.default_rng(2), Setting(3, 20_000), 40)
    assert shares["over_examples"] > 0.4


def test_drawn_runs_spread_over_seeds_by_as_many_points_as_they_are_said_to():
    drawn = accuracies(np.random.default_rng(3), Setting(10, 20_000, 3.0), 500)
    assert drawn.mean() == pytest.approx(0.8, abs=0.005)
    assert drawn.std(axis=-1, ddof=1).mean() == pytest.approx(0.03, rel=0.05)
