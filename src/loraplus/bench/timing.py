"""Arms that take turns in one process, and what their times say.

A machine's speed drifts: its clock, its caches, its neighbours. Arms that run one after the other are compared with
that drift; arms that take turns (A B C, B C A, …) share it, and a ratio within a round hardly sees it.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median, quantiles

Turn = Callable[[], float]


@dataclass(frozen=True)
class Spread:
    """The median of a figure's values, and its quartiles."""

    median: float
    low: float
    high: float
    values: int

    def to_dict(self) -> dict[str, float]:
        return {"median": self.median, "quartile_1": self.low, "quartile_3": self.high, "values": self.values}


@dataclass(frozen=True)
class Ratio:
    """A ratio of two medians, and the interval that 95% of its resamples lie in."""

    value: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float]:
        return {"ratio": self.value, "low": self.low, "high": self.high}

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


def spread(values: list[float]) -> Spread:
    """Median and quartiles.

    Example:
        >>> spread([1.0, 2.0, 3.0]).median
        2.0
    """
    low, _, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return Spread(median(values), low, high, len(values))


def ratio(numerator: list[float], denominator: list[float], resamples: int = 2000) -> Ratio:
    """The ratio of two arms' medians. Entry i of both lists is round i, so rounds are resampled, not entries alone.

    Example:
        >>> ratio([2.0, 4.0, 8.0], [1.0, 2.0, 4.0]).value
        2.0
    """
    pairs = list(zip(numerator, denominator, strict=True))
    draw = random.Random(0)
    ratios = sorted(_of_medians(draw.choices(pairs, k=len(pairs))) for _ in range(resamples))
    return Ratio(_of_medians(pairs), ratios[int(0.025 * resamples)], ratios[int(0.975 * resamples)])


def _of_medians(pairs: list[tuple[float, float]]) -> float:
    return median(a for a, _ in pairs) / median(b for _, b in pairs)


def take_turns(
    arms: Mapping[str, Turn],
    seconds: float,
    rounds: int = 50,
    least: int = 3,
    told: Callable[[int], None] | None = None,
) -> dict[str, list[float]]:
    """Lets every arm have its turn, round after round, until the time is over.

    Args:
        arms: By name, a function that does one turn and returns the seconds that it took.
        seconds: When they are over, the round is finished and no other begun.
        rounds: No more rounds than this.
        least: No fewer rounds than this, however long they take.
        told: Called with the number of every round that is done.

    Returns:
        By name, the seconds of every round. Each round begins with the next arm, so none has the same place in all.
    """
    names, times = list(arms), {name: [] for name in arms}
    end = time.perf_counter() + seconds
    for done in range(rounds):
        if done >= least and time.perf_counter() > end:
            break
        start = done % len(names)
        for name in names[start:] + names[:start]:
            times[name].append(arms[name]())
        if told:
            told(done + 1)
    return times
