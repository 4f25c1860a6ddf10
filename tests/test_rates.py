"""Role → rate: which setting counts for which role, what overrides make of it, and what no rate can be."""

from __future__ import annotations

import dataclasses
import math
import warnings
from types import SimpleNamespace
from typing import Any

import pytest

from loraplus.errors import InvalidRateError, LoraPlusWarning
from loraplus.rates import DEFAULT_LR_RATIO, Rates, as_number
from loraplus.roles import Role

EMBEDDINGS = {Role.EMBEDDING_A, Role.EMBEDDING_B, Role.EMBEDDING}


def parameters(*names: str, role: Role = Role.B) -> list[Any]:
    """All that is asked of trainable parameters here."""
    return [SimpleNamespace(name=name, role=role) for name in names]


def test_b_alone_learns_lr_ratio_times_faster():
    assert DEFAULT_LR_RATIO == Rates(1e-3).lr_ratio == 16.0
    rates = Rates(1e-3)
    assert {role: rates.of(role) for role in Role} == {role: 0.016 if role is Role.B else 1e-3 for role in Role}


@pytest.mark.parametrize(
    ("setting", "roles"),
    [("lr_embedding", EMBEDDINGS), ("lr_head", {Role.HEAD}), ("lr_magnitude", {Role.MAGNITUDE})],
)
def test_a_rate_of_its_own_counts_for_its_roles_and_no_other(setting: str, roles: set[Role]):
    plain, own = Rates(1e-3), Rates(1e-3, **{setting: 7e-3})
    for role in Role:
        assert own.of(role) == (7e-3 if role in roles else plain.of(role)), role


def test_rates_stay_what_they_are():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Rates(1e-3).lr = 2e-3  # type: ignore[misc]


def test_a_ratio_by_name_counts_for_b_alone():
    rates = Rates(1e-3, 16, lr_ratio_overrides={"lora_te": 4, r"\.0\.": 2})
    assert rates.ratio("lora_te_q.lora_up") == 4 and rates.ratio("unet.0.up") == 2 and rates.ratio("lora_unet") == 16
    assert rates.of(Role.B, "lora_te_q") == 4e-3 and rates.of(Role.B, "lora_unet") == 0.016
    assert rates.of(Role.A, "lora_te_q") == 1e-3


def test_factors_by_name_multiply_for_every_role():
    rates = Rates(1e-3, 16, lr_head=5e-3, lr_overrides={"value": 0.5, r"layer\.1": 4})
    assert rates.factor("layer.1.value") == 2 and rates.factor("layer.1.query") == 4 and rates.factor("query") == 1
    assert rates.of(Role.A, "layer.1.value") == 2e-3
    assert rates.of(Role.B, "layer.0.value") == 0.008
    assert rates.of(Role.HEAD, "value_head") == 2.5e-3


def test_a_group_is_named_by_role_and_by_what_overrides_make_of_it():
    rates = Rates(1e-4, 16, lr_overrides={"value": 0.5}, lr_ratio_overrides={"lora_te": 4, "same": 16})
    assert rates.group_name(Role.B, "lora_te_value") == "lora_B_ratio4_x0.5"
    assert rates.group_name(Role.B, "lora_te_query") == "lora_B_ratio4"
    assert rates.group_name(Role.B, "value") == "lora_B_x0.5"
    assert rates.group_name(Role.B, "same") == rates.group_name(Role.B, "query") == "lora_B"
    assert rates.group_name(Role.A, "lora_te_value") == "lora_A_x0.5"
    assert rates.group_name(Role.A, "lora_te_query") == "lora_A"


