"""One rule says which optimizer is meant, whoever asks, and what wraps it."""

from __future__ import annotations

import types
import warnings

import pytest
import torch
from accelerate import Accelerator
from test_feature_updates import adapted

import loraplus
from loraplus.auto import AutoRates, installed
from loraplus.groups import rate_of_group
from loraplus.integrations.checkpoints import all_auto_rates
from loraplus.steps.step_probe import try_step
from loraplus.steps.wrappers import unwrapped
from loraplus.watching.watch import watch_rates


def accelerated(optimizer):
    return Accelerator(cpu=True).prepare(optimizer)


def lightning(optimizer):
    return pytest.importorskip("lightning.pytorch.core.optimizer").LightningOptimizer(optimizer)


def of_ones_own(optimizer):
    return types.SimpleNamespace(optimizer=optimizer, param_groups=optimizer.param_groups)


def nested(optimizer):
    return of_ones_own(of_ones_own(accelerated(optimizer)))


class Averaging(torch.optim.Optimizer):
    """Steps by itself with the help of another, as Lookahead does: half as far."""

    def __init__(self, optimizer):
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self.optimizer, self.param_groups = optimizer, optimizer.param_groups

    @torch.no_grad()
    def step(self, closure=None):
        before = [parameter.clone() for group in self.param_groups for parameter in group["params"]]
        self.optimizer.step()
        for old, new in zip(before, (p for group in self.param_groups for p in group["params"]), strict=True):
            new.lerp_(old, 0.5)


@pytest.mark.parametrize("wrap", [lambda o: o, accelerated, lightning, of_ones_own, nested])
def test_probe_watch_and_automatic_rates_mean_the_optimizer_in_a_wrapper(wrap):
    model = adapted()
    optimizer = loraplus.create_optimizer(model, torch.optim.AdamW, lr=1e-3, lr_ratio=16)
    wrapped = wrap(optimizer)
    assert unwrapped(wrapped) is optimizer
    assert watch_rates(model, wrapped) is optimizer.loraplus_watch
    rates = AutoRates(model, wrapped)
    assert rates._optimizer is optimizer
    assert installed(wrapped) == all_auto_rates(wrapped) == [rates] == installed(optimizer)
    rates.lr_a = 0.5
    assert rate_of_group(wrapped, optimizer.param_groups[0]) == 0.5
    assert try_step(wrapped, {0: 1e-3, 1: 16e-3}).follows


def test_an_optimizer_that_steps_by_itself_over_another_is_no_wrapper():
    model = adapted()
    inner = loraplus.create_optimizer(model, torch.optim.AdamW, lr=1e-3, lr_ratio=16)
    outer = Averaging(inner)
    assert unwrapped(outer) is outer and unwrapped(accelerated(outer)) is outer
    watch = watch_rates(model, outer)
    assert watch is outer.loraplus_watch and watch is not inner.loraplus_watch
    with warnings.catch_warnings():
        warnings.simplefilter("error", loraplus.LoraPlusWarning)
        loraplus.verify(model, outer, lr_ratio=16.0)
