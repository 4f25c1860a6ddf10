"""Finds mistakes in a run before its data and model are loaded, and imports nothing heavy for that."""

from __future__ import annotations

import difflib
import importlib.util
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path

from loraplus.errors import InputError, InvalidRateError
from loraplus.files.commands import LATER_SETTINGS
from loraplus.files.output import check_output
from loraplus.files.paths import is_folder, resolve_model, user_path
from loraplus.files.single import read_json, read_template
from loraplus.notices import told_once
from loraplus.rate_keywords import rates_from
from loraplus.rates import DEFAULT_LR_RATIO, Rates
from loraplus.tasks.config import (
    DEFAULT_LR,
    DEFAULT_LR_HEAD,
    DEFAULT_TUNING_RUNS,
    HIGHEST_LR,
    HIGHEST_LR_RATIO,
    LONG_EXAMPLES,
    LOSS_ON,
    LOWEST_LR,
    OF_LABELS,
    REGRESSION,
    CompareConfig,
    TaskConfig,
    TrainConfig,
    TuneConfig,
    check_held,
)
from loraplus.tasks.encodings import checked_encoding
from loraplus.tasks.measures import MEASURES
from loraplus.tasks.reporting import reporters
from loraplus.tasks.splits import check_fraction, check_seed
from loraplus.tasks.table import check_source

_LARGEST_DECAY = 1e3
_LARGEST_RANK = 2**16  # wider than any layer that is adapted
_LARGEST_ALPHA = 1e9  # larger ones leave what 32 bits hold
_LARGEST_COUNT = 2**31 - 1
_PARTS = ("batch_size", "eval_batch_size", "gradient_accumulation_steps")
_COUNTS = (*_PARTS, "max_steps", "eval_steps", "max_eval_samples", "epochs")
Bound = tuple[tuple[str, ...], str, Callable[[float], bool]]
"""(settings, what a value must do, whether it does)"""
_NUMBERS: tuple[Bound, ...] = (
    (
        (*_PARTS, "rank", "alpha", "epochs"),
        "be positive and finite",
        lambda value: 0 < value < math.inf,  # not isfinite, which fails for whole numbers of hundreds of digits
    ),
    (("rank",), f"be at most {_LARGEST_RANK}", lambda value: value <= _LARGEST_RANK),
    (("alpha",), f"be at most {_LARGEST_ALPHA:g}", lambda value: value <= _LARGEST_ALPHA),
    (_COUNTS, f"be at most {_LARGEST_COUNT}", lambda value: value <= _LARGEST_COUNT),
    (("weight_decay",), f"lie between 0 and {_LARGEST_DECAY:g}", lambda value: 0 <= value <= _LARGEST_DECAY),
    (("max_steps", "eval_steps", "max_eval_samples"), "be 1 or more", lambda value: value >= 1),
    (("lora_dropout", "warmup_ratio"), "be at least 0 and below 1", lambda value: 0 <= value < 1),
)
# Of transformers' SchedulerType, whose import takes seconds; a test holds the two together.
SCHEDULES = (
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt",
    "reduce_lr_on_plateau", "cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay", "greedy",
)  # fmt: skip
_OF_COMPARISONS: tuple[Bound, ...] = (
    (("tuning_runs", "seeds", "workers"), "be at least 1", lambda value: value >= 1),
    (("tuning_runs", "seeds", "workers"), f"be at most {_LARGEST_COUNT}", lambda value: value <= _LARGEST_COUNT),
    (("max_test_samples",), "be 1 or more", lambda value: value >= 1),
)
_OF_CHATS = ("prompt_column", "completion_column", "messages_column")
_OF_LANGUAGE_MODELS = ("loss_on", "packing", "long_examples", "chat_template", "load_in_4bit", *_OF_CHATS)


def check_run(config: TaskConfig, *, overwrite: bool, resume: bool) -> None:
    """Checks what a run's settings, its folders and the first bytes of its files tell, before anything is loaded.

    Args:
        config: of the run.
        overwrite: an earlier run's output may be replaced.
        resume: an earlier run goes on; whether it is the same is found out later.

    Raises:
        InputError, InvalidRateError: a setting, file or folder that cannot be used.
    """
    if config.output and (overwrite or not resume):
        check_output(config.output, asdict(config), overwrite=overwrite, resume=resume)
    check_settings(config)
    _check_rates(config)
    for source in (config.data, config.eval_data, getattr(config, "test_data", None)):
        if source is not None:
            check_source(source)
    if config.chat_template is not None:
        read_template(config.chat_template)
    resolve_model(config.model)
    _check_length(config)


