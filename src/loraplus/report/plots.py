"""The pictures of a comparison and of a training run: differences seed by seed, losses over steps, tried rates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import plotly.graph_objects as go

from loraplus.study.arms import ALL
from loraplus.study.records import Record
from loraplus.tasks.measures import ACCURACY

# Okabe and Ito's palette: told apart with any colour vision, and readable on white and on near black.
PALETTE = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = ("circle", "diamond", "square", "triangle-up", "pentagon", "star")


def look(place: int) -> tuple[str, str]:
    """Colour and marker of an arm by its place: where the colours come round again, the markers have moved on.

    Example:
        >>> look(0)[0] == look(6)[0], look(0)[1] == look(6)[1]
        (True, False)
    """
    count = len(PALETTE)
    return PALETTE[place % count], _MARKERS[(place + place // count) % count]


COLOURS = {arm: look(place)[0] for place, arm in enumerate(ALL)}
SYMBOLS = {arm: look(place)[1] for place, arm in enumerate(ALL)}
NEUTRAL = "#7f8790"
_ENDS = ("mean", "low", "high")
_GRID = "rgba(127,135,144,0.22)"


def laid_out(figure: go.Figure, x: str, y: str, height: int) -> go.Figure:
    axis = {"gridcolor": _GRID, "linecolor": NEUTRAL, "zeroline": False, "ticks": "outside", "tickcolor": NEUTRAL}
    figure.update_layout(
        height=height,
        margin={"l": 64, "r": 16, "t": 12, "b": 52},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={
            "family": "system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif",
            "size": 13,
            "color": NEUTRAL,
        },
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        hoverlabel={"font": {"size": 12}},
    )
    figure.update_xaxes(title=x, **axis)
    figure.update_yaxes(title=y, **axis)
    return figure


def differences(pairs: Mapping[str, tuple[str, Mapping[str, Any]]], measure: str) -> go.Figure:
    """Each arm − LoRA: a dot a seed, and above them the mean with its interval over seeds, if there is one.

    Args:
        pairs: {title: (arm, its fields of summary.json)}.
        measure: that decides; accuracy is shown in points.
    """
    figure, field, scale = go.Figure(), f"{measure}_difference", 100 if measure == ACCURACY else 1
    titles = list(pairs)[::-1]  # the first one on top
    for row, title in enumerate(titles):
        arm, pair = pairs[title]
        seeds = pair["by_seed"]
        mean, low, high = (None if pair[field][end] is None else scale * pair[field][end] for end in _ENDS)
        interval = {} if mean is None or low is None or high is None else {
            "error_x": {"type": "data", "symmetric": False, "array": [high - mean], "arrayminus": [mean - low]}
        }  # fmt: skip
        figure.add_scatter(
            x=[scale * seed[field] for seed in seeds], y=[row - 0.12] * len(seeds), mode="markers", name=title,
            marker={"symbol": "circle-open", "color": COLOURS[arm], "size": 9}, showlegend=False,
            customdata=[seed["seed"] for seed in seeds],
            hovertemplate=f"{title}<br>seed %{{customdata}}: %{{x:+.4g}}<extra></extra>",
        )  # fmt: skip
        figure.add_scatter(
            x=[mean], y=[row + 0.12], mode="markers", name=title, showlegend=False,
            marker={"symbol": SYMBOLS[arm], "color": COLOURS[arm], "size": 11},
            hovertemplate=f"{title}<br>mean %{{x:+.4g}}<extra></extra>", **interval,
        )  # fmt: skip
    figure.add_vline(0, line={"color": NEUTRAL, "width": 1.2, "dash": "dot"})
    unit = "test accuracy, points" if measure == ACCURACY else "test loss a token"
    laid_out(figure, f"difference to LoRA in {unit}", "", 110 + 60 * len(titles))
    figure.update_layout(margin={"l": 130})
    figure.update_yaxes(
        tickvals=list(range(len(titles))), ticktext=titles, range=[-0.6, len(titles) - 0.4], showgrid=False
    )
    return figure


def curves(records: Sequence[Record]) -> go.Figure:
    """Mean validation loss of each arm over the steps, its seeds thin behind it; untuned runs dashed."""
    figure = go.Figure()
    for phase, dash, suffix in (("final", "solid", ""), ("untuned", "dash", ", untuned")):
        for arm, info in ALL.items():
            runs = [
                r for r in records if r.trial.phase == phase and r.trial.arm == arm and r.status == "done" and r.curve
            ]
            if not runs:
                continue
            colour, name = COLOURS[arm], info.title + suffix
            for run in runs if len(runs) > 1 else ():
                figure.add_scatter(
                    x=[point.step for point in run.curve], y=[point.eval_loss for point in run.curve], mode="lines",
                    line={"color": colour, "width": 1, "dash": dash}, opacity=0.35, showlegend=False, hoverinfo="skip",
                )  # fmt: skip
            steps = sorted(set.intersection(*({point.step for point in run.curve} for run in runs)))
            at = [{point.step: point.eval_loss for point in run.curve} for run in runs]
            figure.add_scatter(
                x=steps, y=[fmean(curve[step] for curve in at) for step in steps], mode="lines+markers", name=name,
                line={"color": colour, "width": 2.5, "dash": dash}, marker={"symbol": SYMBOLS[arm], "size": 7},
                hovertemplate=f"{name}<br>step %{{x}}<br>validation loss %{{y:.4f}}<extra></extra>",
            )  # fmt: skip
    return laid_out(figure, "step", "validation loss", 400)


def training(rows: Sequence[Mapping[str, float | None]]) -> go.Figure:
    """Training and validation loss of one run over its steps.

    Args:
        rows: of curves.csv, as numbers.
    """
    figure = go.Figure()
    for name, title, colour in (("train_loss", "training", NEUTRAL), ("eval_loss", "validation", PALETTE[1])):
        points = [(row["step"], loss) for row in rows if (loss := row.get(name)) is not None]
        figure.add_scatter(
            x=[step for step, _ in points], y=[loss for _, loss in points], mode="lines+markers", name=title,
            line={"color": colour, "width": 2.5 if name == "eval_loss" else 1.2}, marker={"size": 6},
            hovertemplate=f"{title}<br>step %{{x}}<br>loss %{{y:.4f}}<extra></extra>",
        )  # fmt: skip
    return laid_out(figure, "step", "loss", 360)


def rates(records: Sequence[Record], best: dict[str, dict[str, float]]) -> go.Figure:
    """Every tuning run at its (η_A, η_B), coloured by validation loss; the diagonal is λ = 1.

    Arms that set their own rates have no tuning runs: their final runs stand where they arrived, if that is known.

    Args:
        records: of all phases.
        best: {arm: {"lr", "lr_ratio"}}, ringed.
    """
    tuning = [record for record in records if record.trial.phase == "tuning"]
    shown = [*tuning, *(r for r in records if r.rates_reached and min(r.rates_reached) > 0)]
    finite = [record.eval_loss for record in shown if math.isfinite(record.eval_loss)]
    figure = go.Figure()
    if shown:
        low = min(lr for r in shown if (lr := r.lr)) / 3
        high = max(lr for r in shown if (lr := r.lr_b)) * 3
        figure.add_scatter(
            x=[low, high], y=[low, high], mode="lines", line={"color": NEUTRAL, "dash": "dot", "width": 1.2},
            name="λ = 1", hoverinfo="skip",
        )  # fmt: skip
    for arm, info in ALL.items():
        runs = [r for r in shown if r.trial.arm == arm and math.isfinite(r.eval_loss)]
        if not runs and arm not in best:
            continue
        figure.add_scatter(
            x=[r.lr for r in runs], y=[r.lr_b for r in runs], mode="markers+text",
            showlegend=not info.tuned,
            name=info.title, text=[f"\u2003{r.eval_loss:.3f}" for r in runs], textposition="middle right",
            textfont={"size": 11, "color": NEUTRAL}, cliponaxis=False,
            marker={"symbol": SYMBOLS[arm], "size": 15, "color": [r.eval_loss for r in runs], "coloraxis": "coloraxis",
                    "line": {"width": 1, "color": COLOURS[arm]}},
            customdata=[[r.lr_ratio, r.eval_loss] for r in runs],
            hovertemplate=f"{info.title}<br>η_A %{{x:.3g}} · η_B %{{y:.3g}} · λ %{{customdata[0]:.3g}}"
                          "<br>validation loss %{customdata[1]:.4f}<extra></extra>",
        )  # fmt: skip
        if arm in best:
            lr, ratio = best[arm]["lr"], best[arm]["lr_ratio"]
            figure.add_scatter(
                x=[lr], y=[lr * ratio], mode="markers", name=f"best {info.title}", hoverinfo="skip",
                marker={"symbol": SYMBOLS[arm] + "-open", "size": 25, "color": COLOURS[arm], "line": {"width": 2.5}},
            )  # fmt: skip
    diverged = [r for r in shown if not math.isfinite(r.eval_loss)]
    if diverged:
        figure.add_scatter(
            x=[r.lr for r in diverged], y=[r.lr_b for r in diverged], mode="markers",
            name="diverged", marker={"symbol": "x", "size": 11, "color": NEUTRAL},
        )  # fmt: skip
    figure.update_layout(
        coloraxis={"colorscale": "Viridis", "reversescale": True, "cmin": min(finite, default=0),
                   "cmax": max(finite, default=1),
                   "colorbar": {"title": {"text": "loss"}, "thickness": 12, "outlinewidth": 0}},
    )  # fmt: skip
    laid_out(figure, "η<sub>A</sub>", "η<sub>B</sub>", 460)
    figure.update_xaxes(type="log", exponentformat="power", dtick=1)
    figure.update_yaxes(type="log", exponentformat="power", dtick=1)
    return figure


def as_json(figure: go.Figure) -> str:
    """A figure's JSON that can stand inside a script element whatever text it holds."""
    text: Any = figure.to_json()
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
