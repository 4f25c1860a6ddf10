"""Which columns are prompt and completion, and how an instruction or a question becomes a prompt.

Columns named `prompt` and `completion` are taken as they stand, as TRL does. Any others hold what a user asks and what
the assistant answers: they become two turns of a chat where the tokenizer has a chat template, else Alpaca's layout

    ### Instruction:
    …

    ### Input:
    …

    ### Response:
    …
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from loraplus.errors import InputError

LITERAL = ("prompt", "completion")
_USUAL = (
    LITERAL, ("instruction", "output"), ("instruction", "response"), ("question", "answer"), ("question", "response"),
    ("query", "response"), ("prompt", "response"), ("input", "output"),
)  # fmt: skip
_CONTEXT = ("input", "context")
"""Columns that Alpaca and Dolly have beside the instruction."""


@dataclass(frozen=True)
class PairColumns:
    """The columns of prompts and completions, and of what belongs to the prompt."""

    prompt: str
    completion: str
    context: str | None = None

    @property
    def is_literal(self) -> bool:
        """Whether prompts and completions are taken as they stand."""
        return (self.prompt, self.completion) == LITERAL

    @property
    def names(self) -> tuple[str, ...]:
        """Those that there are."""
        return tuple(name for name in (self.prompt, self.completion, self.context) if name is not None)

    def shown(self) -> str:
        """ "prompt 'instruction' with 'input', completion 'output'"."""
        beside = f" with {self.context!r}" if self.context else ""
        return f"prompt {self.prompt!r}{beside}, completion {self.completion!r}"


def pair_columns(
    source: str, there: Collection[str], prompt: str | None = None, completion: str | None = None
) -> PairColumns | None:
    """The columns asked for, else those with usual names, whatever their case; None where there are none.

    Args:
        source: of the table, for messages.
        there: columns that hold something.
        prompt, completion: names asked for.

    Raises:
        InputError: a column asked for is missing, or its partner cannot be told.

    Example:
        >>> pair_columns("alpaca.json", ["instruction", "input", "output"]).shown()
        "prompt 'instruction' with 'input', completion 'output'"
    """
    for name, flag in ((prompt, "--prompt-column"), (completion, "--completion-column")):
        if name is not None and name not in there:
            raise InputError(f"{source} has no column {name!r} ({flag}); it has {', '.join(map(repr, there))}")
    by_lower = {name.lower(): name for name in reversed(list(there))}
    for usual in _USUAL:
        pair = PairColumns(prompt or by_lower.get(usual[0], ""), completion or by_lower.get(usual[1], ""))
        if pair.prompt and pair.completion and pair.prompt != pair.completion:
            beside = (by_lower[name] for name in _CONTEXT if name in by_lower)
            if usual[0] != "instruction" or (prompt is not None and completion is not None):
                return pair
            context = next((name for name in beside if name not in (pair.prompt, pair.completion)), None)
            return PairColumns(pair.prompt, pair.completion, context)
    if prompt is not None or completion is not None:
        missing = "--completion-column" if completion is None else "--prompt-column"
        raise InputError(
            f"{source}: which column goes with {prompt or completion!r} cannot be told; name it ({missing})"
        )
    return None


def as_turns(prompt: str, completion: str, context: object) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """A user's turn and an assistant's."""
    asked = f"{prompt}\n\n{context}" if context else prompt
    return [{"role": "user", "content": asked}], [{"role": "assistant", "content": completion}]


def as_text(prompt: str, context: object) -> str:
    """A prompt in Alpaca's layout.

    Example:
        >>> as_text("Add.", "2 + 2")
        '### Instruction:\\nAdd.\\n\\n### Input:\\n2 + 2\\n\\n### Response:\\n'
    """
    beside = f"### Input:\n{context}\n\n" if context else ""
    return f"### Instruction:\n{prompt}\n\n{beside}### Response:\n"
