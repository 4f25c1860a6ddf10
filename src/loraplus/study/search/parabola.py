"""Lowest points of parabolas through a few losses, over log10 √(η_A·η_B) or over log4 λ.

A `row` maps rates (log10) to losses; a diverged run's is infinite.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

# The parabola over λ leaves out every λ whose loss is worse than the best by more than this part.
FAR = 0.1
# The loss rises more steeply above the best rate than below it, so the steep side alone would mislead a parabola.
MOST_SKEW = 3.0


def any_finite(row: Mapping[float, float]) -> bool:
    return any(math.isfinite(loss) for loss in row.values())


def lowest(row: Mapping[float, float]) -> float:
    """The rate of the lowest loss; of equal losses the lower rate."""
    return min(row, key=lambda x: (row[x], x))


def lowest_ratio(tried: Mapping[float, float]) -> float:
    """The power of 2 nearest to the lowest point of a parabola in log λ; the best λ tried if there is none.

    The parabola is fitted to all that is not far worse than the best, so that noise counts for less; it moves λ by no
    more than a factor of 4. At the lowest or highest λ tried there is nothing to fit between.
    """
    best = min(tried, key=lambda ratio: tried[ratio])
    near = {math.log(ratio, 4): loss for ratio, loss in tried.items() if loss <= tried[best] * (1 + FAR)}
    if len(near) < 3 or best in (min(tried), max(tried)):
        return best
    bend, slope, _ = np.polyfit(list(near), list(near.values()), 2)
    if bend <= 0:
        return best
    here = math.log(best, 4)
    lowest = min(max(-slope / (2 * bend), here - 1, min(near)), here + 1, max(near))
    return float(2 ** round(2 * lowest))


def _sides(row: Mapping[float, float], best: float) -> tuple[float | None, float | None]:
    """The nearest rates tried below and above the best."""
    return max((x for x in row if x < best), default=None), min((x for x in row if x > best), default=None)


def offset(row: Mapping[float, float], best: float, step: float) -> float:
    """From the best rate to the lowest point of a parabola through it and its neighbours, one `step` away.

    With losses e₋ and e₊ above the best: step/2 · (e₋ − e₊) / (e₋ + e₊), either taken as at most `MOST_SKEW` times
    the other. Below the lowest rate, half a step; above the highest no step, since there may be a cliff.
    """
    below, above = _sides(row, best)
    if below is None or above is None:
        return -step / 2 if above is not None else 0.0
    left, right = row[below] - row[best], row[above] - row[best]
    if math.isinf(left) and math.isinf(right):
        return 0.0
    left, right = min(left, MOST_SKEW * right), min(right, MOST_SKEW * left)
    return step / 2 * (left - right) / (left + right) if left + right > 0 else 0.0


def curvature(row: Mapping[float, float], best: float) -> float | None:
    """c of loss = c·x² + …, through the best and its neighbours; None if there are not both or one diverged."""
    below, above = _sides(row, best)
    if below is None or above is None or not (math.isfinite(row[below]) and math.isfinite(row[above])):
        return None
    slopes = (row[best] - row[below]) / (best - below), (row[above] - row[best]) / (above - best)
    bend = (slopes[1] - slopes[0]) / (above - below)
    return bend if bend > 0 else None


def vertex(row: Mapping[float, float], best: float, usual: float | None, step: float) -> float:
    """Where the loss should be lowest: inside by a parabola, at an edge with the `usual` curvature if it is known."""
    below, above = _sides(row, best)
    if below is not None and above is not None:
        bend = curvature(row, best)
        if bend is None:
            return best + offset(row, best, step)
        slope = (row[above] - row[below]) / (above - below)
        middle = (above + below) / 2
        return min(max(middle - slope / (2 * bend), below), above)
    near = below if below is not None else above
    if near is None:
        return best + step
    outwards = math.copysign(step, best - near)
    if usual is None or not math.isfinite(row[near]):
        return best + outwards
    lowest = (best + near) / 2 - (row[best] - row[near]) / (2 * usual * (best - near))
    return min(max(lowest, best - step), best + step)
