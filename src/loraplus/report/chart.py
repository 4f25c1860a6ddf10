"""What a chart shows, as plain data: series over two axes, cells of a map, and the same numbers as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

Cell = str | float | int | None


@dataclass(frozen=True)
class Axis:
    """One direction of a chart.

    Args:
        label: what is measured, with its unit.
        log: equal distances are equal factors.
        names: what stands at these places instead of numbers.
    """

    label: str
    log: bool = False
    names: Mapping[float, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Series:
    """Points that belong together.

    Args:
        name: in the legend.
        x, y: of each point.
        colour: place in the palette; None is grey.
        line: how the points are joined.
        marker: shape at each point; "" for none.
        size: of the markers, across, in pixels.
        hollow: only the outline of the markers.
        faint: thin and pale, behind the others; tells nothing and has no legend.
        low, high: of a band around y.
        bars: (low, high) in x of each point.
        told: what each point tells when it is pointed at.
        values: what colours each marker, on the chart's scale.
        labels: text beside each marker.
        legend: whether it has an entry there.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int | None = None
    line: Literal["", "solid", "dashed", "dotted"] = ""
    marker: str = ""
    size: float = 7.0
    hollow: bool = False
    faint: bool = False
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    bars: Sequence[tuple[float, float]] = ()
    told: Sequence[str] = ()
    values: Sequence[float] = ()
    labels: Sequence[str] = ()
    legend: bool = True


@dataclass(frozen=True)
class Scale:
    """What colours stand for; what lies beyond has the colour of the nearer end."""

    label: str
    low: float
    high: float
    log: bool = False


@dataclass(frozen=True)
class Cells:
    """A map of colours on logarithmic axes: `z[row][column]` at (x[column], y[row]), None where there is nothing."""

    x: Sequence[float]
    y: Sequence[float]
    z: Sequence[Sequence[float | None]]


@dataclass(frozen=True)
class Chart:
    """A chart and its table.

    Args:
        title: in a few words; with the axes it is what a screen reader says of the picture.
        x, y: axes.
        series: drawn in this order.
        columns, rows: the same numbers as a table.
        scale: of colours, where values have them.
        cells: behind the series.
        height: for a width of 480.
    """

    title: str
    x: Axis
    y: Axis
    series: Sequence[Series]
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    scale: Scale | None = None
    cells: Cells | None = None
    height: int = 320
