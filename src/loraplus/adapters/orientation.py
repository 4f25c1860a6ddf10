r"""Which factor of a PEFT `ParamWrapper` meets the input: read off how the layer uses the wrapped weight.

With `LoraConfig(target_parameters=…)` PEFT adapts a bare parameter W, such as the weights of all experts. Its `lora_A`
has W's last dimension as columns, or the one before it where the layer says `is_transposed`. That is the input's side
for y = W x; for y = x W (Llama 4's experts, GPT-2's Conv1D) it is the output's, and A and B have changed names. What
the layer's own code multiplies W with decides; names and sizes do not.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

from torch import nn

from loraplus.adapters.weight_trace import Trace
from loraplus.notices import tell, told_once
from loraplus.parts import Role

_LAST, _BEFORE_LAST = -1, -2


@told_once()
def wrapped_roles(modules: Iterable[nn.Module]) -> dict[int, Role]:
    """{id of a factor's module: its role}, for those of wrapped parameters whose name in PEFT says another.

    Warns once for each class of layers whose code does not tell; PEFT's names are taken there.
    """
    role_of: dict[int, Role] = {}
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
            role_of |= {id(part): role for factor in factors.values() for part in factor.modules()}
    return role_of


def _meets_input(wrapper: nn.Module, layer: nn.Module, name: str) -> bool:
    """Whether `lora_A` does."""
    side = input_side(type(layer), name, getattr(getattr(layer, name, None), "ndim", None))
    if side is None and isinstance(getattr(layer, "is_transposed", None), bool):  # transformers' own word for it
        side = _BEFORE_LAST if layer.is_transposed else _LAST
    if side is None:
        tell(
            f"the code of {type(layer).__name__} does not tell which dimension of {name} meets the layer's input; "
            "lora_A is taken for A"
        )
        return True
    # Of one expert, or of a weight of two dimensions, PEFT adds B A as it is.
    return side == (_LAST if wrapper._did_swap_in_out_features or wrapper.num_experts == 1 else _BEFORE_LAST)


@functools.cache
def input_side(layer: type[nn.Module], name: str, dimensions: int | None = None) -> int | None:
    """The dimension of a layer's weight that is summed over with the input: −1 in x Wᵀ, −2 in x W.

    Args:
        layer: class of the layer.
        name: of the weight, an attribute of the layer.
        dimensions: how many the weight has; some turns of it cannot be read without.

    Returns:
        None if the layer's code does not say, or says both.

    Example:
        >>> input_side(nn.Linear, "weight")
        -1
    """
    try:
        trace = Trace(layer, name, dimensions)
    except TypeError:  # a class that cannot be derived from
        return None
    trace.run("forward")
    if not trace.sides:
        trace.run("__init__")  # for what it puts into attributes; what it multiplies is not the layer's input
        trace.sides.clear()
        trace.run("forward")
    others = [method for method in dir(layer) if not method.startswith("__") and not hasattr(nn.Module, method)]
    for _ in range(2):  # what the last of them puts into an attribute, the first may use
        for method in others if not trace.sides else ():
            trace.run(method)
        if not trace.sides:
            trace.run("forward")
    return trace.sides.pop() if len(trace.sides) == 1 else None
