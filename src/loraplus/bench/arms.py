"""The configurations of a training run that are held against each other, and the trainer of each.

All of them train the same model on the same examples, so many a step. PEFT's arms are transformers' Trainer, or TRL's
where it has something of its own to add; ours is the trainer of `loraplus train` over a model after `speed_up`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loraplus.bench.prepared import Prepared
from loraplus.rates import DEFAULT_LR_RATIO
from loraplus.speed import LEVERS, speed_up
from loraplus.tasks.config import CLASSIFICATION

if TYPE_CHECKING:
    from torch import nn

DEFAULTS, PEFT, OURS = "defaults", "PEFT", "ours"
TRAINER, TRL, LORAPLUS = "Trainer", "TRL", "loraplus"
USUAL_LORA_DROPOUT = 0.05  # of PEFT's own examples
_MANY_STEPS = 1_000_000


@dataclass(frozen=True)
class Arm:
    """A configuration.

    Args:
        name: In tables.
        side: What it stands for: Trainer's defaults, another configuration of PEFT's stack, or ours.
        stack: Whose trainer runs it.
        dropout: Whether the base model's own dropout is left on, and LoRA's input dropped out as is usual.
        grouped: Whether texts of like length share a batch.
        packed: TRL: several texts a row.
        levers: Of `speed_up`.
        lr_ratio: λ.
    """

    name: str
    side: str
    stack: str
    dropout: bool = False
    grouped: bool = True
    packed: bool = False
    levers: tuple[str, ...] = LEVERS
    lr_ratio: float = DEFAULT_LR_RATIO


_DEFAULT = Arm("PEFT + Trainer, defaults", DEFAULTS, TRAINER, dropout=True, grouped=False)
_BEST = Arm("PEFT + Trainer, grouped, fused, no dropout", PEFT, TRAINER)
_OURS = Arm("loraplus", OURS, LORAPLUS)
LAMBDA_ONE = Arm("loraplus, λ = 1", "λ = 1", LORAPLUS, lr_ratio=1.0)


def arms_of(task: str) -> list[Arm]:
    """What is compared for a task: Trainer's defaults first, ours among the last."""
    if task == CLASSIFICATION:
        with_dropout = Arm("loraplus, the model's own dropout", "ours with dropout", LORAPLUS, dropout=True)
        return [_DEFAULT, _BEST, _OURS, with_dropout, LAMBDA_ONE]
    trl = Arm("PEFT + TRL, grouped, fused, loss in chunks", PEFT, TRL)
    packed = Arm("PEFT + TRL, packed, no padding", PEFT, TRL, packed=True)
    return [_DEFAULT, _BEST, trl, packed, _OURS, LAMBDA_ONE]


def ablation_of(levers: Sequence[str]) -> list[Arm]:
    """Each lever of `speed_up` alone, each left out, all and none; ours is the trainer of all."""
    alone = [Arm(f"only {lever}", "only", LORAPLUS, levers=(lever,)) for lever in levers]
    without = [
        Arm(f"without {lever}", "without", LORAPLUS, levers=tuple(other for other in levers if other != lever))
        for lever in levers
    ]
    return [_BEST, Arm("no lever", "none", LORAPLUS, levers=()), *alone, *without, _OURS]


def trainer_of(arm: Arm, prepared: Prepared, output: str) -> Any:
    """A trainer that is ready for `.train()`, and would go on for ever.

    Args:
        arm: The configuration.
        prepared: Model and data.
        output: A folder that is written to by nobody, and asked for by Trainer.
    """
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    build = {TRAINER: _trainer, TRL: _trl, LORAPLUS: _loraplus}[arm.stack]
    model = prepared.model(dropout=arm.dropout, lora_dropout=USUAL_LORA_DROPOUT if arm.dropout else 0.0)
    if arm.stack == LORAPLUS:
        speed_up(model, levers=arm.levers)
    trainer = build(arm, prepared, model, output)
    if arm.grouped and not arm.packed:  # the batches that grouping makes; see `Prepared`
        from torch.utils.data import SequentialSampler

        trainer._get_train_sampler = lambda *_: SequentialSampler(trainer.train_dataset)
    for shown in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(shown)
    return trainer


def _shared(arm: Arm, prepared: Prepared, output: str) -> dict[str, Any]:
    """Trainer's arguments; what is not said here is as Trainer has it."""
    import torch

    config = prepared.config
    return {
        "output_dir": output, "max_steps": _MANY_STEPS, "learning_rate": prepared.lr, "seed": config.seed,
        "per_device_train_batch_size": config.batch_size // config.gradient_accumulation_steps,
        "gradient_accumulation_steps": config.gradient_accumulation_steps, "bf16": config.bf16,
        "use_cpu": not torch.accelerator.is_available(), "save_strategy": "no", "disable_tqdm": True, "report_to": [],
        **({} if arm.side == DEFAULTS else {"optim": "adamw_torch_fused"}),
    }  # fmt: skip


def _trainer(arm: Arm, prepared: Prepared, model: nn.Module, output: str) -> Any:
    from transformers import Trainer, TrainingArguments

    args = TrainingArguments(**_shared(arm, prepared, output), label_names=["labels"])
    return Trainer(
        model=model, args=args, train_dataset=prepared.rows(grouped=arm.grouped), data_collator=prepared.collator()
    )


def _trl(arm: Arm, prepared: Prepared, model: Any, output: str) -> Any:
    from datasets import Dataset
    from trl.data_utils import pack_dataset
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling, SFTTrainer

    rows: Any = Dataset.from_list(list(prepared.rows(grouped=arm.grouped)))  # SFTTrainer takes nothing else
    options = _shared(arm, prepared, output)
    if arm.packed:
        count = len(rows)
        rows = pack_dataset(rows, prepared.data.max_length, strategy="bfd")
        batch = options["per_device_train_batch_size"] * len(rows) / count  # so many texts a step as the others have
        options["per_device_train_batch_size"] = max(1, round(batch))
    pad: Any = prepared.tokenizer.pad_token_id
    args = SFTConfig(
        **options,
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        padding_free=arm.packed,
    )
    # Without padding SFTTrainer insists on a collator that it makes itself.
    trainer = SFTTrainer(
        model=model,
        args=args,
        train_dataset=rows,
        processing_class=prepared.tokenizer,
        data_collator=None if arm.packed else DataCollatorForLanguageModeling(pad),
    )
    trainer._send_telemetry = lambda: None
    return trainer


def _loraplus(arm: Arm, prepared: Prepared, model: Any, output: str) -> Any:
    """As `loraplus train` makes it, without its evaluations and checkpoints."""
    from dataclasses import replace

    from loraplus.tasks.callbacks import DivergenceGuard
    from loraplus.tasks.checks import rates_of
    from loraplus.tasks.training import build_trainer

    config = replace(prepared.config, max_steps=_MANY_STEPS, eval_steps=_MANY_STEPS)
    rates = rates_of(config, prepared.lr, arm.lr_ratio)
    data = replace(prepared.data, train=prepared.rows(grouped=arm.grouped))
    trainer = build_trainer(
        config, rates, data, model, prepared.tokenizer, seed=config.seed, output=output, checkpoints=False,
        callbacks=[DivergenceGuard(rates)],
    )  # fmt: skip
    trainer.args.eval_strategy = type(trainer.args.eval_strategy)("no")
    return trainer
