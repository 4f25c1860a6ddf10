"""What the code of a layer holds, as far as its reader must know: where the weight is, which functions there are."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from loraplus.axes import Axes


class Layer:
    """The layer itself: `self`, whatever it is called."""


class Scalar:
    """A number that the code does not say."""


LAYER, SCALAR = Layer(), Scalar()


@dataclass(frozen=True)
class Thing:
    """A module, class or function that the code names."""

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Thing) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


@dataclass(frozen=True)
class Constant:
    """A number, string or the like that the code says."""

    value: Any


@dataclass(frozen=True)
class Items:
    """A list, tuple or dict, entry by entry."""

    entries: Mapping[Any, Any]


@dataclass(frozen=True)
class Each:
    """Any number of one kind."""

    value: Any


@dataclass(frozen=True)
class Either:
    """One of several: the code may go two ways."""

    values: tuple[Any, ...]


@dataclass(frozen=True)
class Code:
    """A function that can be read.

    Args:
        node: its definition.
        around: names of the functions that it stands in.
        world: names of its module.
        of: the class that it is a method of.
        given, named: arguments that it has already.
    """

    node: Any
    around: Mapping[str, Any] = field(compare=False)
    world: Mapping[str, Any] = field(compare=False)
    of: type | None = None
    given: tuple[Any, ...] = field(default=(), compare=False)
    named: Mapping[str, Any] = field(default_factory=dict, compare=False)


@dataclass(frozen=True, eq=False)
class Partial:
    """A function of a library with some of its arguments."""

    function: Any
    given: tuple[Any, ...]
    named: Mapping[str, Any]


def wrap(value: Any) -> Any:
    """What the code names outside of its functions."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return Constant(value)
    return Thing(value)


def axes_of(value: Any) -> list[Axes]:
    """The weights that a value may be."""
    if isinstance(value, Either):
        return [axes for part in value.values for axes in axes_of(part)]
    return [value] if isinstance(value, Axes) else []


def each_weight(value: Any, change: Callable[[Axes], Axes | None]) -> Any:
    """Changes a value wherever it is a weight; None if it is none."""
    return either(change(axes) for axes in axes_of(value))


def either(values: Iterable[Any]) -> Any:
    """One of several; what nobody knows is left out."""
    found: list[Any] = []
    for value in values:
        found += [part for part in (value.values if isinstance(value, Either) else (value,)) if part is not None]
    distinct = [value for place, value in enumerate(found) if value not in found[:place]]
    return distinct[0] if len(distinct) == 1 else Either(tuple(distinct)) if distinct else None


def element(value: Any) -> Any:
    """One of those that a value holds, as in a loop over it."""
    if isinstance(value, Either):
        return either(element(part) for part in value.values)
    if isinstance(value, Items):
        return either(value.entries.values())
    if isinstance(value, Each):
        return value.value
    return value.without(0) if isinstance(value, Axes) else None


def plain(value: Any) -> Any:
    """A number, string, or list of them; None for what the code does not say."""
    if isinstance(value, Items):
        return [plain(entry) for entry in value.entries.values()]
    return value.value if isinstance(value, Constant) else None


def holds_weight(value: Any) -> bool:
    """Whether a function could get at the weight through an argument."""
    if isinstance(value, (Axes, Layer, Code, Partial)):
        return True
    if isinstance(value, Items):
        return any(holds_weight(entry) for entry in value.entries.values())
    parts = value.values if isinstance(value, Either) else [value.value] if isinstance(value, Each) else []
    return any(holds_weight(part) for part in parts)


@functools.cache
def definition(function: Any) -> Code | None:
    """The code of a Python function; None if it cannot be read (built in, generated)."""
    function = inspect.unwrap(function)
    if not inspect.isfunction(function):
        return None
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return None
    lambdas = [node for node in ast.walk(tree) if isinstance(node, ast.Lambda)]
    node = tree.body[0] if isinstance(tree.body[0], (ast.FunctionDef, ast.AsyncFunctionDef)) else None
    if node is None and len(lambdas) == 1:
        node = lambdas[0]
    closure = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=False))
    around = {}
    for name, cell in closure.items():
        try:
            around[name] = wrap(cell.cell_contents)
        except ValueError:  # not filled yet
            continue
    return None if node is None else Code(node, around, function.__globals__)
