"""The optimizer inside what hands steps on to it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_WRAPPERS = ("accelerate.", "deepspeed.", "lightning.", "pytorch_lightning.")
_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_load_state_dict_pre_hooks")  # some have the first alone


def unwrapped(optimizer: torch.optim.Optimizer) -> Any:
    """The optimizer that a script built, without the wrappers of Accelerate, DeepSpeed or Lightning, or its own.

    What holds another in `.optimizer` and calls none of torch's step hooks is a wrapper. An optimizer that has hooks
    and holds another, as Lookahead does, takes a step of its own and is none.

    Args:
        optimizer: any, wrapped or not.

    Example:
        >>> import torch, types
        >>> adam = torch.optim.Adam([torch.nn.Parameter(torch.ones(2))])
        >>> unwrapped(types.SimpleNamespace(optimizer=adam)) is adam is unwrapped(adam)
        True
    """
    while (inner := getattr(optimizer, "optimizer", None)) is not None:
        own = type(optimizer).__module__.startswith(_WRAPPERS)
        if not own and all(hasattr(optimizer, name) for name in _HOOKS):
            break
        optimizer = inner
    return optimizer
