"""A mean over seeds with its 95% interval by Student's t: what a few runs of one setting can say."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

from loraplus.study.statistics import Estimate

_CONFIDENCE = 0.95


def t_interval(values: Sequence[float]) -> Estimate:
    """The mean of one value a seed; with one seed the interval is unbounded.

    Args:
        values: one a seed, at least one, all finite.

    Example:
        >>> t_interval([1.0, 1.0, 1.0])
        Estimate(mean=1.0, low=1.0, high=1.0)
    """
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return Estimate(mean, -math.inf, math.inf)
    half = stats.t.ppf((1 + _CONFIDENCE) / 2, len(values) - 1) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return Estimate(mean, mean - float(half), mean + float(half))


def finite_t_interval(values: Sequence[float]) -> Estimate | None:
    """`t_interval`; None without values, or if one of them is not finite (a run that diverged)."""
    return t_interval(values) if len(values) and np.isfinite(values).all() else None
