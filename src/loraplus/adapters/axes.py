"""Follows the dimensions of a weight through transposes, indexing and reshaping, to see which one a product sums over.

A weight's own dimensions are counted from the end: −1 and −2 are its two sides, what stands before are experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

_TURNS = frozenset("T mT H mH t adjoint".split())
_SWAPS = frozenset("transpose transpose_ swapaxes swapdims swapaxes_ swapdims_".split())
_KEEPS = frozenset(
    "data to type type_as float half bfloat16 double cuda cpu contiguous clone detach requires_grad_ dequantize "
    "index_select narrow mul div add sub neg abs where pad dropout sigmoid tanh relu exp clamp full_tensor to_local "
    "Parameter as_tensor tensor asarray expand_as real masked_fill nan_to_num".split()
)
# Name of a function: the places of the left and the right operand of its matrix product, and their names.
_TWO = {0: ("input", "self", "x1", "a"), 1: ("other", "mat2", "vec2", "x2", "b")}
_MORE = {1: ("mat1", "batch1", "mat"), 2: ("mat2", "batch2", "vec")}
PRODUCTS: dict[str, Mapping[int, Sequence[str]]] = {
    **dict.fromkeys("matmul __matmul__ mm bmm mv dot _grouped_mm grouped_mm _scaled_mm _int_mm".split(), _TWO),
    **dict.fromkeys("addmm baddbmm addbmm addmv _addmm_activation".split(), _MORE),
}


@dataclass(frozen=True)
class Axes:
    """The dimensions that a weight has now, by what they were.

    Args:
        labels: what each known dimension was, ending with the last one; None for one that is not the weight's own.
        whole: whether these are all the dimensions.
        mixed: multiplied with something else, entry by entry: a sum over a dimension completes a product.
    """

    labels: tuple[int | None, ...]
    whole: bool = True
    mixed: bool = False

    @classmethod
    def of(cls, dimensions: int | None) -> Axes:
        """Those of a weight as it is; its two sides alone where nobody knows how many it has."""
        return cls((-2, -1), whole=False) if dimensions is None else cls(tuple(range(-dimensions, 0)))

    def place(self, dimension: object) -> int | None:
        """Where a dimension stands in `labels`; None if the code does not say."""
        if not isinstance(dimension, int) or (dimension >= 0 and not self.whole):
            return None
        place = dimension if dimension >= 0 else len(self.labels) + dimension
        return place if 0 <= place < len(self.labels) else None

    def label(self, dimension: object) -> int | None:
        """What a dimension was."""
        place = self.place(dimension)
        return None if place is None else self.labels[place]

    def swapped(self, first: object, second: object) -> Axes | None:
        """Two dimensions change places."""
        one, other = self.place(first), self.place(second)
        if one is None or other is None:
            return None
        labels = list(self.labels)
        labels[one], labels[other] = labels[other], labels[one]
        return replace(self, labels=tuple(labels))

    def permuted(self, order: Sequence[Any]) -> Axes | None:
        """As `permute`, whose arguments say how many dimensions there are."""
        count = len(order)
        if not all(isinstance(place, int) and -count <= place < count for place in order):
            return None
        if count < len(self.labels) or (self.whole and count != len(self.labels)):
            return None
        labels = (None,) * (count - len(self.labels)) + self.labels
        return replace(self, labels=tuple(labels[place] for place in order), whole=True)

    def moved(self, source: object, target: object) -> Axes | None:
        """As `movedim`."""
        sources, targets = ([ends] if isinstance(ends, int) else ends for ends in (source, target))
        if not (isinstance(sources, list) and isinstance(targets, list) and len(sources) == len(targets)):
            return None
        places: dict[int, int] = {}  # {where it goes: where it is}
        for start, end in zip(sources, targets, strict=True):
            at, to = self.place(start), self.place(end)
            if at is None or to is None:
                return None
            places[to] = at
        rest = iter([place for place in range(len(self.labels)) if place not in places.values()])
        order = [places[to] if to in places else next(rest) for to in range(len(self.labels))]
        return replace(self, labels=tuple(self.labels[place] for place in order))

    def without(self, dimension: object = 0) -> Axes | None:
        """A dimension is gone: one entry of it was picked."""
        if dimension == 0 and not self.whole:
            return self
        place = self.place(dimension)
        return None if place is None else replace(self, labels=self.labels[:place] + self.labels[place + 1 :])

    def with_new(self, dimension: object) -> Axes | None:
        """As `unsqueeze`."""
        if dimension == 0 and not self.whole:
            return self
        longer = replace(self, labels=(*self.labels, None))
        place = longer.place(dimension)
        labels = self.labels
        return None if place is None else replace(self, labels=(*labels[:place], None, *labels[place:]))

    def reshaped(self, count: int | None) -> Axes:
        """Another shape; its last dimensions are taken for the same."""
        last = self.labels[-2:]
        if count is None or count < len(last):
            return replace(self, labels=last[-count:] if count else last, whole=False)
        return replace(self, labels=(None,) * (count - len(last)) + last, whole=True)

    def indexed(self, indices: Sequence[str]) -> Axes | None:
        """As w[…]: each index is "keep" (a slice), "new", "one", "…", or "some" (a tensor: it picks one or several)."""
        fixed = [index for index in indices if index != "…"]
        if not self.whole and indices[:1] != ["…"]:
            return self if len(fixed) == 1 or set(fixed) == {"keep"} else None  # of what stands before what is known
        rest = ["keep"] * (len(self.labels) - sum(index != "new" for index in fixed))
        at = indices.index("…") if "…" in indices else len(indices)
        labels, own = [], iter(self.labels)
        for index in (*indices[:at], *rest, *indices[at + 1 :]):
            label = None if index == "new" else next(own, None)
            if index in ("keep", "new") or (index == "some" and len(self.labels) == 2):  # rows picked of a matrix
                labels.append(label)
        return replace(self, labels=tuple(labels), whole=self.whole and "some" not in indices)


def changed(axes: Axes, by: str, given: Sequence[Any], named: Mapping[str, Any]) -> Axes | None:
    """What a method or function of a name makes of a weight; None if that is no weight any more, or nobody knows.

    Args:
        axes: the weight.
        by: the name.
        given: the other arguments: numbers, strings and lists of them, None for what the code does not say.
        named: those that are given by name.
    """

    def argument(place: int, *names: str, otherwise: object = None) -> Any:
        values = [named[name] for name in names if name in named]
        return values[0] if values else given[place] if place < len(given) else otherwise

    flat = list(given[0]) if len(given) == 1 and isinstance(given[0], list) else list(given)
    if by in _TURNS:
        return axes.swapped(-1, -2)
    if by in _SWAPS:
        return axes.swapped(argument(0, "dim0", "axis0"), argument(1, "dim1", "axis1"))
    if by == "permute":
        return axes.permuted(named.get("dims", flat))
    if by in ("movedim", "moveaxis"):
        return axes.moved(argument(0, "source"), argument(1, "destination"))
    if by == "unsqueeze":
        return axes.with_new(argument(0, "dim"))
    if by in ("squeeze", "squeeze_"):
        dimension = argument(0, "dim", otherwise="all")
        return axes.reshaped(None) if dimension == "all" else axes.without(dimension)
    if by in ("select", "unbind"):
        return axes.without(argument(0, "dim", otherwise=0))
    if by in ("view", "reshape", "expand", "repeat", "flatten"):
        return axes.reshaped(len(flat) if flat and by != "flatten" else None)
    return axes if by in _KEEPS else None


def contracted(equation: str, operands: Sequence[Any]) -> list[tuple[Any, int]]:
    """(operand, dimension from the end) of each that an einsum sums over."""
    inputs, arrow, result = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if not arrow:
        result = "".join(letter for letter in inputs if inputs.count(letter) == 1)
    return [
        (operand, place - len(term))
        for term, operand in zip(terms, operands, strict=False)
        for place, letter in enumerate(term)
        if letter.isalpha() and letter not in result and sum(letter in other for other in terms) > 1
    ]
