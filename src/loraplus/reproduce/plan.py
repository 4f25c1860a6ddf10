"""An experiment as a study's plan, and one run of it: what runs next follows from the results."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from loraplus.reproduce.experiment import Experiment, Result, Results, Run
from loraplus.study.worker import OnStep


@dataclass(frozen=True)
class ExperimentPlan:
    """The runs of an experiment that are known so far; adaptive grids add to them as results come in."""

    experiment: Experiment
    full_steps: None = field(default=None, init=False)

    def next(self, records: Results, running: Iterable[Run]) -> Run | None:
        """The run to start next, or None if nothing can start before one under way has finished."""
        busy = {run.key for run in running}
        return next((run for run in self.experiment.next_runs(records) if run.key not in busy), None)

    def done(self, records: Results) -> tuple[float, float]:
        """Runs that are done, and runs known of so far."""
        return len(records), len(records) + len(self.experiment.next_runs(records))

    def known(self, records: Results, trial: Run) -> Result | None:
        """No two runs of an experiment are the same training."""
        return None


def timed_run(experiment: Experiment, run: Run, on_step: OnStep) -> Result:
    """One run with its wall-clock time."""
    started = time.monotonic()
    result = experiment.run(run, on_step)
    return replace(result, seconds=time.monotonic() - started)
