"""Runs a layer's code on stand-ins that know nothing but where the layer's weight is.

No number is computed and no tensor is read. Every argument of the layer, and everything that it has besides the weight,
is a stand-in that takes part in any operation and gives another. Where the code asks a stand-in for a yes or no, it is
run again with the other answer, until every place has had both. What the operations do to the weight's dimensions is
`axes`' to say; a matrix product tells which of them it sums over.
"""

from __future__ import annotations

import bisect
import dis
import importlib
import inspect
import io
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from loraplus.adapters.axes import PRODUCTS, Axes, changed, contracted

_MOST_RUNS, _MOST_ANSWERS = 200, 2000  # a layer that asks for more is a whole model
_SUMS = "add sub truediv floordiv mod pow neg pos abs".split()
_OPERATORS = {f"__{form}mul__": "mul" for form in ("", "r", "i")}
_OPERATORS |= {f"__{form}{name}__": "add" for name in _SUMS for form in ("", "r", "i")}  # entry by entry, all alike
_PRODUCTS_BY_OPERATOR = ("__matmul__", "__rmatmul__", "__imatmul__")
_COMPARISONS = "__eq__ __ne__ __lt__ __le__ __gt__ __ge__ __and__ __or__ __xor__ __invert__ __rand__ __ror__".split()
_SAME_AS = {"multiply": "mul", "concat": "cat", "concatenate": "cat", "chain_matmul": "multi_dot"} | _OPERATORS
_PIECES = frozenset("chunk split tensor_split hsplit vsplit split_with_sizes".split())
_BY_ROWS = frozenset({"linear", "inner", "multi_head_attention_forward"})
_KNOWN = {"dtype": torch.float32, "device": torch.device("cpu"), "layout": torch.strided}


class _Enough(BaseException):
    """Ends a run, past whatever the code catches."""


