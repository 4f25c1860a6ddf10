"""Both arms get the same number of runs, and the search ends with the optimum inside."""

from __future__ import annotations

import math

import pytest

from loraplus.study.search.grid import HALF_DECADE, RATIOS, RatioGrid, best_of, lr_of


def searched(loss, first=0):
    losses = {}
    while points := RatioGrid(first=first).next(losses):
        (point,) = points
        assert point not in losses and len(losses) < 200
        losses[point] = loss(*point)
    return losses


def bowl(step, ratio):
    return lambda r, s: abs(s - step) / HALF_DECADE + abs(math.log(r / ratio))


@pytest.mark.parametrize("step, ratio", [(-33, 1), (0, 1), (9, 4), (17, 16), (8, 64)])
def test_the_optimum_lies_inside_and_both_arms_have_had_the_same_number_of_runs(step, ratio):
    losses = searched(bowl(step, ratio))
    for column in {r for r, _ in losses}:
        _, best = best_of(losses, column)
        assert {best - HALF_DECADE, best + HALF_DECADE} <= {s for r, s in losses if r == column}
    best_ratio = min(losses, key=lambda point: losses[point])[0]
    assert best_ratio == ratio and RATIOS[RATIOS.index(best_ratio) + 1] in {r for r, _ in losses}
    tied = sum(r == 1.0 for r, _ in losses)
    assert tied == len(losses) - tied


def test_a_start_near_the_optimum_saves_runs_and_finds_the_same_column_bests():
    far, near = searched(bowl(48, 4)), searched(bowl(48, 4), first=48)
    assert len(near) < len(far)
    assert best_of(near, 4.0) == best_of(far, 4.0)


def test_diverged_points_are_worse_than_any_other():
    losses = searched(lambda r, s: math.inf if s > 0 else -s / 8 + abs(math.log(r / 4)))
    assert min(losses, key=lambda point: losses[point]) == (4.0, 0)


def test_a_grid_on_which_everything_diverges_comes_to_an_end():
    assert len(searched(lambda r, s: math.inf)) < 100


def test_the_rate_of_a_point_keeps_the_geometric_mean():
    assert lr_of((16.0, 16)) * math.sqrt(16) == pytest.approx(1e-2, rel=1e-3)
