"""LoRA+ in transformers' Trainer and in every subclass of it.

`LoraPlusMixin` overrides what a trainer does with its optimizer: it builds the groups, sets the rates automatically if
asked to, logs every group's rate by name, and records the rates in each checkpoint. `LoraPlusTrainer` mixes it into
Trainer; `attach` mixes it into the class of a trainer that exists already, so both are one implementation.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeVar

import torch
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from loraplus.auto import AutoRates
from loraplus.errors import InvalidRateError, TrainerSetupError
from loraplus.feature_updates import UpdateMonitor
from loraplus.groups import groups_for, rate_of_group
from loraplus.integrations.checkpoints import (
    check_resume,
    rates_record,
    read_auto_state,
    write_auto_state,
    write_rates,
)
from loraplus.integrations.deepspeed import check_plugin
from loraplus.optimizer import build
from loraplus.rates import DEFAULT_LR_RATIO, Rates
from loraplus.roles import Role, trainable_parameters

AnyTrainer = TypeVar("AnyTrainer", bound=Trainer)


@dataclass(frozen=True)
class RateSettings:
    """What the user asked for; lr is the trainer's own `learning_rate` unless given, and is read when needed.

    With lr "auto", A and B are built at the trainer's `learning_rate` (a name for 1: `AutoRates` looks at what the
    schedule makes of it only), which all other parameters really have.
    """

    lr_ratio: float = DEFAULT_LR_RATIO
    lr: float | Literal["auto"] | None = None
    lr_embedding: float | None = None
    lr_head: float | None = None
    lr_magnitude: float | None = None
    lr_overrides: Mapping[str, float] = field(default_factory=dict)
    lr_ratio_overrides: Mapping[str, float] = field(default_factory=dict)
    log_updates: int = 0
    log_layers: bool = False

    @property
    def auto(self) -> bool:
        """Whether `AutoRates` sets η_A and η_B."""
        return self.lr == "auto"

    def rates(self, learning_rate: float) -> Rates:
        """The rates that the groups are built with, in a trainer of this `learning_rate`."""
        given = {name: getattr(self, name) for name in ("lr_embedding", "lr_head", "lr_magnitude", "lr_overrides")}
        if self.auto:
            if self.lr_ratio_overrides:
                raise InvalidRateError("lr_ratio_overrides is not used with automatic rates, which set the ratio")
            return Rates(learning_rate, 1.0, **given)
        lr = learning_rate if self.lr is None else self.lr
        return Rates(lr, self.lr_ratio, **given, lr_ratio_overrides=self.lr_ratio_overrides)  # type: ignore[arg-type]


class LoraPlusMixin:
    """Gives any Trainer class LoRA+ parameter groups, their logs, and a guard on resuming."""

    loraplus_settings: RateSettings
    loraplus_auto: AutoRates | None = None
    _auto_state: Mapping[str, Any] | None = None
    _monitor: UpdateMonitor | None = None
    _rates: Rates | None = None
    _group_rates: Mapping[str, float] = MappingProxyType({})

    # What the Trainer that this is mixed into provides.
    args: Any
    model: Any
    optimizer: Any
    optimizer_cls_and_kwargs: Any

    @property
    def loraplus_rates(self) -> Rates:
        """The rates of this run, from the settings and the trainer's `learning_rate`."""
        settings, lr = self.loraplus_settings, self.args.learning_rate
        if isinstance(settings.lr, (int, float)):
            lr = settings.lr
        if self._rates is None or self._rates.lr != lr:  # a search over learning_rate changes it between runs
            self._rates = settings.rates(lr)
        return self._rates

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Builds the optimizer that the training arguments name, with LoRA+ groups."""
        if self.optimizer is None:
            model = self.model if model is None else model
            optimizer_cls, kwargs = self.optimizer_cls_and_kwargs or Trainer.get_optimizer_cls_and_kwargs(
                self.args, model
            )
            own_grouping = {"params", "model", "optimizer_dict"} & set(kwargs)
            if own_grouping or not (
                isinstance(optimizer_cls, type) and issubclass(optimizer_cls, torch.optim.Optimizer)
            ):
                raise TrainerSetupError(
                    f"optim = {getattr(self.args.optim, 'value', self.args.optim)} groups the parameters itself, so "
                    "LoRA+ cannot give A and B their own rates; choose one that takes parameter groups, such as "
                    "adamw_torch"
                )
            kwargs = dict(kwargs)
            kwargs.pop("lr", None)
            weight_decay = kwargs.pop("weight_decay", self.args.weight_decay)
            rates = self.loraplus_rates
            groups = groups_for(trainable_parameters(model), rates, weight_decay)
            self.optimizer = build(model, optimizer_cls, groups, lr=rates.lr, **kwargs)
            self._watch(model)
        return self.optimizer

    def _watch(self, model: Any) -> None:
        if self.loraplus_settings.auto:
            self.loraplus_auto = AutoRates(model, self.optimizer)
            if self._auto_state is not None:
                self.loraplus_auto.load_state_dict(self._auto_state)
        elif self.loraplus_settings.log_updates:
            self._monitor = UpdateMonitor(model, self.optimizer, every=self.loraplus_settings.log_updates)

    def _get_learning_rate(self) -> float:
        # Trainer reads its rate before the scheduler moves on and logs it later; the groups are read at that moment.
        if self.optimizer is not None:
            rates = [rate_of_group(self.optimizer, group) or 0.0 for group in self.optimizer.param_groups]
            names = [group["name"] for group in self.optimizer.param_groups]
            self._group_rates = dict(zip(names, rates, strict=True))
            if self.loraplus_settings.auto:
                return rates[0]
        return super()._get_learning_rate()  # type: ignore[misc]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds `lr/<group>` for every group, and `updates/…` if measured, where the trainer logs its learning rate."""
        if "learning_rate" in logs:
            logs |= {f"lr/{name}": lr for name, lr in self._group_rates.items()}
            watcher = self.loraplus_auto or self._monitor
            if watcher is not None and watcher.updates is not None:
                logs |= watcher.updates.logs()
            if self.loraplus_auto is not None and self.loraplus_settings.log_layers:
                logs |= {
                    f"lr/{name}.{role}": lr
                    for name, rates in self.loraplus_auto.layer_rates.items()
                    for role, lr in ((Role.A, rates.lr_a), (Role.B, rates.lr_b))
                    if lr is not None
                }
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Refuses to resume from a checkpoint trained at other rates, then trains."""
        if resume_from_checkpoint:
            folder = resume_from_checkpoint
            if folder is True:
                folder = get_last_checkpoint(self.args.output_dir)
            if folder is not None and Path(folder).is_dir():
                check_resume(Path(folder), self.loraplus_rates, auto=self.loraplus_settings.auto)
                if self.loraplus_settings.auto:
                    self._auto_state = read_auto_state(Path(folder))
        return super().train(resume_from_checkpoint, *args, **kwargs)  # type: ignore[misc]

    def save_model(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        """Saves the model, and beside it the rates and the role of every trained parameter."""
        super().save_model(output_dir, *args, **kwargs)  # type: ignore[misc]
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            write_rates(folder, rates_record(self.loraplus_rates, self.model, self.loraplus_auto))
            if self.loraplus_auto is not None:
                write_auto_state(folder, self.loraplus_auto)


def overrides_from(name: str, value: dict[str, float] | str | None) -> dict[str, float] | None:
    """A setting that maps regular expressions to numbers, from a dict or from JSON text.

    Args:
        name: of the setting, for the error.
        value: as it was given.

    Raises:
        TrainerSetupError: it is neither.
    """
    found: Any = value
    if isinstance(value, str):
        try:
            found = json.loads(value)
        except json.JSONDecodeError as error:
            raise TrainerSetupError(f"{name} is not JSON: {error}") from None
    if found is not None and not isinstance(found, dict):
        raise TrainerSetupError(
            f'{name} must map regular expressions to numbers, as in {{"value": 0.5}}; got {value!r}'
        )
    return found


@dataclass
class LoraPlusTrainingArguments(TrainingArguments):
    """TrainingArguments with the rates of LoRA+; `learning_rate` is η_A.

    Args:
        loraplus_lr_ratio: λ = η_B / η_A.
        loraplus_lr_embedding: rate of embedding factors and rows. Default: learning_rate.
        loraplus_lr_head: rate of `modules_to_save`. Default: learning_rate.
        loraplus_lr_magnitude: rate of DoRA's magnitudes. Default: learning_rate.
        loraplus_lr_overrides: {regular expression: factor}, as a dict or JSON text.
        loraplus_lr_ratio_overrides: {regular expression: λ} on names of B factors, as a dict or JSON text.
        loraplus_auto_rates: η_A and η_B are set by `AutoRates`; all else keeps learning_rate.
        loraplus_log_updates: log δ1 and δ2 as `updates/…`, measured every so many steps; 0 does not.
        loraplus_log_layers: with automatic rates, log what every layer asks for.
    """

    loraplus_lr_ratio: float = field(default=DEFAULT_LR_RATIO, metadata={"help": "λ = η_B / η_A; 1 is plain LoRA."})
    loraplus_lr_embedding: float | None = field(default=None, metadata={"help": "Rate of embedding factors and rows."})
    loraplus_lr_head: float | None = field(default=None, metadata={"help": "Rate of modules_to_save."})
    loraplus_lr_magnitude: float | None = field(default=None, metadata={"help": "Rate of DoRA's magnitudes."})
    loraplus_lr_overrides: dict[str, float] | str | None = field(
        default=None, metadata={"help": "{regular expression: factor} on parameter names, as JSON."}
    )
    loraplus_lr_ratio_overrides: dict[str, float] | str | None = field(
        default=None, metadata={"help": "{regular expression: λ} on names of B factors, as JSON."}
    )
    loraplus_auto_rates: bool = field(default=False, metadata={"help": "Set η_A and η_B automatically."})
    loraplus_log_updates: int = field(default=0, metadata={"help": "Log δ1 and δ2, measured every so many steps."})
    loraplus_log_layers: bool = field(default=False, metadata={"help": "Log the automatic rate of every layer."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("loraplus_lr_overrides", "loraplus_lr_ratio_overrides"):
            setattr(self, name, overrides_from(name, getattr(self, name)))

    def loraplus_settings(self) -> RateSettings:
        """The rate settings as `attach` takes them."""
        return RateSettings(
            lr_ratio=self.loraplus_lr_ratio,
            lr_embedding=self.loraplus_lr_embedding,
            lr_head=self.loraplus_lr_head,
            lr_magnitude=self.loraplus_lr_magnitude,
            lr_overrides=overrides_from("loraplus_lr_overrides", self.loraplus_lr_overrides) or {},
            lr_ratio_overrides=overrides_from("loraplus_lr_ratio_overrides", self.loraplus_lr_ratio_overrides) or {},
            lr="auto" if self.loraplus_auto_rates else None,
            log_updates=self.loraplus_log_updates,
            log_layers=self.loraplus_log_layers,
        )


class LoraPlusTrainer(LoraPlusMixin, Trainer):  # type: ignore[misc]
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
        _set_up(self, args.loraplus_settings())


def attach(
    trainer: AnyTrainer,
    lr_ratio: float = DEFAULT_LR_RATIO,
    *,
    lr: float | Literal["auto"] | None = None,
    lr_embedding: float | None = None,
    lr_head: float | None = None,
    lr_magnitude: float | None = None,
    lr_overrides: Mapping[str, float] | None = None,
    lr_ratio_overrides: Mapping[str, float] | None = None,
    log_updates: int = 0,
) -> AnyTrainer:
    """Gives a trainer LoRA+ before `.train()`; works for Trainer and every subclass, TRL's included.

    Args:
        trainer: a `transformers.Trainer` or subclass whose optimizer is not built yet.
        lr_ratio: λ = η_B / η_A; not used with automatic rates.
        lr: η_A; "auto" has `AutoRates` set η_A and η_B. Default: the trainer's `args.learning_rate`.
        lr_embedding, lr_head, lr_magnitude, lr_overrides: as in `loraplus.param_groups`; where they default to lr,
            automatic rates leave `args.learning_rate`.
        lr_ratio_overrides: {regular expression: λ} on names of B factors; not with automatic rates.
        log_updates: log δ1 and δ2 as `updates/…`, measured every so many steps; 0 does not (automatic rates always do).

    Returns:
        The same trainer.

    Raises:
        TrainerSetupError: not a Trainer, its optimizer exists already, or a DeepSpeed configuration that would take the
            rates over.
        InvalidRateError, NoLoraFactorsError, …: as `loraplus.param_groups`, here rather than in `.train()`.

    Example:
        >>> trainer = loraplus.attach(SFTTrainer(...), lr_ratio=16.0)  # doctest: +SKIP
    """
    if not isinstance(trainer, Trainer):
        raise TrainerSetupError(f"attach takes a transformers Trainer, got {type(trainer).__name__}")
    if isinstance(lr, str) and lr != "auto":
        raise InvalidRateError(f'lr must be a positive number or "auto", got {lr!r}')
    settings = RateSettings(
        lr_ratio, lr, lr_embedding, lr_head, lr_magnitude, lr_overrides or {}, lr_ratio_overrides or {}, log_updates
    )
    if trainer.optimizer is None and not isinstance(trainer, LoraPlusMixin):
        trainer.__class__ = _with_mixin(type(trainer))
    _set_up(trainer, settings)
    return trainer


@functools.cache
def _with_mixin(trainer_class: type[Trainer]) -> type[Trainer]:
    return type(trainer_class.__name__, (LoraPlusMixin, trainer_class), {"__module__": trainer_class.__module__})


def _set_up(trainer: Any, settings: RateSettings) -> None:
    if trainer.optimizer is not None:
        raise TrainerSetupError(
            f"{type(trainer).__name__} has an optimizer already, so its rates are fixed; leave out `optimizers=` and "
            "set LoRA+ up before .train()"
        )
    check_plugin(trainer.accelerator)
    trainer.loraplus_settings, trainer._rates = settings, None
    rates = trainer.loraplus_rates
    if trainer.model is not None and trainer.model_init is None:
        groups_for(trainable_parameters(trainer.model), rates, None)  # every error that the model causes, early
