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

DECADES_PER_STEP = 0.5
RATIO_PER_STEP = 4.0
START_GEOMETRIC_MEAN_LR = 1e-3
# Steps are halved at most so often; beyond it lie differences that three digits of a rate cannot express.
MAX_HALVINGS = 6
UNITS_PER_STEP = 2**MAX_HALVINGS


@dataclass(frozen=True)
class Point:
    """A pair of rates: `lr` = η_A and `lr_ratio` = λ = η_B / η_A."""

    lr: float
    lr_ratio: float

    @property
    def geometric_mean_lr(self) -> float:
        """√(η_A·η_B) = η_A·√λ."""
        return self.lr * math.sqrt(self.lr_ratio)

    @classmethod
    def from_geometric_mean(cls, geometric_mean_lr: float, lr_ratio: float) -> Point:
        """The point with √(η_A·η_B) and λ as given, each rounded to three digits so that it can serve as a key.

        Example:
            >>> Point.from_geometric_mean(1e-3, 16)
            Point(lr=0.00025, lr_ratio=16.0)
        """
        return cls(_three_digits(geometric_mean_lr / math.sqrt(lr_ratio)), _three_digits(lr_ratio))


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


def best_point(tried: Mapping[Point, float]) -> Point:
    """The point of the lowest loss; of equal losses (inf and NaN count as equal) that with the lowest rate.

    Raises:
        InvalidRateError: nothing has been tried.
    """
    if not tried:
        raise InvalidRateError("no point has been tried, so none of them is the best")
    return min(tried, key=lambda point: (_loss(tried[point]), point.geometric_mean_lr, point.lr_ratio))


def next_point(tried: Mapping[Point, float], start: Point, tune_ratio: bool) -> Point:
    """The point to try next; never one of `tried`.

    Args:
        tried: Loss of every point tried so far, all of them from this search; inf or NaN if the run diverged.
        start: First point of the search and origin of its lattice.
        tune_ratio: Whether λ is searched too. It then stays above 1, since λ = 1 is LoRA; otherwise it stays put.

    Returns:
        `start` if it is new; else the first new neighbour of the best point so far, in the order rate up, rate down,
        λ up, λ down, at the current step size; if none is new, at half that step. While every run has diverged,
        the next lower rate.

    Example:
        >>> start = start_point()
        >>> next_point({start: 0.7}, start, tune_ratio=False)
        Point(lr=0.00316, lr_ratio=1.0)
    """
    if start not in tried:
        return start
    best = best_point(tried)
    here = _coordinates(best, start)
    if math.isinf(_loss(tried[best])):
        return _first_new(tried, start, (_moved(here, -n * UNITS_PER_STEP, 0) for n in itertools.count(1)))

    directions = [(1, 0), (-1, 0)] + ([(0, 1), (0, -1)] if tune_ratio else [])
    halvings = max(_halvings_behind(_coordinates(point, start)) for point in tried)
    steps = [UNITS_PER_STEP >> n for n in range(halvings, MAX_HALVINGS + 1)]
    # Past the finest lattice only more distant neighbours are left; `count` makes sure that there always is one.
    reach = itertools.chain(steps, itertools.count(2))
    candidates = (_moved(here, right * step, up * step) for step in reach for right, up in directions)
    return _first_new(tried, start, candidates)


def _first_new(tried: Mapping[Point, float], start: Point, candidates: Iterable[tuple[int, int]]) -> Point:
    for coordinates in candidates:
        point = _point(coordinates, start)
        leaves_loraplus = start.lr_ratio > 1 and point.lr_ratio <= 1
        if point not in tried and not leaves_loraplus:
            return point
    raise InvalidRateError("the search has no point left to try")


def _loss(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _three_digits(value: float) -> float:
    return float(f"{value:.3g}")


def _moved(here: tuple[int, int], right: int, up: int) -> tuple[int, int]:
    return here[0] + right, here[1] + up


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
    """How often the step had been halved when this point was chosen."""
    for halvings in range(MAX_HALVINGS):
        if all(units % (UNITS_PER_STEP >> halvings) == 0 for units in coordinates):
            return halvings
    return MAX_HALVINGS
