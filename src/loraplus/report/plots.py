"""The charts of a comparison and of a training run: differences seed by seed, losses over steps, tried rates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any, Literal

from loraplus.report.chart import Axis, Cell, Chart, Scale, Series
from loraplus.study.arms import ALL
from loraplus.study.records import Record
from loraplus.study.wording import counted, rate
from loraplus.tasks.measures import ACCURACY

# Okabe and Ito's palette: told apart with any colour vision. A page has a lighter one of its own for the dark.
PALETTE = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = ("circle", "diamond", "square", "triangle-up", "pentagon", "star")


def look(place: int) -> tuple[str, str]:
    """Colour and marker of an arm by its place. When the colours repeat, the markers differ.

    Example:
        >>> look(0)[0] == look(6)[0], look(0)[1] == look(6)[1]
        (True, False)
    """
    count = len(PALETTE)
    return PALETTE[place % count], _MARKERS[(place + place // count) % count]


COLOURS = {arm: place % len(PALETTE) for place, arm in enumerate(ALL)}
SYMBOLS = {arm: look(place)[1] for place, arm in enumerate(ALL)}
Over = Literal["step", "seconds"]


def differences(pairs: Mapping[str, tuple[str, Mapping[str, Any]]], measure: str) -> Chart:
    """Each arm − LoRA: a hollow circle a seed, and above them the mean with its interval over seeds, if there is one.

    Args:
        pairs: {title: (arm, its fields of summary.json)}.
        measure: that decides; accuracy is shown in points.
    """
    field, scale = f"{measure}_difference", 100 if measure == ACCURACY else 1
    unit = "test accuracy, points" if measure == ACCURACY else "test loss a token"
    series: list[Series] = []
    rows: list[Sequence[Cell]] = []
    titles = list(pairs)[::-1]  # the first one on top
    for row, title in enumerate(titles):
        arm, pair = pairs[title]
        of_seeds = {seed["seed"]: scale * seed[field] for seed in pair["by_seed"]}
        series.append(
            Series(
                title, list(of_seeds.values()), [row - 0.14] * len(of_seeds), colour=COLOURS[arm], marker="circle",
                size=9, hollow=True, legend=False,
                told=[f"{title}, seed {seed}: {value:+.4g}" for seed, value in of_seeds.items()],
            )
        )  # fmt: skip
        rows += [[title, f"seed {seed}", value, None, None] for seed, value in of_seeds.items()]
        mean, low, high = (
            None if pair[field][end] is None else scale * pair[field][end] for end in ("mean", "low", "high")
        )
        if mean is None:
            continue
        bars = [(low, high)] if low is not None and high is not None else []
        interval = "".join(f", {low:+.4g} to {high:+.4g}" for low, high in bars)
        series.append(
            Series(
                title, [mean], [row + 0.14], colour=COLOURS[arm], marker=SYMBOLS[arm], size=11, legend=False,
                bars=bars, told=[f"{title}, mean: {mean:+.4g}{interval}"],
            )
        )  # fmt: skip
        rows.append([title, "mean", mean, low, high])
    zero = Series("0", [0, 0], [-0.6, len(titles) - 0.4], line="dotted", legend=False)
    return Chart(
        "Differences to LoRA, seed by seed",
        Axis(f"difference to LoRA in {unit}"),
        Axis("", names=dict(enumerate(titles))),
        [zero, *series],
        ["comparison", "seed", f"difference in {unit}", "low", "high"],
        rows,
        height=80 + 62 * max(1, len(titles)),
    )


def curves(records: Sequence[Record], over: Over = "step") -> Chart:
    """Mean validation loss of each arm, its seeds faint behind it; untuned runs dashed.

    Args:
        records: of all phases.
        over: steps, or seconds in steps: mean time of an arm's steps, without evaluation.
    """
    series: list[Series] = []
    rows: list[Sequence[Cell]] = []
    for phase, suffix in (("final", ""), ("untuned", ", untuned")):
        for arm, info in ALL.items():
            runs = [
                r for r in records if r.trial.phase == phase and r.trial.arm == arm and r.status == "done" and r.curve
            ]
            if not runs:
                continue
            name, pace = info.title + suffix, fmean(run.seconds_per_step for run in runs)
            look_of: dict[str, Any] = {"colour": COLOURS[arm], "line": "dashed" if suffix else "solid"}
            for run in runs if len(runs) > 1 else ():
                x = [point.step * (1 if over == "step" else run.seconds_per_step) for point in run.curve]
                series.append(Series(name, x, [point.eval_loss for point in run.curve], faint=True, **look_of))
                rows += [
                    [name, run.trial.seed, point.step, point.step * run.seconds_per_step, point.eval_loss]
                    for point in run.curve
                ]
            steps = sorted(set.intersection(*({point.step for point in run.curve} for run in runs)))
            at = [{point.step: point.eval_loss for point in run.curve} for run in runs]
            means = {step: fmean(curve[step] for curve in at) for step in steps}
            series.append(
                Series(
                    name, [step * (1 if over == "step" else pace) for step in steps], list(means.values()),
                    marker=SYMBOLS[arm],
                    told=[f"{name}: validation loss {loss:.4f} {_when(step, pace)}" for step, loss in means.items()],
                    **look_of,
                )
            )  # fmt: skip
            rows += [[name, "mean", step, step * pace, loss] for step, loss in means.items()]
    return Chart(
        "Learning curves",
        _axis_over(over),
        Axis("validation loss"),
        series,
        ["arm", "seed", "step", "seconds", "validation loss"],
        rows,
    )


def training(
    curve: Sequence[Mapping[str, float | None]], seconds_per_step: float | None = None, over: Over = "step"
) -> Chart:
    """Training and validation loss of one run.

    Args:
        curve: rows of curves.csv, as numbers.
        seconds_per_step: mean time of a step, without evaluation; None if it is not known.
        over: steps, or seconds in steps, which need their time.
    """
    pace = seconds_per_step or 0.0
    series: list[Series] = []
    rows: list[Sequence[Cell]] = []
    for name, title, colour in (("train_loss", "training", None), ("eval_loss", "validation", 1)):
        points = [
            (step, loss) for row in curve if (loss := row.get(name)) is not None and (step := row["step"]) is not None
        ]
        series.append(
            Series(
                title, [step * (1 if over == "step" else pace) for step, _ in points], [loss for _, loss in points],
                colour=colour, line="solid", marker="circle", size=5,
                told=[f"{title} loss {loss:.4f} {_when(step, pace)}" for step, loss in points],
            )
        )  # fmt: skip
        rows += [[title, step, step * pace if pace else None, loss] for step, loss in points]
    return Chart("Losses", _axis_over(over), Axis("loss"), series, ["loss", "step", "seconds", "value"], rows)


def rates(records: Sequence[Record], best: Mapping[str, Mapping[str, float]]) -> Chart:
    """Every tuning run at its (η_A, η_B), coloured by validation loss; the diagonal is λ = 1.

    Arms that set their own rates have no tuning runs: their final runs stand where they arrived, if that is known.

    Args:
        records: of all phases.
        best: {arm: {"lr", "lr_ratio"}}, ringed.
    """
    tuning = [record for record in records if record.trial.phase == "tuning"]
    shown = [*tuning, *(r for r in records if r.rates_reached and min(r.rates_reached) > 0)]
    finite = [record.eval_loss for record in shown if math.isfinite(record.eval_loss)]
    series: list[Series] = []
    if shown:
        ends = [min(lr for r in shown if (lr := r.lr)) / 3, max(lr for r in shown if (lr := r.lr_b)) * 3]
        series.append(Series("λ = 1", ends, ends, line="dotted"))
    for arm, info in ALL.items():
        runs = [r for r in shown if r.trial.arm == arm and math.isfinite(r.eval_loss)]
        if not runs and arm not in best:
            continue
        series.append(
            Series(
                info.title, [r.lr or 0.0 for r in runs], [r.lr_b or 0.0 for r in runs], colour=COLOURS[arm],
                marker=SYMBOLS[arm], size=14, values=[r.eval_loss for r in runs], told=[_run(r) for r in runs],
            )
        )  # fmt: skip
        if arm in best:
            lr, lr_b = best[arm]["lr"], best[arm]["lr"] * best[arm]["lr_ratio"]
            ring: dict[str, Any] = {"colour": COLOURS[arm], "marker": SYMBOLS[arm], "size": 26, "hollow": True}
            series.append(Series(f"best {info.title}", [lr], [lr_b], **ring))
    diverged = [r for r in shown if not math.isfinite(r.eval_loss)]
    if diverged:
        series.append(
            Series("diverged", [r.lr or 0.0 for r in diverged], [r.lr_b or 0.0 for r in diverged], marker="x", size=10,
                   told=[_run(r) for r in diverged])
        )  # fmt: skip
    return Chart(
        "Rates tried",
        Axis("η_A", log=True),
        Axis("η_B", log=True),
        series,
        ["arm", "seed", "η_A", "η_B", "λ", "validation loss"],
        [
            [ALL[r.trial.arm].title, r.trial.seed, r.lr, r.lr_b, r.lr_ratio,
             r.eval_loss if math.isfinite(r.eval_loss) else "diverged"]
            for r in shown
        ],
        scale=Scale("loss", min(finite, default=0.0), max(finite, default=1.0)),
        height=400,
    )  # fmt: skip


def rates_by_length(records: Sequence[Record], best: Mapping[str, Mapping[str, float]]) -> list[Chart]:
    """As `rates`, a chart for each length of tuning runs, short ones first: a loss tells nothing beside one of a longer
    run. What is best is ringed in the last."""
    lengths = sorted({record.trial.steps or 0 for record in records if record.trial.phase == "tuning"})
    if len(lengths) < 2:
        return [rates(records, best)]
    charts = []
    for steps in lengths:
        of_length = [r for r in records if r.trial.phase != "tuning" or (r.trial.steps or 0) == steps]
        chart = rates(of_length, best if steps == lengths[-1] else {})
        charts.append(replace(chart, title=f"Rates tried in {counted(steps, 'step')}"))
    return charts


def _axis_over(over: Over) -> Axis:
    return Axis("step" if over == "step" else "seconds in steps")


def _when(step: float, pace: float) -> str:
    return f"at step {step:g}" + (f", {step * pace:.3g} s" if pace else "")


def _run(record: Record) -> str:
    """What a tuning run tells when it is pointed at."""
    loss = f"validation loss {record.eval_loss:.4f}" if math.isfinite(record.eval_loss) else "diverged"
    at = f"η_A {rate_or_dash(record.lr)}, η_B {rate_or_dash(record.lr_b)}, λ {record.lr_ratio or 0:.3g}"
    return f"{ALL[record.trial.arm].title}: {loss} at {at}"


def rate_or_dash(value: float | None) -> str:
    """A rate, or a dash where there is none."""
    return "–" if value is None else rate(value)
