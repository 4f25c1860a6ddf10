"""Tokenised texts with their labels: the tokens stand in a temporary file, a row is a place in it."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from loraplus.tasks.scratch_file import ScratchFile
from loraplus.tasks.streamed import Texts, in_parts
from loraplus.tasks.telling import Telling

_AT_ONCE = 1000
_TOKEN = np.dtype(np.int32)


class TokenRows(Sequence[dict[str, Any]]):
    """Rows {"input_ids", "labels"} for Trainer, made when they are asked for.

    Args:
        file: holds tokens.
        starts: of each row, in tokens from the file's beginning.
        lengths: of each row.
        labels: one a row.
        largest: token id.
    """

    def __init__(
        self, file: ScratchFile, starts: np.ndarray, lengths: np.ndarray, labels: np.ndarray, largest: int
    ) -> None:
        self._file, self._starts, self.lengths, self._labels, self.largest = file, starts, lengths, labels, largest
        self._ids = file.array(_TOKEN)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        start = self._starts[index]
        ids = self._ids[start : start + self.lengths[index]]
        return {"input_ids": ids.tolist(), "labels": int(self._labels[index])}

    def by_length(self) -> TokenRows:
        """The same rows, short ones first, equal ones in their order."""
        order = np.argsort(self.lengths, kind="stable")
        return TokenRows(self._file, self._starts[order], self.lengths[order], self._labels[order], self.largest)

    def cut(self, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int) -> TokenRows:
        """With the rows that are longer than `max_length` tokenised again, so that the tokens of their end stay."""
        long = np.flatnonzero(self.lengths > max_length)
        if not len(long):
            return self
        starts, lengths = self._starts.copy(), self.lengths.copy()
        starts[long], lengths[long], largest = _written(
            self._file, Texts(texts, long), len(long), tokenizer, max_length
        )
        return TokenRows(self._file, starts, lengths, self._labels, max(self.largest, largest))


def tokenised(
    texts: Iterable[str],
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
    file = ScratchFile("the tokens")
    starts, lengths, largest = _written(file, texts, len(labels), tokenizer, max_length)
    return TokenRows(file, starts, lengths, np.asarray(labels), largest)


def _written(
    file: ScratchFile, texts: Iterable[str], count: int, tokenizer: PreTrainedTokenizerBase, max_length: int | None
) -> tuple[np.ndarray, np.ndarray, int]:
    """(starts, lengths, largest token) of texts whose tokens are added to the file."""
    telling = Telling("tokenising, texts", count)
    cutting: dict[str, Any] = (
        {"truncation": False} if max_length is None else {"truncation": True, "max_length": max_length}
    )
    begin = file.size // _TOKEN.itemsize
    lengths = np.empty(count, np.int32)
    done = largest = 0
    for part in in_parts(texts, _AT_ONCE):
        rows = tokenizer(
            part, verbose=False, return_attention_mask=False, return_token_type_ids=False, **cutting
        )["input_ids"]  # fmt: skip
        ids = np.fromiter(itertools.chain.from_iterable(rows), _TOKEN)
        file.append(ids)
        largest = max(largest, int(ids.max(initial=0)))
        lengths[done : done + len(rows)] = list(map(len, rows))
        done += len(rows)
        telling.advance(len(rows))
    ends = np.cumsum(lengths, dtype=np.int64)
    return begin + ends - lengths, lengths, largest
