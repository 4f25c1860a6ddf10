"""Hooks around every step of an optimizer, and a recorder of the forward passes that led to it."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from loraplus.errors import TrainerSetupError
from loraplus.steps.movement import adapted_layers
from loraplus.steps.recorder import Recorder
from loraplus.steps.wrappers import unwrapped


class StepWatcher:
    """Hooks before and after the steps of an optimizer; subclasses say what is done there, and when to record.

    A step that calls its class's parent's is one step. The closure of a step is called first, so that its gradients are
    there when the step is looked at.

    Args:
        model: a PEFT model, wrapped or not.
        optimizer: the one that trains it, in Accelerate's wrapper or not.

    Raises:
        NoLoraFactorsError: no layer to measure.
        TrainerSetupError: no torch optimizer.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = torch_optimizer(optimizer)
        self._layers = adapted_layers(model)
        self._recorder = Recorder(model, self._layers)
        self._hooks = [
            self._optimizer.register_step_pre_hook(self._step_begins),
            self._optimizer.register_step_post_hook(self._step_ends),
        ]
        weakref.finalize(
            self, self._recorder.remove
        ).atexit = False  # an optimizer that is gone leaves no hooks on its model

    def rest(self) -> None:
        """Takes the hooks off the model until a next step is taken, as when training has ended."""
        self._recorder.remove()

    def remove(self) -> None:
        """Takes all hooks off the model and the optimizer."""
        for hook in self._hooks:
            hook.remove()
        self._recorder.remove()

    def _before_step(self) -> Any:
        """What is returned is kept until the step ends, be it by an error."""

    def _after_step(self) -> None:
        pass

    def _step_begins(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if _is_within_a_step(optimizer):
            return None
        called, kwargs = closure_called(args, kwargs)
        arguments = _Arguments(called)
        arguments.kept = (args, self._before_step())  # args may hold what another watcher keeps
        return arguments, kwargs

    def _step_ends(self, optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
        if not _is_within_a_step(optimizer):
            self._after_step()

    # torch.compile leaves these out of a compiled step.
    _step_begins._torchdynamo_disable = _step_ends._torchdynamo_disable = True  # type: ignore[attr-defined]


class _Arguments(tuple):
    """A step's arguments, which live until it ends, and what is to live as long."""

    kept: Any


def torch_optimizer(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer inside a wrapper, whose steps can be watched.

    Raises:
        TrainerSetupError: it is no torch optimizer.
    """
    inner = unwrapped(optimizer)
    if not isinstance(inner, torch.optim.Optimizer):
        raise TrainerSetupError(f"a torch optimizer is needed, got {type(inner).__name__}")
    return inner


def _is_within_a_step(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the step that called this hook was called by another step of the same optimizer."""
    step = sys._getframe(2)
    frame = step.f_back
    while frame is not None:
        if frame.f_code is step.f_code and frame.f_locals.get("self") is optimizer:
            return True
        frame = frame.f_back
    return False


def closure_called(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a step with its closure replaced by one that knows the loss already."""

    def known(closure: Any) -> Callable[[], Any]:
        with torch.enable_grad():
            loss = closure()
        return lambda: loss

    if len(args) > 1 and callable(args[1]):  # args[0] is the optimizer
        return (args[0], known(args[1]), *args[2:]), kwargs
    if callable(kwargs.get("closure")):
        return args, {**kwargs, "closure": known(kwargs["closure"])}
    return args, kwargs
