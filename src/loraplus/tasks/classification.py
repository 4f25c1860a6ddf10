"""Text classification: labelled text → splits → token ids → trainer, for training and comparison alike."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from peft import PeftModel
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from loraplus.errors import InputError
from loraplus.integrations.transformers import LoraPlusTrainer, LoraPlusTrainingArguments
from loraplus.tasks.checks import check_task
from loraplus.tasks.columns import Examples, choose_columns, examples, label_names
from loraplus.tasks.config import CompareConfig, TaskConfig
from loraplus.tasks.data_parallel import DataParallelTrainer
from loraplus.tasks.lengths import most_validation_examples
from loraplus.tasks.model import load_classifier
from loraplus.tasks.pretrained import check_tokens, checked_length, load_tokenizer, padding_multiple
from loraplus.tasks.splits import check_seed, stratified_sample, stratified_split, without_duplicates
from loraplus.tasks.streamed import in_parts
from loraplus.tasks.table import read_table
from loraplus.tasks.token_rows import tokenised

_LENGTH_QUANTILE = 0.99
_LENGTH_CAP = 512
_HASHED_AT_ONCE = 10_000

Encoded = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class ClassificationData:
    """Tokenised splits. `test` is empty unless a comparison asked for it."""

    label_names: list[str]
    train: Encoded
    validation: Encoded
    test: Encoded
    max_length: int
    facts: dict[str, Any]
    largest_token: int = 0


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
    check_seed(config)
    table = read_table(config.data)
    text_column, label_column = choose_columns(table, config.text_column, config.label_column)
    train = examples(table, text_column, label_column)
    names = label_names(train.labels.distinct)

    test = train.take(np.arange(0))
    if isinstance(config, CompareConfig):
        train, test = _hold_out(
            train, config.test_data, config.test_fraction, config.max_test_samples, config, names, "--test-data"
        )
    most = most_validation_examples(config, len(train.texts))
    train, validation = _hold_out(train, config.eval_data, config.eval_fraction, most, config, names)
    kept, removed = without_duplicates(train.texts, chain(validation.texts, test.texts))
    train = train.take(kept)
    kept, removed_validation = without_duplicates(validation.texts, test.texts)
    validation = validation.take(kept)
    if not len(train.texts) or not len(validation.texts):
        raise InputError(f"{config.data}: nothing is left to train on after texts of the held-out data were removed")

    tokens = tokenised(train.texts, _indices(train, names), tokenizer)
    max_length = checked_length(config, _max_length(tokens.lengths, tokenizer), tokenizer)
    facts = {
        "source": config.data,
        "text_column": text_column,
        "label_column": label_column,
        "labels": names,
        "train_examples": len(train.texts),
        "validation_examples": len(validation.texts),
        "test_examples": len(test.texts),
        "train_class_counts": dict(sorted(train.labels.counts().items())),
        "duplicates_removed": removed + removed_validation,
        "max_length": max_length,
        "truncated_train_examples": int((tokens.lengths > max_length).sum()),
        "split_seed": config.seed,
        "sha256": _fingerprint(train, validation, test),
    }
    return ClassificationData(
        label_names=names,
        train=tokens.cut(train.texts, tokenizer, max_length),
        validation=tokenised(validation.texts, _indices(validation, names), tokenizer, max_length).by_length(),
        test=tokenised(test.texts, _indices(test, names), tokenizer, max_length).by_length(),
        max_length=max_length,
        facts=facts,
        largest_token=tokens.largest,
    )


def _hold_out(
    data: Examples,
    source: str | None,
    fraction: float,
    at_most: int | None,
    config: TaskConfig,
    names: list[str],
    option: str = "--eval-data",
) -> tuple[Examples, Examples]:
    """(rest, held out): from a file of its own, or a stratified part of `data`."""
    if source is not None:
        table = read_table(source)
        rest, held_out = data, examples(table, data.text_column, data.label_column, option)
        unknown = sorted(set(held_out.labels.distinct) - set(names))
        if unknown:
            raise InputError(f"{source}: labels that the training data lacks: {', '.join(unknown)}")
    else:
        kept, held = stratified_split(data.labels, fraction, config.seed)
        rest, held_out = data.take(kept), data.take(held)
    if at_most is not None and at_most < len(held_out.labels):
        held_out = held_out.take(stratified_sample(held_out.labels, at_most, config.seed))
    return rest, held_out


def _fingerprint(*splits: Examples) -> str:
    """Hash of all texts and labels as JSON, so that a run is not resumed on data that has been edited."""
    found = hashlib.sha256(b"[")
    for place, split in enumerate(splits):
        found.update(b", [" if place else b"[")
        for values, end in ((split.texts, b", "), (split.labels, b"]")):
            _add_list(found, values)
            found.update(end)
    found.update(b"]")
    return found.hexdigest()


def _add_list(found: Any, values: Iterable[str]) -> None:
    """Adds a list as JSON, in parts."""
    found.update(b"[")
    for number, part in enumerate(in_parts(values, _HASHED_AT_ONCE)):
        found.update(((", " if number else "") + json.dumps(part)[1:-1]).encode())
    found.update(b"]")


def _max_length(lengths: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> int:
    """Covers 99% of the texts, in steps of 8, within what the model takes."""
    wanted = int(np.ceil(np.quantile(lengths, _LENGTH_QUANTILE) / 8) * 8)
    return max(8, min(wanted, _LENGTH_CAP, tokenizer.model_max_length))


def _indices(data: Examples, names: Sequence[str]) -> np.ndarray:
    index = {name: i for i, name in enumerate(names)}
    return np.asarray([index[name] for name in data.labels.distinct], np.int32)[data.labels.codes]


def classification_metrics(prediction: Any) -> dict[str, float]:
    """Accuracy, and F1 averaged over the classes so that rare ones count.

    Args:
        prediction: transformers' EvalPrediction with logits (examples, classes) and label ids (examples,).
    """
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    guess, labels = np.argmax(logits, axis=-1), prediction.label_ids
    return {
        "accuracy": float(np.mean(guess == labels)),
        "macro_f1": macro_f1(labels, guess),
    }


def macro_f1(labels: np.ndarray, guess: np.ndarray) -> float:
    """Mean over the classes of F1 = 2·hits / (labels + guesses), as scikit-learn's `f1_score(average="macro")`.

    Example:
        >>> macro_f1(np.asarray([0, 0, 1]), np.asarray([0, 0, 2]))
        0.3333333333333333
    """
    of_class = ((labels == c, guess == c) for c in np.union1d(labels, guess))
    return float(np.mean([2 * np.sum(there & said) / (np.sum(there) + np.sum(said)) for there, said in of_class]))


class Classification:
    """The task of `load_classification`."""

    metrics: tuple[str, ...] = ("eval_accuracy", "eval_macro_f1")

    def load_tokenizer(self, config: TaskConfig) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        return load_tokenizer(config)

    def load_data(self, config: TaskConfig, tokenizer: PreTrainedTokenizerBase) -> ClassificationData:
        """As `load_classification`; settings of other tasks are refused."""
        check_task(config)
        return load_classification(config, tokenizer)

    def load_model(
        self, config: TaskConfig, data: ClassificationData, tokenizer: PreTrainedTokenizerBase, seed: int
    ) -> PeftModel:
        """As `load_classifier`."""
        model = load_classifier(config, data.label_names, tokenizer, seed)
        check_tokens(model, data.largest_token, config.model)
        return model

    def arguments(self, **options: Any) -> LoraPlusTrainingArguments:
        """Trainer's arguments."""
        return LoraPlusTrainingArguments(**options)

    def trainer(
        self,
        config: TaskConfig,
        data: ClassificationData,
        model: PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        **options: Any,
    ) -> LoraPlusTrainer:
        """transformers' Trainer, with padded batches."""
        trainer = DataParallelTrainer(
            model=model,
            train_dataset=data.train,
            eval_dataset=data.validation,
            data_collator=DataCollatorWithPadding(
                tokenizer, pad_to_multiple_of=padding_multiple(data.max_length, tokenizer)
            ),
            processing_class=tokenizer,
            compute_metrics=classification_metrics,
            **options,
        )
        # transformers takes PEFT's **kwargs for a model that divides its loss by num_items_in_batch, and leaves out its
        # own division by the number of parts; no classifier does the former.
        trainer.model_accepts_loss_kwargs = False
        return trainer

    def facts_of_run(self, trainer: Any) -> dict[str, Any]:
        """Nothing is decided by the model."""
        return {}

    def test(self, trainer: Any, data: ClassificationData) -> tuple[tuple[float, ...], tuple[bool, ...]]:
        """Cross-entropy and correctness of every test example."""
        output = trainer.predict(data.test)
        logits = np.asarray(output.predictions, dtype=np.float64)
        labels = np.asarray(output.label_ids)
        shifted = logits - logits.max(axis=-1, keepdims=True)
        losses = np.log(np.exp(shifted).sum(axis=-1)) - shifted[np.arange(len(labels)), labels]
        correct = logits.argmax(axis=-1) == labels
        return tuple(round(float(loss), 6) for loss in losses), tuple(bool(value) for value in correct)

    def samples(
        self, count: int, model: PeftModel, data: ClassificationData, tokenizer: PreTrainedTokenizerBase
    ) -> list[dict[str, str]]:
        """None: a classifier says a label."""
        return []

    def save_beside_adapter(
        self, model: PeftModel, data: ClassificationData, tokenizer: PreTrainedTokenizerBase, folder: Path
    ) -> None:
        """The label names (config.json), and the tokenizer with the length that it cut to."""
        model.config.save_pretrained(str(folder))
        tokenizer.model_max_length = data.max_length
        tokenizer.save_pretrained(str(folder))
