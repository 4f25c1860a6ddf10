"""Reads a table from CSV, TSV, JSON Lines, Parquet, lines of text, a `datasets` folder or the hub.

Every defect of a file is one `InputError` that names the file and, where there is one, the line.
"""

from __future__ import annotations

import csv
import importlib
import io
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraplus.errors import InputError

_JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
_FILE_SUFFIXES = (*_JSON_SUFFIXES, ".csv", ".tsv", ".parquet", ".txt", ".xls", ".xlsx", ".arrow", ".gz", ".zip")
_HALF_CHARACTER = re.compile(r"\\ud[89a-f]", re.IGNORECASE)
_HUB_NAME = re.compile(r"\w[\w.-]*(/[\w.-]+)?")


class _LineError(InputError):
    """A defect in one line of a file."""

    def __init__(self, source: str, line: int, what: str) -> None:
        super().__init__(f"{source}, line {line}: {what}")
        self.line = line


@dataclass(frozen=True)
class Table:
    """Columns of equal length; `row_name(i)` says where row i stands in its source, `place(i)` names that, too."""

    source: str
    columns: dict[str, list[Any]]
    lines: list[int] | None = None

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), []))

    def row_name(self, index: int) -> str:
        """ "line 7" for text files, "row 6" otherwise."""
        return f"line {self.lines[index]}" if self.lines else f"row {index + 1}"

    def place(self, index: int) -> str:
        """ "data.csv, line 7"."""
        return f"{self.source}, {self.row_name(index)}"


def read_table(source: str, split: str = "train") -> Table:
    """Reads a file, a `datasets` folder or a hub dataset.

    Args:
        source: path ending in .csv, .tsv, .jsonl, .ndjson, .json, .parquet or .txt (a column `text`, one row a line
            that is not blank); a folder written by `Dataset.save_to_disk`; or a name on the hub.
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
    elif path.suffix.lower() in _FILE_SUFFIXES or not _HUB_NAME.fullmatch(source):
        raise InputError(f"there is no file or folder {source}")
    else:
        table = _read_hub(source, split)
    if len(table) == 0:
        raise InputError(f"{source} has no rows")
    return table


def _read_file(source: str, path: Path) -> Table:
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _read_parquet(source, path)
    if suffix not in (".csv", ".tsv", ".txt", *_JSON_SUFFIXES):
        raise InputError(
            f"{source}: unknown format {suffix or '(no extension)'}; use .csv, .tsv, .jsonl, .parquet or .txt"
        )
    text = _read_text(source, path)
    if not text.strip():
        raise InputError(f"{source} is empty")
    if suffix == ".csv":
        return _parse_separated(source, text, ",", csv.QUOTE_MINIMAL)
    if suffix == ".tsv":
        return _parse_tabs(source, text)
    if suffix == ".txt":
        # Not splitlines, which also splits at U+2028, form feeds and others.
        numbered = enumerate(io.StringIO(text, newline=None), start=1)
        lines = [(number, line.rstrip("\n")) for number, line in numbered if line.strip()]
        return Table(source, {"text": [line for _, line in lines]}, [number for number, _ in lines])
    return _parse_json(source, text)


def _require(module: str, source: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise InputError(f'{source} needs the package {module}: pip install "loraplus[cli]"') from None


def _reason(error: Exception) -> str:
    """First line of an error of another library."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _read_text(source: str, path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {source}: {error.strerror}") from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise _LineError(source, line, "not UTF-8 text; convert the file to UTF-8") from None


def _parse_tabs(source: str, text: str) -> Table:
    """Some TSV files quote as CSV does, others hold bare quotation marks; the reading that gives whole rows is right.

    Where both do, it is the one with more rows: the other took bare marks for quotes and swallowed line ends. Where
    neither does, the one that got further says what is wrong.
    """
    found: list[Table] = []
    errors: list[_LineError] = []
    for quoting in (csv.QUOTE_MINIMAL, csv.QUOTE_NONE):
        try:
            found.append(_parse_separated(source, text, "\t", quoting))
        except _LineError as error:
            errors.append(error)
    if not found:
        raise max(errors, key=lambda error: error.line)
    return max(found, key=len)


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
                _check_header(source, line, header, delimiter)
            elif len(row) != len(header):
                advice = "quote fields that hold the separator" if len(row) > len(header) else "fill or remove the line"
                raise _LineError(source, line, f"{len(row)} fields where the header has {len(header)}; {advice}")
            else:
                rows.append(row)
                lines.append(line)
    except csv.Error as error:
        opened = _open_quote(text, delimiter, start)
        if opened:
            raise _LineError(source, opened, "a quote is opened here and never closed") from None
        raise _LineError(source, reader.line_num, f"cannot be parsed ({error})") from None
    return Table(source, {name: [row[i] for row in rows] for i, name in enumerate(header)}, lines)


