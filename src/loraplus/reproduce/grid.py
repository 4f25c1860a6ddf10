"""Which points of the (η_A, η_B) plane to run: a pure function of the losses so far, with equal budgets for both arms.

A point is (λ, step): √(η_A·η_B) = 1e-3·10^(step/16), so 8 steps are half a decade. The grid starts with the columns
λ = 1, 4 and 16 in half decades. A column grows until its best rate lies between worse neighbours; a larger λ is added
while the largest one is the best. Then the arm that had fewer runs (LoRA, which has one column) gets as many as the
other: between the points it has, in ever smaller steps around its best.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

RATIOS = (1.0, 4.0, 16.0, 64.0, 256.0, 1024.0)
HALF_DECADE = 8
_CENTRE = 1e-3
_STEPS_PER_DECADE = 16
_STARTING_RATIOS = 3
_FARTHEST = 4 * _STEPS_PER_DECADE  # no rate is tried beyond 1e-7 and 10

Point = tuple[float, int]
"""(λ, step)."""
Losses = Mapping[Point, float]
"""Loss of every point; infinite for a run that diverged."""


def lr_of(point: Point) -> float:
    """η_A of a point, to four digits.

    Example:
        >>> lr_of((1.0, 0)), lr_of((16.0, 8))
        (0.001, 0.0007906)
    """
    ratio, step = point
    return float(f"{_CENTRE * 10 ** (step / _STEPS_PER_DECADE) / math.sqrt(ratio):.4g}")


def best_of(losses: Losses, ratio: float) -> Point:
    """The best point of a column; of equal losses that with the lowest rate."""
    return min((point for point in losses if point[0] == ratio), key=lambda point: (losses[point], point[1]))


def best_step(losses: Mapping[int, float]) -> int:
    """The best step of one column; of equal losses the lowest rate."""
    return min(losses, key=lambda step: (losses[step], step))


def next_in_column(losses: Mapping[int, float], start: int, finest: int = HALF_DECADE) -> int | None:
    """The next step of one column, or None once both neighbours of its best step are known.

    Args:
        losses: of the column's steps so far.
        start: first step to try.
        finest: distance of the neighbours, from half a decade down by halves.

    Example:
        >>> next_in_column({}, 0), next_in_column({0: 1.0}, 0), next_in_column({0: 1.0, 8: 2.0}, 0)
        (0, 8, -8)
        >>> next_in_column({0: 1.0, 8: 2.0, -8: 2.0}, 0) is None
        True
    """
    if not losses:
        return start
    best = best_step(losses)
    distance = HALF_DECADE
    while distance >= finest:
        for neighbour in (best + distance, best - distance):
            if neighbour not in losses and abs(neighbour) <= _FARTHEST:
                return neighbour
        distance //= 2
    return None


def next_point(losses: Losses, first: int = 0) -> Point | None:
    """The point to run next, or None when the optimum lies inside and both arms have had the same number of runs.

    Args:
        losses: so far, all with one seed.
        first: step to start the first column at; the others start at the best step of the one before.
    """
    count, start = _STARTING_RATIOS, first
    while True:
        best: dict[float, float] = {}
        for ratio in RATIOS[:count]:
            column = _column(losses, ratio)
            step = next_in_column(column, start)
            if step is not None:
                return ratio, step
            start = best_of(losses, ratio)[1]
            best[ratio] = losses[ratio, start]
        if min(best, key=lambda ratio: best[ratio]) != RATIOS[count - 1] or count == len(RATIOS):
            return _equalise(losses)
        count += 1


def _column(losses: Losses, ratio: float) -> dict[int, float]:
    return {step: loss for (other, step), loss in losses.items() if other == ratio}


def _equalise(losses: Losses) -> Point | None:
    """A finer point for the arm that has had fewer runs."""
    tied = [point for point in losses if point[0] == 1.0]
    behind, ahead = len(tied), len(losses) - len(tied)
    if behind == ahead:
        return None
    if behind < ahead:
        ratio = 1.0
    else:
        ratio = min((point for point in losses if point[0] != 1.0), key=lambda point: losses[point])[0]
    column = _column(losses, ratio)
    step = next_in_column(column, 0, finest=1)
    if step is None:  # the finest neighbours are known, too: the nearest step that is not
        best = best_of(losses, ratio)[1]
        step = min(set(range(-_FARTHEST, _FARTHEST + 1)) - set(column), key=lambda step: (abs(step - best), step))
    return ratio, step
