"""LoRA+ in axolotl: `plugins: [loraplus.integrations.axolotl.Plugin]`, with its settings in the same YAML file.

axolotl has `loraplus_lr_ratio` of its own, built by PEFT's function. The plugin takes that setting over: axolotl builds
the optimizer that it would build without it, with its decay and the rates of its own groups, and that one is split.
It hooks in where the trainer has been created; axolotl lists a hook `create_optimizer`, too, but calls it nowhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, Field, create_model, model_validator

from loraplus.integrations.trainer_settings import PREFIX, RateArguments, settings_from
from loraplus.integrations.transformers import attach
from loraplus.rate_keywords import rate_fields

if TYPE_CHECKING:
    BasePlugin: Any = object
else:
    try:
        from axolotl.integrations.base import BasePlugin
    except ModuleNotFoundError as missing:
        if missing.name != "axolotl":
            raise
        BasePlugin = object  # its settings and hooks can be read and tried without axolotl

_kinds: dict[str, Any] = {name: kind for name, kind, _ in rate_fields(prefix=PREFIX, overrides=dict[str, float])}
_RATES = [*_kinds, PREFIX + "auto_rates"]  # without any of them in the file, those in `optim_args` count
_kinds |= {PREFIX + "auto_rates": bool, PREFIX + "log_updates": int, PREFIX + "log_layers": bool}
_help = {name: field.metadata["help"] for name, field in RateArguments.__dataclass_fields__.items()}
_fields: dict[str, Any] = {
    name: (kind | None, Field(default=None, json_schema_extra={"description": _help[name]}))
    for name, kind in _kinds.items()
}
_Fields: Any = create_model("_Fields", **_fields)


class LoraPlusArgs(_Fields, BaseModel):
    """What may stand in axolotl's YAML: the fields of `RateArguments`, each with its default where it is left out."""

    @model_validator(mode="before")
    @classmethod
    def _as_written(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        unknown = [key for key in data if str(key).startswith(PREFIX) and key not in cls.model_fields]
        if unknown:  # axolotl passes over keys that it does not know
            known = ", ".join(name for name in cls.model_fields if name.startswith(PREFIX))
            raise ValueError(f"{unknown[0]} is no setting of LoRA+; there are {known}")
        # axolotl's own default of 1e-6 does not train embeddings; without the key they learn at learning_rate.
        return {"loraplus_lr_embedding": None, **data}

    @model_validator(mode="after")
    def _can_be_used(self) -> Any:
        settings_from(self)  # an InvalidRateError is a ValueError, which pydantic reports
        return self


class Plugin(BasePlugin):
    """axolotl's plugin.

    Example:
        ```yaml
        plugins: [loraplus.integrations.axolotl.Plugin]
        loraplus_lr_ratio: 16
        ```

    Source: axolotl, `integrations/base.py` (0.19).
    """

    def get_input_args(self) -> str:
        """Where axolotl finds the pydantic class of the settings."""
        return "loraplus.integrations.axolotl.LoraPlusArgs"

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Gives the trainer LoRA+, and takes the ratio out of axolotl's own arguments.

        Raises:
            TrainerSetupError, InvalidRateError, NoLoraFactorsError: as `loraplus.attach`.
        """
        written = SimpleNamespace(**cfg) if isinstance(cfg, Mapping) else cfg
        settings = settings_from(written)
        for name in ("loraplus_lr_ratio", "loraplus_lr_embedding"):
            if hasattr(trainer.args, name):
                setattr(trainer.args, name, None)
        rates = [settings.rates] if any(getattr(written, name, None) is not None for name in _RATES) else []
        attach(trainer, *rates, log_updates=settings.log_updates, log_layers=settings.log_layers)
        trainer.loraplus_logger = "axolotl.loraplus"
