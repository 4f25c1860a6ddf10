"""Optimizers that torch's hooks do not reach: a class of a user's own, or one that never calls torch's constructor.

They are looked for when a gradient is first computed, and their class's step is watched as torch watches its own.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from typing import Any

from torch import nn

from loraplus.steps.wrappers import unwrapped

Hook = Callable[[Any, Any, Any], Any]


def watch_unhooked(before: Hook, after: Hook, active: Callable[[], bool]) -> None:
    """Calls two hooks around the steps of every such optimizer that there is.

    Args:
        before: called with the optimizer, its arguments and keywords; may return others.
        after: called with the same.
        active: whether torch would call its hooks now; it does not for twins.
    """
    kinds = {type(each) for each in gc.get_objects() if _steps_unseen(type(each)) and _has_groups(each)}
    for kind in kinds:
        kind.step = _watched(kind.step, before, after, active)


def _steps_unseen(kind: type) -> bool:
    step = getattr(kind, "step", None)
    return callable(step) and not getattr(step, "hooked", False) and not issubclass(kind, (nn.Module, type))


def _has_groups(each: Any) -> bool:
    try:
        groups = getattr(each, "param_groups", None)
        is_own = unwrapped(each) is each
    except Exception:  # a property of somebody's that does not work yet
        return False
    return (
        is_own and isinstance(groups, list) and all(isinstance(group, dict) and "params" in group for group in groups)
    )


def _watched(step: Any, before: Hook, after: Hook, active: Callable[[], bool]) -> Any:
    @functools.wraps(step)
    def watched_step(optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        if not active():
            return step(optimizer, *args, **kwargs)
        replaced = before(optimizer, (optimizer, *args), kwargs)
        all_args, kwargs = replaced if replaced is not None else ((optimizer, *args), kwargs)
        result = step(*all_args, **kwargs)
        after(optimizer, all_args, kwargs)
        return result

    watched_step.hooked = True  # type: ignore[attr-defined]  # torch's own mark
    return watched_step