def check_settings(config: TaskConfig) -> None:
    """Checks the settings of a run, except its rates.

    Raises:
        InputError: one that no run can have, or that another task has.
    """
    check_task(config)
    check_numbers(config)
    check_seed(config)
    _check_schedule(config.lr_scheduler_type)
    if config.encoding is not None:
        checked_encoding(config.encoding)
    if config.eval_data is None:
        check_fraction(config.eval_fraction)
    if isinstance(config, TrainConfig) and config.samples < 0:
        raise InputError(f"--samples must be 0 or more, got {config.samples}")
    reporters(getattr(config, "report_to", "none"))
    if isinstance(config, CompareConfig):
        _check_comparison(config)
    if isinstance(config, TuneConfig):
        _check_budget(config)


@told_once()
def rates_of(config: TaskConfig, lr: float | str, lr_ratio: float = 1.0) -> Rates:
    """The rates that a run's groups are built with; with lr "auto" those of A and B are set later.

    Raises:
        InvalidRateError: NaN or not positive, or a ratio beside lr "auto".
        TrainerSetupError: overrides that are no JSON.
    """
    asked = rates_from(config, lr)
    if asked.auto and lr_ratio != DEFAULT_LR_RATIO:  # which stands in the configuration of every automatic run
        raise ratio_beside_automatic(lr_ratio)
    ratio = Rates().lr_ratio if asked.auto else lr_ratio
    return replace(asked, lr_ratio=ratio, lr_head=config.head_rate).resolved(DEFAULT_LR)


def check_task(config: TaskConfig) -> None:
    """Checks the task, the packages that it needs, and the settings that only some tasks have.

    Raises:
        InputError: there is no such task, a package is not installed, or a setting is another task's.
    """
    if config.task not in MEASURES:
        (near,) = difflib.get_close_matches(config.task, MEASURES, n=1, cutoff=0.0)
        raise InputError(
            f"--task: there is no task {config.task!r}; the nearest is {near!r}, all are {', '.join(MEASURES)}"
        )
    if config.task == REGRESSION and isinstance(config, CompareConfig):
        raise InputError("--task regression is for train, predict and tune; compare decides by accuracy or perplexity")
    if config.task in OF_LABELS:
        for name in _OF_LANGUAGE_MODELS:
            if getattr(config, name) != LATER_SETTINGS[name]:
                raise InputError(f"--{_flag(name)} is for --task sft and lm, not for {config.task}")
        return
    if config.label_column is not None:
        raise InputError("--label-column is for --task classification, regression and multi-label")
    if config.lr_head != DEFAULT_LR_HEAD:
        raise InputError("--lr-head is for --task classification, regression and multi-label; a decoder trains no head")
    for name in _OF_CHATS:
        if getattr(config, name) is not None and (config.task == "lm" or config.text_column is not None):
            raise InputError(f"--{_flag(name)} is for --task sft, without --text-column")
    for name, choices in (("loss_on", LOSS_ON), ("long_examples", LONG_EXAMPLES)):
        asked = getattr(config, name)
        if asked is not None and asked not in choices:
            raise InputError(f"--{_flag(name)} must be one of {', '.join(choices)}, got {asked!r}")
    if config.load_in_4bit and importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(
            "--load-in-4bit needs the package bitsandbytes, which is not installed: "
            "pip install 'loraplus[bitsandbytes]'"
        )
    if importlib.util.find_spec("trl") is None:
        raise InputError(
            f"--task {config.task} needs the package trl, which is not installed: pip install 'loraplus[trl]'"
        )


def check_numbers(config: TaskConfig) -> None:
    """Checks sizes, lengths and shares.

    Raises:
        InputError: names the flag.
    """
    _check_each(config, _NUMBERS)
    check_parts(config, 1)


