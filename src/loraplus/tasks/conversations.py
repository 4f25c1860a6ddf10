"""Turns a table into conversations, prompts with completions, or texts, and checks that each is complete.

The columns are those of TRL: `messages`, a list of {"role", "content"}; `prompt` and `completion`, both strings or both
lists of messages; or a text. `conversations`, with "from" and "value" too, is read as `messages`; instructions and
questions with their answers become prompts with completions (`instructions.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from loraplus.errors import InputError
from loraplus.files.parsing import ParseError, parse_json
from loraplus.tasks.columns import TEXT_NAMES, choose_text_column, strings
from loraplus.tasks.instructions import LITERAL, PairColumns, as_text, as_turns, pair_columns
from loraplus.tasks.streamed import Labels, Made
from loraplus.tasks.table import Table

CONVERSATION, COMPLETION, TEXT = "conversation", "prompt and completion", "text"
MESSAGES_NAMES = ("messages", "conversations")
_ROLES = {"human": "user", "gpt": "assistant"}  # as ShareGPT calls them

Message = dict[str, Any]


@dataclass(frozen=True)
class Example:
    """One example: a list of messages, a prompt with its completion, or a text; `where` names its file and line."""

    where: str
    messages: Sequence[Message] = ()
    prompt: str | Sequence[Message] = ""
    completion: str | Sequence[Message] = ""
    text: str = ""
    tools: Any = None

    @property
    def is_chat(self) -> bool:
        """Whether a chat template is needed."""
        return bool(self.messages) or not isinstance(self.prompt, str)

    @property
    def content(self) -> str:
        """All of its text, for finding examples that stand in the data twice."""
        parts = [*self.messages, self.prompt, self.completion, self.text]
        return "\n".join(_content(part) for part in parts if part)

    @property
    def asked(self) -> str:
        """All before the last answer of a chat, or the prompt, as a reader would see it; empty for a text."""
        turns = [i for i, turn in enumerate(self.messages) if turn["role"] == "assistant"]
        given = self.messages[: turns[-1]] if turns else self.prompt
        return given if isinstance(given, str) else "\n".join(_content(turn).strip() for turn in given)


def _content(part: Any) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping):
        return f"{part['role']}: {part.get('content') or ''} {part.get('tool_calls') or ''}"
    return "\n".join(map(_content, part))


@dataclass(frozen=True)
class LanguageExamples:
    """Examples of one kind, made from the table when they are read. `are_chats`: one of them needs a chat template."""

    kind: str
    rows: Made[Example]
    are_chats: bool = False
    columns: str = ""
    """Which columns were taken, in words."""

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def labels(self) -> Labels:
        """One for all: there are no classes."""
        return Labels([""], np.zeros(len(self), np.int32))

    def contents(self) -> Iterator[str]:
        """The text of each."""
        return (row.content for row in self.rows)

    def take(self, rows: np.ndarray) -> LanguageExamples:
        """Those of some rows (n,), in that order."""
        return replace(self, rows=self.rows.take(rows))


@dataclass(frozen=True)
class NamedColumns:
    """The columns that a user names; those that are None are guessed."""

    text: str | None = None
    messages: str | None = None
    prompt: str | None = None
    completion: str | None = None


def read_examples(
    table: Table, task: str, text_column: str | None = None, *, named: NamedColumns | None = None, as_chat: bool = False
) -> LanguageExamples:
    """The examples of a table, checked one by one.

    Args:
        table: from `read_table`.
        task: sft takes conversations, prompts with completions, or texts; lm takes texts.
        text_column: takes the texts of this column, whatever else there is.
        named: columns to take, `text_column` among them.
        as_chat: make turns of a chat of instructions and questions; else text.

    Raises:
        InputError: columns are missing, hold two kinds, or a row is not whole; the message names its line.

    Example:
        >>> table = Table("chat.jsonl", {"prompt": ["2 + 2 ="], "completion": [" 4"]}, lines=[1])
        >>> read_examples(table, "sft").rows[0].completion
        ' 4'
    """
    named = named or NamedColumns(text=text_column)
    chosen = None if task == "lm" or named.text is not None else _found(table, named)
    if chosen is None:
        column = choose_text_column(table, named.text)
        texts = strings(table, "text", column)
        rows = Made(lambda i, text: Example(table.place(i), text=text), (range(len(table)), texts))
        return LanguageExamples(TEXT, rows, columns=f"text {column!r}")
    if isinstance(chosen, str):
        kind, names, shown = CONVERSATION, [chosen], f"messages {chosen!r}"
    else:
        kind, names, shown = COMPLETION, list(chosen.names), chosen.shown()
    names += ["tools"] if "tools" in table.columns else []
    make: Any = partial(_conversation, names[0]) if isinstance(chosen, str) else _pair
    if isinstance(chosen, PairColumns) and not chosen.is_literal:
        make = partial(_instruction, chosen, as_chat, names)
    columns = [table.columns[name] for name in names]
    rows = Made(lambda i, *cells: make(table.place(i), *cells), (range(len(table)), *columns))
    return LanguageExamples(
        kind, rows, are_chats=sum(row.is_chat for row in rows) > 0, columns=shown
    )  # looks at all, which checks all


def _messages_column(table: Table) -> str | None:
    """The column that holds conversations, if one does."""
    return next((name for name in MESSAGES_NAMES if any(v is not None for v in table.columns.get(name, ()))), None)


def _found(table: Table, named: NamedColumns) -> str | PairColumns | None:
    """The column of conversations, or those of prompts with completions; None where there is a text."""
    columns = table.columns
    if named.messages is not None:
        if named.messages not in columns:
            raise InputError(
                f"{table.source} has no column {named.messages!r} (--messages-column); it has "
                f"{', '.join(map(repr, columns))}"
            )
        return named.messages
    there = {name: None for name, values in columns.items() if any(value is not None for value in values)}
    asked = named.prompt is not None or named.completion is not None
    chats = None if asked else _messages_column(table)
    if chats and there.keys() >= set(LITERAL):  # with a prompt alone, as UltraChat has, there is one thing to learn
        first = {
            name: next(i for i, value in enumerate(columns[name]) if value is not None) for name in (chats, *LITERAL)
        }
        places = ", ".join(f"{name!r} first in {table.row_name(i)}" for name, i in first.items())
        raise InputError(
            f"{table.source} mixes conversations with prompts and completions ({places}); give each a file of its own"
        )
    if chats:
        return chats
    if pair := pair_columns(table.source, there, named.prompt, named.completion):
        return pair
    if missing := [name for name in LITERAL if name not in there]:
        if len(missing) == 1:
            (other,) = set(LITERAL) - set(missing)
            raise InputError(
                f"{table.source} has a column {other!r} but nothing in a column {missing[0]!r}; "
                f"--{missing[0]}-column names another"
            )
        if not any(name.lower() in TEXT_NAMES for name in there):
            raise InputError(
                f"{table.source}: --task sft needs a column 'messages', or 'prompt' and 'completion', or a text; name "
                "them with --messages-column, --prompt-column and --completion-column, or --text-column; it has "
                f"{', '.join(map(repr, columns))}"
            )
    return None


def _tools(value: object, where: str) -> Any:
    """The tools of an example, which stand in some data as JSON text."""
    if isinstance(value, str):
        try:
            value = parse_json(value) if value.strip() else None
        except ParseError as error:
            raise InputError(f"{where}: the tools are a string that is {error}") from None
    if value is not None and not isinstance(value, (list, tuple)):
        raise InputError(f"{where}: the tools are a {type(value).__name__}, expected a list")
    return _without_none(value)


def _without_none(value: object) -> Any:
    """Leaves out empty fields at any depth: columnar files fill them in."""
    if isinstance(value, Mapping):
        return {key: _without_none(inner) for key, inner in value.items() if inner is not None}
    return [_without_none(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def _conversation(name: str, where: str, cell: object, tools: object = None) -> Example:
    tools = _tools(tools, where)
    messages = messages_of(cell, where, name)
    _check_assistant(messages, where, "the conversation")
    return Example(where=where, messages=messages, tools=tools)


def _instruction(columns: PairColumns, as_chat: bool, names: Sequence[str], where: str, *cells: Any) -> Example:
    """What is asked and what is answered, as turns or as text; both may be lists of messages already."""
    row = dict(zip(names, cells, strict=True))
    prompt, completion, context = row[columns.prompt], row[columns.completion], row.get(columns.context or "")
    pair = _pair(where, prompt, completion, row.get("tools"), names=(columns.prompt, columns.completion))
    if not isinstance(prompt, str):
        return pair
    if context is not None and not isinstance(context, str):
        raise InputError(f"{where}: the {columns.context} is a {type(context).__name__}, expected a string")
    context = (context or "").strip()
    if as_chat:
        asked, answered = as_turns(prompt, completion, context)
        return replace(pair, prompt=asked, completion=answered)
    return replace(pair, prompt=as_text(prompt, context))


def _pair(where: str, prompt: Any, completion: Any, tools: Any = None, *, names: tuple[str, str] = LITERAL) -> Example:
    tools = _tools(tools, where)
    for name, value in zip(names, (prompt, completion), strict=True):
        if value is None or (
            isinstance(value, (str, list)) and not (value.strip() if isinstance(value, str) else value)
        ):
            raise InputError(f"{where}: the {name} is empty; fill or remove the line")
        if not isinstance(value, (str, list)):
            raise InputError(
                f"{where}: the {name} is a {type(value).__name__}, expected a string or a list of messages"
            )
    if isinstance(prompt, str) != isinstance(completion, str):
        raise InputError(f"{where}: {names[0]} and {names[1]} must both be strings or both be lists of messages")
    if not isinstance(prompt, str):
        prompt, completion = messages_of(prompt, where, names[0]), messages_of(completion, where, names[1])
        _check_assistant(completion, where, "the completion")
    return Example(where=where, prompt=prompt, completion=completion, tools=tools)


def messages_of(value: object, where: str, name: str) -> list[Message]:
    """A cell as messages.

    Args:
        value: of the cell.
        where: it stands, for messages.
        name: of its column.

    Returns:
        Messages with "role" and "content", without the empty fields that columnar files fill in.

    Raises:
        InputError: it is no list of such messages.
    """
    if value is None:
        raise InputError(f"{where}: there are no {name}; fill or remove the line")
    if not isinstance(value, (list, tuple)):
        raise InputError(
            f'{where}: {name} is a {type(value).__name__}, expected a list like [{{"role": "user", "content": …}}, …]'
        )
    if not value:
        raise InputError(f"{where}: {name} is an empty list; fill or remove the line")
    return [_message(turn, f"{where}, message {number}") for number, turn in enumerate(value, start=1)]


def _message(turn: object, where: str) -> Message:
    if not isinstance(turn, Mapping):
        raise InputError(f'{where}: expected {{"role": …, "content": …}}, found a {type(turn).__name__}')
    message = _without_none(turn)
    if "from" in message and "role" not in message:
        role = message["from"]
        message = {"role": _ROLES.get(role, role) if isinstance(role, str) else role, "content": message.get("value")}
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        raise InputError(f"{where}: it has no role (user, assistant, system, …)")
    if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
        what = "missing" if content is None else f"a {type(content).__name__}, expected a string"
        raise InputError(f"{where}: the content is {what}")
    return message


def _check_assistant(messages: Sequence[Message], where: str, what: str) -> None:
    turns = [(number, turn) for number, turn in enumerate(messages, start=1) if turn["role"] == "assistant"]
    if not turns:
        raise InputError(
            f"{where}: {what} has no assistant turn, so there is nothing to learn; add one or remove the line"
        )
    for number, turn in turns:
        if not (turn.get("content") or "").strip() and not turn.get("tool_calls"):
            raise InputError(f"{where}, message {number}: the assistant turn is empty; fill or remove it")
