"""Loops of one's own: what `guard_resume` refuses, and what it has to let pass."""

from __future__ import annotations

import copy

import pytest
import torch
from test_groups import adapted

import loraplus
from loraplus.errors import ResumeMismatchError
from loraplus.integrations.pytorch import guard_resume, rates_for_log


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


def guarded(model, **options):
    optimizer = loraplus.create_optimizer(model, torch.optim.AdamW, lr=1e-3, **options)
    guard_resume(optimizer)
    return optimizer


def stepped(model, optimizer):
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return copy.deepcopy(optimizer.state_dict())


def with_frozen(model, pattern):
    for name, parameter in model.named_parameters():
        if pattern in name:
            parameter.requires_grad_(False)
    return model


OTHERS = {
    "other layers of the same shapes": (
        lambda: adapted(target_modules=["query", "key"]),
        r"4 of its 10 are not trained.*value\.lora_A",
    ),
    "a layer less": (lambda: adapted(layers_to_transform=[0]), r"4 parameters in lora_A, this run has 2"),
    "one factor frozen": (
        lambda: with_frozen(adapted(), "layer.1.attention.self.value.lora_B"),
        r"4 parameters in lora_B, this run has 3",
    ),
    "another adapter's name": (
        lambda: other_name("mine"),
        r"10 of its 10 .*10 of this run's 10 .*lora_A\.mine",
    ),
    "another rank": (
        lambda: adapted(r=2),
        r"8 of 10 parameters have another shape.*\(4, 16\) there and \(2, 16\) here",
    ),
}


def other_name(name):
    from conftest import tiny_bert
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=["query", "value"], modules_to_save=["classifier"])
    return get_peft_model(tiny_bert(), config, adapter_name=name)


@pytest.mark.parametrize("other", OTHERS)
def test_a_checkpoint_of_other_parameters_is_refused_in_one_line(other):
    model = adapted()
    state = stepped(model, guarded(model))
    make, message = OTHERS[other]
    resumed = make()  # kept: names are the model's
    optimizer = guarded(resumed)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ResumeMismatchError, match=message) as caught:
        optimizer.load_state_dict(state)
    assert "\n" not in str(caught.value) and str(before) == str(optimizer.state_dict())


def test_states_of_earlier_versions_and_of_unknown_models_go_on():
    model = adapted()
    state = stepped(model, guarded(model))
    del state["loraplus"]
    optimizer = guarded(model)
    optimizer.load_state_dict(state)
    groups = loraplus.param_groups(model, lr=1e-3)
    unknown = torch.optim.AdamW(groups)
    guard_resume(unknown)
    assert "loraplus" not in unknown.state_dict()
    unknown.load_state_dict(stepped(model, optimizer))
    known = torch.optim.AdamW(loraplus.param_groups(model, lr=1e-3))
    guard_resume(known, model)
    assert len(known.state_dict()["loraplus"]["parameters"]) == 10


def test_the_guard_and_its_record_come_off_together():
    model = adapted()
    optimizer = loraplus.create_optimizer(model, torch.optim.AdamW, lr=1e-3)
    handle = guard_resume(optimizer)
    assert "loraplus" in optimizer.state_dict()
    handle.remove()
    assert set(optimizer.state_dict()) == {"state", "param_groups"}
    optimizer.load_state_dict(loraplus.create_optimizer(model, torch.optim.AdamW, lr=1e-3, lr_ratio=2).state_dict())


def of_two_models(first=16.0, second=4.0):
    models = adapted(), adapted()
    groups = [g for m, r in zip(models, (first, second), strict=True) for g in loraplus.param_groups(m, 1e-3, r)]
    optimizer = torch.optim.AdamW(groups)
    guard_resume(optimizer)
    return models, optimizer


def test_groups_of_one_name_are_each_logged():
    _, optimizer = of_two_models()
    assert rates_for_log(optimizer) == pytest.approx({
        "lr/lora_A": 1e-3, "lr/lora_B": 16e-3, "lr/head": 1e-3,
        "lr/lora_A.2": 1e-3, "lr/lora_B.2": 4e-3, "lr/head.2": 1e-3,
    })  # fmt: skip


@pytest.mark.parametrize(
    ("ratios", "found"), [((2, 4), "lora_B at 16"), ((16, 2), r"lora_B\.2 at 4"), ((4, 16), "lora_B at 16")]
)
def test_the_guard_sees_every_model(ratios, found):
    state = of_two_models()[1].state_dict()
    with pytest.raises(ResumeMismatchError, match=found):
        of_two_models(*ratios)[1].load_state_dict(state)
    of_two_models()[1].load_state_dict(state)


def test_the_guard_goes_on_the_optimizer_inside_a_wrapper():
    from accelerate import Accelerator

    model = adapted()
    prepared = Accelerator(cpu=True).prepare(loraplus.create_optimizer(model, torch.optim.AdamW, lr=1e-3))
    guard_resume(prepared)
    other = loraplus.create_optimizer(model, torch.optim.AdamW, lr=1e-3, lr_ratio=2)
    with pytest.raises(ResumeMismatchError, match="lora_B at 2 times"):
        prepared.load_state_dict(other.state_dict())
