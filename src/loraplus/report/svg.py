"""Draws a chart as an SVG element that stands inside a page: its colours are the page's, light or dark.

No picture of a library is as small, follows the page's colours and needs no script (docs/decisions.md). Shapes that
tell something when they are pointed at carry it as `data-tip`; the page's script shows it. Another script zooms: the
picture tells it where the axes stand (`data-box`, `data-x`, `data-y`), and every marker is drawn around its own origin,
so that it keeps its shape while the plot is stretched.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence

from markupsafe import Markup, escape

from loraplus.errors import visible
from loraplus.report.chart import Axis, Chart, Scale, Series
from loraplus.study.wording import rate

WIDTH = 480
_LETTER = 7.6  # mean width of a letter; narrow windows have larger ones
_ROOM = 12
_ROW = 20
_TICKS = 5
_FEWEST_POWERS = 3
_DASHES = {"dashed": "7 4", "dotted": "2 4"}
_VIRIDIS = (
    (68, 1, 84), (72, 40, 120), (62, 73, 137), (49, 104, 142), (38, 130, 142), (31, 158, 137), (53, 183, 121),
    (110, 206, 88), (181, 222, 43), (253, 231, 37),
)  # fmt: skip
_SHAPES: dict[str, tuple[tuple[float, float], ...]] = {
    "diamond": ((0, -1), (1, 0), (0, 1), (-1, 0)),
    "square": ((-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)),
    "triangle-up": ((0, -1), (0.95, 0.75), (-0.95, 0.75)),
    "pentagon": tuple((math.sin(turn), -math.cos(turn)) for turn in (2 * math.pi * i / 5 for i in range(5))),
    "star": tuple(
        ((0.45 if i % 2 else 1.1) * math.sin(math.pi * i / 5), -(0.45 if i % 2 else 1.1) * math.cos(math.pi * i / 5))
        for i in range(10)
    ),
}  # of radius 1; all others are circles, or the cross "x"

Place = Callable[[float], float]


def draw(chart: Chart) -> Markup:
    """The chart as an `<svg>` element; all text in it is escaped.

    Args:
        chart: what is shown. Points that are not finite, or not positive on a logarithmic axis, are left out.
    """
    series = [_drawable(one, chart) for one in chart.series]
    entries = [one for one in series if one.legend and not one.faint and one.name]
    legend, top = _legend(entries) if len(entries) > 1 else (Markup(), _ROOM)
    y_names = [*chart.y.names.values()] or ["0.000000"]
    left = _ROOM + _LETTER * max(map(len, y_names)) + (_ROW if chart.y.label else 0)
    right = WIDTH - (64 if chart.scale else _ROOM)
    bottom = chart.height - 46
    x_range, y_range = _range(chart, series, 0), _range(chart, series, 1)
    x_at, y_at = _placer(chart.x, x_range, left, right), _placer(chart.y, y_range, bottom, top)
    drawn = [
        *(_cells(chart, x_at, y_at) if chart.cells else ()),
        *(
            part
            for one in sorted(series, key=lambda one: not one.faint)
            for part in _series(one, chart.scale, x_at, y_at)
        ),
    ]
    parts = [
        *_axes(chart, x_range, y_range, x_at, y_at, (left, right, top, bottom)),
        _tag("g", _tag("g", *drawn, class_="plot")),  # the outer one is what a zoom cuts off at the axes
        *(_scale(chart.scale, right + 14, top, bottom) if chart.scale else ()),
        legend,
    ]
    label = f"{chart.title}: {chart.y.label or ', '.join(chart.y.names.values())} over {chart.x.label}"
    return _tag(
        "svg", *parts, viewBox=f"0 0 {WIDTH} {chart.height}", role="img", aria_label=label, class_="chart",
        data_box=f"{left:.1f} {top} {right - left:.1f} {bottom - top}",
        data_x=_told(chart.x, x_range), data_y=_told(chart.y, y_range),
    )  # fmt: skip


def _told(axis: Axis, ends: tuple[float, float]) -> str:
    """An axis for the script: its two ends, logarithms on a logarithmic one, and its kind."""
    return f"{ends[0]:.9g} {ends[1]:.9g} {'names' if axis.names else 'log' if axis.log else 'linear'}"


def _tag(name: str, *content: str, **attributes: object) -> Markup:
    """An element; what is not markup is escaped."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-") if key != "viewBox" else key}="{escape(visible(str(_short(value))))}"'
        for key, value in attributes.items()
        if value is not None and value != ""
    )
    return Markup(
        f"<{name}{written}>{''.join(escape(visible(part)) if type(part) is str else part for part in content)}</{name}>"
    )


