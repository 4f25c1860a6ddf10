"""LoRA+ through `optimizer_cls_and_kwargs`, for trainers that a configuration builds and nobody can `attach` to.

transformers' Trainer calls `Factory()(model, **kwargs)` for a class that is no optimizer. Of TRL's trainers SFTTrainer
and RewardTrainer pass the argument on; with the others use `loraplus.attach`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from loraplus.integrations.checkpoints import auto_rates, rates_in_use, rates_record, write_rates
from loraplus.integrations.pytorch import guard_resume, rates_for_log
from loraplus.notices import renamed
from loraplus.optimizer import create_optimizer
from loraplus.rate_keywords import takes_rates
from loraplus.rates import Rates
from loraplus.watching.watch import watch_rates


class LoraPlusOptimizer:
    """Builds the optimizer of a Trainer, and has it refuse the state of a run at another ratio.

    η_A = lr, η_B = loraplus_lr_ratio·lr

    The keyword arguments of a call are what stands in `optimizer_cls_and_kwargs`:

    Args:
        model: given by Trainer.
        optimizer_cls: the optimizer class.
        rates: a `Rates`, or its fields: `lr`, since Trainer does not pass its `learning_rate` on, and all others as
            `loraplus_lr_ratio`, `loraplus_lr_head`, …
        **optimizer_kwargs: passed on to `create_optimizer` (weight_decay, betas, eps, …).

    Returns:
        An instance of `optimizer_cls`.

    Raises:
        The errors of `loraplus.param_groups`; ResumeMismatchError when Trainer loads a checkpoint of another ratio.

    Example:
        >>> how = (LoraPlusOptimizer, {"lr": 2e-4, "loraplus_lr_ratio": 16, "weight_decay": 0.01})
        >>> more = {"optimizer_cls_and_kwargs": how, "callbacks": [LoraPlusCallback()]}
        >>> trainer = Trainer(model, args, **more)  # doctest: +SKIP

    Source: transformers, `Trainer.create_optimizer` (5.24).
    """

    @takes_rates(needed=["lr"], prefix="loraplus_")
    def __call__(
        self,
        model: nn.Module,
        *,
        rates: Rates,
        optimizer_cls: type[torch.optim.Optimizer] = torch.optim.AdamW,
        **optimizer_kwargs: Any,
    ) -> torch.optim.Optimizer:
        optimizer = create_optimizer(model, optimizer_cls, rates, **optimizer_kwargs)
        guard_resume(optimizer)
        return optimizer


class LoraPlusCallback(TrainerCallback):
    """Logs every group's rate by name, and writes the rates and roles into each checkpoint.

    `loraplus.attach` does both by itself; this is for `LoraPlusOptimizer` and other optimizers with named groups.

    Example:
        >>> trainer.add_callback(LoraPlusCallback())  # doctest: +SKIP
    """

    def __init__(self) -> None:
        self._rates: dict[str, float] = {}
        self._record: dict[str, Any] | None = None

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_: Any
    ) -> None:
        """Makes the record, which holds for what is merged or frozen later, too."""
        self._record = rates_record(rates_in_use(model, optimizer), model, auto_rates(optimizer, model))
        watch_rates(model, optimizer)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        """Reads the rates that the step is taken with."""
        self._rates = rates_for_log(optimizer)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Adds them where the trainer logs its learning rate."""
        if logs is not None and "learning_rate" in logs:
            logs.update(self._rates)
            state.log_history[-1].update(self._rates)  # a copy, made before callbacks are asked

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_: Any) -> None:
        """Writes loraplus.json into the checkpoint just saved."""
        if state.is_world_process_zero and self._record is not None:
            write_rates(
                Path(args.output_dir) / f"checkpoint-{state.global_step}", self._record, auto_rates(optimizer, model)
            )


def __getattr__(name: str) -> Any:
    return globals()[renamed(__name__, name, {"RatesCallback": "LoraPlusCallback"})]
