"""The proof that every stack ends with: rates verified once the optimizer stands, and one line in the log."""

from __future__ import annotations

import logging

import torch
from torch import nn

from loraplus.existing_groups import Groups
from loraplus.groups import RateTable, explain, verify
from loraplus.rates import Rates

logger = logging.getLogger("loraplus.proof")  # a script's; commands tell the rates at their end


def prove(
    model: nn.Module, optimizer: torch.optim.Optimizer, rates: Rates, *, groups: Groups | None = None
) -> RateTable:
    """Verifies the rates of an optimizer that somebody has just built, and logs them in one line.

    Args:
        model: whose parameters have roles.
        optimizer: as the trainer will use it.
        rates: that it should have.
        groups: the groups that it had before they were split; each parameter's η_A is then its group's lr.

    Returns:
        The table of `verify`; that of `explain` where the optimizer leaves out parameters that are no factors, which
        `verify` would refuse, and which the line names.

    Raises:
        RateMismatchError: as `verify`.
    """
    table = explain(model, optimizer)
    missing = [entry.name for entry in table.entries if entry.lr is None]
    if not missing:
        table = verify(model, optimizer, rates, groups=groups)
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        logger.info(line(table))
    return table


def line(table: RateTable) -> str:
    """A table in one line.

    Example:
        >>> from loraplus.groups import ParameterRate
        >>> line(RateTable((ParameterRate("q.lora_A", "lora_A", "lora_A", 2e-4, 2e-4, 0.0, 64),)))
        'LoRA+ verified: lora_A at 0.0002 (1 tensor)'
    """
    tensors: dict[tuple[str, float], int] = {}
    for entry in table.entries:
        if entry.base_lr is not None:
            key = entry.role, entry.base_lr
            tensors[key] = tensors.get(key, 0) + 1
    parts = [f"{role} at {lr:.4g} ({count} tensor{'s' * (count > 1)})" for (role, lr), count in tensors.items()]
    missing = [entry.name for entry in table.entries if entry.lr is None]
    verified = "LoRA+ verified: " + ", ".join(parts)
    return verified if not missing else f"{verified}; in no group: {len(missing)} (first: {missing[0]})"
