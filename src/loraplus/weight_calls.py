"""What calls make of a layer's weight: methods of the layer, functions of its module, and those of torch."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from loraplus.axes import PRODUCTS, Axes, changed, contracted
from loraplus.weight_values import (
    LAYER,
    SCALAR,
    Code,
    Constant,
    Each,
    Either,
    Items,
    Layer,
    Partial,
    Thing,
    axes_of,
    definition,
    each_weight,
    either,
    element,
    holds_weight,
    plain,
    wrap,
)  # fmt: skip

_LIBRARIES = frozenset({"torch", "builtins", "operator", "_operator", "einops", "functools", "math", "itertools"})
_PIECES = frozenset("chunk split tensor_split hsplit vsplit split_with_sizes".split())
_SAME = frozenset("list tuple sorted reversed iter set values ParameterList ModuleList chain".split())


class Calls:
    """Follows the weight through calls. How a function's own code is read is `weight_code`'s."""

    def __init__(self, layer: type, name: str, axes: Axes) -> None:
        self.layer, self.name, self.axes = layer, name, axes
        self.sides: set[int] = set()
        self.kept: dict[str, Any] = {}  # what the layer's methods have put into attributes

    def call(self, code: Code, given: Sequence[Any], named: dict[str, Any]) -> Any:
        """What a function gives back, read from its code."""
        raise NotImplementedError

    def keep(self, name: str, value: Any) -> None:
        """An attribute of the layer gets a value; what becomes of the weight's own name is still the weight."""
        if name != self.name:
            self.kept[name] = either([self.kept.get(name), value])

    def attribute(self, of: Any, name: str) -> Any:
        """An attribute of the layer, of a module or class, or of a weight."""
        if isinstance(of, Either):
            return either(self.attribute(part, name) for part in of.values)
        if isinstance(of, Layer):
            return self._of_layer(name)
        if isinstance(of, Thing):
            found = inspect.getattr_static(of.value, name, None) if isinstance(of.value, type) else None
            return wrap(getattr(of.value, name, None) if not isinstance(found, property) else None)
        if isinstance(of, Axes) and name == "ndim" and of.whole:
            return Constant(len(of.labels))
        return changed(of, name, [], {}) if isinstance(of, Axes) and name in ("T", "mT", "H", "mH", "data") else None

    def _of_layer(self, name: str) -> Any:
        if name == self.name:
            return self.axes
        if name in ("_parameters", "__dict__"):
            return Items({self.name: self.axes})
        if name in self.kept:
            return self.kept[name]
        found = inspect.getattr_static(self.layer, name, None)
        getter = found.fget if isinstance(found, property) else getattr(found, "func", None)
        if isinstance(found, (property, functools.cached_property)):
            code = self._code(getter, name)
            return None if code is None else self.call(code, [LAYER], {})
        if isinstance(found, staticmethod):
            return self._code(found.__func__, name)
        if isinstance(found, classmethod):
            code = self._code(found.__func__, name)
            return None if code is None else replace(code, given=(Thing(self.layer),))
        if inspect.isfunction(found):
            code = self._code(found, name)
            return None if code is None else replace(code, given=(LAYER,))
        return wrap(found) if isinstance(found, (bool, int, float, str)) else None

    def _code(self, function: Any, name: str) -> Code | None:
        code = definition(function)
        of = next((part for part in self.layer.__mro__ if name in vars(part)), None)
        return None if code is None else replace(code, of=of)

    def inherited(self, of: type | None, name: str) -> Any:
        """What `super()` finds."""
        behind = self.layer.__mro__[self.layer.__mro__.index(of) + 1 :] if of in self.layer.__mro__ else ()
        for part in behind:
            if name in vars(part) and part is not nn.Module:
                code = definition(vars(part)[name])
                return None if code is None else replace(code, of=part, given=(LAYER,))
        return None

    def apply(self, function: Any, given: Sequence[Any], named: dict[str, Any], called: str) -> Any:
        """What a call gives back.

        Args:
            function: what is called.
            given, named: its arguments.
            called: its name in the code, for what is not known.
        """
        if isinstance(function, Either):
            return either(self.apply(part, given, named, called) for part in function.values)
        if isinstance(function, Code):
            return self.call(function, given, named)
        if isinstance(function, Partial):
            return self.apply(function.function, [*function.given, *given], {**function.named, **named}, called)
        if not isinstance(function, Thing):
            return self.library(called, given, named)
        target = function.value
        name = str(getattr(target, "__name__", called)).removeprefix("linalg_")
        package = str(getattr(target, "__module__", None) or "torch").partition(".")[0]
        if package not in _LIBRARIES and not isinstance(target, type):
            code = definition(target) if any(map(holds_weight, [*given, *named.values()])) else None
            if code is not None:
                return self.call(code, given, named)
        return self.library(name, given, named)

    def method(self, of: Any, name: str, given: Sequence[Any], named: dict[str, Any]) -> Any:
        """What a call of a method gives back."""
        if isinstance(of, Layer):
            if name in ("get_parameter", "__getattr__") and given:
                return self.attribute(of, str(plain(given[0])))
            return self.apply(self.attribute(of, name), given, named, "")
        if isinstance(of, Thing):
            target = of.value
            if name == "apply" and isinstance(target, type) and issubclass(target, torch.autograd.Function):
                code = definition(target.forward)
                return None if code is None else self.call(code, [None, *given], named)
            function = self.attribute(of, name)
            unknown = isinstance(function, Constant) and function.value is None
            return self.library(name, given, named) if unknown else self.apply(function, given, named, name)
        if isinstance(of, Items) and name in ("get", "pop") and given:
            return of.entries.get(plain(given[0]))
        if isinstance(of, (Items, Each)) and name == "items":
            return Each(Items({0: None, 1: element(of)}))
        return self.library(name, [of, *given], named)

    def library(self, name: str, given: Sequence[Any], named: Mapping[str, Any]) -> Any:
        """What a function of torch, of Python, or one that nobody knows gives back."""
        if name in PRODUCTS:
            (left, left_names), (right, right_names) = sorted(PRODUCTS[name].items())
            return self.product(_argument(given, named, left, left_names), _argument(given, named, right, right_names))
        special = getattr(self, f"_{name.strip('_')}", None) if name in _SPECIAL else None
        if special is not None:
            return special(list(given), dict(named))
        if name in _SAME:
            one = given[0] if given else None
            return one if isinstance(one, Items) else Each(either(element(value) for value in given))
        weight = _argument(given, named, 0, ("input", "self", "x", "tensor"))
        if not axes_of(weight):  # as in torch.where(mask, w, 0)
            weight = next((value for value in (*given, *named.values()) if axes_of(value)), None)
            return weight if name in ("where", "mul", "multiply", "add", "to") else None
        if name in _PIECES:
            return Each(weight)
        if name in ("dim", "ndimension") and all(axes.whole for axes in axes_of(weight)):
            return Constant(len(axes_of(weight)[0].labels))
        if name in ("mul", "multiply"):
            return self.entrywise(given[0], given[1] if len(given) > 1 else None, times=True)
        rest = {key: plain(value) for key, value in named.items()}
        found = each_weight(weight, lambda axes: changed(axes, name, [plain(value) for value in given[1:]], rest))
        return Each(found) if name == "unbind" else found

    def product(self, left: Any, right: Any) -> Any:
        """A matrix product of two."""
        if axes_of(left) and axes_of(right):
            return None
        for axes in axes_of(left):
            self._found(axes.label(-1))
        for axes in axes_of(right):
            self._found(axes.label(-2 if len(axes.labels) > 1 else -1))
        return None

    def entrywise(self, left: Any, right: Any, *, times: bool) -> Any:
        """A product or sum entry by entry; of the weight and something, it is the weight still."""
        ours, other = (left, right) if axes_of(left) else (right, left)
        mixed = times and other is None
        return each_weight(ours, lambda axes: replace(axes, mixed=axes.mixed or mixed))

    def _found(self, label: int | None) -> None:
        if label in (-1, -2):
            self.sides.add(label)

    def _linear(self, given: list[Any], named: dict[str, Any]) -> None:
        for axes in axes_of(_argument(given, named, 1, ("weight",))):
            self._found(axes.label(-1))

    def _multi_head_attention_forward(self, given: list[Any], named: dict[str, Any]) -> None:
        for value in (*given, *named.values()):
            self._linear([None, value], {})

    def _inner(self, given: list[Any], named: dict[str, Any]) -> None:
        for value in (*given, *named.values()):
            self._linear([None, value], {})

    def _einsum(self, given: list[Any], named: dict[str, Any]) -> None:
        equation, *operands = given or [named.get("equation")]
        if len(operands) == 1 and isinstance(operands[0], Items):
            operands = list(operands[0].entries.values())
        if isinstance(equation, Constant) and isinstance(equation.value, str):
            for operand, dimension in contracted(equation.value, operands):
                for axes in axes_of(operand):
                    self._found(axes.label(dimension))

    def _tensordot(self, given: list[Any], named: dict[str, Any]) -> None:
        dims = plain(_argument(given, named, 2, ("dims",))) if len(given) > 2 or "dims" in named else 2
        for place in (0, 1):
            for axes in axes_of(_argument(given, named, place, ("ab"[place],))):
                if isinstance(dims, int):
                    over: Any = range(dims) if place else range(-dims, 0)
                else:
                    over = dims[place] if isinstance(dims, list) and len(dims) == 2 else []
                for dimension in [over] if isinstance(over, int) else over or []:
                    self._found(axes.label(dimension))

    def _multi_dot(self, given: list[Any], named: dict[str, Any]) -> None:
        factors = list(given[0].entries.values()) if given and isinstance(given[0], Items) else given
        for place, value in enumerate(factors):
            self.product(*((None, value) if place else (value, None)))

    _chain_matmul = _multi_dot

    def _sum(self, given: list[Any], named: dict[str, Any]) -> None:
        over = plain(_argument(given, named, 1, ("dim", "axis")))
        for axes in axes_of(_argument(given, named, 0, ("input",))):
            for dimension in over if isinstance(over, list) else [over]:
                if axes.mixed:
                    self._found(axes.label(dimension))

    def _stack(self, given: list[Any], named: dict[str, Any]) -> Any:
        dimension = plain(_argument(given, named, 1, ("dim", "axis")) or Constant(0))
        return each_weight(element(_argument(given, named, 0, ("tensors",))), lambda axes: axes.with_new(dimension))

    def _cat(self, given: list[Any], named: dict[str, Any]) -> Any:
        return each_weight(element(_argument(given, named, 0, ("tensors",))), lambda axes: axes)

    _concat = _concatenate = _cat

    def _getattr(self, given: list[Any], named: dict[str, Any]) -> Any:
        name = plain(given[1]) if len(given) > 1 else None
        return self.attribute(given[0], name) if isinstance(name, str) else None

    def _setattr(self, given: list[Any], named: dict[str, Any]) -> None:
        if len(given) == 3 and isinstance(given[0], Layer) and isinstance(name := plain(given[1]), str):
            self.keep(name, given[2])

    def _vars(self, given: list[Any], named: dict[str, Any]) -> Any:
        return self.attribute(given[0], "__dict__") if given else None

    def _partial(self, given: list[Any], named: dict[str, Any]) -> Any:
        return Partial(given[0], tuple(given[1:]), named) if given else None

    def _checkpoint(self, given: list[Any], named: dict[str, Any]) -> Any:
        passed = {key: value for key, value in named.items() if key not in ("use_reentrant", "preserve_rng_state")}
        return self.apply(given[0], given[1:], passed, "") if given else None

    def _map(self, given: list[Any], named: dict[str, Any]) -> Any:
        return Each(self.apply(given[0], [element(value) for value in given[1:]], {}, "")) if given else None

    def _vmap(self, given: list[Any], named: dict[str, Any]) -> Any:
        return Partial(Thing(map), tuple(given[:1]), {}) if given else None

    def _zip(self, given: list[Any], named: dict[str, Any]) -> Any:
        return Each(Items(dict(enumerate(map(element, given)))))

    def _enumerate(self, given: list[Any], named: dict[str, Any]) -> Any:
        return Each(Items({0: SCALAR, 1: element(given[0]) if given else None}))

    def _range(self, given: list[Any], named: dict[str, Any]) -> Any:
        return Each(SCALAR)

    def _int(self, given: list[Any], named: dict[str, Any]) -> Any:
        return SCALAR

    _len = _item = _int

    def _next(self, given: list[Any], named: dict[str, Any]) -> Any:
        return element(given[0]) if given else None

    def _dict(self, given: list[Any], named: dict[str, Any]) -> Any:
        return Items(named)


_SPECIAL = frozenset(
    "linear multi_head_attention_forward inner einsum tensordot multi_dot chain_matmul sum stack cat concat "
    "concatenate getattr setattr vars partial checkpoint map vmap zip enumerate range int len item next dict".split()
)


def _argument(given: Sequence[Any], named: Mapping[str, Any], place: int, names: Sequence[str]) -> Any:
    return next((named[name] for name in names if name in named), given[place] if place < len(given) else None)
