"""Multi-label classification: texts with any number of labels each, every label a yes or no of its own."""

from __future__ import annotations

import numpy as np
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from loraplus.tasks.classification import Classification, ClassificationData, columns_row, encoded
from loraplus.tasks.config import TaskConfig
from loraplus.tasks.learnt import chance_p
from loraplus.tasks.metrics import losses_of_sets, multi_label_metrics
from loraplus.tasks.model import load_classifier
from loraplus.tasks.pretrained import check_tokens
from loraplus.tasks.seen import (
    MOST_LOOKED_AT,
    Seen,
    doubt_of_contradictions,
    doubts_of_table,
    near_equal,
    repeats,
    repeats_row,
    shown,
    source_row,
)
from loraplus.tasks.splits import Splits, split
from loraplus.tasks.table import Table, read_table
from loraplus.tasks.targets import SEPARATOR, TargetedTexts, labelled_sets


def load_multi_label(config: TaskConfig, tokenizer: PreTrainedTokenizerBase) -> ClassificationData:
    """Reads, splits, checks and tokenises the data of a run.

    Raises:
        InputError: data that cannot be used; the message names the file, column or row.
    """
    table = read_table(config.data, encoding=config.encoding)
    data, names = labelled_sets(table, config.text_column, config.label_column)
    label_column = ",".join(data.target_columns)

    def read(source: str, option: str) -> TargetedTexts:
        table = read_table(source, encoding=config.encoding)
        return labelled_sets(table, data.text_column, label_column, names)[0]

    parts = split(data, config, read)
    counts = parts.train.targets.sum(axis=0, dtype=np.int64).tolist()
    facts = {
        "text_column": data.text_column,
        "label_column": label_column,
        "labels": names,
        "train_class_counts": dict(zip(names, counts, strict=True)),
    }
    seen = _seen(config, table, data, names, parts)
    return encoded(config, tokenizer, parts, lambda part: part.targets.astype(np.float32), names, facts, seen)


def _seen(
    config: TaskConfig, table: Table, data: TargetedTexts, names: list[str], parts: Splits[TargetedTexts]
) -> Seen:
    packed = np.packbits(data.targets[:MOST_LOOKED_AT], axis=1)
    sets = np.unique(packed, axis=0, return_inverse=True)[1].reshape(-1)
    repetition = repeats(data.texts, sets)
    counts = dict(zip(names, data.targets.sum(axis=0, dtype=np.int64).tolist(), strict=True))
    by_count = sorted(counts, key=lambda name: -counts[name])

    def written(row: int) -> str:
        return SEPARATOR.join(name for name, bit in zip(names, data.targets[row], strict=True) if bit) or "none"

    rows = {
        "data": source_row(table),
        "columns": columns_row(config, data.text_column, ",".join(data.target_columns)),
        "labels": f"{len(names)}: {shown([f'{name} {counts[name]:,}' for name in by_count])}; "
        f"{data.targets.sum() / len(data):.2g} a text, {int((~data.targets.any(axis=1)).sum()):,} texts without one",
        "duplicates": repeats_row(repetition, parts.duplicates_removed),
    }
    doubts = [
        *doubts_of_table(table, data.text_column, (), ()),
        *doubt_of_contradictions(table, repetition, written, data.texts),
        *(
            f"labels that are nearly equal: {', '.join(map(repr, group))}; write them alike"
            for group in near_equal(names)
        ),
        *(
            f"the label {name!r} has {counts[name]} example; add some or remove it"
            for name in names
            if counts[name] < 2
        ),
    ]
    if (data.targets.sum(axis=1) == 1).all():
        doubts.append("every text has exactly one label; --task classification makes use of that")
    return Seen(rows, tuple(doubts))


class MultiLabel(Classification):
    """Texts with any number of labels each."""

    metrics: tuple[str, ...] = ("eval_accuracy", "eval_micro_f1", "eval_macro_f1")

    def load_data(self, config: TaskConfig, tokenizer: PreTrainedTokenizerBase) -> ClassificationData:
        """As `load_multi_label`."""
        return load_multi_label(config, tokenizer)

    def load_model(
        self, config: TaskConfig, data: ClassificationData, tokenizer: PreTrainedTokenizerBase, seed: int
    ) -> PeftModel:
        """A model with one output a label, trained with the binary cross-entropy of each."""
        model = load_classifier(config, data.label_names, tokenizer, seed, problem_type="multi_label_classification")
        check_tokens(model, data.largest_token, config.model)
        return model

    def measure(self, data: ClassificationData, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """As `multi_label_metrics`, of (examples, labels); a label is said where it is likelier than not."""
        said, there = logits > 0, labels > 0.5
        return {**multi_label_metrics(said, there), "chance_p": chance_p(said, there)}

    def baseline(self, data: ClassificationData, labels: np.ndarray) -> dict[str, float]:
        """None: a text has a set of labels, so no class is the most frequent."""
        return {}

    def judge(self, logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Of (examples, labels): mean binary cross-entropy over the labels of each, and whether all were right."""
        return losses_of_sets(logits, labels), ((logits > 0) == (labels > 0.5)).all(axis=1)
