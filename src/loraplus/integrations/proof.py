"""The proof that every stack ends with: rates verified once the optimizer stands, and one line in the log."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from loraplus.existing_groups import Groups
from loraplus.groups import RateTable, explain, verify
from loraplus.rates import Rates

LOGGER = "loraplus.proof"
"""Of a script; commands tell the rates at their end."""


def prove(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    rates: Rates,
    *,
    groups: Groups | None = None,
    told_by: str = LOGGER,
) -> RateTable:
    """Verifies the rates of an optimizer that somebody has just built, and logs them in one line.

    Args:
        model: whose parameters have roles.
        optimizer: as the trainer will use it.
        rates: that it should have.
        groups: the groups that it had before they were split; each parameter's η_A is then its group's lr.
        told_by: the logger; frameworks show what their own say, and nothing else below a warning.

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
        logging.getLogger(told_by).info(line(table))
    return table


def rates_in_words(groups: Iterable[Mapping[str, Any]]) -> str:
    """What learns at which rate.

    Args:
        groups: role, base_lr, tensors of each, as `RateTable.groups` has them; those without a rate are left out.

    Example:
        >>> rates_in_words([{"role": "lora_A", "base_lr": 2e-4, "tensors": 1}])
        'lora_A at 0.0002 (1 tensor)'
    """
    tensors: Counter[tuple[str, float]] = Counter()
    for group in groups:
        if group["base_lr"] is not None:
            tensors[group["role"], group["base_lr"]] += group["tensors"]
    return ", ".join(f"{role} at {lr:.4g} ({n} tensor{'s' * (n > 1)})" for (role, lr), n in tensors.items())


def line(table: RateTable) -> str:
    """A table in one line.

    Example:
        >>> from loraplus.groups import ParameterRate
        >>> line(RateTable((ParameterRate("q.lora_A", "lora_A", "lora_A", 2e-4, 2e-4, 0.0, 64),)))
        'LoRA+ verified: lora_A at 0.0002 (1 tensor)'
    """
    missing = [entry.name for entry in table.entries if entry.lr is None]
    verified = "LoRA+ verified: " + rates_in_words(table.groups())
    return verified if not missing else f"{verified}; in no group: {len(missing)} (first: {missing[0]})"
