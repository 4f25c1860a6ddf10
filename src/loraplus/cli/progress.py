"""Shows a study while it runs: moving bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.table import Column
from rich.text import Text

from loraplus.cli.seen import show
from loraplus.cli.terminal import Console, narrated, print_json
from loraplus.study.arms import ALL
from loraplus.study.records import Record, Trial
from loraplus.study.runner import Event, OnEvent
from loraplus.study.wording import counted, rate
from loraplus.tasks.config import CLASSIFICATION, TaskConfig
from loraplus.tasks.measures import MEASURES, PERPLEXITY, perplexity

MINIMAL_SECONDS_FOR_ESTIMATE = 2.0


class StudyProgress(Protocol):
    """A context manager that is called with every event of a study."""

    def __enter__(self) -> StudyProgress: ...
    def __exit__(self, *exception: object) -> None: ...
    def __call__(self, event: Event) -> None: ...


class Wording(Protocol):
    """How a display calls what is run."""

    def describe(self, trial: Any) -> str:
        """What is run, in a few words."""
        ...

    def outcome(self, record: Any) -> str:
        """Its result."""
        ...


def study_progress(console: Console, wording: Wording, *, plain: bool) -> StudyProgress:
    """The display that suits the console: bars on a terminal, lines otherwise or if `plain`.

    Args:
        console: Where to show it.
        wording: Of what is run.
        plain: Lines even on a terminal.
    """
    moving = console.is_terminal and not plain
    return BarProgress(console, wording) if moving else PlainProgress(console, wording)


def run_study(
    study: Callable[..., dict[str, Any]],
    config: TaskConfig,
    console: Console,
    *,
    overwrite: bool,
    resume: bool,
    json: bool,
    plain: bool,
    beside: Callable[[OnEvent], OnEvent] = lambda progress: progress,
) -> dict[str, Any]:
    """Runs `compare` or `tune` while the console shows how far it is; with `json`, prints the result.

    Args:
        beside: makes what the study tells its events, of the display that they are for.
    """
    with narrated(console), study_progress(console, TrainingWording(config.task), plain=plain) as progress:
        on_seen = None if json else partial(show, console)
        result = study(config, overwrite=overwrite, resume=resume, progress=beside(progress), on_seen=on_seen)
    if json:
        print_json(result)
    return result


class TrainingWording:
    """Of training runs: rates, seed, and the loss that came out.

    Args:
        task: whose models have an accuracy, a perplexity, or neither beside the loss.
    """

    def __init__(self, task: str = CLASSIFICATION) -> None:
        self._measures = MEASURES[task]

    def describe(self, trial: Trial) -> str:
        """`tuning LoRA+ η_A 2.5e-4 λ 16 seed 0`; without rates if the method sets them itself."""
        arm = ALL[trial.arm]
        rates = f" η_A {rate(trial.lr)} λ {trial.lr_ratio:g}" if arm.tuned else ""
        length = f" {trial.steps} steps" if trial.steps else ""
        return f"{trial.phase} {arm.title}{rates} seed {trial.seed}{length}"

    def outcome(self, record: Record) -> str:
        if record.status == "diverged":
            result = f"diverged at step {record.steps}"
        else:
            result = f"eval loss {record.eval_loss:.4f}"
            if record.eval_accuracy is not None:
                result += f", accuracy {record.eval_accuracy:.2%}"
            elif PERPLEXITY in self._measures:
                result += f", perplexity {perplexity(record.eval_loss):.4g}"
        if record.rates_reached:
            lr_a, lr_b = record.rates_reached
            result += f", came to η_A {rate(lr_a)} η_B {rate(lr_b)}"
        return result


def outcome(event: Event, wording: Wording) -> str:
    """The result of a finished run, in one line."""
    source = " (same run as before)" if event.reused else " (another process)" if event.elsewhere else ""
    return f"{wording.describe(event.trial)}: {wording.outcome(event.record)}{source}"


def count(runs: float) -> str:
    """A number of runs; with two digits where parts of a run count."""
    return f"{runs:.2f}".rstrip("0").rstrip(".")


def time_left(seconds: float) -> str:
    """A remaining time as one would say it: `about 5 min left`."""
    if seconds < 60:
        return "less than 1 min left"
    return f"about {seconds / 60:.0f} min left" if seconds < 5400 else f"about {seconds / 3600:.1f} h left"


class TimeEstimate:
    """How many optimizer steps of all runs are done, and how long the rest will take."""

    def __init__(self) -> None:
        self.steps_per_run = 0
        self.planned = 0.0
        self.done = 0.0
        self._under_way: dict[str, int] = {}
        self._done_at_start = 0.0
        self._started = time.monotonic()

    def take(self, event: Event) -> None:
        self.planned, self.done = event.planned, event.done
        if event.kind == "planned":
            self._done_at_start, self._started = event.done, time.monotonic()
        elif event.trial is not None and event.kind == "step":
            self.steps_per_run = event.full_steps or event.total_steps
            self._under_way[event.trial.key] = event.step
        elif event.trial is not None and event.kind == "finished":
            self._under_way.pop(event.trial.key, None)
            if event.reused:
                self._done_at_start += 1  # cost no time, so it says nothing about the pace

    @property
    def steps(self) -> float:
        return self.done * self.steps_per_run + sum(self._under_way.values())

    @property
    def total_steps(self) -> float:
        return self.planned * self.steps_per_run

    @property
    def seconds_left(self) -> float | None:
        """None until there is something to judge by."""
        passed = time.monotonic() - self._started
        steps = self.steps - self._done_at_start * self.steps_per_run
        if steps <= 0 or passed < MINIMAL_SECONDS_FOR_ESTIMATE:
            return None
        return passed / steps * (self.total_steps - self.steps)


class PlainProgress:
    """One line for each finished run."""

    def __init__(self, console: Console, wording: Wording) -> None:
        self._console = console
        self._wording = wording
        self._estimate = TimeEstimate()

    def __enter__(self) -> PlainProgress:
        return self

    def __exit__(self, *exception: object) -> None:
        return None

    def __call__(self, event: Event) -> None:
        self._estimate.take(event)
        if event.kind == "planned":
            stored = f", {count(event.done)} of them already done" if event.done else ""
            self._print(f"{counted(event.planned, 'run')} planned{stored}")
        elif event.kind == "finished" and event.record is not None:
            left = self._estimate.seconds_left
            about = f", {time_left(left)}" if left and event.done < event.planned else ""
            self._print(f"{count(event.done)}/{counted(event.planned, 'run')}{about} · {outcome(event, self._wording)}")

    def _print(self, line: str) -> None:
        self._console.say(line)


class _TimeLeft(ProgressColumn):
    """Time left, on the line of the whole study only."""

    def __init__(self, estimate: TimeEstimate) -> None:
        super().__init__(Column(no_wrap=True))  # a narrow terminal shortens the bars
        self._estimate = estimate

    def render(self, task: Task) -> Text:
        left = self._estimate.seconds_left if task.fields.get("overall") else None
        return Text(time_left(left) if left else "", style="cyan")


class BarProgress:
    """A bar over all optimizer steps of the study, and one line for each run under way."""

    def __init__(self, console: Console, wording: Wording) -> None:
        self._console = console
        self._wording = wording
        self._estimate = TimeEstimate()
        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[count]}", markup=False),
            _TimeLeft(self._estimate),
            console=console,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._overall = self._bars.add_task("all runs", total=None, count="", overall=True)
        self._runs: dict[str, TaskID] = {}

    def __enter__(self) -> BarProgress:
        self._bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bars.stop()

    def __call__(self, event: Event) -> None:
        self._estimate.take(event)
        if event.trial is not None:
            self._show_run(event, event.trial)
        self._bars.update(
            self._overall,
            total=self._estimate.total_steps or None,
            completed=self._estimate.steps,
            count=f"{count(event.done)}/{counted(event.planned, 'run')}",
        )

    def _show_run(self, event: Event, trial: Any) -> None:
        if event.kind == "started":
            self._runs[trial.key] = self._bars.add_task(
                self._wording.describe(trial), total=None, count="loading", overall=False
            )
        elif event.kind == "step" and trial.key in self._runs:
            self._bars.update(
                self._runs[trial.key],
                total=event.total_steps,
                completed=event.step,
                count=f"step {event.step}/{event.total_steps}",
            )
        elif event.kind == "finished" and event.record is not None:
            if trial.key in self._runs:
                self._bars.remove_task(self._runs.pop(trial.key))
            self._console.say(outcome(event, self._wording))
