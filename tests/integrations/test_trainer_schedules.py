"""No schedule of Trainer's brings the rates of A, B and head together, one that ends at a rate of its own included."""

from __future__ import annotations

import pytest
import torch
from transformers import Trainer, TrainingArguments
from transformers.optimization import GreedyLR
from transformers.trainer_utils import SchedulerType

import loraplus
from integrations.test_transformers import Tokens, adapted, common

LR = 5e-3
NEVER_BETTER = {"threshold": 1e9, "threshold_mode": "abs", "patience": 0}
ALWAYS_BETTER = {"threshold": -1e9, "threshold_mode": "abs", "patience": 0}
SCHEDULES = [
    ("linear", {}),
    ("cosine", {}),
    ("cosine_with_restarts", {"num_cycles": 2}),
    ("polynomial", {"lr_end": 1e-3, "power": 2.0}),
    ("constant", {}),
    ("constant_with_warmup", {}),
    ("inverse_sqrt", {"timescale": 3}),
    ("reduce_lr_on_plateau", {**NEVER_BETTER, "factor": 0.3, "min_lr": 1e-3}),
    ("reduce_lr_on_plateau", {**NEVER_BETTER, "factor": 0.5, "min_lr": 0.0}),
    ("reduce_lr_on_plateau", {**NEVER_BETTER, "factor": 0.01, "eps": 1e-4}),
    ("cosine_with_min_lr", {"min_lr": 1e-3}),
    ("cosine_with_min_lr", {"min_lr_rate": 0.3}),
    ("cosine_warmup_with_min_lr", {"min_lr": 1e-3, "warmup_lr_rate": 0.5}),
    ("warmup_stable_decay", {"num_decay_steps": 5, "min_lr_ratio": 0.2}),
    ("greedy", {**NEVER_BETTER, "factor": 0.5}),
    ("greedy", {**ALWAYS_BETTER, "factor": 0.5, "max_lr": 0.02}),
    ("greedy", {**NEVER_BETTER, "factor": 0.5, "min_lr": 2e-3, "reset_start": 2}),
]


def test_every_schedule_of_trainer_is_here():
    assert {name for name, _ in SCHEDULES} == {kind.value for kind in SchedulerType}


def run(folder, kind, name, options, **given):
    more = {"eval_strategy": "steps", "eval_steps": 1} if name in ("reduce_lr_on_plateau", "greedy") else {}
    arguments = common(
        folder, max_steps=8, warmup_steps=2, logging_steps=1, lr_scheduler_type=name,
        lr_scheduler_kwargs=options, optim="sgd", **more,
    )  # fmt: skip
    trainer = kind(adapted(), TrainingArguments(**arguments), train_dataset=Tokens(), eval_dataset=Tokens(4))
    if given:
        loraplus.attach(trainer, **given)
    trainer.train()
    return [row for row in trainer.state.log_history if "learning_rate" in row]


@pytest.mark.parametrize(("name", "options"), SCHEDULES)
def test_the_ratio_holds_at_every_step_and_a_follows_the_plain_schedule(tmp_path, name, options):
    plain = [row["learning_rate"] for row in run(tmp_path, Trainer, name, options)]
    rows = run(tmp_path, Trainer, name, options, lr_ratio=16, lr_head=LR / 4)
    assert len(rows) == len(plain) == 8
    for row, rate in zip(rows, plain, strict=True):
        assert row["lr/lora_B"] == pytest.approx(16 * row["lr/lora_A"], rel=1e-9)
        assert row["lr/head"] == pytest.approx(row["lr/lora_A"] / 4, rel=1e-9)
        if "eps" not in options:  # which keeps one rate from falling further, and several do not have
            assert row["lr/lora_A"] == pytest.approx(rate, rel=1e-9)


class Own(Trainer):
    """Builds its scheduler itself, as those that want a metric of their own do."""

    def create_scheduler(self, num_training_steps, optimizer=None):
        self.lr_scheduler = self.make(optimizer or self.optimizer)
        return self.lr_scheduler


class Plateau(Own):
    def make(self, optimizer):
        return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.3, min_lr=1e-3, patience=0)


class Greedy(Own):
    def make(self, optimizer):
        return GreedyLR(optimizer, **ALWAYS_BETTER, factor=0.5, max_lr=8e-3)


@pytest.mark.parametrize("kind", [Plateau, Greedy])
def test_a_scheduler_that_the_trainer_builds_itself_keeps_it_too(tmp_path, kind):
    rows = run(tmp_path, kind, "reduce_lr_on_plateau", {}, lr_ratio=4)
    assert len({row["lr/lora_A"] for row in rows}) > 1
    for row in rows:
        assert row["lr/lora_B"] == pytest.approx(4 * row["lr/lora_A"], rel=1e-9)


def test_at_ratio_one_a_schedule_is_left_as_it_is(tmp_path):
    name, options = "reduce_lr_on_plateau", {**NEVER_BETTER, "factor": 0.01, "eps": 1e-4}
    plain = [row["learning_rate"] for row in run(tmp_path, Trainer, name, options)]
    ours = run(tmp_path, Trainer, name, options, lr_ratio=1)
    assert [row["lr/lora_A"] for row in ours] == [row["lr/lora_B"] for row in ours] == plain


def test_least_rates_given_for_each_group_are_the_users_own(tmp_path):
    groups = (
        loraplus.attach(Trainer(adapted(), TrainingArguments(**common(tmp_path)), train_dataset=Tokens()))
        .create_optimizer()
        .param_groups
    )
    least = [5e-4 * (index + 1) for index in range(len(groups))]
    rows = run(tmp_path, Trainer, "reduce_lr_on_plateau", {**NEVER_BETTER, "min_lr": least}, lr_ratio=16)
    names = [group["name"] for group in groups]
    assert [rows[-1][f"lr/{name}"] for name in names] == pytest.approx(least)


def test_the_least_rates_go_on_after_resuming(tmp_path):
    options = {**NEVER_BETTER, "factor": 0.3, "min_lr": 1e-3}

    def trainer(steps):
        args = TrainingArguments(**common(
            tmp_path, max_steps=steps, lr_scheduler_type="reduce_lr_on_plateau", lr_scheduler_kwargs=options,
            eval_strategy="steps", eval_steps=1, logging_steps=1, save_strategy="steps", save_steps=2,
        ))  # fmt: skip
        return loraplus.attach(Trainer(adapted(), args, train_dataset=Tokens(), eval_dataset=Tokens(4)), lr_ratio=16)

    trainer(2).train()
    again = trainer(8)
    again.train(resume_from_checkpoint=True)
    rows = [row for row in again.state.log_history if "lr/lora_A" in row]
    assert len(rows) == 8 and rows[-1]["lr/lora_A"] == pytest.approx(1e-3)
    assert all(row["lr/lora_B"] == pytest.approx(16 * row["lr/lora_A"]) for row in rows)
