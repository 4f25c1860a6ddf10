"""One run of a classifier on transformers' Trainer, with the authors' optimizer settings."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, Trainer

from loraplus.errors import DivergedError
from loraplus.files.scratch import scratch_folder
from loraplus.rates import Rates
from loraplus.study.records import CurvePoint, Record, Run
from loraplus.study.worker import OnStep
from loraplus.tasks.callbacks import DivergenceGuard, StepClock
from loraplus.tasks.classification import ClassificationData
from loraplus.tasks.config import TaskConfig
from loraplus.tasks.model import load_classifier, without_dropout
from loraplus.tasks.training import build_trainer, total_steps, train_and_evaluate


@dataclass(frozen=True)
class LabelledTexts:
    """Texts, or pairs of texts, and the numbers of their classes."""

    texts: Sequence[str]
    labels: Sequence[int]
    pairs: Sequence[str] | None = None

    def chosen(self, order: Sequence[int]) -> LabelledTexts:
        """Some of them, in this order."""
        pairs = None if self.pairs is None else [self.pairs[i] for i in order]
        return LabelledTexts([self.texts[i] for i in order], [self.labels[i] for i in order], pairs)


Parts = tuple[LabelledTexts, LabelledTexts, LabelledTexts]
"""(train, validation, test)."""


@dataclass(frozen=True)
class Recipe:
    """How a run trains, all but its rates and seed.

    Args:
        config: model, adapter, length, batch, schedule.
        beta2: of Adam.
        head_at_lr: the head learns at η_A, as in the authors' code, instead of at `config.lr_head`.
        half: float16 where there is a GPU.
        dropout: the model's own. On a CPU its random numbers can take more than half of a step's time.
    """

    config: TaskConfig
    beta2: float
    head_at_lr: bool = False
    half: bool = False
    dropout: bool = True

    def settings(self, *names: str) -> dict[str, Any]:
        """Some of the configuration by name, what Adam and the head have, and whether the model drops out."""
        own = {name: getattr(self.config, name) for name in names}
        head = "η_A" if self.head_at_lr else self.config.lr_head
        return own | {"beta2": self.beta2, "lr_head": head, "dropout": "the model's" if self.dropout else "none"}


def encode(
    names: Sequence[str], parts: Parts, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> ClassificationData:
    """Token ids of three parts; validation and test are sorted by length, so that their batches hold little padding."""
    train, validation, test = parts

    def rows(texts: LabelledTexts) -> list[dict[str, Any]]:
        pairs = None if texts.pairs is None else list(texts.pairs)
        token_ids = tokenizer(list(texts.texts), pairs, truncation=True, max_length=max_length)["input_ids"]
        return [{"input_ids": ids, "labels": label} for ids, label in zip(token_ids, texts.labels, strict=True)]

    def by_length(texts: LabelledTexts) -> list[dict[str, Any]]:
        return sorted(rows(texts), key=lambda row: len(row["input_ids"]))

    return ClassificationData(list(names), rows(train), by_length(validation), by_length(test), max_length, {})


def train_classifier(
    recipe: Recipe, data: ClassificationData, tokenizer: PreTrainedTokenizerBase,
    *, lr: float, lr_ratio: float, seed: int, evaluations: int, on_step: OnStep,
) -> Record:  # fmt: skip
    """Trains once; a run that is evaluated more than at its end is tested, too.

    Args:
        recipe: how.
        data: on what.
        tokenizer: pads the batches.
        lr, lr_ratio: η_A and λ.
        seed: of adapter, head and data order.
        evaluations: how often to evaluate, at equal distances.
        on_step: told (step, steps) after every step.

    Returns:
        A result whose run is empty; status "diverged" if the loss became NaN or infinite.
    """
    config = recipe.config
    steps = total_steps(config, len(data.train))
    config = replace(config, max_steps=steps, eval_steps=math.ceil(steps / evaluations))
    rates = Rates(lr, lr_ratio, lr_head=lr if recipe.head_at_lr else config.lr_head)
    adam = {"betas": (0.9, recipe.beta2), "eps": 1e-8, "fused": True}
    model = load_classifier(config, data.label_names, tokenizer, seed)
    if not recipe.dropout:
        without_dropout(model)
    with scratch_folder() as scratch, _precision(recipe.half):
        trainer = build_trainer(
            config, rates, data, model, tokenizer, seed=seed, output=scratch, checkpoints=False,
            optimizer=(torch.optim.AdamW, adam), callbacks=[StepClock(on_step), DivergenceGuard(rates)],
        )  # fmt: skip
        try:
            train_and_evaluate(trainer)
        except DivergedError:
            return Record(Run({}), "diverged", curve=_curve(trainer))
        curve, values = _curve(trainer), _last(trainer, "eval")
        if evaluations > 1:
            test: Any = data.test  # a list serves as a dataset
            tested = trainer.predict(test, metric_key_prefix="test").metrics or {}
            values |= {"test_loss": tested["test_loss"], "test_accuracy": tested["test_accuracy"]}
    return Record(Run({}), "done", curve=curve, values=values)


@contextlib.contextmanager
def _precision(half: bool) -> Iterator[None]:
    """Has Trainer compute in float16 with loss scaling on a GPU: it reads what `accelerate launch` sets."""
    name = "ACCELERATE_MIXED_PRECISION"
    before = os.environ.get(name)
    if half and torch.cuda.is_available():
        os.environ[name] = "fp16"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before


def _curve(trainer: Any) -> tuple[CurvePoint, ...]:
    rows = {row["step"]: row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row}
    return tuple(CurvePoint(step, loss) for step, loss in rows.items() if math.isfinite(loss))


def _last(trainer: Trainer, prefix: str) -> dict[str, float]:
    row = [row for row in trainer.state.log_history if f"{prefix}_loss" in row][-1]
    return {f"{prefix}_{name}": row[f"{prefix}_{name}"] for name in ("loss", "accuracy")}
