"""Reads a table from CSV, TSV, JSON Lines, Parquet, lines of text, a `datasets` folder or the hub.

Every defect of a file is one `InputError` that names the file and, where there is one, the line. What a file may hold
is limited, so that a damaged or hostile one is refused before it fills the memory.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from loraplus.errors import InputError
from loraplus.files.paths import is_file, is_folder, user_path
from loraplus.tasks.columnar import check_datasets_folder, read_datasets_folder, read_hub, read_parquet
from loraplus.tasks.separated import read_commas, read_tabs
from loraplus.tasks.tabular import Table, check_size
from loraplus.tasks.text_files import check_not_blank, read_json_rows, read_lines

__all__ = ["Table", "check_source", "read_table"]

_READERS: dict[str, Callable[[str, Path], Table]] = {
    ".csv": read_commas,
    ".tsv": read_tabs,
    ".txt": read_lines,
    ".parquet": read_parquet,
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), read_json_rows),
}
_FILE_SUFFIXES = (*_READERS, ".xls", ".xlsx", ".arrow", ".gz", ".zip")
"""Names that end so are files', not a hub dataset's."""
_HUB_NAME = re.compile(r"\w[\w.-]*(/[\w.-]+)?")


def read_table(source: str, split: str = "train") -> Table:
    """Reads a file, a `datasets` folder or a hub dataset.

    Args:
        source: path ending in .csv, .tsv, .jsonl, .ndjson, .json, .parquet or .txt (a column `text`, one row a line
            that is not blank); a folder written by `Dataset.save_to_disk`; or a name on the hub.
        split: of a `datasets` folder or hub dataset that has several.

    Returns:
        The table, with at least one row.

    Raises:
        InputError: missing, empty, not UTF-8, a line that cannot be parsed (with its number), unknown format, or more
            than `LONGEST_ROW`, `MOST_ROWS`, `MOST_CELLS` or `MOST_BYTES`.

    Example:
        >>> read_table("reviews.csv").columns.keys()  # doctest: +SKIP
        dict_keys(['text', 'label'])
    """
    check_source(source)
    path = user_path(source)
    if is_folder(path):
        table = read_datasets_folder(source, path, split)
    elif is_file(path):
        table = _READERS[path.suffix.lower()](source, path)
    else:
        table = read_hub(source, split)
    if len(table) == 0:
        raise InputError(f"{source} has no rows")
    return table


def check_source(source: str) -> None:
    """Checks what can be said of a file or folder without reading it. Hub names are not looked for.

    Raises:
        InputError: it is missing, empty, too large or of an unknown format.
    """
    path = user_path(source)
    if is_folder(path):
        check_datasets_folder(source, path)
    elif is_file(path):
        suffix = path.suffix.lower()
        if suffix not in _READERS:
            raise InputError(
                f"{source}: unknown format {suffix or '(no extension)'}; use .csv, .tsv, .jsonl, .parquet or .txt"
            )
        check_size(source, size=path.stat().st_size)
        if suffix != ".parquet":
            check_not_blank(source, path)
    elif path.suffix.lower() in _FILE_SUFFIXES or not _HUB_NAME.fullmatch(source):
        raise InputError(f"there is no file or folder {source}")
