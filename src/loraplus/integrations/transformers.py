"""LoRA+ in transformers' Trainer and in every subclass of it.

`LoraPlusMixin` adds to what a trainer does with its optimizer: it splits the groups that the trainer's own hooks have
built, sets the rates automatically if asked to, logs every group's rate by name, and records the rates in each
checkpoint. `LoraPlusTrainer` mixes it into Trainer; `attach` mixes it into the class of a trainer that exists already,
so both are one implementation.
"""

from __future__ import annotations

import functools
from typing import Any, TypeVar

from transformers import Trainer, TrainerCallback, TrainingArguments

from loraplus.errors import TrainerSetupError
from loraplus.groups import groups_for
from loraplus.integrations.deepspeed import check_plugin
from loraplus.integrations.trainer_mixin import LoraPlusMixin, without_repetition
from loraplus.integrations.trainer_optimizer import keep_ratio
from loraplus.integrations.trainer_settings import LoraPlusTrainingArguments, RateSettings
from loraplus.notices import told_once
from loraplus.rate_keywords import overrides_from, takes_rates
from loraplus.rates import Rates
from loraplus.roles import trainable_parameters

__all__ = [
    "LoraPlusMixin",
    "LoraPlusTrainer",
    "LoraPlusTrainingArguments",
    "RateSettings",
    "attach",
    "overrides_from",
]

AnyTrainer = TypeVar("AnyTrainer", bound=Trainer)


class _AtStart(TrainerCallback):
    """When all of a run is built, whoever built it: the optimizer is ours, and its scheduler keeps the ratio."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, lr_scheduler: Any = None, **_: Any) -> None:
        self.trainer._check_ours()
        self.trainer._find_best()
        keep_ratio(lr_scheduler, self.trainer._made.split)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer._check_ours()  # a callback may put another one there at any time


class LoraPlusTrainer(LoraPlusMixin, Trainer):
    """transformers' Trainer with LoRA+; takes `LoraPlusTrainingArguments` and what else Trainer takes, in its order.

    Example:
        >>> args = LoraPlusTrainingArguments("out", learning_rate=2e-4, loraplus_lr_ratio=16)  # doctest: +SKIP
        >>> LoraPlusTrainer(model=peft_model, args=args, train_dataset=data).train()  # doctest: +SKIP
    """

    def __init__(
        self, model: Any = None, args: TrainingArguments | None = None, *positional: Any, **kwargs: Any
    ) -> None:
        args = LoraPlusTrainingArguments() if args is None else args
        if not isinstance(args, LoraPlusTrainingArguments):
            raise TrainerSetupError(
                f"LoraPlusTrainer takes LoraPlusTrainingArguments, got {type(args).__name__}; with other arguments "
                "use loraplus.attach(trainer, lr_ratio=...)"
            )
        super().__init__(model, args, *positional, **kwargs)
        _set_up(self, None)


@told_once()
@takes_rates("lr_ratio", optional=True)
def attach(trainer: AnyTrainer, *, rates: Rates | None, log_updates: int = 0, log_layers: bool = False) -> AnyTrainer:
    """Gives a trainer LoRA+ before `.train()`; works for Trainer and every subclass, TRL's included.

    The trainer builds the optimizer that it would have built, with its own hooks; its groups are then split by role.

    Args:
        trainer: a `transformers.Trainer` or subclass whose optimizer is not built yet.
        rates: a `Rates`, or its fields as keywords; `lr_ratio` also by position. `lr` defaults to that of the trainer's
            own optimizer, which is `args.learning_rate` when it is built, or what the trainer's hooks make of it. With
            "auto" `AutoRates` sets η_A and η_B; then a ratio is refused, and what defaults to lr learns at
            `args.learning_rate`. Without any, those in `args.optim_args` count, "ratio=8, lr_head=1e-3".
        log_updates: log δ1 and δ2 as `updates/…`, measured every so many steps; 0 does not (automatic rates always do).
        log_layers: with automatic rates, log what every layer asks for, as `lr/<layer>.lora_A`.

    Returns:
        The same trainer.

    Raises:
        TrainerSetupError: not a Trainer, its optimizer exists already, `LoraPlusTrainingArguments` that ask for
            something else, or a DeepSpeed configuration that would take the rates over.
        InvalidRateError, NoLoraFactorsError, …: as `loraplus.param_groups`, here rather than in `.train()`.

    Example:
        >>> trainer = loraplus.attach(SFTTrainer(...), lr_ratio=16.0)  # doctest: +SKIP
    """
    if not isinstance(trainer, Trainer):
        raise TrainerSetupError(f"attach takes a transformers Trainer, got {type(trainer).__name__}")
    given = None
    if rates is not None or log_updates or log_layers:
        given = RateSettings(rates or Rates(), log_updates, log_layers)
        given = None if without_repetition(trainer.args, given) is None else given
    if trainer.optimizer is None and not isinstance(trainer, LoraPlusMixin):
        trainer.__class__ = _with_mixin(type(trainer))
    _set_up(trainer, given)
    return trainer


@functools.cache
def _with_mixin(trainer_class: type[Trainer]) -> type[Trainer]:
    return type(trainer_class.__name__, (LoraPlusMixin, trainer_class), {"__module__": trainer_class.__module__})


def _set_up(trainer: Any, given: RateSettings | None) -> None:
    if trainer.optimizer is not None:
        raise TrainerSetupError(
            f"{type(trainer).__name__} has an optimizer already, so its rates are fixed; leave out `optimizers=` and "
            "set LoRA+ up before .train(), or, if it makes one itself as PPO does, give it one: "
            "optimizers=(loraplus.create_optimizer(model, lr=..., lr_ratio=...), None)"
        )
    check_plugin(trainer.accelerator)
    trainer._given = given
    trains = trainer.train_dataset is not None
    rates = trainer._rates_at(trainer.args.learning_rate) if trains else None
    own = vars(trainer).get("create_optimizer")
    if own is not None:  # set on the instance, in front of every class
        trainer.create_optimizer = functools.partial(trainer._make, own)
    if not any(isinstance(callback, _AtStart) for callback in trainer.callback_handler.callbacks):
        trainer.add_callback(_AtStart(trainer))
    # Every error that the model causes, early; without data there will be no training, and any model and rate will do.
    if rates is not None and trainer.model is not None and trainer.model_init is None:
        with told_once(silent=True):  # warnings are the optimizer's
            groups_for(trainable_parameters(trainer.model), rates, None)
