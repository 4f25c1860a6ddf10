"""A study's journal file: one writer at a time, a torn end cut off, and a damaged middle mended before it is used."""

from __future__ import annotations

import contextlib
import itertools
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock

from loraplus.errors import InputError, LoraPlusWarning
from loraplus.files.single import write_atomically
from loraplus.study.mending import Mended, mended, operation

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# Where there is no flock: a process that is killed while it writes leaves its lock behind, for so many seconds.
LOCK_SECONDS = 5
JOURNAL_START = b'{"op_code":'
_LINES_LOOKED_AT, _LONGEST_LOOKED_AT = 1000, 2**20
_MOST_NAMED = 4


def open_journal(location: str, study: str) -> JournalStorage:
    """The storage of a journal file, which is made if it is not there.

    A half-written last line, as a kill leaves it, is dropped without a word: it is no finished run. Damaged lines
    before it are left out with a warning that names them, and a copy of the journal is kept beside it.

    Args:
        location: The file.
        study: Name of the study that is wanted of it.

    Raises:
        InputError: it is another kind of file; or it is damaged and another process has it open, or cannot be mended.
    """
    path, lock = Path(location), JournalLock(location)
    if path.exists():
        _check_kind(path)
        hold = _Hold(path)
        try:
            with _acquired(lock):
                _drop_torn_tail(path)
                repaired = mended(path, path.read_bytes(), study)
            if repaired is not None:
                _replace(path, repaired, hold, lock)
        finally:
            hold.end()
    backend: Any = JournalFileBackend(location, lock_obj=lock)
    backend.hold = _Hold(path)  # ends with it
    return JournalStorage(backend)


def _replace(path: Path, repaired: Mended, hold: _Hold, lock: JournalLock) -> None:
    lines = _named(repaired)
    if not hold.is_alone():
        raise InputError(f"{path}: {lines}, and another process has it open; wait for it to end, then go on")
    with _acquired(lock):
        kept = _keep_copy(path)
        write_atomically(path, repaired.content)
    warnings.warn(
        f"{path}: {lines}, and passed over; {repaired.finished} finished runs stand, and the journal as it was is kept "
        f"in {kept.name}",
        LoraPlusWarning,
        stacklevel=2,
    )


def _named(repaired: Mended) -> str:
    """Which lines are damaged, in words."""
    if not repaired.passed_over:
        return "lines are missing"
    named = [f"line {number} is damaged ({why})" for number, why in repaired.passed_over[:_MOST_NAMED]]
    more = len(repaired.passed_over) - len(named)
    return ", ".join(named) + (f", and {more} more lines" if more else "")


def _keep_copy(path: Path) -> Path:
    """Copies the journal beside it, under the first name that is free or holds the same content already."""
    content = path.read_bytes()
    for number in itertools.count(1):
        copy = path.with_name(f"{path.name}.damaged{f'-{number}' if number > 1 else ''}")
        if not os.path.lexists(copy):
            return write_atomically(copy, content)
        if copy.is_file() and copy.read_bytes() == content:  # of a run that was killed right after
            return copy
    raise AssertionError("unreachable")


def _check_kind(path: Path) -> None:
    """Refuses a file that is not a journal, so that it is not mended like a damaged one."""
    with path.open("rb") as file:
        start = file.read(len(JOURNAL_START))
        if JOURNAL_START.startswith(start):
            return
        for _ in range(_LINES_LOOKED_AT):
            if file.readline(_LONGEST_LOOKED_AT).startswith(JOURNAL_START):
                return
    raise InputError(f"cannot open the study {path}: it is another kind of file")


class _Hold:
    """Shows other processes that this one has the journal open, as long as the object lives."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        self._lock(fcntl.LOCK_SH if fcntl else 0)
        with contextlib.suppress(FileNotFoundError):
            while not os.path.samestat(os.fstat(self._file.fileno()), os.stat(path)):  # replaced while this one waited
                self._file.close()
                self._file = path.open("rb")
                self._lock(fcntl.LOCK_SH if fcntl else 0)

    def is_alone(self) -> bool:
        """Whether no other process has it open; then none can open it until this object ends."""
        return fcntl is None or self._lock(fcntl.LOCK_EX | fcntl.LOCK_NB)

    def end(self) -> None:
        """Lets go."""
        self._file.close()

    def __del__(self) -> None:
        if hasattr(self, "_file"):  # else it could not be opened
            self.end()

    def _lock(self, kind: int) -> bool:
        if fcntl is not None:
            try:
                fcntl.flock(self._file, kind)
            except BlockingIOError:
                return False
            except OSError:  # a file system without locks
                pass
        return True


class JournalLock(JournalFileSymlinkLock):
    """One writer at a time; whoever comes next cuts off what a killed writer left half written.

    The lock is the kernel's on a file beside the journal, so it ends with its process. Where there is none, it is
    Optuna's, which counts for `LOCK_SECONDS` after a kill.

    Args:
        journal: The file that is written to.
    """

    def __init__(self, journal: str) -> None:
        super().__init__(journal, grace_period=LOCK_SECONDS)
        self._journal = Path(journal)
        self._handle: int | None = None

    def acquire(self) -> bool:
        if fcntl is None:
            super().acquire()
        else:
            place = f"{self._journal}.lock"
            if os.path.islink(place):  # Optuna's own lock, left by a process that is gone
                os.unlink(place)
            handle = os.open(place, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
            fcntl.flock(handle, fcntl.LOCK_EX)
            self._handle = handle
        if not _ends_whole(self._journal):
            _drop_torn_tail(self._journal)
        return True

    def release(self) -> None:
        if fcntl is None:
            super().release()
        elif self._handle is not None:
            os.close(self._handle)
            self._handle = None


@contextlib.contextmanager
def _acquired(lock: JournalLock) -> Iterator[None]:
    lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _ends_whole(journal: Path) -> bool:
    with contextlib.suppress(FileNotFoundError), journal.open("rb") as file:
        if file.seek(0, os.SEEK_END) > 0:
            file.seek(-1, os.SEEK_END)
            return file.read(1) == b"\n"
    return True


def _drop_torn_tail(journal: Path) -> None:
    """Cuts off a last line that a kill left half written; otherwise the next line would be glued to it."""
    content = journal.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    start = whole.rfind(b"\n", 0, -1) + 1
    if whole and isinstance(operation(whole[start:]), str):
        whole = whole[:start]
    if len(whole) < len(content):
        with journal.open("r+b") as file:
            file.truncate(len(whole))
