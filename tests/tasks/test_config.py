"""Which rates a run has where none, one or both are given; and what it says of them."""

from __future__ import annotations

import pytest

from loraplus.cli.train import _about_rates
from loraplus.errors import InvalidRateError
from loraplus.tasks.checks import rates_of
from loraplus.tasks.config import TrainConfig


@pytest.mark.parametrize(
    ("given", "lr", "lr_ratio"),
    [
        ({}, "auto", 16.0),
        ({"lr": "auto"}, "auto", 16.0),
        ({"lr_ratio": 4.0}, 3e-4, 4.0),
        ({"lr_ratio_overrides": '{"query": 4}'}, 3e-4, 16.0),
        ({"lr": 1e-3}, 1e-3, 16.0),
        ({"lr": 1e-3, "lr_ratio": 1.0}, 1e-3, 1.0),
    ],
)
def test_rates_are_automatic_unless_one_is_given(given, lr, lr_ratio):
    config = TrainConfig(**given)
    assert (config.lr, config.lr_ratio) == (lr, lr_ratio)
    assert rates_of(config, config.lr, config.lr_ratio).lr_ratio == (1.0 if lr == "auto" else lr_ratio)


@pytest.mark.parametrize("ratio", [8.0, 1.0])
def test_a_ratio_beside_automatic_rates_is_refused(ratio):
    config = TrainConfig(lr="auto", lr_ratio=ratio)
    with pytest.raises(InvalidRateError, match=f"--lr-ratio {ratio:g} is not used with --lr auto.*give --lr a number"):
        rates_of(config, config.lr, config.lr_ratio)


@pytest.mark.parametrize("why", [{"auto_why": "B held at 4×"}, {}])
def test_automatic_rates_are_said_with_what_held_them_and_how_to_come_near_them(why):
    told = _about_rates({"lr": 4.1e-4, "lr_ratio": 4.0, "auto": True, **why})
    assert told == (
        "rates: η_A 0.00041 · η_B 0.00164 (λ = 4), set automatically, as last measured"
        + (": B held at 4×" if why else "")
        + "; near them without: --lr 0.00041 --lr-ratio 4"
    )


def test_where_one_factor_has_no_rate_no_flags_are_told():
    told = _about_rates({"lr": 0.0, "lr_b": 0.002, "lr_ratio": None, "auto": True, "auto_why": "A has not moved"})
    assert told == "rates: η_A 0 · η_B 0.002, set automatically, as last measured: A has not moved"


def test_rates_that_were_given_are_said_as_they_are():
    assert _about_rates({"lr": 1e-3, "lr_ratio": 16.0, "auto": False}) == "rates: η_A 0.001 · η_B 0.016 (λ = 16)"
