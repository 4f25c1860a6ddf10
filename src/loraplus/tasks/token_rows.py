"""Tokenised texts with their labels, held as two flat arrays: a million rows are a few hundred megabytes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from loraplus.tasks.telling import Telling

_AT_ONCE = 1000


class TokenRows(Sequence[dict[str, Any]]):
    """Rows {"input_ids", "labels"} for Trainer, made when they are asked for.

    Args:
        ids: of all rows, one behind the other.
        ends: where each row ends in `ids`.
        labels: one a row.
    """

    def __init__(self, ids: np.ndarray, ends: np.ndarray, labels: np.ndarray) -> None:
        self._ids, self._ends, self._labels = ids, ends, labels

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        return {"input_ids": self._row(index).tolist(), "labels": int(self._labels[index])}

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row."""
        return np.diff(self._ends, prepend=0)

    @property
    def largest(self) -> int:
        """The largest token id."""
        return int(self._ids.max(initial=0))

    def by_length(self) -> TokenRows:
        """The same rows, short ones first, equal ones in their order."""
        order = np.argsort(self.lengths, kind="stable")
        return TokenRows.of([self._row(i) for i in order], self._labels[order])

    def cut(self, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int) -> TokenRows:
        """With the rows that are longer than `max_length` tokenised again, so that the tokens of their end stay."""
        long = np.flatnonzero(self.lengths > max_length).tolist()
        if not long:
            return self
        cut = tokenised([texts[i] for i in long], self._labels[long], tokenizer, max_length)
        rows = [self._row(i) for i in range(len(self))]
        for place, i in enumerate(long):
            rows[i] = cut._row(place)
        return TokenRows.of(rows, self._labels)

    @classmethod
    def of(cls, parts: Sequence[np.ndarray], labels: Sequence[int] | np.ndarray) -> TokenRows:
        """Rows from the ids of each."""
        return cls(_flat(parts), np.cumsum([len(part) for part in parts]), np.asarray(labels))

    def _row(self, index: int) -> np.ndarray:
        return self._ids[self._ends[index - 1] if index else 0 : self._ends[index]]


def tokenised(
    texts: Sequence[str],
    labels: Sequence[int] | np.ndarray,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None = None,
) -> TokenRows:
    """Tokenises texts, and says how far it has come.

    Args:
        texts: any number.
        labels: one a text.
        tokenizer: of the model.
        max_length: cut to so many tokens; None for all of them.
    """
    telling = Telling("tokenising, texts", len(texts))
    cutting: dict[str, Any] = (
        {"truncation": False} if max_length is None else {"truncation": True, "max_length": max_length}
    )
    parts: list[np.ndarray] = []
    lengths: list[int] = []
    for start in range(0, len(texts), _AT_ONCE):
        rows = tokenizer(
            list(texts[start : start + _AT_ONCE]),
            verbose=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            **cutting,
        )["input_ids"]
        parts.append(np.fromiter(itertools.chain.from_iterable(rows), dtype=np.int32))
        lengths += map(len, rows)
        telling.advance(len(rows))
    return TokenRows(_flat(parts), np.cumsum(lengths), np.asarray(labels))


def _flat(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int32)
