"""What every reader makes, a table, and the limits that all of them keep."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from loraplus.errors import InputError

LONGEST_ROW = 2**24
"""Characters of a row of a text file."""
MOST_ROWS = 10_000_000
MOST_CELLS = 100_000_000
MOST_BYTES = 2**32
"""Bytes of a file, packed and unpacked."""
GUESSED = ", guessed"
"""The end of `Table.read_as` where the reading is a guess."""


class LineError(InputError):
    """A defect in one line of a file."""

    def __init__(self, source: str, line: int, what: str) -> None:
        super().__init__(f"{source}, line {line}: {what}")
        self.line = line


@dataclass(frozen=True)
class Table:
    """Columns of equal length, read when they are looked at.

    `row_name(i)` says where row i stands in its source, `place(i)` names that, too. `read_as` says how the source was
    understood, where that had to be found out: its separator, its encoding. `lines` and `numbers` say where each row
    stands in a text file, or among the rows of the whole table if these are some of them.
    """

    source: str
    columns: Mapping[str, Sequence[Any]]
    lines: Sequence[int] | None = None
    read_as: tuple[str, ...] = ()
    numbers: Sequence[int] | None = None

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), []))

    def row_name(self, index: int) -> str:
        """ "line 7" for text files, "row 6" otherwise."""
        if self.lines:
            return f"line {self.lines[index]}"
        return f"row {self.numbers[index] if self.numbers else index + 1}"

    def take(self, rows: Sequence[int]) -> Table:
        """Some of the rows, each still knowing where it stands."""
        columns = {name: [values[row] for row in rows] for name, values in self.columns.items()}
        lines = [self.lines[row] for row in rows] if self.lines else None
        return replace(self, columns=columns, lines=lines, numbers=[row + 1 for row in rows])

    def place(self, index: int) -> str:
        """ "data.csv, line 7"."""
        return f"{self.source}, {self.row_name(index)}"


def check_header_names(source: str, header: Sequence[str], line: int = 1) -> None:
    """Refuses names of columns that are missing or stand there twice.

    Args:
        source: name of the table.
        header: the names.
        line: that they stand in.

    Raises:
        InputError: names what is wrong.
    """
    if twice := sorted(name for name, count in Counter(header).items() if count > 1 and name):
        raise InputError(f"{source}: the header has {', '.join(map(repr, twice))} more than once")
    if header.count("") > 1:
        raise LineError(source, line, f"{header.count('')} columns have no name; name each column in the first row")


def check_size(source: str, rows: int = 0, cells: int = 0, size: int = 0) -> None:
    """Refuses a table that is too large.

    Args:
        source: name of the table.
        rows: read so far, or told by the file.
        cells: of all its columns, likewise; a list counts as many as it holds.
        size: in bytes, likewise.

    Raises:
        InputError: more than `MOST_ROWS`, `MOST_CELLS` or `MOST_BYTES`.
    """
    for count, most, what in (
        (rows, MOST_ROWS, "rows"),
        (cells, MOST_CELLS, "cells"),
        (size, MOST_BYTES, "bytes"),
    ):
        if count > most:
            raise InputError(f"{source} holds more than {most:,} {what}; take a part of it")
