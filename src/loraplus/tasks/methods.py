"""How the arms of a comparison train: the rates, the optimizer and the schedule of one run.

Every function takes (config, lr, lr_ratio, model, steps) and returns a `Method`. Methods that set their own rates take
no notice of lr and lr_ratio. The head learns at `--lr-head` in all of them but Prodigy, which estimates its rate, too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from loraplus.parts import Role
from loraplus.rates import Rates
from loraplus.tasks.checks import rates_of
from loraplus.tasks.config import DEFAULT_LR, TaskConfig

if TYPE_CHECKING:
    import torch
    from torch import nn

# n, r and s = α/r where the maximal-update rule gives DEFAULT_LR: BERT's width at the default rank and α.
REFERENCE_WIDTH, REFERENCE_RANK, REFERENCE_SCALING = 768, 8, 16.0 / 8


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


def maximal_update(config: TaskConfig, lr: float, lr_ratio: float, model: nn.Module, steps: int) -> Method:
    """AdamW at the one rate of `tied_rate` for A and B."""
    return Method(rates_of(config, tied_rate(model)))


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


def tied_rate(model: nn.Module) -> float:
    r"""One rate for A and B by the maximal-update argument.

    A is random and B zero. In a step of Adam at rate η every entry moves by η: those of B by η, and A x, a sum over
    the n inputs, by n·η. So through B the step of A moves the output s·B A x by s·r·n·η², a sum over the rank r. For
    this to be the same in all models,

        η = c / √(n·r·s),      s = α/r, or α/√r for rsLoRA

    which does not hang on the rank for s = α/r with constant α, and falls as 1/√r for α = r. c is such that the rate
    is 3e-4, the usual one, at n = 768, r = 8 and α = 16.

    Args:
        model: a PEFT model; n·r·s is the geometric mean over its adapted layers (of different widths, say).

    Raises:
        NoLoraFactorsError: no layer has a trainable A and B.

    Source: derived here. The two regimes are those that the abstract of arXiv 2602.06204 (μA) states; the paper's own
    table of exponents could not be consulted, so its prescription may differ in what the abstract leaves open.
    """
    from loraplus.movement import adapted_layers

    sizes = [layer.weights[0].numel() * layer.scaling for layer in adapted_layers(model)]  # A has n·r entries
    mean = math.exp(fmean(math.log(size) for size in sizes))
    return DEFAULT_LR * math.sqrt(REFERENCE_WIDTH * REFERENCE_RANK * REFERENCE_SCALING / mean)


def rates_arrived_at(optimizer: torch.optim.Optimizer) -> tuple[float, float] | None:
    """(η_A, η_B) of an optimizer by now, without the schedule. None if they are no numbers."""
    from loraplus.groups import rate_of_group

    rates = {}
    for group in optimizer.param_groups:
        rate = rate_of_group(optimizer, group, base=True) or 0.0
        rates[group["name"].removesuffix("_no_decay")] = rate * group.get("d", 1.0)  # d is Prodigy's estimate
    lr_a, lr_b = float(rates.get(Role.A.value, math.nan)), float(rates.get(Role.B.value, math.nan))
    return (lr_a, lr_b) if math.isfinite(lr_a) and math.isfinite(lr_b) else None
