"""Reads Excel's workbooks (.xlsx) row by row, through openpyxl."""

from __future__ import annotations

import importlib
import logging
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from loraplus.errors import InputError
from loraplus.tasks.stored import TableWriter
from loraplus.tasks.tabular import LONGEST_ROW, Table, check_header_names, check_size

_LOG = logging.getLogger(__name__)
_LARGEST_PART = 2**29
"""Bytes of a part of the archive: openpyxl keeps the texts of a workbook in memory."""
_SIMPLE = (str, bool, int, float)


def read_workbook(source: str, path: Path) -> Table:
    """The first sheet of a workbook that holds anything; its first row names the columns, empty rows are passed over.

    Raises:
        InputError: openpyxl is not installed, the file is damaged or unpacks to too much, a name is missing or stands
            there twice, a row has more cells than there are names.
    """
    try:
        openpyxl: Any = importlib.import_module("openpyxl")
    except ImportError:
        raise InputError(
            f'{source} needs the package openpyxl: pip install "loraplus[cli]"; or save the sheet as CSV'
        ) from None
    _check_archive(source, path)
    try:
        workbook = openpyxl.load_workbook(path, read_only=True, data_only=True)
        try:
            return _first_table(source, workbook.worksheets)
        finally:
            workbook.close()
    except InputError:
        raise
    except Exception as error:  # a damaged workbook fails in as many ways as it has parts
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise InputError(f"{source} cannot be read as an Excel workbook ({reason})") from None


def _check_archive(source: str, path: Path) -> None:
    """Refuses what unpacks to too much before it is unpacked."""
    try:
        with zipfile.ZipFile(path) as archive:
            sizes = [member.file_size for member in archive.infolist()]
    except (zipfile.BadZipFile, NotImplementedError):
        raise InputError(f"{source} cannot be read as an Excel workbook (it is damaged, or of another kind)") from None
    check_size(source, size=sum(sizes))
    if max(sizes, default=0) > _LARGEST_PART:
        raise InputError(f"{source} unpacks to more than {_LARGEST_PART:,} bytes in one part; save the sheet as CSV")


def _first_table(source: str, sheets: Sequence[Any]) -> Table:
    for sheet in sheets:
        table = _table(source, sheet.iter_rows(values_only=True))
        if table is not None:
            if len(sheets) > 1:
                _LOG.info("%s has %d sheets; %r is read", source, len(sheets), sheet.title)
            return table
    raise InputError(f"{source} has no rows")


def _table(source: str, rows: Iterable[Sequence[Any]]) -> Table | None:
    """The rows of a sheet; None if they are all empty."""
    writer = TableWriter(source)
    header: list[str] = []
    for number, cells in enumerate(rows, start=1):
        values = [_value(cell) for cell in cells]
        while values and values[-1] in (None, ""):
            values.pop()
        if not values:
            continue
        if not header:
            header = ["" if value is None else str(value).strip() for value in values]
            check_header_names(source, header)
            continue
        if len(values) > len(header):
            raise InputError(f"{source}, line {number}: {len(values)} cells where the header has {len(header)}")
        characters = sum(len(value) for value in values if isinstance(value, str))
        if characters > LONGEST_ROW:
            raise InputError(f"{source}, line {number}: longer than {LONGEST_ROW:,} characters")
        values += [None] * (len(header) - len(values))
        writer.add(dict(zip(header, values, strict=True)), characters, number)
    return writer.table() if header else None


def _value(cell: object) -> Any:
    """A cell as JSON has it: dates and times become text."""
    return cell if cell is None or isinstance(cell, _SIMPLE) else str(cell)