def _short(value: object) -> object:
    """A tenth of a pixel is more than is seen."""
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else value


def _text(text: str, x: float, y: float, **attributes: object) -> Markup:
    """Text; η_A and η_B have their letter lowered."""
    parts = [
        _tag("tspan", part, dy="0.25em", font_size="0.75em") if place % 2 else part
        for place, part in enumerate(re.split(r"(?<=η)_([AB])", text))
    ]
    if len(parts) > 1 and parts[-1]:
        parts[-1] = _tag("tspan", parts[-1], dy="-0.19em")
    return _tag("text", *parts, x=x, y=y, **attributes)


def _drawable(one: Series, chart: Chart) -> Series:
    """The series without the points that cannot be drawn."""
    good = [
        place for place, (x, y) in enumerate(zip(one.x, one.y, strict=True))
        if all(math.isfinite(v) and (v > 0 or not axis.log) for v, axis in ((x, chart.x), (y, chart.y)))
    ]  # fmt: skip
    names = ("x", "y", "low", "high", "bars", "told", "values", "labels")
    kept = {name: [values[place] for place in good] if (values := getattr(one, name)) else () for name in names}
    return Series(**{**one.__dict__, **kept})


def _range(chart: Chart, series: Sequence[Series], side: int) -> tuple[float, float]:
    """Lowest and highest of what is drawn, with some room; on a logarithmic axis of the logarithms."""
    axis = (chart.x, chart.y)[side]
    values = [*axis.names]
    for one in series:
        values += (one.x, one.y)[side]
        values += [*one.low, *one.high] if side else [end for bar in one.bars for end in bar]
    if axis.log:
        values = [math.log10(value) for value in values if value > 0]
        if chart.cells:
            edges = [_edges((chart.cells.x, chart.cells.y)[side])[end] for end in (0, -1)]
            return math.log10(edges[0]), math.log10(edges[1])
    values = [value for value in values if math.isfinite(value)]
    if not values:
        return 0.0, 1.0
    low, high = min(values), max(values)
    room = 0.06 * (high - low) or abs(high) * 0.1 or 0.5
    if axis.names:
        return low - 0.6, high + 0.6
    return low - room, high + room


def _placer(axis: Axis, ends: tuple[float, float], start: float, stop: float) -> Place:
    low, high = ends
    return lambda value: start + ((math.log10(value) if axis.log else value) - low) / (high - low) * (stop - start)


def _ticks(axis: Axis, ends: tuple[float, float]) -> list[tuple[float, str]]:
    """Places along an axis and what stands there."""
    low, high = ends
    if axis.names:
        return list(axis.names.items())
    if axis.log:
        powers = [10.0**power for power in range(math.ceil(low), math.floor(high) + 1)]
        if len(powers) < _FEWEST_POWERS:
            all_steps = [m * 10.0**power for power in range(math.floor(low), math.ceil(high) + 1) for m in (1, 2, 5)]
            powers = [value for value in all_steps if low <= math.log10(value) <= high]
        thinned = powers[:: max(1, math.ceil(len(powers) / 7))]
        return [(value, f"{value:g}" if 1 <= value < 1e6 else rate(value)) for value in thinned]
    rough = (high - low) / _TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough * 0.999)
    count = math.floor(high / step) - math.ceil(low / step) + 1
    values = [round((math.ceil(low / step) + place) * step, 12) + 0.0 for place in range(count)]
    return [(value, f"{value:g}") for value in values]


