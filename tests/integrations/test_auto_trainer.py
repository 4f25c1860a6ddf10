"""Automatic rates in Trainer: logged, part of the checkpoint, and refused where they cannot be."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

import loraplus
from integrations.test_transformers import Tokens, adapted, common, weights
from loraplus import LoraPlusTrainer, LoraPlusTrainingArguments
from loraplus.errors import InvalidRateError, ResumeMismatchError, TrainerSetupError


def attached(folder, model=None, **more):
    args = TrainingArguments(**common(folder, max_steps=20, logging_steps=1, **more))
    trainer = Trainer(model=model or adapted(target_modules=["query", "value"]), args=args, train_dataset=Tokens())
    return loraplus.attach(trainer, lr="auto")


def test_the_rates_in_use_are_logged_by_group_and_explained(tmp_path):
    trainer = attached(tmp_path)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "learning_rate" in row]
    assert len(rows) == 20 and rows[0]["lr/lora_B"] == 0  # the schedule's first step
    auto = trainer.loraplus_auto
    last = rows[-1]
    assert last["lr/lora_A"] == pytest.approx(auto.lr_a / 15)  # of 15 steps of decay the last
    assert last["lr/lora_B"] == pytest.approx(auto.lr_b / 15)
    assert last["lr/head"] == pytest.approx(5e-3 / 15)
    assert last["learning_rate"] == last["lr/lora_A"]
    assert last["updates/delta2"] > 0
    table = {row["name"]: row for row in loraplus.explain(trainer.model, trainer.optimizer).groups()}
    assert table["lora_A"]["base_lr"] == auto.lr_a and table["lora_B"]["base_lr"] == auto.lr_b
    assert table["head"]["base_lr"] == 5e-3
    loraplus.verify(trainer.model, trainer.optimizer, lr_ratio=auto.lr_b / auto.lr_a, lr_head=5e-3)


def test_resuming_gives_the_weights_of_an_uninterrupted_run(tmp_path):
    whole = attached(tmp_path / "whole")
    whole.train()
    part = attached(tmp_path / "part", save_strategy="steps", save_steps=8)
    part.args.max_steps = 20
    part.train()
    again = attached(tmp_path / "again")
    again.train(resume_from_checkpoint=str(tmp_path / "part" / "checkpoint-8"))
    expected, found = weights(whole.model), weights(again.model)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    saved = json.loads((tmp_path / "part" / "checkpoint-8" / "loraplus.json").read_text())["auto"]
    assert saved["steps"] == 8 and set(next(iter(saved["layers"].values()))) == {"lora_A", "lora_B"}
    assert "grown" in saved["why"] and again.loraplus_auto.why == whole.loraplus_auto.why != saved["why"]


def test_resuming_with_the_other_kind_of_rates_is_refused(tmp_path):
    attached(tmp_path / "auto", save_strategy="steps", save_steps=10).train()
    checkpoint = str(tmp_path / "auto" / "checkpoint-10")
    args = LoraPlusTrainingArguments(**common(tmp_path / "fixed", max_steps=20, save_strategy="steps", save_steps=10))
    fixed = LoraPlusTrainer(adapted(target_modules=["query", "value"]), args, train_dataset=Tokens())
    with pytest.raises(ResumeMismatchError, match="trained with automatic rates, this run asks for rates given as num"):
        fixed.train(resume_from_checkpoint=checkpoint)
    fixed.train()
    with pytest.raises(ResumeMismatchError, match="given as numbers, this run asks for automatic rates"):
        attached(tmp_path / "x").train(resume_from_checkpoint=str(tmp_path / "fixed" / "checkpoint-10"))


def test_a_checkpoint_without_a_whole_state_is_refused(tmp_path):
    attached(tmp_path / "part", save_strategy="steps", save_steps=10).train()
    checkpoint = tmp_path / "part" / "checkpoint-10"
    (checkpoint / "loraplus_auto.pt").write_bytes(b"broken")
    with pytest.raises(ResumeMismatchError, match=r"checkpoint-10 cannot be used: loraplus_auto.pt was changed"):
        attached(tmp_path / "again").train(resume_from_checkpoint=str(checkpoint))


def test_the_arguments_class_has_it_as_a_flag_and_logs_layers(tmp_path):
    args = LoraPlusTrainingArguments(
        **common(tmp_path, max_steps=4, logging_steps=1, loraplus_auto_rates=True, loraplus_log_layers=True)
    )
    trainer = LoraPlusTrainer(adapted(target_modules=["query", "value"]), args, train_dataset=Tokens())
    trainer.train()
    layer = next(iter(trainer.loraplus_auto.layer_rates))
    assert {f"lr/{layer}.lora_A", f"lr/{layer}.lora_B"} <= set(trainer.state.log_history[-2])


def test_fixed_rates_can_log_their_updates(tmp_path):
    args = TrainingArguments(**common(tmp_path, max_steps=6, logging_steps=1))
    trainer = Trainer(adapted(target_modules=["query", "value"]), args, train_dataset=Tokens())
    loraplus.attach(trainer, lr_ratio=16, log_updates=2).train()
    rows = [row for row in trainer.state.log_history if "learning_rate" in row]
    assert rows[-1]["updates/delta2"] > 0


def test_another_word_than_auto_is_refused(tmp_path):
    trainer = Trainer(adapted(), TrainingArguments(**common(tmp_path)), train_dataset=Tokens())
    with pytest.raises(InvalidRateError, match='"auto"'):
        loraplus.attach(trainer, lr="fast")


def test_overrides_hold_on_top_of_the_automatic_pair(tmp_path):
    args = TrainingArguments(**common(tmp_path, max_steps=4, logging_steps=1))
    trainer = Trainer(adapted(target_modules=["query", "value"]), args, train_dataset=Tokens())
    loraplus.attach(trainer, lr="auto", lr_overrides={"value": 0.5}).train()
    auto = trainer.loraplus_auto
    table = loraplus.explain(trainer.model, trainer.optimizer).to_dict()["parameters"]
    for name, row in table.items():
        if "lora_" in name:
            rate = auto.lr_a if "lora_A" in name else auto.lr_b
            assert row["base_lr"] == pytest.approx(rate * (0.5 if "value" in name else 1)), name


class Groups(TrainerCallback):
    """Changes the optimizer's groups when training starts."""

    def __init__(self, change):
        self.change = change

    def on_train_begin(self, args, state, control, optimizer=None, **_):
        self.change(optimizer.param_groups)


def test_groups_that_a_callback_puts_in_another_order_are_followed(tmp_path):
    found = []
    for change in (lambda groups: None, lambda groups: groups.reverse()):
        trainer = attached(tmp_path, lr_scheduler_type="constant")
        trainer.add_callback(Groups(change))
        trainer.train()
        found.append(weights(trainer.model))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_a_factor_that_a_callback_moves_is_refused(tmp_path):
    trainer = attached(tmp_path)
    trainer.add_callback(Groups(lambda groups: groups[0]["params"].append(groups[1]["params"].pop())))
    with pytest.raises(TrainerSetupError, match=r"lora_B.* has come into lora_A"):
        trainer.train()
