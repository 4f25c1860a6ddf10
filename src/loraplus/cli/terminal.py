"""Prints to the terminal: text is shown as it is, never read as markup or obeyed as an escape code.

Everything that the commands print goes through here, so that no label, path, tensor name or error has to be escaped
where it is printed.
"""

from __future__ import annotations

import io
import json
import logging
import os
import re
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import IO, Any, TextIO

import rich.console
from rich.console import ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table

from loraplus.errors import visible

_NOT_IN_JSON = re.compile(r"[\x7f-\x9f\u200e\u200f\u061c\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff]")


_covered: list[tuple[TextIO, TextIO]] = []


def screen() -> tuple[TextIO, TextIO]:
    """(standard output, standard error) of the command, also while libraries are kept from them."""
    return _covered[0] if _covered else (sys.stdout, sys.stderr)


@contextmanager
def without_chatter() -> Iterator[None]:
    """Within this block only this module prints: what libraries print is dropped."""
    streams = sys.stdout, sys.stderr
    _covered.append(streams)
    sys.stdout, sys.stderr = (_Nowhere(stream) for stream in streams)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = streams
        _covered.pop()


class _Nowhere(io.TextIOBase):
    """A stream whose text is lost."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        return len(text)

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._stream.fileno()


class Console(rich.console.Console):
    """rich's console without markup, emoji codes and guessed highlights. It spells out escape codes."""

    def __init__(self, *, plain: bool = False, **options: Any) -> None:
        super().__init__(no_color=plain or None, markup=False, emoji=False, highlight=False, **options)

    @property
    def file(self) -> IO[str]:
        """Where it prints: also while libraries are kept from there."""
        return self._file or screen()[self.stderr]

    @file.setter
    def file(self, new_file: IO[str]) -> None:
        self._file = new_file

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """As rich does, with control characters in text spelled out; rich's own codes are kept apart from text."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)

    def say(self, text: object) -> None:
        """Prints text that may be longer than a line. A terminal's lines break between words, a file's do not break.

        No word is cut, so that a path can be copied.
        """
        lines = str(text).splitlines() or [""]
        if self.is_terminal:
            words = textwrap.TextWrapper(max(20, self.width), break_long_words=False, break_on_hyphens=False)
            lines = [part for line in lines for part in words.wrap(line) or [""]]
        self.copyable("\n".join(lines))

    def copyable(self, text: object) -> None:
        """Prints text that is copied as a whole, such as a command: the terminal itself wraps it."""
        self.print(str(text), soft_wrap=True)

    def widened(self, width: int = 120) -> Console:
        """This console, as wide as tables need where it is a file or pipe and has no width of its own."""
        if not self.is_terminal:
            self.width = width
        return self


def plain_table(*titles: str, left: int = 0) -> Table:
    """A table without lines that fits 80 columns, its first columns aligned left and the others right."""
    table = Table(box=None, pad_edge=False, collapse_padding=True)
    for place, title in enumerate(titles):
        table.add_column(title, justify="left" if place < left else "right")
    return table


def is_speaker() -> bool:
    """Whether this process is the one of several (torchrun, accelerate launch) that says what they all would say."""
    return os.environ.get("RANK", "0") == "0"


def print_json(data: object) -> None:
    """Prints JSON on stdout; what a terminal would obey stands there as \\u…, which is the same to a parser."""
    from loraplus.files.single import json_text

    screen()[0].write(json_for_terminal(json_text(data)) + "\n")


def json_lines(rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows as JSON Lines."""
    return "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)


def json_for_terminal(text: str) -> str:
    r"""JSON text that holds no character which a terminal obeys.

    Example:
        >>> json_for_terminal('"\x9b31m"')
        '"\\u009b31m"'
    """
    return _NOT_IN_JSON.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


_narrators: list[Console] = []


def tell(text: str) -> None:
    """Prints a line on standard error; while a terminal is narrated on, above its moving bars."""
    if _narrators and _narrators[-1].is_terminal:
        _narrators[-1].say(text)
    else:
        print(text, file=screen()[1])


@contextmanager
def narrated(console: Console, *, doubts: bool = True) -> Iterator[None]:
    """Shows on a console what loraplus says while it works (its log, level INFO), and not what other libraries print.

    Args:
        console: to show it on.
        doubts: show warnings, too; without them where they stand in the result.
    """
    log = logging.getLogger("loraplus")
    handler = _Lines(console)
    handler.addFilter(lambda record: doubts or record.levelno < logging.WARNING)
    handler.addFilter(lambda record: record.name != "loraplus.proof")  # once a run of a study, and the result has it
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    _narrators.append(console)
    try:
        with without_chatter():
            yield
    finally:
        _narrators.pop()
        log.removeHandler(handler)
        log.setLevel(level)


class _Lines(logging.Handler):
    def __init__(self, console: Console) -> None:
        super().__init__(logging.INFO)
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        self._console.say(f"{'! ' if record.levelno >= logging.WARNING else ''}{record.getMessage()}")
