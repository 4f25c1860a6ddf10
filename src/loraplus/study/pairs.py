"""Two arms side by side: their runs on the same seeds, tested on the same examples, and whether these differ."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median
from typing import Any

from loraplus.study.arms import REFERENCE
from loraplus.study.records import Phase, Record
from loraplus.study.statistics import (
    LEVEL,
    Estimate,
    PairedDifference,
    decisions,
    paired_difference,
    steps_to_target,
    two_way_interval,
)
from loraplus.tasks.measures import ACCURACY, LOSS, PERPLEXITY, perplexity

_ROUNDING = 1e-6  # of a loss in single precision, summed in whatever order
_NAMES = {ACCURACY: ("accuracy_difference", "p_value"), LOSS: ("loss_difference", "loss_p_value")}
# What a measure can be, and what a difference in it can be.
_RANGES = {ACCURACY: (0.0, 1.0), LOSS: (0.0, math.inf)}
_DIFFERENCES = {ACCURACY: (-1.0, 1.0), LOSS: (-math.inf, math.inf)}


def runs_of(records: Sequence[Record], phase: Phase, arm: str) -> list[Record]:
    """The runs of an arm in a phase, by seed."""
    runs = [record for record in records if record.trial.phase == phase and record.trial.arm == arm]
    return sorted(runs, key=lambda record: record.trial.seed)


def finished(record: Record) -> bool:
    """Whether a run ended well: a loss can become NaN at the last evaluation, too late to stop the run."""
    return record.status == "done" and all(map(math.isfinite, (record.eval_loss, *record.test_losses)))


def diverged(records: Sequence[Record], phase: Phase, arm: str) -> set[int]:
    """Seeds that an arm diverged on."""
    return {record.trial.seed for record in runs_of(records, phase, arm) if not finished(record)}


def estimates(runs: Sequence[Record], measures: Sequence[str]) -> dict[str, Any]:
    """The measures on the test split, with intervals over seeds and examples; perplexity is that of the mean loss."""
    by_measure: dict[str, Any] = {
        kind: _bounded(two_way_interval(_scores(runs, kind)), _RANGES[kind]) for kind in measures if kind != PERPLEXITY
    }
    if PERPLEXITY in measures:
        by_measure[PERPLEXITY] = {
            name: None if value is None else finite_perplexity(value) for name, value in by_measure[LOSS].items()
        }
    return by_measure


def _bounded(estimate: Estimate, possible: tuple[float, float]) -> dict[str, float | None]:
    """JSON-ready: cut to what is possible; a single score has no interval."""
    if not math.isfinite(estimate.low):
        return {"mean": estimate.mean, "low": None, "high": None}
    return {**estimate.within(*possible).to_dict()}


def finite_perplexity(loss: float) -> float | None:
    """Perplexity, or None where a float cannot hold it."""
    value = perplexity(loss)
    return value if math.isfinite(value) else None


def seconds_per_step(records: Sequence[Record], arm: str) -> float | None:
    """Median over an arm's runs of the mean time of a step; None if none was done."""
    seconds = [r.seconds_per_step for r in records if r.trial.arm == arm and r.status == "done"]
    return median(seconds) if seconds else None


