r"""The paper's efficiency condition, measured: how far a step of A and of B moves the adapted layer, over the width.

    δ1 = s·B ΔA h      δ2 = s·ΔB A h      δ3 = s·ΔB ΔA h

Features are learned efficiently if δ1 and δ2 are both Θ(1) in the width n (section 3 of the paper). The toy model is
trained with Adam and W_out of order 1/n, where steps of that size are stable (`toy.py`), under

    one rate c/n        A's step is right, B's vanishes: δ2 = Θ(1/n)
    one rate c          B's step is right, A's explodes: ΔA h = Θ(n)
    one rate, tuned     the tied rate with the lowest loss at each width
    LoRA+               η_A = c/n, η_B = c′

with c and c′ the same at all widths. Source: Hayou, Ghosh, Yu, arXiv 2402.12354, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from loraplus.reproduce import toy_model
from loraplus.reproduce.descriptions import DESCRIPTIONS
from loraplus.reproduce.experiment import Experiment, Record, Records, Run, mean
from loraplus.reproduce.report import Figure, LinePlot, Report, Table, banded, interval
from loraplus.steps.movement import TOKENS, rms
from loraplus.study.statistics import exponent, t_interval
from loraplus.study.wording import counted
from loraplus.study.worker import OnStep

WIDTHS = (64, 128, 256, 512, 1024, 2048, 4096)
STEPS = 100
BATCH = 64
MEASURED_AT = (2, 5, 10, 20, 50)
"""Steps, the first being 1; at step 1 B = 0 and A does not move."""
FITTED_AT = 2
READOUT_POWER = 1.0
C = 2.0
C_PRIME = 10**-0.5
TIED_AT_64 = C / 64
TIED_HALF_DECADES = tuple(range(-8, 2))
BOUND = 0.15
"""An exponent within ± this counts as Θ(1): a factor below 2 from width 64 to 4096."""
DELTAS = {"delta1": "δ1", "delta2": "δ2", "delta3": "δ3"}
TITLES = {
    "tied-by-n": "one rate c/n",
    "tied": "one rate c",
    "tuned": "one rate, tuned at each width",
    "loraplus": "LoRA+: η_A = c/n, η_B = c′",
}


@dataclass(frozen=True)
class Coordinates(Experiment):
    """δ1, δ2 and δ3 of single steps at several widths under tied and LoRA+ rates."""

    widths: tuple[int, ...] = WIDTHS
    steps: int = STEPS

    name = "coordinates"
    title, claims, scales = DESCRIPTIONS[name]

    def settings(self) -> dict[str, Any]:
        return super().settings() | {
            "optimizer": "adam", "readout_power": READOUT_POWER, "inputs": toy_model.INPUTS, "rank": toy_model.RANK,
            "noise": toy_model.NOISE, "batch": BATCH, "measured_at": MEASURED_AT, "measured_points": TOKENS, "c": C,
            "c_prime": C_PRIME, "tied_half_decades": TIED_HALF_DECADES,
        }  # fmt: skip

    def needs(self) -> list[str]:
        return ["no data and no model", "about 2 minutes on two idle cores with 3 seeds"]

    def main(self, result: Record) -> tuple[str, float] | None:
        return "lowest_test_loss", min(float(row["test_loss"]) for row in result.rows)

    def next_runs(self, results: Records) -> Sequence[Run]:
        runs = [
            Run({"width": width, "seed": seed})
            for width in sorted(self.widths, reverse=True)
            for seed in range(self.seeds)
        ]
        return [run for run in runs if run.key not in results]

    def run(self, run: Run, on_step: OnStep) -> Record:
        torch.set_flush_denormal(True)
        model = toy_model.frozen(run["width"], run["seed"], READOUT_POWER)
        pairs = rates_tried(run["width"])
        lr_a, lr_b = (torch.tensor([pair[place] for pair in pairs.values()]) for place in (0, 1))
        measured: dict[tuple[int, int], dict[str, float]] = {}

        def look(first: int, step: int, before: toy_model.Factors, after: toy_model.Factors) -> None:
            for place, deltas in enumerate(measure(model, before, after), start=first):
                measured[place, step] = deltas

        losses = toy_model.train(
            model, "adam", lr_a, lr_b, steps=self.steps, batch=BATCH, seed=run["seed"], on_part=on_step,
            look=look, look_at=MEASURED_AT,
        )  # fmt: skip
        rows = [
            {"rates": name, "lr_a": pair[0], "lr_b": pair[1], "step": step, **measured[place, step], "test_loss": loss}
            for place, (name, pair, loss) in enumerate(zip(pairs, pairs.values(), losses.test.tolist(), strict=True))
            for step in MEASURED_AT
        ]
        return Record(run, "done", rows=tuple(rows))

    def figures(self, results: Records) -> dict[str, Any]:
        """For each choice of rates: exponents of δ1, δ2, δ3 at every step measured; whether the condition is met."""
        return {name: self._choice(name, results) for name in TITLES}

    def _choice(self, name: str, results: Records) -> dict[str, Any]:
        chosen = {width: self._rates(name, width, results) for width in self.widths}
        by_step = {step: self._exponents(chosen, step, results) for step in MEASURED_AT}
        fitted = by_step[FITTED_AT]
        return {
            "title": TITLES[name],
            "exponents": {str(step): exponents for step, exponents in by_step.items()},
            "met": all(_is_constant(fitted[delta]) for delta in ("delta1", "delta2")),
            "widths": {
                str(width): {
                    "rates": rates,
                    "test_loss": math.exp(self._mean_loss(width, rates, results)),
                    **{
                        delta: _spread([row[delta] for row in self._rows(width, rates, FITTED_AT, results)])
                        for delta in DELTAS
                    },
                }
                for width, rates in chosen.items()
            },
        }

    def _rates(self, name: str, width: int, results: Records) -> str:
        """Name of the rates at a width; of `tuned`, the tied rate with the lowest mean loss."""
        if name != "tuned":
            return name
        tied = [other for other in rates_tried(width) if other.startswith("at")]
        return min(tied, key=lambda other: self._mean_loss(width, other, results))

    def _mean_loss(self, width: int, rates: str, results: Records) -> float:
        rows = self._rows(width, rates, FITTED_AT, results)
        return mean([math.log(row["test_loss"]) for row in rows])

    def _rows(self, width: int, rates: str, step: int, results: Records) -> list[Mapping[str, Any]]:
        """One a seed."""
        return [
            row
            for seed in range(self.seeds)
            for row in results[Run({"width": width, "seed": seed}).key].rows
            if row["rates"] == rates and row["step"] == step
        ]

    def _exponents(self, chosen: Mapping[int, str], step: int, results: Records) -> dict[str, dict[str, float]]:
        rows = [self._rows(width, rates, step, results) for width, rates in chosen.items()]
        return {
            delta: exponent(
                self.widths, [[math.log10(row[seed][delta]) for row in rows] for seed in range(self.seeds)]
            ).to_dict()
            for delta in DELTAS
        }

    def report(self, results: Records, figures: Mapping[str, Any]) -> Report:
        met = sum(choice["met"] for choice in figures.values())
        return Report(
            _verdict(figures),
            [_figure(figures, self.widths), _table(figures), _steps_table(figures)],
            _METHOD,
            _LIMITS,
            headline=f"The condition is met by {met} of {counted(len(figures), 'choice')} of rates",
        )


def rates_tried(width: int) -> dict[str, tuple[float, float]]:
    """(η_A, η_B) by name; those named `at…` are the grid of tied rates."""
    tied = {f"at{k}": (10 ** (k / 2), 10 ** (k / 2)) for k in TIED_HALF_DECADES}
    by_n = C / width
    return {"tied-by-n": (by_n, by_n), "tied": (TIED_AT_64, TIED_AT_64), "loraplus": (by_n, C_PRIME), **tied}


def measure(model: toy_model.Frozen, before: toy_model.Factors, after: toy_model.Factors) -> list[dict[str, float]]:
    """RMS of δ1, δ2 and δ3 over test points and hidden units, for each pair of rates."""
    changes = toy_model.changes(before, after, model.test_features[:TOKENS])
    return [
        {delta: float(f"{rms(tensor[place]):.4g}") for delta, tensor in zip(DELTAS, changes, strict=True)}
        for place in range(len(before.a))
    ]


def _is_constant(exponent: Mapping[str, float]) -> bool:
    return abs(exponent["mean"]) <= BOUND


def _spread(values: Sequence[float]) -> dict[str, float]:
    """Geometric mean over the seeds with its interval."""
    return t_interval([math.log(value) for value in values]).through(math.exp).to_dict()


def _figure(figures: Mapping[str, Any], widths: Sequence[int]) -> Figure:
    plots = []
    for choice in figures.values():
        series = []
        for place, (delta, symbol) in enumerate(DELTAS.items()):
            at = [choice["widths"][str(width)][delta] for width in widths]
            name = f"{symbol} ∝ n^{choice['exponents'][str(FITTED_AT)][delta]['mean']:.2f}"
            series.append(banded(name, widths, at, colour=place))
        plots.append(LinePlot(choice["title"], "width n", "RMS of the change", series, log_x=True, log_y=True))
    return Figure(
        "deltas",
        f"What step {FITTED_AT} does to the layer's output",
        plots,
        "Geometric mean over the seeds with its 95% interval. Efficient: δ1 and δ2 both level.",
    )


def _table(figures: Mapping[str, Any]) -> Table:
    rows = []
    for choice in figures.values():
        exponents, (narrow, *_, wide) = choice["exponents"][str(FITTED_AT)], choice["widths"].values()
        rows.append([
            choice["title"], *(interval(exponents[delta]) for delta in DELTAS), "met" if choice["met"] else "not met",
            narrow["test_loss"], wide["test_loss"],
        ])  # fmt: skip
    narrow, *_, wide = next(iter(figures.values()))["widths"]
    columns = ("rates", "δ1", "δ2", "δ3", "condition", f"test loss, n = {narrow}", f"n = {wide}")
    caption = f"Exponents in n at step {FITTED_AT}. Met: those of δ1 and δ2 are within ±{BOUND}."
    return Table("Exponents and the condition", columns, rows, caption)


def _steps_table(figures: Mapping[str, Any]) -> Table:
    rows = [
        [choice["title"], int(step), *(interval(exponents[delta]) for delta in DELTAS)]
        for choice in figures.values()
        for step, exponents in choice["exponents"].items()
    ]
    return Table("Exponents step by step", ("rates", "step", "δ1", "δ2", "δ3"), rows)


def _verdict(figures: Mapping[str, Any]) -> list[str]:
    return [
        f"{choice['title']}: the condition is {'met' if choice['met'] else 'not met'}; at step {FITTED_AT}, "
        + ", ".join(
            f"{symbol} ∝ n^{interval(choice['exponents'][str(FITTED_AT)][delta])}" for delta, symbol in DELTAS.items()
        )
        + "."
        for choice in figures.values()
    ]


_METHOD = (
    "The toy model (loraplus reproduce toy) with Adam and W_out of order 1/n, trained for 100 steps. A and B before "
    "and after a step give δ1, δ2 and δ3 on 128 test points; shown is their root mean square over points and hidden "
    f"units. Step {FITTED_AT} is the first in which A moves: at step 1, B = 0.",
    f"c = {C:g}, so that at width 64 both tied rates are {TIED_AT_64:g}; c′ = {C_PRIME:.3g}. The tuned rate is the "
    "best of ten, half a decade apart, by the mean loss over the seeds.",
    "Exponents are least-squares slopes over log n for each seed, intervals Student's t over the seeds.",
)
_LIMITS = (
    "Intervals know of nothing but the seeds; with few of them they are wide.",
    "The theory is about a fixed number of steps. Later on, networks that learn fast have reached their lowest loss "
    "and others have not, and the exponents tell of that as well.",
    "δ1 of a step depends on what B has become by then, so a rate that is wrong for B shows in δ1 as well.",
    "One layer and one task. For a model of one's own: loraplus.feature_updates.",
)
