"""Figures of a report as PNG, for the page and for documents."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np

from loraplus.report.plots import PALETTE
from loraplus.reproduce.report import Figure, HeatMap, LinePlot

_INCHES = (4.6, 3.7)
_DPI = 110
_MOST_TICKS = 8
_MARKS = ("o", "D", "s", "^")


def draw(figure: Figure) -> bytes:
    """A figure as PNG, its plots side by side."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    width, height = _INCHES
    columns = 2 if len(figure.plots) == 4 else min(3, len(figure.plots))
    rows = math.ceil(len(figure.plots) / columns)
    canvas, axes = plt.subplots(rows, columns, figsize=(width * columns, height * rows), squeeze=False)
    for panel in axes.flat[len(figure.plots) :]:
        panel.axis("off")
    for panel, plot in zip(axes.flat, figure.plots, strict=False):
        if isinstance(plot, HeatMap):
            _heat_map(canvas, panel, plot)
        else:
            _lines(panel, plot)
        panel.set_title(plot.title, fontsize=10)
        panel.set_xlabel(plot.x_label)
        panel.set_ylabel(plot.y_label)
        panel.tick_params(labelsize=8)
    canvas.tight_layout()
    picture = io.BytesIO()
    canvas.savefig(picture, dpi=_DPI, format="png", metadata={"Software": None})
    plt.close(canvas)
    return picture.getvalue()


def _heat_map(canvas: Any, axes: Any, plot: HeatMap) -> None:
    from matplotlib.colors import LogNorm, Normalize

    z = np.array([[np.nan if value is None else value for value in row] for row in plot.z], dtype=float)
    axes.set_facecolor("0.85")  # where it diverged
    norm = (LogNorm if plot.log_z else Normalize)(vmax=plot.z_max)
    mesh = axes.pcolormesh(_edges(plot.x), _edges(plot.y), np.ma.masked_invalid(z), cmap="viridis_r", norm=norm)
    axes.set(xscale="log", yscale="log")
    canvas.colorbar(mesh, ax=axes, extend="neither" if plot.z_max is None else "max").set_label(plot.z_label)
    limits = axes.get_xlim(), axes.get_ylim()
    if plot.diagonal:
        ends = [min(limits[0][0], limits[1][0]), max(limits[0][1], limits[1][1])]
        axes.plot(ends, ends, ":", color="black", linewidth=1.4, label=plot.diagonal)
    for (name, x, y), marker, colour in zip(plot.marks, _MARKS, PALETTE, strict=False):
        axes.plot(x, y, marker, markersize=9, color=colour, markeredgecolor="white", linestyle="none", label=name)
    axes.set(xlim=limits[0], ylim=limits[1])
    if plot.diagonal or plot.marks:
        axes.legend(fontsize=7, loc="best", framealpha=0.85)


def _edges(centres: object) -> Any:
    """Borders of the cells around points that are evenly spaced on a logarithmic axis."""
    logs = np.log10(np.asarray(centres, dtype=float))
    step = np.diff(logs).mean() if len(logs) > 1 else 1.0
    return 10 ** np.append(logs - step / 2, logs[-1] + step / 2)


def _lines(axes: Any, plot: LinePlot) -> None:
    from matplotlib.ticker import NullLocator

    for place, series in enumerate(plot.series):
        colour = PALETTE[(place if series.colour is None else series.colour) % len(PALETTE)]
        axes.plot(
            series.x, series.y, "--" if series.dashed else "-", color=colour, label=series.name or None,
            marker="o" if series.markers else None, markersize=4, linewidth=1.3 if series.dashed else 1.8,
        )  # fmt: skip
        if len(series.low):
            axes.fill_between(series.x, series.low, series.high, color=colour, alpha=0.18, linewidth=0)
    axes.set(xscale="log" if plot.log_x else "linear", yscale="log" if plot.log_y else "linear")
    ticks = sorted({x for series in plot.series for x in series.x})
    if plot.log_x and len(ticks) <= _MOST_TICKS:
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(True, alpha=0.25)
    axes.legend(fontsize=7)
