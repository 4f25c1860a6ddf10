"""Regression: texts with a number each, learnt with the mean squared error.

The head learns (target − mean) / deviation, with mean and deviation of the training targets, so that the usual rates
fit whatever the numbers are measured in. `eval_loss` is in that scale; the metrics are in the data's own.
"""

from __future__ import annotations

import numpy as np
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from loraplus.errors import InputError
from loraplus.tasks.classification import Classification, ClassificationData, columns_row, encoded
from loraplus.tasks.config import TaskConfig
from loraplus.tasks.learnt import chance_p, product
from loraplus.tasks.metrics import regression_metrics
from loraplus.tasks.model import load_classifier
from loraplus.tasks.pretrained import check_tokens
from loraplus.tasks.seen import Seen, doubts_of_table, repeats, repeats_row, source_row
from loraplus.tasks.splits import split
from loraplus.tasks.table import read_table
from loraplus.tasks.targets import TargetedTexts, numbered_texts


def load_regression(config: TaskConfig, tokenizer: PreTrainedTokenizerBase) -> ClassificationData:
    """Reads, splits, checks and tokenises the data of a run; targets are scaled.

    Raises:
        InputError: data that cannot be used; the message names the file, column or row.
    """
    table = read_table(config.data, encoding=config.encoding)
    data = numbered_texts(table, config.text_column, config.label_column)
    (column,) = data.target_columns

    def read(source: str, option: str) -> TargetedTexts:
        return numbered_texts(read_table(source, encoding=config.encoding), data.text_column, column)

    parts = split(data, config, read)
    mean, deviation = float(parts.train.targets.mean()), float(parts.train.targets.std())
    if deviation == 0:
        raise InputError(f"{config.data}: every target in column {column!r} is {mean:g}, so there is nothing to learn")
    facts = {
        "text_column": data.text_column,
        "label_column": column,
        "target_mean": mean,
        "target_deviation": deviation,
        "target_range": [float(parts.train.targets.min()), float(parts.train.targets.max())],
    }

    def scaled(split: TargetedTexts) -> np.ndarray:
        """Targets (examples,) with mean 0 and deviation 1 over the training examples."""
        return ((split.targets - mean) / deviation).astype(np.float32)

    low, high = facts["target_range"]
    rows = {
        "data": source_row(table),
        "columns": columns_row(config, data.text_column, column),
        "numbers": f"{low:g} to {high:g}, mean {mean:.4g}, deviation {deviation:.3g}",
        "duplicates": repeats_row(repeats(data.texts), parts.duplicates_removed),
    }
    doubts = doubts_of_table(table, data.text_column, (), ())
    return encoded(config, tokenizer, parts, scaled, [column], facts, Seen(rows, tuple(doubts)))


class Regression(Classification):
    """Texts with a number each."""

    metrics: tuple[str, ...] = ("eval_mse", "eval_mae", "eval_r2", "eval_pearson")

    def load_data(self, config: TaskConfig, tokenizer: PreTrainedTokenizerBase) -> ClassificationData:
        """As `load_regression`."""
        return load_regression(config, tokenizer)

    def load_model(
        self, config: TaskConfig, data: ClassificationData, tokenizer: PreTrainedTokenizerBase, seed: int
    ) -> PeftModel:
        """A model with one output; its config.json holds the scale of the targets."""
        model = load_classifier(config, data.label_names, tokenizer, seed, problem_type="regression")
        model.config.update({name: data.facts[name] for name in ("target_mean", "target_deviation")})
        check_tokens(model, data.largest_token, config.model)
        return model

    def measure(self, data: ClassificationData, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """As `regression_metrics`, of logits (examples, 1) and labels (examples,)."""
        predicted, targets = (_unscaled(data, values) for values in (logits, labels))
        about = targets - targets.mean()
        return {**regression_metrics(predicted, targets), "chance_p": chance_p(predicted, about, product)}

    def baseline(self, data: ClassificationData, labels: np.ndarray) -> dict[str, float]:
        """None: always saying the mean has an R² of 0, which needs no line of its own."""
        return {}

    def truth(self, data: ClassificationData, labels: np.ndarray) -> np.ndarray:
        """The targets (examples,) in the data's own scale."""
        return _unscaled(data, labels)

    def judge(self, logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """The squared error of every example (examples,), in the scale of the loss; nothing is right or wrong."""
        return (logits.reshape(-1) - labels.reshape(-1)) ** 2, None


def _unscaled(data: ClassificationData, values: np.ndarray) -> np.ndarray:
    """Outputs or targets (examples,) or (examples, 1) in the data's own scale, (examples,)."""
    return np.asarray(values, np.float64).reshape(-1) * data.facts["target_deviation"] + data.facts["target_mean"]
