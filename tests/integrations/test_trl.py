"""The rates as flags of a TRL script; its trainers themselves are in tests/stacks."""

from __future__ import annotations

import warnings

import pytest
from transformers import HfArgumentParser, Trainer, TrainingArguments

import loraplus
from integrations.test_transformers import RATIOS, Tokens, adapted, common, has_ratios
from loraplus.integrations.trl import LoraPlusArguments


def trainer(folder):
    return Trainer(model=adapted(), args=TrainingArguments(**common(folder)), train_dataset=Tokens())


def test_flags_of_the_command_line_are_the_rates_of_the_trainer(tmp_path):
    flags = ["--loraplus_lr_ratio", "16", "--loraplus_lr_ratio_overrides", '{"query": 4.0, "value": 8.0}']
    (rates,) = HfArgumentParser(LoraPlusArguments).parse_args_into_dataclasses(flags)
    attached = rates.attach(trainer(tmp_path))
    assert attached.loraplus_rates.lr_ratio_overrides == RATIOS
    has_ratios(attached)


@pytest.mark.parametrize("text", ["{query: 4}", "[4]"])
def test_overrides_that_are_no_json_object_are_refused(tmp_path, text):
    with pytest.raises(loraplus.TrainerSetupError, match="loraplus_lr_overrides"):
        LoraPlusArguments(loraplus_lr_overrides=text).attach(trainer(tmp_path))


@pytest.mark.parametrize(("name", "warned"), [("DPOTrainer", True), ("SFTTrainer", False)])
def test_it_is_said_that_automatic_rates_are_not_made_for_preferences(tmp_path, name, warned):
    kind = type(name, (Trainer,), {})
    made = kind(model=adapted(), args=TrainingArguments(**common(tmp_path)), train_dataset=Tokens())
    attached = loraplus.attach(made, lr="auto")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        attached.create_optimizer()
        attached.train()
    told = [str(one.message) for one in caught if "not made for DPOTrainer" in str(one.message)]
    assert len(told) == warned
