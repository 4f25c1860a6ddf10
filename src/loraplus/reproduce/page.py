"""The page of an experiment: what was found, tables and interactive plots in one file that needs no network."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from loraplus.report.page import environment
from loraplus.report.plots import NEUTRAL, PALETTE, as_json, laid_out
from loraplus.reproduce.report import Cell, HeatMap, LinePlot, Report

PAGE_FILE = "index.html"
_TEMPLATE = "experiment.html.jinja"
_HEIGHT = 430
_MARKS = ("circle", "diamond", "square", "triangle-up")


def render(summary: Mapping[str, Any], report: Report) -> str:
    """The page.

    Args:
        summary: Content of summary.json.
        report: Of the experiment.

    Returns:
        HTML; all text is escaped, and nothing is loaded from elsewhere.
    """
    pages = environment("loraplus.reproduce")
    pages.filters["cell"] = cell
    drawn = {
        f"{figure.name}-{place}": Markup(as_json(_drawn(plot)))
        for figure in report.figures
        for place, plot in enumerate(figure.plots)
    }
    return pages.get_template(_TEMPLATE).render(
        summary=summary, report=report, drawn=drawn, plotly_js=Markup(get_plotlyjs())
    )


def cell(value: Cell) -> str:
    """A number with four significant digits, text as it is, a dash where there is nothing.

    Example:
        >>> [cell(value) for value in (0.123456, 3, "Adam", None)]
        ['0.1235', '3', 'Adam', '–']
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _drawn(plot: LinePlot | HeatMap) -> go.Figure:
    figure = _heat_map(plot) if isinstance(plot, HeatMap) else _lines(plot)
    return laid_out(figure, plot.x_label, plot.y_label, _HEIGHT)


def _heat_map(plot: HeatMap) -> go.Figure:
    figure = go.Figure()
    shown = [[_shade(value, plot) for value in row] for row in plot.z]
    inside = [value for row in shown for value in row if value is not None]
    top = _shade(plot.z_max, plot) if plot.z_max is not None else max(inside, default=1.0)
    figure.add_heatmap(
        x=list(plot.x), y=list(plot.y), z=shown, zmin=min(inside, default=0.0), zmax=top,
        text=[["" if value is None else f"{value:.4g}" for value in row] for row in plot.z],
        colorscale="Viridis", reversescale=True, hoverongaps=False,
        colorbar={"title": {"text": plot.z_label}, "thickness": 12, "outlinewidth": 0, **_ticks(inside, top, plot)},
        hovertemplate=f"{plot.x_label} %{{x:.3g}} · {plot.y_label} %{{y:.3g}}"
                      f"<br>{plot.z_label} %{{text}}<extra></extra>",
    )  # fmt: skip
    if plot.diagonal:
        ends = [max(min(plot.x), min(plot.y)), min(max(plot.x), max(plot.y))]
        figure.add_scatter(
            x=ends, y=ends, mode="lines", line={"color": NEUTRAL, "dash": "dot", "width": 2}, name=plot.diagonal,
            hoverinfo="skip",
        )  # fmt: skip
    for (name, x, y), symbol, colour in zip(plot.marks, _MARKS, PALETTE, strict=False):
        figure.add_scatter(
            x=[x], y=[y], mode="markers", name=name, hoverinfo="skip",
            marker={"symbol": symbol, "size": 14, "color": colour, "line": {"width": 2, "color": "white"}},
        )  # fmt: skip
    figure.update_xaxes(type="log", exponentformat="power", dtick=1)
    figure.update_yaxes(type="log", exponentformat="power", dtick=1)
    return figure


def _shade(value: float | None, plot: HeatMap) -> float | None:
    """Where a value stands on the colour axis."""
    return math.log10(value) if plot.log_z and value is not None else value


def _ticks(inside: Sequence[float], top: float | None, plot: HeatMap) -> dict[str, Any]:
    """Marks beside the colours, in the values themselves where the colours go by their logarithm."""
    if not plot.log_z or not inside or top is None:
        return {}
    low = min(inside)
    places = [low + (top - low) * part / 4 for part in range(5)]
    return {"tickvals": places, "ticktext": [f"{10**place:.2g}" for place in places]}


def _lines(plot: LinePlot) -> go.Figure:
    figure = go.Figure()
    for place, series in enumerate(plot.series):
        colour = PALETTE[(place if series.colour is None else series.colour) % len(PALETTE)]
        if len(series.low):
            figure.add_scatter(
                x=[*series.x, *reversed(series.x)], y=[*series.high, *reversed(series.low)], fill="toself",
                fillcolor=colour, opacity=0.18, line={"width": 0}, mode="lines", showlegend=False, hoverinfo="skip",
            )  # fmt: skip
        line = {"dash": "dash", "width": 1.5} if series.dashed else {"width": 2.5}
        figure.add_scatter(
            x=list(series.x), y=list(series.y), name=series.name, showlegend=bool(series.name),
            mode="lines+markers" if series.markers else "lines", marker={"size": 7},
            line={"color": colour, **line},
            hovertemplate=f"{series.name}<br>{plot.x_label} %{{x:.4g}}<br>{plot.y_label} %{{y:.4g}}<extra></extra>",
        )  # fmt: skip
    if plot.log_x:
        figure.update_xaxes(type="log", exponentformat="power")
    if plot.log_y:
        figure.update_yaxes(type="log", exponentformat="power")
    return figure
