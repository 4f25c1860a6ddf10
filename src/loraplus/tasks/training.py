"""Builds the Trainer of a run from its configuration."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.optimization import get_scheduler
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from loraplus.errors import InputError
from loraplus.integrations.trainer_settings import PREFIX
from loraplus.integrations.transformers import LoraPlusTrainer, LoraPlusTrainingArguments
from loraplus.rate_keywords import fields_of
from loraplus.rates import Rates
from loraplus.speed import speed_up
from loraplus.tasks.checks import check_numbers, check_parts
from loraplus.tasks.config import TaskConfig
from loraplus.tasks.data_parallel import DataParallelTrainer, processes
from loraplus.tasks.lengths import steps_between_evaluations, steps_of
from loraplus.tasks.reporting import reporting
from loraplus.tasks.task import Task, TaskData, task_of

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
    """Half of `eval_steps` if that is a whole number: a resumed run then logs at the same steps."""
    return eval_steps // _LOGS_PER_EVALUATION if eval_steps % _LOGS_PER_EVALUATION == 0 else eval_steps


def build_trainer(
    config: TaskConfig,
    rates: Rates,
    data: TaskData,
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    output: str,
    checkpoints: bool,
    auto: bool = False,
    optimizer: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    run: str = "train",
) -> DataParallelTrainer:
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
        run: what it is called where its figures are sent.

    Returns:
        A trainer, ready for `.train()`.

    Raises:
        InputError: a training setting that cannot be used.
    """
    task = task_of(config)
    report, reporting_callbacks = reporting(getattr(config, "report_to", "none"), config.output, run)
    args = _arguments(
        config,
        task,
        rates,
        len(data.train),
        len(data.validation),
        output_dir=output,
        checkpoints=checkpoints,
        auto=auto,
        seed=seed,
        **report,
    )
    if config.speed_up:
        speed_up(model)
    if optimizer is not None:  # Trainer passes no learning_rate on
        optimizer = optimizer[0], {"lr": rates.lr, **optimizer[1]}
    trainer = task.trainer(
        config,
        data,
        model,
        tokenizer,
        args=args,
        callbacks=[*callbacks, *reporting_callbacks],
        optimizer_cls_and_kwargs=optimizer,
    )
    for shown in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(shown)
    return trainer


def _arguments(
    config: TaskConfig,
    task: Task[Any],
    rates: Rates,
    train_examples: int,
    held_out: int,
    *,
    checkpoints: bool,
    auto: bool,
    **options: object,
) -> LoraPlusTrainingArguments:
    """What Trainer is to do: length, batches, rates, schedule, evaluations, checkpoints.

    Raises:
        InputError: a setting that cannot be used.
    """
    steps = total_steps(config, train_examples)
    eval_steps = min(steps, config.eval_steps or steps_between_evaluations(steps, config.batch_size, held_out))
    try:
        args = task.arguments(
            learning_rate=rates.lr,
            **fields_of(rates, sets_ratio=False if auto else None, prefix=PREFIX),
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
            bf16=config.bf16,
            use_cpu=not torch.accelerator.is_available(),  # Trainer refuses bf16 on a CPU unless told so
            disable_tqdm=True,
            label_names=["labels"],
            **options,
        )
    except ValueError as error:
        raise InputError(str(error).strip().splitlines()[0]) from None
    _check_schedule(args, steps)
    return args


def train_and_evaluate(trainer: LoraPlusTrainer) -> None:
    """Trains, and evaluates after the last step unless that was done on the way."""
    trainer.train()
    evaluated = [row["step"] for row in trainer.state.log_history if "eval_loss" in row]
    if evaluated[-1:] != [trainer.state.global_step]:
        trainer.evaluate()


def _check_schedule(args: LoraPlusTrainingArguments, steps: int) -> None:
    """Tries the schedule: some need settings of their own, and `.train()` would say so too late.

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
