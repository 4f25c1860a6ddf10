"""Targets other than one class: a number for each text (regression), or a set of labels (multi-label)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from loraplus.errors import InputError
from loraplus.files.parsing import ParseError, parse_json
from loraplus.tasks.columns import LABEL_NAMES, choose_text_column, listed, strings
from loraplus.tasks.streamed import Labels, Texts
from loraplus.tasks.table import Table
from loraplus.tasks.tabular import check_size

TARGET_NAMES = ("score", "rating", "stars", "value", "grade", *LABEL_NAMES)
SET_NAMES = ("labels", "tags", "topics", "categories", "genres", *LABEL_NAMES)
_DECIMAL_COMMA = re.compile(r"[+-]?\d+,\d+")
_THOUSANDS = re.compile(r"[+-]?\d{1,3}(,\d{3})+")
SEPARATOR = "|"
"""Between the labels of one text."""
_SEPARATORS = (SEPARATOR, ";", ",")
_YES, _NO = {"1", "1.0", "true", "yes"}, {"0", "0.0", "false", "no"}


@dataclass(frozen=True)
class TargetedTexts:
    """Texts and their targets: a number each (examples,), or ones and zeros (examples, labels)."""

    texts: Texts
    targets: np.ndarray
    text_column: str
    target_columns: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def labels(self) -> Labels:
        """One for all: parts of the data are drawn without regard to the targets."""
        return Labels([""], np.zeros(len(self), np.int32))

    @property
    def answers(self) -> Iterable[str]:
        """The targets as text."""
        return (str(target.tolist()) for target in self.targets)

    def contents(self) -> Texts:
        """The texts."""
        return self.texts

    def take(self, rows: np.ndarray) -> TargetedTexts:
        """Those of some rows (n,), in that order."""
        return replace(self, texts=self.texts.take(rows), targets=self.targets[rows])


def numbered_texts(table: Table, text_column: str | None = None, target_column: str | None = None) -> TargetedTexts:
    """Texts with a number each.

    Args:
        table: from `read_table`.
        text_column: guessed if None.
        target_column: a usual name if None, else the only column of numbers.

    Raises:
        InputError: a column is missing or cannot be told, a text or number is missing, a target is no number.

    Example:
        >>> numbered_texts(Table("d.csv", {"text": ["a", "b"], "score": ["1,5", "2"]})).targets.tolist()
        [1.5, 2.0]
    """
    target = _target_column(table, text_column, target_column)
    text = choose_text_column(table, text_column, target)
    if text == target:
        raise InputError(f"{table.source}: text and target are both column {text!r}; name them apart")
    strings(table, "target", target)
    values = table.columns[target]
    comma = _has_decimal_commas(table, target)
    targets = np.fromiter((_number(table, target, i, value, comma) for i, value in enumerate(values)), np.float64)
    return TargetedTexts(strings(table, "text", text), targets, text, (target,))


def _target_column(table: Table, text_column: str | None, asked: str | None) -> str:
    columns = table.columns
    if asked is not None:
        if asked not in columns:
            raise InputError(f"{table.source} has no column {asked!r} (--label-column); it has {listed(columns)}")
        return asked
    by_lower = {name.lower(): name for name in reversed(list(columns)) if name != text_column}
    if usual := next((by_lower[name] for name in TARGET_NAMES if name in by_lower), None):
        return usual
    numeric = [name for name in columns if name != text_column and all(map(_is_number, columns[name]))]
    if len(numeric) != 1:
        raise InputError(
            f"{table.source}: cannot tell which column is the target; name it with --label-column "
            f"(columns: {listed(columns)})"
        )
    return numeric[0]


def _is_number(value: object) -> bool:
    try:
        return math.isfinite(float(str(value).strip().replace(",", ".")))
    except ValueError:
        return False


def _has_decimal_commas(table: Table, column: str) -> bool:
    """Whether a column writes 1,5 for 1.5, as a table with semicolons does.

    Raises:
        InputError: its commas may be either.
    """
    first, all_thousands, any_decimal = None, True, False
    for value in table.columns[column]:
        if "," in (text := str(value).strip()):
            first = first or text
            all_thousands = all_thousands and _THOUSANDS.fullmatch(text) is not None
            any_decimal = any_decimal or _DECIMAL_COMMA.fullmatch(text) is not None
    if first is not None and all_thousands:
        raise InputError(
            f"{table.source}: column {column!r} has numbers such as {first}, whose comma may be a decimal sign or "
            "separate thousands; write them without"
        )
    return any_decimal


def _number(table: Table, column: str, index: int, value: Any, comma: bool) -> float:
    text = str(value).strip()
    try:
        number = float(text.replace(",", ".") if comma and _DECIMAL_COMMA.fullmatch(text) else value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise InputError(
            f"{table.place(index)}: the target {text!r} in column {column!r} is no number; classes with names are for "
            "--task classification"
        )
    return number


def labelled_sets(
    table: Table, text_column: str | None = None, label_column: str | None = None, names: Sequence[str] | None = None
) -> tuple[TargetedTexts, list[str]]:
    """Texts with any number of labels each, from a column of lists or from columns of 0 and 1.

    Args:
        table: from `read_table`.
        text_column: guessed if None.
        label_column: a column with a list, or labels separated by "|", ";" or ","; or the names of several columns of 0
            and 1, separated by commas. Default: a column with a usual name, else all columns of 0 and 1.
        names: labels that there may be; None for those that there are.

    Returns:
        (texts with ones and zeros, names of the labels in their order).

    Raises:
        InputError: columns are missing or cannot be told, a cell is of another kind, a label is unknown, or there is
            one label only.

    Example:
        >>> labelled_sets(Table("d.csv", {"text": ["x", "y"], "tags": ["a|b", ""]}))[0].targets.tolist()
        [[1, 1], [0, 0]]
    """
    columns = _set_columns(table, text_column, label_column)
    first, *more = columns
    text = choose_text_column(table, text_column, first)
    if text in columns:
        raise InputError(f"{table.source}: text and label are both column {text!r}; name them apart")
    if more:
        targets, there = _of_columns(table, columns), list(columns)
        if names is not None and there != list(names):
            raise InputError(f"{table.source}: its labels are the columns {listed(there)}, in training {listed(names)}")
    else:
        sets = _sets(table, first)
        there = sorted({label for labels in sets for label in labels}) if names is None else list(names)
        targets = _of_sets(table, first, sets, there)
    if len(there) < 2:
        raise InputError(
            f"{table.source}: there is one label only ({', '.join(there) or 'none'}); --task multi-label takes several"
        )
    return TargetedTexts(strings(table, "text", text), targets, text, columns), there


def _set_columns(table: Table, text_column: str | None, asked: str | None) -> tuple[str, ...]:
    there = table.columns
    if asked is not None:
        names = (asked,) if asked in there else tuple(name.strip() for name in asked.split(","))
        if missing := [name for name in names if name not in there]:
            raise InputError(f"{table.source} has no column {listed(missing)} (--label-column); it has {listed(there)}")
        return names
    by_lower = {name.lower(): name for name in reversed(list(there)) if name != text_column}
    if usual := next((by_lower[name] for name in SET_NAMES if name in by_lower), None):
        return (usual,)
    binary = tuple(
        name for name in there if name != text_column and all(_as_bit(value) is not None for value in there[name])
    )
    if len(binary) < 2:
        raise InputError(
            f"{table.source}: cannot tell where the labels are; name a column with lists, or several of 0 and 1 "
            f"separated by commas, with --label-column (columns: {listed(there)})"
        )
    return binary


def _as_bit(value: object) -> int | None:
    text = str(value).strip().lower()
    return 1 if text in _YES else 0 if text in _NO else None


def _of_columns(table: Table, columns: Sequence[str]) -> np.ndarray:
    """Columns of 0 and 1 as bits (rows, columns)."""
    check_size(table.source, cells=len(table) * len(columns))
    bits = np.empty((len(table), len(columns)), np.uint8)
    for place, name in enumerate(columns):
        for index, value in enumerate(table.columns[name]):
            bit = _as_bit(value)
            if bit is None:
                raise InputError(f"{table.place(index)}: column {name!r} holds {str(value)!r}, expected 0 or 1")
            bits[index, place] = bit
    return bits


def _sets(table: Table, column: str) -> list[tuple[str, ...]]:
    """The labels of each row; equal rows share one tuple."""
    values = table.columns[column]
    texts = (value for value in values if isinstance(value, str) and not value.lstrip().startswith("["))
    counts = dict.fromkeys(_SEPARATORS, 0)
    for text in texts:
        for separator in _SEPARATORS:
            counts[separator] += separator in text
    separator = next((name for name in _SEPARATORS if counts[name]), None)
    known: dict[tuple[str, ...], tuple[str, ...]] = {}
    rows = []
    for index, value in enumerate(values):
        labels = tuple(sorted(set(_labels_of(table, column, index, value, separator))))
        rows.append(known.setdefault(labels, labels))
    return rows


def _labels_of(table: Table, column: str, index: int, value: object, separator: str | None) -> list[str]:
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = parse_json(value)
        except ParseError as error:
            raise InputError(f"{table.place(index)}: the labels (column {column!r}) are {error}") from None
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return []
    if isinstance(value, (dict, bytes)) or (
        isinstance(value, list) and any(isinstance(inner, (list, dict, bytes)) for inner in value)
    ):
        raise InputError(f"{table.place(index)}: the labels (column {column!r}) are no list of names")
    parts = value if isinstance(value, list) else str(value).split(separator) if separator else [value]
    return [text for part in parts if part is not None and (text := str(part).strip())]


def _of_sets(table: Table, column: str, sets: Sequence[tuple[str, ...]], names: Sequence[str]) -> np.ndarray:
    """Which of the names each set holds, as bits (rows, names)."""
    check_size(table.source, cells=len(sets) * len(names))
    place = {name: i for i, name in enumerate(names)}
    bits = np.zeros((len(sets), len(names)), np.uint8)
    for index, labels in enumerate(sets):
        for label in labels:
            if label not in place:
                raise InputError(f"{table.place(index)}: a label that the training data lacks: {label!r} ({column})")
            bits[index, place[label]] = 1
    return bits
