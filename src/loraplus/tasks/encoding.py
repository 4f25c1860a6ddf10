"""Turns examples into token ids and marks those to learn, as TRL's SFTTrainer does. Errors name the example's line."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase
from trl.chat_template_utils import (
    get_training_chat_template,
    has_generation_markers,
    is_chat_template_stop_token_trained,
)

from loraplus.errors import InputError, LoraPlusWarning
from loraplus.tasks.chat import Chats, ChatTemplateError
from loraplus.tasks.config import ON_ALL, ON_ASSISTANT, ON_COMPLETION
from loraplus.tasks.conversations import COMPLETION, CONVERSATION, Example, LanguageExamples
from loraplus.tasks.generate import ONLY_IDS, ends_texts, text_ids, texts_ids
from loraplus.tasks.target_rows import Encoded


def loss_on(asked: str | None, kind: str) -> str:
    """The tokens to learn: those asked for, else the completion where there is one, else all.

    Raises:
        InputError: data of this kind has no such tokens.
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

    def __init__(self, tokenizer: PreTrainedTokenizerBase, model: str, examples: LanguageExamples, on: str) -> None:
        self._tokenizer, self._chats, self._on, self._template = tokenizer, Chats(tokenizer), on, None
        self._end: Any = None if ends_texts(tokenizer) else tokenizer.eos_token
        if examples.are_chats:
            if not tokenizer.chat_template:
                raise InputError(
                    f"the tokenizer of {model} has no chat template; name a Jinja file with --chat-template, or give "
                    "prompts and completions as strings"
                )
            if on == ON_ASSISTANT:
                self._template = _marking_template(tokenizer, model)

    def __call__(self, rows: Sequence[Example]) -> list[Encoded]:
        """One `Encoded` a row. What needs no chat template is tokenised together, which is quick.

        Raises:
            InputError: the chat template refuses a conversation or marks none of its turns; names the line.
        """
        plain = [row for row in rows if not row.is_chat]
        encoded = iter(self._of_plain(plain) if plain else ())
        return [self._of_chat(row) if row.is_chat else next(encoded) for row in rows]

    def prompt(self, example: Example) -> tuple[list[int], list[int]]:
        """(what a model is given, how the example goes on).

        Given is all before the last assistant turn, the prompt, or the first half of a text.
        """
        whole = list(self([example])[0].ids)
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

    def _of_plain(self, examples: Sequence[Example]) -> list[Encoded]:
        texts = [str(row.prompt) + self._ended(row.text or str(row.completion)) for row in examples]
        wholes = self._tokenizer(texts, **ONLY_IDS)["input_ids"]
        prompts: list[Any] = [()] * len(examples)
        if self._on == ON_COMPLETION:
            prompts = texts_ids(self._tokenizer, [str(row.prompt) for row in examples])
        return list(map(_behind, prompts, wholes))

    def _of_chat(self, example: Example) -> Encoded:
        if not example.messages:
            ids = self._chat(example, [*example.prompt, *example.completion])["input_ids"]
            return _behind(self._prompt_ids(example) if self._on == ON_COMPLETION else (), ids)
        marked = self._on == ON_ASSISTANT
        chat = self._chat(example, example.messages, return_assistant_tokens_mask=marked)
        mask = chat["assistant_masks"] if marked else [1] * len(chat["input_ids"])
        if not any(mask):
            raise InputError(
                f"{example.where}: the chat template marks no token of this conversation as the assistant's"
            )
        return Encoded(chat["input_ids"], mask)

    def _prompt_ids(self, example: Example) -> list[int]:
        if isinstance(example.prompt, str):
            return text_ids(self._tokenizer, example.prompt)
        return self._chat(example, example.prompt, add_generation_prompt=True)["input_ids"]


def _behind(prompt: Sequence[int], whole: Sequence[int]) -> Encoded:
    """Marks everything after the prompt as tokens to learn."""
    start = _shared(prompt, whole)
    return Encoded(whole, [0] * start + [1] * (len(whole) - start))


def _shared(prompt: Sequence[int], whole: Sequence[int]) -> int:
    """The index at which a completion starts: the first where prompt and prompt with completion differ."""
    pairs = enumerate(zip(prompt, whole, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(prompt), len(whole)))


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
