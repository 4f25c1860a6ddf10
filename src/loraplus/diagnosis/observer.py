"""Watches every optimizer of a process: what the groups say at a step, and what the step does.

torch calls its global hooks around the step of every optimizer, so the script that takes the steps need not know.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim.optimizer import (
    _global_optimizer_pre_hooks,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from loraplus.diagnosis.measuring import StepMeasurement
from loraplus.diagnosis.unhooked import watch_unhooked
from loraplus.steps.group_rates import rate_as_number
from loraplus.steps.step_watcher import closure_called


class Observed:
    """An optimizer, and what its steps had.

    Attributes:
        steps: how many were taken at a rate above 0.
        stated: of each of them, {id of a parameter: the rate of its group}.
        followed: {id of a parameter: the rate that its last measured step had, over that of its group}.
        learnt: ids of the parameters that had a gradient.
        trouble: why a step could not be measured.
    """

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        self.steps = self.at_zero = 0
        self.stated: list[dict[int, float]] = []
        self.followed: dict[int, float] = {}
        self.learnt: set[int] = set()
        self.trouble = ""

    @property
    def name(self) -> str:
        """The optimizer's class."""
        return type(self.optimizer).__name__

    @property
    def is_ours(self) -> bool:
        """Whether loraplus built its groups, so that it has the rates that it was given."""
        return getattr(self.optimizer, "loraplus_watch", None) is not None

    @property
    def last_stated(self) -> dict[int, float]:
        """{id of a parameter: the rate of its group} at the last step; empty if there was none."""
        return self.stated[-1] if self.stated else {}

    def measured(self) -> dict[int, float]:
        """{id of a parameter: the rate of its step}, all at the point of the schedule of the last step."""
        stated = self.last_stated
        return {key: factor * stated[key] for key, factor in self.followed.items() if key in stated}


class Observer:
    """Hooks around the steps of all optimizers until `remove` is called.

    Args:
        begins: called with an optimizer before its first step.
        stepped: called with what is known of an optimizer after each of its steps.
    """

    def __init__(self, begins: Callable[[Any], None], stepped: Callable[[Observed], None]) -> None:
        self.seen: list[Observed] = []
        self._begins, self._stepped = begins, stepped
        self._within: list[tuple[Any, StepMeasurement | None]] = []
        self._hooks = [
            register_optimizer_step_pre_hook(self._before),
            register_optimizer_step_post_hook(self._after),
        ]

    def reach_unhooked(self) -> None:
        """Watches optimizers that torch's hooks do not reach, those that there are by now."""
        watch_unhooked(self._before, self._after, lambda: self._hooks[0].id in _global_optimizer_pre_hooks)

    def remove(self) -> None:
        """Takes the hooks off."""
        for hook in self._hooks:
            hook.remove()

    def _before(self, optimizer: Any, args: Any, kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return None
        if self._within and _has_parameters_of(optimizer, self._within[0][0]):
            # A step within a step: of a parent class, or of the optimizer inside another.
            self._within.append((optimizer, None))
            return None
        args, kwargs = closure_called(args, kwargs)  # its gradients are to be there
        observed = self._of(optimizer)
        measurement = None
        try:
            measurement = StepMeasurement(optimizer)
        except Exception as error:  # an optimizer that cannot be copied goes on; its groups are believed
            observed.trouble = f"{type(error).__name__}: {error}"
        self._within = [(optimizer, measurement)]
        observed.learnt |= {id(p) for group in optimizer.param_groups for p in group["params"] if p.grad is not None}
        rates = {
            id(parameter): rate
            for group in optimizer.param_groups
            if (rate := rate_as_number(group.get("lr"))) is not None
            for parameter in group["params"]
        }
        if not rates or any(rates.values()):
            observed.steps += 1
            observed.stated.append(rates)
        else:
            observed.at_zero += 1
        return args, kwargs

    def _after(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if not self._within:
            return
        _, measurement = self._within.pop()
        if self._within:
            return
        observed = self._of(optimizer)
        if measurement is not None and observed.last_stated and not self._at_zero(optimizer):
            try:
                stated = observed.last_stated
                rates = {key: rate for key, rate in measurement.rates().items() if stated.get(key)}
                observed.followed |= {key: rate / stated[key] for key, rate in rates.items()}
            except Exception as error:  # as above
                observed.trouble = f"{type(error).__name__}: {error}"
        self._stepped(observed)

    @staticmethod
    def _at_zero(optimizer: Any) -> bool:
        return not any(rate_as_number(group.get("lr")) for group in optimizer.param_groups)

    def _of(self, optimizer: Any) -> Observed:
        known = next((observed for observed in self.seen if observed.optimizer is optimizer), None)
        if known is None:
            self._begins(optimizer)
            known = Observed(optimizer)
            self.seen.append(known)
        return known


def _has_parameters_of(optimizer: Any, outer: Any) -> bool:
    if optimizer is outer:
        return True
    held = {id(parameter) for group in outer.param_groups for parameter in group["params"]}
    return any(id(parameter) in held for group in optimizer.param_groups for parameter in group["params"])
