"""Numbers as every table, sentence and progress line shows them."""

from __future__ import annotations

import math


def rate(value: float) -> str:
    """A learning rate with at most three digits, in the shortest scientific form.

    Example:
        >>> rate(2.5e-4), rate(1e-3)
        ('2.5e-4', '1e-3')
    """
    mantissa, _, exponent = f"{value:.2e}".partition("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def p_value(value: float | None) -> str:
    """p = 0.031; never p = 0.

    Example:
        >>> p_value(0.0314)
        'p = 0.031'
    """
    if value is None or not math.isfinite(value):
        return "p unknown"
    return f"p = {value:.3f}" if value >= 0.001 else "p < 0.001"


def signed(value: float, digits: int) -> str:
    """With its sign, and no -0.0."""
    return f"{round(value, digits) + 0.0:+.{digits}f}"


def counted(count: float, noun: str) -> str:
    """1 run, 2 runs; with two digits where parts of a run count.

    Example:
        >>> counted(1, "run"), counted(0, "run"), counted(2.25, "run")
        ('1 run', '0 runs', '2.25 runs')
    """
    return f"{count:.2f}".rstrip("0").rstrip(".") + f" {noun}{'' if count == 1 else 's'}"


def in_seeds(count: int) -> str:
    """1 seed, 2 seeds."""
    return counted(count, "seed")
