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
| riemannian | PEFT's `create_riemannian_optimizer` over AdamW | 3e-4, as PEFT's examples |
| muon | torch's Muon on A and B | 1e-3, its default, scaled to AdamW's size; no decay |

A new head learns at 2e-3 (AdamW) in all of them but the two Prodigies. The setting's own optimizer, where it is not
AdamW, is replaced in all of them but `auto`; its betas stay.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from rates_problems import Problem
from rates_settings import Setting
from rates_training import Method, fixed

import loraplus
from loraplus.auto import AutoRates, Rule
from loraplus.movement import adapted_layers, factors
from loraplus.reproduce.small_training import LR_HEAD
from loraplus.tasks.methods import tied_rate

USUAL, TRL_SFT, TRL_DPO = 3e-4, 2e-4, 5e-6
Optimizers = list[torch.optim.Optimizer]


def automatic(rule: Rule | None = None, seen: list[AutoRates] | None = None) -> Method:
    """Both rates set while training; what set them is put into `seen`."""

    def method(problem: Problem, setting: Setting) -> Optimizers:
        optimizers = fixed(1.0, 1.0)(problem, setting)
        rates = AutoRates(problem.model, optimizers[0], rule=rule)
        if seen is not None:
            seen.append(rates)
        return optimizers

    return method


def adamw(problem: Problem, setting: Setting, lr: float, lr_ratio: float = 1.0) -> Optimizers:
    """AdamW at this rate."""
    head = LR_HEAD if problem.has_head else None
    return [loraplus.create_optimizer(
        problem.model, torch.optim.AdamW, lr=lr, lr_ratio=lr_ratio, lr_head=head, weight_decay=setting.weight_decay,
        betas=setting.betas,
    )]  # fmt: skip


def trl(problem: Problem, setting: Setting) -> Optimizers:
    """TRL's examples."""
    return adamw(problem, setting, TRL_DPO if setting.task.startswith("preference") else TRL_SFT)


def tinker(problem: Problem, setting: Setting) -> Optimizers:
    """The cookbook's formula, at the width of the adapted layers' inputs."""
    width = min(entry.weights[0].shape[1] for entry in adapted_layers(problem.model))
    return adamw(problem, setting, 5e-5 * 10 * (2000 / width) ** 0.781)


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
    """AdamW over what is no factor: the head, magnitudes."""
    known = {id(weight) for weight in factors(adapted_layers(problem.model))}
    rest = [p for p in problem.model.parameters() if p.requires_grad and id(p) not in known]
    return [torch.optim.AdamW(rest, lr=LR_HEAD, betas=setting.betas, weight_decay=setting.weight_decay)] if rest else []


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
    """PEFT's; the head has a group of its own."""
    from peft.optimizers import create_riemannian_optimizer

    optimizer = create_riemannian_optimizer(
        problem.model, torch.optim.AdamW, lr=lr, betas=setting.betas, weight_decay=setting.weight_decay
    )
    known = {id(weight) for weight in factors(adapted_layers(problem.model))}
    (group,) = optimizer.param_groups
    rest = [p for p in group["params"] if id(p) not in known]
    if rest:
        group["params"] = [p for p in group["params"] if id(p) in known]
        optimizer.add_param_group({"params": rest, "lr": LR_HEAD})
    return [optimizer]


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
