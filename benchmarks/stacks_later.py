"""Cases of the scoreboard after an optimizer has been built: what flattens its ratio, and what it is resumed from.

Each is a plain loop with AdamW. Right is a ratio that holds, refused an error before a step at another ratio, warned a
warning that names what did it; a run that goes on otherwise in silence is wrong.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from peft.optimizers import create_loraplus_optimizer as peft_optimizer
from stacks_cases import adapted
from torch import nn
from torch.optim import lr_scheduler as schedulers

import loraplus
from loraplus.integrations.pytorch import guard_resume

LR, RATIO, STEPS = 1e-3, 16.0, 8
Outcome = tuple[str, str]
Factory = Callable[[torch.optim.Optimizer], Any]


def made(who: str, *models: nn.Module, ratios: tuple[float, ...] = (RATIO,)) -> torch.optim.Optimizer:
    """One optimizer over all models, with loraplus' guard if it is loraplus'."""
    if who == "PEFT":
        each = [
            peft_optimizer(model, torch.optim.AdamW, lr=LR, loraplus_lr_ratio=ratio)  # type: ignore[arg-type]
            for model, ratio in zip(models, ratios, strict=True)
        ]
        if len(each) == 1:
            return each[0]
        groups = [group for own in each for group in own.param_groups if group["params"]]
        return torch.optim.AdamW([{"params": group["params"], "lr": group["lr"]} for group in groups])
    if len(models) == 1:
        optimizer = loraplus.create_optimizer(models[0], torch.optim.AdamW, lr=LR, lr_ratio=ratios[0])
    else:
        pairs = zip(models, ratios, strict=True)
        optimizer = torch.optim.AdamW([g for model, ratio in pairs for g in loraplus.param_groups(model, LR, ratio)])
    guard_resume(optimizer)
    return optimizer


def ratio_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    """The least rate of a B over the greatest of an A, by names that are the same for both."""
    rates = {id(p): float(group["lr"]) for group in optimizer.param_groups for p in group["params"]}
    trained = [(name, rates[id(p)]) for name, p in model.named_parameters() if id(p) in rates]
    a, b = ([rate for name, rate in trained if part in name] for part in ("lora_A", "lora_B"))
    return min(b) / max(a)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, after: Callable[[int], None] = lambda _: None) -> None:
    for step in range(STEPS):
        model(input_ids=torch.arange(32).reshape(4, 8), labels=torch.tensor([0, 1, 0, 1])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        after(step)


def flattened(make_scheduler: Factory | None) -> Callable[[str], Outcome]:
    def judge(who: str) -> Outcome:
        model = adapted()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer = made(who, model)
            scheduler = make_scheduler(optimizer) if make_scheduler else None

            def after(step: int) -> None:
                if isinstance(scheduler, schedulers.ReduceLROnPlateau):
                    scheduler.step(1.0)
                elif scheduler is not None:
                    scheduler.step()
                elif step == 2:
                    for group in optimizer.param_groups:
                        group["lr"] = LR / 2

            steps(model, optimizer, after)
        ratio = ratio_of(model, optimizer)
        told = [str(entry.message) for entry in caught if issubclass(entry.category, loraplus.LoraPlusWarning)]
        if abs(ratio / RATIO - 1) < 1e-3:
            return "right", f"ratio {ratio:g}"
        return ("warned", told[0]) if told else ("wrong", f"goes on at ratio {ratio:.3g}, silently")

    return judge


def other_layers(who: str) -> Outcome:
    """The optimizer's state of adapters on query and value, loaded where they are on query and key."""
    old, new = adapted(), adapted(target_modules=["query", "key"])
    first, second = made(who, old), made(who, new)
    steps(old, first)
    try:
        second.load_state_dict(copy.deepcopy(first.state_dict()))
    except loraplus.ResumeMismatchError as error:
        return "refused", f"ResumeMismatchError: {error}"
    return "wrong", "value's moments are given to key, silently"


def two_models(who: str) -> Outcome:
    """Two models in one optimizer, resumed with another ratio for the second."""
    models = adapted(), adapted()
    state = made(who, *models, ratios=(16.0, 4.0)).state_dict()
    optimizer = made(who, *models, ratios=(16.0, 2.0))
    try:
        optimizer.load_state_dict(state)
    except loraplus.ResumeMismatchError as error:
        return "refused", f"ResumeMismatchError: {error}"
    ratio = ratio_of(models[1], optimizer)
    return ("right" if ratio == 2 else "wrong"), f"the second model goes on at ratio {ratio:g}, silently"


LATER: dict[str, Callable[[str], Outcome]] = {
    "OneCycleLR with one max_lr": flattened(lambda optimizer: schedulers.OneCycleLR(optimizer, LR, total_steps=20)),
    "ReduceLROnPlateau with one min_lr": flattened(
        lambda optimizer: schedulers.ReduceLROnPlateau(optimizer, patience=0, min_lr=LR / 2)
    ),
    "CosineAnnealingLR with an eta_min": flattened(
        lambda optimizer: schedulers.CosineAnnealingLR(optimizer, STEPS, eta_min=LR / 10)
    ),
    "CyclicLR with one base_lr and max_lr": flattened(
        lambda optimizer: schedulers.CyclicLR(optimizer, LR / 10, LR, step_size_up=4, cycle_momentum=False)
    ),
    "a rate written into all groups by hand": flattened(None),
    "resuming from a checkpoint of other layers": other_layers,
    "two models in one optimizer, resumed under another ratio": two_models,
}
