"""Where a study lives: a journal file that processes of one machine share, or a database that machines share."""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock

from loraplus.errors import InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# Where there is no flock: a process that is killed while it writes leaves its lock behind, for so many seconds.
LOCK_SECONDS = 5
CONNECT_SECONDS = 10
JOURNAL_START = b'{"op_code":'
ATTEMPTS = 3


def open_study(location: str | os.PathLike[str], name: str) -> optuna.Study:
    """Opens a study, or creates it.

    Args:
        location: A journal file, or a storage URL as Optuna takes it (`postgresql://…`, `sqlite:///…`).
        name: Name of the study within the storage.

    Raises:
        InputError: the storage cannot be opened, or what is in it cannot be read; never with the URL's password.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    location = os.fspath(location)
    shown = without_password(location)
    try:
        return _create_study(location, name)
    except InputError:
        raise
    except ModuleNotFoundError as error:
        raise InputError(
            f"cannot open the study {shown}: {error.name} is not installed (pip install 'loraplus[postgresql]')"
        ) from None
    except OSError as error:
        raise InputError(f"cannot open the study {shown}: {error.strerror or error}") from None
    except Exception as error:  # every storage has its own errors: SQLAlchemy's, the driver's, a damaged journal's
        raise InputError(f"cannot open the study {shown}: {reason(error, location)}") from None


def reason(error: BaseException, location: str) -> str:
    """First line of what went wrong, down to its cause, without the password that stands in the URL."""
    while isinstance(error.__cause__, Exception):
        error = error.__cause__
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    line = re.sub(r"^\([\w.]+\)\s*", "", line)  # SQLAlchemy puts the driver's class in front
    for secret in _secrets(location):
        line = line.replace(secret, "***")
    return line


def without_password(location: str) -> str:
    """The location as it may be shown and saved.

    Example:
        >>> without_password("postgresql://me:secret@db.example.org/studies")
        'postgresql://me:***@db.example.org/studies'
    """
    for secret in _secrets(location):
        location = location.replace(f":{secret}@", ":***@").replace(f"={secret}", "=***")
    return location


def _secrets(location: str) -> list[str]:
    if "://" not in location:
        return []
    found = re.findall(r"://[^/:@]*:(.+)@", location) + re.findall(r"[?&](?:password|passwd)=([^&]+)", location)
    return [secret for secret in found if secret]


def _create_study(location: str, name: str) -> optuna.Study:
    for attempt in range(1, ATTEMPTS + 1):
        try:
            storage = _storage(location)
            return optuna.create_study(storage=storage, study_name=name, direction="minimize", load_if_exists=True)
        except Exception as error:
            # Two processes that create the tables at the same moment: one of them is told that they exist.
            if attempt == ATTEMPTS or type(error).__name__ not in ("IntegrityError", "ProgrammingError"):
                raise
            time.sleep(attempt)
    raise AssertionError("unreachable")


def _storage(location: str) -> BaseStorage:
    if "://" in location:
        url = re.sub(r"^postgres(ql)?://", "postgresql+psycopg://", location)
        if url.startswith("sqlite"):
            return optuna.storages.get_storage(_one_at_a_time(url))
        if not url.startswith("postgresql"):
            return optuna.storages.get_storage(url)
        options = {"pool_pre_ping": True, "connect_args": {"connect_timeout": CONNECT_SECONDS}}
        return optuna.storages.get_storage(RDBStorage(url, engine_kwargs=options))
    lock = JournalLock(location)
    if os.path.exists(location):
        _check_journal(Path(location))
        lock.acquire()
        try:
            _drop_torn_tail(Path(location))
        finally:
            lock.release()
    return JournalStorage(JournalFileBackend(location, lock_obj=lock))


def _one_at_a_time(url: str) -> RDBStorage:
    """Has SQLite lock a whole transaction. By itself it looks at a trial, lets others write, and then closes it."""
    from sqlalchemy import event

    storage = RDBStorage(url, engine_kwargs={"connect_args": {"timeout": CONNECT_SECONDS}})

    def begin(connection: Any) -> None:
        connection.connection.driver_connection.isolation_level = None  # Python's driver begins no transaction then
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    event.listen(storage.engine, "begin", begin)
    return storage


def _check_journal(path: Path) -> None:
    """Keeps a file that is no journal from being taken for one with a damaged end."""
    with path.open("rb") as file:
        start = file.read(len(JOURNAL_START))
    if not JOURNAL_START.startswith(start):
        raise InputError(f"cannot open the study {path}: it is another kind of file")


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
            handle = os.open(f"{self._journal}.lock", os.O_RDWR | os.O_CREAT, 0o644)
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
    while whole and not _is_json(whole[whole.rfind(b"\n", 0, -1) + 1 :]):
        whole = whole[: whole.rfind(b"\n", 0, -1) + 1]
    if len(whole) < len(content):
        with journal.open("r+b") as file:
            file.truncate(len(whole))


def _is_json(line: bytes) -> bool:
    try:
        parsed: Any = json.loads(line)
    except ValueError:
        return False
    return isinstance(parsed, dict)
