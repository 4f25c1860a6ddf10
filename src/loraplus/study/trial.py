"""Runs one trial of a study: rates, seed and length in, record out."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from loraplus.errors import DivergedError
from loraplus.files.scratch import scratch_folder
from loraplus.study.arms import ALL, REFERENCE, Arm
from loraplus.study.records import CurvePoint, Record, Trial
from loraplus.tasks.callbacks import DivergenceGuard, StepClock
from loraplus.tasks.checks import rates_of
from loraplus.tasks.config import TaskConfig
from loraplus.tasks.data_parallel import DataParallelTrainer
from loraplus.tasks.lengths import steps_between_evaluations
from loraplus.tasks.look import seen_of_run
from loraplus.tasks.measures import ACCURACY, MEASURES
from loraplus.tasks.methods import Method, rates_arrived_at
from loraplus.tasks.seen import Seen
from loraplus.tasks.task import Tested, task_of
from loraplus.tasks.training import build_trainer, total_steps, train_and_evaluate


@functools.lru_cache(maxsize=1)
def _load(kind: type[TaskConfig], config_json: str) -> tuple[Any, Any]:
    config = kind(**json.loads(config_json))
    task = task_of(config)
    tokenizer = task.load_tokenizer(config)
    return tokenizer, task.load_data(config, tokenizer)


def _load_once(config: TaskConfig) -> tuple[Any, Any]:
    """The tokenised data, kept for the later trials of this process."""
    kind: Any = type(config)
    return _load(kind, json.dumps(asdict(config)))


def data_facts(config: TaskConfig, lr: float, lr_ratio: float, arms: Sequence[str] = ("loraplus",)) -> dict[str, Any]:
    """Sizes, columns, labels and what was removed, what the model decides, and the steps of a run.

    Every bad input is found here, before an output folder is touched: rates, data, model, target modules, schedule, and
    what an arm cannot train.
    """
    rates_of(config, lr, lr_ratio)
    tokenizer, data = _load_once(config)
    steps = total_steps(config, len(data.train))
    task = task_of(config)
    model = task.load_model(config, data, tokenizer, config.seed)
    facts: dict[str, Any] = {}
    with scratch_folder() as scratch:
        for arm in arms:
            method = ALL[arm].method(config, lr, 1.0 if arm == REFERENCE else lr_ratio, model, steps)
            trainer = _trainer(config, method, data, model, tokenizer, seed=config.seed, output=scratch)
            trainer.create_optimizer()
            facts = task.facts_of_run(trainer)
    return {**data.facts, **facts, "steps": steps}


def data_seen(config: TaskConfig) -> Seen:
    """What was seen of the data, which `data_facts` has read."""
    return seen_of_run(config, _load_once(config)[1])


def run_trial(config: TaskConfig, trial: Trial, on_step: Callable[[int, int], None]) -> Record:
    """Trains once and evaluates; final and untuned trials are also tested, after their last step.

    A trial with a length of its own has its own warm-up and decay within it. The weights are those of the last step
    in every trial of all arms: no selection of checkpoints adds to the tuning budget.

    Args:
        config: of the study.
        trial: rates, seed, phase and length.
        on_step: told (step, total steps) after every step.

    Returns:
        The record; status "diverged" if the loss became NaN or infinite.
    """
    tokenizer, data = _load_once(config)
    config = _of_length(config, trial.steps, total_steps(config, len(data.train)), len(data.validation))
    arm, task = ALL[trial.arm], task_of(config)
    started = time.perf_counter()
    model = task.load_model(config, data, tokenizer, trial.seed)
    method = arm.method(config, trial.lr, trial.lr_ratio, model, total_steps(config, len(data.train)))
    clock = StepClock(on_step)
    with scratch_folder() as scratch:
        trainer = _trainer(
            config, method, data, model, tokenizer,
            seed=trial.seed, output=scratch, run=trial.key.replace("/", "-"),
            callbacks=[clock, DivergenceGuard(method.rates)],
        )  # fmt: skip
        try:
            train_and_evaluate(trainer)
        except DivergedError:
            return Record(trial, "diverged", clock.steps, float("inf"), _no_accuracy(config), clock.seconds_per_step,
                          _curve(trainer.state.log_history), seconds=time.perf_counter() - started,
                          rates_reached=_rates_reached(arm, trainer))  # fmt: skip
        curve = _curve(trainer.state.log_history)
        tested = Tested(()) if trial.phase == "tuning" else task.test(trainer, data)
    return Record(
        trial=trial,
        status="done",
        steps=trainer.state.global_step,
        eval_loss=curve[-1].eval_loss,
        eval_accuracy=curve[-1].eval_accuracy,
        seconds_per_step=clock.seconds_per_step,
        curve=curve,
        test_losses=tested.losses,
        test_correct=tested.correct,
        values=tested.values,
        seconds=time.perf_counter() - started,
        rates_reached=_rates_reached(arm, trainer),
    )


def _trainer(config: TaskConfig, method: Method, *parts: Any, **options: Any) -> DataParallelTrainer:
    """The trainer of a method, without checkpoints; else as `build_trainer`."""
    if method.own_schedule:
        config = replace(config, lr_scheduler_type="constant", warmup_ratio=0.0)
    return build_trainer(
        config, method.rates, *parts, checkpoints=False, auto=method.auto, optimizer=method.optimizer, **options
    )


def _no_accuracy(config: TaskConfig) -> float | None:
    """What a diverged run has as accuracy."""
    return 0.0 if ACCURACY in MEASURES[config.task] else None


def _rates_reached(arm: Arm, trainer: DataParallelTrainer) -> tuple[float, float] | None:
    """The rates that a method which sets its own has come to."""
    return None if arm.tuned else rates_arrived_at(trainer.optimizer)


def _of_length(config: TaskConfig, steps: int | None, full_steps: int, validation_examples: int) -> TaskConfig:
    """The configuration of a shorter run; it is evaluated as often for its steps as the full one."""
    if steps is None or steps == full_steps:
        return config
    usual = steps_between_evaluations(full_steps, config.batch_size, validation_examples)
    return replace(config, max_steps=steps, eval_steps=config.eval_steps or usual)


def _curve(log_history: list[dict[str, Any]]) -> tuple[CurvePoint, ...]:
    return tuple(
        CurvePoint(row["step"], row["eval_loss"], row.get("eval_accuracy"))
        for row in log_history
        if np.isfinite(row.get("eval_loss", np.nan))
    )
