"""LoRA and LoRA+ on several tasks, each tuned on one seed with the same number of runs, then trained on fresh seeds.

The experiments on text share this: what to run next, and what the runs say. Each adds its cases (tasks, widths), how
one run trains, and its report.
"""

from __future__ import annotations

import math
import statistics
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

from loraplus.reproduce.experiment import Experiment, Record, Records, Run
from loraplus.reproduce.report import Figure, HeatMap, LinePlot, Series, Table, interval
from loraplus.study.records import Value
from loraplus.study.search.grid import HALF_DECADE, RATIOS, Point, RatioGrid, best_of, lr_of
from loraplus.study.statistics import Estimate, finite_t_interval, steps_to_target
from loraplus.study.wording import counted
from loraplus.study.worker import OnStep

TUNING, FINAL, BASELINE = "tuning", "final", "baseline"
TUNING_SEED = 0
EVALUATIONS = 10
_SHOWN = 0.7  # of the points have colours of their own in a map; worse ones share the darkest
LOSS, ACCURACY, TEST_LOSS, TEST_ACCURACY = "eval_loss", "eval_accuracy", "test_loss", "test_accuracy"

HOW_TUNED = (
    "Each arm was tuned on seed 0 with the same number of runs; λ = 1, 4, 16, … in half decades of √(η_A·η_B) until "
    "the optimum was inside, LoRA in finer steps to the same number."
)
Case = dict[str, Value]
"""What is trained on what, such as {"domain": "movies"}: the first parameters of its runs."""


class Job(NamedTuple):
    """What one run has to do."""

    case: Case
    lr: float
    lr_ratio: float
    seed: int
    evaluations: int


