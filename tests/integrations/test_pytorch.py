"""Loops of one's own: what `guard_resume` refuses, and what it has to let pass."""

from __future__ import annotations

import copy

import pytest
import torch
from test_groups import adapted

import loraplus
from loraplus.errors import ResumeMismatchError
from loraplus.integrations.pytorch import guard_resume


def optimizer_at(factor: float, ratio: float = 16.0) -> torch.optim.Optimizer:
    """With a warm-up set by hand: the rates are multiplied in place, and there is no initial_lr."""
    optimizer = loraplus.create_optimizer(adapted(), torch.optim.AdamW, lr=1e-3, lr_ratio=ratio)
    for group in optimizer.param_groups:
        group["lr"] *= factor
    guard_resume(optimizer)
    return optimizer


def state_at(factor: float, ratio: float = 16.0) -> dict:
    return copy.deepcopy(optimizer_at(factor, ratio).state_dict())


@pytest.mark.parametrize(("now", "saved"), [(0.0, 1.0), (1.0, 0.0), (0.0, 0.0)])
def test_rates_of_zero_in_a_warm_up_set_by_hand_pass(now, saved):
    optimizer = optimizer_at(now)
    optimizer.load_state_dict(state_at(saved))
    assert optimizer.param_groups[0]["lr"] == 1e-3 * saved


def test_another_ratio_is_refused_where_the_rates_tell_it():
    with pytest.raises(ResumeMismatchError, match=r"lora_B at 2 times A's rate, this run asks for 16"):
        optimizer_at(1.0).load_state_dict(state_at(1.0, ratio=2.0))


@pytest.mark.filterwarnings("ignore:.*lr = 0.0005.*")
def test_another_point_of_the_warm_up_passes():
    optimizer_at(1.0).load_state_dict(state_at(0.5))


def test_other_groups_are_refused_at_rates_of_zero_too():
    state = state_at(0.0)
    state["param_groups"][0]["name"] = "default"
    with pytest.raises(ResumeMismatchError, match="has the groups default"):
        optimizer_at(0.0).load_state_dict(state)
