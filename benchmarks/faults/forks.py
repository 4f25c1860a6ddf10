"""Runs a command in a child process that can be killed at any of its file operations, or at a moment by the clock.

Python tells of its file operations by audit events; what libraries write from C and Rust (weights, optimizer states)
falls between two of them and is met by the kills by the clock. Children are forked from a process that has imported
everything, so that each costs its own work only.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

_EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.link", "os.symlink")
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


class Ended(NamedTuple):
    """How a child ended: its exit code (−9 if it was killed), what it printed, seconds, file operations."""

    code: int
    output: str
    seconds: float
    operations: int


def run(
    command: Callable[[Sequence[str]], None],
    arguments: Sequence[str],
    folder: Path,
    *,
    operation: int | None = None,
    seconds: float | None = None,
    before: Callable[[], None] | None = None,
    group: bool = False,
) -> Ended:
    """Runs a command in a child.

    Args:
        command: takes the arguments, and may end in SystemExit.
        arguments: of the command.
        folder: whose file operations count, with what is below it.
        operation: kill before this one, from 1.
        seconds: kill after so many.
        before: called in the child first.
        group: the child leads a group of its own, and a kill ends all of it: its workers, too.
    """
    started = time.perf_counter()
    reading, writing = os.pipe()
    counting, count = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        os.close(counting)
        _child(command, arguments, folder, operation, writing, count, before, group)
    os.close(writing)
    os.close(count)
    if seconds is not None:
        kill = os.killpg if group else os.kill
        signal.signal(signal.SIGALRM, lambda *_: kill(child, signal.SIGKILL))
        signal.setitimer(signal.ITIMER_REAL, seconds)
    output = b"".join(iter(lambda: os.read(reading, 1 << 16), b""))
    _, status = os.waitpid(child, 0)
    signal.setitimer(signal.ITIMER_REAL, 0)
    operations = len(b"".join(iter(lambda: os.read(counting, 1 << 16), b"")))
    os.close(reading)
    os.close(counting)
    text = output.decode(errors="replace")
    return Ended(os.waitstatus_to_exitcode(status), text, time.perf_counter() - started, operations)


def _child(command, arguments, folder, operation, writing, count, before, group) -> None:
    code, leader = 0, os.getpid()
    try:
        if group:
            os.setsid()
        for descriptor, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(writing, descriptor)
            setattr(sys, name, os.fdopen(descriptor, "w", closefd=False))
        place, done = str(folder.resolve()), 0

        def hook(event: str, details: tuple) -> None:
            nonlocal done
            if os.getpid() != leader:  # a worker, which is forked with this hook
                return
            if event not in _EVENTS or not _is_below(place, details) or (event == "open" and not _changes(details)):
                return
            done += 1
            os.write(count, b".")
            if done == operation:
                (os.killpg if group else os.kill)(leader, signal.SIGKILL)

        sys.addaudithook(hook)
        if before is not None:
            before()
        command(arguments)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 70
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _is_below(place: str, details: tuple) -> bool:
    for detail in details[:2]:
        if isinstance(detail, (str, bytes, os.PathLike)):
            path = os.path.abspath(os.fsdecode(detail))
            if path == place or path.startswith(place + os.sep):
                return True
    return False


def _changes(details: tuple) -> bool:
    _, mode, flags = details
    return any(letter in mode for letter in "wax+") if isinstance(mode, str) else bool((flags or 0) & _WRITES)
