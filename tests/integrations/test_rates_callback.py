"""Trainers built from a configuration: what their checkpoints say after a freeze, and what flattens their ratio."""

from __future__ import annotations

import json
import warnings

import pytest
from stacks.models import Tokens, classifier
from transformers import Trainer, TrainerCallback, TrainingArguments

import loraplus
from loraplus.integrations.optimizer_factory import LoraPlusCallback, LoraPlusOptimizer


def trainer(folder, callbacks=(), **options):
    args = TrainingArguments(
        str(folder), use_cpu=True, report_to=[], disable_tqdm=True, per_device_train_batch_size=8,
        **{"max_steps": 4, "save_steps": 2, "save_only_model": True, "logging_steps": 1, **options},
    )  # fmt: skip
    how = (LoraPlusOptimizer, {"lr": 1e-3, "loraplus_lr_ratio": 16})
    return Trainer(
        model=classifier(), args=args, train_dataset=Tokens(), eval_dataset=Tokens(8),
        optimizer_cls_and_kwargs=how, callbacks=[*callbacks, LoraPlusCallback()],
    )  # fmt: skip


class At(TrainerCallback):
    """Does something to the model before a checkpoint is written."""

    def __init__(self, what):
        self.what = what

    def on_step_end(self, args, state, control, model=None, **_):
        if state.global_step == args.max_steps:
            self.what(model)


@pytest.mark.parametrize("what", ["requires_grad_", "disable_adapter_layers", "merge_and_unload"])
def test_a_checkpoint_after_the_adapter_was_changed_says_what_was_true(what, tmp_path):
    def change(model):
        model.requires_grad_(False) if what == "requires_grad_" else getattr(model.base_model, what)()

    run = trainer(tmp_path, [At(change)])
    run.train()
    saved = [json.loads((tmp_path / f"checkpoint-{step}" / "loraplus.json").read_text()) for step in (2, 4)]
    assert saved[0] == saved[1] and saved[0]["lr_ratio"] == 16 and len(saved[0]["roles"]) == 10


def test_a_schedule_with_a_least_rate_is_told_once(tmp_path):
    plateau = {
        "lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": {"patience": 0, "threshold": 9},
        "eval_strategy": "steps", "eval_steps": 1, "max_steps": 8, "save_strategy": "no",
    }  # fmt: skip
    for least, told in ((1e-4, 1), ([1e-4, 16e-4, 1e-4], 0)):
        plateau["lr_scheduler_kwargs"]["min_lr"] = least
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", loraplus.LoraPlusWarning)
            trainer(tmp_path, **plateau).train()
        found = [str(entry.message) for entry in caught if entry.category is loraplus.LoraPlusWarning]
        assert len(found) == told, found
        assert all("ReduceLROnPlateau did it" in text and "min_lr=[0.0001, 0.0016, 0.0001]" in text for text in found)
