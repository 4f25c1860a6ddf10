"""Reads labelled text from CSV, TSV, JSON Lines, Parquet, a `datasets` folder or the hub.

Every defect of a file is one `InputError` that names the file and, where there is one, the line.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraplus.errors import InputError

TEXT_NAMES = ("text", "sentence", "review", "content", "document", "comment", "tweet", "body", "message", "snippet")
LABEL_NAMES = ("label", "labels", "class", "category", "target", "sentiment", "y")
_MOST_CLASSES_GUESSED = 100


@dataclass(frozen=True)
class Table:
    """Columns of equal length; `row_name(i)` says where row i stands in its source."""

    source: str
    columns: dict[str, list[Any]]
    lines: list[int] | None = None

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), []))

    def row_name(self, index: int) -> str:
        """ "line 7" for text files, "row 6" otherwise."""
        return f"line {self.lines[index]}" if self.lines else f"row {index + 1}"


@dataclass(frozen=True)
class Examples:
    """Texts and their labels as strings."""

    texts: list[str]
    labels: list[str]
    text_column: str
    label_column: str


def read_table(source: str, split: str = "train") -> Table:
    """Reads a file, a `datasets` folder or a hub dataset.

    Args:
        source: path ending in .csv, .tsv, .jsonl, .ndjson, .json or .parquet; a folder written by
            `Dataset.save_to_disk`; or a name on the hub.
        split: of a `datasets` folder or hub dataset that has several.

    Returns:
        The table, with at least one row.

    Raises:
        InputError: missing, empty, not UTF-8, a line that cannot be parsed (with its number), unknown format.

    Example:
        >>> read_table("reviews.csv").columns.keys()  # doctest: +SKIP
        dict_keys(['text', 'label'])
    """
    path = Path(source).expanduser()
    if path.is_dir():
        table = _read_datasets_folder(source, path, split)
    elif path.is_file():
        table = _read_file(source, path)
    elif path.suffix or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise InputError(f"there is no file or folder {source}")
    else:
        table = _read_hub(source, split)
    if len(table) == 0:
        raise InputError(f"{source} has no rows")
    return table


def _read_file(source: str, path: Path) -> Table:
    readers = {".jsonl": _read_json_lines, ".ndjson": _read_json_lines, ".json": _read_json_lines}
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _read_parquet(source, path)
    if suffix not in (".csv", ".tsv", *readers):
        raise InputError(f"{source}: unknown format {suffix or '(no extension)'}; use .csv, .tsv, .jsonl or .parquet")
    text = _read_text(source, path)
    if not text.strip():
        raise InputError(f"{source} is empty")
    if suffix == ".csv":
        return _parse_separated(source, text, ",", csv.QUOTE_MINIMAL)
    if suffix == ".tsv":
        # Some TSV files quote as CSV does, others hold bare quotation marks; the one that gives whole rows is right.
        try:
            return _parse_separated(source, text, "\t", csv.QUOTE_MINIMAL)
        except InputError:
            return _parse_separated(source, text, "\t", csv.QUOTE_NONE)
    return readers[suffix](source, text)


def _read_text(source: str, path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {source}: {error.strerror}") from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise InputError(f"{source}, line {line}: not UTF-8 text; convert the file to UTF-8") from None


def _parse_separated(source: str, text: str, delimiter: str, quoting: Any) -> Table:
    csv.field_size_limit(2**31 - 1)
    strict = quoting != csv.QUOTE_NONE
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting, strict=strict)
    header: list[str] = []
    rows: list[list[str]] = []
    lines: list[int] = []
    start = 1
    try:
        for row in reader:
            line, start = start, reader.line_num + 1
            if not row:
                continue
            if not header:
                header = [name.strip() for name in row]
                _check_header(source, header)
            elif len(row) != len(header):
                raise InputError(
                    f"{source}, line {line}: {len(row)} fields where the header has {len(header)}; "
                    "quote fields that hold the separator"
                )
            else:
                rows.append(row)
                lines.append(line)
    except csv.Error as error:
        raise InputError(f"{source}, line {start}: cannot be parsed ({error})") from None
    return Table(source, {name: [row[i] for row in rows] for i, name in enumerate(header)}, lines)


def _check_header(source: str, header: list[str]) -> None:
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise InputError(f"{source}: the header has {', '.join(map(repr, twice))} more than once")


def _read_json_lines(source: str, text: str) -> Table:
    objects: list[tuple[int, dict[str, Any]]] = []
    if text.lstrip().startswith("["):
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise InputError(f"{source}, line {error.lineno}: not valid JSON ({error.msg})") from None
        lines: Iterable[tuple[int, Any]] = ((0, value) for value in values)
    else:
        lines = _parse_lines(source, text)
    for number, value in lines:
        if not isinstance(value, dict):
            where = f", line {number}" if number else ""
            raise InputError(f'{source}{where}: expected an object like {{"text": …, "label": …}}')
        objects.append((number, value))
    names = dict.fromkeys(name for _, value in objects for name in value)
    columns = {name: [value.get(name) for _, value in objects] for name in names}
    return Table(source, columns, [number for number, _ in objects] if objects and objects[0][0] else None)


def _parse_lines(source: str, text: str) -> Iterable[tuple[int, Any]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(f"{source}, line {number}: not valid JSON ({error.msg})") from None


def _read_parquet(source: str, path: Path) -> Table:
    import pyarrow
    from pyarrow import parquet

    try:
        return Table(source, parquet.read_table(path).to_pydict())
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{source} cannot be read as Parquet ({str(error).splitlines()[0]})") from None


def _read_datasets_folder(source: str, path: Path, split: str) -> Table:
    import datasets

    if not any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
        raise InputError(f"{source} is a folder, but not one that `datasets` saved (save_to_disk)")
    try:
        loaded = datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise InputError(f"{source} cannot be loaded as a datasets folder ({str(error).splitlines()[0]})") from None
    return _from_dataset(source, loaded, split)


def _read_hub(source: str, split: str) -> Table:
    import datasets

    try:
        loaded = datasets.load_dataset(source)
    except Exception as error:  # the hub client raises many kinds; each means that the data is not to be had
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"there is no file {source}, and the hub did not give a dataset of that name ({reason})"
        ) from None
    return _from_dataset(source, loaded, split)


def _from_dataset(source: str, loaded: Any, split: str) -> Table:
    import datasets

    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise InputError(f"{source} has no split {split!r}; it has {', '.join(map(str, loaded))}")
        loaded = loaded[split]
    columns = {name: list(loaded[name]) for name in loaded.column_names}
    for name, feature in loaded.features.items():
        if isinstance(feature, datasets.ClassLabel):
            columns[name] = [None if value is None or value < 0 else feature.int2str(value) for value in columns[name]]
    return Table(source, columns)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names)) or "no columns"


def _named(table: Table, column: str | None, kind: str, usual: tuple[str, ...]) -> str | None:
    if column is not None:
        if column not in table.columns:
            raise InputError(
                f"{table.source} has no column {column!r} (--{kind}-column); it has {_listed(table.columns)}"
            )
        return column
    by_lower = {name.lower(): name for name in reversed(table.columns)}
    return next((by_lower[name] for name in usual if name in by_lower), None)


def choose_text_column(table: Table, text_column: str | None = None, label_column: str | None = None) -> str:
    """The column with the text: the one named, else a usual name, else the longest strings.

    Raises:
        InputError: the named column is missing, or none holds text.
    """
    found = _named(table, text_column, "text", TEXT_NAMES)
    if found is not None:
        return found
    lengths = {
        name: sum(len(value) for value in values) / len(values)
        for name, values in table.columns.items()
        if name != label_column and values and all(isinstance(value, str) for value in values)
    }
    if not lengths:
        raise InputError(f"{table.source}: no column holds text; name it with --text-column ({_listed(table.columns)})")
    return max(lengths, key=lambda name: lengths[name])


def choose_columns(table: Table, text_column: str | None = None, label_column: str | None = None) -> tuple[str, str]:
    """(text column, label column), guessed where not named.

    Raises:
        InputError: a named column is missing, or the guess would be ambiguous.
    """
    label = _named(table, label_column, "label", LABEL_NAMES)
    text = choose_text_column(table, text_column, label)
    if label is None:
        few = [
            name
            for name, values in table.columns.items()
            if name != text and 2 <= len({str(v) for v in values}) <= min(_MOST_CLASSES_GUESSED, len(values) // 2)
        ]
        if len(few) != 1:
            raise InputError(
                f"{table.source}: cannot tell which column is the label; name it with --label-column "
                f"(columns: {_listed(table.columns)})"
            )
        label = few[0]
    if text == label:
        raise InputError(f"{table.source}: text and label are both column {text!r}; name them apart")
    return text, label


def _label(value: Any) -> str | None:
    """A label as a string; None where it is missing. Raises ValueError for a fraction."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, float):
        if not value.is_integer():
            raise ValueError(value)
        value = int(value)
    return str(value).strip() or None


