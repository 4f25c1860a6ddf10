"""`loraplus.doctor`: asks an optimizer of this process, without a step of its own, what its step would do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from torch import nn

from loraplus.diagnosis.diagnosis import Diagnosis
from loraplus.diagnosis.findings import alive, find, models_of
from loraplus.diagnosis.judging import judge
from loraplus.diagnosis.observer import Observed
from loraplus.diagnosis.ratio import Expected
from loraplus.errors import InputError, LoraPlusError, TrainerSetupError
from loraplus.notices import told_once
from loraplus.rates import as_number
from loraplus.steps.group_rates import base_rate
from loraplus.steps.wrappers import unwrapped

_ARGUMENTS = ("loraplus_lr_ratio", "lr_ratio", "lorap_lr_ratio")


@told_once(silent=True)
def doctor(trainer_or_optimizer: Any, model: nn.Module | None = None, *, lr_ratio: float | None = None) -> Diagnosis:
    """Says what rate and decay every parameter's step has, whoever built the optimizer, and what is off about them.

    Steps are taken by twins of the optimizer over small stand-ins; optimizer, model and random state stay as they are.
    A trainer that has no optimizer yet builds one for this and forgets it.

    Args:
        trainer_or_optimizer: a transformers or TRL trainer, before or after `.train()`, or any optimizer, wrapped or
            not; a list of those of several optimizers.
        model: that it trains, or a list of models; None finds it: the trainer's, or the one whose parameters the
            optimizer holds.
        lr_ratio: λ that the run should have. None takes a trainer's own setting; where there is none, λ is reported as
            it is, and B at A's rate is plain LoRA.

    Returns:
        A `Diagnosis`: prints as a table; `.verdict` is one line, `.ok`, `.problems`, `.notes`, `.lr_ratio`,
        `.to_dict()`.

    Raises:
        TrainerSetupError: no trainer and no torch optimizer, or a trainer whose optimizer cannot be built.
        InputError: no model holds its parameters.
        NoLoraFactorsError, UnknownAdapterParameterError, FlattenedParametersError: see `loraplus.explain`.

    Example:
        >>> import loraplus, torch
        >>> class Adapter(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.lora_A = torch.nn.ModuleDict({"default": torch.nn.Linear(8, 2, bias=False)})
        ...         self.lora_B = torch.nn.ModuleDict({"default": torch.nn.Linear(2, 8, bias=False)})
        >>> model = Adapter()
        >>> loraplus.doctor(torch.optim.AdamW(model.parameters(), lr=1e-3), model).verdict
        "plain LoRA: B learns at A's rate in the one pair"
        >>> loraplus.doctor(torch.optim.AdamW(model.parameters(), lr=1e-3), model, lr_ratio=16).ok
        False
    """
    if lr_ratio is not None:
        lr_ratio = as_number("lr_ratio", lr_ratio)
    if hasattr(trainer_or_optimizer, "create_optimizer") and hasattr(trainer_or_optimizer, "args"):
        trainer = trainer_or_optimizer
        with _optimizer_of(trainer) as optimizer:
            models = _listed(model if model is not None else trainer.model)
            return _diagnose([optimizer], models, expected_of(trainer, lr_ratio), type(trainer).__name__)
    optimizers = _listed(trainer_or_optimizer)
    models = _listed(model) if model is not None else models_of([_inner(each) for each in optimizers], alive().modules)
    if not models:
        raise InputError("no model of this process holds the optimizer's parameters; pass it: doctor(optimizer, model)")
    names = ", ".join(type(_inner(each)).__name__ for each in optimizers)
    return _diagnose(optimizers, models, expected_of(None, lr_ratio), names)


def expected_of(trainer: Any, lr_ratio: float | None) -> Expected:
    """What a run should have: what is given, else what a trainer's arguments say."""
    arguments = getattr(trainer, "args", None)
    decay = getattr(arguments, "weight_decay", None) or None
    ratio, where = (lr_ratio, "was asked for") if lr_ratio is not None else _ratio_of(trainer, arguments)
    return Expected(ratio, where, decay, uncalled=_uncalled(trainer))


def _ratio_of(trainer: Any, arguments: Any) -> tuple[float | None, str]:
    """(λ that a trainer asks for, where it says so)"""
    asked = getattr(getattr(trainer, "loraplus_settings", None), "rates", None)  # of a trainer with LoRA+
    in_text = _in_optim_args(getattr(arguments, "optim_args", None)) if asked is None else None
    sources = [(asked, "lr_ratio"), (in_text, "lr_ratio"), *((arguments, name) for name in _ARGUMENTS)]
    for source, name in sources:
        value = getattr(source, name, None)
        own = getattr(source, "lr_ratio_overrides", None) or getattr(source, "loraplus_lr_ratio_overrides", None)
        automatic = "auto" in (getattr(source, "lr", None), getattr(source, "loraplus_lr", None))
        if isinstance(value, (int, float)) and not own and not automatic:
            return float(value), f"the trainer says ({name} = {value:g})"
    return None, ""


def _uncalled(trainer: Any) -> str:
    """A trainer's class and its own `create_optimizer_and_scheduler`, where nothing calls it; "" if there is none.

    transformers has it called by nobody since version 5.
    """
    name, kinds = "create_optimizer_and_scheduler", type(trainer).__mro__
    base = next((place for place, kind in enumerate(kinds) if kind.__module__ == "transformers.trainer"), len(kinds))
    if base == len(kinds) or not any(name in vars(each) for each in (trainer, *kinds[:base])):
        return ""
    functions = [(key, value) for kind in kinds for key, value in vars(kind).items() if hasattr(value, "__code__")]
    calls = any(name in function.__code__.co_names for key, function in functions if key != name)
    return "" if calls else f"{type(trainer).__name__}.{name}"


def _in_optim_args(text: Any) -> Any:
    """What `optim_args` of training arguments asks for, which transformers alone does nothing with."""
    if not text:
        return None
    from loraplus.integrations.trainer_settings import in_optim_args

    return SimpleNamespace(**in_optim_args(text)[0])


def _diagnose(optimizers: list[Any], models: list[nn.Module], expected: Expected, source: str) -> Diagnosis:
    seen = [Observed(_inner(optimizer)) for optimizer in optimizers]
    built = {
        id(parameter): rate
        for observed in seen
        for group in observed.optimizer.param_groups
        if (rate := base_rate(group))
        for parameter in group["params"]
    }
    return judge(find(models, seen, built), expected, source)


def _inner(optimizer: Any) -> Any:
    inner = unwrapped(optimizer)
    if not isinstance(getattr(inner, "param_groups", None), list):
        raise TrainerSetupError(f"doctor takes a trainer or an optimizer, got {type(optimizer).__name__}")
    return inner


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


@contextmanager
def _optimizer_of(trainer: Any) -> Iterator[Any]:
    """A trainer's optimizer; one that it builds for this, with its scheduler, if it has none yet."""
    if trainer.optimizer is not None:
        yield trainer.optimizer
        return
    kept = {name: value for name, value in vars(trainer).items() if name not in ("optimizer", "lr_scheduler")}
    scheduler = trainer.lr_scheduler
    try:
        try:
            trainer.create_optimizer()
            if trainer.optimizer is not None and scheduler is None:
                trainer.create_scheduler(num_training_steps=100, optimizer=trainer.optimizer)
        except LoraPlusError:
            raise
        except Exception as error:
            raise TrainerSetupError(
                f"{type(trainer).__name__} cannot build its optimizer before .train() ({type(error).__name__}: "
                f"{error}); call doctor in or after training, or `loraplus doctor -- python script.py`"
            ) from error
        if trainer.optimizer is None:
            raise TrainerSetupError(f"{type(trainer).__name__}.create_optimizer made no optimizer")
        yield trainer.optimizer
    finally:
        unhook = getattr(trainer, "_unhook", None)
        if callable(unhook):
            unhook()
        trainer.optimizer, trainer.lr_scheduler = None, scheduler
        for name in [name for name in vars(trainer) if name not in kept and name not in ("optimizer", "lr_scheduler")]:
            delattr(trainer, name)
        vars(trainer).update(kept)