class Trace:
    """What the runs of one layer's code have found out.

    Args:
        layer: class of the layer.
        name: of the weight, an attribute of the layer.
        dimensions: that the weight has; None where nobody knows.

    Attributes:
        sides: of the weight, those that a product sums over: −1, −2.
    """

    def __init__(self, layer: type[nn.Module], name: str, dimensions: int | None) -> None:
        self.sides: set[int] = set()
        self.weight_name = name
        self._layer = layer
        self._weight = self.stand_in(Axes.of(dimensions))
        self._instance: Any = object.__new__(type(layer.__name__, (_Hollow, layer), {"_trace": self}))
        nn.Module.__init__(self._instance)
        vars(self._instance).pop("training", None)
        self._waiting: list[list[bool]] = []  # answers to begin a run with
        self._answered: set[tuple[Any, bool]] = set()
        self._asked: list[bool] = []  # in this run
        self._last: dict[Any, bool] = {}

    def run(self, method: str) -> None:
        """Runs a method of the layer in every way that it may go: with and without what need not be given."""
        function: Any = inspect.unwrap(inspect.getattr_static(self._layer, method, None))
        if not inspect.isfunction(function):
            return
        places = list(inspect.signature(function).parameters.values())[1:]
        places = [each for each in places if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)]
        needed = [each for each in places if each.default is each.empty]
        for given in [places, needed][: 1 + (needed != places)]:
            by_place = [self.stand_in() for each in given if each.kind is not each.KEYWORD_ONLY]
            by_name = {each.name: self.stand_in() for each in given if each.kind is each.KEYWORD_ONLY}
            self._waiting, runs = [[]], 0
            self._answered.clear()
            while self._waiting and runs < _MOST_RUNS:
                runs += 1
                self._planned, self._asked, self._last = self._waiting.pop(), [], {}
                vars(self._instance)[self.weight_name] = self._instance._parameters[self.weight_name] = self._weight
                with _nothing_done(self):
                    function(self._instance, *by_place, **by_name)

    def answer(self, frame: FrameType) -> bool:
        """A yes or no for a place in the code. Asked a second time in a run it gets the other, so that loops end."""
        place, asked = (frame.f_code, frame.f_lasti), len(self._asked)
        if asked >= _MOST_ANSWERS:
            raise _Enough
        if asked < len(self._planned):
            answer = self._planned[asked]
        elif place in self._last:
            answer = not self._last[place]
        else:
            answer = (place, True) not in self._answered or (place, False) in self._answered
            if (place, not answer) not in self._answered:
                self._waiting.append([*self._asked, not answer])
        self._answered.add((place, answer))
        self._asked.append(answer)
        self._last[place] = answer
        return answer

    def stand_in(self, axes: Axes | None = None) -> StandIn:
        """For the weight, if its axes are given, else for anything."""
        # An integer of no dimensions: torch takes it for a number, too, where an argument must be one.
        made: Any = torch.Tensor._make_wrapper_subclass(StandIn, (), dtype=torch.int64)
        vars(made).update(_trace=self, _axes=axes)
        return made

    def apply(self, name: str, given: Sequence[Any], named: Mapping[str, Any]) -> Any:
        """What a function or method of torch gives back.

        Args:
            name: of the function.
            given, named: its arguments.
        """
        name = _SAME_AS.get(name, name)
        if name in _PRODUCTS_BY_OPERATOR:
            return self._product(*(reversed(given) if name == "__rmatmul__" else given))
        if name in PRODUCTS:
            left, right = (_argument(given, named, place, names) for place, names in sorted(PRODUCTS[name].items()))
            return self._product(left, right)
        if name in _BY_ROWS:  # x Wᵀ
            self._sums_over([(value, -1) for value in (*given, *named.values())])
            return self.stand_in()
        if name in ("einsum", "tensordot", "multi_dot", "sum", "stack", "cat"):
            return getattr(self, f"_{name}")(list(given), dict(named))
        weight = next((value for value in (*given, *named.values()) if axes_of(value) is not None), None)
        if weight is None or (weight is not (given or [None])[0] and name not in ("where", "mul", "add", "to")):
            return self.stand_in()
        return self._changed(weight, name, [value for value in given if value is not weight], named)

    def _changed(self, weight: Any, name: str, given: Sequence[Any], named: Mapping[str, Any]) -> Any:
        axes: Axes = weight._axes
        if name in _PIECES:
            count = given[0] if name == "chunk" and given and isinstance(given[0], int) else 2
            return Pieces([weight] * count)
        if name in ("dim", "ndimension") and axes.whole:
            return len(axes.labels)
        if name == "__getitem__":
            return self.stand_in(axes.indexed([_index(part) for part in _listed(given[0])]))
        plain = {key: _plain(value) for key, value in named.items()}
        after = changed(axes, name, [_plain(value) for value in given], plain)
        if after is not None and name == "mul" and any(isinstance(value, torch.Tensor) for value in given):
            after = replace(after, mixed=True)
        made = self.stand_in(after)
        return Pieces([made]) if name == "unbind" else made

    def _product(self, left: object, right: object) -> StandIn:
        """A matrix product of two."""
        of_left, of_right = axes_of(left), axes_of(right)
        if of_left is None or of_right is None:
            row = of_right is not None and len(of_right.labels) < 2
            self._sums_over([(left, -1), (right, -1 if row else -2)])
        return self.stand_in()

    def _sums_over(self, places: Sequence[tuple[Any, Any]]) -> None:
        """Takes note of (operand, dimension) pairs that a product sums over."""
        for operand, dimension in places:
            axes = axes_of(operand)
            if axes is not None and axes.label(dimension) in (-1, -2):
                self.sides.add(axes.label(dimension) or 0)

    def _einsum(self, given: list[Any], named: dict[str, Any]) -> StandIn:
        equation, *operands = given or [named.get("equation")]
        operands = list(operands[0]) if len(operands) == 1 and isinstance(operands[0], (list, tuple)) else operands
        if isinstance(equation, str):
            self._sums_over(contracted(equation, operands))
        return self.stand_in()

    def _tensordot(self, given: list[Any], named: dict[str, Any]) -> StandIn:
        dims = _plain(_argument(given, named, 2, ("dims",)))
        dims = 2 if dims is None else dims
        for place, name in enumerate("ab"):
            if isinstance(dims, int):
                over: Any = range(dims) if place else range(-dims, 0)
            else:
                over = dims[place] if isinstance(dims, list) and len(dims) == 2 else []
            operand = _argument(given, named, place, (name,))
            self._sums_over([(operand, each) for each in ([over] if isinstance(over, int) else over or [])])
        return self.stand_in()

    def _multi_dot(self, given: list[Any], named: dict[str, Any]) -> StandIn:
        factors = given[0] if given and isinstance(given[0], (list, tuple)) else given
        self._sums_over([(factor, -2 if place else -1) for place, factor in enumerate(factors)])
        return self.stand_in()

    def _sum(self, given: list[Any], named: dict[str, Any]) -> StandIn:
        """Over what was multiplied entry by entry, it completes a product."""
        operand, over = _argument(given, named, 0, ("input",)), _plain(_argument(given, named, 1, ("dim", "axis")))
        if (axes := axes_of(operand)) is not None and axes.mixed:
            self._sums_over([(operand, each) for each in (over if isinstance(over, list) else [over])])
        return self.stand_in()

    def _stack(self, given: list[Any], named: dict[str, Any]) -> StandIn:
        axes = next((axes for each in _argument(given, named, 0, ("tensors",)) if (axes := axes_of(each))), None)
        return self.stand_in(axes and axes.with_new(_plain(_argument(given, named, 1, ("dim", "axis"))) or 0))

    def _cat(self, given: list[Any], named: dict[str, Any]) -> StandIn:
        tensors = _argument(given, named, 0, ("tensors",))
        return self.stand_in(next((axes for each in tensors if (axes := axes_of(each))), None))


