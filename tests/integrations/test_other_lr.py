"""Going on at another lr is refused everywhere in the same words: torch would restore the old rates."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import tiny_bert
from peft import LoraConfig, get_peft_model
from torch.optim.lr_scheduler import LambdaLR

import loraplus
from loraplus.errors import LoraPlusWarning, ResumeMismatchError
from loraplus.integrations.checkpoints import LOOP_WAY, check_record, rates_in_use, rates_record
from loraplus.integrations.pytorch import guard_resume

REFUSED = r"lr = 0\.001, this run asks for 0\.0005; resume with lr = 0\.001"
HEAD = {"modules_to_save": ["classifier"]}


def model_with(**lora: object) -> torch.nn.Module:
    return get_peft_model(tiny_bert(), LoraConfig(r=4, target_modules=["query", "value"], **lora))


def check(saved: dict, rates: loraplus.Rates, **more: bool) -> None:
    check_record(saved, rates, "the checkpoint", LOOP_WAY, **more)


@pytest.mark.parametrize("lora", [{}, HEAD, {"use_dora": True}, {"bias": "lora_only"}])
def test_another_lr_is_refused_by_its_name_whatever_else_is_trained(lora):
    model = model_with(**lora)
    old, new = (loraplus.create_optimizer(model, torch.optim.AdamW, lr=lr, lr_ratio=16) for lr in (1e-3, 5e-4))
    saved = rates_record(rates_in_use(model, old), model)
    check(saved, rates_in_use(model, old))
    with pytest.raises(ResumeMismatchError, match=REFUSED):
        check(saved, rates_in_use(model, new))


def test_the_rounding_of_a_rate_kept_in_single_precision_passes():
    model = model_with()
    saved = rates_record(loraplus.Rates(float(torch.tensor(1e-3)), 16.0), model)
    check(saved, loraplus.Rates(1e-3, 16.0))
    with pytest.raises(ResumeMismatchError, match="lr = "):
        check(saved, loraplus.Rates(1.00001e-3, 16.0))


@pytest.mark.parametrize(
    ("lora", "own", "learns_at_lr"),
    [
        ({}, {}, False),  # A and B alone: their rates are measured
        (HEAD, {}, True),
        (HEAD, {"lr_head": 5e-3}, False),
        ({"use_dora": True}, {}, True),
        ({"use_dora": True}, {"lr_magnitude": 5e-3}, False),
        ({"bias": "lora_only", **HEAD}, {"lr_head": 5e-3}, True),  # the biases
    ],
)
def test_with_automatic_rates_lr_must_match_where_a_parameter_learns_at_it(lora, own, learns_at_lr):
    model = model_with(**lora)
    saved = {**rates_record(loraplus.Rates(1e-3, 1.0, **own), model), "auto": {}}
    again, other = loraplus.Rates(1e-3, 1.0, **own), loraplus.Rates(5e-4, 1.0, **own)
    check(saved, again, auto=True)
    if learns_at_lr:
        with pytest.raises(ResumeMismatchError, match=REFUSED):
            check(saved, other, auto=True)
    else:
        check(saved, other, auto=True)


def optimizer_at(lr: float, scheduled: bool) -> torch.optim.Optimizer:
    optimizer = loraplus.create_optimizer(model_with(), torch.optim.AdamW, lr=lr, lr_ratio=16)
    if scheduled:
        LambdaLR(optimizer, lambda step: 1 / (step + 1))
    guard_resume(optimizer)
    return optimizer


@pytest.mark.parametrize("scheduler_first", [False, True])
def test_a_loop_with_a_scheduler_is_refused_another_lr(scheduler_first):
    state = copy.deepcopy(optimizer_at(1e-3, scheduled=True).state_dict())
    with pytest.raises(ResumeMismatchError, match=REFUSED):
        optimizer_at(5e-4, scheduler_first).load_state_dict(state)
    optimizer_at(1e-3, scheduler_first).load_state_dict(state)


def test_a_loop_without_a_scheduler_is_told_at_which_lr_it_goes_on():
    state = copy.deepcopy(optimizer_at(1e-3, scheduled=False).state_dict())
    optimizer = optimizer_at(5e-4, scheduled=False)
    with pytest.warns(LoraPlusWarning, match=r"stood at lr = 0\.001, this run at 0\.0005: .* goes on at 0\.001"):
        optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] == 1e-3
