"""Looks at a run without starting it: its data, its length, what is doubtful, and how long it would take."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from loraplus.errors import DivergedError
from loraplus.files.scratch import scratch_folder
from loraplus.tasks.callbacks import DivergenceGuard, StepClock
from loraplus.tasks.checks import check_settings, rates_of
from loraplus.tasks.config import AUTO, DEFAULT_LR, TaskConfig
from loraplus.tasks.doubts import doubts_of_settings
from loraplus.tasks.lengths import COST, steps_between_evaluations
from loraplus.tasks.seen import Seen
from loraplus.tasks.task import TaskData, task_of
from loraplus.tasks.training import build_trainer, total_steps

_STEPS_TIMED = 4  # the first, which warms up, is not counted


def look(config: TaskConfig) -> Seen:
    """Reads the data, loads the model, takes a few steps that are thrown away, and says what was seen.

    Nothing is written to the output folder. Everything that `train` refuses before its first step is refused.

    Args:
        config: of a run, a comparison or a search; of the latter two a run is looked at.

    Raises:
        InputError, InvalidRateError, …: as `train`.
    """
    check_settings(config)
    lr = getattr(config, "lr", getattr(config, "untuned_lr", DEFAULT_LR))
    rates = rates_of(config, lr, getattr(config, "lr_ratio", 1.0))
    task = task_of(config)
    tokenizer = task.load_tokenizer(config)
    data = task.load_data(config, tokenizer)
    steps = total_steps(config, len(data.train))
    model = task.load_model(config, data, tokenizer, config.seed)
    clock = StepClock()
    with scratch_folder() as scratch:
        options: Any = {"seed": config.seed, "output": scratch, "checkpoints": False, "auto": lr == AUTO}
        build_trainer(config, rates, data, model, tokenizer, **options)  # what the run's own length may be refused for
        short = replace(config, max_steps=min(steps, _STEPS_TIMED))
        timed = _AfterTheFirst(clock)
        trainer = build_trainer(
            short, rates, data, model, tokenizer, callbacks=[timed, DivergenceGuard(rates)], **options
        )
        trainer.args.eval_strategy = IntervalStrategy.NO
        try:
            trainer.train()
        except DivergedError as error:
            return seen_of_run(config, data).with_([str(error)])
    return seen_of_run(config, data, clock.seconds_per_step)


class _AfterTheFirst(StepClock):
    """Adds up the time of all steps but the first; of a single step, the time of that."""

    def __init__(self, clock: StepClock) -> None:
        super().__init__()
        self._clock = clock

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: object
    ) -> None:
        before = self.seconds
        super().on_step_end(args, state, control, **more)
        if self.steps > 1 or state.max_steps == 1:
            self._clock.seconds += self.seconds - before
            self._clock.steps += 1


def seen_of_run(config: TaskConfig, data: TaskData, seconds_per_step: float | None = None) -> Seen:
    """What was seen of the data, and how long the run is.

    Args:
        config: of the run.
        data: as loaded.
        seconds_per_step: on this machine, if that was measured.
    """
    steps, examples, held_out = total_steps(config, len(data.train)), len(data.train), len(data.validation)
    every = min(steps, config.eval_steps or steps_between_evaluations(steps, config.batch_size, held_out))
    passes = steps * config.batch_size / examples
    rows = {
        "steps": f"{steps:,} of {config.batch_size} examples, {passes:.2g} times over the data; evaluated every {every}"
    }
    if seconds_per_step:
        evaluated = -(-steps // every) * held_out / config.batch_size * COST
        seconds = (steps + evaluated) * seconds_per_step
        rows["time"] = f"about {_in_words(seconds)} a run on this machine ({seconds_per_step:.3g} s a step)"
    return data.seen.with_(doubts_of_settings(config, steps, examples), **rows)


def _in_words(seconds: float) -> str:
    for size, name in ((3600, "h"), (60, "min")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.2g} {name}" if seconds < 10 * size else f"{seconds / size:.0f} {name}"
    return f"{max(1, seconds):.0f} s"
