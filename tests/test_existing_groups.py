"""Groups that the user has already: split by role, every option kept; membership checked."""

from __future__ import annotations

import copy

import pytest
import torch
from test_groups import adapted
from torch import nn

import loraplus
from loraplus.roles import Role, trainable_parameters


def two_groups(model):
    encoder = [p for name, p in model.named_parameters() if p.requires_grad and "classifier" not in name]
    head = [p for name, p in model.named_parameters() if p.requires_grad and "classifier" in name]
    return [
        {"params": encoder, "lr": 1e-3, "weight_decay": 0.1, "betas": (0.8, 0.9), "name": "encoder"},
        {"params": head, "lr": 5e-3, "weight_decay": 0.0},
    ]


def test_every_group_is_split_and_keeps_its_options():
    model = adapted(use_dora=True)
    given = two_groups(model)
    kept = copy.copy(given)
    groups = loraplus.split_groups(model, given, lr_ratio=16.0)
    assert [(g["name"], g["lr"], g["weight_decay"], g.get("betas")) for g in groups] == [
        ("encoder/lora_A", 1e-3, 0.1, (0.8, 0.9)),
        ("encoder/lora_B", 16e-3, 0.1, (0.8, 0.9)),
        ("encoder", 1e-3, 0.1, (0.8, 0.9)),  # the magnitudes
        ("group_1", 5e-3, 0.0, None),
    ]
    assert given == kept  # what was given is left alone
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters() if p.requires_grad)


def test_a_group_without_factors_comes_back_as_it_was():
    model = adapted()
    head = two_groups(model)[1]
    split = loraplus.split_groups(model, two_groups(model), lr_ratio=16.0)[-1]
    assert split["params"] == head["params"] and {**split, "params": 0} == {**head, "params": 0, "name": "group_1"}


def test_a_rate_for_groups_without_one_reaches_what_is_no_factor_too():
    model = adapted()
    groups = loraplus.split_groups(model, [{"params": model.parameters()}], lr_ratio=2.0, lr=3e-4)
    assert {g["name"]: g["lr"] for g in groups} == {
        "group_0": 3e-4, "group_0/lora_A": 3e-4, "group_0/lora_B": 6e-4,
    }  # fmt: skip


def test_create_optimizer_takes_groups_and_verify_checks_them():
    model = adapted()
    groups = two_groups(model)
    del groups[1]["lr"]
    optimizer = loraplus.create_optimizer(model, torch.optim.AdamW, lr=2e-3, lr_ratio=4.0, groups=groups, eps=1e-6)
    assert {g["name"]: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups} == {
        "encoder/lora_A": (1e-3, 0.1), "encoder/lora_B": (4e-3, 0.1), "group_1": (2e-3, 0.0),
    }  # fmt: skip
    assert {g["eps"] for g in optimizer.param_groups} == {1e-6}
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (step + 1) / 10)
    for _ in range(3):
        loraplus.verify(model, optimizer, lr_ratio=4.0, lr=2e-3, groups=groups)
        optimizer.step()
        scheduler.step()
    with pytest.raises(loraplus.RateMismatchError, match="lora_B"):
        loraplus.verify(model, optimizer, lr_ratio=8.0, lr=2e-3, groups=groups)
    optimizer.param_groups[0]["initial_lr"] *= 2
    with pytest.raises(loraplus.RateMismatchError, match="lora_A"):
        loraplus.verify(model, optimizer, lr_ratio=4.0, lr=2e-3, groups=groups)


@pytest.mark.parametrize("named", [False, True])
def test_the_groups_of_an_optimizer_can_be_split(named):
    model = adapted()
    parameters = model.named_parameters() if named else model.parameters()
    source = torch.optim.AdamW([{"params": parameters, "lr": 3e-4}])
    optimizer = torch.optim.AdamW(loraplus.split_groups(model, source.param_groups, lr_ratio=2.0))
    rates = {entry.role: entry.lr for entry in loraplus.explain(model, optimizer).entries}
    assert rates == {"lora_A": 3e-4, "lora_B": 6e-4, "head": 3e-4}
    if named:
        names = {id(p): name for name, p in model.named_parameters()}
        for group in optimizer.param_groups:
            assert group["param_names"] == [names[id(p)] for p in group["params"]]


def test_rates_in_tensors_and_the_rates_of_a_scheduler_are_multiplied_too():
    model = adapted(modules_to_save=None)
    parameters = [p for p in model.parameters() if p.requires_grad]
    rate = torch.tensor(1e-3)
    groups = loraplus.split_groups(model, [{"params": parameters, "lr": rate, "initial_lr": 2e-3}], lr_ratio=4.0)
    assert groups[0]["lr"] is not groups[1]["lr"] and groups[1]["lr"].item() == pytest.approx(4e-3)
    assert [group["initial_lr"] for group in groups] == [2e-3, 8e-3]


@pytest.mark.parametrize("in_the_groups", [True, False])
def test_rates_in_tensors_stay_tensors_of_each_groups_own(in_the_groups):
    model, rate = adapted(), torch.tensor(1e-3, dtype=torch.float64)
    given = two_groups(model)
    for group in given:
        group.pop("lr")
        group |= {"lr": rate, "initial_lr": rate} if in_the_groups else {}
    groups = loraplus.split_groups(model, given, lr_ratio=4.0, lr=None if in_the_groups else rate)
    rates = [group["lr"] for group in groups]
    assert [float(lr) for lr in rates] == [1e-3, 4e-3, 1e-3]
    assert len({lr.data_ptr() for lr in (*rates, rate)}) == 4
    if in_the_groups:
        assert [float(group["initial_lr"]) for group in groups] == [1e-3, 4e-3, 1e-3]
    loraplus.verify(model, torch.optim.AdamW(groups), 4.0, groups=given, lr=rate)


