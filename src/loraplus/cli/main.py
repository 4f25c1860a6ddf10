"""Runs the command line, and turns every expected error into one line and exit code 2."""

from __future__ import annotations

import io
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer

from loraplus.cli import (  # noqa: F401  (each registers its command on `app`)
    bench,
    compare,
    doctor,
    evaluate,
    export,
    generate,
    inspect,
    merge,
    predict,
    reproduce,
    train,
    tune,
    watch,
)
from loraplus.cli.app import app
from loraplus.cli.flag_groups import keep_flags_whole
from loraplus.cli.terminal import is_speaker, tell
from loraplus.errors import InterruptedRun, LoraPlusError, LoraPlusWarning, LostProcessError, one_line, visible


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line. Exit codes: 0 done, 1 `doctor` found faults, 2 the user's mistake, 130 interrupted."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal or pipe that is not UTF-8 has no η, λ or ·
            stream.reconfigure(errors="replace")
    if "--help" in (sys.argv[1:] if arguments is None else arguments):
        keep_flags_whole()
    try:
        with _plain_warnings():
            code = app(args=arguments, standalone_mode=False)
    except InterruptedRun as stop:
        if is_speaker() or isinstance(stop, LostProcessError):  # the lost process may be the one that prints for all
            _tell(stop)
        sys.exit(130)
    except (LoraPlusError, typer.TyperException, OSError, MemoryError) as error:
        if is_speaker():
            _tell(f"loraplus: {_message(error)}")
        sys.exit(2)
    except (KeyboardInterrupt, typer.Abort) as stop:
        if isinstance(
            stop.__cause__, EOFError
        ):  # nothing is asked, so this is a file's end, which click takes for Ctrl-D
            _tell("loraplus: a file ends before its time: it is cut off or empty")
            sys.exit(2)
        _tell("interrupted")
        sys.exit(130)
    if code == 130:  # typer's, of a KeyboardInterrupt
        _tell("interrupted")
    sys.exit(code if isinstance(code, int) else 0)


def _message(error: BaseException) -> str:
    """What an error says to the user."""
    if isinstance(error, MemoryError):
        return "there is not enough memory for this"
    if isinstance(error, OSError) and not isinstance(error, LoraPlusError) and error.strerror:
        return f"{error.strerror}{f': {error.filename}' if error.filename else ''}"
    return getattr(error, "format_message", error.__str__)()  # typer's: a flag that does not exist, a wrong type, …


def _tell(text: object) -> None:
    tell(one_line(text))


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Shows each of our own warnings once, as one line without a source position.

    Those of libraries are shown if Python is asked for them:
    `python -W default -m loraplus`, or PYTHONWARNINGS.
    """
    shown: set[str] = set()
    with warnings.catch_warnings():
        as_ever = warnings.showwarning

        def show(message: Any, category: type[Warning], *where: Any, **more: Any) -> None:
            if not issubclass(category, LoraPlusWarning):
                if sys.warnoptions:
                    as_ever(visible(str(message)), category, *where, **more)
            elif str(message) not in shown and is_speaker():
                shown.add(str(message))
                _tell(f"loraplus: warning: {message}")

        warnings.simplefilter("always", LoraPlusWarning)
        warnings.showwarning = show
        yield
