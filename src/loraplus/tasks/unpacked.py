"""Files that are packed with gzip, unpacked to a temporary one within the limits of a table."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loraplus.errors import InputError
from loraplus.files.scratch import scratch_folder
from loraplus.tasks.tabular import check_size

PACKED = ".gz"
_CHUNK = 2**20


def plain_name(path: Path) -> Path:
    """A file's name without the ending that says that it is packed."""
    return path.with_suffix("") if path.suffix.lower() == PACKED else path


@contextmanager
def unpacked(source: str, path: Path) -> Iterator[Path]:
    """The file itself, or a temporary copy of what is packed in it.

    Raises:
        InputError: it is damaged, or unpacks to more than `MOST_BYTES`.
    """
    if path.suffix.lower() != PACKED:
        yield path
        return
    with scratch_folder() as folder:
        copy = Path(folder) / plain_name(path).name
        size = 0
        try:
            with gzip.open(path) as packed, copy.open("wb") as file:
                while chunk := packed.read(_CHUNK):
                    size += len(chunk)
                    check_size(source, size=size)
                    file.write(chunk)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise InputError(f"{source} cannot be unpacked ({error}); it is damaged or no gzip file") from None
        yield copy
