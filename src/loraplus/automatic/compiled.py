"""Compiled models run eagerly while their layers are looked at: torch.compile does not call hooks that come later."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

_holders: set[int] = set()
_stance: Any = None


def is_compiled(modules: Iterable[nn.Module]) -> bool:
    """Whether one of the modules shows that it is compiled; what `torch.compile(model)` is given does not."""
    return any(
        getattr(module, "_compiled_call_impl", None) is not None or type(module).__name__ == "OptimizedModule"
        for module in modules
    )


def anything_is_compiled() -> bool:
    """Whether this process has compiled anything."""
    return "torch._dynamo" in sys.modules and bool(torch._dynamo.utils.counters.get("stats"))


def run_eagerly(holder: object, wanted: bool) -> None:
    """Has compiled code run as if it were not, for as long as any holder that lives wants it."""
    if wanted and id(holder) not in _holders:
        _holders.add(id(holder))
        weakref.finalize(holder, _release, id(holder)).atexit = False
        _set_stance()
    elif not wanted:
        _release(id(holder))


def _release(holder: int) -> None:
    if holder in _holders:
        _holders.discard(holder)
        _set_stance()


def _set_stance() -> None:
    global _stance
    if _holders and _stance is None:
        _stance = torch.compiler.set_stance("force_eager")
    elif not _holders and _stance is not None:
        _stance.__exit__(None, None, None)  # back to what it was before
        _stance = None
