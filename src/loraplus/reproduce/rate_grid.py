"""The published grids of the Llama experiments: every pair (η_A, η_B), every seed; no search.

Plain LoRA is the diagonal η_A = η_B: five pairs, against thirty off it. LoRA has had fewer runs to choose its best
from, which is a disadvantage; the report says so.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from loraplus.reproduce.experiment import Experiment, Record, Records, Run, mean
from loraplus.reproduce.report import Figure, HeatMap, Report, Table, interval
from loraplus.study.statistics import finite_t_interval
from loraplus.study.worker import OnStep

LR_A = (1e-6, 5e-6, 1e-5, 5e-5, 1e-4)
LR_B = (1e-6, 5e-6, 1e-5, 5e-5, 1e-4, 2e-4, 4e-4)
PUBLISHED_SEEDS = 2

Pair = tuple[float, float]
"""(η_A, η_B)."""


@dataclass(frozen=True)
class RateGrid(Experiment):
    """Base of llama-mnli and llama-flan; they say how one run trains, and what of it is known."""

    lr_a: tuple[float, ...] = LR_A
    lr_b: tuple[float, ...] = LR_B

    unknown: ClassVar[tuple[str, ...]] = ()
    """What the published settings known to us leave open, and what stands in for it."""

    @abstractmethod
    def train(self, lr: float, lr_ratio: float, seed: int, on_step: OnStep) -> Record:
        """Trains and evaluates once; the run of the result does not matter."""

    @property
    def pairs(self) -> list[Pair]:
        """The grid."""
        return [(a, b) for a in self.lr_a for b in self.lr_b]

    def next_runs(self, results: Records) -> Sequence[Run]:
        wanted = [_run(pair, seed) for seed in range(self.seeds) for pair in self.pairs]
        return [run for run in wanted if run.key not in results]

    def run(self, run: Run, on_step: OnStep) -> Record:
        result = self.train(run["lr_a"], float(f"{run['lr_b'] / run['lr_a']:.9g}"), run["seed"], on_step)
        return replace(result, trial=run)

    def needs(self) -> list[str]:
        count = f"{len(self.pairs)} pairs × {self.seeds} seeds (published: {PUBLISHED_SEEDS})"
        return [*self.sources(), f"a GPU that holds the model; {count}", *self.unknown]

    @abstractmethod
    def sources(self) -> list[str]:
        """Where model and data are looked for."""

    def figures(self, results: Records) -> dict[str, Any]:
        """The best pair, the best of the diagonal, their difference, and the mean accuracy of every pair."""
        means = {pair: mean(self._accuracies(pair, results)) for pair in self.pairs}
        finite = {pair: value for pair, value in means.items() if math.isfinite(value)}
        if not finite:
            return {"pairs": [], "best": None, "best_tied": None, "difference": None}
        best, tied = max(finite, key=lambda pair: finite[pair]), [pair for pair in finite if pair[0] == pair[1]]
        best_tied = max(tied, key=lambda pair: finite[pair]) if tied else None
        difference = None
        if best_tied is not None:
            both = zip(self._accuracies(best, results), self._accuracies(best_tied, results), strict=True)
            difference = finite_t_interval([a - b for a, b in both])
        return {
            "pairs": [{"lr_a": a, "lr_b": b, "accuracy": value} for (a, b), value in finite.items()],
            "best": self._shown(best, results),
            "best_tied": best_tied and self._shown(best_tied, results),
            "difference": difference and difference.to_dict(),
        }

    def _shown(self, pair: Pair, results: Records) -> dict[str, Any]:
        estimate = finite_t_interval(self._accuracies(pair, results))
        return {"lr_a": pair[0], "lr_b": pair[1], "test_accuracy": estimate and estimate.to_dict()}

    def _accuracies(self, pair: Pair, results: Records) -> list[float]:
        of_seeds = [results[_run(pair, seed).key] for seed in range(self.seeds)]
        return [result.values["test_accuracy"] if result.status == "done" else math.inf for result in of_seeds]

    def report(self, results: Records, figures: Mapping[str, Any]) -> Report:
        best, tied = figures["best"], figures["best_tied"]
        if best is None:
            return Report(["Every pair diverged."], [], limits=self.unknown)
        verdict = [f"The best pair is η_A = {best['lr_a']:g}, η_B = {best['lr_b']:g}: {_text(best)}."]
        marks = [("best", best["lr_a"], best["lr_b"])]
        if tied is not None:
            gap = figures["difference"]
            verdict.append(
                f"The best of the diagonal is η = {tied['lr_a']:g}: {_text(tied)}; the best pair is "
                f"{gap['mean']:+.4f} off it (95% interval {gap['low']:+.4f} to {gap['high']:+.4f})."
            )
            marks.append(("best LoRA", tied["lr_a"], tied["lr_b"]))
        means = {(row["lr_a"], row["lr_b"]): row["accuracy"] for row in figures["pairs"]}
        z = [[means.get((a, b)) for a in self.lr_a] for b in self.lr_b]
        rows = [[b, *(means.get((a, b)) for a in self.lr_a)] for b in reversed(self.lr_b)]
        table = Table("Mean accuracy", ["η_B \\ η_A", *(f"{a:g}" for a in self.lr_a)], rows)
        plot = HeatMap("", "η_A", "η_B", "test accuracy", self.lr_a, self.lr_b, z, marks)
        return Report(
            verdict,
            [table, Figure("grid", "Accuracy over the rates", [plot])],
            headline=f"Best at λ = {best['lr_b'] / best['lr_a']:.3g}",
            limits=[
                *self.unknown,
                f"{sum(a == b for a, b in self.pairs)} of {len(self.pairs)} pairs are plain LoRA, and the best of each "
                "is chosen on the seeds and data that it is reported on.",
            ],
        )


def _run(pair: Pair, seed: int) -> Run:
    return Run({"lr_a": pair[0], "lr_b": pair[1], "seed": seed})


def _text(shown: Mapping[str, Any]) -> str:
    return f"accuracy {interval(shown['test_accuracy'], 4)}"
