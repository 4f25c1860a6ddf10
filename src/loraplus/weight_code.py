"""Reads the code of a layer as a weight goes through it: an interpreter that knows nothing but where the weight is.

What is no weight is not looked into (`None`). Where the code may go two ways, both are read. What functions of
libraries make of the weight is told by `weight_calls`.
"""

from __future__ import annotations

import ast
import builtins
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from loraplus.axes import Axes
from loraplus.weight_calls import Calls
from loraplus.weight_values import (
    LAYER,
    Code,
    Constant,
    Each,
    Either,
    Items,
    Layer,
    Scalar,
    axes_of,
    each_weight,
    either,
    element,
    wrap,
)  # fmt: skip

_DEPTH = 8  # functions that hand the weight on to others
_CALLS = 200  # that are read in all: a layer that makes more is a whole model
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


class Frame:
    """The names of one function that is being read."""

    def __init__(self, code: Code) -> None:
        self.code = code
        self.names: dict[str, Any] = dict(code.around)
        self.results: list[Any] = []


class Reader(Calls):
    """What a layer's weight is multiplied with, and over which of its dimensions.

    Args:
        layer: class of the layer.
        name: of the weight, an attribute of the layer.
        dimensions: that the weight has; None where nobody knows.

    Attributes:
        sides: of the weight, those that a product sums over: −1, −2.
    """

    def __init__(self, layer: type, name: str, dimensions: int | None) -> None:
        super().__init__(layer, name, Axes.of(dimensions))
        self._reading: list[Any] = []
        self._calls = 0

    def read(self, method: str) -> None:
        """Reads a method of the layer, and what it calls."""
        code = self.attribute(LAYER, method)
        if isinstance(code, Code):
            self.call(code, [], {})

    def call(self, code: Code, given: Sequence[Any], named: dict[str, Any]) -> Any:
        """What a function gives back."""
        if code.node in self._reading or len(self._reading) > _DEPTH or self._calls > _CALLS:
            return None
        self._calls += 1
        frame, arguments = Frame(code), code.node.args
        given, named = [*code.given, *given], {**code.named, **named}
        places = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)]
        frame.names |= dict.fromkeys([*places, *(argument.arg for argument in arguments.kwonlyargs)])
        frame.names |= named | dict(zip(places, given, strict=False))
        if arguments.vararg:
            frame.names[arguments.vararg.arg] = Items(dict(enumerate(given[len(places) :])))
        if arguments.kwarg:
            frame.names[arguments.kwarg.arg] = Items({key: value for key, value in named.items() if key not in places})
        self._reading.append(code.node)
        if isinstance(code.node, ast.Lambda):
            frame.results.append(self.value(code.node.body, frame))
        else:
            self._run(code.node.body, frame)
        self._reading.pop()
        return either(frame.results)

    def _run(self, statements: Iterable[ast.stmt], frame: Frame) -> None:
        for statement in statements:
            known = getattr(self, f"_{type(statement).__name__}", None)
            if known is not None:
                known(statement, frame)
            else:
                self._children(statement, frame)

    def _children(self, node: ast.AST, frame: Frame) -> None:
        """Of a node that means nothing here: expressions, and statements one after the other."""
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.stmt):
                self._run([child], frame)
            elif isinstance(child, ast.expr):
                self.value(child, frame)
            else:
                self._children(child, frame)

    def _FunctionDef(self, node: Any, frame: Frame) -> None:
        frame.names[node.name] = self._function(node, frame)

    def _Return(self, node: ast.Return, frame: Frame) -> None:
        frame.results.append(None if node.value is None else self.value(node.value, frame))

    def _Assign(self, node: ast.Assign, frame: Frame) -> None:
        value = self.value(node.value, frame)
        for target in node.targets:
            self.assign(target, value, frame)

    def _AnnAssign(self, node: ast.AnnAssign, frame: Frame) -> None:
        if node.value is not None:
            self.assign(node.target, self.value(node.value, frame), frame)

    def _AugAssign(self, node: ast.AugAssign, frame: Frame) -> None:
        load = ast.copy_location(ast.parse(ast.unparse(node.target), mode="eval").body, node)
        self.assign(node.target, self.value(ast.BinOp(load, node.op, node.value), frame), frame)

    def _If(self, node: ast.If, frame: Frame) -> None:
        self.value(node.test, frame)
        self._branch([node.body, node.orelse], frame)

    def _Try(self, node: ast.Try, frame: Frame) -> None:
        self._branch([[*node.body, *node.orelse], *(handler.body for handler in node.handlers)], frame)
        self._run(node.finalbody, frame)

    def _Match(self, node: ast.Match, frame: Frame) -> None:
        self.value(node.subject, frame)
        self._branch([case.body for case in node.cases], frame)

    def _branch(self, branches: Sequence[Sequence[ast.stmt]], frame: Frame) -> None:
        """Reads each from the same start; a name is afterwards what it is in one of them."""
        before, after = dict(frame.names), []
        for branch in branches:
            frame.names = dict(before)
            self._run(branch, frame)
            after.append(frame.names)
        frame.names = {name: either(names.get(name) for names in after) for names in after for name in names}

    def _For(self, node: ast.For, frame: Frame) -> None:
        self.assign(node.target, element(self.value(node.iter, frame)), frame)
        self._run([*node.body, *node.orelse], frame)

    def _Import(self, node: Any, frame: Frame) -> None:
        for alias in node.names:
            module = sys.modules.get(alias.name if alias.asname else alias.name.partition(".")[0])
            frame.names[alias.asname or alias.name.partition(".")[0]] = wrap(module)

    def _ImportFrom(self, node: ast.ImportFrom, frame: Frame) -> None:
        module = sys.modules.get(node.module or "")
        for alias in node.names:
            frame.names[alias.asname or alias.name] = wrap(getattr(module, alias.name, None))

    def assign(self, target: ast.expr, value: Any, frame: Frame) -> None:
        """Gives a value to a name, an attribute of the layer, an entry, or each of several."""
        if isinstance(target, ast.Name):
            frame.names[target.id] = value
        elif isinstance(target, ast.Starred):
            self.assign(target.value, Each(element(value)), frame)
        elif isinstance(target, (ast.Tuple, ast.List)):
            parts = value.entries if isinstance(value, Items) else {}
            fits = len(parts) == len(target.elts) and not any(isinstance(part, ast.Starred) for part in target.elts)
            for place, part in enumerate(target.elts):
                self.assign(part, parts.get(place) if fits else element(value), frame)
        elif isinstance(target, ast.Attribute) and isinstance(self.value(target.value, frame), Layer):
            self.keep(target.attr, value)
        elif isinstance(target, ast.Subscript):
            key, held = self.value(target.slice, frame), self.value(target.value, frame)
            if isinstance(held, Items) and isinstance(key, Constant):
                self.assign(target.value, Items({**held.entries, key.value: value}), frame)
            elif isinstance(held, (Items, Each)):
                self.assign(target.value, Each(either([element(held), value])), frame)

    def value(self, node: ast.expr, frame: Frame) -> Any:
        """What an expression is."""
        known = getattr(self, f"_{type(node).__name__}", None)
        if known is not None:
            return known(node, frame)
        self._children(node, frame)
        return None

    def _Constant(self, node: ast.Constant, frame: Frame) -> Any:
        return Constant(node.value)

    def _Name(self, node: ast.Name, frame: Frame) -> Any:
        for names in (frame.names, frame.code.world, vars(builtins)):
            if node.id in names:
                return names[node.id] if names is frame.names else wrap(names[node.id])
        return None

    def _Attribute(self, node: ast.Attribute, frame: Frame) -> Any:
        return self.attribute(self.value(node.value, frame), node.attr)

    def _NamedExpr(self, node: ast.NamedExpr, frame: Frame) -> Any:
        value = self.value(node.value, frame)
        self.assign(node.target, value, frame)
        return value

    def _IfExp(self, node: ast.IfExp, frame: Frame) -> Any:
        self.value(node.test, frame)
        return either([self.value(node.body, frame), self.value(node.orelse, frame)])

    def _BoolOp(self, node: ast.BoolOp, frame: Frame) -> Any:
        return either([self.value(part, frame) for part in node.values])

    def _Starred(self, node: Any, frame: Frame) -> Any:
        return self.value(node.value, frame)

    _Await = _Starred

    def _Yield(self, node: Any, frame: Frame) -> None:
        if node.value is not None:
            value = self.value(node.value, frame)
            frame.results.append(Each(element(value) if isinstance(node, ast.YieldFrom) else value))

    _YieldFrom = _Yield

    def _Lambda(self, node: Any, frame: Frame) -> Code:
        return self._function(node, frame)

    def _function(self, node: Any, frame: Frame) -> Code:
        places = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args)]
        defaults = [*zip(reversed(places), reversed(node.args.defaults), strict=False)]
        defaults += [(argument.arg, value) for argument, value in
                     zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True) if value]  # fmt: skip
        named = {name: self.value(value, frame) for name, value in defaults}
        return Code(node, frame.names, frame.code.world, frame.code.of, named=named)

    def _Tuple(self, node: Any, frame: Frame) -> Any:
        values = [self.value(part, frame) for part in node.elts]
        if any(isinstance(part, ast.Starred) for part in node.elts):
            return Each(either(element(value) if isinstance(part, ast.Starred) else value
                               for part, value in zip(node.elts, values, strict=True)))  # fmt: skip
        return Items(dict(enumerate(values)))

    _List = _Set = _Tuple

    def _Dict(self, node: ast.Dict, frame: Frame) -> Any:
        entries: dict[Any, Any] = {}
        for key, value in zip(node.keys, node.values, strict=True):
            found, name = self.value(value, frame), None if key is None else self.value(key, frame)
            if isinstance(name, Constant):
                entries[name.value] = found
            else:
                entries |= found.entries if key is None and isinstance(found, Items) else {id(value): element(found)}
        return Items(entries)

    def _ListComp(self, node: Any, frame: Frame) -> Each:
        outer, frame.names = frame.names, dict(frame.names)
        for part in node.generators:
            self.assign(part.target, element(self.value(part.iter, frame)), frame)
            for test in part.ifs:
                self.value(test, frame)
        found = self.value(node.value if isinstance(node, ast.DictComp) else node.elt, frame)
        frame.names = outer
        return Each(found)

    _SetComp = _GeneratorExp = _DictComp = _ListComp

    def _UnaryOp(self, node: ast.UnaryOp, frame: Frame) -> Any:
        value = self.value(node.operand, frame)
        if isinstance(value, Constant) and isinstance(node.op, ast.USub) and isinstance(value.value, (int, float)):
            return Constant(-value.value)
        return value if axes_of(value) else None

    def _BinOp(self, node: ast.BinOp, frame: Frame) -> Any:
        left, right = self.value(node.left, frame), self.value(node.right, frame)
        if isinstance(node.op, ast.MatMult):
            return self.product(left, right)
        if isinstance(left, Constant) and isinstance(right, Constant) and isinstance(node.op, (ast.Add, ast.Sub)):
            numbers = isinstance(left.value, int) and isinstance(right.value, int)
            return Constant(left.value + (1 if isinstance(node.op, ast.Add) else -1) * right.value) if numbers else None
        if isinstance(node.op, ast.Add) and all(isinstance(part, (Items, Each)) for part in (left, right)):
            return Each(either([element(left), element(right)]))
        return self.entrywise(left, right, times=isinstance(node.op, ast.Mult))

    def _Subscript(self, node: ast.Subscript, frame: Frame) -> Any:
        held = self.value(node.value, frame)
        parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        kinds = [self._index(part, frame) for part in parts]
        return self._picked(held, kinds, self.value(parts[0], frame))

    def _picked(self, held: Any, kinds: Sequence[str], key: Any) -> Any:
        if isinstance(held, Either):
            return either(self._picked(value, kinds, key) for value in held.values)
        if isinstance(held, Items) and isinstance(key, Constant):
            if isinstance(key.value, int) and key.value < 0:
                return held.entries.get(len(held.entries) + key.value)
            return held.entries.get(key.value)
        if isinstance(held, (Items, Each)):
            return Each(element(held)) if kinds == ["keep"] else element(held)
        return each_weight(held, lambda axes: axes.indexed(kinds))

    def _index(self, node: ast.expr, frame: Frame) -> str:
        if isinstance(node, ast.Slice):
            return "keep"
        value = self.value(node, frame)
        if isinstance(value, Constant) and value.value is None:
            return "new"
        if isinstance(value, Constant) and value.value is ...:
            return "…"
        if isinstance(value, Scalar) or (isinstance(value, Constant) and isinstance(value.value, int)):
            return "one"
        return "keep" if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "slice" else "some"

    def _Call(self, node: ast.Call, frame: Frame) -> Any:
        given: list[Any] = []
        for part in node.args:
            value = self.value(part, frame)
            if isinstance(part, ast.Starred):
                given += value.entries.values() if isinstance(value, Items) else [element(value)]
            else:
                given.append(value)
        named: dict[str, Any] = {}
        for keyword in node.keywords:
            value = self.value(keyword.value, frame)
            if keyword.arg is not None:
                named[keyword.arg] = value
            elif isinstance(value, Items):
                named |= {key: entry for key, entry in value.entries.items() if isinstance(key, str)}
        function = node.func
        if not isinstance(function, ast.Attribute):
            return self.apply(self.value(function, frame), given, named, getattr(function, "id", ""))
        if isinstance(function.value, ast.Call) and getattr(function.value.func, "id", "") == "super":
            return self.apply(self.inherited(frame.code.of, function.attr), given, named, "")
        of = self.value(function.value, frame)
        if function.attr in ("append", "add", "extend") and isinstance(of, (Items, Each)) and given:
            new = element(given[0]) if function.attr == "extend" else given[0]
            self.assign(function.value, Each(either([element(of), new])), frame)
            return None
        return self.method(of, function.attr, given, named)
