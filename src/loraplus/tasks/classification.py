"""Text classification: labelled text → splits → token ids → trainer, for training and comparison alike."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from peft import PeftModel
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from loraplus.errors import InputError
from loraplus.tasks.columns import LabelledTexts, choose_columns, label_names, labelled_texts
from loraplus.tasks.config import REGRESSION, TaskConfig
from loraplus.tasks.data_parallel import DataParallelTrainer
from loraplus.tasks.learnt import chance_p, learnt_record
from loraplus.tasks.metrics import classification_metrics, losses_of_classes
from loraplus.tasks.model import load_classifier
from loraplus.tasks.pretrained import check_tokens, checked_length, padding_multiple
from loraplus.tasks.scores import most_frequent, scores
from loraplus.tasks.seen import (
    Seen,
    doubt_of_contradictions,
    doubts_of_labels,
    doubts_of_size,
    doubts_of_table,
    length_row,
    repeats,
    repeats_row,
    shown,
    source_row,
    split_row,
)
from loraplus.tasks.splits import Splits, split
from loraplus.tasks.streamed import in_parts
from loraplus.tasks.table import Table, read_table
from loraplus.tasks.task import Task, Tested
from loraplus.tasks.token_rows import tokenised

_LENGTH_QUANTILE = 0.99
_LENGTH_CAP = 512
_HASHED_AT_ONCE = 10_000

Encoded = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class ClassificationData:
    """Tokenised splits. `test` is empty unless a comparison asked for it; `answers` are the validation labels.

    `validation_text` gives the text of a validation example.
    """

    label_names: list[str]
    train: Encoded
    validation: Encoded
    test: Encoded
    max_length: int
    facts: dict[str, Any]
    largest_token: int = 0
    seen: Seen = field(default_factory=Seen)
    answers: np.ndarray = field(default_factory=lambda: np.empty(0))
    validation_text: Callable[[int], str] = str


def load_classification(config: TaskConfig, tokenizer: PreTrainedTokenizerBase) -> ClassificationData:
    """Reads, splits, checks and tokenises the data of a run.

    Texts of the training split that also stand in the validation or test split are removed and counted. The split is
    fixed by `config.seed` and keeps the proportions of the classes.

    Args:
        config: a `CompareConfig` also gets a test split.
        tokenizer: of the model.

    Returns:
        The splits as token ids; validation and test sorted by length, so that batches hold little padding.

    Raises:
        InputError: data that cannot be used; the message names the file, column or row.
    """
    table = read_table(config.data, encoding=config.encoding)
    text_column, label_column = choose_columns(table, config.text_column, config.label_column)
    data = labelled_texts(table, text_column, label_column)
    names = label_names(data.labels.distinct)

    def read(source: str, option: str) -> LabelledTexts:
        aside = labelled_texts(read_table(source, encoding=config.encoding), text_column, label_column, option)
        if unknown := sorted(set(aside.labels.distinct) - set(names)):
            raise InputError(f"{source}: labels that the training data lacks: {', '.join(unknown)}")
        return aside

    parts = split(data, config, read)
    counts = dict(sorted(parts.train.labels.counts().items()))
    facts = {
        "text_column": text_column,
        "label_column": label_column,
        "labels": names,
        "train_class_counts": counts,
    }
    return encoded(
        config, tokenizer, parts, partial(_indices, names=names), names, facts, _seen(config, table, data, parts)
    )


def _seen(config: TaskConfig, table: Table, data: LabelledTexts, parts: Splits[LabelledTexts]) -> Seen:
    repetition = repeats(data.texts, data.labels.codes)
    counts = data.labels.counts().most_common()
    held_out = parts.validation.labels.counts()
    frequent = parts.train.labels.counts().most_common(1)[0][0]
    share = f"{100 * held_out[frequent] / len(parts.validation):.1f}%"
    rows = {
        "data": source_row(table),
        "columns": columns_row(config, data.text_column, data.label_column),
        "classes": f"{len(counts)}: {shown([f'{label} {count:,}' for label, count in counts])}",
        "most frequent": f"{frequent}, {share} of the validation texts: the accuracy of always saying it",
        "duplicates": repeats_row(repetition, parts.duplicates_removed),
    }
    return Seen(rows).with_(
        [
            *doubts_of_table(table, data.text_column, [data.label_column], data.labels.distinct),
            *doubt_of_contradictions(table, repetition, data.labels.value, data.texts),
            *doubts_of_labels(data.labels, len(data)),
        ]
    )


def columns_row(config: TaskConfig, text: str, target: str) -> str:
    """The columns that were taken, and whether they were guessed."""
    asked = {"--text-column": config.text_column, "--label-column": config.label_column}
    flags = [flag for flag, name in asked.items() if not name]
    guessed = f" (guessed; {' and '.join(flags)} {'name' if len(flags) > 1 else 'names'} others)" if flags else ""
    return f"text {text!r}, label {target!r}{guessed}"


def encoded(
    config: TaskConfig,
    tokenizer: PreTrainedTokenizerBase,
    parts: Splits[Any],
    targets: Callable[[Any], np.ndarray],
    names: Sequence[str],
    facts: dict[str, Any],
    seen: Seen,
) -> ClassificationData:
    """Tokenises the parts of the data, and chooses the length.

    Args:
        config: of the run.
        tokenizer: of the model.
        parts: each with `texts` and `answers`.
        targets: what the model is to give for the examples of a part: (examples,) or (examples, labels).
        names: of the model's outputs.
        facts: of the task.
        seen: of the data so far.
    """
    train, validation, test, removed, unused = parts
    tokens = tokenised(train.texts, targets(train), tokenizer)
    max_length = checked_length(config, _max_length(tokens.lengths, tokenizer), tokenizer)
    cut = int((tokens.lengths > max_length).sum())
    covers = "the most by default"
    if max_length < _LENGTH_CAP:
        covers = f"which covers {100 * _LENGTH_QUANTILE:.0f}% of the texts"
    rows = {
        "split": split_row(len(train), len(validation), len(test), unused, config.max_eval_samples is not None),
        "length": length_row(max_length, config.max_length is not None, int(tokens.lengths.max()), covers),
        "cut": f"{cut:,} of {len(train):,} training texts lose their end" if cut else "nothing",
    }
    held_out = tokenised(validation.texts, targets(validation), tokenizer, max_length)
    order = held_out.order_by_length()
    known = {
        "source": config.data,
        "train_examples": len(train),
        "validation_examples": len(validation),
        "test_examples": len(test),
        "duplicates_removed": removed,
        "max_length": max_length,
        "truncated_train_examples": cut,
        "split_seed": config.seed,
        "sha256": _fingerprint(train, validation, test),
    }
    return ClassificationData(
        label_names=list(names),
        train=tokens.cut(train.texts, tokenizer, max_length),
        validation=held_out.take(order),
        test=tokenised(test.texts, targets(test), tokenizer, max_length).by_length(),
        max_length=max_length,
        facts={**known, **facts},
        largest_token=tokens.largest,
        answers=held_out.labels,
        validation_text=lambda example: validation.texts[int(order[example])],
        seen=seen.with_(
            doubts_of_size(
                cut, len(train), len(validation), config.max_length is not None, config.task != REGRESSION, unused
            ),
            **rows,
        ),
    )


def _fingerprint(*parts: Any) -> str:
    """Hash of all texts and labels as JSON, so that a run is not resumed on data that has been edited."""
    hashed = hashlib.sha256(b"[")
    for place, part in enumerate(parts):
        hashed.update(b", [" if place else b"[")
        for values, end in ((part.texts, b", "), (part.answers, b"]")):
            _add_list(hashed, values)
            hashed.update(end)
    hashed.update(b"]")
    return hashed.hexdigest()


def _add_list(hashed: Any, values: Iterable[str]) -> None:
    """Adds a list as JSON, in parts."""
    hashed.update(b"[")
    for number, part in enumerate(in_parts(values, _HASHED_AT_ONCE)):
        hashed.update(((", " if number else "") + json.dumps(part)[1:-1]).encode())
    hashed.update(b"]")


def _max_length(lengths: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> int:
    """A length in tokens that covers 99% of the lengths (texts,), a multiple of 8, within what the model takes."""
    wanted = int(np.ceil(np.quantile(lengths, _LENGTH_QUANTILE) / 8) * 8)
    return max(8, min(wanted, _LENGTH_CAP, tokenizer.model_max_length))


def _indices(data: LabelledTexts, names: Sequence[str]) -> np.ndarray:
    """The class of each text as an index into the names, (texts,)."""
    index = {name: i for i, name in enumerate(names)}
    return np.asarray([index[name] for name in data.labels.distinct], np.int32)[data.labels.codes]


class Classification(Task[ClassificationData]):
    """Texts with one label each."""

    metrics: tuple[str, ...] = ("eval_accuracy", "eval_macro_f1")

    def load_data(self, config: TaskConfig, tokenizer: PreTrainedTokenizerBase) -> ClassificationData:
        """As `load_classification`."""
        return load_classification(config, tokenizer)

    def load_model(
        self, config: TaskConfig, data: ClassificationData, tokenizer: PreTrainedTokenizerBase, seed: int
    ) -> PeftModel:
        """As `load_classifier`."""
        model = load_classifier(config, data.label_names, tokenizer, seed)
        check_tokens(model, data.largest_token, config.model)
        return model

    def trainer(
        self,
        config: TaskConfig,
        data: ClassificationData,
        model: PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        **options: Any,
    ) -> DataParallelTrainer:
        """transformers' Trainer, with padded batches."""

        def measured(prediction: Any) -> dict[str, float]:
            return self.measure(data, _logits(prediction), prediction.label_ids)

        trainer = DataParallelTrainer(
            model=model,
            train_dataset=data.train,
            eval_dataset=data.validation,
            data_collator=DataCollatorWithPadding(
                tokenizer, pad_to_multiple_of=padding_multiple(data.max_length, tokenizer)
            ),
            processing_class=tokenizer,
            compute_metrics=measured,
            **options,
        )
        # transformers takes PEFT's **kwargs for a model that divides its loss by num_items_in_batch, and leaves out its
        # own division by the number of parts; no classifier does the former.
        trainer.model_accepts_loss_kwargs = False
        return trainer

    def measure(self, data: ClassificationData, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """What an evaluation tells, of the model's outputs (examples, outputs) and the labels."""
        guess = np.argmax(logits, axis=-1)
        return {**classification_metrics(guess, labels), "chance_p": chance_p(guess, labels)}

    def test(self, trainer: Any, data: ClassificationData) -> Tested:
        """The loss of every test example and, where there is one, whether the answer was right."""
        output = trainer.predict(data.test)
        logits, labels = np.asarray(_logits(output), np.float64), np.asarray(output.label_ids)
        losses, correct = self.judge(logits, labels)
        rounded = tuple(round(float(loss), 6) for loss in losses)
        if correct is None:
            return Tested(rounded)
        measured = self.measure(data, logits, labels)
        values = {name: measured[name] for name in ("macro_f1", "chance_p")} | self.baseline(data, labels)
        return Tested(rounded, tuple(map(bool, correct)), values)

    def judge(self, logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """(cross-entropy, whether right) of every example, (examples,) each.

        Args:
            logits: (examples, outputs).
            labels: (examples,).
        """
        return losses_of_classes(logits, labels), logits.argmax(axis=-1) == labels

    def baseline(self, data: ClassificationData, labels: np.ndarray) -> dict[str, float]:
        """The accuracy of always saying the class that is most frequent in training.

        Args:
            data: with the counts of the training labels.
            labels: of the examples that are answered (examples,).
        """
        return {"majority_share": float(np.mean(labels == most_frequent(data.label_names, data.facts)))}

    def scores(self, trainer: DataParallelTrainer, data: ClassificationData) -> dict[str, Any]:
        """As `scores`, of the validation examples."""
        output, config = trainer.answers(data.validation), trainer.model.config
        truth = self.truth(data, np.asarray(output.label_ids))
        frequent = most_frequent(data.label_names, data.facts)

        def example(number: int) -> dict[str, str]:
            return {"text": data.validation_text(number)}

        return scores(config, _logits(output), truth, example, frequent=frequent)

    def truth(self, data: ClassificationData, labels: np.ndarray) -> np.ndarray:
        """The labels (examples,) or (examples, labels) as `scores` takes them."""
        return labels

    def outcome(self, data: ClassificationData, scored: Mapping[str, Any]) -> dict[str, Any]:
        """Whether anything was learnt, and the accuracy of always saying the most frequent class."""
        # The test draws random shuffles, so it is done once: the terminal, the card and the page then say the same p.
        return {**self.baseline(data, data.answers), "learnt": learnt_record(scored["learnt"]["p_value"])}

    def save_beside_adapter(
        self, model: PeftModel, data: ClassificationData, tokenizer: PreTrainedTokenizerBase, folder: Path
    ) -> None:
        """The label names (config.json), and the tokenizer with the length that it cut to."""
        model.config.save_pretrained(str(folder))
        tokenizer.model_max_length = data.max_length
        super().save_beside_adapter(model, data, tokenizer, folder)


def _logits(output: Any) -> np.ndarray:
    """(examples, outputs) of a prediction; some models give more than logits."""
    return output.predictions[0] if isinstance(output.predictions, tuple) else output.predictions
