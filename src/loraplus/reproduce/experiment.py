"""What an experiment of the paper is: runs that follow from earlier results, figures, and a report.

To add one: a frozen dataclass derived from `Experiment` in a file of its own, and its class in `registry.py`. Nothing
else knows experiments by name. All that an experiment does must follow from its fields and the results: it holds no
state, so it resumes at any point, and any number of processes work on it.
"""

from __future__ import annotations

import importlib.util
import math
import time
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal

from loraplus.errors import InputError
from loraplus.reproduce.report import Report
from loraplus.study.records import Record, Run
from loraplus.study.runner import Records, StudyPlan
from loraplus.study.worker import OnStep

Scale = Literal["cpu", "paper"]
SCALES: tuple[Scale, ...] = ("cpu", "paper")
_MOST_SEEDS = 10_000  # all runs of an experiment are listed at once


@dataclass(frozen=True)
class Experiment(StudyPlan):
    """One experiment of the paper at a scale.

    Args:
        scale: `cpu`: minutes to an hour or so on two cores; `paper`: the published setting.
        seeds: Seeds of every point.
        data: Folder with the data and models that `assets` names.
    """

    scale: str = "cpu"
    seeds: int = 3
    data: str = "data"

    name: ClassVar[str]
    title: ClassVar[str]
    claims: ClassVar[tuple[str, ...]]
    """What of the paper it tests, a sentence each."""
    scales: ClassVar[tuple[str, ...]] = ("cpu",)
    assets: ClassVar[tuple[str, ...]] = ()
    """Names in `reproduce.assets`; obtained, and checked by hash, before the first run."""
    packages: ClassVar[tuple[str, ...]] = ("matplotlib",)
    """What has to be installed besides `loraplus[cli]`."""
    main_value: ClassVar[str] = ""
    """The value that a progress line and a dashboard show of a result; default: the first."""

    def settings(self) -> dict[str, Any]:
        """All that changes what a run computes, JSON-ready; saved with the study and compared on resuming.

        These are the experiment's own fields, to which it adds what its code fixes. `scale` (cpu or paper) and `seeds`
        are added by the framework, so no setting of your own may be called so.
        """
        of_all = {spec.name for spec in fields(Experiment)}
        return {spec.name: getattr(self, spec.name) for spec in fields(self) if spec.name not in of_all}

    def next(self, records: Records, running: Iterable[Run]) -> Run | None:
        """The first of `next_runs` that is not under way."""
        busy = {run.key for run in running}
        return next((run for run in self.next_runs(records) if run.key not in busy), None)

    def done(self, records: Records) -> tuple[float, float]:
        """Runs that are done, and runs known of so far; adaptive grids add to them as results come in."""
        return len(records), len(records) + len(self.next_runs(records))

    def timed_run(self, run: Run, on_step: OnStep) -> Record:
        """`run`, with its wall-clock time and the value that a dashboard shows."""
        started = time.monotonic()
        result = self.run(run, on_step)
        _, shown = self.main(result) or ("", 0.0)  # a run of rows alone has no value of its own
        return replace(result, seconds=time.monotonic() - started, shown=shown)

    @abstractmethod
    def next_runs(self, results: Records) -> Sequence[Run]:
        """All runs that can start now and are not in `results`, the first to start first; none when all is done.

        Must follow from the results alone, in whatever order they came. Runs under way are not in `results`; they are
        left out by the framework.
        """

    @abstractmethod
    def run(self, run: Run, on_step: OnStep) -> Record:
        """Does one run, in a worker process.

        Args:
            run: one of `next_runs`.
            on_step: `on_step(step, total_steps, eval_loss=None)` says how far it is.

        Returns:
            `Record(run, "done", …)` with `values` (one number a name) or `rows` (many points of one run; then write
            `main`, too, since such a run has no value of its own). Their names differ from those in `run.params`.
            "diverged" is for a run of which nothing can be used; a row that diverged has inf.
        """

    @abstractmethod
    def figures(self, results: Records) -> dict[str, Any]:
        """What was found, JSON-ready: estimates with intervals; goes into summary.json."""

    @abstractmethod
    def report(self, results: Records, figures: Mapping[str, Any]) -> Report:
        """Sentences, tables and plots; each plot becomes a PNG and a part of the page."""

    def check(self) -> None:
        """Loads what it takes from elsewhere, so that what cannot be had shows before anything is written.

        Raises:
            InputError: a model or data cannot be had.
        """

    def needed_assets(self) -> tuple[str, ...]:
        """Those of `assets` that it needs at this scale."""
        return self.assets

    @classmethod
    def check_packages(cls) -> None:
        """Asked before the first run, not after the last.

        Raises:
            InputError: a package is not installed.
        """
        if missing := [package for package in cls.packages if importlib.util.find_spec(package) is None]:
            raise InputError(f"{cls.name} needs {' and '.join(missing)}: pip install 'loraplus[reproduce]'")

    def problem(self) -> str | None:
        """What keeps it from running here in one line, as `check` finds it; None if nothing does."""
        try:
            self.check()
        except InputError as error:
            return str(error)
        return None

    def needs(self) -> list[str]:
        """What it takes, in words, for --dry-run: models, data, time."""
        return []

    def describe(self, run: Run) -> str:
        """A run in words, for the progress display."""
        return " ".join(f"{name} {value}" for name, value in run.params.items())

    def main(self, result: Record) -> tuple[str, float] | None:
        """Name and value that the display shows of a result."""
        name = self.main_value or next(iter(result.values), "")
        return (name, result.values[name]) if name in result.values else None

    @classmethod
    def at(cls, scale: str, seeds: int, data: str = "data") -> Experiment:
        """The experiment at a scale.

        Raises:
            InputError: it does not run at that scale, or there are no seeds or far too many.
        """
        if scale not in SCALES:
            raise InputError(f"--scale must be {' or '.join(SCALES)}, got {scale!r}")
        if scale not in cls.scales:
            raise InputError(f"{cls.name} runs at --scale {' and '.join(cls.scales)} only, not {scale}")
        if seeds < 1:
            raise InputError(f"--seeds must be at least 1, got {seeds}")
        if seeds > _MOST_SEEDS:
            raise InputError(f"--seeds must be at most {_MOST_SEEDS:,}, got {seeds}")
        return cls(scale=scale, seeds=seeds, data=data)


def mean(values: Sequence[float]) -> float:
    """The mean; infinite if one diverged."""
    return math.fsum(values) / len(values) if all(map(math.isfinite, values)) else math.inf
