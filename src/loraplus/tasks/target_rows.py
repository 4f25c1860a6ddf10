"""Tokenised examples with the tokens to learn, cut to a length; on disk, as all tokenised rows are.

A token that is not to be learnt stands in the file as its complement, so a row needs no second list of labels, and a
part of an example is a place within it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from loraplus.errors import InputError
from loraplus.files.scratch_file import ScratchFile
from loraplus.tasks.config import CUT, DROP, SPLIT
from loraplus.tasks.conversations import TEXT
from loraplus.tasks.token_rows import TOKEN, TokenRows, write

IGNORED = -100
_TOKENS_AT_ONCE = 2**18
_ROWS_AT_ONCE = 2**16


@dataclass(frozen=True)
class Encoded:
    """Token ids, and for each whether the loss is on it. The first token is never a target."""

    ids: Sequence[int]
    learnt: Sequence[int]

    @property
    def labels(self) -> list[int]:
        """The id where the loss is, -100 elsewhere."""
        labels = [token if wanted else IGNORED for token, wanted in zip(self.ids, self.learnt, strict=True)]
        return [IGNORED, *labels[1:]]


class TargetRows(TokenRows):
    """Rows with a label for each token: the id where the loss is, -100 elsewhere and at the first."""

    @classmethod
    def of(cls, parts: Iterable[Sequence[Encoded]], count: int) -> TargetRows:
        """Writes examples down.

        Args:
            parts: some examples each.
            count: examples in all.
        """
        file = ScratchFile("the tokens")
        starts, lengths, _ = write(file, map(_complemented, parts), count)
        return cls(file, starts, lengths)

    def _row(self, index: int, tokens: np.ndarray) -> dict[str, Any]:
        labels = np.where(tokens < 0, IGNORED, tokens).tolist()
        return {"input_ids": _ids(tokens).tolist(), "labels": [IGNORED, *labels[1:]]}

    def blocks(self) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
        """(first token's place, tokens (tokens,), starts among them (rows,), lengths (rows,)) of some rows at a time.

        Rows come in the file's order.

        The file is read, not looked at: what is mapped would count as this process's memory.
        """
        first = 0
        while first < len(self):
            begin = int(self._starts[first])
            end = int(np.searchsorted(self._starts[first : first + _ROWS_AT_ONCE], begin + _TOKENS_AT_ONCE))
            rows = slice(first, first + max(1, end))
            starts, lengths = self._starts[rows] - begin, self.lengths[rows]
            content = self._file.read(begin * TOKEN.itemsize, int(starts[-1] + lengths[-1]) * TOKEN.itemsize)
            yield begin, np.frombuffer(content, TOKEN), starts, lengths
            first = rows.stop

    def at(self, starts: np.ndarray, lengths: np.ndarray) -> TargetRows:
        """Other rows of the same file, (rows,) both, in tokens."""
        return TargetRows(self._file, starts, lengths)


def _complemented(examples: Sequence[Encoded]) -> tuple[np.ndarray, list[int]]:
    """(ids of all rows, one row after another (tokens,), ~id where there is no loss; the length of each row)"""
    ids = np.fromiter(chain.from_iterable(row.ids for row in examples), TOKEN)
    learnt = np.fromiter(chain.from_iterable(row.learnt for row in examples), bool)
    return np.where(learnt, ids, ~ids), [len(row.ids) for row in examples]


def _ids(tokens: np.ndarray) -> np.ndarray:
    """The ids (tokens,) of what `_complemented` wrote."""
    return np.where(tokens < 0, ~tokens, tokens)


@dataclass(frozen=True)
class Fitted:
    """Examples within the length, and what became of those that were longer.

    Args:
        rows: to train or evaluate on.
        longer: examples that were longer.
        cut: tokens that were cut off.
        dropped: examples that were left out: longer ones, or those with no target left.
        targets: tokens of the rows that the loss is on.
        largest: token id of the rows.
    """

    rows: TargetRows
    longer: int
    cut: int
    dropped: int
    targets: int
    largest: int


def fit(examples: TargetRows, length: int, how: str) -> Fitted:
    """Cuts examples to a length. Their tokens stay where they are in the file.

    Args:
        examples: of any length, in the order that they were written in.
        length: most tokens.
        how: cut the end off, drop the example, or split it into parts. Parts overlap by one token, so that every
            token but the first is still predicted.

    Example:
        >>> rows = TargetRows.of([[Encoded([1, 2, 3, 4, 5], [1] * 5)]], count=1)
        >>> [row["input_ids"] for row in fit(rows, 3, "split").rows]
        [[1, 2, 3], [3, 4, 5]]
    """
    long = examples.lengths > length
    cut = int((examples.lengths[long] - length).sum(dtype=np.int64)) if how == CUT else 0
    kept_starts, kept_lengths = [np.empty(0, np.int64)], [np.empty(0, np.int32)]
    dropped = targets = largest = 0
    for begin, tokens, starts, lengths in examples.blocks():
        example, part_starts, part_lengths = _parts(starts, lengths, length, how)
        ends = part_starts + part_lengths
        learnt = np.concatenate([[0], np.cumsum(tokens >= 0)])
        wanted = learnt[ends] - learnt[np.minimum(part_starts + 1, ends)]
        kept = wanted > 0
        dropped += len(lengths) - len(np.unique(example[kept]))
        targets += int(wanted.sum())
        places = np.stack([part_starts[kept], ends[kept]], axis=1).ravel()
        if len(places):  # the token behind the last part is none of a row
            largest = max(largest, int(np.maximum.reduceat(np.append(_ids(tokens), 0), places)[::2].max()))
        kept_starts.append(begin + part_starts[kept])
        kept_lengths.append(part_lengths[kept].astype(np.int32))
    rows = examples.at(np.concatenate(kept_starts), np.concatenate(kept_lengths))
    return Fitted(rows, int(long.sum()), cut, dropped, targets, largest)


def _parts(starts: np.ndarray, lengths: np.ndarray, length: int, how: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(example, start, length) of the parts that examples come in."""
    of_long = {CUT: 1, DROP: 0, SPLIT: -(-(lengths - 1) // (length - 1))}[how]
    counts = np.where(lengths > length, of_long, 1)
    example = np.repeat(np.arange(len(lengths)), counts)
    first = np.cumsum(counts) - counts
    offsets = (np.arange(len(example)) - first[example]) * (length - 1)
    return example, starts[example] + offsets, np.minimum(length, lengths[example] - offsets)


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
