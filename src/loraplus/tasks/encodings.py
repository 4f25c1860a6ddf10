"""The encoding of a text file: as named, by its first bytes, UTF-8, or a guess that is reported.

A guess is never silent: text read in the wrong encoding trains as well as any other.
"""

from __future__ import annotations

import codecs
import importlib
import io
from pathlib import Path
from typing import Any

from loraplus.errors import InputError
from loraplus.tasks.tabular import LineError

UTF_8 = "utf-8-sig"
_CHUNK = 2**20
_SAMPLE = 2**16  # bytes that a guess is made from
MARKS = {
    codecs.BOM_UTF8: UTF_8,
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16, whose mark it begins with
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
"""Byte order marks that text may begin with."""
_COMMON = "cp1252"
_OF_WINDOWS = (_COMMON, "cp1250", "cp1251", "cp1253", "cp1254", "cp932", "cp949", "gb18030", "big5")
"""What Windows programs write beside Unicode, by region."""


def encoding_of(source: str, path: Path, asked: str | None = None) -> str:
    """The encoding to read a text file in.

    Args:
        source: name of the file, for messages.
        path: of the file.
        asked: by --encoding; taken as it is.

    Returns:
        A name that `open` takes; "utf-8-sig" for UTF-8.

    Raises:
        InputError: there is no such encoding, or the text is in none that can be told.
    """
    if asked is not None:
        return checked_encoding(asked)
    with path.open("rb") as file:
        start = file.read(_SAMPLE)
    for mark, name in MARKS.items():
        if start.startswith(mark):
            return name
    if b"\0" in start:
        raise InputError(f"{source} holds zero bytes; if it is UTF-16, say --encoding utf-16-le (or utf-16-be)")
    bad = _first_bad_byte(path)
    return UTF_8 if bad is None else _guessed(source, path, *bad)


def checked_encoding(name: str) -> str:
    """The name of an encoding of text, if there is such a one.

    Raises:
        InputError: Python knows none of this name.
    """
    try:
        io.TextIOWrapper(io.BytesIO(), encoding=name)  # which some codecs, of no text, are not taken for
    except (LookupError, ValueError):
        raise InputError(f"--encoding: there is no encoding {name!r}; utf-8, utf-16, cp1252 are some") from None
    return UTF_8 if codecs.lookup(name).name == "utf-8" else name


def line_of_bad_byte(path: Path) -> int | None:
    """The line of the first byte that is no UTF-8, if there is one."""
    bad = _first_bad_byte(path)
    return None if bad is None else bad[1]


def _first_bad_byte(path: Path) -> tuple[int, int, bool] | None:
    """(offset, line, whether other letters beyond ASCII stand before it) of the first byte that is no UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    line, offset, letters = 1, 0, False
    with path.open("rb") as file:
        while True:
            chunk = file.read(_CHUNK)
            try:
                text = decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                before = error.object[: error.start]
                pending = len(error.object) - len(chunk)  # of the chunk before
                return (
                    offset - pending + error.start,
                    line + before.count(b"\n"),
                    letters or not before.isascii(),
                )
            line += text.count("\n")
            letters = letters or not text.isascii()
            offset += len(chunk)
            if not chunk:
                return None


def _guessed(source: str, path: Path, offset: int, line: int, has_letters: bool) -> str:
    """A guess by charset-normalizer, from the bytes around the first that is no UTF-8."""
    if has_letters:  # what is UTF-8 up to here is damaged, not of another encoding
        raise LineError(source, line, "not UTF-8 text; convert the file to UTF-8, or name what it is with --encoding")
    try:
        normalizer: Any = importlib.import_module("charset_normalizer")
    except ImportError:
        raise LineError(
            source,
            line,
            "not UTF-8 text; name what it is, such as --encoding cp1252, or have it guessed: "
            'pip install "loraplus[cli]" (charset-normalizer)',
        ) from None
    with path.open("rb") as file:
        file.seek(max(0, offset - _SAMPLE // 2))
        sample = file.read(_SAMPLE)
    matches = list(normalizer.from_bytes(sample, cp_isolation=list(_OF_WINDOWS)))
    if not matches:
        raise LineError(source, line, "not UTF-8 text, and in no encoding that can be told; name it with --encoding")
    # Encodings of one family often read as well as each other; the commonest is then the likeliest.
    as_good = [name for match in matches if match.chaos <= matches[0].chaos for name in match.could_be_from_charset]
    return _COMMON if _COMMON in as_good else str(matches[0].encoding)
