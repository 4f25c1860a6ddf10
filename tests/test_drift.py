"""Drift: what it reads off made-up walks whose kind is known, and what it makes of it."""

from __future__ import annotations

import pytest
import torch

from loraplus.drift import DRIFTS, MOST, MOST_PER_WINDOW, STEADY, Drift, momentum_of

SIZE = 20_000


def walked(momentum=0.9, drift=0.0, pull=0.0, steps=20, schedule=1.0, windows=1, seed=0):
    """A `Drift` that has watched a walk: momentum-correlated steps, a constant direction, a pull back to 0."""
    generator = torch.Generator().manual_seed(seed)
    found = Drift(momentum)
    weights, average = torch.zeros(SIZE, dtype=torch.float64), torch.zeros(SIZE, dtype=torch.float64)
    direction = torch.randn(SIZE, generator=generator, dtype=torch.float64)
    size = 0.0
    for step in range(steps * windows + 200 + 1):
        average = momentum * average + (1 - momentum) * torch.randn(SIZE, generator=generator, dtype=torch.float64)
        unit = average / ((1 - momentum) / (1 + momentum)) ** 0.5 + drift * direction - pull * weights
        size = float(unit.square().sum())
        if step >= 200 and (step - 200) % steps == 0:
            found.look([weights], size / found.raised**2)
        weights = weights + schedule * unit
        found.passed(schedule)
    return found


@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.95])
@pytest.mark.parametrize("schedule", [1.0, 0.7])
def test_a_random_walk_has_ratio_one_whatever_momentum_and_schedule(momentum, schedule):
    assert walked(momentum, schedule=schedule).ratio == pytest.approx(1.0, rel=0.05)


def test_steps_in_one_direction_raise_the_rates_up_to_a_limit():
    assert walked(drift=1.0).ratio > 1.3
    assert walked(drift=1.0).raised == MOST_PER_WINDOW
    assert walked(drift=2.0, windows=10).raised == MOST


def test_steps_that_turn_back_never_lower_the_rates_below_where_they_began():
    found = walked(pull=0.05, windows=4)
    assert found.ratio < STEADY and found.raised == 1.0


def test_windows_on_the_low_end_of_the_schedule_are_not_read():
    assert walked(drift=1.0, schedule=0.3).raised == 1.0


def test_a_checkpoint_holds_the_window_under_way():
    one, two = Drift(0.9), Drift(0.9)
    one.look([torch.zeros(3)], 3.0)
    one.passed(1.0)
    two.load_state_dict(one.state_dict(), torch.device("cpu"))
    for found in (one, two):
        found.passed(1.0)
        found.look([torch.full((3,), 5.0)], 3.0)
    assert one.raised == two.raised == MOST_PER_WINDOW and one.ratio == two.ratio


@pytest.mark.parametrize(
    ("group", "beta"), [({"betas": (0.8, 0.99)}, 0.8), ({"momentum": 0.7}, 0.7), ({"momentum": 0}, 0.0), ({}, 0.0)]
)
def test_momentum_is_read_off_the_optimizer(group, beta):
    assert momentum_of(group) == beta


def test_noise_around_the_steady_ratio_does_not_ratchet():
    found = walked(pull=0.008, windows=12)
    assert STEADY - 0.1 < found.ratio < DRIFTS and found.raised < 1.05