def examples(table: Table, text_column: str | None = None, label_column: str | None = None) -> Examples:
    """Texts and labels of a table, checked.

    Args:
        table: from `read_table`.
        text_column: guessed if None.
        label_column: guessed if None.

    Returns:
        One text and one label a row; labels as strings ("1" for 1 and 1.0).

    Raises:
        InputError: a column is missing, texts or labels are missing in some rows, or there is one class only.
    """
    text_column, label_column = choose_columns(table, text_column, label_column)
    labels: list[str | None] = []
    for index, value in enumerate(table.columns[label_column]):
        try:
            labels.append(_label(value))
        except ValueError:
            raise InputError(
                f"{table.source}, {table.row_name(index)}: label {value!r} in column {label_column!r} is a fraction; "
                "classification needs classes"
            ) from None
    texts = [str(value) if value is not None else "" for value in table.columns[text_column]]
    _check_complete(table, "label", label_column, [label is None for label in labels])
    _check_complete(table, "text", text_column, [not text.strip() for text in texts])
    complete = [label for label in labels if label is not None]
    if len(set(complete)) < 2:
        raise InputError(
            f"{table.source}: column {label_column!r} has one class only ({complete[0]!r}); classification needs two"
        )
    return Examples(texts, complete, text_column, label_column)


def _check_complete(table: Table, kind: str, column: str, missing: list[bool]) -> None:
    if any(missing):
        raise InputError(
            f"{table.source}: the {kind} (column {column!r}) is missing in {sum(missing)} of {len(missing)} rows, "
            f"first in {table.row_name(missing.index(True))}; fill or remove them"
        )


def label_names(labels: Iterable[str]) -> list[str]:
    """The distinct labels: by number if all are whole numbers, else by alphabet.

    Example:
        >>> label_names(["10", "9", "10"])
        ['9', '10']
    """
    distinct = set(labels)
    try:
        return sorted(distinct, key=int)
    except ValueError:
        return sorted(distinct)