def _check_each(config: TaskConfig, bounds: Iterable[Bound]) -> None:
    for names, must, is_met in bounds:
        for name in names:
            value = getattr(config, name)
            if value is not None and not is_met(value):
                raise InputError(f"--{_flag(name)} must {must}, got {value}")


def check_parts(config: TaskConfig, processes: int) -> None:
    """Checks that a batch can be cut into equal parts.

    Raises:
        InputError: it cannot.
    """
    if config.batch_size % (config.gradient_accumulation_steps * processes):
        shared = f" for each of {processes} processes" if processes > 1 else ""
        raise InputError(
            f"--batch-size {config.batch_size} cannot be cut into --gradient-accumulation-steps "
            f"{config.gradient_accumulation_steps} equal parts{shared}"
        )


def _check_schedule(name: str) -> None:
    if name not in SCHEDULES:
        (near,) = difflib.get_close_matches(name, SCHEDULES, n=1, cutoff=0.0)
        raise InputError(
            f"--lr-scheduler-type: there is no schedule {name!r}; the nearest is {near!r}, all are "
            f"{', '.join(SCHEDULES)}"
        )


def _check_length(config: TaskConfig) -> None:
    """Refuses a --max-length above the positions that the model's folder names. Other limits show when it is loaded."""
    length, most = config.max_length, _positions(user_path(config.model))
    if length is not None and not 2 <= length <= (most or length):
        span = f"lie between 2 and the {most} tokens that {config.model} takes" if most else "be at least 2"
        raise InputError(f"--max-length must {span}, got {length}")


def _positions(folder: Path) -> int | None:
    """Tokens that a model's folder says it can tell apart, None if it does not say."""
    try:
        settings = read_json(folder / "config.json") if is_folder(folder) else None
    except InputError:  # loading says what is wrong with it
        return None
    positions = settings.get("max_position_embeddings") if isinstance(settings, dict) else None
    return positions if isinstance(positions, int) and positions > 0 else None


def _check_comparison(config: CompareConfig) -> None:
    _check_each(config, _OF_COMPARISONS)
    if config.test_data is None:
        check_fraction(config.test_fraction)
    if not (math.isfinite(config.lr_ratio) and config.lr_ratio > 1):
        raise InputError(f"--lr-ratio must be above 1, got {config.lr_ratio:g}: a ratio of 1 is the LoRA arm")
    if not (math.isfinite(config.untuned_lr) and config.untuned_lr > 0):
        raise InputError(f"--untuned-lr must be a positive number, got {config.untuned_lr:g}")
    check_held("--lr-ratio", config.lr_ratio, 1, HIGHEST_LR_RATIO)
    check_held("--untuned-lr", config.untuned_lr, LOWEST_LR, HIGHEST_LR)


def _check_budget(config: TuneConfig) -> None:
    if config.workers is not None and not 1 <= config.workers <= _LARGEST_COUNT:
        raise InputError(f"--workers must be at least 1 and at most {_LARGEST_COUNT}, got {config.workers}")
    if config.tuning_runs is not None and config.minutes is not None:
        raise InputError("--tuning-runs and --minutes are two budgets: give one of them")
    if config.minutes is not None:
        if not (math.isfinite(config.minutes) and config.minutes > 0):
            raise InputError(f"--minutes must be a positive number, got {config.minutes:g}")
        return
    runs = DEFAULT_TUNING_RUNS if config.tuning_runs is None else config.tuning_runs
    if not (math.isfinite(runs) and runs >= 1):
        raise InputError(f"--tuning-runs must be at least 1, got {runs:g}: the search ends with a run of full length")


def ratio_beside_automatic(lr_ratio: float) -> InvalidRateError:
    """The error of a ratio that was given beside automatic rates."""
    return InvalidRateError(
        f"--lr-ratio {lr_ratio:g} is not used with --lr auto, which sets the ratio; leave it out, or give --lr a number"
    )


def _check_rates(config: TaskConfig) -> None:
    if isinstance(config, TrainConfig):
        rates_of(config, config.lr, config.lr_ratio)
    elif isinstance(config, CompareConfig):
        rates_of(config, config.untuned_lr, config.lr_ratio)
    else:  # a search sets those of A and B
        rates_of(config, DEFAULT_LR, 1.0)


def _flag(name: str) -> str:
    return name.replace("_", "-")
