"""Settings → token ids and labels → one training run. Seeds pair initialisation and data order across all rates."""

from __future__ import annotations

import csv
import functools
import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, TaskType, get_peft_model
from rates_settings import LR_HEAD, WARMUP, Setting
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, set_seed
from transformers.utils import logging

import loraplus
from loraplus.reproduce import small_decoders

logging.set_verbosity_error()
logging.disable_progress_bar()

DATA = Path(__file__).resolve().parent.parent / "data"
LENGTH = 32
EVAL_EXAMPLES = 800
BOOK_VERSES = 300
EVAL_BATCH = 100

Prepare = Callable[[Any, torch.optim.Optimizer], Any]


@dataclass(frozen=True)
class Task:
    """Token ids and targets: class numbers, ratings, or nothing for language modelling."""

    kind: str  # classes, rating, lm
    classes: int
    train: tuple[list[list[int]], list[float]]
    evaluation: tuple[list[list[int]], list[float]]


@dataclass(frozen=True)
class Outcome:
    """What a run came to; `extra` is what `prepare` returned."""

    eval_loss: float
    accuracy: float
    seconds: float
    extra: Any = None


def _rows(name: str) -> list[dict[str, str]]:
    with (DATA / name).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _labelled(task: str) -> tuple[str, list[tuple[str, float, bool]]]:
    """(kind, [(text, target, held out)])."""
    if task == "book":
        rows = _rows("verses.csv")
        sizes = Counter(row["book"] for row in rows)
        books = {book: i for i, book in enumerate(sorted(b for b in sizes if sizes[b] >= BOOK_VERSES))}
        return "classes", [
            (row["text"], books[row["book"]], int(row["chapter"]) % 8 == 0) for row in rows if row["book"] in books
        ]
    domain = "movies" if task == "rating" else task.removeprefix("lm-")
    rows = [row for row in _rows("rated-snippets.csv") if row["domain"] == domain]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    aside = set(order[:EVAL_EXAMPLES])
    kind = "rating" if task == "rating" else "lm" if task.startswith("lm-") else "classes"
    found = []
    for i, row in enumerate(rows):
        rating = float(row["rating"])
        if kind != "classes" or rating != 0:
            found.append((row["text"], rating / 2 if kind == "rating" else float(rating > 0), i in aside))
    return kind, found


@functools.lru_cache(maxsize=4)
def load_task(task: str, model: str) -> Task:
    """Reads, splits and tokenises a task for a model."""
    kind, rows = _labelled(task)
    if model == "minilm":
        encode = AutoTokenizer.from_pretrained(DATA / "minilm-l6")
        ids = encode([row[0] for row in rows], truncation=True, max_length=LENGTH)["input_ids"]
    else:
        encode = small_decoders.tokenizer(DATA, int(model.removeprefix("decoder-")))
        ids = small_decoders.token_ids(encode, [row[0] for row in rows], LENGTH)
    parts: dict[bool, tuple[list[list[int]], list[float]]] = {False: ([], []), True: ([], [])}
    for (_, target, held_out), row in zip(rows, ids, strict=True):
        parts[held_out][0].append(row)
        parts[held_out][1].append(target)
    held = parts[True]
    chosen = torch.randperm(len(held[0]), generator=torch.Generator().manual_seed(1)).tolist()[:EVAL_EXAMPLES]
    chosen.sort(key=lambda i: len(held[0][i]))
    classes = int(max(row[1] for row in rows)) + 1 if kind == "classes" else 1
    return Task(kind, classes, parts[False], ([held[0][i] for i in chosen], [held[1][i] for i in chosen]))


