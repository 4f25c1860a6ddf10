"""Sequences that are not in memory: what is computed from columns, their texts, and labels kept as numbers."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from itertools import compress
from typing import Any, Self, TypeVar, overload

import numpy as np

_CHARACTERS_AT_ONCE = 2**22

T = TypeVar("T", covariant=True)
V = TypeVar("V")


class Streamed(Sequence[T]):
    """A sequence that is not in memory. It equals any sequence of the same values."""

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[T]: ...
    def __getitem__(self, index: int | slice) -> T | Sequence[T]:
        if isinstance(index, slice):
            return [self.value(i) for i in range(*index.indices(len(self)))]
        return self.value(range(len(self))[index])

    def value(self, index: int) -> T:
        """The value at an index that is within the sequence."""
        raise NotImplementedError

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(mine == its for mine, its in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]


class Made(Streamed[T]):
    """The results of a function on each row of some columns, computed when they are read and not kept.

    Args:
        make: takes one value of each column.
        columns: of equal length.
        rows: which (n,), in their order; None for all.
    """

    def __init__(
        self, make: Callable[..., T], columns: Sequence[Sequence[Any]], rows: np.ndarray | None = None
    ) -> None:
        self._make, self._columns, self._rows = make, columns, rows

    def __len__(self) -> int:
        return len(self._columns[0]) if self._rows is None else len(self._rows)

    def value(self, index: int) -> T:
        """Of one row."""
        row = index if self._rows is None else int(self._rows[index])
        return self._make(*(column[row] for column in self._columns))

    def __iter__(self) -> Iterator[T]:
        if self._rows is None:
            return map(self._make, *self._columns)
        if not len(self._rows):
            return iter(())
        wanted = np.zeros(len(self._columns[0]), bool)
        wanted[self._rows] = True
        chosen = wanted.tobytes()
        return map(self._make, *(compress(column, chosen) for column in self._columns))

    def take(self, indices: np.ndarray) -> Self:
        """Those at some indices (n,), in that order."""
        taken = copy(self)
        taken._rows = indices if self._rows is None else self._rows[indices]
        return taken


class Texts(Made[str]):
    """A column's values as text, or those of some of its rows.

    Args:
        values: of the column.
        rows: which (n,), in their order; None for all.
    """

    def __init__(self, values: Sequence[Any], rows: np.ndarray | None = None) -> None:
        super().__init__(str, (values,), rows)


class Labels(Streamed[str]):
    """Labels, kept as indices into a list of the distinct ones.

    Args:
        distinct: labels; some need not occur.
        codes: one a row, (rows,).
    """

    def __init__(self, distinct: Sequence[str], codes: np.ndarray) -> None:
        self.distinct, self.codes = list(distinct), codes

    @classmethod
    def of(cls, labels: Iterable[str]) -> Labels:
        """Of any."""
        if isinstance(labels, Labels):
            return labels
        codes: dict[str, int] = {}
        rows = np.fromiter((codes.setdefault(label, len(codes)) for label in labels), np.int32)
        return cls(list(codes), rows)

    def __len__(self) -> int:
        return len(self.codes)

    def value(self, index: int) -> str:
        """Of one row."""
        return self.distinct[int(self.codes[index])]

    def __iter__(self) -> Iterator[str]:
        return map(self.distinct.__getitem__, self.codes)

    def take(self, indices: np.ndarray) -> Labels:
        """Those at some indices (n,)."""
        return Labels(self.distinct, self.codes[indices])

    def counts(self) -> Counter[str]:
        """How often each occurs."""
        counts = np.bincount(self.codes, minlength=len(self.distinct)).tolist()
        return Counter({label: count for label, count in zip(self.distinct, counts, strict=True) if count})

    def classes(self) -> list[np.ndarray]:
        """The rows (rows of it,) of each label that occurs, by alphabet."""
        order = np.argsort(self.codes, kind="stable")
        ends = np.cumsum(np.bincount(self.codes, minlength=len(self.distinct)))
        rows = dict(zip(self.distinct, np.split(order, ends[:-1]), strict=True)) if len(order) else {}
        return [rows[label] for label in sorted(rows) if len(rows[label])]


def digest(text: str) -> bytes:
    """A hash of 16 bytes: no two texts will have the same."""
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).digest()


def in_parts(values: Iterable[V], most: int, size: Callable[[Any], int] = len) -> Iterator[list[V]]:
    """Lists of at most so many texts, with fewer of them where texts are long.

    Args:
        values: texts, or what holds texts.
        most: of them in a list.
        size: characters of one.

    Example:
        >>> list(in_parts(["a", "b", "c"], 2))
        [['a', 'b'], ['c']]
    """
    together: list[V] = []
    characters = 0
    for value in values:
        together.append(value)
        characters += size(value)
        if len(together) == most or characters >= _CHARACTERS_AT_ONCE:
            yield together
            together, characters = [], 0
    if together:
        yield together
