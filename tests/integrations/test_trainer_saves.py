"""Saving and evaluating never fail because of the record, which is what was true when the optimizer was made."""

from __future__ import annotations

import json
import warnings

import peft
import pytest
from transformers import Trainer, TrainingArguments

import loraplus
from integrations.test_transformers import Tokens, adapted, common
from loraplus import LoraPlusTrainer, LoraPlusTrainingArguments
from loraplus.errors import LoraPlusWarning
from loraplus.integrations.optimizer_factory import LoraPlusCallback, LoraPlusOptimizer


def merge(trainer):
    trainer.model = trainer.model.merge_and_unload()


def unload(trainer):
    trainer.model = trainer.model.unload()


def freeze(trainer):
    trainer.model.requires_grad_(False)


def freeze_factors(trainer):
    for name, parameter in trainer.model.named_parameters():
        if "lora_" in name:
            parameter.requires_grad_(False)


def disable(trainer):
    trainer.model.base_model.disable_adapter_layers()


def another_adapter(trainer):
    trainer.model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["key"]))
    trainer.model.set_adapter("other")
    trainer.model.delete_adapter("default")


def another_model(trainer):
    trainer.model = adapted(r=2, target_modules=["key"])


def unknown_factor(trainer):
    trainer.model.base_model.lora_thing = next(trainer.model.parameters())


CHANGES = [merge, unload, freeze, freeze_factors, disable, another_adapter, another_model, unknown_factor]


def attached(folder, **given):
    args = TrainingArguments(**common(folder, max_steps=2, logging_steps=1, warmup_steps=0))
    trainer = Trainer(
        adapted(target_modules=["query", "value"]), args, train_dataset=Tokens(16), eval_dataset=Tokens(4)
    )
    return loraplus.attach(trainer, **given)


@pytest.mark.parametrize("given", [{"lr_ratio": 16.0}, {"lr": "auto"}])
@pytest.mark.parametrize("change", CHANGES)
def test_whatever_is_done_to_the_model_it_is_saved_with_the_record_of_its_training(tmp_path, change, given):
    trainer = attached(tmp_path, **given)
    trainer.train()
    trainer.save_model(str(tmp_path / "before"))
    change(trainer)
    with warnings.catch_warnings():
        warnings.simplefilter("error", LoraPlusWarning)
        trainer.save_model(str(tmp_path / "after"))
    before, after = (json.loads((tmp_path / when / "loraplus.json").read_text()) for when in ("before", "after"))
    assert before == after and set(after["roles"].values()) == {"lora_A", "lora_B", "head"}
    assert after["lr_ratio"] == given.get("lr_ratio", 1.0) and ("auto" in after) == ("lr" in given)
    trainer.evaluate()


def test_a_model_changed_within_training_is_saved(tmp_path):
    class Freezes(Trainer):
        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            if self.state.global_step == 1:
                freeze_factors(self)
            return loss

    args = TrainingArguments(**common(tmp_path, max_steps=3, save_strategy="steps", save_steps=1))
    trainer = loraplus.attach(Freezes(adapted(), args, train_dataset=Tokens(32)), lr_ratio=8)
    trainer.train()
    records = [json.loads((tmp_path / f"checkpoint-{step}" / "loraplus.json").read_text()) for step in (1, 3)]
    assert records[0] == records[1] and records[0]["lr_ratio"] == 8


def test_so_is_one_of_a_factory_with_its_callback(tmp_path):
    class Freezes(Trainer):
        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            freeze(self)
            return loss

    how = (LoraPlusOptimizer, {"lr": 1e-3, "loraplus_lr_ratio": 8.0})
    args = TrainingArguments(**common(tmp_path, max_steps=1, save_strategy="steps", save_steps=1))
    trainer = Freezes(
        adapted(), args, train_dataset=Tokens(32), optimizer_cls_and_kwargs=how, callbacks=[LoraPlusCallback()]
    )
    trainer.train()
    assert json.loads((tmp_path / "checkpoint-1" / "loraplus.json").read_text())["lr_ratio"] == 8


@pytest.mark.parametrize("change", [None, *CHANGES])
def test_without_training_there_is_nothing_to_record_and_evaluation_works(tmp_path, change):
    trainer = attached(tmp_path)
    if change:
        change(trainer)
    trainer.save_model(str(tmp_path / "saved"))
    assert any((tmp_path / "saved").rglob("*.safetensors")) and not (tmp_path / "saved" / "loraplus.json").exists()
    assert trainer.evaluate()["eval_loss"] > 0
    assert len(trainer.predict(Tokens(4)).predictions) == 4


@pytest.mark.parametrize("change", [merge, freeze, disable])
def test_a_model_that_cannot_be_trained_can_be_evaluated(tmp_path, change):
    args = common(tmp_path)
    model = attached(tmp_path)
    change(model)
    plain = loraplus.attach(Trainer(model.model, TrainingArguments(**args), eval_dataset=Tokens(4)))
    ours = LoraPlusTrainer(model.model, LoraPlusTrainingArguments(**args), eval_dataset=Tokens(4))
    assert plain.evaluate()["eval_loss"] == ours.evaluate()["eval_loss"]
    with pytest.raises(loraplus.LoraPlusError):
        plain.create_optimizer()


def test_a_record_that_cannot_be_written_is_a_warning(tmp_path):
    trainer = attached(tmp_path)
    trainer.train()
    (tmp_path / "saved" / "loraplus.json").mkdir(parents=True)
    with pytest.warns(LoraPlusWarning, match="the model is saved, but the record of its rates could not be written"):
        trainer.save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "adapter_model.safetensors").exists()


def test_a_checkpoint_of_another_rank_is_refused_in_one_line_before_it_is_loaded(tmp_path):
    def trainer(rank):
        args = LoraPlusTrainingArguments(**common(tmp_path, max_steps=2, save_strategy="steps", save_steps=2))
        return LoraPlusTrainer(adapted(r=rank), args, train_dataset=Tokens())

    trainer(8).train()
    with pytest.raises(loraplus.ResumeMismatchError, match="rank was 8 there, 2 here") as refusal:
        trainer(2).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert "\n" not in str(refusal.value)
