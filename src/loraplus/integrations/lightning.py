"""LoRA+ in Lightning: a callback that proves the rates when training starts, logs them and guards checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback

from loraplus.errors import ResumeMismatchError, TrainerSetupError
from loraplus.groups import verify
from loraplus.integrations.checkpoints import LOOP_WAY, auto_rates, check_record, rates_in_use, rates_record
from loraplus.integrations.pytorch import rates_for_log
from loraplus.rates import DEFAULT_LR_RATIO, Rates

RECORD = "loraplus"
"""Key of the rates in a Lightning checkpoint."""

AUTO = "loraplus_auto"
"""Key of what automatic rates need to go on."""


class LoraPlusCallback(Callback):
    """Verifies the rates of `configure_optimizers`, logs `lr/lora_A`, `lr/lora_B`, …, and refuses to resume at others.

    The optimizer stays the module's own: `configure_optimizers` returns `loraplus.create_optimizer(self, ...)`.

    Args:
        loraplus_lr_ratio: λ that the optimizer should have; not looked at with `AutoRates`.
        loraplus_lr_embedding: rate of embedding factors and rows. Default: lr.
        loraplus_lr_head: rate of `modules_to_save`. Default: lr.
        loraplus_lr_magnitude: rate of DoRA's magnitudes. Default: lr.
        loraplus_lr_overrides: {regular expression: factor} on parameter names; they start with the attribute that
            holds the model in the LightningModule.
        loraplus_lr_ratio_overrides: {regular expression: λ} on names of B factors.

    Raises:
        RateMismatchError: when training starts, if a parameter has another rate.
        ResumeMismatchError: when training starts from a checkpoint that was trained at other rates.
        TrainerSetupError: not exactly one optimizer.

    Example:
        >>> trainer = lightning.Trainer(callbacks=[LoraPlusCallback(loraplus_lr_ratio=16)])  # doctest: +SKIP
    """

    def __init__(
        self,
        loraplus_lr_ratio: float = DEFAULT_LR_RATIO,
        *,
        loraplus_lr_embedding: float | None = None,
        loraplus_lr_head: float | None = None,
        loraplus_lr_magnitude: float | None = None,
        loraplus_lr_overrides: Mapping[str, float] | None = None,
        loraplus_lr_ratio_overrides: Mapping[str, float] | None = None,
    ) -> None:
        self._asked: dict[str, Any] = {
            "lr_ratio": loraplus_lr_ratio,
            "lr_embedding": loraplus_lr_embedding,
            "lr_head": loraplus_lr_head,
            "lr_magnitude": loraplus_lr_magnitude,
            "lr_overrides": loraplus_lr_overrides,
            "lr_ratio_overrides": loraplus_lr_ratio_overrides,
        }
        self._rates: Rates | None = None
        self._auto: Any = None
        self._loaded: tuple[Any, Any] | None = None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Checks what `configure_optimizers` built; Lightning loads the optimizer's state after this."""
        if len(trainer.optimizers) != 1:
            raise TrainerSetupError(
                f"LoraPlusCallback reads the rates of one optimizer, {type(pl_module).__name__} has "
                f"{len(trainer.optimizers)}; build one with loraplus.create_optimizer(self, ...)"
            )
        optimizer = trainer.optimizers[0]
        self._auto = auto_rates(optimizer)
        if self._auto is None:
            verify(pl_module, optimizer, **self._asked)
        self._rates = rates_in_use(pl_module, optimizer)
        self._check_resume(trainer)

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Keeps what a checkpoint says of its rates until those of this run are known."""
        self._loaded = (checkpoint.get(RECORD), checkpoint.get(AUTO))
        if self._rates is not None:  # FSDP and DeepSpeed load after the optimizer is built
            self._check_resume(trainer)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Adds the rates and roles, and the state of automatic rates."""
        if self._rates is not None:
            checkpoint[RECORD] = rates_record(self._rates, pl_module, self._auto)
            if self._auto is not None:
                checkpoint[AUTO] = self._auto.state_dict()

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Logs the rates that the step is taken with."""
        pl_module.log_dict(rates_for_log(optimizer))

    def _check_resume(self, trainer: Any) -> None:
        if self._loaded is not None and self._rates is not None:
            (saved, auto_state), self._loaded = self._loaded, None
            where = str(trainer.ckpt_path or "the checkpoint")
            check_record(saved, self._rates, where, LOOP_WAY, auto=self._auto is not None)
            if self._auto is not None:
                if auto_state is None:
                    raise ResumeMismatchError(
                        f"{where} has no state of its automatic rates, so they cannot go on; resume from another "
                        f"checkpoint, {LOOP_WAY}"
                    )
                self._auto.load_state_dict(auto_state)
