"""Makes bad input: bytes of a good file changed, and text of the right kind with strange things in it."""

from __future__ import annotations

import json
from collections.abc import Callable

from hypothesis import strategies as st

SCRIPT = b"<script>alert(1)</script>"
HUGE = (b"9" * 401, b"9" * 5000, b"1e400", b"-1", b"NaN", b"Infinity", b"null", b"true", b'""', b'"x"', b"[]", b"{}")
STRANGE = (
    b"\x00", b"\xff\xfe", b"\xed\xa0\x80", b"\x1b[31m", b"[/b]", b"[red]", "\u202e".encode(), b"\\ud800", b'"', b"\n",
    b"\r", b"\t", b",", b"{" * 300, b"[" * 300, b"[" * 100_000, b"(.*)*", b"../../", b"~nobody", SCRIPT, b"%s",
    b"&a *a", b"!!python/object/apply:os.system [id]", b"{{ 9**9 }}", b"{% for i in range(99999) %}", b"a" * 3000,
)  # fmt: skip


def _at(content: bytes, part: float) -> int:
    return int(part * len(content))


def flip(content: bytes, part: float, length: int, payload: bytes) -> bytes:
    """One bit."""
    if not content:
        return payload
    place = min(_at(content, part), len(content) - 1)
    return content[:place] + bytes([content[place] ^ (1 << length % 8)]) + content[place + 1 :]


def cut(content: bytes, part: float, length: int, payload: bytes) -> bytes:
    """The end, or a piece."""
    place = _at(content, part)
    return content[:place] if length % 2 else content[:place] + content[place + length :]


def insert(content: bytes, part: float, length: int, payload: bytes) -> bytes:
    """Something strange."""
    place = _at(content, part)
    return content[:place] + payload + content[place:]


def replace(content: bytes, part: float, length: int, payload: bytes) -> bytes:
    """Something strange over what was there."""
    place = _at(content, part)
    return content[:place] + payload + content[place + length :]


def repeat(content: bytes, part: float, length: int, payload: bytes) -> bytes:
    """A piece, many times."""
    place = _at(content, part)
    return content[:place] + content[place : place + length % 64 + 1] * 50 + content[place:]


def swap(content: bytes, part: float, length: int, payload: bytes) -> bytes:
    """Two pieces for each other."""
    place = _at(content, part)
    return content[place : place + length] + content[:place] + content[place + length :]


def number(content: bytes, part: float, length: int, payload: bytes) -> bytes:
    """The value behind the next colon, as JSON and YAML have it."""
    colon = content.find(b":", _at(content, part))
    if colon < 0:
        return insert(content, part, length, payload)
    end = min((place for stop in (b",", b"\n", b"}") if (place := content.find(stop, colon)) > 0), default=len(content))
    return content[: colon + 1] + b" " + HUGE[length % len(HUGE)] + content[end:]


Change = Callable[[bytes, float, int, bytes], bytes]
CHANGES: tuple[Change, ...] = (flip, flip, cut, insert, replace, repeat, swap, number, number)

_payloads = st.one_of(st.sampled_from(STRANGE), st.sampled_from(HUGE), st.binary(min_size=1, max_size=40))
_parts = st.floats(0, 1)
changes = st.lists(st.tuples(st.sampled_from(CHANGES), _parts, st.integers(0, 400), _payloads), min_size=1, max_size=3)
"""What is done to a file, one after the other."""


def changed(content: bytes, plan: list[tuple[Change, float, int, bytes]]) -> bytes:
    """The file after all changes of a plan."""
    for change, part, length, payload in plan:
        content = change(content, part, length, payload)
    return content


_words = st.sampled_from(
    ["text", "label", "messages", "prompt", "completion", "role", "content", "user", "assistant", "tools", "a", "", "0",
     "1.0", "[/b]", "\x1b[0m", "\u202e", "é", "lr", "model", "data", "output", "task", "yes", "null", "2001-01-01"]
)  # fmt: skip
_leaves = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), _words, st.text(max_size=8), st.just(10**400),
    st.just("x" * 2000),
)  # fmt: skip
_values = st.recursive(
    _leaves,
    lambda inside: st.one_of(st.lists(inside, max_size=4), st.dictionaries(_words, inside, max_size=4)),
    max_leaves=8,
)
json_texts = st.lists(st.dictionaries(_words, _values, max_size=4), max_size=6).map(
    lambda rows: "\n".join(json.dumps(row) for row in rows).encode()
)
"""JSON Lines: objects of the right words and any values."""
yaml_texts = st.lists(st.tuples(_words, st.one_of(_words, _leaves.map(str), st.text(max_size=12))), max_size=6).map(
    lambda rows: "\n".join(f"{key}: {value}" for key, value in rows).encode("utf-8", "surrogatepass")
)
"""Lines of a configuration."""
separated_texts = st.lists(
    st.lists(st.one_of(_words, st.text(max_size=6), st.sampled_from(['"', '""', '"a', "a\nb", ",", "\t"])), max_size=4),
    max_size=6,
).map(lambda rows: "\n".join(",".join(row) for row in rows).encode("utf-8", "surrogatepass"))
"""Rows of a CSV file, badly quoted."""
