"""Turns conversations into tokens by a chat template, as transformers' `apply_chat_template` does, within limits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from loraplus.tasks.sandbox import RefusedError, render_chat


class ChatTemplateError(ValueError):
    """Why a chat template refuses a conversation. `line` is set where the template itself is not valid."""

    def __init__(self, reason: str, line: int | None = None) -> None:
        super().__init__(reason)
        self.line = line


class Chats:
    """A tokenizer whose chat template runs elsewhere, in a process that can be stopped.

    It has the tokenizer's other attributes, so that it can take its place.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def text(self, messages: Sequence[Any], **options: Any) -> str:
        """The conversation as the template writes it."""
        return self._rendered(messages, **options)[0]

    def apply_chat_template(
        self,
        conversation: Sequence[Any],
        *,
        chat_template: str | None = None,
        tools: object = None,
        add_generation_prompt: bool = False,
        return_assistant_tokens_mask: bool = False,
        tokenize: bool = True,
        return_dict: bool = True,
    ) -> dict[str, list[int]]:
        """{"input_ids"}, and where the assistant's tokens are asked for {"assistant_masks"}: 1 on those.

        Args:
            conversation: messages.
            chat_template: instead of the tokenizer's own.
            tools: that the template may name.
            add_generation_prompt: end with the beginning of the assistant's turn.
            return_assistant_tokens_mask: the template marks them with {% generation %}.
            tokenize, return_dict: as they are.

        Raises:
            ChatTemplateError: the template is not valid, refuses the conversation, or takes too long.
        """
        text, spans = self._rendered(
            conversation,
            chat_template=chat_template,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            return_assistant_tokens_mask=return_assistant_tokens_mask,
        )
        encoded = self._tokenizer(text, add_special_tokens=False, verbose=False)
        tokens = {"input_ids": encoded["input_ids"]}
        if return_assistant_tokens_mask:
            if not encoded.encodings:
                raise ChatTemplateError("its tokenizer does not say where in the text a token stands")
            tokens["assistant_masks"] = _marked(encoded.encodings[0].offsets, spans)
        return tokens

    def _rendered(
        self, messages: Sequence[Any], *, chat_template: str | None = None, tools: Any = None, **options: object
    ) -> tuple[str, list[list[int]]]:
        try:
            template = self._tokenizer.get_chat_template(chat_template, tools)
            special = self._tokenizer.special_tokens_map
            return render_chat(template, messages, tools=tools, **options, **special)
        except RefusedError as error:
            raise ChatTemplateError(str(error), error.line) from None
        except ValueError as error:  # several templates, and none for this
            raise ChatTemplateError(str(error)) from None


def _marked(offsets: Sequence[tuple[int, int]], spans: Sequence[Sequence[int]]) -> list[int]:
    """1 for every token that overlaps a span; both are in order."""
    mask = [0] * len(offsets)
    current = 0
    for token, (start, end) in enumerate(offsets):
        while current < len(spans) and start >= spans[current][1]:
            current += 1
        if current == len(spans):
            break
        mask[token] = int(end > spans[current][0])
    return mask
