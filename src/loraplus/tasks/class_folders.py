"""Reads texts that are sorted into folders by their class: FOLDER/CLASS/*.txt, one text a file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from loraplus.errors import InputError
from loraplus.files.paths import is_file
from loraplus.tasks.encodings import encoding_of
from loraplus.tasks.stored import TableWriter
from loraplus.tasks.tabular import LONGEST_ROW, Table, check_size

_PATTERN = "*.txt"


def has_class_folders(path: Path) -> bool:
    """Whether there are texts one folder down."""
    return next(_classes(path), None) is not None


def _classes(path: Path) -> Iterator[Path]:
    for folder in sorted(path.iterdir()):
        if folder.is_dir() and not folder.name.startswith(".") and next(folder.glob(_PATTERN), None) is not None:
            yield folder


def read_class_folders(source: str, path: Path, encoding: str | None = None) -> Table:
    """Columns `text` and `label`, one row a file, by the names of classes and files.

    Raises:
        InputError: a file is empty, too long or in an encoding that cannot be told; names the file.
    """
    writer = TableWriter(source)
    size = 0
    for folder in _classes(path):
        for file in filter(is_file, sorted(folder.glob(_PATTERN))):  # a pipe would never end
            name = f"{source.rstrip('/')}/{folder.name}/{file.name}"
            size += file.stat().st_size
            check_size(source, size=size)
            text = _text(name, file, encoding)
            writer.add({"text": text, "label": folder.name}, len(text))
    return writer.table()


def _text(name: str, file: Path, encoding: str | None) -> str:
    try:
        with file.open(encoding=encoding_of(name, file, encoding)) as opened:
            text = opened.read(LONGEST_ROW + 1)
    except OSError as error:
        raise InputError(f"cannot read {name}: {error.strerror}") from None
    except UnicodeError as error:
        raise InputError(
            f"{name} is not {getattr(error, 'encoding', encoding)} text; --encoding names another"
        ) from None
    if len(text) > LONGEST_ROW:
        raise InputError(f"{name}: longer than {LONGEST_ROW:,} characters; break it into several")
    if not text.strip():
        raise InputError(f"{name} is empty; fill or remove it")
    return text
