"""Which points of the exhaustive grid to run: half-decade steps of √(η_A·η_B), every λ, until the optimum is inside."""

from __future__ import annotations

import math
from collections.abc import Mapping

RATIOS = (1.0, 4.0, 16.0, 64.0, 256.0, 1024.0)
STARTING_RATIOS = 4
CENTRE = 1e-3

Point = tuple[float, int]
"""(λ, half-decade k): √(η_A·η_B) = 1e-3·10^(k/2)."""


def lr_of(point: Point) -> float:
    """η_A of a point."""
    ratio, k = point
    return float(f"{CENTRE * 10 ** (k / 2) / math.sqrt(ratio):.4g}")


def _column_needs(losses: Mapping[int, float], start: int) -> int | None:
    """The next k of one λ: both neighbours of the best point so far must be known."""
    if not losses:
        return start
    best = min(losses, key=lambda k: (losses[k], k))
    for neighbour in (best + 1, best - 1):
        if neighbour not in losses:
            return neighbour
    return None


def next_point(losses: Mapping[Point, float]) -> Point | None:
    """The point to run next, or None when the best of every λ lies between worse neighbours and so does the best λ."""
    ratios, start = STARTING_RATIOS, 0
    while True:
        best_of: dict[float, float] = {}
        for ratio in RATIOS[:ratios]:
            column = {k: loss for (r, k), loss in losses.items() if r == ratio}
            k = _column_needs(column, start)
            if k is not None:
                return ratio, k
            start = min(column, key=lambda k: column[k])
            best_of[ratio] = column[start]
        largest = RATIOS[ratios - 1]
        if min(best_of, key=lambda r: best_of[r]) != largest or ratios == len(RATIOS):
            return None
        ratios += 1
