"""Growth: larger steps where the next batch says that steps stop short, and only there."""

from __future__ import annotations

import io
import math

import pytest
import torch
from test_auto import build, linear, train
from test_feature_updates import adapted, batch

import loraplus
from loraplus.auto import AutoRates, Rule
from loraplus.automatic.growth import Growth


def alone(values):
    return values


def descended(rate, noise, steps=40, height=1.0, rule=None):
    """k after steps of SGD on half the squared distance from 0 of two weights, with noise in the gradient."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.nn.Parameter(torch.ones(8, 4)), torch.nn.Parameter(torch.ones(3, 8))]
    growth = Growth(lambda: weights, rule or Rule())
    for _ in range(steps):
        for weight in weights:
            weight.grad = weight.detach() + noise * torch.randn(weight.shape, generator=generator)
        growth.look(height, alone)
        growth.step_begins()
        with torch.no_grad():
            for weight in weights:
                weight -= rate * growth.factor * weight.grad
        growth.step_ends()
    return growth


def test_steps_that_stop_short_grow_to_the_limit_and_no_farther():
    assert descended(1e-3, noise=0.0).factor == Rule().most_growth
    assert descended(1e-3, noise=0.0, rule=Rule(most_growth=2.0)).factor == 2.0


def test_steps_in_noise_do_not_grow_however_short_they_are():
    assert [descended(rate, noise=30.0).factor for rate in (1e-4, 1e-2)] == [1.0, 1.0]


def test_steps_that_overshoot_do_not_grow_and_grown_ones_shrink():
    assert descended(1.8, noise=0.0, steps=10).factor == 1.0
    rule = Rule()
    assert 1.0 < rule.grown(3.0, -0.3, 1.0) < 3.0 and rule.grown(1.0, -1.0, 1.0) == 1.0


def test_what_counts_is_how_far_the_agreement_is_beyond_its_bounds_at_the_height_of_the_schedule():
    rule = Rule()
    assert [rule.grown(2.0, agreement, 1.0) for agreement in (-0.1, 0.0, 0.1)] == [2.0, 2.0, 2.0]
    assert rule.grown(2.0, 0.3, 0.0) == 2.0
    half = rule.grown(1.0, 0.3, 0.5)
    assert half == pytest.approx(math.exp(2.5 * 0.5 * 0.2))
    assert half**2 == pytest.approx(rule.grown(1.0, 0.3, 1.0))  # so a warm-up of twice the length grows as far


def test_a_run_whose_steps_are_right_is_watched_for_a_while_only():
    growth = descended(1e-2, noise=30.0, steps=70)
    assert not growth.is_watching and not growth._kept
    assert descended(1e-2, noise=30.0, steps=70, height=0.1).is_watching  # a warm-up says little


@pytest.mark.parametrize("broken", [math.nan, math.inf, 0.0])
def test_a_gradient_that_says_nothing_changes_nothing(broken):
    growth = descended(1e-3, noise=0.0, steps=6)
    before = growth.state_dict()
    for weight in growth._weights():
        weight.grad = torch.full_like(weight, broken)
    growth.look(1.0, alone)
    same = {"step": None, "has_changed": False}
    assert {**growth.state_dict(), **same} == {**before, **same} and not growth.has_changed


def test_a_factor_without_a_gradient_counts_as_one_of_zeros():
    growth = descended(1e-3, noise=0.0, steps=5, rule=Rule(growth=0.5))
    growth._weights()[0].grad = None
    before = growth.factor
    growth.look(1.0, alone)
    assert growth.factor > before


def test_a_run_on_clean_data_grows_and_says_so():
    model, optimizer, scheduler, rates = build()
    train(model, optimizer, scheduler, 30)
    grown = rates._growth.factor
    said = f"; grown {grown:.2g}-fold, as steps stopped short"
    assert grown > 1.5 and str(rates).endswith(rates.why) and rates.why.endswith(said)
    assert rates.summary()["why"] == rates.why
    assert rates.lr_a == pytest.approx(grown * rates._pair[0]) and rates.lr_b == pytest.approx(grown * rates._pair[1])
    assert all(layer.lr_b for layer in rates.layer_rates.values())


SLOW = Rule(growth=0.5, measured_at_first=3, measured_every=1000)  # measured where it has grown, and nowhere else


def started(seed=0, rule=SLOW):
    model = adapted(seed)
    optimizer = loraplus.create_optimizer(model, torch.optim.AdamW, lr=1.0, lr_ratio=1, lr_head=1e-3)
    return model, optimizer, linear(optimizer, 60), AutoRates(model, optimizer, rule=rule)


def steps(run, first, last):
    model, optimizer, scheduler, _ = run
    for step in range(first, last):
        model(**batch(seed=step % 5)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()


@pytest.mark.parametrize("stop", [4, 9])  # before it is believed, and where the next step is measured as k has moved
def test_a_resumed_run_goes_on_growing_as_it_would_have(stop):
    whole, half = started(), started()
    steps(whole, 0, 20)
    steps(half, 0, stop)
    assert half[3]._growth.has_changed == half[3]._recorder.on == (stop == 9)
    kept = io.BytesIO()
    parts = ("model", "optimizer", "scheduler", "rates")
    torch.save({name: part.state_dict() for name, part in zip(parts, half, strict=True)}, kept)
    kept.seek(0)
    state, resumed = torch.load(kept, weights_only=True), started(seed=1)
    for name, part in zip(parts, resumed, strict=True):
        part.load_state_dict(state[name])
    assert resumed[3]._growth.factor == half[3]._growth.factor
    steps(resumed, stop, 20)
    assert resumed[3]._growth.factor == whole[3]._growth.factor > half[3]._growth.factor
    for mine, theirs in zip(resumed[0].parameters(), whole[0].parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_state_that_is_kept_stays_as_it_was():
    run = started()
    steps(run, 0, 6)
    state = run[3].state_dict()
    (kept,) = state["growth"]["step"]
    before = kept.clone()
    steps(run, 6, 7)
    run[3].load_state_dict(state)
    steps(run, 7, 8)
    assert torch.equal(kept, before) and before.any()


def test_a_checkpoint_from_before_there_was_growth_has_not_grown():
    run = started(rule=Rule())
    steps(run, 0, 12)
    state = run[3].state_dict()
    assert state.pop("growth")["factor"] > 1
    run[3].load_state_dict(state)
    steps(run, 12, 13)
    assert run[3]._growth.factor == 1 and run[3].lr_b == run[3]._pair[1]


def test_factors_that_are_replaced_or_frozen_on_the_way_are_followed():
    weights = [torch.nn.Parameter(torch.ones(8, 4)), torch.nn.Parameter(torch.ones(3, 8))]
    growth = Growth(lambda: weights, Rule())

    def step():
        for weight in weights:
            weight.grad = weight.detach().clone() if weight.requires_grad else None
        growth.look(1.0, alone)
        looks = growth._looks
        growth.step_begins()
        with torch.no_grad():
            for weight in weights:
                weight -= 1e-3 * (0.0 if weight.grad is None else weight.grad)
        growth.step_ends()
        return looks

    assert [step() for _ in range(3)] == [0, 1, 2]
    weights[0] = torch.nn.Parameter(weights[0].detach().clone())  # as FSDP2 does when it is prepared late
    assert [step() for _ in range(7)] == [3, 4, 5, 6, 7, 8, 9] and growth.factor > 1.5
    weights[0].requires_grad = False  # the step before it was of both
    assert [step() for _ in range(3)] == [9, 10, 11]
    weights[0].requires_grad = True
    assert [step() for _ in range(2)] == [11, 12]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_steps_of_factors_of_any_precision_are_kept_in_32_bits_at_least(dtype):
    weights = [torch.nn.Parameter(torch.ones(8, 4, dtype=dtype)), torch.nn.Parameter(torch.ones(3, 8))]
    growth = Growth(lambda: weights, Rule())
    growth.step_begins()
    with torch.no_grad():
        weights[0].sub_(2**-7)
        weights[1].sub_(2**-20)
    growth.step_ends()
    (step,) = growth.state_dict()["step"]
    assert step.dtype == torch.promote_types(dtype, torch.float32)
    assert step.tolist() == [2**-7] * 32 + [2**-20] * 24


def test_vectors_that_are_too_long_for_one_product_are_taken_in_parts(monkeypatch):
    whole = descended(1e-3, noise=1.0, steps=3)
    monkeypatch.setattr("loraplus.automatic.growth._AT_ONCE", 7)
    parts = descended(1e-3, noise=1.0, steps=3)
    assert parts._mean == pytest.approx(whole._mean, rel=1e-5) and whole._mean


def test_steps_that_are_not_of_adams_size_do_not_grow():
    model, optimizer, scheduler, rates = build(torch.optim.SGD, momentum=0.9)
    train(model, optimizer, scheduler, 30)
    assert rates._units is not None and rates._growth.factor == 1.0 and not rates._growth._kept
