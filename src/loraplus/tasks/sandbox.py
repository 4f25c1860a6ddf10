"""Patterns and chat templates of unknown origin, run in a process of their own within limits on time and memory.

Both come with adapters and models, and both are programs: a pattern can take longer than the universe is old, a
template can count to any number or fill the memory.
"""

from __future__ import annotations

import atexit
import json
import os
import pickle
import re
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

from loraplus.errors import InputError
from loraplus.tasks import sandbox_process

_PROGRAM = "import json, runpy, sys; sys.path = json.loads(sys.argv[1]); runpy.run_path(sys.argv[2], {}, '__main__')"
_MEASURES_ITSELF = hasattr(signal, "setitimer")
_WALL_SECONDS = 60.0
"""The limit by the clock, which alone counts where the process cannot measure its own time."""
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "ARROW_DEFAULT_MEMORY_POOL": "system",  # its own takes a gigabyte of addresses at once, which the limit forbids
}
_PLAIN = re.compile(r"[\w.\-/ ]*")


class TooMuchError(Exception):
    """A request took longer than it may, or its process did not survive it."""


class RefusedError(Exception):
    """Why a request was refused, and the line of the template if that is known."""

    def __init__(self, reason: str, line: int | None) -> None:
        super().__init__(reason)
        self.line = line


class _Process:
    """The process that answers. It is started at the first request, and again after one that ended it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def ask(self, kind: str, *arguments: object) -> Any:
        """The answer to a request.

        Raises:
            TooMuchError, RefusedError.
        """
        body = pickle.dumps((kind, arguments, sandbox_process.SECONDS))
        with self._lock:
            process = self._started()
            requests, answers = cast(BinaryIO, process.stdin), cast(BinaryIO, process.stdout)
            guard = None if _MEASURES_ITSELF else threading.Timer(_WALL_SECONDS, process.kill)
            try:
                if guard:
                    guard.start()
                requests.write(struct.pack("<Q", len(body)) + body)
                requests.flush()
                head = answers.read(8)
                answer = answers.read(*struct.unpack("<Q", head)) if len(head) == 8 else b""
            except OSError:
                answer = b""
            except BaseException:  # interrupted: the next request would get this one's answer
                self._end()
                raise
            finally:
                if guard:
                    guard.cancel()
            if not answer:
                self._end()
                raise TooMuchError
        reply = json.loads(answer)
        if "error" in reply:
            raise RefusedError(reply["error"], reply["line"])
        return reply["result"]

    def _started(self) -> subprocess.Popen[bytes]:
        if self._running is None or self._owner != os.getpid() or self._running.poll() is not None:
            self._owner = os.getpid()
            self._running = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM, json.dumps(sys.path), str(Path(sandbox_process.__file__))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                env={**os.environ, **_ENVIRONMENT},
            )
            atexit.register(self._end)
        return self._running

    def _end(self) -> None:
        process, self._running = self._running, None
        if process is not None and self._owner == os.getpid():
            process.kill()
            process.communicate()


_PROCESS = _Process()


def check_patterns(source: str, settings: object, names: Iterable[str]) -> None:
    """Makes sure that no pattern in an adapter's settings takes long on the names of a model's modules.

    Args:
        source: name of the settings, for messages.
        settings: whatever adapter_config.json holds; every text in it that is no plain name counts as a pattern.
        names: of the modules.

    Raises:
        InputError: one does, or is no regular expression.
    """
    names = list(names)
    for pattern in dict.fromkeys(_texts(settings)):
        if _PLAIN.fullmatch(pattern):
            continue
        try:
            _PROCESS.ask("patterns", [pattern], names)
        except TooMuchError:
            raise InputError(f"{source}: the pattern {pattern!r} takes too long on this model's names") from None
        except RefusedError:
            continue  # a sentence, say; where it is used as a pattern, that says so


def _texts(value: object) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from value.keys()
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _texts(inner)


def parquet_facts(path: str) -> dict[str, Any]:
    """What `sandbox_process.parquet` finds.

    Raises:
        TooMuchError: what the file says of its columns is so damaged that Arrow does not survive it.
        RefusedError: it is damaged.
    """
    return _PROCESS.ask("parquet", path)


def render_chat(template: str, messages: Sequence[Any], **options: object) -> tuple[str, list[list[int]]]:
    """A conversation in the words of a chat template, and where the assistant's parts stand in it.

    Args:
        template: Jinja, in the sandbox of transformers.
        messages: of the conversation.
        **options: of transformers' `render_jinja_template`.

    Raises:
        RefusedError: the template refuses the conversation, or is not valid.
    """
    try:
        return _PROCESS.ask("chat", {"conversations": [list(messages)], "chat_template": template, **options})
    except TooMuchError:
        seconds = sandbox_process.SECONDS
        raise RefusedError(f"it takes more than {seconds:g} seconds, or too much memory", None) from None
