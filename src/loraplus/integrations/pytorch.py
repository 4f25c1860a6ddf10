"""LoRA+ in a training loop of your own: every group's rate for the log, and a guard on loading a checkpoint."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from loraplus.errors import LoraPlusWarning, ResumeMismatchError
from loraplus.groups import rate_of_group
from loraplus.integrations.checkpoints import LOOP_WAY
from loraplus.roles import Role

_RELATIVE_TOLERANCE = 1e-6


def rates_for_log(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Every group's rate at this moment, under the names that all stacks log: `lr/lora_A`, `lr/lora_B`, …

    Args:
        optimizer: with named groups, wrapped or not.

    Returns:
        {"lr/<group>": rate}; call it before the scheduler moves on for the rates of the step just taken.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> rates_for_log(torch.optim.SGD([{"params": [weight], "name": "lora_B", "lr": 0.016}]))
        {'lr/lora_B': 0.016}
    """
    return {
        f"lr/{group.get('name', f'group {index}')}": rate_of_group(optimizer, group) or 0.0
        for index, group in enumerate(optimizer.param_groups)
    }


def guard_resume(optimizer: torch.optim.Optimizer) -> RemovableHandle:
    """Makes `optimizer.load_state_dict` refuse a state that was trained at another ratio or another lr.

    torch takes the rates of the state that it loads, so a run resumed under others would go on at the old ones. Where
    no scheduler notes the base rates, another lr may be another point of a schedule set by hand: that is a warning.

    Args:
        optimizer: with named groups, as `loraplus.create_optimizer` makes them.

    Returns:
        A handle whose `.remove()` takes the guard off.

    Raises:
        ResumeMismatchError: from `load_state_dict`; groups of other names, or at other rates.

    Example:
        >>> optimizer = loraplus.create_optimizer(model, lr=2e-4, lr_ratio=16)  # doctest: +SKIP
        >>> guard_resume(optimizer)  # doctest: +SKIP
        >>> optimizer.load_state_dict(checkpoint["optimizer"])  # doctest: +SKIP
    """
    return optimizer.register_load_state_dict_pre_hook(_refuse_other_rates)


def _refuse_other_rates(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    now, saved = _base_rates(optimizer.param_groups), _base_rates(state["param_groups"])
    if list(now) != list(saved):
        raise ResumeMismatchError(
            f"the checkpoint's optimizer has the groups {', '.join(saved)}, this run's has {', '.join(now)}; resume "
            f"with the settings that it was trained with, {LOOP_WAY}"
        )
    lr, old_lr = _rate_of_a(now), _rate_of_a(saved)
    if not (lr and old_lr):  # in a warm-up set by hand, without initial_lr: a rate of 0 says nothing of the ratio
        return
    for name in now:
        factor, old_factor = now[name] / lr, saved[name] / old_lr
        if not math.isclose(factor, old_factor, rel_tol=_RELATIVE_TOLERANCE):
            raise ResumeMismatchError(
                f"the checkpoint was trained with {name} at {old_factor:.6g} times A's rate, this run asks for "
                f"{factor:.6g}; resume with {old_factor:.6g}, {LOOP_WAY}"
            )
    if not math.isclose(lr, old_lr, rel_tol=_RELATIVE_TOLERANCE):
        if all("initial_lr" in group for group in state["param_groups"]):
            raise ResumeMismatchError(
                f"the checkpoint was trained with lr = {old_lr:.6g}, this run asks for {lr:.6g}; resume with "
                f"lr = {old_lr:.6g}, {LOOP_WAY}"
            )
        warnings.warn(
            f"the checkpoint stood at lr = {old_lr:.6g}, this run at {lr:.6g}: unless your loop sets the rate at every "
            f"step, it goes on at {old_lr:.6g}",
            LoraPlusWarning,
            stacklevel=4,
        )


def _base_rates(groups: list[dict[str, Any]]) -> dict[str, float]:
    return {
        str(group.get("name", f"group {index}")): float(group.get("initial_lr", group["lr"]))
        for index, group in enumerate(groups)
    }


def _rate_of_a(rates: Mapping[str, float]) -> float:
    return next((rate for name, rate in rates.items() if name.startswith(Role.A)), next(iter(rates.values())))
