"""Cases of the scoreboard in which DeepSpeed's JSON names an optimizer or a scheduler beside LoRA+.

What a Trainer gives to DeepSpeed is decided by a function of transformers, which runs without DeepSpeed and is asked
here. A scheduler of the JSON is DeepSpeed's own class.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from peft.optimizers import create_loraplus_optimizer as peft_optimizer
from stacks_cases import adapted, library
from stacks_later import ratio_of
from stacks_trainer import LR, QUIET, RATIO, Seen
from transformers import Trainer, TrainingArguments
from transformers.integrations.deepspeed import deepspeed_optim_sched

from loraplus.integrations.deepspeed import check_deepspeed_config

OPTIMIZER = {"optimizer": {"type": "AdamW", "params": {"lr": LR}}}
SCHEDULER = {"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": LR, "warmup_num_steps": 2}}}


def optimizer_in_json(who: str) -> Seen:
    """What is left of the optimizer that Trainer was given."""
    if who == "loraplus":
        check_deepspeed_config(OPTIMIZER)  # which `attach` calls before anything is built
    model = adapted()
    own = peft_optimizer(model, torch.optim.AdamW, lr=LR, loraplus_lr_ratio=RATIO)  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(model, TrainingArguments(folder, **QUIET), optimizers=(own, None))  # type: ignore[arg-type]
        asked: Any = SimpleNamespace(config=dict(OPTIMIZER), is_offload=lambda: False)
        trained = [p for p in model.parameters() if p.requires_grad]
        given, _ = deepspeed_optim_sched(trainer, asked, trainer.args, 1, trained)
    if getattr(given, "param_groups", None):
        return "right", "the groups are kept"
    return "wrong", f"DeepSpeed gets one list of {len(given.params)} parameters, so B learns at A's rate, silently"


def scheduler_in_json(who: str) -> Seen:
    """λ after DeepSpeed's own WarmupLR has taken three steps."""
    if who == "loraplus":
        check_deepspeed_config(SCHEDULER)
    schedules: Any = library("deepspeed.runtime.lr_schedules")
    model = adapted()
    own = peft_optimizer(model, torch.optim.AdamW, lr=LR, loraplus_lr_ratio=RATIO)  # type: ignore[arg-type]
    scheduler = schedules.WarmupLR(own, **SCHEDULER["scheduler"]["params"])
    for _ in range(3):
        own.step()
        scheduler.step()
    ratio = ratio_of(model, own)
    return ("right" if math.isclose(ratio, RATIO) else "wrong"), f"goes on at ratio {ratio:.3g}, silently"


DEEPSPEED: dict[str, Callable[[str], Seen]] = {
    "DeepSpeed's JSON names the optimizer": optimizer_in_json,
    "DeepSpeed's JSON names WarmupLR": scheduler_in_json,
}
