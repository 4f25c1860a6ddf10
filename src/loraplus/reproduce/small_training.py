"""One run of a small decoder with an adapter: a plain loop, so that a run takes seconds on one core.

Runs with one seed start from the same adapter and head and see the same batches, whatever their rates are.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, set_seed
from transformers.optimization import get_linear_schedule_with_warmup

import loraplus
from loraplus.reproduce import small_decoders
from loraplus.reproduce.small_tasks import Rows, SmallTask
from loraplus.steps.movement import adapted_layers
from loraplus.study.records import CurvePoint, Record, Run
from loraplus.study.worker import OnStep

LR_HEAD = 2e-3
WARMUP = 0.06
_EVAL_BATCH = 100
_MEGABATCH = 20  # batches among which examples are sorted by length

Prepare = Callable[[Any, torch.optim.Optimizer], Any]
Start = Literal["A-random", "B-random"]


@dataclass(frozen=True)
class SmallAdapter:
    """The adapter of a run.

    Args:
        rank, alpha: r and α.
        start: which factor is random; the other one is zero.
        dropout: of the adapter's input.
        rslora: s is α/√r instead of α/r.
        targets: names of the layers, or "all-linear".
    """

    rank: int = 8
    alpha: float = 8.0
    start: Start = "A-random"
    dropout: float = 0.0
    rslora: bool = False
    targets: Sequence[str] | str = ("q_proj", "v_proj")


def build(folder: Path, task: SmallTask, adapter: SmallAdapter, seed: int) -> Any:
    """The frozen model with a fresh adapter and, for all but language models, a fresh head."""
    set_seed(seed)
    if task.kind == "lm":
        model, kind = AutoModelForCausalLM.from_pretrained(folder), TaskType.CAUSAL_LM
    else:
        model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=task.classes)
        kind = TaskType.SEQ_CLS
    lora = LoraConfig(
        task_type=kind,
        r=adapter.rank,
        lora_alpha=adapter.alpha,  # type: ignore[arg-type]
        lora_dropout=adapter.dropout,
        use_rslora=adapter.rslora,
        target_modules=adapter.targets if isinstance(adapter.targets, str) else list(adapter.targets),
    )
    adapted = get_peft_model(model, lora)
    if adapter.start == "B-random":
        swap_start(adapted)
    return adapted


def swap_start(model: torch.nn.Module) -> None:
    """Makes A zero and B random, by the rule that PEFT starts A with: uniform within ±1/√(its inputs), here ±1/√r."""
    for layer in adapted_layers(model):
        a, b = layer.weights
        torch.nn.init.zeros_(a)
        torch.nn.init.kaiming_uniform_(b, a=math.sqrt(5))


def train(
    model: nn.Module,
    task: SmallTask,
    lr: float,
    lr_ratio: float,
    *,
    steps: int,
    order: Iterator[list[int]],
    evaluations: int = 1,
    prepare: Prepare | None = None,
    on_step: OnStep = lambda step, total_steps, eval_loss=None: None,
) -> Record:
    """Trains with AdamW under a linear schedule and evaluates at equal distances, the last time after the last step.

    Args:
        model: from `build`.
        task: what to train on.
        lr, lr_ratio: η_A and λ.
        steps: length of the run.
        order: indices of the examples of each step, such as `batches` gives them.
        evaluations: how often to evaluate on the validation data; a run that is evaluated more than at its end is
            tested, too.
        prepare: called with (model, optimizer) before the first step; may install what sets the rates.
        on_step: told (step, steps) after every step.

    Returns:
        A record whose run is empty; status "diverged" and an infinite loss if the loss became NaN or infinite.
    """
    optimizer = loraplus.create_optimizer(
        model, torch.optim.AdamW, lr=lr, lr_ratio=lr_ratio, lr_head=None if task.kind == "lm" else LR_HEAD,
        weight_decay=0.0, fused=True,
    )  # fmt: skip
    scheduler = get_linear_schedule_with_warmup(optimizer, math.ceil(WARMUP * steps), steps)
    if prepare:
        prepare(model, optimizer)
    evaluate_at = {round(steps * (i + 1) / evaluations) for i in range(evaluations)}
    curve: list[CurvePoint] = []
    validation = (math.inf, 0.0)
    started = time.perf_counter()
    model.train()
    for step in range(1, steps + 1):
        loss = loss_of(model, task, task.train.chosen(next(order)))[0]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        if step in evaluate_at:
            validation = evaluate(model, task, task.validation)
            curve.append(CurvePoint(step, validation[0]))
        if not (math.isfinite(loss.item()) and (not curve or math.isfinite(curve[-1].eval_loss))):
            known = tuple(point for point in curve if math.isfinite(point.eval_loss))
            return Record(Run({}), "diverged", curve=known, values=_values(task, "eval", (math.inf, 0.0)))
        on_step(step, steps)
    seconds = time.perf_counter() - started
    values = _values(task, "eval", validation)
    if evaluations > 1:
        values |= _values(task, "test", evaluate(model, task, task.test))
    return Record(Run({}), "done", curve=tuple(curve), seconds=seconds, values=values)


def _values(task: SmallTask, split: str, measured: tuple[float, float]) -> dict[str, float]:
    """Loss and, of classes, accuracy under their names."""
    return {
        f"{split}_{name}": value
        for name, value in zip(("loss", "accuracy"), measured, strict=True)
        if name == "loss" or task.kind == "classes"
    }


def batches(rows: list[list[int]], batch: int, seed: int) -> Iterator[list[int]]:
    """Endless batches of indices; each holds examples of about one length, so that little of it is padding."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(rows), generator=generator).tolist()
        size = batch * _MEGABATCH
        parts = [sorted(order[i : i + size], key=lambda i: len(rows[i])) for i in range(0, len(order), size)]
        whole = [part[i : i + batch] for part in parts for i in range(0, len(part) - batch + 1, batch)]
        for i in torch.randperm(len(whole), generator=generator).tolist():
            yield whole[i]


def evaluate(model: nn.Module, task: SmallTask, rows: Rows) -> tuple[float, float]:
    """(mean loss, accuracy); language modelling weighs tokens alike and has no accuracy (0)."""
    model.eval()
    total = right = weight = 0.0
    with torch.no_grad():
        for start in range(0, len(rows.ids), _EVAL_BATCH):
            chosen = rows.chosen(range(start, min(start + _EVAL_BATCH, len(rows.ids))))
            loss, count = loss_of(model, task, chosen)
            share = sum(len(ids) - 1 for ids in chosen.ids) if task.kind == "lm" else len(chosen.ids)
            total, weight, right = total + float(loss) * share, weight + share, right + count
    model.train()
    return total / weight, right / len(rows.ids)


def loss_of(model: nn.Module, task: SmallTask, rows: Rows) -> tuple[torch.Tensor, float]:
    """(loss, number of right answers)."""
    ids, mask = small_decoders.padded(rows.ids, 0)
    if task.kind == "lm":
        return model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss, 0.0
    logits = model(input_ids=ids, attention_mask=mask).logits
    if task.kind == "rating":
        return torch.nn.functional.mse_loss(logits[:, 0], torch.tensor(rows.targets)), 0.0
    wanted = torch.tensor(rows.targets).long()
    return torch.nn.functional.cross_entropy(logits, wanted), float((logits.argmax(-1) == wanted).sum())
