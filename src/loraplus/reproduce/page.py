"""The page of an experiment: what was found, tables, and the plots with their numbers, in one offline file."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from typing import Any

from loraplus.report.page import environment
from loraplus.reproduce.report import Cell, HeatMap, LinePlot, Report

PAGE_FILE = "index.html"
_TEMPLATE = "experiment.html.jinja"


def render(summary: Mapping[str, Any], report: Report, pictures: Mapping[str, bytes]) -> str:
    """The page.

    Args:
        summary: Content of summary.json.
        report: Of the experiment.
        pictures: {name of a figure: PNG}.

    Returns:
        HTML; all text is escaped, and nothing is loaded from elsewhere.
    """
    pages = environment("loraplus.reproduce")
    pages.filters |= {"cell": cell, "numbers": numbers, "base64": lambda data: base64.b64encode(data).decode()}
    return pages.get_template(_TEMPLATE).render(summary=summary, report=report, pictures=pictures)


def cell(value: Cell) -> str:
    """A number with four significant digits, text as it is, a dash where there is nothing.

    Example:
        >>> [cell(value) for value in (0.123456, 3, "Adam", None)]
        ['0.1235', '3', 'Adam', '–']
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def numbers(plot: LinePlot | HeatMap) -> list[list[Cell]]:
    """The values of a plot as the rows of a table, titles first."""
    if isinstance(plot, HeatMap):
        head: list[Cell] = [f"{plot.y_label} \\ {plot.x_label}", *(f"{x:.4g}" for x in plot.x)]
        return [head, *([y, *row] for y, row in zip(reversed(plot.y), reversed(plot.z), strict=True))]
    rows: list[list[Cell]] = [["", plot.x_label, plot.y_label, "low", "high"]]
    for series in plot.series:
        bounds = (series.low, series.high) if len(series.low) else ([None] * len(series.x),) * 2
        rows += [[series.name, *values] for values in zip(series.x, series.y, *bounds, strict=True)]
    return rows
