"""How the arms of a comparison train: the rates, the optimizer and the schedule of one run.

Every function takes (config, lr, lr_ratio, model, steps) and returns a `Method`. Methods that set their own rates take
no notice of lr and lr_ratio. The head learns at `--lr-head` in all of them but Prodigy, which estimates its rate, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loraplus.parts import Role
from loraplus.rates import Rates
from loraplus.tasks.checks import rates_of
from loraplus.tasks.config import DEFAULT_LR, TaskConfig

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class Method:
    """What trains a run.

    Args:
        rates: that the groups are built with.
        auto: `AutoRates` sets η_A and η_B.
        optimizer: class and further options; lr and weight decay come with the groups. Default: AdamW.
        own_schedule: the optimizer warms up and settles by itself, so the scheduler leaves the rates alone.
    """

    rates: Rates
    auto: bool = False
    optimizer: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None
    own_schedule: bool = False


def adamw(config: TaskConfig, lr: float, lr_ratio: float, model: nn.Module, steps: int) -> Method:
    """AdamW with η_A = lr and η_B = lr_ratio·lr: LoRA at ratio 1, else LoRA+."""
    return Method(rates_of(config, lr, lr_ratio))


def automatic(config: TaskConfig, lr: float, lr_ratio: float, model: nn.Module, steps: int) -> Method:
    """AdamW with the rates of `AutoRates`."""
    return Method(rates_of(config, DEFAULT_LR), auto=True)


def variant(name: str) -> Callable[..., Method]:
    """The method of `loraplus.variants` with this name: AdamW at the rate that it computes, or its own steps at lr."""

    def method(config: TaskConfig, lr: float, lr_ratio: float, model: nn.Module, steps: int) -> Method:
        from loraplus.variants import ALL

        made = ALL[name].load()
        if ALL[name].lr is None:
            return Method(rates_of(config, made(model)))
        return Method(rates_of(config, lr), optimizer=(made, {}))

    return method


def prodigy(config: TaskConfig, lr: float, lr_ratio: float, model: nn.Module, steps: int) -> Method:
    """Prodigy with estimates of their own for A, B and head, and its option for runs with a warm-up.

    Its bias correction stays off, as is its default: with it the estimates of a short run hardly leave their start.
    """
    from loraplus.tasks.prodigy import SplitProdigy

    return Method(Rates(1.0, 1.0), optimizer=(SplitProdigy, {"safeguard_warmup": True}))


def schedule_free(config: TaskConfig, lr: float, lr_ratio: float, model: nn.Module, steps: int) -> Method:
    """Schedule-free AdamW (Defazio et al., arXiv 2405.15682) with LoRA+ groups: a constant rate after a warm-up.

    The weights that are evaluated are a running average of those that are trained; Trainer tells the optimizer which
    of the two to put into the model (`optimizer.train()` before every step, `optimizer.eval()` before evaluation).
    """
    from schedulefree import AdamWScheduleFree

    options = {"warmup_steps": math.ceil(steps * config.warmup_ratio)}
    return Method(rates_of(config, lr, lr_ratio), optimizer=(AdamWScheduleFree, options), own_schedule=True)


def rates_arrived_at(optimizer: torch.optim.Optimizer) -> tuple[float, float] | None:
    """(η_A, η_B) of an optimizer by now, without the schedule. None if they are no numbers."""
    from loraplus.groups import rate_of_group

    rates = {}
    for group in optimizer.param_groups:
        rate = rate_of_group(optimizer, group, base=True) or 0.0
        rates[group["name"].removesuffix("_no_decay")] = rate * group.get("d", 1.0)  # d is Prodigy's estimate
    lr_a, lr_b = float(rates.get(Role.A.value, math.nan)), float(rates.get(Role.B.value, math.nan))
    return (lr_a, lr_b) if math.isfinite(lr_a) and math.isfinite(lr_b) else None
