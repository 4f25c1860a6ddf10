"""Which runs a search for (η_A, λ) consists of: successive halving as trials, and a budget in runs or in minutes.

All trials share the seed, so they start from one initialisation and see the data in one order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from loraplus.errors import InputError
from loraplus.study.records import Record, Trial
from loraplus.study.runner import StudyPlan
from loraplus.study.search import Point
from loraplus.study.search.halving import Candidate, Halving


@dataclass(frozen=True)
class TuningPlan(StudyPlan):
    """The budget of a search: `tuning_runs` of full length, or `minutes` of training, added up over all runs."""

    full_steps: int
    seed: int
    tuning_runs: float | None
    minutes: float | None = None

    def next(self, records: Mapping[str, Record], running: Iterable[Trial]) -> Trial | None:
        """The run to start next, or None if nothing can start before one under way has finished.

        Args:
            records: Finished runs by key.
            running: Runs that are under way, here or elsewhere.

        Raises:
            InputError: the minutes do not suffice for the first rung and one run of full length.
        """
        busy = {trial.key for trial in running}
        runs = Halving(self.full_steps, self.budget(records) or self._least).next(losses(records))
        return next((trial for trial in map(self.trial, runs) if trial.key not in busy), None)

    @property
    def full_length(self) -> int:
        """Steps of a run of full length."""
        return self.full_steps

    def done(self, records: Mapping[str, Record]) -> tuple[float, float]:
        """What the finished runs have cost, and what the search may cost, in runs of full length."""
        return self._search.cost(losses(records)), self.budget(records) or self._least

    def budget(self, records: Mapping[str, Record]) -> float | None:
        """The budget in runs of full length.

        Minutes are turned into runs by the pace of the first rung's runs, so that all who work on a study agree; until
        these have finished the budget is not known.

        Raises:
            InputError: see `next`.
        """
        if self.minutes is None:
            return self.tuning_runs
        first = [records.get(self.trial(run).key) for run in self._search.first_rung]
        finished = [record for record in first if record is not None]
        steps = sum(record.steps for record in finished)
        if len(finished) < len(first) or not steps:
            return None
        minutes_per_run = sum(record.seconds for record in finished) / steps * self.full_steps / 60
        if self.minutes < self._least * minutes_per_run:
            raise InputError(
                f"--minutes {self.minutes:g} is too little: a run of full length takes about {minutes_per_run:.2g} "
                f"minutes here and a search at least {self._least * minutes_per_run:.2g}; "
                "give more, or fewer --max-steps"
            )
        return self.minutes / minutes_per_run

    def trial(self, run: Candidate) -> Trial:
        """The trial that tries a candidate."""
        return Trial("tuning", "loraplus", run.point.lr, run.point.lr_ratio, self.seed, run.steps)

    def best(self, records: Mapping[str, Record]) -> Record | None:
        """The run of full length with the lowest loss, or None if all diverged."""
        run = self._search.best(losses(records))
        return None if run is None else records[self.trial(run).key]

    @property
    def _search(self) -> Halving:
        return Halving(self.full_steps)

    @property
    def _least(self) -> float:
        """Cost of the first rung and one run of full length."""
        return 1 + self._search.cost(self._search.first_rung)


def losses(records: Mapping[str, Record]) -> dict[Candidate, float]:
    """Validation loss of every run that has finished."""
    return {
        Candidate(Point(record.trial.lr, record.trial.lr_ratio), record.trial.steps or record.steps): record.eval_loss
        for record in records.values()
    }
