"""Beside Trainer, TRL's trainers, `attach` and AutoRates: the same losses, metrics and weights."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

import loraplus
from loraplus.auto import AutoRates
from loraplus.feature_updates import UpdateMonitor
from loraplus.speed import slow_down, speed_up
from speed.models import CLASSIFIERS, adapted, apart, batch_of


class Rows(Dataset):
    def __init__(self, family):
        self.batch = batch_of(family, rows=4, length=10)

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return {name: value[index] for name, value in self.batch.items()}


def weights(model):
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}


def run(folder, family, fast, trainer_class=Trainer, attach=False, **options):
    """(weights, logged numbers, predictions) of a short run."""
    model = adapted(family, {"lora_dropout": 0.1})
    if fast:
        assert speed_up(model).replaced
    settings = {
        "output_dir": str(folder), "learning_rate": 1e-2, "max_steps": 4, "per_device_train_batch_size": 2,
        "logging_steps": 1, "save_strategy": "no", "report_to": [], "disable_tqdm": True, "use_cpu": True,
        "eval_strategy": "steps", "eval_steps": 2, "optim": "sgd", "seed": 0, **options,
    }  # fmt: skip
    trainer = trainer_class(
        model=model, args=TrainingArguments(**settings), train_dataset=Rows(family), eval_dataset=Rows(family)
    )
    if attach:
        loraplus.attach(trainer, lr_ratio=8.0)
    trainer.train()
    logged = [
        torch.tensor(row[name]) for row in trainer.state.log_history
        for name in ("loss", "eval_loss", "grad_norm") if name in row
    ]  # fmt: skip
    predictions = trainer.predict(Rows(family)).predictions
    if fast:
        assert slow_down(model)
    return weights(trainer.model), logged, torch.as_tensor(predictions)


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("options", [
    {}, {"attach": True}, {"label_smoothing_factor": 0.1}, {"gradient_accumulation_steps": 2},
    {"gradient_checkpointing": True}, {"bf16": True}, {"max_grad_norm": 1e-3},
], ids=str)  # fmt: skip
def test_a_run_of_trainer_is_the_same(family, options, tmp_path):
    slow = run(tmp_path, family, False, **options)
    fast = run(tmp_path, family, True, **options)
    tolerance = 5e-3 if options.get("bf16") else 1e-5
    assert apart(fast[0], slow[0]) < tolerance
    assert len(fast[1]) == len(slow[1]) > 5
    for one, other in zip(fast[1], slow[1], strict=True):
        assert torch.allclose(one, other, rtol=10 * tolerance)
    assert torch.allclose(fast[2], slow[2], atol=100 * tolerance)


class OwnLoss(Trainer):
    """Looks at the logits itself."""

    def compute_loss(self, model, inputs, return_outputs=False, **_):
        out = model(**inputs)
        loss = out.loss + 0.1 * out.logits.logsumexp(-1).pow(2).mean()
        return (loss, out) if return_outputs else loss


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_loss_that_uses_logits_beside_the_model_s_own_is_the_same(family, tmp_path):
    slow, fast = (run(tmp_path, family, fast, OwnLoss) for fast in (False, True))
    assert apart(fast[0], slow[0]) < 1e-5


def _sft(folder, fast, loss_type):
    from datasets import Dataset as Table
    from trl import SFTConfig, SFTTrainer

    model = adapted("llama", {"lora_dropout": 0.1})
    if fast:
        speed_up(model)
    rows = [
        {"input_ids": row[:length].tolist(), "completion_mask": [0, 0, 0, *[1] * (length - 3)]}
        for row, length in zip(batch_of("llama", rows=4)["input_ids"].clamp_min(3), (9, 7, 5, 6), strict=True)
    ]
    args = SFTConfig(
        output_dir=str(folder), max_steps=3, per_device_train_batch_size=2, logging_steps=1, report_to=[],
        learning_rate=1e-2, save_strategy="no", use_cpu=True, bf16=False, gradient_checkpointing=False,
        disable_tqdm=True, optim="sgd", loss_type=loss_type, max_length=None,
    )  # fmt: skip
    from stacks.models import tokenizer

    trainer = SFTTrainer(model=model, args=args, train_dataset=Table.from_list(rows), processing_class=tokenizer())
    loraplus.attach(trainer, lr_ratio=4.0)
    trainer.train()
    names = ("loss", "mean_token_accuracy", "entropy", "grad_norm")
    return weights(model), [row[name] for row in trainer.state.log_history for name in names if name in row]


@pytest.mark.parametrize("loss_type", ["nll", "chunked_nll"])
def test_a_run_of_trl_s_sft_trainer_is_the_same(loss_type, tmp_path):
    pytest.importorskip("trl")
    slow, fast = (_sft(tmp_path, fast, loss_type) for fast in (False, True))
    assert apart(fast[0], slow[0]) < 1e-5
    assert fast[1] == pytest.approx(slow[1], rel=1e-4)
    assert len(fast[1]) > 8


@pytest.mark.parametrize("family", [name for name in CLASSIFIERS if name in ("bert", "roberta")])
@pytest.mark.parametrize("first", ["speed_up", "rates"])
def test_automatic_rates_and_measured_updates_are_the_same(family, first):
    def rates(fast):
        model = adapted(family)
        if fast and first == "speed_up":
            speed_up(model)
        optimizer = loraplus.create_optimizer(model, torch.optim.AdamW, lr=1.0, lr_ratio=1, lr_head=1e-3)
        auto, monitor = AutoRates(model, optimizer), UpdateMonitor(model, optimizer)
        if fast and first == "rates":
            speed_up(model)
        found = []
        for seed in range(6):
            model(**batch_of(family, seed=seed)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found += [auto.lr_a, auto.lr_b]
        return found, weights(model), monitor

    (slow, slow_weights, _), (fast, fast_weights, _) = rates(False), rates(True)
    assert fast == pytest.approx(slow, rel=1e-3)
    assert apart(fast_weights, slow_weights) < 1e-3
