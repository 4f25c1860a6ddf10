"""Writes files and folders that are whole or absent, whatever ends the process.

They are written beside their place, under a name that nobody can guess, and renamed. What is in the making is held by
its process with the kernel's lock, so that what a killed process left is told from what another one is writing.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

TEMPORARY = re.compile(r"\..+\.[0-9a-f]{16}\.tmp")
"""Names of what is being written. Nobody else gives such names; if no process has it locked, a killed one left it."""


def temporary_path(target: Path) -> Path:
    """A random name beside the target, so that nobody can have put a link there; see `TEMPORARY`."""
    return target.with_name(f".{target.name[:40]}.{secrets.token_hex(8)}.tmp")


def new_file(path: Path) -> Any:
    """Makes a new file, locked and open for bytes, with the permissions that the umask leaves. Links are not followed.

    Raises:
        OSError: it is there, or cannot be made.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    handle = os.open(path, flags, 0o666)
    hold(handle)
    return os.fdopen(handle, "wb")


def write_whole(target: Path, content: bytes) -> None:
    """Writes a file so that readers see the old content or the new, never a part.

    Raises:
        OSError: it cannot be written; the old content is still there.
    """
    temporary = temporary_path(target)
    try:
        with new_file(temporary) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            if fcntl is not None:  # while it is held, see `remove_leftovers`
                os.replace(temporary, target)
        if fcntl is None:
            os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError, ValueError):
            temporary.unlink()
        raise


def hold(handle: int, *, wait: bool = False) -> bool:
    """Takes the kernel's lock on an open file or folder. The lock ends with this process.

    Args:
        handle: of the file or folder.
        wait: until it is free.

    Returns:
        False if another process has it.
    """
    if fcntl is not None:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            return False
        except OSError:  # a file system without locks
            pass
    return True


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = False, flags: int = os.O_RDONLY) -> Iterator[bool]:
    """Locks a folder or file while the block lasts. Yields False if another process has the lock.

    Args:
        path: of the folder or file.
        wait: until it is free.
        flags: that it is opened with.

    Raises:
        OSError: it cannot be opened.
    """
    if os.name == "nt":  # where folders cannot be opened
        yield True
        return
    handle = os.open(path, flags)
    try:
        yield hold(handle, wait=wait)
    finally:
        os.close(handle)


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Removes what killed processes left in a folder under temporary names. What is locked has an owner and stays.

    Args:
        folder: where to look.
        name: of the file or folder that was being written; None for any.
    """
    start = "." if name is None else f".{name[:40]}."
    with contextlib.suppress(OSError):
        for entry in list(os.scandir(folder)):
            if entry.name.startswith(start) and TEMPORARY.fullmatch(entry.name) and not entry.is_symlink():
                remove_dead(Path(entry.path))


def remove_dead(path: Path) -> None:
    """Removes a file or folder unless the process that made it still has it locked."""
    if fcntl is None:
        return
    as_it_is = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
    with contextlib.suppress(OSError), locked(path, flags=as_it_is) as is_ours:
        if is_ours and path.lstat().st_uid == os.geteuid():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()


def move_into(source: Path, target: Path) -> None:
    """Renames every file of a folder to its name in another, which is on the same disk; each is replaced whole.

    Raises:
        OSError: a file cannot be renamed.
    """
    for path in _files(source):
        place = target / path.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        _sync(path)
        os.replace(path, place)
    sync_names(target)


def sync_folder(folder: Path) -> None:
    """Has the disk hold the contents of a folder's files before anything is renamed."""
    for path in _files(folder):
        _sync(path)


def follow_umask(folder: Path) -> None:
    """Gives the files in a folder the permissions that the umask leaves: safetensors keeps its own to their owner.

    Raises:
        OSError: nothing can be written there.
    """
    probe = temporary_path(folder / "mode")
    with new_file(probe) as file:
        mode = os.fstat(file.fileno()).st_mode & 0o777
    probe.unlink()
    for path in _files(folder):
        with contextlib.suppress(OSError):  # of a disk without permissions
            path.chmod(mode)


def _files(folder: Path) -> list[Path]:
    """Of a folder and those in it; links are not followed."""
    paths = [Path(parent) / name for parent, _, names in os.walk(folder) for name in names]
    return sorted(path for path in paths if path.is_file() and not path.is_symlink())


def _sync(path: Path) -> None:
    """Has the disk hold a file's content before its name."""
    handle = os.open(path, os.O_RDWR | getattr(os, "O_BINARY", 0))
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_names(folder: Path) -> None:
    """Has the disk hold the names in a folder, as far as it can."""
    with contextlib.suppress(OSError):  # not every file system, nor Windows, syncs folders
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
