"""Single files: written whole or not at all under a name that nobody can guess, and read within limits."""

from __future__ import annotations

import contextlib
import csv
import errno
import io
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from loraplus.errors import InputError
from loraplus.tasks.parsing import ParseError, parse_json
from loraplus.tasks.paths import is_folder

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

TEMPORARY = re.compile(r"\..+\.[0-9a-f]+\.tmp")
"""Names that a file has while it is written; one that is still there was left by a command that was killed."""
_OURS = re.compile(r"\..+\.[0-9a-f]{16}\.tmp")
"""Those of `temporary_path`: no name that somebody would give."""
_LARGEST_JSON = 2**28
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
    """Writes a little and removes it: the only way to know of full disks, read-only ones, and those that hold no files.

    Raises:
        InputError: names the target.
    """
    probe = temporary_path(folder / "probe")
    try:
        if len(os.fsencode(target.name)) > os.pathconf(folder, "PC_NAME_MAX"):
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        with _new_file(probe) as file:
            file.write(_PROBE)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise InputError(f"cannot write to {target}: {error.strerror}") from None
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()


def write_atomically(path: str | os.PathLike[str], content: str | bytes) -> Path:
    """Writes a file so that readers see the old content or the new, never a part.

    Raises:
        InputError: the file cannot be written.
    """
    target = Path(path)
    temporary = temporary_path(target)
    try:
        content = content.encode() if isinstance(content, str) else content
        with _new_file(temporary) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            if fcntl is not None:  # while it is held, see `remove_leftovers`
                os.replace(temporary, target)
        if fcntl is None:
            os.replace(temporary, target)
    except UnicodeEncodeError:
        raise InputError(f"cannot write {target}: what it should hold is no Unicode text") from None
    except (OSError, ValueError) as error:
        with contextlib.suppress(OSError, ValueError):
            temporary.unlink()
        raise InputError(f"cannot write {target}: {getattr(error, 'strerror', None) or error}") from None
    return target


def temporary_path(target: Path) -> Path:
    """A name beside the target that nobody can guess, so that no link waits there; see `TEMPORARY`."""
    return target.with_name(f".{target.name[:40]}.{secrets.token_hex(8)}.tmp")


def hold(handle: int) -> bool:
    """Takes the kernel's lock on an open file or folder, which ends with this process; False if another has it."""
    if fcntl is not None:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # a file system without locks
            pass
    return True


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Removes what killed processes left in a folder under temporary names; what is held has an owner and stays.

    Args:
        folder: Where to look.
        name: Of the file or folder that was being written. Default: any.
    """
    start = "." if name is None else f".{name[:40]}."
    with contextlib.suppress(OSError):
        for entry in list(os.scandir(folder)):
            if entry.name.startswith(start) and _OURS.fullmatch(entry.name) and not entry.is_symlink():
                remove_dead(Path(entry.path))


def remove_dead(path: Path) -> None:
    """Removes a file or folder that its maker holds, unless the maker is still there."""
    if fcntl is None:
        return
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            if os.fstat(handle).st_uid == os.geteuid() and hold(handle):
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink()
        finally:
            os.close(handle)


def _new_file(path: Path) -> Any:
    """A file that was not there and is no link, held, with the permissions that the umask leaves."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    handle = os.open(path, flags, 0o666)
    hold(handle)
    return os.fdopen(handle, "wb")


def follow_umask(folder: str | os.PathLike[str]) -> None:
    """Gives the files in a folder the permissions that the umask leaves: safetensors keeps its own to their owner."""
    probe = temporary_path(Path(folder) / "mode")
    try:
        with _new_file(probe) as file:
            mode = os.fstat(file.fileno()).st_mode & 0o777
        probe.unlink()
        for entry in os.scandir(folder):
            if entry.is_file(follow_symlinks=False):
                os.chmod(entry.path, mode)
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror}") from None


def write_yaml(path: str | os.PathLike[str], data: Mapping[str, Any]) -> Path:
    """Writes a mapping as YAML, keys in their order."""
    return write_atomically(path, yaml.safe_dump(dict(data), sort_keys=False, allow_unicode=True))


def write_json(path: str | os.PathLike[str], data: Any) -> Path:
    """Writes JSON that any parser reads: NaN and infinity become null."""
    return write_atomically(path, json_text(data) + "\n")


def json_text(data: Any) -> str:
    """JSON text of `data`; NaN and infinity become null, and what JSON has no form for its text."""
    return json.dumps(_finite(data), indent=2, ensure_ascii=False, allow_nan=False, default=str)


def read_json(path: str | os.PathLike[str]) -> Any:
    """Reads a JSON file.

    Raises:
        InputError: the file cannot be read or is not JSON.
    """
    try:
        with Path(path).open(encoding="utf-8") as file:
            text = file.read(_LARGEST_JSON + 1)
        if len(text) > _LARGEST_JSON:
            raise InputError(f"{path} is too large for a JSON file of settings or facts")
        return parse_json(text)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except ParseError as error:
        raise InputError(f"{path} is {error}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is not valid JSON") from None


def write_csv(path: str | os.PathLike[str], rows: Sequence[Mapping[str, Any]]) -> Path:
    """Writes rows as CSV; the columns are the keys in the order in which they first appear."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return write_atomically(path, text.getvalue())


def _finite(data: Any) -> Any:
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, Mapping):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    return data
