"""Text from a causal language model, with or without an adapter on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from loraplus.errors import InputError
from loraplus.tasks.chat import Chats, ChatTemplateError
from loraplus.tasks.loading import loading
from loraplus.tasks.pretrained import check_tokens

_LARGEST_SEED = 2**64 - 1  # torch's
ONLY_IDS: dict[str, Any] = {"verbose": False, "return_attention_mask": False, "return_token_type_ids": False}
"""Options of a tokenizer: give token ids and nothing else, and say nothing."""
_LARGEST_TOKEN = 2**31 - 1
Prompt = str | Sequence[Mapping[str, str]]
"""A text, or a chat as {"role", "content"} messages."""


def generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 8,
    chat: bool | None = None,
    system: str | None = None,
    on_text: Callable[[str], None] | None = None,
    on_batch: Callable[[int], None] | None = None,
    places: Sequence[str] | None = None,
) -> list[str]:
    """Continues each prompt. The model's mode and the random state are restored afterwards.

    What a prompt is continued with does not depend on the other prompts if the temperature is 0: shorter ones are
    padded on the left and not attended to there.

    Args:
        model: causal language model of transformers or PEFT.
        tokenizer: its tokenizer.
        prompts: texts, or chats that end with the user's turn.
        max_new_tokens: at most so many; fewer where the model's context ends before.
        temperature: 0 takes the likeliest token each time, more draws.
        top_p: draws from the likeliest tokens that make up this probability.
        seed: of the drawing. What is drawn also depends on the batches.
        batch_size: prompts at once.
        chat: whether a text is a user's turn in the tokenizer's chat template. Default: if there is a template.
        system: system message of such a chat.
        on_text: told each piece of text as it comes; for a single prompt only.
        on_batch: told how many more prompts are done.
        places: where each prompt stands (its file and line), for messages.

    Returns:
        The new text of each prompt, without it and without special tokens.

    Raises:
        InputError: no prompt, one that is empty or leaves no room in the context, a chat without a template, or
            settings that cannot be used.

    Example:
        >>> generate(model, tokenizer, ["In the beginning"], max_new_tokens=8)  # doctest: +SKIP
        [' God created the heavens and the earth.']
    """
    _check_settings(max_new_tokens, temperature, top_p, batch_size, seed)
    if not prompts:
        raise InputError("there is no prompt to generate from")
    if on_text and len(prompts) > 1:
        raise InputError(f"text is told as it comes for one prompt only, got {len(prompts)}")
    rows = []
    for index, prompt in enumerate(prompts):
        try:
            rows.append(prompt_ids(tokenizer, prompt, chat=chat, system=system))
        except InputError as error:
            raise InputError(f"{places[index]}: {error}" if places else str(error)) from None
    check_tokens(model, max((max(row) for row in rows if row), default=0), "this model")
    rooms = _rooms(model, rows, max_new_tokens, places)
    texts = [""] * len(rows)
    devices = [model.device] if model.device.type == "cuda" else []
    was_training = model.training
    model.eval()
    try:
        with torch.random.fork_rng(devices), torch.inference_mode():
            torch.manual_seed(seed)
            for batch in _batches(rows, rooms, batch_size):
                new = continue_ids(
                    model, tokenizer, [rows[i] for i in batch], rooms[batch[0]], temperature, top_p, on_text
                )
                for i, text in zip(batch, new, strict=True):
                    texts[i] = text
                if on_batch:
                    on_batch(len(batch))
    finally:
        model.train(was_training)
    return texts


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, *, chat: bool | None = None, system: str | None = None
) -> list[int]:
    """The tokens of one prompt, those of the chat template included.

    Raises:
        InputError: an empty prompt, a chat without a template, messages that the template refuses, a system message
            without a chat.
    """
    if not prompt or (isinstance(prompt, str) and not prompt.strip()):
        raise InputError("a prompt is empty")
    if chat is None:
        chat = bool(tokenizer.chat_template) or not isinstance(prompt, str)
    if not chat and not isinstance(prompt, str):
        raise InputError("a prompt is a list of messages; without a chat template it must be a text")
    if not chat and system is not None:
        raise InputError("a system message needs a chat; the prompt is continued as plain text")
    if not chat:
        return text_ids(tokenizer, str(prompt))
    if not tokenizer.chat_template:
        raise InputError("the tokenizer has no chat template; continue the prompt as plain text (--no-chat)")
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    opening = [{"role": "system", "content": system}] if system is not None else []
    try:
        text = Chats(tokenizer).text([*opening, *messages], add_generation_prompt=True)
    except ChatTemplateError as error:
        raise InputError(f"the chat template refuses these messages: {error}") from None
    return text_ids(tokenizer, text, special=False)


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool = True) -> list[int]:
    """The tokens of a text to continue, without the end-of-text token that some tokenizers add to every text.

    Args:
        tokenizer: of the model.
        text: to go on from.
        special: whether the tokenizer adds its special tokens; a chat template has done so itself.

    Raises:
        InputError: the text holds halves of characters.
    """
    return texts_ids(tokenizer, [text], special=special)[0]


def texts_ids(tokenizer: Any, texts: Sequence[str], *, special: bool = True) -> list[list[int]]:
    """As `text_ids`, for several."""
    try:
        for text in texts:
            text.encode()
    except UnicodeEncodeError:
        raise InputError("a prompt is no Unicode text") from None
    rows = tokenizer(texts, add_special_tokens=special, **ONLY_IDS)["input_ids"]
    return [ids[:-1] for ids in rows] if special and ends_texts(tokenizer) else rows


def ends_texts(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer puts the end-of-text token behind every text."""
    end = tokenizer.eos_token_id
    return end is not None and tokenizer("a", verbose=False)["input_ids"][-1:] == [end]


