"""The program of `sandbox`: answers requests one at a time, each within limits on time and memory.

It imports nothing of loraplus, so that it starts fast. A request that takes too long ends the process, whatever it is
doing: matching a pattern or raising a number to a power is one call that no exception interrupts. If native code
crashes on a damaged file, this process ends and not the user's.
"""

from __future__ import annotations

import importlib
import json
import pickle
import re
import signal
import struct
import sys
from typing import Any, BinaryIO, cast

SECONDS = 2.0
"""Most processor time for one request."""
MEMORY = 2**30
LONGEST = 2**24
"""Most characters that a template may make of a chat."""
_SHORT = 64
"""Bytes of a value so small that it may be repeated in any number of rows."""
_FORMS = ("{}", r"(.*\.)?({})$", r"(^|.*\.){}($|\..*)")  # as PEFT matches target_modules, rank_pattern, modules_to_save


def patterns(expressions: list[str], names: list[str]) -> None:
    """Matches every expression with every name in all the ways that PEFT does."""
    for expression in expressions:
        for form in _FORMS:
            compiled = re.compile(form.format(expression) if form != "{}" else expression)
            for name in names:
                compiled.fullmatch(name)
                compiled.match(name)
                compiled.search(name)


def chat(options: dict[str, Any]) -> tuple[str, list[tuple[int, int]]]:
    """(a conversation in the words of a chat template, where the assistant's parts stand in it)"""
    from transformers.utils.chat_template_utils import render_jinja_template

    texts, spans = cast(Any, render_jinja_template(**options))
    if len(texts[0]) > LONGEST:
        raise ValueError(f"it makes more than {LONGEST:,} characters of it")
    return texts[0], spans[0] if spans else []


def parquet(path: str) -> dict[str, Any]:
    """Facts of a Parquet file. Arrow ends the process that asks a damaged file for them, so this one asks.

    Returns:
        "values": in all columns. "dictionaries": the columns of text that can be read as dictionaries, by name.
        "repeats": whether another column can hold a large value once and have it in many rows.
    """
    from pyarrow.parquet import read_metadata

    facts = read_metadata(path)
    values, text, other = 0, set(), set()
    for group in map(facts.row_group, range(facts.num_row_groups)):
        for index, column in enumerate(map(group.column, range(group.num_columns))):
            values += column.num_values
            if "DELTA_BYTE_ARRAY" in column.encodings or facts.schema.column(index).length > _SHORT:
                other.add(column.path_in_schema)
            elif column.physical_type == "BYTE_ARRAY":
                text.add(column.path_in_schema)
    return {"values": values, "dictionaries": sorted(text - other), "repeats": bool(other)}


_ANSWERS: dict[str, Any] = {"patterns": patterns, "chat": chat, "parquet": parquet}
_IMPORTS = {"chat": "transformers.utils.chat_template_utils", "parquet": "pyarrow.parquet"}


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answers until there are no more requests; what comes in is the parent's own, what goes out is plain JSON."""
    while len(head := requests.read(8)) == 8:
        kind, arguments, seconds = pickle.loads(requests.read(*struct.unpack("<Q", head)))
        if kind in _IMPORTS:
            importlib.import_module(_IMPORTS[kind])  # takes longer than a request may
        answer: dict[str, Any]
        _limit(seconds)
        try:
            answer = {"result": _ANSWERS[kind](*arguments)}
        except MemoryError:
            sys.exit(1)  # as one that takes too long: where there is no limit, it would fill the memory
        except Exception as error:
            answer = {"error": _said(error), "line": getattr(error, "lineno", None)}
        _limit(0)
        body = json.dumps(answer).encode()
        answers.write(struct.pack("<Q", len(body)) + body)
        answers.flush()


def _said(error: Exception) -> str:
    lines = str(getattr(error, "message", None) or error)[:10_000].strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _limit(seconds: float) -> None:
    """Ends this process after so much processor time, and refuses it more memory than it has with `MEMORY`."""
    if not hasattr(signal, "setitimer"):  # Windows: the parent's own limit is all
        return
    import resource

    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = _memory_in_use() + MEMORY if seconds else hard
    resource.setrlimit(resource.RLIMIT_AS, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def _memory_in_use() -> int:
    import resource

    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[0]) * resource.getpagesize()
    except OSError:
        return 2**33


if __name__ == "__main__":
    serve(sys.stdin.buffer, sys.stdout.buffer)
