"""What one of two processes does in test_deepspeed.py: Trainer with a DeepSpeed configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stacks.wrapping import deepspeed_on_cpu

import loraplus
from integrations.test_transformers import Tokens, adapted, common
from loraplus.errors import TrainerSetupError

OPTIMIZER = {"type": "AdamW", "params": {"lr": 1e-3}}
WARMUP = {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-3, "warmup_num_steps": 2}}


def trainer(folder: str, config: dict[str, Any]) -> Any:
    from transformers import Trainer, TrainingArguments

    base = {"train_micro_batch_size_per_gpu": "auto", "zero_optimization": {"stage": 2}}
    args = TrainingArguments(**common(Path(folder), max_steps=3, deepspeed={**base, **config}))
    return Trainer(model=adapted(), args=args, train_dataset=Tokens())


def refused_then_trained(folder: str) -> dict[str, Any]:
    deepspeed_on_cpu()
    messages = {}
    for name, block in (("optimizer", OPTIMIZER), ("scheduler", WARMUP)):
        try:
            loraplus.attach(trainer(folder, {name: block}), lr_ratio=16)
        except TrainerSetupError as error:
            messages[name] = str(error)
    good = loraplus.attach(trainer(folder, {"zero_force_ds_cpu_optimizer": False}), lr_ratio=16)
    good.train()
    table = loraplus.verify(good.model, good.optimizer, lr_ratio=16, lr=5e-3)
    return {"messages": messages, "optimizer": type(good.optimizer.optimizer).__name__, "entries": len(table.entries)}
