"""Faster forwards: classes that a module changes to and back from, so that nothing else about it changes.

A `Fast` class is mixed into the module's own: its `forward` computes the same and falls back on `super().forward` wherever
it might not. The module keeps its name, parameters, hooks, state dict and copies; `isinstance` still holds.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules import module as _torch_module

_Base = nn.Module if TYPE_CHECKING else object


class Fast(_Base):
    """Mixed into the class of a module."""

    lever = ""
    """Which of `LEVERS` it belongs to."""


def make_fast(module: nn.Module, fast: type[Fast]) -> None:
    """Changes a module's class.

    Args:
        module: of any class.
        fast: is mixed in.
    """
    module.__class__ = _mixed(fast, type(module))


def make_slow(module: nn.Module) -> bool:
    """Gives a module its own class back; says whether it had another.

    One that was wrapped since, as FSDP2 does by a class of its own, keeps that and computes as its first class does.
    """
    if not isinstance(module, Fast):
        return False
    cls = type(module)
    if cls.__bases__[0] in _levers() and cls is _classes.get((cls.__bases__[0], cls.__bases__[1])):
        module.__class__ = cls.__bases__[1]
    else:
        module._loraplus_slow = True  # type: ignore[assignment]
    return True


_classes: dict[tuple[type, type], type] = {}


def _levers() -> set[type]:
    return {fast for fast, _ in _classes}


def _mixed(fast: type[Fast], own: type[nn.Module]) -> type:
    """The class of both; the same one each time, under a name by which a pickle finds it again."""
    if (fast, own) not in _classes:

        @functools.wraps(own.forward)  # transformers and PEFT look at the arguments of a model's forward
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            if getattr(self, "_loraplus_slow", False):
                return own.forward(self, *args, **kwargs)
            return fast.forward(self, *args, **kwargs)

        place = ":".join(f"{cls.__module__}:{cls.__qualname__}".replace(".", "/") for cls in (fast, own))
        names = {"__module__": __name__, "__qualname__": place, "__doc__": own.__doc__, "forward": forward}
        _classes[fast, own] = type(own.__name__, (fast, own), names)
    return _classes[fast, own]


def __getattr__(name: str) -> Any:
    if name.count(":") != 3:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    fast_module, fast, own_module, own = name.replace("/", ".").split(":")

    def found(module: str, qualname: str) -> Any:
        return functools.reduce(getattr, qualname.split("."), importlib.import_module(module))

    return _mixed(found(fast_module, fast), found(own_module, own))


def is_plain(modules: Iterable[nn.Module]) -> bool:
    """Whether nothing watches or changes these modules, so that their weights may be used without calling them."""
    for module in modules:
        if (
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
            or "forward" in vars(module)
        ):
            return False
    return not _torch_module._has_any_global_hook()


def is_traced() -> bool:
    """Whether the computation is being compiled or transformed, which needs the plain form."""
    return (
        torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or torch.jit.is_tracing()  # type: ignore[no-untyped-call]
    )


def computed_in(tensor: torch.Tensor) -> torch.dtype:
    """The type that matrix products of a tensor are computed in: autocast's, where it is on."""
    kind = tensor.device.type
    if torch.is_autocast_enabled(kind) and tensor.is_floating_point() and tensor.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return tensor.dtype
