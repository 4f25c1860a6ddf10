"""Reads a table from CSV, TSV, JSON Lines, Excel, Parquet, lines or files of text, a `datasets` folder or the hub.

Every defect of a file is one `InputError` that names the file and, where there is one, the line. What a file may hold
is limited, so that a damaged or hostile one is refused before it fills the memory.
"""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from loraplus.errors import InputError
from loraplus.files.paths import is_file, is_folder, user_path
from loraplus.tasks.class_folders import has_class_folders, read_class_folders
from loraplus.tasks.columnar import is_saved_dataset, read_datasets_folder, read_hub, read_parquet
from loraplus.tasks.encodings import MARKS, UTF_8, encoding_of
from loraplus.tasks.separated import read_commas, read_tabs
from loraplus.tasks.tabular import GUESSED, Table, check_size
from loraplus.tasks.text_files import check_not_blank, read_json_rows, read_lines
from loraplus.tasks.unpacked import PACKED, plain_name, unpacked
from loraplus.tasks.workbook import read_workbook

__all__ = ["Table", "check_source", "read_table"]

_OF_TEXT: dict[str, Callable[[str, Path, str], Table]] = {
    ".csv": read_commas,
    ".tsv": read_tabs,
    ".txt": read_lines,
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), read_json_rows),
}
_OF_BYTES: dict[str, Callable[[str, Path], Table]] = {".parquet": read_parquet, ".xlsx": read_workbook}
_FILE_SUFFIXES = (*_OF_TEXT, *_OF_BYTES, ".xls", ".arrow", PACKED, ".zip")
"""Names that end so are files', not a hub dataset's."""
_HUB_NAME = re.compile(r"\w[\w.-]*(/[\w.-]+)?")


def read_table(source: str, split: str = "train", encoding: str | None = None) -> Table:
    """Reads a file, a folder or a hub dataset.

    Args:
        source: path ending in .csv, .tsv, .jsonl, .ndjson, .json, .xlsx, .parquet or .txt (a column `text`, one row a
            line that is not blank), or in one of these and .gz; a folder written by `Dataset.save_to_disk`, or with
            texts by class (FOLDER/CLASS/*.txt, columns `text` and `label`); or a name on the hub.
        split: of a `datasets` folder or hub dataset that has several.
        encoding: of text. Default: as `encoding_of` finds it.

    Returns:
        The table, with at least one row.

    Raises:
        InputError: missing, empty, in no encoding that can be told, a line that cannot be parsed (with its number),
            unknown format, or more than `LONGEST_ROW`, `MOST_ROWS`, `MOST_CELLS` or `MOST_BYTES`.

    Example:
        >>> read_table("reviews.csv").columns.keys()  # doctest: +SKIP
        dict_keys(['text', 'label'])
    """
    check_source(source)
    path = user_path(source)
    if is_folder(path):
        by_class = not is_saved_dataset(path) and has_class_folders(path)
        table = read_class_folders(source, path, encoding) if by_class else read_datasets_folder(source, path, split)
    elif is_file(path):
        with unpacked(source, path) as plain:
            table = _read_file(source, plain, encoding)
    else:
        table = read_hub(source, split)
    if len(table) == 0:
        raise InputError(f"{source} has no rows")
    return table


def _read_file(source: str, path: Path, asked: str | None) -> Table:
    suffix = path.suffix.lower()
    if suffix in _OF_BYTES:
        return _OF_BYTES[suffix](source, path)
    encoding = encoding_of(source, path, asked)
    table = _OF_TEXT[suffix](source, path, encoding)
    if encoding == UTF_8:
        return table
    guessed = asked is None and encoding not in MARKS.values()
    return replace(table, read_as=(*table.read_as, encoding + GUESSED if guessed else encoding))


def check_source(source: str) -> None:
    """Checks what can be said of a file or folder without reading it. Hub names are not looked for.

    Raises:
        InputError: it is missing, empty, too large or of an unknown format.
    """
    path = user_path(source)
    if is_folder(path):
        if not is_saved_dataset(path) and not has_class_folders(path):
            raise InputError(
                f"{source} is a folder, but not one that `datasets` saved (save_to_disk), nor one of texts by class "
                "(FOLDER/CLASS/*.txt)"
            )
    elif is_file(path):
        plain = plain_name(path)
        suffix = plain.suffix.lower()
        if suffix not in (*_OF_TEXT, *_OF_BYTES):
            raise InputError(
                f"{source}: unknown format {suffix or '(no extension)'}; use .csv, .tsv, .jsonl, .xlsx, .parquet or "
                ".txt"
            )
        check_size(source, size=path.stat().st_size)
        if suffix in _OF_TEXT:
            opener: Any = open if plain == path else gzip.open
            try:
                with opener(path, "rb") as file:
                    check_not_blank(source, file)
            except OSError as error:
                raise InputError(f"cannot read {source}: {error.strerror or error}") from None
            except (EOFError, zlib.error):
                raise InputError(f"{source} cannot be unpacked; it is damaged") from None
    elif path.suffix.lower() in _FILE_SUFFIXES or not _HUB_NAME.fullmatch(source):
        raise InputError(f"there is no file or folder {source}")
