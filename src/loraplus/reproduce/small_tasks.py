"""Tasks for the small decoders: which text to model, or which book a verse is from; split once, as token ids."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from loraplus.reproduce import assets, small_decoders

BOOK = "book"
LENGTH = 32
HELD_OUT = 800
_BOOK_VERSES = 300  # a book with fewer verses is left out
_SPLIT_SEED = 0

Text = tuple[str, int]
"""(text, number of its class; 0 for a text without a label)."""


@dataclass(frozen=True)
class Texts:
    """Labelled text in three parts that share no row."""

    classes: int
    train: list[Text]
    validation: list[Text]
    test: list[Text]


@dataclass(frozen=True)
class Rows:
    """Token ids of one part, and its targets: class numbers, or ratings; a language model needs none."""

    ids: list[list[int]]
    targets: list[float]

    def chosen(self, indices: Iterable[int]) -> Rows:
        """Some of them, in this order."""
        places = list(indices)
        return Rows([self.ids[i] for i in places], [self.targets[i] for i in places])


@dataclass(frozen=True)
class SmallTask:
    """What a small model is trained and evaluated on."""

    kind: str
    """lm, classes, or rating (a number that is predicted)."""
    classes: int
    train: Rows
    validation: Rows
    test: Rows


def _shuffled(rows: list[Text]) -> list[Text]:
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(_SPLIT_SEED)).tolist()
    return [rows[i] for i in order]


def _held_out_first(classes: int, rows: list[Text]) -> Texts:
    rows = _shuffled(rows)
    return Texts(classes, rows[2 * HELD_OUT :], rows[:HELD_OUT], rows[HELD_OUT : 2 * HELD_OUT])


def book_rows(data: Path) -> list[tuple[dict[str, str], int]]:
    """The verses of the larger books, each with the number of its book."""
    rows = assets.table("verses", data)
    sizes = Counter(row["book"] for row in rows)
    books = {book: i for i, book in enumerate(sorted(book for book in sizes if sizes[book] >= _BOOK_VERSES))}
    return [(row, books[row["book"]]) for row in rows if row["book"] in books]


def domain_rows(data: Path, domain: str) -> list[dict[str, str]]:
    """The rated snippets of one domain."""
    return [row for row in assets.table("rated-snippets", data) if row["domain"] == domain]


@functools.lru_cache(maxsize=4)
def book_texts(data: Path) -> Texts:
    """Verses and their books. Chapters 4, 12, 20, … are the validation data, 8, 16, 24, … the test data."""
    parts: dict[int, list[Text]] = {4: [], 0: []}
    train: list[Text] = []
    rows = book_rows(data)
    for row, book in rows:
        parts.get(int(row["chapter"]) % 8, train).append((row["text"], book))
    classes = len({book for _, book in rows})
    return Texts(classes, _shuffled(train), _shuffled(parts[4])[:HELD_OUT], _shuffled(parts[0])[:HELD_OUT])


@functools.lru_cache(maxsize=4)
def domain_texts(data: Path, domain: str, labelled: bool) -> Texts:
    """Snippets of one domain; `labelled`: with the sign of their mean rating, those rated 0 left out."""
    rows = domain_rows(data, domain)
    if not labelled:
        return _held_out_first(1, [(row["text"], 0) for row in rows])
    return _held_out_first(2, [(row["text"], int(float(row["rating"]) > 0)) for row in rows if float(row["rating"])])


@functools.lru_cache(maxsize=8)
def load(data: Path, name: str, width: int) -> SmallTask:
    """A task by name, `book`, or `lm-` and a domain, in the token ids of the decoder of a width."""
    tokenizer = small_decoders.tokenizer(data, width)
    texts = book_texts(data) if name == BOOK else domain_texts(data, name.removeprefix("lm-"), False)

    def rows(texts: list[Text]) -> Rows:
        ids = small_decoders.token_ids(tokenizer, [text for text, _ in texts], LENGTH)
        return Rows(ids, [target for _, target in texts])

    def by_length(texts: list[Text]) -> Rows:
        encoded = rows(texts)
        return encoded.chosen(sorted(range(len(texts)), key=lambda i: len(encoded.ids[i])))

    kind = "classes" if name == BOOK else "lm"
    return SmallTask(kind, texts.classes, rows(texts.train), by_length(texts.validation), by_length(texts.test))