def build_model(setting: Setting, task: Task, seed: int) -> Any:
    """The frozen base with a fresh adapter and, for all but language models, a fresh head."""
    folder = (
        DATA / "minilm-l6"
        if setting.model == "minilm"
        else small_decoders.obtain(DATA, int(setting.model.removeprefix("decoder-")))
    )
    set_seed(seed)
    if task.kind == "lm":
        model, task_type = AutoModelForCausalLM.from_pretrained(folder), TaskType.CAUSAL_LM
    else:
        model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=task.classes)
        task_type = TaskType.SEQ_CLS
    qv = ["query", "value"] if setting.model == "minilm" else ["q_proj", "v_proj"]
    lora = LoraConfig(
        task_type=task_type, r=setting.rank, lora_alpha=setting.alpha, lora_dropout=setting.dropout,
        use_rslora=setting.rslora, target_modules="all-linear" if setting.targets == "all-linear" else qv,
    )  # fmt: skip
    return get_peft_model(model, lora)


def _forward(model: Any, task: Task, rows: list[list[int]], targets: list[float]) -> tuple[torch.Tensor, float]:
    """(loss, number of right answers)."""
    ids, mask = small_decoders.padded(rows, 0)
    if task.kind == "lm":
        return model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss, 0.0
    logits = model(input_ids=ids, attention_mask=mask).logits.float()
    if task.kind == "rating":
        return torch.nn.functional.mse_loss(logits[:, 0], torch.tensor(targets)), 0.0
    wanted = torch.tensor(targets).long()
    return torch.nn.functional.cross_entropy(logits, wanted), float((logits.argmax(-1) == wanted).sum())


def evaluate(model: Any, task: Task) -> tuple[float, float]:
    """(mean loss, accuracy) on the held-out examples; language modelling weighs tokens alike."""
    model.eval()
    total = right = weight = 0.0
    rows, targets = task.evaluation
    with torch.no_grad():
        for start in range(0, len(rows), EVAL_BATCH):
            part = rows[start : start + EVAL_BATCH]
            loss, count = _forward(model, task, part, targets[start : start + EVAL_BATCH])
            share = sum(len(row) - 1 for row in part) if task.kind == "lm" else len(part)
            total, weight, right = total + float(loss) * share, weight + share, right + count
    model.train()
    return total / weight, right / len(rows)


def schedule(step: int, steps: int) -> float:
    """Linear warm-up, then linear decay to 0, as transformers' `linear` does it."""
    warmup = math.ceil(WARMUP * steps)
    return step / warmup if step < warmup else max(0.0, (steps - step) / max(1, steps - warmup))


def run(setting: Setting, seed: int, lr: float, lr_ratio: float, prepare: Prepare | None = None) -> Outcome:
    """Trains once and evaluates after the last step; a run whose loss is not finite ends with an infinite loss.

    Args:
        setting: what to train.
        seed: of initialisation, data order and dropout.
        lr, lr_ratio: η_A and λ.
        prepare: called with (model, optimizer) before the first step; may install what sets the rates.
    """
    task = load_task(setting.task, setting.model)
    model = build_model(setting, task, seed)
    optimizer = loraplus.create_optimizer(
        model, torch.optim.AdamW, lr=lr, lr_ratio=lr_ratio, lr_head=None if task.kind == "lm" else LR_HEAD,
        weight_decay=0.0, fused=True,
    )  # fmt: skip
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step, setting.steps))
    extra = prepare(model, optimizer) if prepare else None
    rows, targets = task.train
    shuffle = torch.Generator().manual_seed(seed)
    order: list[int] = []
    model.train()
    started = time.perf_counter()
    for _ in range(setting.steps):
        if len(order) < setting.batch:
            order = torch.randperm(len(rows), generator=shuffle).tolist()
        chosen, order = order[: setting.batch], order[setting.batch :]
        loss, _ = _forward(model, task, [rows[i] for i in chosen], [targets[i] for i in chosen])
        if not math.isfinite(loss.item()):
            return Outcome(math.inf, 0.0, time.perf_counter() - started, extra)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    seconds = time.perf_counter() - started
    loss, accuracy = evaluate(model, task)
    return Outcome(loss if math.isfinite(loss) else math.inf, accuracy, seconds, extra)
