"""Deterministic pattern search for (η_A, λ): the same results so far always lead to the same next run.

The search walks on a lattice of two logarithms around a starting point:

    x = log10 √(η_A·η_B)    steps of half a decade       (how fast the product BA is learned)
    y = log4  λ             steps of a factor 4          (how that speed is split between A and B; LoRA+ only)

In these coordinates the best rate hardly moves when λ does, so the two can be searched one after the other. Around the
best point so far the search tries: rate up, rate down, λ up, λ down. When all of them are known, both steps halve.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from loraplus.errors import InvalidRateError
from loraplus.study.search.point import Point, best_point, finite

DECADES_PER_STEP = 0.5
RATIO_PER_STEP = 4.0
START_GEOMETRIC_MEAN_LR = 1e-3
# Steps are halved at most so often; beyond it lie differences that three digits of a rate cannot express.
MAX_HALVINGS = 6
UNITS_PER_STEP = 2**MAX_HALVINGS


def start_point(lr_ratio: float = 1.0) -> Point:
    """Where tuning starts: √(η_A·η_B) = 1e-3, whatever λ is, so that no arm gets a head start.

    Args:
        lr_ratio: λ; 1 for LoRA.

    Raises:
        InvalidRateError: λ is not a finite number of at least 1.
    """
    if not (math.isfinite(lr_ratio) and lr_ratio >= 1):
        raise InvalidRateError(f"lr_ratio must be a finite number of at least 1, got {lr_ratio}")
    return Point.from_geometric_mean(START_GEOMETRIC_MEAN_LR, lr_ratio)


@dataclass(frozen=True)
class PatternSearch:
    """One search: where it starts, which is the origin of its lattice, and whether λ is searched too.

    A λ that is searched stays above 1, since λ = 1 is LoRA; otherwise it stays put.
    """

    start: Point
    tune_ratio: bool

    def next(self, losses: Mapping[Point, float]) -> list[Point]:
        """The one point to try next; never one that has been tried. There always is one: the caller's budget ends it.

        Args:
            losses: Of every point tried so far, all of them from this search; inf or NaN if the run diverged.

        Returns:
            `start` if it is new; else the first new neighbour of the best point so far, in the order rate up, rate
            down, λ up, λ down, at the current step size; if none is new, at half that step. While every run has
            diverged, the next lower rate.

        Example:
            >>> PatternSearch(start_point(), tune_ratio=False).next({start_point(): 0.7})
            [Point(lr=0.00316, lr_ratio=1.0)]
        """
        if self.start not in losses:
            return [self.start]
        best = best_point(losses)
        right, up = _coordinates(best, self.start)
        if math.isinf(finite(losses[best])):
            return [self._first_new(losses, ((right - n * UNITS_PER_STEP, up) for n in itertools.count(1)))]
        directions = [(1, 0), (-1, 0)] + ([(0, 1), (0, -1)] if self.tune_ratio else [])
        halvings = max(_halvings_behind(_coordinates(point, self.start)) for point in losses)
        steps = [UNITS_PER_STEP >> n for n in range(halvings, MAX_HALVINGS + 1)]
        # Past the finest lattice only more distant neighbours are left; `count` makes sure that there always is one.
        reach = itertools.chain(steps, itertools.count(2))
        neighbours = ((right + x * step, up + y * step) for step in reach for x, y in directions)
        return [self._first_new(losses, neighbours)]

    def _first_new(self, losses: Mapping[Point, float], candidates: Iterable[tuple[int, int]]) -> Point:
        for coordinates in candidates:
            point = _point(coordinates, self.start)
            leaves_loraplus = self.start.lr_ratio > 1 and point.lr_ratio <= 1
            if point not in losses and not leaves_loraplus:
                return point
        raise InvalidRateError("the search has no point left to try")


def _point(coordinates: tuple[int, int], start: Point) -> Point:
    right, up = (units / UNITS_PER_STEP for units in coordinates)
    geometric_mean_lr = start.geometric_mean_lr * 10 ** (DECADES_PER_STEP * right)
    return Point.from_geometric_mean(geometric_mean_lr, start.lr_ratio * RATIO_PER_STEP**up)


def _coordinates(point: Point, start: Point) -> tuple[int, int]:
    """Whole units of the finest lattice between `start` and `point`."""
    right = math.log10(point.geometric_mean_lr / start.geometric_mean_lr) / DECADES_PER_STEP
    up = math.log(point.lr_ratio / start.lr_ratio, RATIO_PER_STEP)
    return round(right * UNITS_PER_STEP), round(up * UNITS_PER_STEP)


def _halvings_behind(coordinates: tuple[int, int]) -> int:
    """How often the step had been halved by the time this point was chosen."""
    for halvings in range(MAX_HALVINGS):
        if all(units % (UNITS_PER_STEP >> halvings) == 0 for units in coordinates):
            return halvings
    return MAX_HALVINGS