def _axes(
    chart: Chart, x_range: tuple[float, float], y_range: tuple[float, float], x_at: Place, y_at: Place,
    box: tuple[float, float, float, float],
) -> Iterable[Markup]:  # fmt: skip
    left, right, top, bottom = box
    below, beside = [], []
    for value, text in _ticks(chart.x, x_range):
        x = x_at(value)
        below.append(_tag("line", x1=x, x2=x, y1=top, y2=bottom, class_="grid"))
        below.append(_text(text, x, bottom + 18, class_="tick", text_anchor="middle"))
    for value, text in _ticks(chart.y, y_range):
        y = y_at(value)
        if not chart.y.names:
            beside.append(_tag("line", x1=left, x2=right, y1=y, y2=y, class_="grid"))
        beside.append(_text(text, left - 8, y + 4, class_="tick", text_anchor="end"))
    yield from (_tag("g", *below, class_="ticks-x"), _tag("g", *beside, class_="ticks-y"))
    yield _tag("path", d=f"M{left:.1f} {top}V{bottom}H{right}", class_="axis")
    yield _text(chart.x.label, (left + right) / 2, chart.height - 8, class_="label", text_anchor="middle")
    if chart.y.label:
        middle = (top + bottom) / 2
        yield _text(
            chart.y.label, 14, middle, class_="label", text_anchor="middle", transform=f"rotate(-90 14 {middle:.0f})"
        )


def _series(one: Series, scale: Scale | None, x_at: Place, y_at: Place) -> Iterable[Markup]:
    colour = "var(--soft)" if one.colour is None else f"var(--c{one.colour})"
    at = [(x_at(x), y_at(y)) for x, y in zip(one.x, one.y, strict=True)]
    if one.low:
        upper = [f"{x:.1f} {y_at(high):.1f}" for (x, _), high in zip(at, one.high, strict=True)]
        lower = [f"{x:.1f} {y_at(low):.1f}" for (x, _), low in zip(at, one.low, strict=True)]
        yield _tag("path", d=f"M{'L'.join(upper + lower[::-1])}Z", fill=colour, class_="band")
    if one.line and len(at) > 1:
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in at)
        width = 1.0 if one.faint else 1.4 if one.line == "dotted" else 2.4
        yield _tag(
            "path", d=path, fill="none", stroke=colour, stroke_width=width, stroke_dasharray=_DASHES.get(one.line),
            class_="faint" if one.faint else None,
        )  # fmt: skip
    for (_, y), (low, high) in zip(at, one.bars, strict=False):
        ends = f"M{x_at(low):.1f} {y - 5:.1f}v10M{x_at(low):.1f} {y:.1f}H{x_at(high):.1f}m0 -5v10"
        yield _tag("path", d=ends, fill="none", stroke=colour, stroke_width=2.0)
    if not one.marker or one.faint:
        return
    for place, (x, y) in enumerate(at):
        shades = scale is not None and len(one.values) > place
        fill = _shade(one.values[place], scale) if shades and scale else "none" if one.hollow else colour
        parts = [_shape(one.marker, 0, 0, one.size / 2, fill=fill, stroke=colour, stroke_width=1.6)]
        if one.labels:
            parts.append(_text(one.labels[place], one.size / 2 + 5, 4, class_="beside"))
        told = one.told[place] if one.told else None
        if told:  # fingers need more than a marker's size
            parts.append(_tag("circle", r=max(9.0, one.size / 2), class_="touch"))
        yield _tag("g", *parts, class_="mark", transform=f"translate({x:.1f} {y:.1f})", data_tip=told)


def _shape(marker: str, x: float, y: float, radius: float, **look: object) -> Markup:
    if marker == "x":
        across = f"{2 * radius:.1f}"
        strokes = f"l{across} {across}m0 -{across}l-{across} {across}"
        return _tag("path", d=f"M{x - radius:.1f} {y - radius:.1f}{strokes}", **look)
    if corners := _SHAPES.get(marker):
        points = " ".join(f"{x + radius * dx:.1f},{y + radius * dy:.1f}" for dx, dy in corners)
        return _tag("polygon", points=points, **look)
    return _tag("circle", cx=x, cy=y, r=radius, **look)


