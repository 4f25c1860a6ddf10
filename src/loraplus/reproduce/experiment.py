"""What an experiment of the paper is: runs that follow from earlier results, figures, and a report.

To add one: a frozen dataclass derived from `Experiment` in a file of its own, and its class in `registry.py`. Nothing
else knows experiments by name. All that an experiment does must follow from its fields and the results: it holds no
state, so it resumes at any point, and any number of processes work on it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from loraplus.errors import InputError
from loraplus.reproduce.report import Report
from loraplus.study.worker import OnStep

Value = float | int | str
Scale = Literal["cpu", "paper"]
SCALES: tuple[Scale, ...] = ("cpu", "paper")


@dataclass(frozen=True, eq=False)
class Run:
    """One run of an experiment: its parameters, which are all that it is known by.

    Args:
        params: Names and values. Text must not read as a number, or a table would give it back as one.

    Example:
        >>> Run({"optimizer": "adam", "width": 64, "lr": 1e-3}).key
        'optimizer=adam/width=64/lr=0.001'
    """

    params: Mapping[str, Value]

    def __post_init__(self) -> None:
        for name, value in self.params.items():
            if isinstance(value, bool) or (isinstance(value, str) and parsed(value) != value) or value == "":
                raise ValueError(f"{name}={value!r}: give a number, or text that is not empty and reads as no number")

    @property
    def key(self) -> str:
        """Identity within the experiment; two runs of one key are the same run."""
        return "/".join(f"{name}={value}" for name, value in self.params.items())

    def __getitem__(self, name: str) -> Any:
        return self.params[name]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Run) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


@dataclass(frozen=True)
class Result:
    """The outcome of one run.

    Args:
        run: What was run.
        status: A diverged run counts as done and will not be repeated.
        values: Figures of the whole run; NaN and infinity stand for what diverged.
        curve: (step, value) pairs, such as the validation loss during training.
        rows: For a run that trains many variants at once: one mapping each, such as
            {"lr_a": 1e-3, "lr_b": 1e-2, "test_loss": 0.2}. All have the same names.
        seconds: Wall-clock time; filled in by the framework.
    """

    run: Run
    status: Literal["done", "diverged"]
    values: Mapping[str, float] = field(default_factory=dict)
    curve: tuple[tuple[int, float], ...] = ()
    rows: tuple[Mapping[str, Value], ...] = ()
    seconds: float = 0.0

    @property
    def trial(self) -> Run:
        """The run, under the name that a study's store knows it by."""
        return self.run

    @property
    def params(self) -> Mapping[str, Value]:
        """Those of the run."""
        return self.run.params


Results = Mapping[str, Result]
"""Finished runs by key."""


@dataclass(frozen=True)
class Experiment(ABC):
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
    main_value: ClassVar[str] = ""
    """The value that a progress line and a dashboard show of a result; default: the first."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """All that changes what a run computes, JSON-ready; saved with the study and compared on resuming.

        `scale` and `seeds` are added by the framework.
        """

    @abstractmethod
    def next_runs(self, results: Results) -> Sequence[Run]:
        """All runs that can start now and are not in `results`, the first to start first; none when all is done.

        Must follow from the results alone, in whatever order they came. Runs under way are not in `results`; they are
        left out by the framework.
        """

    @abstractmethod
    def run(self, run: Run, on_step: OnStep) -> Result:
        """Does one run, in a worker process; `on_step(step, total_steps, eval_loss=None)` says how far it is."""

    @abstractmethod
    def figures(self, results: Results) -> dict[str, Any]:
        """What was found, JSON-ready: estimates with intervals; goes into summary.json."""

    @abstractmethod
    def report(self, results: Results, figures: Mapping[str, Any]) -> Report:
        """Sentences, tables and plots; each plot becomes a PNG and a part of the page."""

    def check(self) -> None:  # noqa: B027  (most take nothing from elsewhere)
        """Loads what it takes from elsewhere, so that what cannot be had shows before anything is written.

        Raises:
            InputError: a model or data cannot be had.
        """

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

    def main(self, result: Result) -> tuple[str, float] | None:
        """Name and value that the display shows of a result."""
        name = self.main_value or next(iter(result.values), "")
        return (name, result.values[name]) if name in result.values else None

    @classmethod
    def at(cls, scale: str, seeds: int, data: str = "data") -> Experiment:
        """The experiment at a scale.

        Raises:
            InputError: it does not run at that scale, or there are no seeds.
        """
        if scale not in SCALES:
            raise InputError(f"--scale must be {' or '.join(SCALES)}, got {scale!r}")
        if scale not in cls.scales:
            raise InputError(f"{cls.name} runs at --scale {' and '.join(cls.scales)} only, not {scale}")
        if seeds < 1:
            raise InputError(f"--seeds must be at least 1, got {seeds}")
        return cls(scale=scale, seeds=seeds, data=data)


def parsed(text: str) -> Value:
    """A cell of a table: a whole number, a number, or text.

    Example:
        >>> [parsed(text) for text in ("3", "1e-05", "adam")]
        [3, 1e-05, 'adam']
    """
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def mean(values: Sequence[float]) -> float:
    """The mean; infinite if one diverged."""
    return math.fsum(values) / len(values) if all(map(math.isfinite, values)) else math.inf
