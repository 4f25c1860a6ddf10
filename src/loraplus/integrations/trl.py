"""LoRA+ in TRL: the rates as flags of a TRL script. `loraplus.attach` is what gives any of its trainers LoRA+."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from transformers import Trainer

from loraplus.integrations.trainer_settings import RateArguments
from loraplus.integrations.transformers import attach

AnyTrainer = TypeVar("AnyTrainer", bound=Trainer)


@dataclass
class LoraPlusArguments(RateArguments):
    """The rates of LoRA+ as one more dataclass of a `TrlParser`; `learning_rate` of the trainer's config is η_A.

    `RateArguments` has its fields; overrides by name are given as JSON text.

    Example:
        >>> parser = TrlParser((ScriptArguments, DPOConfig, ModelConfig, LoraPlusArguments))  # doctest: +SKIP
        >>> script, args, model_args, rates = parser.parse_args_and_config()  # doctest: +SKIP
        >>> rates.attach(DPOTrainer(..., args=args)).train()  # doctest: +SKIP
    """

    def attach(self, trainer: AnyTrainer) -> AnyTrainer:
        """`loraplus.attach` with these rates.

        Raises:
            TrainerSetupError: overrides that are no JSON object; else as `loraplus.attach`.
        """
        settings = self.loraplus_settings()
        return attach(trainer, settings.rates, log_updates=settings.log_updates, log_layers=settings.log_layers)
