"""What a user asks of LoRA+ in a Trainer: as training arguments, or as what `attach` was given."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from loraplus.errors import TrainerSetupError
from loraplus.notices import told_once
from loraplus.rate_keywords import overrides_from, rate_fields, rates_from
from loraplus.rates import AUTO, SETTINGS, Rates

PREFIX = "loraplus_"
"""Of the settings among the ecosystem's own: `loraplus_lr_ratio`, …"""


@dataclass(frozen=True)
class RateSettings:
    """What the user asked for: rates whose lr may be left to the trainer, and what is logged beside them."""

    rates: Rates = field(default_factory=Rates)
    log_updates: int = 0
    log_layers: bool = False

    @property
    def auto(self) -> bool:
        """Whether `AutoRates` sets η_A and η_B."""
        return self.rates.auto

    @property
    def is_given(self) -> bool:
        """Whether anything was asked for, be it what is the default."""
        return self.rates.is_given or self != RateSettings()

    def filled(self, other: RateSettings) -> RateSettings:
        """What is asked for here, and in what is left open here what the other asks for."""
        rates = self.rates if self.rates.is_given else other.rates
        return RateSettings(rates, self.log_updates or other.log_updates, self.log_layers or other.log_layers)

    def differs_in(self, other: RateSettings) -> tuple[str, Any, Any] | None:
        """(name of the first setting that is another, its value here, its value there)."""
        here, there = ({**vars(each.rates), **vars(each)} for each in (self, other))
        names = [name for name in here if name not in ("rates", "tensor") and here[name] != there[name]]
        return (names[0], here[names[0]], there[names[0]]) if names else None


def settings_from(fields: Any) -> RateSettings:
    """The settings that an object with the fields of `RateArguments` asks for; fields that it lacks have defaults."""
    automatic, every, layers = (getattr(fields, PREFIX + n, None) for n in ("auto_rates", "log_updates", "log_layers"))
    with told_once(silent=True):  # they are read many times; a low ratio is warned of when they are used
        return RateSettings(rates_from(fields, AUTO if automatic else None, prefix=PREFIX), every or 0, bool(layers))


_RateFields: Any = dataclasses.make_dataclass("_RateFields", rate_fields(prefix=PREFIX))


@dataclass
class RateArguments(_RateFields):
    """What `attach` takes as fields of a dataclass, under the ecosystem's names; lr is the trainer's own setting.

    Args:
        loraplus_lr_ratio, loraplus_lr_embedding, …: the fields of `loraplus.Rates` but `lr`; where they default to lr,
            that is learning_rate. Overrides by name may be a dict or JSON text.
        loraplus_auto_rates: η_A and η_B are set by `AutoRates`; all else keeps learning_rate.
        loraplus_log_updates: log δ1 and δ2 as `updates/…`, measured every so many steps; 0 does not.
        loraplus_log_layers: with automatic rates, log what every layer asks for.
    """

    loraplus_auto_rates: bool = field(default=False, metadata={"help": "Set η_A and η_B automatically."})
    loraplus_log_updates: int = field(default=0, metadata={"help": "Log δ1 and δ2, measured every so many steps."})
    loraplus_log_layers: bool = field(default=False, metadata={"help": "Log the automatic rate of every layer."})

    def loraplus_settings(self) -> RateSettings:
        """The settings as `attach` takes them, as they are at this moment."""
        return settings_from(self)


@dataclass
class LoraPlusTrainingArguments(RateArguments, TrainingArguments):
    """TrainingArguments with the rates of LoRA+; `learning_rate` is η_A.

    They are read whenever an optimizer is made, so a search over them, or a change before `train()`, counts.
    `RateArguments` has the fields that this adds.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, setting in SETTINGS.items():
            if "by_name" in setting.metadata:
                setattr(self, PREFIX + name, overrides_from(PREFIX + name, getattr(self, PREFIX + name)))


def in_optim_args(text: Any) -> tuple[dict[str, float], str | None]:
    """The fields of `Rates` that `optim_args` names, "ratio=16, lr_head=1e-3", and the rest, the optimizer's own.

    Every setting that is a number has its name in `Rates`, with or without `loraplus_`; `ratio` is short for lr_ratio.

    Raises:
        TrainerSetupError: a value that is no number, or a setting that maps names to numbers.

    Example:
        >>> in_optim_args("ratio=8, momentum=0.9")
        ({'lr_ratio': 8.0}, 'momentum=0.9')
    """
    numbers: dict[str, float] = {}
    rest: list[str] = []
    for part in str(text or "").replace(" ", "").split(","):
        key, _, value = part.partition("=")
        name = {"ratio": "lr_ratio"}.get(key.removeprefix(PREFIX), key.removeprefix(PREFIX))
        if name not in SETTINGS or name == "lr":
            rest += [part] if part else []
            continue
        try:
            number = None if "by_name" in SETTINGS[name].metadata else float(value)
        except ValueError:
            number = None
        if number is None or name in numbers:
            raise TrainerSetupError(
                f"optim_args has {part}; give {key} once, as a number, or give the rates to loraplus.attach"
            )
        numbers[name] = number
    return numbers, (",".join(rest) or None) if numbers else text


def settings_of(args: TrainingArguments) -> RateSettings | None:
    """What training arguments ask for: in fields of their own, or in `optim_args`; None if in neither.

    Raises:
        TrainerSetupError: in both, and not the same.
    """
    fields = args.loraplus_settings() if isinstance(args, LoraPlusTrainingArguments) else None
    if fields is not None and not fields.is_given:
        fields = None
    numbers: dict[str, Any] = {**in_optim_args(args.optim_args)[0]}
    with told_once(silent=True):  # of a low ratio, as in `settings_from`
        named = RateSettings(Rates(**numbers)) if numbers else None
    difference = fields.differs_in(named) if fields is not None and named is not None else None
    if difference is not None:
        name, here, there = difference
        raise TrainerSetupError(
            f"the training arguments ask for {name} = {here}, optim_args for {there}; set {PREFIX}{name}, and take it "
            "out of optim_args"
        )
    return named if fields is None else fields
