"""GLUE's MNLI, QQP, SST-2 and QNLI, from the hub or from a folder in the same format.

A folder is either a copy of the hub's repository (its README.md says which file is which split) or has one folder a
task with files named after the splits: mnli/train*.parquet, mnli/validation_matched*.parquet; also .jsonl and .csv.
GLUE's test labels are secret, so its validation data is the test data here, and rates are chosen on a part of the
training data.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from loraplus.errors import InputError
from loraplus.files.paths import user_path
from loraplus.reproduce.classifier import LabelledTexts, Parts, encode
from loraplus.tasks.classification import ClassificationData
from loraplus.tasks.config import TaskConfig
from loraplus.tasks.loading import first_line
from loraplus.tasks.pretrained import load_tokenizer
from loraplus.tasks.table import read_table

HUB_NAME = "nyu-mll/glue"
LENGTH = 128
HELD_OUT = 5000
_AT_MOST = 0.1  # of the training data is held out
_SUFFIXES = ("parquet", "jsonl", "csv")


@dataclass(frozen=True)
class GlueTask:
    """Columns, splits and published epochs of one task."""

    name: str
    text: str
    pair: str | None
    labels: tuple[str, ...]
    epochs: float
    validation: str = "validation"


TASKS = {
    task.name: task
    for task in (
        GlueTask("mnli", "premise", "hypothesis", ("entailment", "neutral", "contradiction"), 3, "validation_matched"),
        GlueTask("qqp", "question1", "question2", ("not_duplicate", "duplicate"), 3),
        GlueTask("sst2", "sentence", None, ("negative", "positive"), 10),
        GlueTask("qnli", "question", "sentence", ("entailment", "not_entailment"), 10),
    )
}


def in_folder_or_hub(data: str, name: str) -> str:
    """A folder of this (last) name in the data folder if there is one, else the name on the hub.

    Example:
        >>> in_folder_or_hub("no-such-folder", "nyu-mll/glue")
        'nyu-mll/glue'
    """
    folder = user_path(data) / Path(name).name
    return str(folder) if folder.is_dir() else name


@functools.lru_cache(maxsize=2)
def encoded(name: str, data: str, model: str) -> tuple[PreTrainedTokenizerBase, ClassificationData]:
    """The model's tokenizer and a task as its token ids, kept for the later runs of this process.

    Args:
        name: of the task.
        data: folder that may hold a folder `glue`.
        model: folder or hub name.

    Raises:
        InputError: the model or the data cannot be had.
    """
    task = TASKS[name]
    tokenizer = load_tokenizer(TaskConfig(model=model))
    length = min(LENGTH, tokenizer.model_max_length)
    return tokenizer, encode(task.labels, load_glue(task, in_folder_or_hub(data, HUB_NAME)), tokenizer, length)


def check(names: Iterable[str], data: str, model: str) -> None:
    """Loads a model's tokenizer and some tasks, for nothing.

    Raises:
        InputError: one of them cannot be had.
    """
    load_tokenizer(TaskConfig(model=model))
    for name in names:
        load_glue(TASKS[name], in_folder_or_hub(data, HUB_NAME))


def load_glue(task: GlueTask, source: str) -> Parts:
    """(train, validation, test): a part of the training split is the validation data, GLUE's validation is the test.

    Args:
        task: which.
        source: a folder, or a name on the hub.

    Raises:
        InputError: the data cannot be had, or lacks a column or split.
    """
    rows = _labelled(task, source, "train")
    count = min(HELD_OUT, int(len(rows.labels) * _AT_MOST))
    order = torch.randperm(len(rows.labels), generator=torch.Generator().manual_seed(0)).tolist()
    return rows.chosen(sorted(order[count:])), rows.chosen(order[:count]), _labelled(task, source, task.validation)


def _labelled(task: GlueTask, source: str, split: str) -> LabelledTexts:
    columns = read_split(source, task.name, split, folder=user_path(source) / task.name)
    wanted = [name for name in (task.text, task.pair, "label") if name]
    if missing := [name for name in wanted if name not in columns]:
        raise InputError(f"{source}: {task.name}/{split} has no column {missing[0]!r}; it has {', '.join(columns)}")
    labels = [_label(task, source, split, value) for value in columns["label"]]
    kept = [i for i, label in enumerate(labels) if label >= 0]  # -1: no label
    if not kept:
        raise InputError(f"{source}: {task.name}/{split} has no labelled rows")
    pairs = None if task.pair is None else [str(columns[task.pair][i]) for i in kept]
    return LabelledTexts([str(columns[task.text][i]) for i in kept], [labels[i] for i in kept], pairs)


def _label(task: GlueTask, source: str, split: str, value: object) -> int:
    text = str(value).strip()
    if text in task.labels:
        return task.labels.index(text)
    if text.lstrip("-").isdigit() and -1 <= int(text) < len(task.labels):
        return int(text)
    raise InputError(f"{source}: {task.name}/{split} has the label {text!r}; expected 0 to {len(task.labels) - 1}")


def read_split(source: str, configuration: str, split: str, *, folder: Path) -> dict[str, list[Any]]:
    """The columns of one split of a data set of the hub, or of files in its format.

    Args:
        source: a folder, or a name on the hub.
        configuration: of the data set.
        split: its name, which the names of files start with.
        folder: where these files are, if the source is a folder without a README.md.

    Raises:
        InputError: it cannot be had.
    """
    root = user_path(source)
    if root.is_dir() and not (root / "README.md").is_file():
        return _from_files(folder, split)
    datasets = importlib.import_module("datasets")
    try:
        loaded = datasets.load_dataset(str(root) if root.is_dir() else source, configuration, split=split)
    except Exception as error:  # the hub client raises many kinds; each means that the data is not to be had
        raise InputError(f"cannot load {configuration}/{split} of {source}: {first_line(error)}") from None
    return {name: list(loaded[name]) for name in loaded.column_names}


def files_of(folder: Path, split: str) -> list[Path]:
    """The files of a split: those whose names start with it.

    Raises:
        InputError: there is none.
    """
    files = [file for suffix in _SUFFIXES for file in sorted(folder.glob(f"{split}*.{suffix}"))]
    if not files:
        raise InputError(f"{folder} has no file {split}*.parquet, .jsonl or .csv")
    return files


def _from_files(folder: Path, split: str) -> dict[str, list[Any]]:
    parts = [read_table(str(file)).columns for file in files_of(folder, split)]
    return {name: [value for part in parts for value in part.get(name, [])] for name in parts[0]}
