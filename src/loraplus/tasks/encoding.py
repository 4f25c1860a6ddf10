"""From examples to token ids and labels, as TRL's SFTTrainer makes them; errors name the line of the example."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase
from trl.chat_template_utils import (
    get_training_chat_template,
    has_generation_markers,
    is_chat_template_stop_token_trained,
)

from loraplus.errors import InputError, LoraPlusWarning
from loraplus.tasks.chat import Chats, ChatTemplateError
from loraplus.tasks.config import CUT, DROP, ON_ALL, ON_ASSISTANT, ON_COMPLETION, SPLIT
from loraplus.tasks.conversations import COMPLETION, CONVERSATION, TEXT, Example, Examples
from loraplus.tasks.generate import ends_texts, text_ids

IGNORED = -100


@dataclass(frozen=True)
class Encoded:
    """Token ids, and labels: the id where the loss is, -100 elsewhere. The first token is never a target."""

    ids: list[int]
    labels: list[int]

    @property
    def targets(self) -> int:
        """Tokens that the loss is on."""
        return sum(label != IGNORED for label in self.labels)


def loss_on(asked: str | None, kind: str) -> str:
    """The tokens to learn: those asked for, else the completion where there is one, else all.

    Raises:
        InputError: not to be had in data of this kind.
    """
    if asked is None:
        return ON_COMPLETION if kind == COMPLETION else ON_ALL
    if asked == ON_COMPLETION and kind != COMPLETION:
        raise InputError(
            f"--loss-on completion needs columns prompt and completion, but the data is of the kind {kind}"
        )
    if asked == ON_ASSISTANT and kind != CONVERSATION:
        raise InputError(f"--loss-on assistant needs conversations, but the data is of the kind {kind}")
    return asked


class Encoder:
    """Encodes the examples of one kind.

    Args:
        tokenizer: with the chat template to use.
        model: name, for messages.
        examples: that will be encoded; only their kind matters, and whether they are chats.
        on: from `loss_on`.

    Raises:
        InputError: the tokenizer has no chat template, or one that does not mark assistant turns where these are
            asked for and that TRL does not know how to mark.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, model: str, examples: Examples, on: str) -> None:
        self._tokenizer, self._chats, self._on, self._template = tokenizer, Chats(tokenizer), on, None
        self._end: Any = None if ends_texts(tokenizer) else tokenizer.eos_token
        if any(example.is_chat for example in examples.rows):
            if not tokenizer.chat_template:
                raise InputError(
                    f"the tokenizer of {model} has no chat template; name a Jinja file with --chat-template, or give "
                    "prompts and completions as strings"
                )
            if on == ON_ASSISTANT:
                self._template = _marking_template(tokenizer, model)

    def __call__(self, rows: Sequence[Example]) -> list[Encoded]:
        """One `Encoded` a row.

        Raises:
            InputError: the chat template refuses a conversation or marks none of its turns; names the line.
        """
        texts = [self._ended(row.text) for row in rows if row.text]
        ids = self._tokenizer(texts, verbose=False)["input_ids"] if texts else []
        if texts:
            return [_encoded(row, [1] * len(row)) for row in ids]
        return [self._conversation(row) if row.messages else self._pair(row) for row in rows]

    def prompt(self, example: Example) -> tuple[list[int], list[int]]:
        """(what a model is given, how the example goes on).

        Given is all before the last assistant turn, the prompt, or the first half of a text.
        """
        whole = self([example])[0].ids
        if example.messages:
            last = max(i for i, turn in enumerate(example.messages) if turn["role"] == "assistant")
            given = self._chat(example, example.messages[:last], add_generation_prompt=True)["input_ids"]
            whole = self._chat(example, example.messages[: last + 1])["input_ids"]
        elif example.text:
            given = whole[: max(1, len(whole) // 2)]
        else:
            given = self._prompt_ids(example)
        return given, whole[_shared(given, whole) :]

    def _ended(self, text: str) -> str:
        return text if self._end is None or text.endswith(self._end) else text + self._end

    def _chat(self, example: Example, messages: Sequence[Any], **options: Any) -> Any:
        try:
            return self._chats.apply_chat_template(
                list(messages), chat_template=self._template, tools=example.tools, **options
            )
        except ChatTemplateError as error:
            if error.line is not None:
                raise InputError(f"the chat template, line {error.line}: not valid Jinja ({error})") from None
            raise InputError(f"{example.where}: the chat template refuses this conversation: {error}") from None

    def _conversation(self, example: Example) -> Encoded:
        marked = self._on == ON_ASSISTANT
        chat = self._chat(example, example.messages, return_assistant_tokens_mask=marked)
        mask = chat["assistant_masks"] if marked else [1] * len(chat["input_ids"])
        if not any(mask):
            raise InputError(
                f"{example.where}: the chat template marks no token of this conversation as the assistant's"
            )
        return _encoded(chat["input_ids"], mask)

    def _prompt_ids(self, example: Example) -> list[int]:
        if isinstance(example.prompt, str):
            return text_ids(self._tokenizer, example.prompt)
        return self._chat(example, example.prompt, add_generation_prompt=True)["input_ids"]

    def _pair(self, example: Example) -> Encoded:
        if isinstance(example.prompt, str) and isinstance(example.completion, str):
            ids = self._tokenizer(example.prompt + self._ended(example.completion), verbose=False)["input_ids"]
        else:
            ids = self._chat(example, [*example.prompt, *example.completion])["input_ids"]
        start = _shared(self._prompt_ids(example), ids) if self._on == ON_COMPLETION else 0
        return _encoded(ids, [0] * start + [1] * (len(ids) - start))


def _shared(prompt: Sequence[int], whole: Sequence[int]) -> int:
    """Where a completion starts: where its prompt, and prompt with completion, first differ."""
    pairs = enumerate(zip(prompt, whole, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(prompt), len(whole)))


def _encoded(ids: Sequence[int], mask: Sequence[int]) -> Encoded:
    labels = [token if wanted else IGNORED for token, wanted in zip(ids, mask, strict=True)]
    return Encoded(list(ids), [IGNORED, *labels[1:]])


def _marking_template(tokenizer: PreTrainedTokenizerBase, model: str) -> str | None:
    """A template that marks what the assistant says; None if it is the tokenizer's own."""
    own: Any = tokenizer.chat_template
    template = None
    if not has_generation_markers(own):
        try:
            template = get_training_chat_template(tokenizer)
        except ValueError:
            raise InputError(
                f"--loss-on assistant: the chat template of {model} does not mark assistant turns with "
                "{% generation %}, and TRL knows no version of it that does; give one with --chat-template"
            ) from None
    try:
        stops = is_chat_template_stop_token_trained(Chats(tokenizer), chat_template=template)  # type: ignore[arg-type]
    except (ChatTemplateError, TypeError):  # the template refuses TRL's example; the data will tell
        return template
    if not stops:
        warnings.warn(
            f"the chat template of {model} leaves the end of a turn out of its {{% generation %}} marks, so the model "
            "does not learn to stop",
            LoraPlusWarning,
            stacklevel=2,
        )
    return template


@dataclass(frozen=True)
class Fitted:
    """Examples within the length, and what became of those that were longer.

    Args:
        rows: to train or evaluate on.
        longer: examples that were longer.
        cut: tokens that were cut off.
        dropped: examples that were left out: longer ones, or those with no target left.
    """

    rows: list[Encoded]
    longer: int
    cut: int
    dropped: int


def fit(examples: Sequence[Encoded], length: int, how: str) -> Fitted:
    """Holds examples to a length.

    Args:
        examples: of any length.
        length: most tokens.
        how: cut the end off, drop the example, or split it into parts. Parts overlap by one token, so that every
            token but the first is still predicted.

    Example:
        >>> [row.ids for row in fit([Encoded([1, 2, 3, 4, 5], [-100, 2, 3, 4, 5])], 3, "split").rows]
        [[1, 2, 3], [3, 4, 5]]
    """
    rows: list[Encoded] = []
    longer = cut = dropped = 0
    for example in examples:
        parts = [example]
        if len(example.ids) > length:
            longer += 1
            parts = [] if how == DROP else _parts(example, length, first_only=how == CUT)
            cut += len(example.ids) - length if how == CUT else 0
        kept = [part for part in parts if part.targets]
        dropped += not kept
        rows += kept
    return Fitted(rows, longer, cut, dropped)


def _parts(example: Encoded, length: int, *, first_only: bool) -> list[Encoded]:
    starts = [0] if first_only else range(0, len(example.ids) - 1, length - 1)
    return [
        Encoded(example.ids[start : start + length], [IGNORED, *example.labels[start + 1 : start + length]])
        for start in starts
    ]


def longest_of(examples: Sequence[Encoded]) -> int:
    """Tokens of the longest example."""
    return max(len(example.ids) for example in examples)


def how_to_fit(asked: str | None, task: str, kind: str) -> str:
    """What is done with longer examples: what was asked for, else lm splits and sft cuts.

    Raises:
        InputError: a split of something other than text.
    """
    if asked is None:
        return SPLIT if task == "lm" else CUT
    if asked == SPLIT and kind != TEXT:
        raise InputError(f"--long-examples split is for texts, but the data is of the kind {kind}")
    return asked
