"""Which runs a comparison consists of, and which of them can start now.

    tuning    `tuning_runs` runs of each arm, one after the other (each choice rests on the results so far), seed `seed`
              (no runs of the arms that set their own rates)
    final     each arm's winner on the seeds `seed` + 1 … `seed` + `seeds`, the same in all arms
    untuned   LoRA and LoRA+ at one given η_A, on the same fresh seeds

The plan holds no state: everything follows from the records so far, so an interrupted study goes on where it was.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from loraplus.errors import DivergedError
from loraplus.study.arms import ALL, chosen
from loraplus.study.records import ARMS, Record, Trial
from loraplus.study.runner import StudyPlan
from loraplus.study.search import Point, best_point
from loraplus.study.search.pattern import PatternSearch, start_point
from loraplus.tasks.config import CompareConfig

OWN_RATES = Point(1.0, 1.0)
"""Stands in the trials of methods that set their own rates."""


@dataclass(frozen=True)
class Plan(StudyPlan):
    """Budget and starting points of a comparison."""

    tuning_runs: int
    seeds: int
    seed: int
    lr_ratio: float
    untuned_lr: float
    arms: tuple[str, ...] = ARMS

    @classmethod
    def from_config(cls, config: CompareConfig) -> Plan:
        """The plan that a configuration asks for."""
        arms = chosen(config.arms)
        return cls(config.tuning_runs, config.seeds, config.seed, config.lr_ratio, config.untuned_lr, arms)

    @property
    def total(self) -> int:
        """Number of runs: tuning, final and untuned, of all arms."""
        finals_and_untuned = (len(self.arms) + len(self._untuned_arms)) * self.seeds
        return len(self._tuned_arms) * self.tuning_runs + finals_and_untuned

    def done(self, records: Mapping[str, Record]) -> tuple[float, float]:
        """Runs that are done, and runs in all."""
        return len(records), self.total

    @property
    def fresh_seeds(self) -> range:
        """Seeds of the final and untuned runs; tuning has seen none of them."""
        return range(self.seed + 1, self.seed + self.seeds + 1)

    def next(self, records: Mapping[str, Record], running: Iterable[Trial]) -> Trial | None:
        """The run to start next, or None if nothing can start before a running one has finished.

        Args:
            records: Finished runs by key.
            running: Runs that are under way.

        Raises:
            DivergedError: all tuning runs of an arm diverged, so it has no winner.
        """
        running = list(running)
        busy = {trial.key for trial in running}
        twins = {same_training(trial) for trial in running}
        for trial in self._startable(records, running):
            if trial.key not in records and trial.key not in busy and same_training(trial) not in twins:
                return trial
        return None

    def known(self, records: Mapping[str, Record], trial: Trial) -> Record | None:
        """The outcome of a run if a finished one of another name was the same training."""
        wanted = same_training(trial)
        twin = next((record for record in records.values() if same_training(record.trial) == wanted), None)
        return None if twin is None else replace(twin, trial=trial)

    @property
    def _tuned_arms(self) -> list[str]:
        return [arm for arm in self.arms if ALL[arm].tuned]

    @property
    def _untuned_arms(self) -> tuple[str, ...]:
        return ARMS if set(ARMS) <= set(self.arms) else ()

    def _startable(self, records: Mapping[str, Record], running: list[Trial]) -> Iterator[Trial]:
        tuning = {arm: tuning_losses(records, arm) for arm in self._tuned_arms}
        for arm in self._tuned_arms:
            under_way = any(trial.phase == "tuning" and trial.arm == arm for trial in running)
            if len(tuning[arm]) < self.tuning_runs and not under_way:
                search = PatternSearch(start_point(self._ratio(arm)), ALL[arm].tunes_ratio)
                (point,) = search.next(tuning[arm])
                yield Trial("tuning", arm, point.lr, point.lr_ratio, self.seed)
        points = {arm: self._winner(arm, tuning[arm]) if arm in tuning else OWN_RATES for arm in self.arms}
        for seed in self.fresh_seeds:
            for arm, point in points.items():
                if point:
                    yield Trial("final", arm, point.lr, point.lr_ratio, seed)
        for seed in self.fresh_seeds:
            for arm in self._untuned_arms:
                yield Trial("untuned", arm, self.untuned_lr, self._ratio(arm), seed)

    def _ratio(self, arm: str) -> float:
        return self.lr_ratio if ALL[arm].has_ratio else 1.0

    def _winner(self, arm: str, losses: Mapping[Point, float]) -> Point | None:
        if len(losses) < self.tuning_runs:
            return None
        winner = best_point(losses)
        if not math.isfinite(losses[winner]):
            raise DivergedError(
                f"all {len(losses)} tuning runs of {ALL[arm].title} diverged, down to η_A = {winner.lr:g}; check the "
                "data and the model, or start again with more --tuning-runs (each tries a lower rate)"
            )
        return winner


def tuning_losses(records: Mapping[str, Record], arm: str) -> dict[Point, float]:
    """Validation loss of every point that an arm's tuning has tried."""
    return {
        Point(record.trial.lr, record.trial.lr_ratio): record.eval_loss
        for record in records.values()
        if record.trial.phase == "tuning" and record.trial.arm == arm
    }


def same_training(trial: Trial) -> tuple[object, ...]:
    """Equal for two trials that would do the same training and the same evaluation under different names."""
    method = ALL[trial.arm].method
    return trial.phase == "tuning", method, f"{trial.lr:.6g}", f"{trial.lr_ratio:.6g}", trial.seed, trial.steps
