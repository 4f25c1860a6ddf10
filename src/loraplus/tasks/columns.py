"""From a table to texts and labels: which column is which, and whether every row has both."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from loraplus.errors import InputError
from loraplus.tasks.streamed import Labels, Texts, digest
from loraplus.tasks.table import Table

TEXT_NAMES = ("text", "sentence", "review", "content", "document", "comment", "tweet", "body", "message", "snippet")
LABEL_NAMES = ("label", "labels", "class", "category", "target", "sentiment", "y")
_MOST_CLASSES_GUESSED = 100
_SHORT = 100  # kept as they are while columns are compared
_INTEGER = re.compile(r"[+-]?\d+")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)


@dataclass(frozen=True)
class LabelledTexts:
    """Texts and their labels as strings, one of each a row."""

    texts: Texts
    labels: Labels
    text_column: str
    label_column: str

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def answers(self) -> Iterable[str]:
        """The labels as text."""
        return self.labels

    def contents(self) -> Texts:
        """The texts."""
        return self.texts

    def take(self, rows: np.ndarray) -> LabelledTexts:
        """Those of some rows (n,), in that order."""
        return replace(self, texts=self.texts.take(rows), labels=self.labels.take(rows))


def listed(names: Iterable[str]) -> str:
    """Names of columns, quoted."""
    return ", ".join(map(repr, names)) or "no columns"


def _named(table: Table, column: str | None, option: str, usual: tuple[str, ...], taken: str | None) -> str | None:
    """The column asked for, else one with a usual name. `taken` is the name that the other column has already."""
    if column is not None:
        if column not in table.columns:
            raise InputError(f"{table.source} has no column {column!r} ({option}); it has {listed(table.columns)}")
        return column
    by_lower = {name.lower(): name for name in reversed(list(table.columns)) if name != taken}
    return next((by_lower[name] for name in usual if name in by_lower), None)


def choose_text_column(
    table: Table, text_column: str | None = None, label_column: str | None = None, option: str = "--text-column"
) -> str:
    """The column with the text: the one named (by `option`), else a usual name, else the longest strings.

    Raises:
        InputError: the named column is missing, or none holds text.
    """
    column = _named(table, text_column, option, TEXT_NAMES, label_column)
    if column is not None:
        return column
    lengths = _mean_lengths(table, label_column)
    if not lengths:
        raise InputError(f"{table.source}: no column holds text; name it with {option} ({listed(table.columns)})")
    return max(lengths, key=lambda name: lengths[name])


def _mean_lengths(table: Table, leave_out: str | None) -> dict[str, float]:
    """Characters of a cell on average, for the columns that hold text alone."""
    names = [name for name in table.columns if name != leave_out]
    counts, lengths, others = [0] * len(names), [0] * len(names), set[int]()
    for row in zip(*(table.columns[name] for name in names), strict=True):
        for place, value in enumerate(row):
            if isinstance(value, str):
                counts[place] += 1
                lengths[place] += len(value)
            elif value is not None:
                others.add(place)
    return {
        name: lengths[place] / counts[place]
        for place, name in enumerate(names)
        if counts[place] and place not in others
    }


def _columns_of_few(table: Table, leave_out: str) -> list[str]:
    """Columns with few distinct values, which may be labels."""
    most = min(_MOST_CLASSES_GUESSED, max(2, len(table) // 2))
    distinct: dict[str, set[str | bytes]] = {name: set() for name in table.columns if name != leave_out}
    for row in zip(*(table.columns[name] for name in distinct), strict=True):
        for values, value in zip(distinct.values(), row, strict=True):
            if len(values) <= most:
                text = str(value)
                values.add(text if len(text) < _SHORT else digest(text))
    return [name for name, values in distinct.items() if 2 <= len(values) <= most]


def choose_columns(table: Table, text_column: str | None = None, label_column: str | None = None) -> tuple[str, str]:
    """(text column, label column), guessed where not named.

    Raises:
        InputError: a named column is missing, or the guess would be ambiguous.
    """
    label = _named(table, label_column, "--label-column", LABEL_NAMES, text_column)
    text = choose_text_column(table, text_column, label)
    if label is None:
        few = _columns_of_few(table, text)
        if len(few) != 1:
            raise InputError(
                f"{table.source}: cannot tell which column is the label; name it with --label-column "
                f"(columns: {listed(table.columns)})"
            )
        label = few[0]
    if text == label:
        raise InputError(f"{table.source}: text and label are both column {text!r}; name them apart")
    return text, label


def strings(table: Table, kind: str, column: str) -> Texts:
    """A column as strings; refuses lists and objects, and cells that are missing or blank."""
    values = table.columns[column]
    missing = 0
    first = 0
    for index, value in enumerate(values):
        if isinstance(value, (list, dict, bytes)):
            raise InputError(
                f"{table.source}, {table.row_name(index)}: the {kind} (column {column!r}) is a "
                f"{type(value).__name__}, expected a string"
            )
        if value is None or (isinstance(value, float) and math.isnan(value)) or not str(value).strip():
            first = first if missing else index
            missing += 1
    if missing:
        raise InputError(
            f"{table.source}: the {kind} (column {column!r}) is missing in {missing} of {len(values)} rows, "
            f"first in {table.row_name(first)}; fill or remove them"
        )
    return Texts(values)


def labels_in(table: Table, column: str) -> Labels:
    """The labels of a column as strings: "1" for 1 and 1.0.

    Raises:
        InputError: some are missing or of another kind, or are fractions.
    """
    strings(table, "label", column)
    distinct: dict[tuple[bool, str], int] = {}
    firsts: list[int] = []

    def code(index: int, value: object) -> int:
        number = distinct.setdefault((isinstance(value, float), str(value).strip()), len(distinct))
        if number == len(firsts):
            firsts.append(index)
        return number

    codes = np.fromiter(map(code, itertools.count(), table.columns[column]), np.int32)
    all_numbers = all(_NUMBER.fullmatch(label) for _, label in distinct)
    names: list[str] = []
    for (is_float, label), first in zip(distinct, firsts, strict=True):
        if is_float or (all_numbers and not _INTEGER.fullmatch(label)):
            number = float(label)
            if not number.is_integer():
                raise InputError(
                    f"{table.source}, {table.row_name(first)}: label {label} in column {column!r} looks like "
                    "a regression target; classification needs classes, so give each a name"
                )
            names.append(str(int(number)))
        else:
            names.append(label)
    merged = Labels.of(names)  # "1" stands for 1 and 1.0
    return Labels(merged.distinct, merged.codes[codes])


def labelled_texts(
    table: Table, text_column: str | None = None, label_column: str | None = None, held_out: str | None = None
) -> LabelledTexts:
    """Texts and labels of a table, checked.

    Args:
        table: from `read_table`.
        text_column: guessed if None.
        label_column: guessed if None.
        held_out: the option that names the table, if it is there to evaluate on.

    Returns:
        One text and one label a row; labels as strings ("1" for 1 and 1.0).

    Raises:
        InputError: a column is missing, texts or labels are missing in some rows or of another kind, labels are
            fractions, or there is one class only.
    """
    text_column, label_column = choose_columns(table, text_column, label_column)
    labels = labels_in(table, label_column)
    texts = strings(table, "text", text_column)
    if len(labels.distinct) < 2 and held_out:
        raise InputError(
            f"{table.source} ({held_out}): all {len(labels)} rows are of the class {labels[0]!r}, which says nothing "
            "of the others; add rows of those"
        )
    if len(labels.distinct) < 2:
        raise InputError(
            f"{table.source}: column {label_column!r} has one class only ({labels[0]!r}); classification needs two"
        )
    return LabelledTexts(texts, labels, text_column, label_column)


def label_names(labels: Iterable[str]) -> list[str]:
    """The distinct labels: by number if all are whole numbers, else by alphabet.

    Example:
        >>> label_names(["10", "9", "10"])
        ['9', '10']
    """
    distinct = set(labels)
    try:
        return sorted(distinct, key=lambda label: (int(label), label))  # "01" and "1" are two labels of one number
    except ValueError:
        return sorted(distinct)
