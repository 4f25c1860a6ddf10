"""A grid over (η_A, η_B) that grows until the best pair lies inside.

A point is (λ, step): √(η_A·η_B) = 1e-3·10^(step/16), so 8 steps are half a decade. The grid starts with the columns of
the smallest λ in half decades. A column grows until its best rate lies between worse neighbours; a larger λ is added
while the largest one is the best. Where the arms are to have equal budgets, the one that had fewer runs (LoRA, which
has one column) then gets as many as the other: between the points it has, in ever smaller steps around its best.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

RATIOS = (1.0, 4.0, 16.0, 64.0, 256.0, 1024.0)
HALF_DECADE = 8
_CENTRE = 1e-3
_STEPS_PER_DECADE = 16
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
    return ratio, best_step(_column(losses, ratio))


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


@dataclass(frozen=True)
class RatioGrid:
    """One search.

    Args:
        starting_ratios: How many λ to begin with.
        first: Step to start the first column at; the others start at the best step of the one before.
        equal_budgets: Whether both arms get the same number of runs.
    """

    starting_ratios: int = 3
    first: int = 0
    equal_budgets: bool = True

    def next(self, losses: Losses) -> list[Point]:
        """The one point to run next; none once the optimum lies inside and the budgets are as wanted.

        Args:
            losses: So far, all with one seed.
        """
        count, start = self.starting_ratios, self.first
        while True:
            best: dict[float, float] = {}
            for ratio in RATIOS[:count]:
                column = _column(losses, ratio)
                step = next_in_column(column, start)
                if step is not None:
                    return [(ratio, step)]
                start = best_step(column)
                best[ratio] = column[start]
            if min(best, key=lambda ratio: best[ratio]) != RATIOS[count - 1] or count == len(RATIOS):
                return _equalised(losses) if self.equal_budgets else []
            count += 1


def _column(losses: Losses, ratio: float) -> dict[int, float]:
    return {step: loss for (other, step), loss in losses.items() if other == ratio}


def _equalised(losses: Losses) -> list[Point]:
    """A finer point for the arm that has had fewer runs."""
    tied = [point for point in losses if point[0] == 1.0]
    behind, ahead = len(tied), len(losses) - len(tied)
    if behind == ahead:
        return []
    if behind < ahead:
        ratio = 1.0
    else:
        ratio = min((point for point in losses if point[0] != 1.0), key=lambda point: losses[point])[0]
    column = _column(losses, ratio)
    step = next_in_column(column, 0, finest=1)
    if step is None:  # the finest neighbours are known, too: the nearest step that is not
        best = best_of(losses, ratio)[1]
        step = min(set(range(-_FARTHEST, _FARTHEST + 1)) - set(column), key=lambda step: (abs(step - best), step))
    return [(ratio, step)]