def test_a_prefix_goes_before_the_names_of_groups():
    model = adapted()
    groups = loraplus.split_groups(model, two_groups(model), lr_ratio=16.0, prefix="unet")
    assert [group["name"] for group in groups] == ["unet.encoder/lora_A", "unet.encoder/lora_B", "unet.group_1"]
    optimizer = loraplus.create_optimizer(model, lr=1.0, groups=two_groups(model), prefix="unet")
    assert [group["name"] for group in optimizer.param_groups] == [group["name"] for group in groups]


def test_ratio_one_on_existing_groups_trains_as_the_optimizer_on_them():
    model = adapted()
    twin = copy.deepcopy(model)
    plain = torch.optim.AdamW(two_groups(model))
    ours = loraplus.create_optimizer(twin, torch.optim.AdamW, lr=1.0, lr_ratio=1.0, groups=two_groups(twin))
    for step in range(10):
        ids = torch.arange(32).add(step).remainder(64).reshape(4, 8)
        for net, optimizer in ((model, plain), (twin, ours)):
            optimizer.zero_grad()
            net(input_ids=ids, labels=torch.tensor([0, 1, 0, 1])).loss.backward()
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_several_models_in_one_module_keep_ratios_of_their_own():
    models = nn.ModuleDict({"unet": adapted(), "text_encoder": adapted()})
    groups = [
        {"params": [p for p in models[key].parameters() if p.requires_grad], "lr": lr, "name": key}
        for key, lr in (("unet", 1e-3), ("text_encoder", 1e-4))
    ]
    ratios = {"^text_encoder": 4.0}
    optimizer = loraplus.create_optimizer(
        models, torch.optim.AdamW, lr=1.0, lr_ratio=16.0, lr_ratio_overrides=ratios, groups=groups
    )
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert rates["unet/lora_B"] == pytest.approx(16e-3)
    assert rates["text_encoder/lora_B_ratio4"] == pytest.approx(4e-4)
    loraplus.verify(models, optimizer, lr_ratio=16.0, lr_ratio_overrides=ratios, groups=groups)


def with_group(change):
    model = adapted()
    groups = two_groups(model)
    return model, change(model, groups)


WRONG = {
    "in groups encoder and again": lambda model, groups: [
        *groups, {"params": groups[0]["params"][:1], "name": "again"},
    ],
    "group encoder twice": lambda model, groups: [
        {**groups[0], "params": groups[0]["params"] + groups[0]["params"][:1]}, groups[1],
    ],
    "in no group.*lora_A": lambda model, groups: [{**groups[0], "params": groups[0]["params"][1:]}, groups[1]],
    "a generator can be read only once": lambda model, groups: [{**groups[0], "params": iter(())}, groups[1]],
    "not in PeftModel": lambda model, groups: [*groups, {"params": [nn.Parameter(torch.ones(3))]}],
    "groups is empty": lambda model, groups: [],
    "must be a dict": lambda model, groups: list(model.parameters()),
    "params must be tensors": lambda model, groups: [{"params": ["query"]}],
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_groups_that_cannot_be_split_are_refused_by_name(message):
    model, groups = with_group(WRONG[message])
    with pytest.raises(loraplus.ParameterGroupError, match=message):
        loraplus.split_groups(model, groups, lr_ratio=2.0)


@pytest.mark.parametrize("lr", [None, "fast", -1.0, float("nan")])
def test_a_group_without_a_usable_rate_is_refused_by_name(lr):
    model = adapted()
    groups = two_groups(model)
    groups[0] = {key: value for key, value in {**groups[0], "lr": lr}.items() if value is not None}
    with pytest.raises(loraplus.InvalidRateError, match="group encoder"):
        loraplus.split_groups(model, groups, lr_ratio=2.0)


@pytest.mark.parametrize("name", ["lr_head", "lr_embedding", "lr_magnitude", "lr_overrides"])
def test_rates_that_groups_have_already_are_refused_beside_them(name):
    model = adapted()
    groups = two_groups(model)
    value = {"query": 2.0} if name == "lr_overrides" else 1e-3
    with pytest.raises(loraplus.InvalidRateError, match=name):
        loraplus.create_optimizer(model, lr=1e-3, groups=groups, **{name: value})
    optimizer = loraplus.create_optimizer(model, lr=1e-3, groups=groups)
    with pytest.raises(loraplus.InvalidRateError, match=name):
        loraplus.verify(model, optimizer, lr_ratio=16.0, groups=groups, **{name: value})


def test_frozen_parameters_stay_in_the_group_that_they_were_in():
    model = adapted(modules_to_save=None)
    groups = loraplus.split_groups(model, [{"params": model.parameters(), "lr": 1e-3, "name": "all"}], lr_ratio=2.0)
    by_name = {group["name"]: group["params"] for group in groups}
    assert set(by_name) == {"all", "all/lora_A", "all/lora_B"}
    assert not any(p.requires_grad for p in by_name["all"])
    factors = [e.parameter for e in trainable_parameters(model) if e.role is Role.B]
    assert [id(p) for p in by_name["all/lora_B"]] == [id(p) for p in factors]
