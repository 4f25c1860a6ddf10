"""Two arms side by side: their runs on the same seeds, tested on the same examples, and how these differ."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from loraplus.study.arms import REFERENCE
from loraplus.study.records import Phase, Record
from loraplus.study.statistics import PairedDifference, bootstrap_mean, paired_difference, steps_to_target
from loraplus.tasks.measures import ACCURACY, LOSS, PERPLEXITY, perplexity

_OF_ACCURACY = ("accuracy_difference", "p_value", "p_value_over_seeds")


def runs_of(records: Sequence[Record], phase: Phase, arm: str) -> list[Record]:
    """The runs of an arm in a phase, by seed."""
    found = [record for record in records if record.trial.phase == phase and record.trial.arm == arm]
    return sorted(found, key=lambda record: record.trial.seed)


def finished(record: Record) -> bool:
    """Whether a run ended well: a loss can become NaN at the last evaluation, too late to stop the run."""
    losses = (record.eval_loss, *record.test_losses)
    return record.status == "done" and all(math.isfinite(loss) for loss in losses)


def diverged(records: Sequence[Record], phase: Phase, arm: str) -> set[int]:
    """Seeds that an arm diverged on."""
    return {record.trial.seed for record in runs_of(records, phase, arm) if not finished(record)}


def estimates(runs: Sequence[Record], measures: Sequence[str]) -> dict[str, Any]:
    """The measures on the test split, with their intervals; perplexity is that of the mean loss."""
    found: dict[str, Any] = {
        kind: bootstrap_mean(_scores(runs, kind)).to_dict() for kind in measures if kind != PERPLEXITY
    }
    if PERPLEXITY in measures:
        found[PERPLEXITY] = {name: finite_perplexity(value) for name, value in found[LOSS].items()}
    return found


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

    `accuracy` is None without a seed, and where accuracy is no measure of the task.
    """

    arm: str
    measures: tuple[str, ...]
    runs: tuple[Record, ...]
    reference: tuple[Record, ...]
    accuracy: PairedDifference | None
    loss: PairedDifference | None
    diverged_seeds: int

    @classmethod
    def of(cls, records: Sequence[Record], phase: Phase, arm: str, measures: tuple[str, ...]) -> Pair:
        """The arm − LoRA; without differences if no seed is left."""
        done = {name: [r for r in runs_of(records, phase, name) if finished(r)] for name in (REFERENCE, arm)}
        common = set.intersection(*({r.trial.seed for r in done[name]} for name in done))
        reference, runs = (tuple(r for r in done[name] if r.trial.seed in common) for name in (REFERENCE, arm))
        accuracy, loss = (
            paired_difference(_scores(reference, kind), _scores(runs, kind)) if runs and kind in measures else None
            for kind in (ACCURACY, LOSS)
        )
        lost = diverged(records, phase, REFERENCE) | diverged(records, phase, arm)
        return cls(arm, measures, runs, reference, accuracy, loss, len(lost))

    def to_dict(self) -> dict[str, Any]:
        """The differences and p-values, as under "paired" in summary.json."""
        accuracy, loss = self.accuracy, self.loss
        fields = {
            "accuracy_difference": accuracy.difference.to_dict() if accuracy else None,
            "loss_difference": loss.difference.to_dict() if loss else None,
            "p_value": accuracy.p_value if accuracy else None,
            "p_value_over_seeds": accuracy.p_value_over_seeds if accuracy else None,
            "loss_p_value": loss.p_value if loss else None,
            "loss_p_value_over_seeds": loss.p_value_over_seeds if loss else None,
            "diverged_seeds": self.diverged_seeds,
        }
        left_out = () if ACCURACY in self.measures else _OF_ACCURACY
        return {name: value for name, value in fields.items() if name not in left_out}

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


def cost_ratio(records: Sequence[Record], arm: str) -> float | None:
    """An arm's time for a step over LoRA's; None if either is not known."""
    seconds, reference = seconds_per_step(records, arm), seconds_per_step(records, REFERENCE)
    return seconds / reference if seconds and reference else None


def _scores(runs: Sequence[Record], kind: str) -> list[list[float]]:
    return [[float(value) for value in (r.test_correct if kind == ACCURACY else r.test_losses)] for r in runs]


def _mean_curve(runs: Sequence[Record]) -> tuple[list[int], list[float]]:
    """Validation loss averaged over the seeds, at the steps that every run was evaluated at."""
    losses = [{p.step: p.eval_loss for p in record.curve if math.isfinite(p.eval_loss)} for record in runs]
    steps = sorted(set.intersection(*(set(curve) for curve in losses))) if losses else []
    return steps, [fmean(curve[step] for curve in losses) for step in steps]


def _whole(step: float | None) -> int | None:
    """The first whole step that is not before `step`; rounded first, so that 95.00000000000001 is 95."""
    return None if step is None else math.ceil(round(step, 6))
