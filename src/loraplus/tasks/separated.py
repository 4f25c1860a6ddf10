"""Reads tables of separated values: CSV with commas, semicolons or others, and TSV with quotes or without."""

from __future__ import annotations

import csv
import io
import itertools
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from loraplus.tasks.stored import TableWriter
from loraplus.tasks.tabular import LONGEST_ROW, LineError, Table, check_header_names
from loraplus.tasks.text_files import lines_of

_NAMES = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
_TELLS = re.compile(r"sep=([,;\t|])")
_LONGEST_FIELD = 2**31 - 1  # the row's limit is that of its lines
_LOOKED_AHEAD = 2**20  # characters in which the end of a quote is looked for once a row cannot be parsed


def read_commas(source: str, path: Path, encoding: str) -> Table:
    """A CSV file. Its separator is the comma, or the one that cuts a first line without commas into columns.

    Where the comma is the decimal sign, Excel writes semicolons. A first line such as `sep=;`, which tells Excel the
    separator, tells us, too.

    Raises:
        InputError: rows of several lengths, a quote that is not closed; names the line.
    """
    delimiter = _delimiter(source, path, encoding)
    table = _Reading(source, path, encoding, delimiter, csv.QUOTE_MINIMAL).table()
    return table if delimiter == "," else replace(table, read_as=(f"separated by {_NAMES[delimiter]}",))


def _delimiter(source: str, path: Path, encoding: str) -> str:
    """The first separator that cuts the header into columns, and the line below it into as many."""
    csv.field_size_limit(_LONGEST_FIELD)
    lines = (line for line in lines_of(source, path, encoding, newline="") if line.strip())
    header, below = next(lines, ""), next(lines, "")
    if told := _TELLS.fullmatch(header.strip()):
        return told[1]
    possible = {name: count for name in _NAMES if (count := _fields(header, name)) > 1}
    agreeing = (name for name, count in possible.items() if _fields(below, name) == count)
    return next(agreeing, next(iter(possible), ","))


def _fields(line: str, delimiter: str) -> int:
    return len(next(csv.reader([line], delimiter=delimiter), []))


def read_tabs(source: str, path: Path, encoding: str) -> Table:
    """A TSV file. Some quote as CSV does, others hold bare quotation marks; the reading that gives whole rows is right.

    If both readings give whole rows, the one with more rows is right: the other took bare marks for quotes and
    swallowed line ends. If neither does, the one that got further says what is wrong.

    Raises:
        InputError: as for CSV.
    """
    readings: list[Table] = []
    errors: list[LineError] = []
    for quoting in (csv.QUOTE_MINIMAL, csv.QUOTE_NONE):
        reading = _Reading(source, path, encoding, "\t", quoting)
        try:
            readings.append(reading.table())
        except LineError as error:
            errors.append(error)
        if not reading.has_quotes:
            break
    if not readings:
        raise max(errors, key=lambda error: error.line)
    return max(readings, key=len)


class _Reading:
    """One pass over a file. Keeps the lines of the current row, to say what is wrong with it."""

    def __init__(self, source: str, path: Path, encoding: str, delimiter: str, quoting: Any) -> None:
        self._source, self._path, self._encoding = source, path, encoding
        self._delimiter, self._quoting = delimiter, quoting
        self._row: list[str] = []
        self._first = 1  # line of the row under way
        self.has_quotes = False

    def table(self) -> Table:
        csv.field_size_limit(_LONGEST_FIELD)
        lines = self._lines()
        reader = csv.reader(
            lines, delimiter=self._delimiter, quoting=self._quoting, strict=self._quoting != csv.QUOTE_NONE
        )
        header: list[str] = []
        writer = TableWriter(self._source)
        try:
            for row in reader:
                line, self._first = self._first, reader.line_num + 1
                self._row.clear()
                if not row or (not header and _TELLS.fullmatch(self._delimiter.join(row).strip())):
                    continue
                if not header:
                    header = [name.strip() for name in row]
                    _check_header(self._source, line, header, self._delimiter)
                elif len(row) != len(header):
                    many = len(row) > len(header)
                    advice = "quote fields that hold the separator" if many else "fill or remove the line"
                    raise LineError(
                        self._source, line, f"{len(row)} fields where the header has {len(header)}; {advice}"
                    )
                else:
                    writer.add(dict(zip(header, row, strict=True)), sum(map(len, row)), line)
        except csv.Error as error:
            opened = self._open_quote(lines)
            if opened:
                raise LineError(self._source, opened, "a quote is opened here and never closed") from None
            raise LineError(self._source, reader.line_num, f"cannot be parsed ({error})") from None
        return writer.table()

    def _lines(self) -> Iterator[str]:
        length = 0
        for line in lines_of(self._source, self._path, self._encoding, newline=""):
            length = length + len(line) if self._row else len(line)
            if length > LONGEST_ROW:
                raise LineError(
                    self._source,
                    self._open_quote(iter(())) or self._first,
                    f"a row of more than {LONGEST_ROW:,} characters starts here; is a quote opened and never closed?",
                )
            self.has_quotes = self.has_quotes or '"' in line
            self._row.append(line)
            yield line

    def _open_quote(self, rest: Iterator[str]) -> int | None:
        """The line of the quote that is still open at the end of the current row and of some lines behind it."""
        text = "".join(self._row)
        for line in rest:
            text += line
            if len(text) > _LOOKED_AHEAD:
                break
        return _open_quote(text, self._delimiter, self._first)


def _open_quote(text: str, delimiter: str, first: int) -> int | None:
    """The line of the quote that is open at the end of a text; `first` is the line that the text starts in."""
    opened, state = first, "start of field"
    for number, line in zip(itertools.count(first), io.StringIO(text, newline=""), strict=False):
        for char in line:
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
        kind = _NAMES[delimiter]
        raise LineError(source, line, f"the header is one column {header[0]!r}; separate columns by {kind}")
    check_header_names(source, header, line)
