"""Faster forwards: classes that a module changes to and back from, so that nothing else about it changes.

A `Fast` class is mixed into the module's own: its `forward` computes the same and falls back on `super().forward`
wherever it might not. The module keeps its name, parameters, hooks, state dict and copies; `isinstance` still holds.
"""

from __future__ import annotations

import copyreg
import functools
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _torch_module

from loraplus.errors import InputError

_Base = nn.Module if TYPE_CHECKING else object


class Fast(_Base):
    """Mixed into the class of a module."""

    lever = ""
    """Which of `LEVERS` it belongs to."""
    what = ""
    """What it does, in words."""
    only_input = True
    """Whether the fast form takes one tensor, by place; a call of another kind is the module's own."""

    def __reduce_ex__(self, protocol: Any) -> Any:  # the class is made here, so a copy or a pickle must make it again
        made, arguments, *state = super().__reduce_ex__(protocol)
        if made is copyreg.__newobj__ and _is_mixed(type(self)):  # type: ignore[attr-defined]
            return (_remade, (*type(self).__bases__, *arguments[1:]), *state)
        return (made, arguments, *state)


def make_fast(module: nn.Module, fast: type[Fast]) -> None:
    """Changes a module's class, unless that was done before.

    Args:
        module: of any class.
        fast: is mixed in.
    """
    vars(module).pop(_SLOW, None)
    if not isinstance(module, Fast):
        module.__class__ = _mixed(fast, type(module))


def make_slow(module: nn.Module) -> bool:
    """Gives a module its own class back; says whether it had another.

    One that was wrapped since, as FSDP2 does by a class of its own, keeps that and computes as its first class does.
    """
    if not isinstance(module, Fast) or _SLOW in vars(module):
        return False
    if _is_mixed(type(module)):
        module.__class__ = type(module).__bases__[1]
    else:
        setattr(module, _SLOW, True)
    return True


_SLOW = "_loraplus_slow"
_classes: dict[tuple[type, type], type] = {}


def _is_mixed(cls: type) -> bool:
    """Whether a class is one that was made here, and not one made of it."""
    return cls is _classes.get(cls.__bases__)  # type: ignore[arg-type]


def _mixed(fast: type[Fast], own: type[nn.Module]) -> type:
    """The class of both; the same one each time.

    It goes by the name and the module of the module's own class, which libraries read and write into saved files.
    """
    if (fast, own) not in _classes:

        @functools.wraps(own.forward)  # transformers and PEFT look at the arguments of a model's forward
        def forward(self: Any, *args: object, **kwargs: object) -> Any:
            # A library that keeps this function calls it after `slow_down`, too.
            slow = not isinstance(self, fast) or _SLOW in vars(self) or is_traced()
            if slow or (fast.only_input and (kwargs or len(args) != 1)):
                return own.forward(self, *args, **kwargs)
            return fast.forward(self, *args, **kwargs)

        names = {"__module__": own.__module__, "__qualname__": own.__qualname__, "__doc__": own.__doc__}
        _classes[fast, own] = type(own.__name__, (fast, own), {**names, "forward": forward})
    return _classes[fast, own]


def _remade(fast: type[Fast], own: type[nn.Module], *arguments: object) -> Any:
    """An empty module of the class of both, for a copy or a pickle to fill."""
    cls: Any = _mixed(fast, own)
    return cls.__new__(cls, *arguments)


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


def once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Marks a backward pass that cannot be differentiated again: asking for that is an error, not a wrong number.

    torch's `once_differentiable` lets it pass where the gradient that comes in is a constant.
    """

    @functools.wraps(backward)
    def checked(ctx: Any, *gradients: Tensor) -> Any:  # each of its output's shape (…)
        if torch.is_grad_enabled():
            raise InputError(
                "after speed_up, gradients have no gradients (create_graph=True); call loraplus.slow_down(model) before"
            )
        return backward(ctx, *gradients)

    return checked


def is_sharded(module: nn.Module) -> bool:
    """Whether FSDP holds a module's weights: they are there while the module runs, and then freed."""
    return getattr(module, "_is_fsdp_managed_module", False)


def is_traced() -> bool:
    """Whether the computation is being compiled or transformed, which needs the plain form."""
    return (
        torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or torch.jit.is_tracing()  # type: ignore[no-untyped-call]
    )


def computed_in(tensor: torch.Tensor) -> torch.dtype:
    """The type that matrix products of a tensor (…) are computed in: autocast's, where it is on."""
    kind = tensor.device.type
    if torch.is_autocast_enabled(kind) and tensor.is_floating_point() and tensor.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return tensor.dtype
