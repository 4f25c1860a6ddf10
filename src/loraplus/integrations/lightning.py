"""LoRA+ in Lightning: a callback that proves the rates when training starts, logs them and guards checkpoints."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import LearningRateFinder, StochasticWeightAveraging

from loraplus.auto import AutoRates
from loraplus.errors import RateMismatchError, ResumeMismatchError, TrainerSetupError
from loraplus.groups import verify
from loraplus.integrations.checkpoints import (
    LOOP_WAY,
    all_auto_rates,
    check_parameters,
    check_record,
    rates_in_use,
    rates_record,
    roles_of,
    shapes_of,
    up_to_date,
)
from loraplus.integrations.pytorch import rates_for_log
from loraplus.rate_keywords import takes_rates
from loraplus.rates import Rates
from loraplus.steps.group_rates import base_rate, group_labels, reference_group
from loraplus.steps.wrappers import unwrapped
from loraplus.watching.watch import watch_rates

RECORD = "loraplus"
"""Key of the rates in a Lightning checkpoint."""

AUTO = "loraplus_auto"
"""Key of what automatic rates need to go on."""


class LoraPlusCallback(Callback):
    """Verifies the rates of `configure_optimizers`, logs `lr/lora_A`, `lr/lora_B`, …, and refuses to resume at others.

    The optimizer stays the module's own: `configure_optimizers` returns `loraplus.create_optimizer(self, ...)`. Where
    `StochasticWeightAveraging` has one rate for all groups, it is taken as A's, and the others keep their ratio to it.

    Args:
        rates: what the optimizer should have, not looked at with `AutoRates`: a `Rates`, or its fields but `lr` as
            `loraplus_lr_ratio` (also by position), `loraplus_lr_head`, … Names of parameters start with the attribute
            that holds the model in the LightningModule.

    Raises:
        RateMismatchError: when training starts, if a parameter has another rate.
        ResumeMismatchError: when training starts from a checkpoint that was trained at other rates.
        TrainerSetupError: not exactly one optimizer.

    Example:
        >>> trainer = lightning.Trainer(callbacks=[LoraPlusCallback(loraplus_lr_ratio=16)])  # doctest: +SKIP
    """

    @takes_rates("loraplus_lr_ratio", left_out=["lr"], prefix="loraplus_")
    def __init__(self, *, rates: Rates) -> None:
        self.asked = rates
        self._rates: Rates | None = None
        self._record: dict[str, Any] = {}
        self._autos: list[AutoRates] = []
        self._loaded: tuple[Any, Any] | None = None
        self._before_load: Any = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Has a checkpoint of other parameters refused before Lightning loads it into the module."""
        if stage == "fit":

            def check(*_: Any) -> None:
                loaded = getattr(trainer._checkpoint_connector, "_loaded_checkpoint", None) or {}
                saved, where = loaded.get(RECORD), str(trainer.ckpt_path or "the checkpoint")
                if saved is not None:
                    check_parameters(saved, roles_of(pl_module), shapes_of(pl_module), where, LOOP_WAY)

            self._before_load = pl_module.register_load_state_dict_pre_hook(check)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Checks what `configure_optimizers` built; Lightning loads the optimizer's state after this."""
        if self._before_load is not None:
            self._before_load.remove()
            self._before_load = None
        self._read(trainer, pl_module)
        optimizer = trainer.optimizers[0]
        watch_rates(pl_module, optimizer)
        _keep_ratio_in_swa(trainer, optimizer)
        self._verify(trainer, pl_module)
        self._check_resume(trainer)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Checks again: a callback may have set the rates since, as `LearningRateFinder` does."""
        if trainer.ckpt_path is None:  # a resumed run may be at any point of a schedule by group
            self._verify(trainer, pl_module)

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Keeps what a checkpoint says of its rates until those of this run are known."""
        self._loaded = (checkpoint.get(RECORD), checkpoint.get(AUTO))
        if self._rates is not None:  # FSDP and DeepSpeed load after the optimizer is built
            self._check_resume(trainer)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Adds the rates and roles that the optimizer was built with, and the state of automatic rates."""
        if self._rates is None and trainer.optimizers:  # a callback that saves before ours is asked
            self._read(trainer, pl_module)
        if self._rates is not None:
            states = [auto.state_dict() for auto in self._autos]
            checkpoint[RECORD] = up_to_date(self._record, self._autos[0] if self._autos else None)
            if states:
                checkpoint[AUTO] = states if len(states) > 1 else states[0]

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Logs the rates that the step is taken with."""
        pl_module.log_dict(rates_for_log(optimizer))

    def _read(self, trainer: Any, pl_module: Any) -> None:
        if len(trainer.optimizers) != 1:
            raise TrainerSetupError(
                f"LoraPlusCallback reads the rates of one optimizer, {type(pl_module).__name__} has "
                f"{len(trainer.optimizers)}; build one with loraplus.create_optimizer(self, ...)"
            )
        optimizer = trainer.optimizers[0]
        self._autos = all_auto_rates(optimizer)
        self._rates = rates_in_use(pl_module, optimizer)
        self._record = rates_record(self._rates, pl_module, self._autos[0] if self._autos else None)

    def _verify(self, trainer: Any, pl_module: Any) -> None:
        if self._autos:
            return
        try:
            verify(pl_module, trainer.optimizers[0], self.asked)
        except RateMismatchError as error:
            watch = watch_rates(pl_module, trainer.optimizers[0])
            why = watch.why(unwrapped(trainer.optimizers[0])) if watch is not None else None
            if any(isinstance(callback, LearningRateFinder) for callback in trainer.callbacks):
                why = "LearningRateFinder gives every group one rate; leave it out, or have update_attr=False"
            if why is None:
                raise
            raise RateMismatchError(f"{error}; {why}") from None

    def _check_resume(self, trainer: Any) -> None:
        if self._loaded is not None and self._rates is not None:
            (saved, states), self._loaded = self._loaded, None
            where = str(trainer.ckpt_path or "the checkpoint")
            check_record(
                saved, self._rates, where, LOOP_WAY, auto=bool(self._autos), roles=self._record["roles"],
                shapes=self._record["shapes"],
            )  # fmt: skip
            states = states if isinstance(states, list) else [state for state in (states,) if state is not None]
            if len(states) != len(self._autos):
                raise ResumeMismatchError(
                    f"{where} has {'no' if not states else len(states)} state of its automatic rates, and this run has "
                    f"{len(self._autos)}, so they cannot go on; resume from another checkpoint, {LOOP_WAY}"
                )
            for auto, state in zip(self._autos, states, strict=True):
                auto.load_state_dict(state)


def _keep_ratio_in_swa(trainer: Any, optimizer: Any) -> None:
    """Has `StochasticWeightAveraging`, which gives one rate to all groups, take its rate as A's."""
    groups = optimizer.param_groups
    of_a = base_rate(groups[reference_group(group_labels(groups))])
    for callback in trainer.callbacks:
        if isinstance(callback, StochasticWeightAveraging) and isinstance(callback._swa_lrs, float) and of_a:
            callback._swa_lrs = [callback._swa_lrs * (base_rate(group) or 0.0) / of_a for group in groups]
