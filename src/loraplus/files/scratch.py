"""Temporary folders, each locked by the process that made it. The next process removes what a killed one left."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from loraplus.files.whole import locked, remove_dead, remove_leftovers, temporary_path

_SCRATCH = re.compile(r"loraplus-[0-9a-f]{16}")


@contextlib.contextmanager
def scratch_folder() -> Iterator[str]:
    """A folder among the system's temporary files, removed at the end; those of dead processes go at the start."""
    place = Path(tempfile.gettempdir())
    with contextlib.suppress(OSError):
        for entry in list(os.scandir(place)):
            if _SCRATCH.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
                remove_dead(Path(entry.path))
    with made_folder(place / f"loraplus-{secrets.token_hex(8)}", 0o700) as folder:
        yield str(folder)


@contextlib.contextmanager
def folder_beside(target: Path) -> Iterator[Path]:
    """A new folder beside `target`; whatever has its name at the end is removed, as is what dead processes left."""
    remove_leftovers(target.parent, target.name)
    with made_folder(temporary_path(target)) as folder:
        yield folder


@contextlib.contextmanager
def made_folder(folder: Path, mode: int = 0o777) -> Iterator[Path]:
    """A new folder, held; whatever has its name at the end is removed."""
    os.mkdir(folder, mode)
    with contextlib.ExitStack() as stack:
        stack.enter_context(locked(folder))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)  # while it is held
        yield folder