class StandIn(torch.Tensor):
    """The weight or something made of it, if it has axes; else any tensor, number, function or object."""

    _trace: Trace
    _axes: Axes | None

    def __getattribute__(self, name: str) -> Any:
        own = object.__getattribute__
        if name in ("_trace", "_axes", "__class__", "__dict__") or (name.startswith("__") and name.endswith("__")):
            return own(self, name)
        trace, axes = own(self, "_trace"), own(self, "_axes")
        if name == "_is_param":  # what isinstance(…, nn.Parameter) asks for
            return axes is not None
        if name in _KNOWN:
            return _KNOWN[name]
        if axes is not None:
            if axes.whole and name == "ndim":
                return len(axes.labels)
            if axes.whole and name == "shape":
                return tuple(trace.stand_in() for _ in axes.labels)
            if name in ("T", "mT", "H", "mH", "data"):
                return trace.apply(name, [self], {})
        made = trace.stand_in()
        vars(made).update(_of=self, _called=name)
        return made

    def __call__(self, *given: object, **named: object) -> Any:
        called = vars(self).get("_called", "")
        of = [vars(self)["_of"]] if called else []
        return self._trace.apply(called, [*of, *given], named)

    @classmethod
    def __torch_dispatch__(cls, func: object, types: object, args: object = (), kwargs: object = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:  # where torch needs a number itself, as for a size
            return 1
        raise TypeError(f"{func} is not called: there are no numbers here")

    def __bool__(self) -> bool:
        return self._trace.answer(_caller())

    def __contains__(self, other: object) -> bool:
        return self._trace.answer(_caller())

    def __index__(self) -> int:
        return 1

    __int__ = __len__ = __index__

    def __float__(self) -> float:
        return 1.0

    def __iter__(self) -> Iterator[Any]:
        first = self if self._axes is None else self._trace.stand_in(self._axes.without(0))
        return iter([first] * _wanted(_caller()))

    def __enter__(self) -> StandIn:
        return self

    def __exit__(self, *error: object) -> None:
        """Of a context that a layer has."""

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return "…"

    def __format__(self, spec: str) -> str:
        return "…"

    __hash__ = torch.Tensor.__hash__


def _operator(name: str) -> Any:
    def operate(self: StandIn, *others: object) -> Any:
        return self._trace.apply(name, [self, *others], {})

    return operate


for _name in (*_OPERATORS, *_PRODUCTS_BY_OPERATOR, *_COMPARISONS, "__getitem__", "__setitem__"):
    setattr(StandIn, _name, _operator(_name))


class Pieces(tuple):
    """Parts of the weight, as many as the code has names for."""

    def __iter__(self) -> Iterator[Any]:
        own = list(super().__iter__())
        wanted = _wanted(_caller())
        return iter((own * wanted)[: max(wanted, len(own))])


class _Hollow:
    """A layer that was not made: it has its methods, its weight, and anything else that the code asks for."""

    _trace: Trace

    def __init_subclass__(cls) -> None:
        """Past the layer's own, which may keep a list of its subclasses."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        return self._trace.stand_in()

    def __setattr__(self, name: str, value: Any) -> None:
        if name != self._trace.weight_name:  # what becomes of the weight's own name is still the weight
            vars(self)[name] = value


class _AllStandIns(TorchFunctionMode):
    """No function of torch is run; what it would give back is a stand-in."""

    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self._trace = trace

    def __torch_function__(self, func: Any, types: object, args: Any = (), kwargs: Any = None) -> Any:
        return self._trace.apply(getattr(func, "__name__", "").removeprefix("linalg_"), args, kwargs or {})


class _NoCollectives(TorchDispatchMode):
    """Refuses what would wait for other processes: only this one may be looking."""

    def __torch_dispatch__(self, func: Any, types: object, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            raise TypeError(f"{func} is not called: nothing is sent while code is looked at")
        return func(*args, **(kwargs or {}))


@contextmanager
def _nothing_done(trace: Trace) -> Iterator[None]:
    """Code goes as far as it can, and computes, sends and says nothing."""
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            with _NoCollectives(), _vmap_of_one(), _AllStandIns(trace):
                yield
        except (Exception, _Enough):  # what code makes of stand-ins is anybody's guess; what it did before counts
            return


@contextmanager
def _vmap_of_one() -> Iterator[None]:
    """`torch.vmap` of stand-ins calls its function with one part of each; torch has no hook for it."""
    apis: Any = importlib.import_module("torch._functorch.apis")
    own = apis.vmap_impl

    def vmap(
        function: Any, in_dims: object, out_dims: object, randomness: object, size: object, *args: Any, **kwargs: Any
    ) -> Any:
        if not any(isinstance(arg, StandIn) for arg in args):
            return own(function, in_dims, out_dims, randomness, size, *args, **kwargs)
        dims = in_dims if isinstance(in_dims, (list, tuple)) else [in_dims] * len(args)
        return function(
            *(arg if dim is None else arg.select(dim, 0) for arg, dim in zip(args, dims, strict=True)), **kwargs
        )

    apis.vmap_impl = vmap
    try:
        yield
    finally:
        apis.vmap_impl = own


def axes_of(value: object) -> Axes | None:
    """The dimensions of a value, if it stands for the weight."""
    return value._axes if isinstance(value, StandIn) else None


def _argument(given: Sequence[Any], named: Mapping[str, Any], place: int, names: Sequence[str]) -> Any:
    return next((named[name] for name in names if name in named), given[place] if place < len(given) else None)


def _plain(value: object) -> Any:
    """A number, string, or list of them; None for what the code does not say."""
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return value if isinstance(value, (bool, int, float, str)) else None


def _listed(key: object) -> Sequence[Any]:
    return key if isinstance(key, tuple) else (key,)


def _index(index: object) -> str:
    """What an index does, as `Axes.indexed` names it."""
    if index is None or index is Ellipsis or isinstance(index, slice):
        return "new" if index is None else "…" if index is Ellipsis else "keep"
    return "one" if isinstance(index, int) else "some"


def _caller() -> FrameType:
    """The frame of the code that asks a method of ours."""
    return sys._getframe(2)


def _wanted(frame: FrameType) -> int:
    """How many values code takes from what it iterates over: as many as it has names for, or one for a loop's body.

    Read off the instruction that asks, as torch.fx does.
    """
    instructions = list(dis.get_instructions(frame.f_code))
    at = instructions[bisect.bisect_left([each.offset for each in instructions], frame.f_lasti)]
    if at.opname == "UNPACK_EX":  # a, *b = …
        return (int(at.argval) & 0xFF) + (int(at.argval) >> 8)
    return int(at.argval) if at.opname == "UNPACK_SEQUENCE" else 1