def context_of(model: Any) -> int | None:
    """Tokens that the model takes, prompt and answer together; None if there is no such limit."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 0 else None


def _check_settings(max_new_tokens: int, temperature: float, top_p: float, batch_size: int, seed: int) -> None:
    if max_new_tokens < 1 or batch_size < 1:
        raise InputError(f"max_new_tokens and batch_size must be 1 or more, got {max_new_tokens} and {batch_size}")
    if not 0 <= temperature < float("inf"):
        raise InputError(f"temperature must be 0 or more, got {temperature}")
    if not 0 < top_p <= 1:
        raise InputError(f"top_p must be above 0 and at most 1, got {top_p}")
    if not 0 <= seed <= _LARGEST_SEED:
        raise InputError(f"seed must lie between 0 and {_LARGEST_SEED}, got {seed}")


def _rooms(model: nn.Module, rows: list[list[int]], wanted: int, places: Sequence[str] | None) -> list[int]:
    """How many tokens each prompt can be continued with."""
    context = context_of(model)
    for index, row in enumerate(rows):
        name = f"{places[index]}: the prompt" if places else f"prompt {index + 1}"
        if not row:
            raise InputError(f"{name} has no tokens")
        if context is not None and len(row) >= context:
            raise InputError(f"{name} has {len(row)} tokens, and the model takes {context} with the answer; shorten it")
    return [wanted if context is None else min(wanted, context - len(row)) for row in rows]


def _batches(rows: list[list[int]], rooms: list[int], size: int) -> Iterator[list[int]]:
    """Batches of prompts of similar length and with equally much room, since a batch stops as one."""
    order = sorted(range(len(rows)), key=lambda i: (rooms[i], len(rows[i])))
    for _, group in groupby(order, key=lambda i: rooms[i]):
        same = list(group)
        yield from (same[start : start + size] for start in range(0, len(same), size))


def _settings(model: Any, tokenizer: Any, room: int, temperature: float, top_p: float) -> GenerationConfig:
    """Sets everything that shapes the output, so that none of the model's own generation settings is used."""
    own = model.generation_config.eos_token_id
    ends = {*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id} - {None}
    if not all(isinstance(end, int) and 0 <= end <= _LARGEST_TOKEN for end in ends):
        raise InputError("the generation_config.json of the model does not say which token ends a text; it is damaged")
    pad = tokenizer.pad_token_id
    drawing: dict[str, Any] = {"do_sample": False}
    if temperature:
        drawing = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    return GenerationConfig(
        max_new_tokens=room, num_beams=1, repetition_penalty=1.0, no_repeat_ngram_size=0, min_length=0,
        eos_token_id=sorted(ends) or None,
        pad_token_id=pad if pad is not None else next(iter(sorted(ends)), 0), use_cache=True, **drawing,
    )  # fmt: skip


def continue_ids(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Sequence[int]],
    room: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    on_text: Callable[[str], None] | None = None,
) -> list[str]:
    """Continues token ids by at most `room` tokens each; see `generate`.

    They become one tensor (rows, longest row), padded on the left, so that every answer starts in the same column.
    """
    settings = _settings(model, tokenizer, room, temperature, top_p)
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), int(settings.pad_token_id))
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, longest - len(row) :] = torch.tensor(list(row))
        mask[i, longest - len(row) :] = 1
    with loading("cannot go on from this text"):  # transformers fills in settings of the model's own, whatever they are
        output = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=settings,
            streamer=_Pieces(tokenizer, on_text) if on_text else None,
        )
    return tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)


class _Pieces(BaseStreamer):
    """Passes text on as soon as its last character is complete."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, on_text: Callable[[str], None]) -> None:
        self._tokenizer, self._on_text = tokenizer, on_text
        self._ids: list[int] | None = None  # the prompt comes first
        self._told = 0

    def put(self, value: torch.Tensor) -> None:
        """Takes the prompt (1, tokens) at first, then each new token (1,)."""
        if self._ids is None:
            self._ids = []
            return
        self._ids += value.flatten().tolist()
        text = self._text()
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            self._tell(text)

    def end(self) -> None:
        self._tell(self._text())

    def _text(self) -> str:
        return str(self._tokenizer.decode(self._ids or [], skip_special_tokens=True))

    def _tell(self, text: str) -> None:
        if len(text) > self._told:
            self._on_text(text[self._told :])
            self._told = len(text)