@pytest.mark.parametrize("wrong", [0, -1e-3, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("name", ["lr", "lr_ratio", "lr_embedding", "lr_head", "lr_magnitude"])
def test_a_rate_that_is_not_positive_and_finite_is_refused_by_name(name: str, wrong: float):
    with pytest.raises(InvalidRateError, match=rf"^{name} must be a positive, finite number, got {wrong}$"):
        Rates(**{"lr": 1e-3, name: wrong})


@pytest.mark.parametrize("wrong", [True, False, None, "fast", [1e-3], {}])
def test_what_is_no_number_is_refused(wrong: object):
    with pytest.raises(InvalidRateError, match="lr must be a number, got"):
        as_number("lr", wrong)
    with pytest.raises(InvalidRateError, match="lr_ratio must be a number"):
        Rates(1e-3, wrong)


def test_numbers_of_any_kind_become_floats():
    rates = Rates("1e-3", 16, lr_head="0.5", lr_overrides={"q": 2}, lr_ratio_overrides={"k": "4"})
    kept = (rates.lr, rates.lr_ratio, rates.lr_head, rates.lr_overrides["q"], rates.lr_ratio_overrides["k"])
    assert kept == (1e-3, 16.0, 0.5, 2.0, 4.0) and all(type(value) is float for value in kept)


@pytest.mark.parametrize("name", ["lr_overrides", "lr_ratio_overrides"])
def test_patterns_that_cannot_be_used_are_refused_by_name(name: str):
    for overrides, said in [
        ({"(": 2.0}, rf"{name}: '\(' is not a regular expression \("),
        ({3: 2.0}, rf"{name}: 3 is not a regular expression"),
        ({"q": -1.0}, rf"{name}\['q'\] must be a positive"),
        ({"q": "x"}, rf"{name}\['q'\] must be a number"),
        (["q"], f"{name} must map regular expressions to numbers, got list"),
        ("q", f"{name} must map regular expressions to numbers, got str"),
    ]:
        with pytest.raises(InvalidRateError, match=said):
            Rates(1e-3, **{name: overrides})
    for nothing in (None, {}):
        assert getattr(Rates(1e-3, **{name: nothing}), name) == {}


@pytest.mark.parametrize("settings", [{"lr_ratio": 0.5}, {"lr_ratio_overrides": {"te": 0.5}}])
def test_a_ratio_below_one_is_warned_of_at_the_line_that_asked(settings: dict):
    with pytest.warns(LoraPlusWarning, match=r"^lr_ratio = 0\.5 is below 1") as told:
        Rates(1e-3, **settings)
    assert [warning.filename for warning in told] == [__file__]


def test_a_ratio_of_one_is_not_warned_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Rates(1e-3, 1.0, lr_ratio_overrides={"te": 1})


def test_a_pattern_that_matches_nothing_is_refused_with_a_name_that_there_is():
    names = parameters("layer.0.lora_B", "layer.1.lora_B")
    Rates(1e-3, lr_overrides={"layer": 2, r"1\.": 3}).check(names)
    with pytest.raises(InvalidRateError, match=r"lr_overrides: 'vlaue' matches no .*; the names are like layer\.0\.lo"):
        Rates(1e-3, lr_overrides={"layer": 2, "vlaue": 2}).check(iter(names))


def test_a_ratio_by_name_must_meet_b_factors_and_each_only_once():
    entries = [*parameters("layer.0.lora_A", role=Role.A), *parameters("layer.0.lora_B", "layer.1.lora_B")]
    Rates(1e-3, lr_ratio_overrides={r"\.0\.": 4, r"\.1\.": 8}).check(entries)
    with pytest.raises(InvalidRateError, match=r"'lora_A' matches no B factor; the names are like layer\.0\.lora_B$"):
        Rates(1e-3, lr_ratio_overrides={"lora_A": 4}).check(entries)
    with pytest.raises(InvalidRateError, match=r"'lora' matches no B factor, and there is none$"):
        Rates(1e-3, lr_ratio_overrides={"lora": 4}).check(entries[:1])
    with pytest.raises(InvalidRateError, match=r"'layer' and 'lora_B' both match layer\.0\.lora_B; make them"):
        Rates(1e-3, lr_ratio_overrides={"layer": 4, "lora_B": 4}).check(entries)
