"""LoRA+ in transformers' Trainer: identity at ratio 1, logs, checkpoints, refusals."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
from conftest import tiny_bert
from peft import LoraConfig, get_peft_model
from torch.utils.data import Dataset
from transformers import DefaultDataCollator, Trainer, TrainingArguments

import loraplus
from loraplus import LoraPlusTrainer, LoraPlusTrainingArguments
from loraplus.integrations.checkpoints import check_resume


class Tokens(Dataset):
    def __init__(self, count: int = 64) -> None:
        generator = torch.Generator().manual_seed(1)
        self.ids = torch.randint(5, 64, (count, 12), generator=generator)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict:
        ids = self.ids[index]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": int(ids.sum()) % 2}


def adapted(**lora):
    options = {"r": 4, "target_modules": ["query", "value", "word_embeddings"], "modules_to_save": ["classifier"]}
    torch.manual_seed(3)
    return get_peft_model(tiny_bert(), LoraConfig(**{**options, **lora}))


def common(folder, **more):
    return {
        "output_dir": str(folder), "learning_rate": 5e-3, "max_steps": 50, "per_device_train_batch_size": 8,
        "weight_decay": 0.1, "warmup_steps": 5, "logging_steps": 10, "save_strategy": "no", "report_to": [],
        "disable_tqdm": True, "use_cpu": True, "label_names": ["labels"], **more,
    }  # fmt: skip


def weights(model):
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "sgd", "adafactor"])
@pytest.mark.parametrize("lora", [{}, {"use_dora": True, "bias": "all", "target_modules": ["query", "dense"]}])
def test_ratio_one_is_plain_trainer_bit_for_bit(tmp_path, optim, lora):
    model = adapted(**lora)
    twin = copy.deepcopy(model)
    start = weights(model)
    Trainer(model=model, args=TrainingArguments(**common(tmp_path, optim=optim)), train_dataset=Tokens()).train()
    args = LoraPlusTrainingArguments(**common(tmp_path, optim=optim, loraplus_lr_ratio=1.0))
    trainer = LoraPlusTrainer(model=twin, args=args, train_dataset=Tokens())
    trainer.train()
    for name, value in weights(model).items():
        assert torch.equal(value, weights(twin)[name]), name
        assert not torch.equal(value, start[name]), f"{name} did not train"
    decays = {group["weight_decay"] for group in trainer.optimizer.param_groups}
    assert decays == {0.0, 0.1}


def test_every_groups_rate_is_logged_by_name_and_keeps_the_ratio(tmp_path):
    args = LoraPlusTrainingArguments(**common(tmp_path, loraplus_lr_ratio=8.0, logging_steps=1, max_steps=20))
    trainer = LoraPlusTrainer(model=adapted(), args=args, train_dataset=Tokens())
    trainer.train()
    rows = [row for row in trainer.state.log_history if "learning_rate" in row]
    assert len(rows) == 20
    for row in rows:
        assert row["lr/lora_B"] == pytest.approx(8 * row["lr/lora_A"])
        assert row["lr/lora_embedding_A"] == row["lr/lora_A"] == row["learning_rate"] == row["lr/head"]
    loraplus.verify(trainer.model, trainer.optimizer, lr_ratio=8.0, lr=5e-3)


def test_attach_keeps_the_class_and_what_a_subclass_does(tmp_path):
    class Own(Trainer):
        steps = 0

        def training_step(self, *args, **kwargs):
            self.steps += 1
            return super().training_step(*args, **kwargs)

    args = TrainingArguments(**common(tmp_path, max_steps=4))
    trainer = Own(model=adapted(), args=args, train_dataset=Tokens())
    assert loraplus.attach(trainer, lr_ratio=4.0, lr_head=1e-4) is trainer
    trainer.train()
    assert isinstance(trainer, Own) and trainer.steps == 4
    table = loraplus.verify(trainer.model, trainer.optimizer, lr_ratio=4.0, lr_head=1e-4)
    assert {entry.base_lr for entry in table.entries if entry.role == "head"} == {1e-4}


def test_optimizer_flags_of_training_arguments_keep_working(tmp_path):
    args = LoraPlusTrainingArguments(**common(tmp_path, adam_beta2=0.99, adam_epsilon=1e-6, lr_scheduler_type="cosine"))
    trainer = LoraPlusTrainer(model=adapted(), args=args, train_dataset=Tokens())
    optimizer = trainer.create_optimizer()
    assert isinstance(optimizer, torch.optim.AdamW)
    assert all(group["betas"] == (0.9, 0.99) and group["eps"] == 1e-6 for group in optimizer.param_groups)


def test_optimizer_cls_and_kwargs_of_the_trainer_is_used_with_its_lr(tmp_path):
    trainer = Trainer(
        model=adapted(), args=TrainingArguments(**common(tmp_path)), train_dataset=Tokens(),
        optimizer_cls_and_kwargs=(torch.optim.NAdam, {"lr": 1.0, "betas": (0.8, 0.9)}),
    )  # fmt: skip
    optimizer = loraplus.attach(trainer, lr_ratio=16.0).create_optimizer()
    assert isinstance(optimizer, torch.optim.NAdam)
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.9)
    loraplus.verify(trainer.model, optimizer, lr_ratio=16.0, lr=1.0)


def test_resumed_run_ends_at_the_weights_of_an_uninterrupted_one(tmp_path):
    def run(folder, **train):
        args = LoraPlusTrainingArguments(**common(folder, max_steps=20, save_strategy="steps", save_steps=10))
        trainer = LoraPlusTrainer(model=adapted(), args=args, train_dataset=Tokens())
        trainer.train(**train)
        return weights(trainer.model)

    whole = run(tmp_path)
    saved = json.loads((tmp_path / "checkpoint-10" / "loraplus.json").read_text())
    assert saved["lr_ratio"] == 16.0 and "lora_B" in saved["roles"].values()
    resumed = run(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_resuming_under_another_ratio_is_refused_with_a_way_on(tmp_path):
    first = LoraPlusTrainingArguments(**common(tmp_path, max_steps=4, save_strategy="steps", save_steps=4))
    LoraPlusTrainer(model=adapted(), args=first, train_dataset=Tokens()).train()
    other = LoraPlusTrainingArguments(**common(tmp_path, max_steps=8, loraplus_lr_ratio=2.0))
    trainer = LoraPlusTrainer(model=adapted(), args=other, train_dataset=Tokens())
    with pytest.raises(loraplus.ResumeMismatchError, match=r"lr_ratio = 16.*asks for 2.*PeftModel.from_pretrained"):
        trainer.train(resume_from_checkpoint=True)


def test_a_checkpoint_of_plain_lora_is_refused(tmp_path):
    args = common(tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    Trainer(model=adapted(), args=TrainingArguments(**args), train_dataset=Tokens()).train()
    trainer = loraplus.attach(
        Trainer(model=adapted(), args=TrainingArguments(**common(tmp_path)), train_dataset=Tokens())
    )
    with pytest.raises(loraplus.ResumeMismatchError, match="not trained with LoRA"):
        trainer.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("content", ["{", "[]", "\xff"])
def test_a_checkpoint_whose_rates_cannot_be_read_is_refused(tmp_path, content):
    (tmp_path / "loraplus.json").write_text(content, encoding="latin-1")
    with pytest.raises(loraplus.ResumeMismatchError, match=r"loraplus.json cannot be read.*PeftModel.from_pretrained"):
        check_resume(tmp_path, loraplus.Rates(1e-3))


def test_the_trainer_class_takes_trainers_arguments_in_their_order(tmp_path):
    collator, data = DefaultDataCollator(), Tokens()
    trainer = LoraPlusTrainer(adapted(), LoraPlusTrainingArguments(**common(tmp_path)), collator, data)
    assert trainer.data_collator is collator and trainer.train_dataset is data


def test_a_ratio_below_one_warns_once_a_run(tmp_path):
    args = common(tmp_path, max_steps=2, loraplus_lr_ratio=0.5, save_strategy="steps", save_steps=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        LoraPlusTrainer(model=adapted(), args=LoraPlusTrainingArguments(**args), train_dataset=Tokens()).train()
    assert sum("below 1" in str(warning.message) for warning in caught) == 1


def test_a_learning_rate_changed_after_attaching_is_used(tmp_path):
    trainer = Trainer(model=adapted(), args=TrainingArguments(**common(tmp_path)), train_dataset=Tokens())
    loraplus.attach(trainer, lr_ratio=4.0)
    trainer.args.learning_rate = 1e-4
    loraplus.verify(trainer.model, trainer.create_optimizer(), lr_ratio=4.0, lr=1e-4)


@pytest.mark.parametrize("overrides", ["[1]", "1", "{"])
def test_overrides_that_are_no_mapping_are_refused(tmp_path, overrides):
    with pytest.raises(loraplus.TrainerSetupError, match="loraplus_lr_overrides"):
        LoraPlusTrainingArguments(**common(tmp_path, loraplus_lr_overrides=overrides))


def test_a_trainer_that_has_an_optimizer_already_is_refused(tmp_path):
    model = adapted()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    trainer = Trainer(
        model=model, args=TrainingArguments(**common(tmp_path)), train_dataset=Tokens(), optimizers=(optimizer, None)
    )
    with pytest.raises(loraplus.TrainerSetupError, match="optimizer already"):
        loraplus.attach(trainer, lr_ratio=16.0)


def test_a_model_without_factors_is_refused_when_attaching(tmp_path):
    trainer = Trainer(model=tiny_bert(), args=TrainingArguments(**common(tmp_path)), train_dataset=Tokens())
    with pytest.raises(loraplus.NoLoraFactorsError, match="no LoRA factor"):
        loraplus.attach(trainer)


def test_plain_training_arguments_are_refused_by_the_trainer_class(tmp_path):
    with pytest.raises(loraplus.TrainerSetupError, match="attach"):
        LoraPlusTrainer(model=adapted(), args=TrainingArguments(**common(tmp_path)), train_dataset=Tokens())


RATIOS = {"query": 4.0, "value": 8.0}


def has_ratios(trainer):
    loraplus.verify(trainer.model, trainer.create_optimizer(), lr_ratio=16.0, lr=5e-3, lr_ratio_overrides=RATIOS)
    rates = {group["name"]: group["lr"] for group in trainer.optimizer.param_groups}
    assert rates["lora_B_ratio4"] == pytest.approx(0.02) and rates["lora_B_ratio8"] == pytest.approx(0.04)


def test_ratios_by_name_through_attach_and_through_the_arguments(tmp_path):
    trainer = Trainer(model=adapted(), args=TrainingArguments(**common(tmp_path)), train_dataset=Tokens())
    has_ratios(loraplus.attach(trainer, lr_ratio_overrides=RATIOS))
    for given in (RATIOS, json.dumps(RATIOS)):
        args = LoraPlusTrainingArguments(**common(tmp_path, loraplus_lr_ratio_overrides=given))
        has_ratios(LoraPlusTrainer(model=adapted(), args=args, train_dataset=Tokens()))
    with pytest.raises(loraplus.TrainerSetupError, match="loraplus_lr_ratio_overrides is not JSON"):
        LoraPlusTrainingArguments(**common(tmp_path, loraplus_lr_ratio_overrides="{query: 4}"))
    again = Trainer(model=adapted(), args=TrainingArguments(**common(tmp_path)), train_dataset=Tokens())
    with pytest.raises(loraplus.InvalidRateError, match="lr_ratio_overrides is not used with automatic rates"):
        loraplus.attach(again, lr="auto", lr_ratio_overrides=RATIOS)


def test_resuming_at_other_ratios_by_name_is_refused(tmp_path):
    options = common(tmp_path, max_steps=4, save_strategy="steps", save_steps=4)
    args = LoraPlusTrainingArguments(**options, loraplus_lr_ratio_overrides=RATIOS)
    LoraPlusTrainer(model=adapted(), args=args, train_dataset=Tokens()).train()
    other = LoraPlusTrainingArguments(**{**options, "max_steps": 8}, loraplus_lr_ratio_overrides={"query": 4.0})
    with pytest.raises(loraplus.ResumeMismatchError, match="lr_ratio_overrides"):
        LoraPlusTrainer(model=adapted(), args=other, train_dataset=Tokens()).train(resume_from_checkpoint=True)


def test_ratios_by_name_through_optimizer_cls_and_kwargs(tmp_path):
    from loraplus.integrations.optimizer_factory import LoraPlusOptimizer

    how = (LoraPlusOptimizer, {"lr": 5e-3, "loraplus_lr_ratio_overrides": RATIOS})
    args = TrainingArguments(**common(tmp_path))
    has_ratios(Trainer(model=adapted(), args=args, train_dataset=Tokens(), optimizer_cls_and_kwargs=how))


def test_an_optimizer_that_takes_one_group_is_refused(tmp_path):
    trainer = Trainer(
        model=adapted(), args=TrainingArguments(**common(tmp_path)), train_dataset=Tokens(),
        optimizer_cls_and_kwargs=(torch.optim.LBFGS, {}),
    )  # fmt: skip
    with pytest.raises(loraplus.OptimizerSetupError, match="LBFGS takes one parameter group"):
        loraplus.attach(trainer).create_optimizer()
