"""What an experiment reports: sentences, tables and plots as plain data.

`png.py` draws the plots for documents (matplotlib), `page.py` puts all of it into an offline page.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loraplus.report.chart import Cell


def interval(estimate: Mapping[str, float], digits: int = 2) -> str:
    """A mean with its interval, in words.

    Example:
        >>> interval({"mean": 0.5, "low": 0.25, "high": 0.75})
        '0.50 [0.25, 0.75]'
    """
    mean, low, high = (f"{estimate[bound]:.{digits}f}" for bound in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


@dataclass(frozen=True)
class Table:
    """Rows of text and numbers; numbers are shown with four significant digits."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""


@dataclass(frozen=True)
class Series:
    """One line: finite points, and where `low` and `high` are given their interval as a band.

    `colour` is a place in the palette; default: the series' own place in the plot.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    dashed: bool = False
    markers: bool = True
    colour: int | None = None


def banded(name: str, x: Sequence[float], estimates: Sequence[Mapping[str, float]], **look: Any) -> Series:
    """Means with their intervals as a band; without one where an interval is unbounded, as of one seed."""
    mean, low, high = ([estimate[bound] for estimate in estimates] for bound in ("mean", "low", "high"))
    band = (low, high) if all(map(math.isfinite, (*low, *high))) else ((), ())
    return Series(name, x, mean, *band, **look)


@dataclass(frozen=True)
class LinePlot:
    """Lines over a common axis."""

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    log_x: bool = False
    log_y: bool = False


@dataclass(frozen=True)
class HeatMap:
    """Values over (x, y) on logarithmic axes, with the diagonal x = y and points to mark.

    Args:
        x, y: Where the columns and rows of `z` stand.
        z: z[row][column]; None where the run diverged or there was none.
        marks: (name, x, y) of points worth seeing, such as the best; at most four.
        diagonal: Name of the line x = y, or None for no line.
        z_max: Values above share the darkest colour.
        log_z: Colours go by the logarithm.
    """

    title: str
    x_label: str
    y_label: str
    z_label: str
    x: Sequence[float]
    y: Sequence[float]
    z: Sequence[Sequence[float | None]]
    marks: Sequence[tuple[str, float, float]] = ()
    diagonal: str | None = "λ = 1"
    z_max: float | None = None
    log_z: bool = False


@dataclass(frozen=True)
class Figure:
    """One picture, NAME.png: a plot or several side by side."""

    name: str
    title: str
    plots: Sequence[LinePlot | HeatMap]
    caption: str = ""


@dataclass(frozen=True)
class Report:
    """A whole report, in the order in which it is read.

    Args:
        verdict: What was found, in sentences with figures.
        parts: Tables and figures.
        limits: What it does not tell.
        method: How it was done, in sentences.
        headline: What was found in a few words; else the experiment's title stands there.
    """

    verdict: Sequence[str]
    parts: Sequence[Table | Figure]
    method: Sequence[str] = ()
    limits: Sequence[str] = ()
    headline: str = ""

    @property
    def figures(self) -> list[Figure]:
        """The parts that are pictures."""
        return [part for part in self.parts if isinstance(part, Figure)]
