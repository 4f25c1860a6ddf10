"""A twin takes the optimizer's step over other tensors; the optimizer, its parameters and hooks see nothing of it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from loraplus.steps.twin import step_of, twin_over


class WithAttributes(torch.optim.SGD):
    """Has a rate, a list and a dict by parameter of its own, which torch's __getstate__ leaves out."""

    def __init__(self, params, **options) -> None:
        super().__init__(params, **options)
        self.factor = 2.0
        self.history: list[float] = [1.0]
        self.scales = {p: 1.0 for group in self.param_groups for p in group["params"]}

    @torch.no_grad()
    def step(self, closure=None):
        self.history.append(self.factor)
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad, alpha=group["lr"] * self.factor * self.scales[p])


class CallsItsParent(torch.optim.AdamW):
    def step(self, closure=None):
        return super().step(closure)


def parameters(*sizes: int) -> list[nn.Parameter]:
    torch.manual_seed(0)
    found = [nn.Parameter(torch.randn(size)) for size in sizes or (3, 5)]
    for parameter in found:
        parameter.grad = torch.ones_like(parameter)
    return found


def stand_in(like: torch.Tensor) -> torch.Tensor:
    other = like.detach().clone()
    other.grad = torch.ones_like(other)
    return other


def snapshot(optimizer):
    held = [p for group in optimizer.param_groups for p in group["params"]]
    return copy.deepcopy((optimizer.state_dict(), held, [p.grad for p in held]))


def assert_same(before, after):
    (flat, spec), (same, other_spec) = (torch.utils._pytree.tree_flatten(tree) for tree in (before, after))
    assert spec == other_spec
    assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(flat, same, strict=True))


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
    "AdamW, rate in a tensor": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.1)),
    "Adagrad, state from the start": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "attributes of its own": lambda p: WithAttributes(p, lr=0.1),
    "calls its parent": lambda p: CallsItsParent(p, lr=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_twins_step_is_the_step_that_the_optimizer_would_take(name):
    one, other = parameters()
    optimizer = OPTIMIZERS[name]([one, other])
    optimizer.step()
    tensor = stand_in(one)
    before = snapshot(optimizer)
    step_of(twin_over(optimizer, {one: tensor}))
    assert_same(before, snapshot(optimizer))
    assert not torch.equal(tensor, one)
    optimizer.step()
    assert torch.equal(tensor, one)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_several_steps_of_a_twin_leave_the_optimizer_as_it_is(name):
    one, other = parameters()
    optimizer = OPTIMIZERS[name]([one, other])
    optimizer.step()
    before = snapshot(optimizer)
    twin = twin_over(optimizer, {one: stand_in(one), other: stand_in(other)})
    for group in twin.param_groups:
        group["lr"] = 5.0
    for _ in range(3):
        step_of(twin)
    assert_same(before, snapshot(optimizer))
    if name == "attributes of its own":
        assert optimizer.history == [1.0, 2.0] and twin.history == [1.0, 2.0, 2.0, 2.0, 2.0]


def test_a_wrapped_optimizer_is_copied_with_its_wrapper():
    lookahead = pytest.importorskip("pytorch_optimizer", reason="pytorch_optimizer is not installed").Lookahead
    one, other = parameters()
    optimizer = lookahead(torch.optim.AdamW([{"params": [one], "lr": 0.1}, {"params": [other], "lr": 0.2}]), k=3)
    tensor = stand_in(one)
    before = snapshot(optimizer.optimizer)
    twin = twin_over(optimizer, {one: tensor})
    assert twin.optimizer is not optimizer.optimizer and twin.param_groups is twin.optimizer.param_groups
    for _ in range(7):
        step_of(twin)
    assert_same(before, snapshot(optimizer.optimizer))
    for _ in range(7):
        optimizer.step()
    assert torch.equal(tensor, one)


def test_groups_without_a_stand_in_are_left_out_and_all_else_is_not_copied():
    one, big = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1000))
    one.grad, big.grad = torch.ones(2), torch.ones(1000)
    optimizer = torch.optim.AdamW([{"params": [one]}, {"params": [big]}], lr=0.1)
    optimizer.cache = {"all": [one, big]}
    optimizer.model = nn.Linear(100, 100)
    optimizer.step()
    twin = twin_over(optimizer, {one: stand_in(one)})
    assert [len(group["params"]) for group in twin.param_groups] == [1] and len(twin.state) == 1
    assert twin.cache["all"][1].numel() == 0 and twin.model is optimizer.model


def test_stand_ins_can_have_other_shapes_without_state_and_the_state_of_another_with_it():
    one, other = parameters(3, 5)
    optimizer = torch.optim.AdamW([{"params": [one]}, {"params": [other]}], lr=0.1)
    optimizer.step()
    small = torch.zeros(2, 2)
    small.grad = torch.ones(2, 2)
    twin = twin_over(optimizer, {one: small}, with_state=False)
    step_of(twin)
    assert small.shape == (2, 2) and (small != 0).all()
    first, second = stand_in(one), stand_in(one)
    step_of(twin_over(optimizer, {one: first, other: second}, state_of={other: one}))
    assert torch.equal(first, second)  # one start, one gradient, one state


@pytest.mark.parametrize("name", ["AdamW", "calls its parent"])
def test_no_hook_is_called_neither_the_optimizers_nor_one_on_all(name):
    one, other = parameters()
    optimizer = OPTIMIZERS[name]([one, other])
    calls = []
    handles = [register_optimizer_step_pre_hook(lambda *_: calls.append("pre"))]
    handles += [register_optimizer_step_post_hook(lambda *_: calls.append("post"))]
    try:
        optimizer.register_step_pre_hook(lambda *_: calls.append("own"))
        step_of(twin_over(optimizer, {one: stand_in(one)}))
        assert calls == []
        optimizer.step()
        assert {"pre", "post", "own"} <= set(calls)
    finally:
        for handle in handles:
            handle.remove()


def test_hooks_on_all_optimizers_stay_where_a_step_fails():
    (one,) = parameters(3)
    optimizer = torch.optim.SGD([one], lr=0.1)
    calls = []
    handle = register_optimizer_step_pre_hook(lambda *_: calls.append(1))
    try:
        wrong = torch.zeros(3)
        wrong.grad = torch.ones(3)
        twin = twin_over(optimizer, {one: wrong})
        twin.param_groups[0]["lr"] = "fast"
        with pytest.raises(Exception, match=".+"):
            step_of(twin)
        optimizer.step()
        assert calls == [1]
    finally:
        handle.remove()


def test_a_schedulers_own_step_is_not_called():
    (one,) = parameters(3)
    optimizer = torch.optim.SGD([one], lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    step_of(twin_over(optimizer, {one: stand_in(one)}))
    with pytest.warns(UserWarning, match="before `optimizer.step"):  # it has not seen a step yet
        scheduler.step()


def test_a_step_that_needs_a_closure_gets_it():
    class NeedsOne(torch.optim.SGD):
        def step(self, closure):
            closure()
            return super().step()

    (one,) = parameters(3)
    tensor, calls = stand_in(one), []
    step_of(twin_over(NeedsOne([one], lr=0.1), {one: tensor}), lambda: calls.append(1))
    assert calls == [1] and not torch.equal(tensor, one)
