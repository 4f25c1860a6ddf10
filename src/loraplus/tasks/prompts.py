"""Reads what is to be continued: from a table of texts, prompts or chats, or from a text as it is."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from loraplus.errors import InputError
from loraplus.tasks.columns import choose_text_column
from loraplus.tasks.conversations import MESSAGES_NAMES, messages_of
from loraplus.tasks.generate import Prompt
from loraplus.tasks.table import Table, read_table
from loraplus.tasks.tabular import LONGEST_ROW

PROMPT_NAMES = ("prompt", *MESSAGES_NAMES)


def read_prompts(source: str, column: str | None = None) -> tuple[Table, list[Prompt]]:
    """The prompts of a file: one a line of a .txt file, else one a row.

    Args:
        source: as `read_table` takes.
        column: which. Default: prompt, messages, conversations, or the one with text.

    Returns:
        (table, prompts). A chat that ends with the assistant's turn, as training data do, is cut before it.

    Raises:
        InputError: the file cannot be read, or a row holds no prompt.
    """
    table = read_table(source)
    column = column or next((name for name in PROMPT_NAMES if name in table.columns), None)
    if column is None or column not in table.columns:
        column = choose_text_column(table, column, option="--prompt-column")
    return table, [_prompt(table, index, value) for index, value in enumerate(table.columns[column])]


def read_stdin() -> str:
    """All of standard input as one prompt.

    Raises:
        InputError: nothing is piped in, far too much, or it is not UTF-8 text.
    """
    if sys.stdin is None or sys.stdin.isatty():
        raise InputError("there is nothing to generate from: name a --prompt or --prompts, or pipe a text in")
    try:
        content = sys.stdin.buffer.read(4 * LONGEST_ROW + 1)
        if len(content) > 4 * LONGEST_ROW:
            raise InputError("standard input is too long for a prompt; name a file with --prompts")
        return content.decode("utf-8").rstrip("\n")
    except UnicodeDecodeError:
        raise InputError("standard input is not UTF-8 text") from None


def _prompt(table: Table, index: int, value: object) -> Prompt:
    where = table.place(index)
    if isinstance(value, list):
        return _chat(where, value)
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{where}: the prompt is empty or no text")
    return value


def _chat(where: str, turns: Sequence[Any]) -> Prompt:
    messages = messages_of(turns, where, "the chat") if turns else []
    if messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages:
        raise InputError(f"{where}: the chat has no turn to answer")
    return messages


def shown(prompt: Prompt) -> str:
    """A prompt as a reader would see it: a chat by its last turn."""
    return prompt if isinstance(prompt, str) else str(prompt[-1].get("content", ""))