@dataclass(frozen=True)
class TunedArms(Experiment):
    """Base of the experiments that tune both arms on every case."""

    main_value = LOSS
    every_ratio = False
    """Whether the best point of every λ is trained on the fresh seeds, not only the best with λ > 1."""
    baseline_scales: ClassVar[tuple[str, ...]] = ()
    """At which a method without a network stands beside the arms; see `baseline`."""
    has_accuracy = True
    first_step = 0
    """Where the grid starts; see `RatioGrid`."""

    def grid_start(self) -> int:
        """Where the grid starts at this scale."""
        return self.first_step

    @abstractmethod
    def cases(self) -> list[Case]:
        """In the order in which they are run."""

    @abstractmethod
    def train(self, job: Job, on_step: OnStep) -> Record:
        """Trains once; the run of the result does not matter."""

    def baseline(self, case: Case) -> dict[str, float]:
        """Values of a method without a network on a case; asked for at `baseline_scales`."""
        return {}

    def next_runs(self, results: Records) -> Sequence[Run]:
        """The next point of every case's grid; once that is done, all of its final runs."""
        wanted = [run for case in self.cases() for run in self._of_case(case, results)]
        return [run for run in wanted if run.key not in results]

    def _of_case(self, case: Case, results: Records) -> list[Run]:
        baseline = [Run({**case, "phase": BASELINE})] if self.scale in self.baseline_scales else []
        if points := RatioGrid(first=self.grid_start()).next(self.losses(case, results)):
            return [*baseline, *(_run(case, TUNING, point, TUNING_SEED) for point in points)]
        return [*baseline, *self._final_runs(case, results)]

    def _final_runs(self, case: Case, results: Records) -> list[Run]:
        points = self.finalists(case, results).values()
        return [_run(case, FINAL, point, seed) for seed in fresh_seeds(self.seeds) for point in points]

    def run(self, run: Run, on_step: OnStep) -> Record:
        """A baseline, or one training run; tuning runs are evaluated once, at their end."""
        case = {name: run[name] for name in self.cases()[0]}
        if run["phase"] == BASELINE:
            return Record(run, "done", values=self.baseline(case))
        evaluations = EVALUATIONS if run["phase"] == FINAL else 1
        result = self.train(Job(case, run["lr"], run["lr_ratio"], run["seed"], evaluations), on_step)
        return replace(result, trial=run)

    def describe(self, run: Run) -> str:
        """Such as "movies, tuning: λ 4, η_A 0.001581, seed 0"."""
        case = title({name: run[name] for name in self.cases()[0]})
        if run["phase"] == BASELINE:
            return f"{case}, {BASELINE}"
        return f"{case}, {run['phase']}: λ {run['lr_ratio']:g}, η_A {run['lr']:g}, seed {run['seed']}"

    # What the runs come to.

    def losses(self, case: Case, results: Records) -> dict[Point, float]:
        """Loss of every grid point of a case on the tuning seed."""
        return {
            (result.trial["lr_ratio"], result.trial["grid_step"]): _loss(result)
            for result in results.values()
            if _is(result, case, TUNING)
        }

    def finalists(self, case: Case, results: Records) -> dict[str, Point]:
        """The points to train on fresh seeds, by arm: lora, loraplus, and with `every_ratio` the rest by λ."""
        losses = self.losses(case, results)
        columns = [best_of(losses, ratio) for ratio in RATIOS if any(point[0] == ratio for point in losses)]
        best = min(columns[1:], key=lambda point: losses[point])
        others = {f"lr_ratio_{point[0]:g}": point for point in columns[1:] if point != best}
        return {"lora": columns[0], "loraplus": best, **(others if self.every_ratio else {})}

    def is_finished(self, case: Case, results: Records) -> bool:
        """Whether all runs of a case are there."""
        return all(run.key in results for run in self._of_case(case, results))

    def finals(self, case: Case, point: Point, results: Records) -> list[Record]:
        """The runs of a point on the fresh seeds, by seed."""
        return [results[_run(case, FINAL, point, seed).key] for seed in fresh_seeds(self.seeds)]

    def figures(self, results: Records) -> dict[str, Any]:
        """By case: both arms, their difference, steps to target, the best of every λ; unfinished cases by name."""
        finished = {
            title(case): self._figures(case, results) for case in self.cases() if self.is_finished(case, results)
        }
        return {"cases": finished, "unfinished": [title(c) for c in self.cases() if not self.is_finished(c, results)]}

    def _figures(self, case: Case, results: Records) -> dict[str, Any]:
        points, losses = self.finalists(case, results), self.losses(case, results)
        finals = {arm: self.finals(case, point, results) for arm, point in points.items()}
        values = (LOSS, TEST_LOSS, *((ACCURACY, TEST_ACCURACY) if self.has_accuracy else ()))
        figures: dict[str, Any] = {
            "arms": {arm: self._arm(points[arm], finals[arm], losses, values) for arm in points},
            "difference": {name: _dict(_differences(finals["lora"], finals["loraplus"], name)) for name in values},
            "best_of_ratio": [
                {"lr_ratio": ratio, "lr": lr_of(point), "eval_loss": losses[point]}
                for ratio in RATIOS
                if any(p[0] == ratio for p in losses)
                for point in [best_of(losses, ratio)]
            ],
            "steps_to_target": _speed(finals["lora"], finals["loraplus"]),
        }
        if self.scale in self.baseline_scales:
            figures["baseline"] = dict(results[Run({**case, "phase": BASELINE}).key].values)
        return figures

    def _arm(self, point: Point, finals: list[Record], losses: dict[Point, float], values: Sequence[str]) -> dict:
        own = [p for p in losses if (p[0] == 1.0) == (point[0] == 1.0)]
        figures: dict[str, Any] = {"lr": lr_of(point), "lr_ratio": point[0], "tuning_runs": len(own)}
        return figures | {
            name: _dict(finite_t_interval([_value(result, name) for result in finals])) for name in values
        }

    # What is shown of it, the same in every experiment.

    def table_of_arms(self, figures: Mapping[str, Any]) -> Table:
        """A line a case and arm."""
        measure = TEST_ACCURACY if self.has_accuracy else TEST_LOSS
        rows = []
        for case, of_case in figures["cases"].items():
            for arm, name in (("lora", "LoRA"), ("loraplus", "LoRA+")):
                own = of_case["arms"][arm]
                rows.append([case, name, own["lr"], own["lr_ratio"], own["tuning_runs"], _text(own[LOSS]),
                             _text(own[TEST_LOSS]), *([_text(own[measure])] if self.has_accuracy else [])])  # fmt: skip
            if "baseline" in of_case:
                own = of_case["baseline"]
                rows.append([case, "TF-IDF + logistic regression", None, None, None, _number(own[LOSS]),
                             _number(own[TEST_LOSS]), _number(own[TEST_ACCURACY])])  # fmt: skip
        columns = ["case", "method", "η_A", "λ", "tuning runs", "validation loss", "test loss"]
        return Table(
            "Both arms, tuned with the same number of runs",
            [*columns, *(["test accuracy"] if self.has_accuracy else [])],
            rows,
            f"Means over {self.seeds} seeds that nothing was tuned on, with 95% intervals (Student's t).",
        )

    def table_of_differences(self, figures: Mapping[str, Any]) -> Table:
        """LoRA+ minus LoRA, and the steps that LoRA+ needs."""
        names = [LOSS, TEST_LOSS, *([TEST_ACCURACY] if self.has_accuracy else [])]
        rows = []
        for case, of_case in figures["cases"].items():
            speed = of_case["steps_to_target"]
            reached = f"{speed['reached']} of {speed['seeds']}"
            factor = "not reached" if speed["speed_up"] is None else speed["speed_up"]
            rows.append([case, *(_text(of_case["difference"][name]) for name in names), reached, factor])
        return Table(
            "LoRA+ minus LoRA, paired by seed",
            ["case", *(name.replace("eval", "validation").replace("_", " ") for name in names),
             "seeds that reach LoRA's final loss", "times fewer steps"],
            rows,
            "Steps: how many times fewer LoRA+ needs to reach the validation loss that LoRA ends at, on the same "
            "seed; the median over the seeds, of which those that do not reach it come last.",
        )  # fmt: skip

    def maps(self, results: Records) -> list[Figure]:
        """Loss over (√(η_A·η_B), λ), three cases a picture."""
        done = [case for case in self.cases() if self.is_finished(case, results)]
        return [
            Figure(
                f"grid-{place + 1}" if len(done) > 3 else "grid",
                "Validation loss over the rates",
                [self._map(case, results) for case in done[place * 3 : place * 3 + 3]],
                "One run a point, seed 0. The lowest row is plain LoRA.",
            )
            for place in range(math.ceil(len(done) / 3))
        ]

    def _map(self, case: Case, results: Records) -> HeatMap:
        losses = {point: loss for point, loss in self.losses(case, results).items() if math.isfinite(loss)}
        steps = range(min(step for _, step in losses), max(step for _, step in losses) + 1)
        steps = [step for step in steps if step % HALF_DECADE == 0]  # the finer points of an arm are no rows of cells
        ratios = sorted({ratio for ratio, _ in losses})
        points = self.finalists(case, results)
        worst_shown = sorted(losses.values())[int(_SHOWN * (len(losses) - 1))]
        return HeatMap(
            title(case), "√(η_A·η_B)", "λ = η_B/η_A", "validation loss",
            [lr_of((1.0, step)) for step in steps], ratios,
            [[losses.get((ratio, step)) for step in steps] for ratio in ratios],
            [(name, lr_of((1.0, points[arm][1])), points[arm][0]) for arm, name in _ARMS],
            diagonal=None, z_max=worst_shown,
        )  # fmt: skip

    def curves(self, results: Records, figures: Mapping[str, Any]) -> list[Figure]:
        """Mean validation loss over the steps, with its range over the seeds."""
        plots = []
        for case in self.cases():
            if not self.is_finished(case, results):
                continue
            points = self.finalists(case, results)
            series = [_curve(name, self.finals(case, points[arm], results)) for arm, name in _ARMS]
            baseline = figures["cases"][title(case)].get("baseline")
            if baseline:
                ends = [series[0].x[0], series[0].x[-1]]
                series.append(Series("TF-IDF", ends, [baseline[LOSS]] * 2, dashed=True, markers=False))
            plots.append(LinePlot(title(case), "step", "validation loss", series))
        return [
            Figure(f"curves-{place + 1}" if len(plots) > 3 else "curves", "Validation loss of both arms",
                   plots[place * 3 : place * 3 + 3], "Means over the fresh seeds; bands: lowest and highest.")
            for place in range(math.ceil(len(plots) / 3))
        ]  # fmt: skip


