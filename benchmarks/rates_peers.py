"""Methods that need no search, each at the one rate that its documentation gives.

| name | what | rate and its source |
|---|---|---|
| auto | `loraplus.AutoRates` | none to give |
| peft | AdamW | 3e-4, PEFT's example of sequence classification |
| peft-loraplus | `create_loraplus_optimizer` | 5e-5 and λ = 16, the example in PEFT's documentation |
| trl | AdamW | TRL's examples with LoRA: 2e-4 for SFT, 5e-6 for DPO |
| tinker | AdamW | 5e-5·10·(2000/hidden)^0.781, tinker's cookbook for Llama models |
| mua | AdamW | `tied_rate`: falls with width, rank and s as μA has it |
| prodigy | Prodigy with an estimate each for A, B and the head | lr 1 |
| prodigy-schedulefree | prodigy-plus-schedule-free, an estimate a group | lr 1, no schedule |
| lora-rite | arXiv 2410.20625, as in pytorch_optimizer | 1e-3, its default there |
| riemannian | PEFT's `create_riemannian_optimizer` over AdamW | 3e-4, our choice; its page has none |
| muon | torch's Muon on A and B | 1e-3, its default, scaled to AdamW's size; no decay |

A new head learns at 2e-3 and DoRA's magnitudes at 3e-4 (AdamW) in all of them but the two Prodigies. The setting's own
optimizer, where it is not AdamW, is replaced in all of them but `auto`, so the tables leave such settings out of the
comparison with peers; its betas stay. prodigy-schedulefree needs the package prodigy-plus-schedule-free.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from rates_problems import Problem
from rates_settings import Setting
from rates_training import Method, beside, fixed

import loraplus
from loraplus.auto import AutoRates, Rule
from loraplus.roles import Role, trainable_parameters
from loraplus.steps.movement import adapted_layers, factors
from loraplus.variants.maximal_update import tied_rate
from loraplus.variants.width_rate import width_rate

USUAL, TRL_SFT, TRL_DPO = 3e-4, 2e-4, 5e-6
Optimizers = list[torch.optim.Optimizer]


def automatic(rule: Rule | None = None, seen: list[AutoRates] | None = None) -> Method:
    """Both rates set while training; what set them is put into `seen`."""

    def method(problem: Problem, setting: Setting) -> Optimizers:
        (optimizer,) = fixed("auto")(problem, setting)
        rates: AutoRates = optimizer.loraplus_auto  # type: ignore[attr-defined]
        if rule is not None:
            rates = AutoRates(problem.model, optimizer, rule=rule)
        if seen is not None:
            seen.append(rates)
        return [optimizer]

    return method


def adamw(problem: Problem, setting: Setting, lr: float, lr_ratio: float = 1.0) -> Optimizers:
    """AdamW at this rate."""
    optimizer = loraplus.create_optimizer(
        problem.model, torch.optim.AdamW, lr=lr, lr_ratio=lr_ratio, weight_decay=setting.weight_decay,
        betas=setting.betas, **beside(problem, setting),
    )  # fmt: skip
    return [optimizer]


def trl(problem: Problem, setting: Setting) -> Optimizers:
    """TRL's examples."""
    return adamw(problem, setting, TRL_DPO if setting.task.startswith("preference") else TRL_SFT)


def tinker(problem: Problem, setting: Setting) -> Optimizers:
    """The cookbook's formula, at the width of the adapted layers' inputs."""
    return adamw(problem, setting, width_rate(problem.model))


def _named_groups(problem: Problem, setting: Setting) -> list[dict[str, Any]]:
    return loraplus.param_groups(problem.model, lr=1.0, lr_ratio=1.0, lr_head=None, weight_decay=setting.weight_decay)


def prodigy(problem: Problem, setting: Setting) -> Optimizers:
    """As the arm of `loraplus compare`."""
    from loraplus.tasks.prodigy import SplitProdigy

    return [SplitProdigy(_named_groups(problem, setting), betas=setting.betas, safeguard_warmup=True)]


def prodigy_schedulefree(problem: Problem, setting: Setting) -> Optimizers:
    """Evaluates averaged weights."""
    from prodigyplus import ProdigyPlusScheduleFree

    optimizer = ProdigyPlusScheduleFree(_named_groups(problem, setting), lr=1.0)
    optimizer.own_schedule = True
    return [optimizer]


def _others(problem: Problem, setting: Setting) -> Optimizers:
    """AdamW over what is no factor, at the rates that it has in all arms."""
    known = {id(weight) for weight in factors(adapted_layers(problem.model))}
    rates = beside(problem, setting)
    groups = [
        {"params": [entry.parameter], "lr": rates["lr_magnitude" if entry.role is Role.MAGNITUDE else "lr_head"]}
        for entry in trainable_parameters(problem.model)
        if id(entry.parameter) not in known
    ]
    return [torch.optim.AdamW(groups, betas=setting.betas, weight_decay=setting.weight_decay)] if groups else []


def lora_rite(problem: Problem, setting: Setting, lr: float = 1e-3) -> Optimizers:
    """B before A: its first factor has the rank in its last dimension."""
    from pytorch_optimizer import LoRARite

    weights = factors(adapted_layers(problem.model))
    pairs = [weight for a, b in _pairs(weights) for weight in (b, a)]
    rite = LoRARite(
        pairs, lr=lr, betas=setting.betas, weight_decay=setting.weight_decay, lora_l_dim=-1, lora_r_dim=0
    )  # fmt: skip
    return [rite, *_others(problem, setting)]


def _pairs(weights: list[torch.nn.Parameter]) -> Iterator[tuple[torch.nn.Parameter, torch.nn.Parameter]]:
    yield from zip(weights[::2], weights[1::2], strict=True)


def riemannian(problem: Problem, setting: Setting, lr: float = USUAL) -> Optimizers:
    """PEFT's, over the factors; what is no factor has an optimizer of its own."""
    from peft.optimizers import create_riemannian_optimizer

    others = _others(problem, setting)
    optimizer = create_riemannian_optimizer(
        problem.model, torch.optim.AdamW, lr=lr, betas=setting.betas, weight_decay=setting.weight_decay
    )
    known = {id(weight) for weight in factors(adapted_layers(problem.model))}
    (group,) = optimizer.param_groups
    group["params"] = [parameter for parameter in group["params"] if id(parameter) in known]
    return [optimizer, *others]


def muon(problem: Problem, setting: Setting, lr: float = 1e-3) -> Optimizers:
    """Orthogonal steps for A and B."""
    weights = factors(adapted_layers(problem.model))
    factors_only = torch.optim.Muon(weights, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    return [factors_only, *_others(problem, setting)]


PEERS: dict[str, Method] = {
    "peft": lambda problem, setting: adamw(problem, setting, USUAL),
    "peft-loraplus": lambda problem, setting: adamw(problem, setting, 5e-5, 16.0),
    "trl": trl,
    "tinker": tinker,
    "mua": lambda problem, setting: adamw(problem, setting, tied_rate(problem.model)),
    "prodigy": prodigy,
    "prodigy-schedulefree": prodigy_schedulefree,
    "lora-rite": lora_rite,
    "riemannian": riemannian,
    "muon": muon,
}

TUNABLE = {"lora-rite": lora_rite, "riemannian": riemannian, "muon": muon}
"""Directions of their own, whose one rate can be searched, too."""
