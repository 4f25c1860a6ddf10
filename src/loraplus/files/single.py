"""Single files: written whole or not at all under a name that nobody can guess, and read within limits."""

from __future__ import annotations

import contextlib
import csv
import errno
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from loraplus.errors import InputError
from loraplus.files.parsing import ParseError, parse_json
from loraplus.files.paths import is_folder, user_path
from loraplus.files.whole import new_file, remove_leftovers, temporary_path, write_whole

_LARGEST_JSON = 2**28
_LONGEST_TEMPLATE = 2**20
_PROBE = bytes(2**16)


def check_file(output: str, suffixes: Sequence[str], *, overwrite: bool) -> Path:
    """Where a single file is to be written, checked before the work for it begins.

    Raises:
        InputError: its name ends in none of `suffixes`, it is there already, or its folder is not, takes no files or is
            full.
    """
    target = Path(output)
    if target.suffix not in suffixes:
        one_of = "one of " if len(suffixes) > 1 else ""
        raise InputError(f"--output {output} must end in {one_of}{', '.join(suffixes)}")
    if not is_folder(target.parent):
        raise InputError(f"there is no folder {target.parent} to write {target.name} to")
    check_takes_files(target.parent, target)
    if target.is_dir() or (os.path.lexists(target) and not overwrite):
        raise InputError(f"{output} exists; name another file or pass --overwrite")
    remove_leftovers(target.parent, target.name)
    return target


def check_takes_files(folder: Path, target: Path) -> None:
    """Writes a little and removes it: nothing else shows that a disk is full, read-only or no place for files.

    Raises:
        InputError: names the target.
    """
    probe = temporary_path(folder / "probe")
    try:
        if hasattr(os, "pathconf") and len(os.fsencode(target.name)) > os.pathconf(folder, "PC_NAME_MAX"):
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        with new_file(probe) as file:
            file.write(_PROBE)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise InputError(f"cannot write to {target}: {error.strerror}") from None
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()


def read_template(path: str) -> str:
    """The text of a chat template.

    Raises:
        InputError: the file cannot be read, or is not UTF-8.
    """
    return read_text(path, _LONGEST_TEMPLATE, "--chat-template: ")


def read_text(path: str | os.PathLike[str], most: int, option: str = "", what: str = "UTF-8 text") -> str:
    """The first `most` characters of a file.

    Args:
        path: of the file, `~` included.
        most: characters to read; give one more than is allowed to notice a text that is too long.
        option: begins the message.
        what: the file should be, if it is not UTF-8.

    Raises:
        InputError: the file cannot be read, or is not UTF-8.
    """
    try:
        with user_path(path).open(encoding="utf-8") as file:
            return file.read(most)
    except OSError as error:
        raise InputError(f"{option}cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"{option}{path} is not {what}") from None


def write_atomically(path: str | os.PathLike[str], content: str | bytes) -> Path:
    """Writes a file so that readers see the old content or the new, never a part.

    Raises:
        InputError: the file cannot be written.
    """
    target = Path(path)
    try:
        write_whole(target, content.encode() if isinstance(content, str) else content)
    except UnicodeEncodeError:
        raise InputError(f"cannot write {target}: what it should hold is no Unicode text") from None
    except (OSError, ValueError) as error:
        raise InputError(f"cannot write {target}: {getattr(error, 'strerror', None) or error}") from None
    return target


def write_yaml(path: str | os.PathLike[str], data: Mapping[str, Any]) -> Path:
    """Writes a mapping as YAML, keys in their order."""
    return write_atomically(path, yaml.safe_dump(dict(data), sort_keys=False, allow_unicode=True))


def write_json(path: str | os.PathLike[str], data: object) -> Path:
    """Writes JSON that any parser reads: NaN and infinity become null."""
    return write_atomically(path, json_text(data) + "\n")


def json_text(data: object) -> str:
    """JSON text of `data`. NaN and infinity become null; objects that JSON does not know become their text."""
    return json.dumps(_finite(data), indent=2, ensure_ascii=False, allow_nan=False, default=str)


def read_json(path: str | os.PathLike[str]) -> Any:
    """Reads a JSON file.

    Raises:
        InputError: the file cannot be read or is not JSON.
    """
    text = read_text(path, _LARGEST_JSON + 1, what="valid JSON")
    if len(text) > _LARGEST_JSON:
        raise InputError(f"{path} is too large for a JSON file of settings or facts")
    try:
        return parse_json(text)
    except ParseError as error:
        raise InputError(f"{path} is {error}") from None


def write_csv(path: str | os.PathLike[str], rows: Sequence[Mapping[str, Any]]) -> Path:
    """Writes rows as CSV; the columns are the keys in the order in which they first appear."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return write_atomically(path, text.getvalue())


def _finite(data: object) -> Any:
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, Mapping):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    return data
