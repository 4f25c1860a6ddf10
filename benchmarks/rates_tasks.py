"""The benchmark's tasks, split as its results were made, and one run. A seed fixes start and data order."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rates_settings import Setting
from transformers import AutoTokenizer
from transformers.utils import logging

from loraplus.reproduce import small_decoders
from loraplus.reproduce.small_tasks import BOOK, HELD_OUT, LENGTH, Rows, SmallTask, book_rows, domain_rows
from loraplus.reproduce.small_training import Prepare, SmallAdapter, build, train
from loraplus.study.records import Record

logging.set_verbosity_error()
logging.disable_progress_bar()

DATA = Path(__file__).resolve().parent.parent / "data"
MINILM = "minilm"


def _labelled(task: str) -> tuple[str, list[tuple[str, float, bool]]]:
    """(kind, [(text, target, held out)])."""
    if task == BOOK:
        return "classes", [(row["text"], book, int(row["chapter"]) % 8 == 0) for row, book in book_rows(DATA)]
    rows = domain_rows(DATA, "movies" if task == "rating" else task.removeprefix("lm-"))
    aside = set(torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()[:HELD_OUT])
    kind = "rating" if task == "rating" else "lm" if task.startswith("lm-") else "classes"
    found = []
    for i, row in enumerate(rows):
        rating = float(row["rating"])
        if kind != "classes" or rating != 0:
            found.append((row["text"], rating / 2 if kind == "rating" else float(rating > 0), i in aside))
    return kind, found


@functools.lru_cache(maxsize=4)
def load_task(task: str, model: str) -> SmallTask:
    """Reads, splits and tokenises a task for a model; nothing is tested on."""
    kind, rows = _labelled(task)
    texts = [text for text, _, _ in rows]
    if model == MINILM:
        encode: Any = AutoTokenizer.from_pretrained(DATA / "minilm-l6")
        ids = encode(texts, truncation=True, max_length=LENGTH)["input_ids"]
    else:
        ids = small_decoders.token_ids(small_decoders.tokenizer(DATA, width_of(model)), texts, LENGTH)
    parts = {False: Rows([], []), True: Rows([], [])}
    for (_, target, held_out), row in zip(rows, ids, strict=True):
        parts[held_out].ids.append(row)
        parts[held_out].targets.append(target)
    held = parts[True]
    chosen = torch.randperm(len(held.ids), generator=torch.Generator().manual_seed(1)).tolist()[:HELD_OUT]
    held = held.chosen(sorted(chosen, key=lambda i: len(held.ids[i])))
    classes = int(max(target for _, target, _ in rows)) + 1 if kind == "classes" else 1
    return SmallTask(kind, classes, parts[False], held, Rows([], []))


def width_of(model: str) -> int:
    """Of decoder-WIDTH."""
    return int(model.removeprefix("decoder-"))


def order(examples: int, batch: int, seed: int) -> Iterator[list[int]]:
    """Endless batches of indices; what is left of a pass that fills no batch is left out."""
    generator, left = torch.Generator().manual_seed(seed), []
    while True:
        if len(left) < batch:
            left = torch.randperm(examples, generator=generator).tolist()
        yield left[:batch]
        left = left[batch:]


def run(setting: Setting, seed: int, lr: float, lr_ratio: float, prepare: Prepare | None = None) -> Record:
    """Trains once and evaluates after the last step; a run whose loss is not finite ends with an infinite loss.

    Args:
        setting: what to train.
        seed: of initialisation, data order and dropout.
        lr, lr_ratio: η_A and λ.
        prepare: called with (model, optimizer) before the first step; may install what sets the rates.
    """
    task = load_task(setting.task, setting.model)
    minilm = setting.model == MINILM
    folder = DATA / "minilm-l6" if minilm else small_decoders.obtain(DATA, width_of(setting.model))
    targets = (
        "all-linear" if setting.targets == "all-linear" else ["query", "value"] if minilm else ["q_proj", "v_proj"]
    )
    adapter = SmallAdapter(setting.rank, setting.alpha, dropout=setting.dropout, rslora=setting.rslora, targets=targets)
    return train(
        build(folder, task, adapter, seed), task, lr, lr_ratio, steps=setting.steps,
        order=order(len(task.train.ids), setting.batch, seed), prepare=prepare,
    )  # fmt: skip
