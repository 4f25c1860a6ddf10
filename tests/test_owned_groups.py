"""Groups whose rates are automatic are followed wherever they stand, or the step is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import Accelerator
from test_feature_updates import adapted, batch

import loraplus
from loraplus.auto import AutoRates, Rule, installed
from loraplus.errors import TrainerSetupError
from loraplus.groups import rate_of_group
from loraplus.steps.movement import adapted_layers, factors


def build(**options):
    model = adapted()
    optimizer = loraplus.create_optimizer(model, torch.optim.AdamW, lr=1.0, lr_ratio=1, lr_head=1e-3, **options)
    return model, optimizer, AutoRates(model, optimizer, rule=Rule(measured_at_first=2, measured_every=3))


def train(model, optimizer, steps, first=0):
    for step in range(first, first + steps):
        model(**batch(seed=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def named(optimizer, name):
    return next(group for group in optimizer.param_groups if group["name"] == name)


def another_group(**options):
    return {**torch.optim.AdamW([torch.nn.Parameter(torch.ones(3))], lr=1e-3).param_groups[0], "name": "new", **options}


def insert(optimizer):
    optimizer.param_groups.insert(0, another_group())


def replace(optimizer):
    optimizer.param_groups = [dict(group) for group in optimizer.param_groups]


def load(optimizer):
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def load_in_another_order(optimizer):
    optimizer.param_groups.reverse()
    load(optimizer)


CHANGES = {
    "a group put before them": insert,
    "another order": lambda optimizer: optimizer.param_groups.reverse(),
    "turned round": lambda optimizer: optimizer.param_groups.append(optimizer.param_groups.pop(0)),
    "a group added": lambda optimizer: optimizer.add_param_group(another_group()),
    "copies in their place": replace,
    "copies in another order": lambda optimizer: (replace(optimizer), optimizer.param_groups.reverse()),
    "a state loaded": load,
    "a state loaded in another order": load_in_another_order,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_groups_are_followed_wherever_they_stand_and_nothing_is_told(change, recwarn):
    expected, plain, untouched = build(lr_overrides={"value": 0.5})
    train(expected, plain, 6)
    model, optimizer, rates = build(lr_overrides={"value": 0.5})
    train(model, optimizer, 2)
    change(optimizer)
    train(model, optimizer, 2, first=2)
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["name"] != "new"]
    train(model, optimizer, 2, first=4)
    assert all(torch.equal(p, q) for p, q in zip(expected.parameters(), model.parameters(), strict=True))
    assert (rates.lr_a, rates.lr_b) == (untouched.lr_a, untouched.lr_b)
    for group in plain.param_groups:
        assert rate_of_group(optimizer, named(optimizer, group["name"])) == rate_of_group(plain, group)
    assert not [entry for entry in recwarn if issubclass(entry.category, loraplus.LoraPlusWarning)]


def test_a_group_that_comes_keeps_its_own_rate_wherever_it_stands():
    model, optimizer, rates = build()
    train(model, optimizer, 2)
    new = another_group()
    optimizer.param_groups.insert(1, new)
    new["params"][0].grad = torch.ones(3)
    train(model, optimizer, 1, first=2)
    assert float(1 - new["params"][0].detach().max()) == pytest.approx(1e-3, rel=0.05)  # AdamW's first step
    assert rates.rates_of(new) is None


@pytest.mark.filterwarnings("ignore:at step")
def test_without_the_group_of_b_a_goes_on():
    model, optimizer, _ = build()
    train(model, optimizer, 2)
    kept = named(optimizer, "lora_B")
    optimizer.param_groups = [group for group in optimizer.param_groups if group is not kept]
    before = [weight.detach().clone() for weight in factors(adapted_layers(model))]
    train(model, optimizer, 3, first=2)
    after = factors(adapted_layers(model))
    assert all(torch.equal(p, q) for p, q in zip(before[1::2], after[1::2], strict=True))
    assert all(0 < float((p - q).detach().abs().max()) < 0.1 for p, q in zip(before[::2], after[::2], strict=True))
    optimizer.param_groups.insert(0, kept)
    train(model, optimizer, 1, first=5)
    assert all(0 < float((p - q).detach().abs().max()) < 0.1 for p, q in zip(before[1::2], after[1::2], strict=True))


def b_to_a(optimizer):
    named(optimizer, "lora_A")["params"].append(named(optimizer, "lora_B")["params"].pop())


def last_of_a_is_first_of_b(optimizer):
    named(optimizer, "lora_B")["params"].insert(0, named(optimizer, "lora_A")["params"].pop())


def swapped(optimizer):
    a, b = (named(optimizer, name)["params"] for name in ("lora_A", "lora_B"))
    a[0], b[0] = b[0], a[0]


def a_to_head(optimizer):
    named(optimizer, "head")["params"].append(named(optimizer, "lora_A")["params"].pop(0))


def head_to_b(optimizer):
    named(optimizer, "lora_B")["params"].append(named(optimizer, "head")["params"].pop())


def b_to_a_group_of_its_own(optimizer):
    optimizer.add_param_group(another_group(params=[named(optimizer, "lora_B")["params"].pop()]))


def all_in_one(optimizer):
    members = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    optimizer.param_groups[:] = [{**optimizer.param_groups[0], "params": members}]


def all_in_a_new_one(optimizer):
    replace(optimizer)
    all_in_one(optimizer)


def none_left(optimizer):
    optimizer.param_groups[:] = [named(optimizer, "head")]


MOVES = {
    b_to_a: "lora_B.* has come into lora_A", last_of_a_is_first_of_b: "lora_A.* has come into lora_B",
    swapped: "lora_B.* has come into lora_A", a_to_head: "lora_A.* has come into head",
    head_to_b: "classifier.* has come into lora_B", b_to_a_group_of_its_own: "lora_B.* has come into new",
    all_in_one: "has come into lora_A", all_in_a_new_one: "has come into lora_A",
    none_left: "no longer has any",
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:at step")
@pytest.mark.parametrize("move", MOVES, ids=lambda move: move.__name__)
def test_a_parameter_that_has_moved_to_another_group_is_refused_in_one_line_and_nothing_moves(move):
    model, optimizer, _ = build()
    train(model, optimizer, 2)
    before = [p.detach().clone() for p in model.parameters()]
    move(optimizer)
    for _ in range(2):  # not once only
        with pytest.raises(TrainerSetupError, match=MOVES[move]) as refusal:
            train(model, optimizer, 1)
        assert "AutoRates(model, optimizer)" in str(refusal.value) and "\n" not in str(refusal.value)
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))
    assert {group["lr"] for group in optimizer.param_groups} <= {1.0, 1e-3}


@pytest.mark.filterwarnings("ignore:at step")
def test_factors_that_come_later_are_refused_until_the_rates_are_installed_again():
    model = adapted()
    late = [weight for entry in adapted_layers(model)[:1] for weight in entry.weights]
    for weight in late:
        weight.requires_grad_(False)
    optimizer = loraplus.create_optimizer(model, torch.optim.AdamW, lr=1.0, lr_ratio=1, lr_head=1e-3)
    AutoRates(model, optimizer)
    train(model, optimizer, 2)
    for weight, name in zip(late, ("late_A", "late_B"), strict=True):
        weight.requires_grad_()
        optimizer.add_param_group(another_group(params=[weight], lr=1.0, name=name))
    with pytest.raises(TrainerSetupError, match=r"lora_A.* has come into late_A"):
        train(model, optimizer, 1)
    again = AutoRates(model, optimizer)
    assert installed(optimizer) == [again]
    train(model, optimizer, 3)
    assert again.rates_of(named(optimizer, "late_B")) == (again.lr_b, again.lr_b)
    assert len(again.layer_rates) == len(adapted_layers(model))


@pytest.mark.filterwarnings("ignore:at step")
def test_a_factor_that_joins_the_group_of_its_role_gets_its_rate():
    model = adapted()
    a, b = adapted_layers(model)[0].weights
    optimizer = loraplus.create_optimizer(model, torch.optim.AdamW, lr=1.0, lr_ratio=1, lr_head=1e-3)
    for name, weight in (("lora_A", a), ("lora_B", b)):
        group = named(optimizer, name)
        group["params"] = [p for p in group["params"] if p is not weight]
    rates = AutoRates(model, optimizer)
    named(optimizer, "lora_B")["params"].append(b)
    train(model, optimizer, 1)
    assert float(b.detach().abs().max()) == pytest.approx(rates.lr_b, rel=0.01)  # from zero, by AdamW's first step


@pytest.mark.parametrize("change", [insert, load, load_in_another_order, b_to_a])
def test_accelerates_wrapper_makes_no_difference(change):
    found = []
    for wrapped in (False, True):
        model = adapted()
        optimizer = loraplus.create_optimizer(model, torch.optim.AdamW, lr=1.0, lr_ratio=1, lr_head=1e-3)
        if wrapped:
            model, optimizer = Accelerator(cpu=True).prepare(model, optimizer)
        AutoRates(model, optimizer)
        train(model, optimizer, 2)
        change(optimizer)
        if change is b_to_a:
            with pytest.raises(TrainerSetupError, match="come into lora_A"):
                train(model, optimizer, 1)
            continue
        train(model, optimizer, 2, first=2)
        found.append([p.detach().clone() for p in model.parameters()])
    assert not found or all(torch.equal(p, q) for p, q in zip(*found, strict=True))
