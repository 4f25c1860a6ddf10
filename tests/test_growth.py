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
    growth = Growth(weights, rule or Rule())
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
    assert not growth.is_watching and not growth._step and not growth._start
    assert descended(1e-2, noise=30.0, steps=70, height=0.1).is_watching  # a warm-up says little


@pytest.mark.parametrize("broken", [math.nan, math.inf, 0.0])
def test_a_gradient_that_says_nothing_changes_nothing(broken):
    growth = descended(1e-3, noise=0.0, steps=6)
    before = growth.state_dict()
    for weight in growth._weights:
        weight.grad = torch.full_like(weight, broken)
    growth.look(1.0, alone)
    assert {**growth.state_dict(), "step": None} == {**before, "step": None} and not growth.has_grown


def test_a_factor_without_a_gradient_counts_as_one_of_zeros():
    growth = descended(1e-3, noise=0.0, steps=5, rule=Rule(growth=0.5))
    growth._weights[0].grad = None
    before = growth.factor
    growth.look(1.0, alone)
    assert growth.factor > before


def test_a_run_on_clean_data_grows_and_says_so():
    model, optimizer, scheduler, rates = build()
    train(model, optimizer, scheduler, 30)
    grown = rates._growth.factor
    assert grown > 1.5 and f"{grown:.2g} times larger since steps stopped short" in str(rates)
    assert rates.lr_a == pytest.approx(grown * rates._pair[0]) and rates.lr_b == pytest.approx(grown * rates._pair[1])
    assert all(layer.lr_b for layer in rates.layer_rates.values())


def test_a_resumed_run_goes_on_growing_as_it_would_have():
    def started(seed=0):
        model = adapted(seed)
        optimizer = loraplus.create_optimizer(model, torch.optim.AdamW, lr=1.0, lr_ratio=1, lr_head=1e-3)
        return model, optimizer, linear(optimizer, 60), AutoRates(model, optimizer)

    def steps(run, first, last):
        model, optimizer, scheduler, _ = run
        for step in range(first, last):
            model(**batch(seed=step % 5)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()

    whole, half = started(), started()
    steps(whole, 0, 14)
    steps(half, 0, 7)
    kept = io.BytesIO()
    parts = ("model", "optimizer", "scheduler", "rates")
    torch.save({name: part.state_dict() for name, part in zip(parts, half, strict=True)}, kept)
    kept.seek(0)
    state, resumed = torch.load(kept, weights_only=True), started(seed=1)
    for name, part in zip(parts, resumed, strict=True):
        part.load_state_dict(state[name])
    assert resumed[3]._growth.factor == half[3]._growth.factor > 1
    steps(resumed, 7, 14)
    assert resumed[3]._growth.factor == whole[3]._growth.factor > half[3]._growth.factor
    for mine, theirs in zip(resumed[0].parameters(), whole[0].parameters(), strict=True):
        assert torch.equal(mine, theirs)
