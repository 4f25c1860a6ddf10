"""LoRA+ in TRL: the rates as flags of a TRL script. `loraplus.attach` is what gives any of its trainers LoRA+."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeVar

from transformers import Trainer

from loraplus.integrations.trainer_settings import RateArguments, asked_in
from loraplus.integrations.transformers import attach

AnyTrainer = TypeVar("AnyTrainer", bound=Trainer)


@dataclass
class LoraPlusArguments(RateArguments):
    """The rates of LoRA+ as one more dataclass of a `TrlParser`; `learning_rate` of the trainer's config is η_A.

    Args:
        loraplus_lr_ratio, loraplus_lr_embedding, …: the fields of `loraplus.Rates` but `lr`, overrides by name as JSON
            text; where they default to lr, that is learning_rate.
        loraplus_auto_rates: η_A and η_B are set by `AutoRates`.

    Example:
        >>> parser = TrlParser((ScriptArguments, DPOConfig, ModelConfig, LoraPlusArguments))  # doctest: +SKIP
        >>> script, args, model_args, rates = parser.parse_args_and_config()  # doctest: +SKIP
        >>> rates.attach(DPOTrainer(..., args=args)).train()  # doctest: +SKIP
    """

    loraplus_auto_rates: bool = field(default=False, metadata={"help": "Set η_A and η_B automatically."})

    def attach(self, trainer: AnyTrainer) -> AnyTrainer:
        """`loraplus.attach` with these rates.

        Raises:
            TrainerSetupError: overrides that are no JSON object; else as `loraplus.attach`.
        """
        return attach(trainer, asked_in(self))