def _shade(value: float | None, scale: Scale) -> str:
    """Viridis, light where the value is low."""
    if value is None or not math.isfinite(value):
        return "none"
    low, high = scale.low, scale.high
    if scale.log and min(low, high, value) > 0:
        low, high, value = math.log(low), math.log(high), math.log(value)
    part = 0.0 if high <= low else min(1.0, max(0.0, (value - low) / (high - low)))
    place = (1 - part) * (len(_VIRIDIS) - 1)
    first = min(int(place), len(_VIRIDIS) - 2)
    mixed = (a + (b - a) * (place - first) for a, b in zip(_VIRIDIS[first], _VIRIDIS[first + 1], strict=True))
    return "#" + "".join(f"{round(channel):02x}" for channel in mixed)


def _edges(centres: Sequence[float]) -> list[float]:
    """Borders of cells around points on a logarithmic axis."""
    logs = [math.log10(value) for value in centres]
    step = (logs[-1] - logs[0]) / (len(logs) - 1) if len(logs) > 1 else 1.0
    return [10 ** (log - step / 2) for log in (*logs, logs[-1] + step)]


def _cells(chart: Chart, x_at: Place, y_at: Place) -> Iterable[Markup]:
    cells, scale = chart.cells, chart.scale
    if cells is None or scale is None:
        return
    xs, ys = [x_at(x) for x in _edges(cells.x)], [y_at(y) for y in _edges(cells.y)]
    for row, values in enumerate(cells.z):
        for column, value in enumerate(values):
            known = value is not None and math.isfinite(value)
            told = f"{chart.x.label} {cells.x[column]:.3g}, {chart.y.label} {cells.y[row]:.3g}: "
            yield _tag(
                "rect", x=xs[column], y=ys[row + 1], width=xs[column + 1] - xs[column] + 0.3,
                height=ys[row] - ys[row + 1] + 0.3, fill=_shade(value, scale) if known else None,
                class_=None if known else "nothing",
                data_tip=told + (f"{scale.label} {value:.4g}" if known else "nothing"),
            )  # fmt: skip


def _scale(scale: Scale, x: float, top: float, bottom: float) -> Iterable[Markup]:
    """A bar of the colours with its two ends."""
    top, steps = top + 22, 32
    height = (bottom - top) / steps
    for place in range(steps):
        part = 1 - (place + 0.5) / steps
        fill = _shade(part, Scale("", 0.0, 1.0))
        yield _tag("rect", x=x, y=top + place * height, width=12, height=height + 0.4, fill=fill)
    yield _text(scale.label, WIDTH - 2, top - 10, class_="tick", text_anchor="end")
    for value, y in ((scale.high, top + 10), (scale.low, bottom)):
        yield _text(f"{value:.3g}", x + 15, y, class_="tick")


def _legend(entries: Sequence[Series]) -> tuple[Markup, float]:
    """(legend above the chart, where the chart begins)"""
    parts, x, y = [], float(_ROOM), 12.0
    for one in entries:
        width = 30 + _LETTER * len(one.name)
        if x > _ROOM and x + width > WIDTH:
            x, y = float(_ROOM), y + _ROW
        colour = "var(--soft)" if one.colour is None else f"var(--c{one.colour})"
        if one.line:
            parts.append(
                _tag(
                    "path",
                    d=f"M{x:.1f} {y:.1f}h22",
                    stroke=colour,
                    stroke_width=2.2,
                    stroke_dasharray=_DASHES.get(one.line),
                )
            )
        if one.marker:
            fill = "none" if one.hollow or one.values else colour
            parts.append(_shape(one.marker, x + 11, y, 4, fill=fill, stroke=colour, stroke_width=1.6))
        parts.append(_text(one.name, x + 27, y + 4, class_="tick"))
        x += width + 12
    return _tag("g", *parts), y + _ROW
