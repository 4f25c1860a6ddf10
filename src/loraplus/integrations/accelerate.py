"""LoRA+ in a loop with Accelerate: rates in every `save_state`, refused by `load_state` if they differ, and logged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from loraplus.integrations.checkpoints import (
    LOOP_WAY,
    auto_rates,
    check_resume,
    rates_in_use,
    rates_record,
    write_rates,
)
from loraplus.integrations.deepspeed import check_plugin
from loraplus.integrations.pytorch import rates_for_log
from loraplus.rates import Rates


def register_rates(accelerator: Any, model: nn.Module, optimizer: torch.optim.Optimizer) -> Rates:
    """Records the rates in every `accelerator.save_state`, and has `load_state` refuse a run at others.

    Call it after `accelerator.prepare` (and after `AutoRates`, whose state is then part of the checkpoint).

    Args:
        accelerator: an `accelerate.Accelerator`.
        model: the prepared model.
        optimizer: the prepared optimizer.

    Returns:
        The rates as found in the optimizer.

    Raises:
        TrainerSetupError: a DeepSpeed configuration that would take the rates over.
        ResumeMismatchError: from `load_state`, before anything is loaded.

    Example:
        >>> optimizer = loraplus.create_optimizer(model, lr=2e-4, lr_ratio=16)  # doctest: +SKIP
        >>> model, optimizer, loader = accelerator.prepare(model, optimizer, loader)  # doctest: +SKIP
        >>> register_rates(accelerator, model, optimizer)  # doctest: +SKIP
    """
    check_plugin(accelerator)
    rates, auto = rates_in_use(model, optimizer), auto_rates(optimizer)
    record = rates_record(rates, model, auto)

    def save(models: Any, weights: Any, output_dir: str) -> None:
        if accelerator.is_main_process:
            write_rates(Path(output_dir), record, auto)

    def load(models: Any, input_dir: str) -> None:
        check_resume(Path(input_dir), rates, auto=auto is not None, instead=LOOP_WAY)

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)
    if auto is not None:
        accelerator.register_for_checkpointing(auto)
    return rates


def log_rates(accelerator: Any, optimizer: torch.optim.Optimizer, step: int) -> dict[str, float]:
    """Sends `lr/lora_A`, `lr/lora_B`, … to the accelerator's trackers; call it before the scheduler's step.

    Args:
        accelerator: an `accelerate.Accelerator`.
        optimizer: the prepared optimizer.
        step: the optimizer step that the rates belong to.

    Returns:
        What was logged.

    Example:
        >>> log_rates(accelerator, optimizer, step)  # doctest: +SKIP
    """
    rates = rates_for_log(optimizer)
    accelerator.log(rates, step=step)
    return rates
