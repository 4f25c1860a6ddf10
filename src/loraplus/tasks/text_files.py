"""Rows of text files, one line at a time and of limited length: JSON objects or plain lines."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from loraplus.errors import InputError
from loraplus.files.parsing import ParseError, parse_json, values_in
from loraplus.tasks.encodings import MARKS, UTF_8, line_of_bad_byte
from loraplus.tasks.progress_log import ProgressLog
from loraplus.tasks.stored import TableWriter
from loraplus.tasks.tabular import LONGEST_ROW, LineError, Table, check_size

_LARGEST_ARRAY = 2**28
_CHUNK = 2**20
_TELL_EVERY = 10_000
_HALF_CHARACTER = re.compile(r"\\ud[89a-f]", re.IGNORECASE)


def check_not_blank(source: str, file: BinaryIO) -> None:
    """Makes sure that there is something in a file.

    Args:
        source: name of the file, for messages.
        file: opened, at its beginning.

    Raises:
        InputError: there is not, or it cannot be read.
    """
    try:
        start = file.read(_CHUNK)
        for mark in MARKS:
            start = start.removeprefix(mark)
        while not start.strip():
            start = file.read(_CHUNK)
            if not start:
                raise InputError(f"{source} is empty")
    except OSError as error:
        raise InputError(f"cannot read {source}: {error.strerror or error}") from None


def lines_of(source: str, path: Path, encoding: str, *, newline: str | None) -> Iterator[str]:
    """The lines of a file with their ends, without a byte order mark.

    Args:
        source: name of the file, for messages.
        path: of the file.
        encoding: from `encoding_of`.
        newline: as in `open`: which characters end a line.

    Raises:
        LineError: of another encoding, or a line of more than `LONGEST_ROW` characters.
    """
    progress = ProgressLog(f"reading {source}, lines")
    with _opened(source, path, encoding, newline) as file:
        for number in itertools.count(1):
            line = file.readline(LONGEST_ROW + 1)
            if len(line) > LONGEST_ROW:
                raise LineError(source, number, f"longer than {LONGEST_ROW:,} characters; break it into rows")
            if number % _TELL_EVERY == 0:
                progress.advance(_TELL_EVERY)
            if not line:
                return
            yield line


@contextmanager
def _opened(source: str, path: Path, encoding: str, newline: str | None) -> Iterator[TextIO]:
    try:
        with path.open(encoding=encoding, newline=newline) as file:
            yield file
    except OSError as error:
        raise InputError(f"cannot read {source}: {error.strerror}") from None
    except UnicodeError:
        if encoding == UTF_8 and (line := line_of_bad_byte(path)):
            raise LineError(source, line, "not UTF-8 text; convert the file to UTF-8, or name its --encoding") from None
        raise InputError(f"{source} is not {encoding} text; name its encoding with --encoding") from None


def read_lines(source: str, path: Path, encoding: str) -> Table:
    """One row a line that is not blank, in a column `text`."""
    writer = TableWriter(source)
    # Not splitlines, which also splits at U+2028, form feeds and others.
    for number, line in enumerate(lines_of(source, path, encoding, newline=None), start=1):
        if line.strip():
            writer.add({"text": line.rstrip("\n")}, len(line), number)
    return writer.table()


def read_json_rows(source: str, path: Path, encoding: str) -> Table:
    """One object a line, or one array of objects."""
    writer = TableWriter(source)
    if _first_character(source, path, encoding) == "[":
        for number, value in enumerate(_array(source, path, encoding), start=1):
            writer.add(_row(source, f"row {number}", value), 0)
    else:
        for number, line, value in _objects(source, path, encoding):
            writer.add(_row(source, f"line {number}", value), len(line), number)
    return writer.table()


def _first_character(source: str, path: Path, encoding: str) -> str:
    """The first that is not white space."""
    with _opened(source, path, encoding, None) as file:
        while chunk := file.read(_CHUNK):
            if chunk := chunk.lstrip():
                return chunk[0]
    return ""


def _row(source: str, place: str, value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f'{source}, {place}: expected an object like {{"text": …, "label": …}}')
    return value


def _array(source: str, path: Path, encoding: str) -> list[Any]:
    if path.stat().st_size > _LARGEST_ARRAY:
        raise InputError(f"{source} is one JSON array of more than {_LARGEST_ARRAY:,} bytes; write one object a line")
    with _opened(source, path, encoding, "\n") as file:
        text = file.read()
    rows = _value(source, 1, text)
    _check_characters(source, text, rows)
    return rows


def _objects(source: str, path: Path, encoding: str) -> Iterator[tuple[int, str, Any]]:
    inside = 0
    for number, line in enumerate(lines_of(source, path, encoding, newline="\n"), start=1):
        if line.strip():
            inside += values_in(line)
            check_size(source, cells=inside)
            value = _value(source, number, line.rstrip("\n"))
            _check_characters(f"{source}, line {number}", line, value)
            yield number, line, value


def _value(source: str, line: int, text: str) -> Any:
    try:
        return parse_json(text)
    except ParseError as error:
        raise LineError(source, line + (error.line or 1) - 1, str(error)) from None


def _check_characters(where: str, text: str, value: object) -> None:
    if _HALF_CHARACTER.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise InputError(f"{where}: half of a surrogate pair (\\ud…), which is no character; remove it") from None
