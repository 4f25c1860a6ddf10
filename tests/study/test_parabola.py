"""Parabolas through a few losses: exact on parabolas, and careful where there is none."""

from __future__ import annotations

import math
import warnings

import pytest

from loraplus.study.search.parabola import MOST_SKEW, any_finite, curvature, lowest, lowest_ratio, offset, vertex

INF = math.inf


def bowl(at: float, bend: float = 2.0, floor: float = 0.3):
    return lambda x: floor + bend * (x - at) ** 2


def row(loss, *rates: float) -> dict[float, float]:
    return {rate: loss(rate) for rate in rates}


def test_the_lowest_of_equal_losses_is_at_the_lower_rate():
    assert lowest({-2.0: 0.5, -3.0: 0.5, -4.0: 0.6}) == -3.0
    assert lowest({-2.0: 0.4, -3.0: 0.5, -4.0: 0.6}) == -2.0
    assert any_finite({-2.0: INF, -3.0: 0.5}) and not any_finite({-2.0: INF}) and not any_finite({})


@pytest.mark.parametrize("at", [-3.4, -3.2, -3.0, -2.9, -2.6])
@pytest.mark.parametrize("step", [0.5, 0.2])
def test_a_parabola_inside_is_found_exactly(at: float, step: float):
    at = -3 + (at + 3) * step  # within half a step of the best
    tried = row(bowl(at), -3 - step, -3.0, -3 + step)
    if abs(at + 3) < step / 4:  # beyond, one side is more than MOST_SKEW times the other
        assert -3 + offset(tried, -3.0, step) == pytest.approx(at)
    assert vertex(tried, -3.0, None, step) == pytest.approx(at)
    assert curvature(tried, -3.0) == pytest.approx(2.0)


def test_only_the_neighbours_of_the_best_count():
    tried = {**row(bowl(-3.1), -3.5, -3.0, -2.5), -4.5: 9.0, -1.0: INF}
    assert vertex(tried, -3.0, None, 0.5) == pytest.approx(-3.1)
    assert curvature(tried, -3.0) == pytest.approx(2.0)


@pytest.mark.parametrize(("below", "above", "sign"), [(0.9, 0.31, 1), (0.31, 0.9, -1)])
def test_a_steep_side_is_believed_up_to_a_limit(below: float, above: float, sign: int):
    found = offset({-3.5: below, -3.0: 0.3, -2.5: above}, -3.0, 0.5)
    assert found == pytest.approx(sign * 0.25 * (MOST_SKEW - 1) / (MOST_SKEW + 1)) == pytest.approx(sign * 0.125)


def test_a_neighbour_that_diverged_is_a_steep_side():
    assert offset({-3.5: 0.4, -3.0: 0.3, -2.5: INF}, -3.0, 0.5) == pytest.approx(-0.125)
    assert offset({-3.5: INF, -3.0: 0.3, -2.5: 0.4}, -3.0, 0.5) == pytest.approx(0.125)
    assert offset({-3.5: INF, -3.0: 0.3, -2.5: INF}, -3.0, 0.5) == 0
    assert curvature({-3.5: 0.4, -3.0: 0.3, -2.5: INF}, -3.0) is None
    assert curvature({-3.5: INF, -3.0: 0.3, -2.5: 0.4}, -3.0) is None
    assert vertex({-3.5: 0.4, -3.0: 0.3, -2.5: INF}, -3.0, None, 0.5) == pytest.approx(-3.125)


def test_at_the_edge_half_a_step_down_and_none_up_where_a_cliff_may_be():
    assert offset({-3.0: 0.3, -2.5: 0.4}, -3.0, 0.5) == -0.25
    assert offset({-3.0: 0.3, -3.5: 0.4}, -3.0, 0.5) == 0
    assert offset({-3.0: 0.3}, -3.0, 0.5) == 0
    assert offset({-3.5: 0.3, -3.0: 0.3, -2.5: 0.3}, -3.0, 0.5) == 0, "a plain has no lowest point"


