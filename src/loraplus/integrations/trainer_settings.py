"""What a user asks of LoRA+ in a Trainer: as training arguments, or as what `attach` was given."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import TrainingArguments

from loraplus.errors import InvalidRateError, TrainerSetupError
from loraplus.rates import DEFAULT_LR_RATIO, Rates

ABSOLUTE = ("lr_embedding", "lr_head", "lr_magnitude")
"""Settings that are rates themselves, not multiples of one."""


@dataclass(frozen=True)
class RateSettings:
    """What the user asked for; lr is that of the trainer's own optimizer unless given, and is read when needed.

    With lr "auto", A and B are built at the trainer's rate (a name for 1: `AutoRates` looks at what the schedule makes
    of it only), which all other parameters really have.
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

    @property
    def given_lr(self) -> float | None:
        """η_A if it was given as a number."""
        return self.lr if isinstance(self.lr, (int, float)) else None

    @property
    def absolute(self) -> dict[str, float]:
        """The settings given that are rates themselves, by name."""
        given = {"lr": self.given_lr, **{name: getattr(self, name) for name in ABSOLUTE}}
        return {name: value for name, value in given.items() if value is not None}

    def rates(self, lr: float) -> Rates:
        """The rates that the groups have in a trainer whose optimizer is at this lr."""
        given = {name: getattr(self, name) for name in (*ABSOLUTE, "lr_overrides")}
        if self.auto:
            for name, default in (("lr_ratio", DEFAULT_LR_RATIO), ("lr_ratio_overrides", {})):
                if getattr(self, name) != default:
                    raise InvalidRateError(
                        f"{name} is not used with automatic rates, which set the ratio; leave it out"
                    )
            return Rates(lr, 1.0, **given)
        lr = lr if self.given_lr is None else self.given_lr
        return Rates(lr, self.lr_ratio, **given, lr_ratio_overrides=self.lr_ratio_overrides)


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

    They are read whenever an optimizer is made, so a search over them, or a change before `train()`, counts.

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
        """The rate settings as `attach` takes them, as they are at this moment."""
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
