"""Tokenised rows. The tokens are in a temporary file; memory holds where each row starts and ends."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from typing import Any, Self

import numpy as np
from transformers import PreTrainedTokenizerBase

from loraplus.files.scratch_file import ScratchFile
from loraplus.tasks.progress_log import ProgressLog
from loraplus.tasks.streamed import Texts, in_parts

AT_ONCE = 1000
"""Rows that are tokenised at once."""
TOKEN = np.dtype(np.int32)


class TokenRows(Sequence[dict[str, Any]]):
    """Rows {"input_ids", "labels"} for Trainer, made when they are asked for.

    Args:
        file: holds tokens.
        starts: of each row, in tokens from the file's beginning, (rows,).
        lengths: of each row, in tokens, (rows,).
    """

    def __init__(self, file: ScratchFile, starts: np.ndarray, lengths: np.ndarray) -> None:
        self._file, self._starts, self.lengths = file, starts, lengths
        self._tokens = file.array(TOKEN)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        start = self._starts[index]
        return self._row(index, self._tokens[start : start + self.lengths[index]])

    def _row(self, index: int, tokens: np.ndarray) -> dict[str, Any]:
        raise NotImplementedError

    def take(self, rows: np.ndarray) -> Self:
        """Those at some places (n,), in that order."""
        taken = copy(self)
        taken._starts, taken.lengths = self._starts[rows], self.lengths[rows]
        return taken

    def order_by_length(self) -> np.ndarray:
        """The places of the rows (rows,), short ones first, equal ones in their order."""
        return np.argsort(self.lengths, kind="stable")

    def by_length(self) -> Self:
        """The same rows, short ones first, equal ones in their order."""
        return self.take(self.order_by_length())


class LabelledRows(TokenRows):
    """Rows with one label each, or a row of numbers.

    Args:
        file, starts, lengths: as of `TokenRows`.
        labels: one a row (rows,), whole numbers or fractions; or (rows, labels).
        largest: token id.
    """

    def __init__(
        self, file: ScratchFile, starts: np.ndarray, lengths: np.ndarray, labels: np.ndarray, largest: int
    ) -> None:
        super().__init__(file, starts, lengths)
        self.labels, self.largest = labels, largest

    def _row(self, index: int, tokens: np.ndarray) -> dict[str, Any]:
        return {"input_ids": tokens.tolist(), "labels": self.labels[index].tolist()}

    def take(self, rows: np.ndarray) -> Self:
        taken = super().take(rows)
        taken.labels = self.labels[rows]
        return taken

    def cut(self, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int) -> LabelledRows:
        """Tokenises rows longer than `max_length` again, cut so that the tokenizer's closing token stays."""
        long = np.flatnonzero(self.lengths > max_length)
        if not len(long):
            return self
        starts, lengths = self._starts.copy(), self.lengths.copy()
        parts = _tokenised(Texts(texts, long), tokenizer, max_length)
        starts[long], lengths[long], largest = write(self._file, parts, len(long))
        return LabelledRows(self._file, starts, lengths, self.labels, max(self.largest, largest))


def tokenised(
    texts: Iterable[str],
    labels: Sequence[int] | np.ndarray,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None = None,
) -> LabelledRows:
    """Tokenises texts, and says how far it has come.

    Args:
        texts: any number.
        labels: one a text, (texts,) or (texts, labels).
        tokenizer: of the model.
        max_length: cut to so many tokens; None for all of them.
    """
    file = ScratchFile("the tokens")
    starts, lengths, largest = write(file, _tokenised(texts, tokenizer, max_length), len(labels))
    return LabelledRows(file, starts, lengths, np.asarray(labels), largest)


def _tokenised(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, max_length: int | None
) -> Iterator[tuple[np.ndarray, list[int]]]:
    """(ids of some texts one after another (tokens,), the length of each), a part of the texts at a time."""
    cutting: dict[str, Any] = (
        {"truncation": False} if max_length is None else {"truncation": True, "max_length": max_length}
    )
    for some in in_parts(texts, AT_ONCE):
        rows = tokenizer(some, verbose=False, return_attention_mask=False, return_token_type_ids=False, **cutting)[
            "input_ids"
        ]
        yield np.fromiter(itertools.chain.from_iterable(rows), TOKEN), list(map(len, rows))


def write(
    file: ScratchFile, parts: Iterable[tuple[np.ndarray, Sequence[int]]], count: int
) -> tuple[np.ndarray, np.ndarray, int]:
    """Adds rows to a file, and says how far it has come.

    Args:
        file: of tokens.
        parts: (tokens, lengths) of some rows one behind the other.
        count: rows in all.

    Returns:
        (starts, lengths, largest token).
    """
    progress = ProgressLog("tokenising, texts", count)
    begin = file.size // TOKEN.itemsize
    lengths = np.empty(count, np.int32)
    done = largest = 0
    for tokens, sizes in parts:
        file.append(tokens)
        largest = max(largest, int(tokens.max(initial=0)))
        lengths[done : done + len(sizes)] = sizes
        done += len(sizes)
        progress.advance(len(sizes))
    ends = np.cumsum(lengths, dtype=np.int64)
    return begin + ends - lengths, lengths, largest
