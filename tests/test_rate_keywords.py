"""What takes rates takes a `Rates` or its fields, and a field of `Rates` is declared once for all of them."""

from __future__ import annotations

import inspect
import subprocess
import sys
from dataclasses import fields

import pytest
import torch
from test_groups import adapted

import loraplus
from loraplus.errors import InvalidRateError
from loraplus.integrations.lightning import LoraPlusCallback
from loraplus.integrations.optimizer_factory import LoraPlusOptimizer
from loraplus.integrations.trl import LoraPlusArguments
from loraplus.rates import SETTINGS, Rates
from loraplus.tasks.config import TrainConfig

OWN = {"lr_head": 3e-4, "lr_overrides": {"query": 0.5}, "lr_ratio_overrides": {"value": 4.0}}


def shown(groups):
    return [(group["name"], group["lr"], len(group["params"])) for group in groups]


def test_a_rates_object_and_its_fields_make_the_same_groups():
    rates = Rates(1e-3, 8.0, **OWN)
    keywords = {"lr": 1e-3, "lr_ratio": 8.0, **OWN}
    model = adapted()
    expected = shown(loraplus.param_groups(model, 1e-3, 8.0, 0.1, **OWN))
    assert shown(loraplus.param_groups(model, rates, 0.1)) == expected
    assert shown(loraplus.param_groups(model, rates=rates, weight_decay=0.1)) == expected
    assert shown(loraplus.param_groups(model, weight_decay=0.1, **keywords)) == expected
    for optimizer in (
        loraplus.create_optimizer(model, torch.optim.SGD, rates),
        loraplus.create_optimizer(model, torch.optim.SGD, rates=rates),
        loraplus.create_optimizer(model, torch.optim.SGD, **keywords),
        LoraPlusOptimizer()(model, optimizer_cls=torch.optim.SGD, rates=rates),
    ):
        for proof in (rates, Rates(None, 8.0, **OWN)):
            loraplus.verify(model, optimizer, proof)
        loraplus.verify(model, optimizer, **keywords)
        with pytest.raises(loraplus.RateMismatchError):
            loraplus.verify(model, optimizer, Rates(1e-3, 4.0, **OWN))


def test_a_rates_object_splits_groups_and_makes_a_callback():
    model = adapted()
    own = [{"params": model.parameters(), "lr": 1e-3}]
    expected = shown(loraplus.split_groups(model, own := [{**own[0], "params": list(model.parameters())}], 8.0))
    assert shown(loraplus.split_groups(model, own, Rates(lr_ratio=8.0))) == expected
    with pytest.raises(InvalidRateError, match="lr_head is not used when groups are given"):
        loraplus.split_groups(model, own, Rates(lr_ratio=8.0, lr_head=1e-3))
    assert LoraPlusCallback(Rates(lr_ratio=8.0)).asked == LoraPlusCallback(8.0).asked == Rates(lr_ratio=8.0)


def test_rates_are_given_once_and_where_they_are_needed():
    model = adapted()
    with pytest.raises(InvalidRateError, match="lr_ratio is given beside a Rates"):
        loraplus.create_optimizer(model, torch.optim.SGD, Rates(1e-3), lr_ratio=4)
    with pytest.raises(InvalidRateError, match="rates is given beside a Rates"):
        loraplus.param_groups(model, Rates(1e-3), rates=Rates(1e-3))
    with pytest.raises(TypeError, match=r"create_optimizer\(\) missing a required.* 'lr'"):
        loraplus.create_optimizer(model)
    with pytest.raises(TypeError, match=r"verify\(\) got an unexpected keyword argument 'lr_hed'"):
        loraplus.verify(model, None, 16, lr_hed=1e-3)
    with pytest.raises(InvalidRateError, match="lr must be a number, got"):
        loraplus.create_optimizer(model, torch.optim.SGD, Rates())
    with pytest.raises(InvalidRateError, match="lr must be a number, got"):
        loraplus.param_groups(model, Rates("auto"))


def test_a_rate_in_a_tensor_stays_one():
    rates = Rates(torch.tensor(1e-3), 4)
    groups = loraplus.create_optimizer(adapted(), torch.optim.Adam, rates).param_groups
    assert all(isinstance(group["lr"], torch.Tensor) for group in groups)
    assert len({id(group["lr"]) for group in groups}) == len(groups)


@pytest.mark.parametrize(
    ("function", "prefix"),
    [
        (loraplus.param_groups, ""), (loraplus.create_optimizer, ""), (loraplus.split_groups, ""),
        (loraplus.verify, ""), (loraplus.attach, ""), (LoraPlusOptimizer.__call__, "loraplus_"),
        (LoraPlusCallback, "loraplus_"),
    ],
)  # fmt: skip
def test_every_field_is_a_keyword_with_its_default(function, prefix):
    parameters = inspect.signature(function).parameters
    for field in fields(Rates):
        if field.name != "lr":
            default = parameters[prefix + field.name].default
            assert default in (inspect.Parameter.empty, getattr(Rates(), field.name) or None), field.name


def test_a_flag_says_what_the_field_says():
    train = {field.name: field.metadata["help"] for field in fields(TrainConfig)}
    own_words = {"lr", "lr_ratio", "lr_head"}  # in `train`, beside --lr auto and with another default
    for arguments in (loraplus.LoraPlusTrainingArguments, LoraPlusArguments):
        told = {field.name: field.metadata.get("help") for field in fields(arguments)}
        for name, setting in SETTINGS.items():
            assert name == "lr" or told[f"loraplus_{name}"] == setting.metadata["help"]
            assert name in own_words or train[name] == setting.metadata["help"]


ANOTHER = """
import importlib.util, inspect, sys
spec = importlib.util.find_spec("loraplus.rates")
source = open(spec.origin, encoding="utf-8").read()
added = 'lr_gate: float | None = _rate_of(frozenset({Role.OTHER}), "a gate", "Rate of gates.")'
source = source.replace("    def __post_init__", f"    {added}\\n\\n    def __post_init__", 1)
module = sys.modules["loraplus.rates"] = importlib.util.module_from_spec(spec)
exec(compile(source, spec.origin, "exec"), vars(module))

import loraplus
from loraplus.cli import main
from loraplus.integrations.lightning import LoraPlusCallback
from loraplus.integrations.optimizer_factory import LoraPlusOptimizer
from loraplus.integrations.trl import LoraPlusArguments
from loraplus.roles import Role

for function in (loraplus.param_groups, loraplus.create_optimizer, loraplus.split_groups, loraplus.verify,
                 loraplus.attach):
    assert "lr_gate" in inspect.signature(function).parameters, function
for function in (LoraPlusOptimizer.__call__, LoraPlusCallback, loraplus.LoraPlusTrainingArguments, LoraPlusArguments):
    assert "loraplus_lr_gate" in inspect.signature(function).parameters, function
assert loraplus.Rates(1e-3, lr_gate=2e-3).of(Role.OTHER) == 2e-3
asked = loraplus.LoraPlusTrainingArguments("out", loraplus_lr_gate=2e-3, use_cpu=True).loraplus_settings()
assert asked.rates.lr_gate == 2e-3
main(["train", "--help"])
"""


def test_a_field_that_is_added_to_rates_is_a_keyword_an_argument_and_a_flag_at_once():
    done = subprocess.run([sys.executable, "-c", ANOTHER], capture_output=True, text=True)
    assert "--lr-gate" in done.stdout and "Rate of gates." in done.stdout, done.stderr
