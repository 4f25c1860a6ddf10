"""LoRA+ in TRL: the rates as flags of a TRL script. `loraplus.attach` is what gives any of its trainers LoRA+."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeVar

from transformers import Trainer

from loraplus.integrations.transformers import attach, overrides_from
from loraplus.rates import DEFAULT_LR_RATIO

AnyTrainer = TypeVar("AnyTrainer", bound=Trainer)


@dataclass
class LoraPlusArguments:
    """The rates of LoRA+ as one more dataclass of a `TrlParser`; `learning_rate` of the trainer's config is η_A.

    Args:
        loraplus_lr_ratio: λ = η_B / η_A.
        loraplus_lr_embedding: rate of embedding factors and rows. Default: learning_rate.
        loraplus_lr_head: rate of `modules_to_save`. Default: learning_rate.
        loraplus_lr_magnitude: rate of DoRA's magnitudes. Default: learning_rate.
        loraplus_lr_overrides: {regular expression: factor} as JSON text.
        loraplus_lr_ratio_overrides: {regular expression: λ} on names of B factors, as JSON text.
        loraplus_auto_rates: η_A and η_B are set by `AutoRates`.

    Example:
        >>> parser = TrlParser((ScriptArguments, DPOConfig, ModelConfig, LoraPlusArguments))  # doctest: +SKIP
        >>> script, args, model_args, rates = parser.parse_args_and_config()  # doctest: +SKIP
        >>> rates.attach(DPOTrainer(..., args=args)).train()  # doctest: +SKIP
    """

    loraplus_lr_ratio: float = field(default=DEFAULT_LR_RATIO, metadata={"help": "λ = η_B / η_A; 1 is plain LoRA."})
    loraplus_lr_embedding: float | None = field(default=None, metadata={"help": "Rate of embedding factors and rows."})
    loraplus_lr_head: float | None = field(default=None, metadata={"help": "Rate of modules_to_save."})
    loraplus_lr_magnitude: float | None = field(default=None, metadata={"help": "Rate of DoRA's magnitudes."})
    loraplus_lr_overrides: str | None = field(default=None, metadata={"help": "{regex: factor} as JSON."})
    loraplus_lr_ratio_overrides: str | None = field(default=None, metadata={"help": "{regex: λ} for B, as JSON."})
    loraplus_auto_rates: bool = field(default=False, metadata={"help": "Set η_A and η_B automatically."})

    def attach(self, trainer: AnyTrainer) -> AnyTrainer:
        """`loraplus.attach` with these rates.

        Raises:
            TrainerSetupError: overrides that are no JSON object; else as `loraplus.attach`.
        """
        return attach(
            trainer,
            self.loraplus_lr_ratio,
            lr="auto" if self.loraplus_auto_rates else None,
            lr_embedding=self.loraplus_lr_embedding,
            lr_head=self.loraplus_lr_head,
            lr_magnitude=self.loraplus_lr_magnitude,
            lr_overrides=overrides_from("loraplus_lr_overrides", self.loraplus_lr_overrides),
            lr_ratio_overrides=overrides_from("loraplus_lr_ratio_overrides", self.loraplus_lr_ratio_overrides),
        )
