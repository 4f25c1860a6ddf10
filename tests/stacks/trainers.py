"""transformers' Trainer in three ways, and TRL's trainers through `attach`."""

from __future__ import annotations

import importlib
from typing import Any

from datasets import Dataset
from transformers import Trainer, TrainingArguments

import loraplus
from loraplus import LoraPlusTrainer, LoraPlusTrainingArguments
from loraplus.integrations.optimizer_factory import LoraPlusCallback, LoraPlusOptimizer
from stacks.contract import BATCH, EXAMPLES, SAVE_AT, STEPS, WARMUP, Run, Setup
from stacks.models import WORDS, Tokens, classifier, language_model, reward_model, tokenizer


def common(setup: Setup) -> dict[str, Any]:
    return {
        "output_dir": str(setup.folder), "learning_rate": setup.lr, "max_steps": STEPS, "warmup_steps": WARMUP,
        "per_device_train_batch_size": setup.micro_batch, "gradient_accumulation_steps": setup.accumulation,
        "max_grad_norm": setup.clip, "weight_decay": setup.weight_decay, "lr_scheduler_type": "linear",
        "logging_steps": 1, "save_strategy": "steps", "save_steps": SAVE_AT, "report_to": [], "disable_tqdm": True,
        "use_cpu": True, "logging_nan_inf_filter": False,
    }  # fmt: skip


def trained(trainer: Any, setup: Setup) -> Run:
    trainer.train(resume_from_checkpoint=str(setup.folder / f"checkpoint-{SAVE_AT}") if setup.resume else None)
    # Those of steps before a checkpoint come back with it.
    rows = [row for row in trainer.state.log_history if "learning_rate" in row][-STEPS + SAVE_AT * setup.resume :]
    logs = [{name: rate for name, rate in row.items() if name.startswith("lr/")} for row in rows]
    return Run(trainer.model, trainer.optimizer, logs)


def attached(trainer: Any, setup: Setup) -> Run:
    return trained(trainer if setup.lr_ratio is None else loraplus.attach(trainer, lr_ratio=setup.lr_ratio), setup)


def attach(setup: Setup) -> Run:
    args = TrainingArguments(**common(setup), label_names=["labels"])
    return attached(Trainer(classifier(), args, train_dataset=Tokens()), setup)


def trainer_class(setup: Setup) -> Run:
    if setup.lr_ratio is None:
        return attach(setup)
    args = LoraPlusTrainingArguments(**common(setup), label_names=["labels"], loraplus_lr_ratio=setup.lr_ratio)
    return trained(LoraPlusTrainer(classifier(), args, train_dataset=Tokens()), setup)


def factory(setup: Setup) -> dict[str, Any]:
    """What `optimizer_cls_and_kwargs` and `callbacks` of a trainer are set to."""
    if setup.lr_ratio is None:
        return {}
    # Trainer's default is the fused AdamW.
    options = {"lr": setup.lr, "fused": True, "loraplus_lr_ratio": setup.lr_ratio, "weight_decay": setup.weight_decay}
    return {"optimizer_cls_and_kwargs": (LoraPlusOptimizer, options), "callbacks": [LoraPlusCallback()]}


def optimizer_cls_and_kwargs(setup: Setup) -> Run:
    args = TrainingArguments(**common(setup), label_names=["labels"])
    return trained(Trainer(classifier(), args, train_dataset=Tokens(), **factory(setup)), setup)


PROMPTS = [f"{WORDS[i % 16]} {WORDS[16 + i % 12]} " for i in range(EXAMPLES)]
GOOD = [f"{WORDS[i % 8]} {WORDS[(i + 3) % 8]} film" for i in range(EXAMPLES)]
BAD = [f"{WORDS[8 + i % 8]} {WORDS[8 + (i + 3) % 8]} plot" for i in range(EXAMPLES)]


def longest_completion(completions: list[str], **_: Any) -> list[float]:
    return [float(len(text)) for text in completions]


def rows_for(kind: str) -> Dataset:
    if kind == "SFT":
        return Dataset.from_dict({"text": [f"{p} {g}" for p, g in zip(PROMPTS, GOOD, strict=True)]})
    if kind == "GRPO":
        return Dataset.from_dict({"prompt": PROMPTS})
    if kind == "KTO":
        mixed = [g if i % 2 else b for i, (g, b) in enumerate(zip(GOOD, BAD, strict=True))]
        return Dataset.from_dict({"prompt": PROMPTS, "completion": mixed, "label": [bool(i % 2) for i in range(24)]})
    if kind == "Reward":
        good, bad = ([f"{p} {c}" for p, c in zip(PROMPTS, side, strict=True)] for side in (GOOD, BAD))
        return Dataset.from_dict({"chosen": good, "rejected": bad})
    return Dataset.from_dict({"prompt": PROMPTS, "chosen": GOOD, "rejected": BAD})


TRL_OPTIONS: dict[str, dict[str, Any]] = {
    "SFT": {"max_length": 16},
    "DPO": {"max_length": 16},
    "KTO": {"max_length": 16, "loss_type": "apo_zero_unpaired"},  # its KL term would depend on how a batch is cut
    "GRPO": {"num_generations": 4, "max_completion_length": 4, "beta": 0.0},
    "Reward": {"max_length": 16},
}


def trl_trainer(kind: str, setup: Setup, **more: Any) -> Any:
    trl = importlib.import_module("trl")
    options = {**common(setup), **TRL_OPTIONS[kind], "bf16": False, "gradient_checkpointing": False}
    if kind == "GRPO":
        more["reward_funcs"] = longest_completion
        options |= {"generation_batch_size": BATCH}
    return getattr(trl, f"{kind}Trainer")(
        # The reference of DPO and KTO is a second adapter, and PEFT trains biases for one adapter only.
        model=reward_model() if kind == "Reward" else language_model("none" if kind in ("DPO", "KTO") else "lora_only"),
        args=getattr(trl, f"{kind}Config")(**options),
        train_dataset=rows_for(kind),
        processing_class=tokenizer(),
        **more,
    )


def sft_factory(setup: Setup) -> Run:
    return trained(trl_trainer("SFT", setup, **factory(setup)), setup)