def _open_quote(text: str, delimiter: str, first: int) -> int | None:
    """The line of the quote that is still open at the end of the text; `first` is where its row starts."""
    opened, state = first, "start of field"
    for number, line in enumerate(io.StringIO(text, newline=""), start=1):
        for char in line if number >= first else "":
            if state == "quoted":
                state = "quote closed" if char == '"' else state
            elif char == '"' and state in ("start of field", "quote closed"):  # the second: a doubled quote
                opened = number if state == "start of field" else opened
                state = "quoted"
            else:
                state = "start of field" if char in (delimiter, "\r", "\n") else "unquoted"
    return opened if state == "quoted" else None


def _check_header(source: str, line: int, header: list[str], delimiter: str) -> None:
    if len(header) == 1 and re.search(r"[;,\t]\S", header[0]):
        kind = "commas" if delimiter == "," else "tabs"
        raise _LineError(source, line, f"the header is one column {header[0]!r}; separate columns by {kind}")
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise InputError(f"{source}: the header has {', '.join(map(repr, twice))} more than once")


def _parse_json(source: str, text: str) -> Table:
    """One object a line, or one array of objects."""
    if text.lstrip().startswith("["):
        rows = [(0, value) for value in _load_json(source, 1, text)]
    else:
        lines = enumerate(text.split("\n"), start=1)
        rows = [(number, _load_json(source, number, line)) for number, line in lines if line.strip()]
    halves = _HALF_CHARACTER.search(text) is not None
    for index, (number, value) in enumerate(rows, start=1):
        where = f"line {number}" if number else f"row {index}"
        if halves and not _is_unicode(json.dumps(value, ensure_ascii=False)):
            raise InputError(f"{source}, {where}: half of a surrogate pair (\\ud…), which is no character; remove it")
        if not isinstance(value, dict):
            raise InputError(f'{source}, {where}: expected an object like {{"text": …, "label": …}}')
    names = dict.fromkeys(name for _, value in rows for name in value)
    columns = {name: [value.get(name) for _, value in rows] for name in names}
    return Table(source, columns, [number for number, _ in rows] if rows and rows[0][0] else None)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _load_json(source: str, line: int, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise _LineError(source, line + error.lineno - 1, f"not valid JSON ({error.msg})") from None
    except (ValueError, RecursionError):
        raise _LineError(source, line, "JSON that is nested too deeply or holds too long a number") from None


def _read_parquet(source: str, path: Path) -> Table:
    parquet = _require("pyarrow.parquet", source)
    try:
        return Table(source, parquet.read_table(path).to_pydict())
    except Exception as error:  # Arrow raises many kinds; each means that the file cannot be used
        raise InputError(f"{source} cannot be read as Parquet ({_reason(error)})") from None


def _read_datasets_folder(source: str, path: Path, split: str) -> Table:
    if not any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
        raise InputError(f"{source} is a folder, but not one that `datasets` saved (save_to_disk)")
    datasets = _require("datasets", source)
    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:  # a damaged folder fails in as many ways as it has files
        raise InputError(f"{source} cannot be loaded as a datasets folder ({_reason(error)})") from None
    return _from_dataset(source, loaded, split)


def _read_hub(source: str, split: str) -> Table:
    datasets = _require("datasets", source)
    try:
        loaded = datasets.load_dataset(source)
    except Exception as error:  # the hub client raises many kinds; each means that the data is not to be had
        raise InputError(
            f"there is no file {source}, and the hub did not give a dataset of that name ({_reason(error)})"
        ) from None
    return _from_dataset(source, loaded, split)


def _from_dataset(source: str, loaded: Any, split: str) -> Table:
    datasets = _require("datasets", source)
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise InputError(f"{source} has no split {split!r}; it has {', '.join(map(str, loaded))}")
        loaded = loaded[split]
    columns = {name: list(loaded[name]) for name in loaded.column_names}
    for name, feature in loaded.features.items():
        if isinstance(feature, datasets.ClassLabel):
            columns[name] = [None if value is None or value < 0 else feature.int2str(value) for value in columns[name]]
    return Table(source, columns)