def test_a_row_without_a_bend_has_no_curvature():
    assert curvature({-3.5: 0.3, -3.0: 0.3, -2.5: 0.3}, -3.0) is None
    assert curvature({-3.5: 0.2, -3.0: 0.3, -2.5: 0.2}, -3.0) is None
    assert curvature({-3.0: 0.3, -2.5: 0.4}, -3.0) is None and curvature({-3.5: 0.4, -3.0: 0.3}, -3.0) is None
    uneven = row(bowl(-3.1, bend=0.7), -3.5, -3.0, -2.8)
    assert curvature(uneven, -3.0) == pytest.approx(0.7)
    assert vertex(uneven, -3.0, None, 0.5) == pytest.approx(-3.1)


def test_at_an_edge_the_usual_curvature_tells_how_far_to_go():
    for best, near, at in [(-3.0, -2.5, -3.2), (-3.0, -3.5, -2.8)]:
        tried = row(bowl(at), best, near)
        assert vertex(tried, best, 2.0, 0.5) == pytest.approx(at)
        assert vertex(row(bowl(best + 5 * (best - near)), best, near), best, 2.0, 0.5) == pytest.approx(2 * best - near)
        assert vertex(tried, best, None, 0.5) == pytest.approx(2 * best - near), "a whole step outwards"
        assert vertex({best: 0.3, near: INF}, best, 2.0, 0.5) == pytest.approx(2 * best - near)
    assert vertex({-3.0: 0.3}, -3.0, 2.0, 0.5) == -2.5


def test_a_lowest_point_is_never_beyond_the_neighbours():
    flat = {-3.5: 0.3 + 1e-9, -3.0: 0.3, -2.5: 0.3 + 1e-3}
    assert -3.5 <= vertex(flat, -3.0, None, 0.5) <= -2.5
    assert vertex({-3.5: 0.30001, -3.0: 0.3, -2.5: 0.3}, -3.0, None, 0.5) == pytest.approx(-2.75)


@pytest.mark.parametrize(("at", "nearest"), [(2.0, 16), (1.5, 8), (2.6, 32), (1.2, 4), (2.9, 64)])
def test_the_ratio_is_the_power_of_two_nearest_to_the_lowest_point(at: float, nearest: int):
    """at: log4 λ."""
    tried = {float(4**x): 0.3 + 0.005 * (x - at) ** 2 for x in (0, 1, 2, 3, 4)}
    assert lowest_ratio(tried) == nearest


@pytest.mark.parametrize(
    ("lowest_tried", "found"),
    [
        ({1.0: 0.331, 4.0: 0.301, 16.0: 0.3, 64.0: 0.302, 256.0: 0.304}, 16),  # more than a tenth worse: no say
        ({1.0: 0.329, 4.0: 0.301, 16.0: 0.3, 64.0: 0.302, 256.0: 0.304}, 32),  # less: it has
        ({1.0: 0.322, 4.0: 0.300, 16.0: 0.301, 64.0: 0.3015, 256.0: 0.303}, 16),
    ],
)
def test_a_ratio_far_worse_than_the_best_has_no_say(lowest_tried: dict[float, float], found: int):
    assert lowest_ratio(lowest_tried) == found


def test_the_ratio_moves_by_no_more_than_a_factor_of_four():
    """The lowest points of these parabolas are at λ = 6 and at λ = 43."""
    assert lowest_ratio({1.0: 0.3001, 4.0: 0.3002, 16.0: 0.3010, 64.0: 0.3, 256.0: 0.3299}) == 16
    assert lowest_ratio({256.0: 0.3001, 64.0: 0.3002, 16.0: 0.3010, 4.0: 0.3, 1.0: 0.3299}) == 16


def test_the_best_ratio_stands_where_there_is_no_parabola():
    assert lowest_ratio({4.0: 0.3, 16.0: 0.31, 64.0: 0.32}) == 4, "an edge"
    assert lowest_ratio({4.0: 0.32, 16.0: 0.31, 64.0: 0.3}) == 64, "the other edge"
    assert lowest_ratio({4.0: 0.31, 16.0: 0.3, 64.0: 0.302, 256.0: 0.2999}) == 256, "an edge with a bend"
    assert lowest_ratio({256.0: 0.31, 64.0: 0.3, 16.0: 0.302, 4.0: 0.2999}) == 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a fit through too few points
        assert lowest_ratio({4.0: 0.31, 16.0: 0.3}) == 16, "two points"
        assert lowest_ratio({4.0: 0.5, 16.0: 0.3, 64.0: 0.3001}) == 16, "two that are near"
