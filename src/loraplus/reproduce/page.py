"""The page of an experiment: what was found, tables, and charts with their numbers, in one offline file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from loraplus.report import chart
from loraplus.report.live import running_page
from loraplus.report.page import template
from loraplus.report.plots import PALETTE
from loraplus.reproduce.experiment import Experiment, Record
from loraplus.reproduce.report import Cell, Figure, HeatMap, LinePlot, Report
from loraplus.study.runner import Event
from loraplus.study.wording import counted

PAGE_FILE = "index.html"
_TEMPLATE = "experiment.html.jinja"
_MARKS = ("circle", "diamond", "square", "triangle-up")
_FEW_CELLS = 12
_MOST_RUNS = 200  # on a page that is written again and again


def render(summary: Mapping[str, Any], report: Report) -> str:
    """The page.

    Args:
        summary: Content of summary.json.
        report: Of the experiment.

    Returns:
        HTML; all text is escaped, and nothing is loaded from elsewhere.
    """
    page = template(_TEMPLATE, "loraplus.reproduce")
    return page.render(summary=summary, report=report, charts=charts)


def running(experiment: Experiment, command: str) -> Callable[[Event], str]:
    """The page of an experiment under way at each event of its study: how far it is, and its last runs.

    Args:
        experiment: that is run.
        command: that runs it.
    """

    def page(event: Event) -> str:
        last = list(event.records.values())[-_MOST_RUNS:]
        names = list(dict.fromkeys(name for record in last for name in record.trial.params))
        return running_page(
            f"{event.done:g} of {counted(event.planned, 'run')} done",
            about=experiment.title,
            command=command,
            charts=[],
            table={
                "title": "The last runs",
                "columns": [*names, "result"],
                "rows": [
                    [*(record.trial.params.get(name) for name in names), _came_to(experiment, record)]
                    for record in reversed(last)
                ],
            },
        )

    return page


def _came_to(experiment: Experiment, record: Record) -> str:
    if record.status == "diverged":
        return "diverged"
    main = experiment.main(record)
    return f"{main[0].replace('_', ' ')} {main[1]:.4g}" if main else "done"


def charts(figure: Figure) -> list[chart.Chart]:
    """The plots of a figure as a page draws them."""
    return [
        replace(drawn, title=plot.title or figure.title)
        for plot in figure.plots
        for drawn in [_map(plot) if isinstance(plot, HeatMap) else _lines(plot)]
    ]


def _lines(plot: LinePlot) -> chart.Chart:
    series, rows = [], []
    for place, line in enumerate(plot.series):
        series.append(
            chart.Series(
                line.name, line.x, line.y, colour=(place if line.colour is None else line.colour) % len(PALETTE),
                line="dashed" if line.dashed else "solid", marker="circle" if line.markers else "", size=6,
                low=line.low, high=line.high,
                told=[f"{line.name}: {y:.4g} at {x:.4g}" for x, y in zip(line.x, line.y, strict=True)],
            )
        )  # fmt: skip
        bounds = (line.low, line.high) if len(line.low) else ([None] * len(line.x),) * 2
        rows += [[line.name, *values] for values in zip(line.x, line.y, *bounds, strict=True)]
    x, y = chart.Axis(plot.x_label, plot.log_x), chart.Axis(plot.y_label, plot.log_y)
    return chart.Chart(plot.title, x, y, series, ["line", plot.x_label, plot.y_label, "low", "high"], rows)


def _map(plot: HeatMap) -> chart.Chart:
    ends = [min(plot.x[0], plot.y[0]), max(plot.x[-1], plot.y[-1])]
    diagonal = [chart.Series(plot.diagonal, ends, ends, line="dotted")] if plot.diagonal else []
    marks = [
        chart.Series(name, [x], [y], colour=place, marker=marker, size=11, told=[f"{name}: {x:.3g}, {y:.3g}"])
        for place, ((name, x, y), marker) in enumerate(zip(plot.marks, _MARKS, strict=False))
    ]
    known = [value for row in plot.z for value in row if value is not None]
    highest = max(known, default=1.0) if plot.z_max is None else plot.z_max
    columns = [f"{plot.y_label} \\ {plot.x_label}", *(f"{x:.4g}" for x in plot.x)]
    rows: list[list[Cell]] = [[y, *row] for y, row in zip(reversed(plot.y), reversed(plot.z), strict=True)]
    if len(plot.x) > _FEW_CELLS:  # wider than a page
        columns = [plot.x_label, plot.y_label, plot.z_label]
        rows = [[x, y, z] for y, row in zip(plot.y, plot.z, strict=True) for x, z in zip(plot.x, row, strict=True)]
    return chart.Chart(
        plot.title,
        chart.Axis(plot.x_label, log=True),
        chart.Axis(plot.y_label, log=True),
        [*diagonal, *marks],
        columns,
        rows,
        scale=chart.Scale(plot.z_label, min(known, default=0.0), highest, log=plot.log_z),
        cells=chart.Cells(plot.x, plot.y, plot.z),
        height=400,
    )
