r"""Which factor of a PEFT `ParamWrapper` meets the input: read off how the layer uses the wrapped weight.

With `LoraConfig(target_parameters=…)` PEFT adapts a bare parameter W, such as the weights of all experts. Its `lora_A`
has W's last dimension as columns, or the one before it where the layer says `is_transposed`. That is the input's side
for y = W x; for y = x W (Llama 4's experts, GPT-2's Conv1D) it is the output's, and A and B have changed names. What
the layer's own code multiplies W with decides; names and sizes do not.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
import warnings
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from loraplus.errors import LoraPlusWarning
from loraplus.layouts import Role

_LAST, _BEFORE_LAST = -1, -2
_FLIPS = frozenset({"T", "mT", "H", "mH", "t", "transpose", "permute", "swapaxes", "swapdims", "adjoint"})
_KEEPS = frozenset(
    "data to type type_as float half bfloat16 double cuda cpu contiguous clone detach view reshape unsqueeze squeeze "
    "chunk split unbind expand index_select narrow requires_grad_".split()
)
# Name of a function: the places of the left and the right operand of its matrix product.
_PRODUCTS: dict[str, tuple[int, int]] = dict.fromkeys(("matmul", "mm", "bmm", "_grouped_mm", "grouped_mm"), (0, 1))
_PRODUCTS |= dict.fromkeys(("addmm", "baddbmm", "addbmm"), (1, 2))
_DEPTH = 3  # methods that hand the weight on to others


def wrapped_roles(modules: Iterable[nn.Module]) -> dict[int, Role]:
    """{id of a factor's module: its role}, for those of wrapped parameters whose name in PEFT says another.

    Warns once for each layer whose code does not tell; PEFT's names are taken there.
    """
    found: dict[int, Role] = {}
    for module in modules:
        name = vars(module).get("parameter_name")
        if not isinstance(name, str) or not hasattr(module, "get_param") or not hasattr(module, "lora_A"):
            continue
        wrapper: Any = module
        layer = wrapper.get_base_layer()
        if isinstance(layer, nn.Embedding):  # a row is picked: the side of the rows is the input's
            roles = (Role.EMBEDDING_B, Role.EMBEDDING_A)
        elif _meets_input(wrapper, layer, name):
            continue
        else:
            roles = (Role.B, Role.A)
        for factors, role in zip((wrapper.lora_A, wrapper.lora_B), roles, strict=True):
            found |= {id(part): role for factor in factors.values() for part in factor.modules()}
    return found


def _meets_input(wrapper: Any, layer: nn.Module, name: str) -> bool:
    """Whether `lora_A` does."""
    side = input_side(type(layer), name)
    if side is None and isinstance(getattr(layer, "is_transposed", None), bool):  # transformers' own word for it
        side = _BEFORE_LAST if layer.is_transposed else _LAST
    if side is None:
        _warn(type(layer).__name__, name)
        return True
    # Of one expert, or of a weight of two dimensions, PEFT adds B A as it is.
    return side == (_LAST if wrapper._did_swap_in_out_features or wrapper.num_experts == 1 else _BEFORE_LAST)


@functools.cache
def _warn(layer: str, name: str) -> None:
    warnings.warn(
        f"the code of {layer} does not tell which dimension of {name} meets the layer's input; lora_A is taken for A",
        LoraPlusWarning,
        stacklevel=2,
    )


@functools.cache
def input_side(layer: type[nn.Module], name: str) -> int | None:
    """The dimension of a layer's weight that is summed over with the input: −1 in x Wᵀ, −2 in x W.

    Args:
        layer: class of the layer.
        name: of the weight, an attribute of the layer.

    Returns:
        None if the layer's code cannot be read, or says both or neither.

    Example:
        >>> input_side(nn.Linear, "weight")
        -1
    """
    sides: set[int] = set()
    for method in dir(layer):
        if method.startswith("__") or (hasattr(nn.Module, method) and method != "forward"):
            continue
        _Reader(layer, name, sides).read(method, {})
    return sides.pop() if len(sides) == 1 else None


class _Reader(ast.NodeVisitor):
    """Follows a weight through one method: which names hold it, whether transposed, and what it is multiplied with."""

    def __init__(self, layer: type[nn.Module], name: str, sides: set[int], depth: int = _DEPTH) -> None:
        self._layer, self._name, self._sides, self._depth = layer, name, sides, depth
        self._held: dict[str, bool] = {}  # {local name: transposed}

    def read(self, method: str, arguments: dict[int | str, bool]) -> None:
        """Reads a method that is called with the weight as some of its arguments."""
        function = _definition(getattr(self._layer, method, None))
        if function is None:
            return
        names = [argument.arg for argument in function.args.posonlyargs + function.args.args]
        for key, transposed in arguments.items():
            if isinstance(key, str):
                self._held[key] = transposed
            elif key + 1 < len(names):  # past self
                self._held[names[key + 1]] = transposed
        for statement in function.body:
            self.visit(statement)

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        for target in node.targets:
            self._assign(target, self._weight(node.value))

    def visit_For(self, node: ast.For) -> None:
        values, targets = [node.iter], [node.target]
        if (
            isinstance(node.iter, ast.Call)
            and _last_name(node.iter.func) == "zip"
            and isinstance(node.target, ast.Tuple)
        ):
            values, targets = node.iter.args, node.target.elts
        for target, value in zip(targets, values, strict=False):
            self._assign(target, self._weight(value))
        self.generic_visit(node)

    def _assign(self, target: ast.expr, transposed: bool | None) -> None:
        for part in target.elts if isinstance(target, ast.Tuple) else [target]:
            if isinstance(part, ast.Name):
                self._held.pop(part.id, None)
                if transposed is not None:
                    self._held[part.id] = transposed

    def visit_BinOp(self, node: ast.BinOp) -> None:
        if isinstance(node.op, ast.MatMult):
            self._product(node.left, node.right)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        name, operands = _last_name(node.func), list(node.args)
        if isinstance(node.func, ast.Attribute) and not _is_library(node.func.value):
            operands.insert(0, node.func.value)  # x.matmul(w)
        if name in _PRODUCTS:
            left, right = _PRODUCTS[name]
            if right < len(operands):
                self._product(operands[left], operands[right])
        elif name in ("linear", "multi_head_attention_forward"):
            for weight in (*node.args, *(keyword.value for keyword in node.keywords)):
                self._found(self._weight(weight), _LAST)
        elif name == "einsum":
            self._einsum(node.args)
        elif isinstance(node.func, ast.Attribute) and _is_self(node.func.value) and self._depth:
            self._call(node)
        self.generic_visit(node)

    def _call(self, node: ast.Call) -> None:
        given: dict[int | str, ast.expr] = {
            **dict(enumerate(node.args)),
            **{k.arg: k.value for k in node.keywords if k.arg},
        }
        handed = {key: held for key, value in given.items() if (held := self._weight(value)) is not None}
        if handed:
            _Reader(self._layer, self._name, self._sides, self._depth - 1).read(_last_name(node.func), handed)

    def _product(self, left: ast.expr, right: ast.expr) -> None:
        self._found(self._weight(right), _BEFORE_LAST)
        self._found(self._weight(left), _LAST)

    def _einsum(self, arguments: list[ast.expr]) -> None:
        equation = arguments[0].value if arguments and isinstance(arguments[0], ast.Constant) else None
        if not isinstance(equation, str) or "->" not in equation:
            return
        inputs, result = equation.replace(" ", "").split("->")
        terms = inputs.split(",")
        for term, operand in zip(terms, arguments[1:], strict=False):
            summed = [place - len(term) for place, letter in enumerate(term) if letter not in result]
            if len(summed) == 1 and summed[0] in (_LAST, _BEFORE_LAST):
                self._found(self._weight(operand), summed[0])

    def _found(self, transposed: bool | None, side: int) -> None:
        if transposed is not None:
            self._sides.add(_LAST + _BEFORE_LAST - side if transposed else side)

    def _weight(self, node: ast.expr) -> bool | None:
        """Whether an expression is the weight transposed; None if it is not the weight."""
        if isinstance(node, ast.Name):
            return self._held.get(node.id)
        if isinstance(node, ast.Subscript):
            return self._weight(node.value)
        if isinstance(node, ast.Attribute):
            if _is_self(node.value):
                return False if node.attr == self._name else None
            return self._changed(node.attr, node.value)
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Attribute) and not _is_library(node.func.value):
                return self._changed(node.func.attr, node.func.value)
            return self._changed(_last_name(node.func), node.args[0]) if node.args else None
        return None

    def _changed(self, by: str, node: ast.expr) -> bool | None:
        held = self._weight(node) if by in _FLIPS or by in _KEEPS else None
        return held if held is None else held != (by in _FLIPS)


def _definition(method: Callable[..., Any] | None) -> ast.FunctionDef | None:
    if not callable(method):
        return None
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(method))))
    except (OSError, TypeError, SyntaxError):  # built in, generated, or in a form of its own
        return None
    return tree.body[0] if isinstance(tree.body[0], ast.FunctionDef) else None


def _last_name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def _is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"


def _is_library(node: ast.expr) -> bool:
    """torch, F, nn.functional, torch.ops.…: the module that a function is taken from."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return isinstance(node, ast.Name) and node.id in ("torch", "F", "nn", "functional")
