"""A twin of an optimizer over other tensors: what would a step of it do, asked without touching anything of the user's.

The twin has the optimizer's class, options and attributes of its own, and a copy of its state, but other parameters in
the places of those that are asked about. All other parameters are left out. The user's optimizer, its parameters and
its hooks are never written to.
"""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

_HOOKS = (
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)


def twin_over(
    optimizer: torch.optim.Optimizer,
    stand_ins: Mapping[torch.Tensor, torch.Tensor],
    *,
    with_state: bool = True,
    state_of: Mapping[torch.Tensor, torch.Tensor] | None = None,
) -> torch.optim.Optimizer:
    """A copy of an optimizer in which other tensors stand in for some parameters, and all else is left out.

    Optimizers inside it (Lookahead's, say) are copied with it, over the same stand-ins.

    Args:
        optimizer: any torch optimizer; one that is wrapped is to be unwrapped first.
        stand_ins: {parameter of the optimizer: the tensor that takes its place}, of any shape; each tensor is trained
            with the `.grad` that it has. With state, the two must have one shape.
        with_state: the stand-ins start with a copy of the state of what they stand in for; otherwise with none.
        state_of: {parameter that is stood in for: another whose state its stand-in starts with instead}.

    Returns:
        The twin. Groups without a stand-in are left out of it.

    Example:
        >>> weight, other = torch.nn.Parameter(torch.ones(2)), torch.zeros(2)
        >>> twin = twin_over(torch.optim.SGD([weight], lr=0.5), {weight: other})
        >>> other.grad = torch.ones(2)
        >>> step_of(twin)
        >>> other, weight.detach()
        (tensor([-0.5000, -0.5000]), tensor([1., 1.]))
    """
    members = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    memo: dict[int, Any] = {id(parameter): torch.zeros(0) for parameter in members}
    memo |= {id(parameter): other for parameter, other in stand_ins.items()}
    sources = {parameter: (state_of or {}).get(parameter, parameter) for parameter in stand_ins} if with_state else {}
    return _copied(optimizer, {id(other) for other in stand_ins.values()}, memo, sources)


def step_of(twin: torch.optim.Optimizer, closure: Callable[[], Any] | None = None) -> None:
    """Takes a step of a twin, past what a scheduler or a hook on all optimizers would do around it.

    Args:
        twin: of `twin_over`.
        closure: given to the step, for optimizers that need one.
    """
    with _no_global_hooks():
        type(twin).step(twin) if closure is None else type(twin).step(twin, closure)


@contextmanager
def _no_global_hooks() -> Iterator[None]:
    # torch wraps the step of every class, so a step that calls `super().step()` would call them from within too.
    tables: tuple[Any, ...] = (_global_optimizer_pre_hooks, _global_optimizer_post_hooks)
    kept = [dict(table) for table in tables]
    try:
        for table in tables:
            table.clear()
        yield
    finally:
        for table, hooks in zip(tables, kept, strict=True):
            table.update(hooks)


def _copied(
    optimizer: torch.optim.Optimizer,
    owned: set[int],
    memo: dict[int, Any],
    sources: Mapping[torch.Tensor, torch.Tensor],
) -> Any:
    """A copy whose groups have stand-ins only; `sources` says whose state (…) each stand-in (…) starts with."""
    # Not copy.copy: Optimizer.__getstate__ drops the attributes that subclasses have of their own.
    twin = object.__new__(type(optimizer))
    memo[id(optimizer)] = twin
    for value in _values(vars(optimizer)):
        if isinstance(value, torch.optim.Optimizer) and id(value) not in memo:
            _copied(value, owned, memo, sources)
    known = getattr(optimizer, "state", {})  # a class of a user's own may keep it elsewhere
    state = memo[id(known)] = defaultdict(dict)
    several = len(set(map(id, sources.values()))) < len(sources)  # start with one state, and need a copy each
    for parameter, source in sources.items():
        if source in known:
            state[memo[id(parameter)]] = _state_copied(known[source], dict(memo) if several else memo)
    for name, value in vars(optimizer).items():
        if name in _HOOKS:
            vars(twin)[name] = OrderedDict()
        elif name != "step" and not name.startswith("loraplus_"):  # a scheduler puts its own `step` there
            vars(twin)[name] = _deepcopy(value, memo)
    for group in twin.param_groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) in owned]
        group.pop("param_names", None)
        if group.get("capturable") and all(parameter.device.type == "cpu" for parameter in group["params"]):
            group["capturable"] = False  # a compiled step sets it; on a CPU torch refuses it in one that is not
    twin.param_groups[:] = [group for group in twin.param_groups if group["params"]]
    return twin


def _state_copied(state: object, memo: dict[int, Any]) -> Any:
    """A copy of one parameter's state. Plain tensors (…), such as Adam keeps, are copied without the slow deepcopy."""
    if type(state) is dict and all(
        type(value) is torch.Tensor and not value.requires_grad and value.untyped_storage().nbytes() == value.nbytes
        for value in state.values()
    ):
        return {name: value.clone() for name, value in state.items()}
    return copy.deepcopy(state, memo)


def _values(attributes: Mapping[str, Any]) -> Iterable[Any]:
    for value in attributes.values():
        yield from value if isinstance(value, (list, tuple)) else (value,)


def _deepcopy(value: object, memo: dict[int, Any]) -> Any:
    if isinstance(value, nn.Module):  # a whole model is not copied for the sake of a step
        return value
    try:
        return copy.deepcopy(value, memo)
    except Exception:  # a lock, a stream, a process group: nothing that a step would change
        return value