_ARMS = (("lora", "LoRA"), ("loraplus", "LoRA+"))


def fresh_seeds(count: int) -> range:
    """So many seeds that no rate was chosen on."""
    return range(TUNING_SEED + 1, TUNING_SEED + 1 + count)


def title(case: Mapping[str, Value]) -> str:
    """A case in words.

    Example:
        >>> title({"width": 64, "domain": "movies"})
        'width 64, movies'
    """
    return ", ".join(value if isinstance(value, str) else f"{name} {value}" for name, value in case.items())


def headline(figures: Mapping[str, Any], measure: str, lower_is_better: bool) -> str:
    """In how many cases LoRA+ is ahead, and in how many behind."""
    gaps = [own["difference"][measure] for own in figures["cases"].values() if own["difference"][measure] is not None]
    lower_in = [gap["mean"] < 0 for gap in gaps if not gap["low"] <= 0 <= gap["high"]]
    if not lower_in:
        return f"No difference found in {counted(len(gaps), 'case')}"
    ahead = sum(lower == lower_is_better for lower in lower_in)
    return f"LoRA+ ahead in {ahead} and behind in {len(lower_in) - ahead} of {counted(len(gaps), 'case')}"


def verdicts(figures: Mapping[str, Any], measure: str, unit: str, lower_is_better: bool) -> list[str]:
    """A sentence a case on what LoRA+ gains; "no difference found" where the interval holds 0."""
    sentences = []
    for case, own in figures["cases"].items():
        difference = own["difference"][measure]
        if difference is None:
            sentences.append(f"{case}: a final run diverged.")
            continue
        span = f"{difference['mean']:+.4f} {unit} (95% interval {difference['low']:+.4f} to {difference['high']:+.4f})"
        if difference["low"] <= 0 <= difference["high"]:
            sentences.append(f"{case}: no difference found; LoRA+ minus LoRA {span}.")
        else:
            better = (difference["mean"] < 0) == lower_is_better
            sentences.append(f"{case}: LoRA+ is {'better' if better else 'worse'}; LoRA+ minus LoRA {span}.")
    return sentences


