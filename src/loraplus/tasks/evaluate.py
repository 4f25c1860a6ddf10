"""Scores of a trained adapter on a table of labelled texts: which columns, which rows, what the labels are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from loraplus.errors import InputError
from loraplus.files.commands import DATA_FILE
from loraplus.files.paths import is_file, resolved, user_path
from loraplus.files.single import read_json
from loraplus.tasks.columns import LABEL_NAMES, choose_columns, labels_in, strings
from loraplus.tasks.scores import most_frequent, scores
from loraplus.tasks.table import Table
from loraplus.tasks.targets import SET_NAMES, TARGET_NAMES, labelled_sets, numbered_texts

_USUAL = {"regression": TARGET_NAMES, "multi_label_classification": SET_NAMES}


@dataclass(frozen=True)
class Truth:
    """The right answers for the rows of a table, as `scores` takes them, and the columns of texts and answers."""

    values: np.ndarray
    text_column: str
    label_column: str


def facts_of_training(adapter: str) -> dict[str, Any]:
    """What is known of the data that an adapter was trained on; empty if nothing is."""
    path = user_path(adapter) / DATA_FILE
    facts = read_json(path) if is_file(path) else {}
    return facts if isinstance(facts, dict) else {}


def notes_of_data(data: str, facts: Mapping[str, Any]) -> list[str]:
    """A warning if the scored file is the one that the adapter was trained on; else nothing."""
    source = facts.get("source")
    try:
        is_same = isinstance(source, str) and resolved(data) == resolved(source)
    except InputError:  # the facts of a damaged run may name anything
        is_same = False
    if not is_same:
        return []
    return [
        f"the adapter was trained on texts of {data}, so these scores say little of new ones; score texts kept aside"
    ]


def columns_of_training(
    table: Table, facts: Mapping[str, Any], text_column: str | None, label_column: str | None
) -> tuple[str | None, str | None]:
    """The columns that are named, else those of the training data if the table has them, else None: to be guessed."""
    known = (facts.get("text_column"), facts.get("label_column"))
    there = [name if isinstance(name, str) and _has(table, name) else None for name in known]
    return text_column or there[0], label_column or there[1]


def _has(table: Table, name: str) -> bool:
    """Whether a table has a column, or several that are named with commas between them."""
    return name in table.columns or all(part in table.columns for part in name.split(","))


def truth_of(table: Table, config: Any, text_column: str | None = None, label_column: str | None = None) -> Truth:
    """The labels of every row, which must all be the model's.

    Args:
        table: from `read_table`.
        config: of the model: its kind of task, and the names of its labels.
        text_column, label_column: guessed if None.

    Raises:
        InputError: columns that are missing or cannot be told, a row without text or label, a label that the model
            does not know.
    """
    problem = getattr(config, "problem_type", None)
    if problem == "regression":
        numbered = numbered_texts(table, text_column, label_column)
        return Truth(numbered.targets, numbered.text_column, numbered.target_columns[0])
    names = [config.id2label[index] for index in range(len(config.id2label))]
    if problem == "multi_label_classification":
        sets, _ = labelled_sets(table, text_column, label_column, names)
        return Truth(sets.targets, sets.text_column, ",".join(sets.target_columns))
    text, label = choose_columns(table, text_column, label_column)
    strings(table, "text", text)
    labels, place = labels_in(table, label), {name: index for index, name in enumerate(names)}
    if unknown := [name for name in labels.distinct if name not in place]:
        first = labels.codes.tolist().index(labels.distinct.index(unknown[0]))
        raise InputError(
            f"{table.place(first)}: the adapter does not know the label {unknown[0]!r} (column {label!r}); it knows "
            f"{', '.join(map(repr, names[:10]))}{' and more' if len(names) > 10 else ''}"
        )
    codes = np.asarray([place[name] for name in labels.distinct], np.int64)[labels.codes]
    return Truth(codes, text, label)


def labelled_rows(table: Table, config: object, label_column: str | None) -> tuple[list[int], str] | None:
    """The rows that have a label, and its column; None if the table has no column of a usual name with labels.

    Args:
        table: from `read_table`.
        config: of the model.
        label_column: the column, if it is known.
    """
    problem = getattr(config, "problem_type", None)
    by_lower = {name.lower(): name for name in reversed(list(table.columns))}
    usual = (by_lower[name] for name in _USUAL.get(str(problem), LABEL_NAMES) if name in by_lower)
    column = label_column or next(usual, None)
    if column is None:
        return None
    if column not in table.columns:  # several, of several labels
        return list(range(len(table))), column
    rows = [row for row, value in enumerate(table.columns[column]) if not _is_blank(value)]
    if rows and problem == "multi_label_classification":  # where a blank says that a text has none
        rows = list(range(len(table)))
    return (rows, column) if rows else None


def _is_blank(value: object) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value)) or not str(value).strip()


def scores_of(table: Table, truth: Truth, config: Any, logits: np.ndarray, facts: Mapping[str, Any]) -> dict[str, Any]:
    """As `scores`, of the rows of a table; a mistake says where it stands.

    Args:
        table: that the truth is of.
        truth: from `truth_of`.
        config: of the model.
        logits: (rows, outputs).
        facts: of the data of training.
    """
    texts = table.columns[truth.text_column]

    def example(number: int) -> dict[str, str]:
        return {"where": table.row_name(number), "text": str(texts[number])}

    names = [config.id2label[index] for index in range(len(config.id2label))]
    return scores(config, logits, truth.values, example, frequent=most_frequent(names, facts))
