"""The pattern search: a pure function that brackets the rate first and then refines."""

from __future__ import annotations

import itertools
import math

import pytest

from loraplus.errors import InvalidRateError
from loraplus.study.search import Point, best_point
from loraplus.study.search.pattern import PatternSearch, start_point

LORA = start_point()
LORAPLUS = start_point(16)


def search(loss, start: Point, tune_ratio: bool, runs: int) -> dict[Point, float]:
    tried: dict[Point, float] = {}
    for _ in range(runs):
        (point,) = PatternSearch(start, tune_ratio).next(tried)
        assert point not in tried
        tried[point] = loss(point)
    return tried


def ridge(best_rate: float, best_ratio: float, ratio_matters: float = 0.05):
    """A loss as those of LoRA look: narrow in √(η_A·η_B), flat in λ."""

    def loss(point: Point) -> float:
        x = math.log10(point.geometric_mean_lr / best_rate)
        y = math.log(point.lr_ratio / best_ratio, 4)
        return 0.3 + x**2 + ratio_matters * y**2

    return loss


def test_both_arms_start_at_the_same_geometric_mean():
    assert Point(1e-3, 1.0) == LORA
    assert Point(2.5e-4, 16.0) == LORAPLUS
    assert math.isclose(LORA.geometric_mean_lr, LORAPLUS.geometric_mean_lr)
    assert PatternSearch(LORAPLUS, True).next({}) == [LORAPLUS]


def test_the_rate_is_bracketed_before_the_ratio_is_touched():
    tried = search(ridge(1e-3, 64), LORAPLUS, True, 5)
    assert list(tried) == [
        Point(2.5e-4, 16.0),
        Point(7.91e-4, 16.0),
        Point(7.91e-5, 16.0),
        Point(1.25e-4, 64.0),
        Point(3.95e-4, 64.0),
    ]


def moves(tried: dict[Point, float]) -> list[tuple[float, float]]:
    """From the best point so far to each next one: in half decades of the rate, and in factors of 4 of λ."""
    points, found = list(tried), []
    for count in range(1, len(points)):
        best = best_point({point: tried[point] for point in points[:count]})
        rate = math.log10(points[count].geometric_mean_lr / best.geometric_mean_lr) / 0.5
        found.append((rate, math.log(points[count].lr_ratio / best.lr_ratio, 4)))
    return found


def test_around_the_best_it_goes_up_and_down_in_rate_then_in_ratio_and_then_halves_the_step():
    tried = search(lambda point: 0.4 if point != LORAPLUS else 0.3, LORAPLUS, True, 29)
    assert moves(tried) == [
        pytest.approx((right * size, up * size), abs=0.02)
        for size in (1, 1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64)
        for right, up in ((1, 0), (-1, 0), (0, 1), (0, -1))
    ]


def test_the_step_stays_halved_once_the_best_has_moved():
    tried = search(ridge(2.2e-3, 23), LORAPLUS, True, 30)
    sizes = [max(abs(rate), abs(ratio)) for rate, ratio in moves(tried)]
    assert all(later <= size * 1.1 for size, later in itertools.pairwise(sizes))
    assert all(min(abs(rate), abs(ratio)) < 0.02 for rate, ratio in moves(tried)), "one of the two at a time"


def test_a_small_ratio_is_loraplus_too():
    assert all(point.lr_ratio > 1 for point in search(ridge(1e-3, 0.1), start_point(1.5), True, 20))


def test_it_depends_on_the_results_alone_and_not_on_their_order():
    tried = search(ridge(4e-3, 4), LORAPLUS, True, 7)
    expected = PatternSearch(LORAPLUS, True).next(tried)
    assert PatternSearch(LORAPLUS, True).next(dict(reversed(tried.items()))) == expected


@pytest.mark.parametrize("best_rate", [1e-4, 3e-4, 1e-3, 4e-3, 1e-2])
@pytest.mark.parametrize("best_ratio", [4, 16, 60])
def test_it_comes_close_to_the_optimum_of_a_ridge(best_rate: float, best_ratio: float):
    loss = ridge(best_rate, best_ratio)
    assert min(search(loss, LORA, False, 8).values()) < loss(Point(best_rate, 1.0)) + 0.02
    assert min(search(loss, LORAPLUS, True, 12).values()) < 0.3 + 0.03


def test_it_never_repeats_a_point_and_keeps_refining():
    tried = search(ridge(2.2e-3, 23), LORAPLUS, True, 80)
    assert min(tried.values()) < 0.3 + 1e-4
    search(lambda point: 0.5, LORAPLUS, True, 80)
    search(ridge(1e-3, 1), LORA, False, 60)


def test_lora_keeps_its_ratio_and_loraplus_never_becomes_lora():
    assert {point.lr_ratio for point in search(ridge(1e-3, 16), LORA, False, 20)} == {1.0}
    assert all(point.lr_ratio > 1 for point in search(ridge(1e-3, 0.1), LORAPLUS, True, 40))


def test_it_flees_from_divergence_to_lower_rates():
    tried = search(lambda point: math.inf if point.geometric_mean_lr > 5e-5 else 0.4, LORA, False, 5)
    assert list(tried) == [
        Point(1e-3, 1.0),
        Point(3.16e-4, 1.0),
        Point(1e-4, 1.0),
        Point(3.16e-5, 1.0),
        Point(1e-5, 1.0),
    ]
    nan = search(lambda point: math.nan, LORAPLUS, True, 4)
    rates = [point.geometric_mean_lr for point in nan]
    assert rates == sorted(rates, reverse=True)


def test_of_equal_losses_the_lower_rate_wins():
    assert best_point({Point(1e-3, 1.0): 0.5, Point(1e-4, 1.0): 0.5}) == Point(1e-4, 1.0)
    assert best_point({Point(1e-3, 1.0): math.nan, Point(1e-2, 1.0): 0.5}) == Point(1e-2, 1.0)


def test_a_start_that_cannot_be_used_is_refused():
    for ratio in (0.5, math.nan, math.inf):
        with pytest.raises(InvalidRateError):
            start_point(ratio)
    with pytest.raises(InvalidRateError):
        best_point({})
