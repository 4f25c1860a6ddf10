"""Exponents: how a quantity grows with the width, with an interval over seeds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from loraplus.study.statistics import Estimate, t_interval


def exponent(x: Sequence[float], log10_y: Sequence[Sequence[float]]) -> Estimate:
    """p of y ∝ xᵖ, fitted by least squares for each seed; the mean over the seeds with its 95% interval.

    Args:
        x: Such as the widths.
        log10_y: For each seed the decimal logarithms of y at each x.

    Example:
        >>> exponent([64, 128, 256], [[0.0, 0.30103, 0.60206]]).mean.__round__(3)
        1.0
    """
    return t_interval([float(np.polyfit(np.log10(x), row, 1)[0]) for row in log10_y])
