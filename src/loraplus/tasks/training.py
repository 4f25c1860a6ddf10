"""One training run on transformers' Trainer: arguments, the callbacks that watch it, and what it measured."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.optimization import get_scheduler
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from loraplus.errors import DivergedError, InputError
from loraplus.integrations.trainer_settings import PREFIX
from loraplus.integrations.transformers import LoraPlusTrainer, LoraPlusTrainingArguments
from loraplus.rate_keywords import fields_of
from loraplus.rates import DEFAULT_LR_RATIO, Rates
from loraplus.speed import speed_up
from loraplus.tasks.checks import check_numbers, check_parts
from loraplus.tasks.config import TaskConfig
from loraplus.tasks.data_parallel import processes
from loraplus.tasks.lengths import steps_between_evaluations, steps_of
from loraplus.tasks.task import TaskData, task_of
from loraplus.wrappers import unwrapped

_LOGS_PER_EVALUATION = 2


def total_steps(config: TaskConfig, train_examples: int) -> int:
    """Optimizer steps of a run.

    Raises:
        InputError: a setting that no run can have, such as a number of steps or epochs that is not positive.
    """
    check_numbers(config)
    check_parts(config, processes())
    return steps_of(config, train_examples)


def _steps_between_logs(eval_steps: int) -> int:
    """A divisor, so that a run that goes on from a checkpoint logs at the steps at which it would have."""
    return eval_steps // _LOGS_PER_EVALUATION if eval_steps % _LOGS_PER_EVALUATION == 0 else eval_steps


class DivergenceGuard(TrainerCallback):
    """Stops a run whose loss, gradients or weights are no longer numbers, before the broken weights are saved.

    On a CPU the gradients of every step are looked at before the optimizer takes them; elsewhere that would make each
    step wait for the device, and what is logged and saved is looked at. Stand it behind every callback that asks for a
    checkpoint.
    """

    def __init__(self, rates: Rates) -> None:
        self.rates = rates

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **more: Any) -> None:
        if args.device.type == "cpu":
            learnt = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
            self._check_tensors("gradient", learnt, state.global_step + 1, more.get("optimizer"))

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **more: Any) -> None:
        if control.should_save:
            self._check_weights(model, state.global_step, more.get("optimizer"))

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, model: Any = None, **more: Any
    ) -> None:
        for name, what in (("loss", "training loss"), ("eval_loss", "validation loss")):
            value = (logs or {}).get(name)
            if value is not None and not math.isfinite(value):
                self._check_weights(model, state.global_step, more.get("optimizer"))
                self._stop(f"the {what} became {value}", state.global_step, more.get("optimizer"))

    def _check_weights(self, model: Any, step: int, optimizer: Any) -> None:
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self._check_tensors("weight", trained, step, optimizer)

    def _check_tensors(self, what: str, named: Sequence[tuple[str, torch.Tensor]], step: int, optimizer: Any) -> None:
        if not named or torch.stack([tensor.detach().float().sum() for _, tensor in named]).sum().isfinite():
            return
        for name, tensor in named:
            if not tensor.isfinite().all():
                value = tensor.detach()[~tensor.isfinite()].flatten()[0].item()
                self._stop(f"the {what} of {name} became {value}", step, optimizer)

    def _stop(self, what: str, step: int, optimizer: Any) -> None:
        auto = getattr(unwrapped(optimizer), "loraplus_auto", None)
        a, b = (auto.lr_a, auto.lr_b) if auto else (self.rates.lr_a, self.rates.lr_a * self.rates.lr_ratio)
        advice = (
            "give --lr and --lr-ratio as numbers, or a smaller --lr-head"
            if auto
            else "take a smaller --lr or --lr-ratio"
        )
        raise DivergedError(f"{what} at step {step} with η_A = {a:g}, η_B = {b:g}; {advice}")


class StepClock(TrainerCallback):
    """Adds up the time inside optimizer steps, without evaluation, and tells a listener of every step."""

    def __init__(self, on_step: Callable[[int, int], None] | None = None) -> None:
        self.seconds = 0.0
        self.steps = 0
        self._started: float | None = None
        self._on_step = on_step

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._started is not None:
            self.seconds += time.perf_counter() - self._started
            self.steps += 1
        if self._on_step:
            self._on_step(state.global_step, state.max_steps)

    @property
    def seconds_per_step(self) -> float:
        """Mean time of a step; 0 if none ran."""
        return self.seconds / self.steps if self.steps else 0.0


def build_trainer(
    config: TaskConfig,
    rates: Rates,
    data: TaskData,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    output: str,
    checkpoints: bool,
    auto: bool = False,
    optimizer: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> LoraPlusTrainer:
    """The task's trainer with all levers on: length-grouped batches, fused AdamW, and `speed_up` on the model.

    Args:
        config: training length, batch, schedule.
        rates: of A, B, head and embeddings.
        data: tokenised splits.
        model: the adapted model.
        tokenizer: of the model.
        seed: of data order and dropout.
        output: folder of the checkpoints.
        checkpoints: keep the best and the last checkpoint and load the best at the end.
        auto: have `AutoRates` set η_A and η_B.
        optimizer: class and options of another optimizer.
        callbacks: watch the run.

    Returns:
        A trainer, ready for `.train()`.

    Raises:
        InputError: a training setting that cannot be used.
    """
    steps = total_steps(config, len(data.train))
    if config.speed_up:
        speed_up(model)
    eval_steps = min(
        steps, config.eval_steps or steps_between_evaluations(steps, config.batch_size, len(data.validation))
    )
    task = task_of(config)
    if optimizer is not None:  # Trainer passes no learning_rate on
        optimizer = optimizer[0], {"lr": rates.lr, **optimizer[1]}
    try:
        args = task.arguments(
            output_dir=output,
            learning_rate=rates.lr,
            **fields_of(replace(rates, lr_ratio=DEFAULT_LR_RATIO) if auto else rates, prefix=PREFIX),
            loraplus_auto_rates=auto,
            loraplus_log_layers=auto,
            weight_decay=config.weight_decay,
            warmup_steps=math.ceil(steps * config.warmup_ratio),
            lr_scheduler_type=config.lr_scheduler_type,
            max_steps=steps,
            per_device_train_batch_size=config.batch_size // (config.gradient_accumulation_steps * processes()),
            per_device_eval_batch_size=config.eval_batch_size,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            train_sampling_strategy="group_by_length",
            optim="adamw_torch_fused",
            eval_strategy="steps",
            eval_steps=eval_steps,
            save_strategy="steps" if checkpoints else "no",
            save_steps=eval_steps,
            save_total_limit=2,
            load_best_model_at_end=checkpoints,
            metric_for_best_model="eval_loss",
            logging_steps=_steps_between_logs(eval_steps),
            logging_nan_inf_filter=False,  # a NaN must be seen, not averaged away
            seed=seed,
            bf16=config.bf16,
            use_cpu=not torch.accelerator.is_available(),  # Trainer refuses bf16 on a CPU unless told so
            disable_tqdm=True,
            report_to=[],
            label_names=["labels"],
        )
    except ValueError as error:
        raise InputError(str(error).strip().splitlines()[0]) from None
    _check_schedule(args, steps)
    trainer = task.trainer(
        config, data, model, tokenizer, args=args, callbacks=list(callbacks), optimizer_cls_and_kwargs=optimizer
    )
    for shown in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(shown)
    return trainer


def train_and_evaluate(trainer: LoraPlusTrainer) -> None:
    """Trains, and evaluates after the last step unless that was done on the way."""
    trainer.train()
    evaluated = [row["step"] for row in trainer.state.log_history if "eval_loss" in row]
    if evaluated[-1:] != [trainer.state.global_step]:
        trainer.evaluate()


def _check_schedule(args: LoraPlusTrainingArguments, steps: int) -> None:
    """Builds the schedule once for nothing: some need settings of their own, and in `.train()` that is found too late.

    Raises:
        InputError: names the schedule.
    """
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=args.learning_rate)
    try:
        get_scheduler(args.lr_scheduler_type, optimizer, args.get_warmup_steps(steps), steps)
    except (ValueError, TypeError, KeyError) as error:
        name = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
        raise InputError(
            f"--lr-scheduler-type {name} cannot be used here, it needs settings of its own "
            f"({str(error).strip().splitlines()[0]}); take linear, cosine or constant_with_warmup, say"
        ) from None
