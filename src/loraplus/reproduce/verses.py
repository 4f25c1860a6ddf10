"""From Bible verses to a tokenizer and to packed sequences: what the decoder of examples/decoder reads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from loraplus.errors import InputError
from loraplus.tasks.table import read_table

PAD, START, END = "<pad>", "<s>", "</s>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
SYSTEM = "Go on with the passage."
# A turn ends with the end-of-text token, so that generation stops where the assistant's turn does.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

Chapter = list[str]


@dataclass(frozen=True)
class Chapters:
    """Chapters as lists of verses; the held-out ones are never trained on, by the tokenizer either."""

    training: list[Chapter]
    held_out: list[Chapter]


def read_chapters(verses: str, held_out_every: int) -> Chapters:
    """Reads book, chapter, verse, text rows and holds out one chapter in `held_out_every`.

    Raises:
        InputError: the file cannot be read, lacks a column, or has too few chapters to hold one out.
    """
    table = read_table(verses)
    missing = [name for name in ("book", "chapter", "text") if name not in table.columns]
    if missing:
        raise InputError(
            f"{verses} has no column {', '.join(map(repr, missing))}; it should be the verses of "
            "loraplus.reproduce.assets.obtain('verses', folder)"
        )
    chapters: dict[tuple[str, str], Chapter] = {}
    for book, chapter, text in zip(*(table.columns[name] for name in ("book", "chapter", "text")), strict=True):
        chapters.setdefault((book, chapter), []).append(text)
    numbered = list(enumerate(chapters.values(), start=1))
    held_out = [chapter for number, chapter in numbered if number % held_out_every == 0]
    if not held_out:
        raise InputError(f"{verses} has {len(numbered)} chapters; at least {held_out_every} are needed to hold one out")
    return Chapters([chapter for number, chapter in numbered if number % held_out_every], held_out)


def train_tokenizer(texts: Iterable[str], vocabulary: int, context: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE that keeps case, begins a text with `<s>`, and has a chat template.

    Args:
        texts: to learn the pieces from.
        vocabulary: pieces, special ones included.
        context: the model's.

    Returns:
        The tokenizer; any text is decoded to exactly what was encoded.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, START, END, *ROLES],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{START} $A", special_tokens=[(START, bpe.token_to_id(START))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token=PAD, bos_token=START, eos_token=END, model_max_length=context,
        chat_template=CHAT_TEMPLATE, clean_up_tokenization_spaces=False,
        extra_special_tokens=list(ROLES),
    )  # fmt: skip


def passage(tokenizer: Any, chapter: Chapter) -> list[int]:
    """A chapter as running text, one verse a line."""
    return [*tokenizer("\n".join(chapter), verbose=False)["input_ids"], tokenizer.eos_token_id]


def conversation(tokenizer: Any, chapter: Chapter, *, system: bool) -> list[int]:
    """A chapter as turns, each answered with the next verse: so the tokens of the template get a meaning."""
    turns = [{"role": "assistant" if i % 2 else "user", "content": verse} for i, verse in enumerate(chapter)]
    opening = [{"role": "system", "content": SYSTEM}] if system else []
    text = tokenizer.apply_chat_template([*opening, *turns], tokenize=False)
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def training_texts(
    tokenizer: PreTrainedTokenizerFast, chapters: list[Chapter], conversation_every: int
) -> Iterator[list[int]]:
    """Every chapter as a passage, and some once more as a conversation, every other of these with a system message."""
    for number, chapter in enumerate(chapters, start=1):
        yield passage(tokenizer, chapter)
        if number % conversation_every == 0:
            yield conversation(tokenizer, chapter, system=number % (2 * conversation_every) == 0)


def pack(texts: Iterable[list[int]], length: int) -> torch.Tensor:
    """Texts one after the other, cut into rows (sequences, length); what is left at the end is dropped.

    Raises:
        InputError: not enough text for one row.
    """
    ids = [token for text in texts for token in text]
    rows = len(ids) // length
    if rows == 0:
        raise InputError(f"{len(ids)} tokens are not enough for one sequence of {length}")
    return torch.tensor(ids[: rows * length]).view(rows, length)
