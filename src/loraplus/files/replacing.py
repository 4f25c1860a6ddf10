"""Puts a new folder in the place of an old one in one step, with all that the old one holds of the user's.

The user's files are in both folders before the two change places, so at every moment the folder under its name is
whole: the old one or the new one. Where the system has no such exchange there are two renames, and `put_back` ends
what a kill left between them.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
from pathlib import Path

from loraplus.errors import InputError
from loraplus.files.whole import TEMPORARY, remove_leftovers, sync_names, temporary_path

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_EARLIER = "earlier"


def replace_folder(new: Path, target: Path, written: set[str]) -> None:
    """Renames `new` to `target`. An old folder at `target` then has the name that `new` had.

    Args:
        new: on the same disk.
        target: may be there.
        written: names in `target` that are not taken over; all others are the user's.

    Raises:
        InputError: the user's files have names that are in `new`, too, or cannot be taken over.
        OSError: nothing can be renamed or linked there.
    """
    others = sorted({path.name for path in target.glob("*")} - written) if target.exists() else []
    others = [name for name in others if not TEMPORARY.fullmatch(name)]
    if taken := [name for name in others if os.path.lexists(new / name)]:
        raise InputError(f"{target / taken[0]} is of no earlier merge and would be replaced; move it away")
    for name in others:
        _link(target / name, new / name, os.stat(target).st_dev)
    if not target.exists():
        new.rename(target)
    elif not _exchange(new, target):
        earlier = temporary_path(_earlier(target))
        target.rename(earlier)
        try:
            new.rename(target)
        except OSError:
            earlier.rename(target)
            raise
        earlier.rename(new)
    sync_names(target.parent)


def put_all_back(folder: Path, name: re.Pattern[str]) -> None:
    """As `put_back`, for every folder of such a name."""
    for path in list(folder.glob(f".*.{_EARLIER}.*.tmp")):
        of = path.name[1:].partition(f".{_EARLIER}.")[0]
        if name.fullmatch(of):
            put_back(folder / of)


def put_back(target: Path) -> None:
    """Undoes a killed `replace_folder`: gives the old folder its name back and removes what else was left."""
    parent, earlier = target.parent, _earlier(target)
    if not os.path.lexists(target) and parent.is_dir():
        for path in parent.glob("." + earlier.name[:40].replace("[", "[[]") + ".*"):
            if TEMPORARY.fullmatch(path.name):
                path.rename(target)
                break
    remove_leftovers(parent, earlier.name)
    remove_leftovers(parent, target.name)


def _earlier(target: Path) -> Path:
    return target.with_name(f"{target.name[:30]}.{_EARLIER}")


def _link(source: Path, target: Path, disk: int) -> None:
    """Gives files a second name, so that they are lost in neither case. A mounted disk is refused."""
    status = source.lstat()
    if status.st_dev != disk:
        raise InputError(f"{source} is a disk of its own; unmount it, or name another --output")
    if source.is_symlink():
        target.symlink_to(os.readlink(source))
    elif source.is_dir():
        target.mkdir()
        for path in source.iterdir():
            _link(path, target / path.name, disk)
        shutil.copystat(source, target)
    else:
        try:
            os.link(source, target)
        except OSError:  # a file system without links
            shutil.copy2(source, target)


def _exchange(one: Path, other: Path) -> bool:
    """Swaps two folders in one step. False where the system or the disk cannot."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if os.name == "posix" else None
    return rename is not None and (
        rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0
    )