def _run(case: Case, phase: str, point: Point, seed: int) -> Run:
    return Run({**case, "phase": phase, "lr_ratio": point[0], "grid_step": point[1], "lr": lr_of(point), "seed": seed})


def _is(result: Record, case: Case, phase: str) -> bool:
    return result.trial["phase"] == phase and all(result.trial[name] == value for name, value in case.items())


def _loss(result: Record) -> float:
    return _value(result, LOSS)


def _value(result: Record, name: str) -> float:
    value = result.values.get(name, math.inf) if result.status == "done" else math.inf
    return value if math.isfinite(value) else math.inf


def _differences(lora: list[Record], loraplus: list[Record], name: str) -> Estimate | None:
    return finite_t_interval([_value(b, name) - _value(a, name) for a, b in zip(lora, loraplus, strict=True)])


def _speed(lora: list[Record], loraplus: list[Record]) -> dict[str, Any]:
    """How many times fewer steps LoRA+ needs to the loss that LoRA ends at; None for a seed that does not reach it."""
    gains: list[float | None] = []
    for a, b in zip(lora, loraplus, strict=True):
        if not a.curve or not b.curve:
            continue
        steps = [point.step for point in b.curve]
        at = steps_to_target(steps, [point.eval_loss for point in b.curve], a.curve[-1].eval_loss)
        gains.append(steps[-1] / at if at else None)
    # The median, since a spike in one of LoRA's runs would carry a mean away.
    middle = statistics.median_low([gain or 0.0 for gain in gains]) if gains else 0.0
    reached = sum(gain is not None for gain in gains)
    return {"reached": reached, "seeds": len(lora), "speed_up": middle or None, "by_seed": gains}


def _curve(name: str, runs: list[Record]) -> Series:
    curves = [{p.step: p.eval_loss for p in result.curve} for result in runs if result.curve]
    steps = sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []
    columns = [[curve[step] for curve in curves] for step in steps]
    return Series(
        name,
        steps,
        [math.fsum(column) / len(column) for column in columns],
        [min(column) for column in columns],
        [max(column) for column in columns],
    )


def _dict(estimate: Estimate | None) -> dict[str, float] | None:
    return None if estimate is None else estimate.to_dict()


def _number(value: float) -> str:
    return f"{value:.4f}"


def _text(estimate: Mapping[str, float] | None) -> str:
    if estimate is None:
        return "diverged"
    return interval(estimate, 4)
