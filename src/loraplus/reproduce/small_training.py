"""One run of a small decoder with an adapter: a plain loop, so that a run takes seconds on one core.

Runs with one seed start from the same adapter and head and see the same batches, whatever their rates are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, TaskType, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, set_seed
from transformers.optimization import get_linear_schedule_with_warmup

import loraplus
from loraplus.movement import adapted_layers
from loraplus.reproduce import small_decoders
from loraplus.reproduce.small_tasks import Rows, SmallTask
from loraplus.study.records import CurvePoint, Record, Run
from loraplus.study.worker import OnStep

LR_HEAD = 2e-3
WARMUP = 0.06
_EVAL_BATCH = 100
_MEGABATCH = 20  # batches among which examples are sorted by length

Start = Literal["A-random", "B-random"]


@dataclass(frozen=True)
class SmallAdapter:
    """The adapter of a run.

    Args:
        rank, alpha: r and α.
        start: which factor is random; the other one is zero.
    """

    rank: int = 8
    alpha: float = 8.0
    start: Start = "A-random"


@dataclass(frozen=True)
class Outcome:
    """What a run came to; the loss of one that diverged is infinite. Not every run is tested."""

    diverged: bool
    validation_loss: float
    validation_accuracy: float
    curve: tuple[CurvePoint, ...]
    test: tuple[float, float] | None = None


def build(folder: Path, task: SmallTask, adapter: SmallAdapter, seed: int) -> Any:
    """The frozen decoder with a fresh adapter on its query and value layers and, for classes, a fresh head."""
    set_seed(seed)
    if task.kind == "lm":
        model, kind = AutoModelForCausalLM.from_pretrained(folder), TaskType.CAUSAL_LM
    else:
        model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=task.classes)
        kind = TaskType.SEQ_CLS
    lora = LoraConfig(
        task_type=kind, r=adapter.rank, lora_alpha=adapter.alpha,  # type: ignore[arg-type]
        target_modules=["q_proj", "v_proj"],
    )  # fmt: skip
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
    model: Any, task: SmallTask, lr: float, lr_ratio: float,
    *, steps: int, batch: int, seed: int, evaluations: int, on_step: OnStep,
) -> Outcome:  # fmt: skip
    """Trains with AdamW under a linear schedule and evaluates at equal distances, the last time after the last step.

    Args:
        model: from `build`.
        task: what to train on.
        lr, lr_ratio: η_A and λ.
        steps, batch: length of the run; examples a step.
        seed: of the order of the examples.
        evaluations: how often to evaluate on the validation data; a run that is evaluated more than at its end is
            tested, too.
        on_step: told (step, steps) after every step.

    Returns:
        The outcome.
    """
    optimizer = loraplus.create_optimizer(
        model, torch.optim.AdamW, lr=lr, lr_ratio=lr_ratio, lr_head=None if task.kind == "lm" else LR_HEAD,
        weight_decay=0.0, fused=True,
    )  # fmt: skip
    scheduler = get_linear_schedule_with_warmup(optimizer, math.ceil(WARMUP * steps), steps)
    evaluate_at = {round(steps * (i + 1) / evaluations) for i in range(evaluations)}
    order = batches(task.train.ids, batch, seed)
    curve: list[CurvePoint] = []
    accuracy = 0.0
    model.train()
    for step in range(1, steps + 1):
        loss = _loss(model, task, _chosen(task.train, next(order)))[0]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        if step in evaluate_at:
            validation_loss, accuracy = evaluate(model, task, task.validation)
            curve.append(CurvePoint(step, validation_loss))
        if not (math.isfinite(loss.item()) and (not curve or math.isfinite(curve[-1].eval_loss))):
            known = tuple(point for point in curve if math.isfinite(point.eval_loss))
            return Outcome(True, math.inf, 0.0, known)
        on_step(step, steps)
    tested = evaluate(model, task, task.test) if evaluations > 1 else None
    return Outcome(False, curve[-1].eval_loss, accuracy, tuple(curve), tested)


def batches(rows: list[list[int]], batch: int, seed: int) -> Iterator[list[int]]:
    """Endless batches of indices; each holds examples of about one length, so that little of it is padding."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(rows), generator=generator).tolist()
        size = batch * _MEGABATCH
        parts = [sorted(order[i : i + size], key=lambda i: len(rows[i])) for i in range(0, len(order), size)]
        found = [part[i : i + batch] for part in parts for i in range(0, len(part) - batch + 1, batch)]
        for i in torch.randperm(len(found), generator=generator).tolist():
            yield found[i]


def evaluate(model: Any, task: SmallTask, rows: Rows) -> tuple[float, float]:
    """(mean loss, accuracy); language modelling weighs tokens alike and has no accuracy (0)."""
    model.eval()
    total = right = weight = 0.0
    with torch.no_grad():
        for start in range(0, len(rows.ids), _EVAL_BATCH):
            part = _chosen(rows, range(start, min(start + _EVAL_BATCH, len(rows.ids))))
            loss, count = _loss(model, task, part)
            share = sum(len(ids) - 1 for ids in part.ids) if task.kind == "lm" else len(part.ids)
            total, weight, right = total + float(loss) * share, weight + share, right + count
    model.train()
    return total / weight, right / len(rows.ids)


def _chosen(rows: Rows, indices: Any) -> Rows:
    return Rows([rows.ids[i] for i in indices], [rows.targets[i] for i in indices])


def _loss(model: Any, task: SmallTask, rows: Rows) -> tuple[torch.Tensor, float]:
    """(loss, number of right answers)."""
    ids, mask = small_decoders.padded(rows.ids, 0)
    if task.kind == "lm":
        return model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss, 0.0
    logits = model(input_ids=ids, attention_mask=mask).logits
    wanted = torch.tensor(rows.targets)
    return torch.nn.functional.cross_entropy(logits, wanted), float((logits.argmax(-1) == wanted).sum())


def result_of(run: Run, outcome: Outcome, *, accuracy: bool) -> Record:
    """An outcome as the result of a run."""
    values = {"eval_loss": outcome.validation_loss}
    if accuracy:
        values["eval_accuracy"] = outcome.validation_accuracy
    if outcome.test is not None:
        values["test_loss"] = outcome.test[0]
        if accuracy:
            values["test_accuracy"] = outcome.test[1]
    return Record(run, "diverged" if outcome.diverged else "done", curve=outcome.curve, values=values)