@dataclass(frozen=True)
class Pair:
    """The runs of an arm and of LoRA in one phase, on the seeds that both finished.

    `accuracy` is None without a seed, and where accuracy is no measure of the task. `decided` fills in
    `p_value_holm` and the size of its `family`.
    """

    arm: str
    measures: tuple[str, ...]
    runs: tuple[Record, ...]
    reference: tuple[Record, ...]
    accuracy: PairedDifference | None
    loss: PairedDifference | None
    diverged_seeds: int
    p_value_holm: float | None = None
    family: int = 0

    @classmethod
    def of(cls, records: Sequence[Record], phase: Phase, arm: str, measures: tuple[str, ...]) -> Pair:
        """The arm − LoRA; without differences if no seed is left."""
        done = {name: [r for r in runs_of(records, phase, name) if finished(r)] for name in (REFERENCE, arm)}
        common = set.intersection(*({r.trial.seed for r in done[name]} for name in done))
        reference, runs = (tuple(r for r in done[name] if r.trial.seed in common) for name in (REFERENCE, arm))
        accuracy, loss = (
            paired_difference(_scores(reference, kind), _scores(runs, kind), step=_step(runs, kind))
            if runs and kind in measures
            else None
            for kind in (ACCURACY, LOSS)
        )
        lost = diverged(records, phase, REFERENCE) | diverged(records, phase, arm)
        return cls(arm, measures, runs, reference, accuracy, loss, len(lost))

    @property
    def decides(self) -> str:
        """The one measure that the verdict rests on: a second one would be a second chance to find something."""
        return deciding(self.measures)

    @property
    def judged(self) -> PairedDifference | None:
        """The difference in that measure."""
        return self.accuracy if self.decides == ACCURACY else self.loss

    @property
    def differs(self) -> bool | None:
        """Whether the arm differs from LoRA; None without a verdict, for want of seeds."""
        return None if self.p_value_holm is None else self.p_value_holm < LEVEL

    def to_dict(self) -> dict[str, Any]:
        """The differences and p-values, as under "paired" in summary.json."""
        of = {ACCURACY: self.accuracy, LOSS: self.loss} if ACCURACY in self.measures else {LOSS: self.loss}
        over_seeds, over_examples = {}, {}
        for kind, d in of.items():
            name, p = _NAMES[kind]
            possible = _DIFFERENCES[kind]
            over_seeds |= {
                name: _bounded(d.difference, possible) if d else None,
                p: d.p_value if d else None,
                f"{p}_over_seeds": d.p_value_over_seeds if d else None,
            }
            over_examples |= {
                name: _bounded(d.over_examples, possible) if d else None,
                p: d.p_value_over_examples if d else None,
            }
        return {
            **over_seeds,
            "p_value_holm": self.p_value_holm,
            "found": self.differs,
            "by_seed": [
                {"seed": run.trial.seed, **{f"{kind}_difference": d.by_seed[i] for kind, d in of.items() if d}}
                for i, run in enumerate(self.runs)
            ],
            "over_examples": over_examples,
            "diverged_seeds": self.diverged_seeds,
        }

    def steps_to_target(self) -> dict[str, Any]:
        """Steps until either arm is down to the final loss of the other, as in summary.json."""
        curves = {REFERENCE: _mean_curve(self.reference), self.arm: _mean_curve(self.runs)}
        targets = {arm: losses[-1] if losses else None for arm, (_, losses) in curves.items()}
        needed = {
            f"{arm}_to_reach_{other}": _whole(steps_to_target(*curves[arm], target))
            if (target := targets[other]) is not None
            else None
            for arm, other in ((REFERENCE, self.arm), (self.arm, REFERENCE))
        }
        return {**needed, "steps": self.runs[0].steps if self.runs else None, "target_loss": targets}


def deciding(measures: Sequence[str]) -> str:
    """The measure that verdicts on a task rest on: accuracy if the task has it, else the loss."""
    return ACCURACY if ACCURACY in measures else LOSS


def decided(pairs: Sequence[Pair]) -> list[Pair]:
    """The pairs of one family with their verdicts. The chance of any false finding among them is 5%.

    Pairs of fewer than three seeds get none and are no part of the family.
    """
    step = max((_step(pair.runs, pair.decides) for pair in pairs), default=0.0)
    adjusted = decisions({pair.arm: pair.judged.by_seed for pair in pairs if pair.judged is not None}, step)
    family = sum(p is not None for p in adjusted.values())
    return [replace(pair, p_value_holm=adjusted.get(pair.arm), family=family) for pair in pairs]


def cost_ratio(records: Sequence[Record], arm: str) -> float | None:
    """An arm's time for a step over LoRA's; None if either is not known."""
    seconds, reference = seconds_per_step(records, arm), seconds_per_step(records, REFERENCE)
    return seconds / reference if seconds and reference else None


def _scores(runs: Sequence[Record], kind: str) -> list[list[float]]:
    return [[float(value) for value in (r.test_correct if kind == ACCURACY else r.test_losses)] for r in runs]


def _step(runs: Sequence[Record], kind: str) -> float:
    """The smallest difference between two means: of accuracy one example, of a loss the rounding of the model."""
    if not runs:
        return 0.0
    if kind == ACCURACY:
        return 1 / len(runs[0].test_correct)
    return _ROUNDING * max(abs(fmean(run.test_losses)) for run in runs)


def _mean_curve(runs: Sequence[Record]) -> tuple[list[int], list[float]]:
    """Validation loss averaged over the seeds, at the steps that every run was evaluated at."""
    losses = [{p.step: p.eval_loss for p in record.curve if math.isfinite(p.eval_loss)} for record in runs]
    steps = sorted(set.intersection(*(set(curve) for curve in losses))) if losses else []
    return steps, [fmean(curve[step] for curve in losses) for step in steps]


def _whole(step: float | None) -> int | None:
    """The first whole step that is not before `step`; rounded first, so that 95.00000000000001 is 95."""
    return None if step is None else math.ceil(round(step, 6))
