"""Opens the storage of a study: a journal file for the processes of one machine, or a database for several machines."""

from __future__ import annotations

import functools
import os
import re
import time
from collections.abc import Callable
from typing import Any

import optuna
from optuna.storages import BaseStorage, RDBStorage

from loraplus.errors import InputError
from loraplus.study.journal import open_journal

CONNECT_SECONDS = 10
WAIT_SECONDS = 120.0
"""How long a run waits for a server that went away."""
_BETWEEN_TRIES = 1.0
ATTEMPTS = 3
_LOST = (
    "though the output folder has seen runs of it, which would be done again; put it back as it was, or start again "
    "with --overwrite"
)


def open_study(location: str | os.PathLike[str], name: str, *, begun: bool = False) -> optuna.Study:
    """Opens a study, or creates it.

    Args:
        location: A journal file, or a storage URL as Optuna takes it (`postgresql://…`, `sqlite:///…`).
        name: Name of the study within the storage.
        begun: It has had runs, so that it must be there.

    Raises:
        InputError: the storage cannot be opened, or what is in it cannot be read; never with the URL's password.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    location = os.fspath(location)
    shown = without_password(location)
    try:
        if begun and "://" not in location and not (os.path.exists(location) and os.path.getsize(location)):
            what = "is empty" if os.path.exists(location) else "is gone"
            raise InputError(f"{shown} {what}, {_LOST}")
        return _create_study(location, name, begun)
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


class Patient:
    """A storage whose calls wait for a server that is away, restarting say, for at most `WAIT_SECONDS`.

    A call may have been carried out although its answer was lost, and is then made twice. That does no harm: a second
    trial of a run has no owner and is closed later, and a trial that is closed stays so.

    Args:
        storage: Of Optuna.
        location: Where it is; files are not waited for.
        on_return: Called when the server is back.
    """

    def __init__(self, storage: BaseStorage, location: str, on_return: Callable[[], None]) -> None:
        self._storage = storage
        self._waits = "://" in location and not location.startswith("sqlite")
        self._on_return = on_return
        self.interrupted: Callable[[], bool] = lambda: False

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._storage, name)
        return functools.partial(self._call, call) if self._waits and callable(call) else call

    def _call(self, call: Callable[..., Any], *arguments: object, **options: object) -> Any:
        deadline = None
        while True:
            try:
                answer = call(*arguments, **options)
            except Exception as error:
                now = time.monotonic()
                deadline = deadline or now + WAIT_SECONDS
                if not _is_away(error) or now >= deadline or self.interrupted():
                    raise
                time.sleep(_BETWEEN_TRIES)
                continue
            if deadline is not None:
                self._on_return()
            return answer


def _is_away(error: BaseException | None) -> bool:
    """Whether a server was not reached, by what SQLAlchemy says underneath Optuna's own error."""
    from sqlalchemy.exc import InterfaceError, OperationalError

    while error is not None:
        if isinstance(error, (OperationalError, InterfaceError)):
            return True
        error = error.__cause__ or error.__context__
    return False


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
    passwords = re.findall(r"://[^/:@]*:(.+)@", location) + re.findall(r"[?&](?:password|passwd)=([^&]+)", location)
    return [secret for secret in passwords if secret]


def _create_study(location: str, name: str, begun: bool) -> optuna.Study:
    for attempt in range(1, ATTEMPTS + 1):
        try:
            storage = _storage(location, name)
            if begun and all(study.study_name != name for study in storage.get_all_studies()):
                raise InputError(f"{without_password(location)} holds no study {name!r}, {_LOST}")
            return optuna.create_study(storage=storage, study_name=name, direction="minimize", load_if_exists=True)
        except Exception as error:
            # Two processes that create the tables at the same moment: one of them is told that they exist.
            exists = type(error).__name__ in ("IntegrityError", "ProgrammingError") or "already exists" in str(error)
            if attempt == ATTEMPTS or not exists:
                raise
            time.sleep(attempt)
    raise AssertionError("unreachable")


def _storage(location: str, name: str) -> BaseStorage:
    if "://" in location:
        url = re.sub(r"^postgres(ql)?://", "postgresql+psycopg://", location)
        if url.startswith("sqlite"):
            return optuna.storages.get_storage(_one_at_a_time(url))
        if not url.startswith("postgresql"):
            return optuna.storages.get_storage(url)
        options = {"pool_pre_ping": True, "connect_args": {"connect_timeout": CONNECT_SECONDS}}
        return optuna.storages.get_storage(RDBStorage(url, engine_kwargs=options))
    return open_journal(location, name)


def _one_at_a_time(url: str) -> RDBStorage:
    """Makes SQLite lock whole transactions. By default others could write between reading a trial and closing it."""
    from sqlalchemy import event

    storage = RDBStorage(url, engine_kwargs={"connect_args": {"timeout": CONNECT_SECONDS}})

    def begin(connection: Any) -> None:
        connection.connection.driver_connection.isolation_level = None  # Python's driver begins no transaction then
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    event.listen(storage.engine, "begin", begin)
    return storage
