"""Notices when something takes an optimizer's groups away from the ratios they were built with, and says so once.

`verify` proves the rates of one moment. Later a scheduler with a rate of its own, a callback or a line of the user's
can give all groups one rate, or add B to a group at A's, and training goes on as plain LoRA. The rates are compared
before every step. It changes nothing, neither in the optimizer nor in its state.
"""

from __future__ import annotations

import functools
import math
import warnings
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from loraplus.errors import LoraPlusWarning
from loraplus.steps.group_rates import Groups, base_rate, group_labels, rate_as_number, reference_group
from loraplus.steps.wrappers import unwrapped
from loraplus.watching.membership import Membership
from loraplus.watching.schedulers import cause

_TOLERANCE = 1e-3  # relative: above all rounding in a schedule, below any change of a ratio that matters
_NOTHING = 1e-4  # a rate of which part of its own trains nothing: no more is said of it than of 0
_SELDOM = 100  # steps between two looks that cost something: at rates in an accelerator's memory, at all parameters
_NAMED = 3
_MEMBERS = (
    "give what is trained later groups at its own rates: those of loraplus.param_groups, to optimizer.add_param_group"
)


def watch_rates(model: nn.Module | None, optimizer: Any) -> RateWatch | None:
    """Has an optimizer warn, once, when its groups leave the ratios that they have now.

    Every optimizer that loraplus builds is watched. A schedule that multiplies all rates, from or to 0 included, says
    nothing. What is told: a group whose rate changes in relation to A's, with what did it; a B factor that comes into
    a group at another ratio; a factor that is moved, or trainable and in no group.

    Args:
        model: whose factors should be in the groups; call it for each of several. None: only the groups' rates.
        optimizer: any torch optimizer, wrapped or not.

    Returns:
        The watch, whose `.remove()` ends it; None if the optimizer has none of torch's step hooks.

    Example:
        >>> a, b = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
        >>> groups = [{"params": [a], "lr": 1.0, "name": "lora_A"}, {"params": [b], "lr": 16.0, "name": "lora_B"}]
        >>> optimizer = torch.optim.SGD(groups)
        >>> watch_rates(None, optimizer) is watch_rates(None, optimizer)
        True
    """
    optimizer = unwrapped(optimizer)
    if not hasattr(optimizer, "_optimizer_step_pre_hooks"):
        return None
    watch = getattr(optimizer, "loraplus_watch", None)
    if not (isinstance(watch, RateWatch) and watch.on):
        _hook_all_optimizers()
        watch = optimizer.loraplus_watch = RateWatch()
        watch.start(optimizer)
    if model is not None:
        watch.members.add(model, optimizer.param_groups)
    return watch


def unwatch_rates(optimizer: Any) -> None:
    """Ends what `watch_rates` began, until it is called again."""
    watch = getattr(unwrapped(optimizer), "loraplus_watch", None)
    if watch is not None:
        watch.remove()


@functools.cache
def _hook_all_optimizers() -> None:
    """One hook for all, so that an optimizer has none of ours, and ours is asked before its own.

    `AutoRates`' hook puts other rates into the groups for the length of a step.
    """
    register_optimizer_step_pre_hook(_before_step)


def _before_step(optimizer: Any, args: Any, kwargs: Any) -> None:
    if not torch.compiler.is_compiling():
        watch = getattr(optimizer, "loraplus_watch", None)
        if watch is not None:
            watch.look(optimizer)


class RateWatch:
    """The ratios that an optimizer's groups had, to compare later ones with. A copy of it watches nothing."""

    def __init__(self) -> None:
        self.steps = 0
        self.members = Membership({})
        self._optimizer: weakref.ref[Any] | None = None
        self._handles: list[Any] = []
        self._relations: dict[str, float] = {}  # label of a group: its base rate over that of A's group
        self._base_of_a = self._base_of_a_at_first = 0.0
        self._groups: list[tuple[int, int]] = []
        self._expected: list[float | None] = []  # the relations of the groups that are there now
        self._reference = 0
        self._told_rates = self._off_before = self._loaded_off = False
        self._told_of: set[str] = set()

    def __reduce__(self) -> tuple[Any, ...]:
        return RateWatch, ()

    @property
    def on(self) -> bool:
        """Whether it watches an optimizer."""
        return self._optimizer is not None

    def start(self, optimizer: Any) -> None:
        """Takes the present rates as the ones that the optimizer should keep the ratios of."""
        self._optimizer = weakref.ref(optimizer)
        self._handles = [
            optimizer.register_load_state_dict_pre_hook(self._before_load),
            optimizer.register_load_state_dict_post_hook(self._after_load),
        ]
        groups = optimizer.param_groups
        labels, base = group_labels(groups), [base_rate(group) for group in groups]
        self._base_of_a_at_first = of_a = base[reference_group(labels)] or 0.0
        if of_a:
            self._relations = {label: rate / of_a for label, rate in zip(labels, base, strict=True) if rate}
        self.members = Membership(self._relations)
        self._match(groups)

    def remove(self) -> None:
        """Ends the watch, until `watch_rates` is called again."""
        for handle in self._handles:
            handle.remove()
        self._optimizer, self._handles = None, []

    def why(self, optimizer: Any) -> str | None:
        """What set the present rates, if they are not in the ratios that the optimizer was built with."""
        if not self._off(optimizer.param_groups, on_accelerator=True):
            return None
        if self._loaded_off:
            return "load_state_dict did it: the state was trained at other rates, and torch goes on with those"
        return cause(optimizer, self._expected, self._reference)

    def look(self, optimizer: Any) -> None:
        """Compares rates and places before a step, and warns."""
        if self._optimizer is None or self._optimizer() is not optimizer:  # a twin of the optimizer has its attributes
            return
        self.steps += 1
        groups, seldom = optimizer.param_groups, self.steps % _SELDOM == 1
        changed = _shape(groups) != self._groups
        if changed:
            self._match(groups)
        if changed or seldom:
            problems = self.members.problems(groups, self._reference)
            self._tell([f"{name} {what}" for name, what in problems.items() if name not in self._told_of], _MEMBERS)
            self._told_of |= problems.keys()
        if not self._told_rates and (off := self._off(groups, on_accelerator=seldom)):
            self._told_rates = True
            self._tell_rates(optimizer, off)

    def _before_load(self, optimizer: Any, state: Any) -> None:
        self._off_before = bool(self._off(optimizer.param_groups, on_accelerator=True))

    def _after_load(self, optimizer: Any) -> None:
        self._told_rates = False
        self._match(optimizer.param_groups)
        # Accelerate loads an optimizer's own state into it.
        self._loaded_off = not self._off_before and bool(self._off(optimizer.param_groups, on_accelerator=True))

    def _match(self, groups: Groups) -> None:
        labels = group_labels(groups)
        self._groups = _shape(groups)
        self._reference = reference_group(labels)
        known = [self._relations.get(label) for label in labels]
        of_reference = (known[self._reference] if known else None) or 1.0  # where groups stand in another order now
        self._expected = [relation and relation / of_reference for relation in known]
        self._base_of_a = self._base_of_a_at_first * of_reference

    def _off(self, groups: Groups, *, on_accelerator: bool) -> list[int]:
        """Indices of the groups whose rate is not in relation to that of A's group."""
        rates = [self._rate_of(group, relation) for group, relation in zip(groups, self._expected, strict=True)]
        if any(isinstance(rate, torch.Tensor) and rate.device.type != "cpu" for rate in rates) and (
            not on_accelerator or torch.cuda.is_current_stream_capturing()
        ):
            return []  # reading them waits for the device, and cannot be done while a graph is recorded
        of_a = rate_as_number(rates[self._reference]) if rates and self._expected[self._reference] else None
        if of_a is None:
            return []
        least = _NOTHING * self._base_of_a
        return [
            index
            for index, (rate, relation) in enumerate(zip(map(rate_as_number, rates), self._expected, strict=True))
            if relation and rate is not None and max(of_a, rate / relation) > least
            and not math.isclose(rate, of_a * relation, rel_tol=_TOLERANCE)
        ]  # fmt: skip

    def _rate_of(self, group: Mapping[str, Any], relation: float | None) -> Any:
        """A group's rate; where rates are automatic, what the schedule makes of the rate that it was built with."""
        optimizer = None if self._optimizer is None else self._optimizer()
        for auto in getattr(optimizer, "loraplus_autos", ()):
            automatic = auto.rates_of(group)
            if automatic is not None:
                now, base = automatic
                return now / base * (relation or 0.0) * self._base_of_a if base else None
        return group.get("lr")

    def _tell_rates(self, optimizer: Any, off: list[int]) -> None:
        labels = group_labels(optimizer.param_groups)
        each = zip(optimizer.param_groups, self._expected, strict=True)
        rates = [rate_as_number(self._rate_of(group, relation)) or 0.0 for group, relation in each]
        of_a = rates[self._reference]
        problems = [
            f"{labels[index]} is at {rates[index] / of_a if of_a else math.inf:.4g} times the rate of "
            f"{labels[self._reference]} and was built with {self._expected[index]:.4g}"
            for index in off
        ]
        self._tell(problems, self.why(optimizer) or "")

    def _tell(self, problems: list[str], why: str) -> None:
        if problems:
            more = f"; and {len(problems) - _NAMED} more" if len(problems) > _NAMED else ""
            text = "; ".join(problems[:_NAMED]) + more
            # 6: the line that takes the step, past our hook and torch's wrapper of `step`.
            warnings.warn(f"at step {self.steps}, {text}; {why}", LoraPlusWarning, stacklevel=6)


def _shape(groups: Groups) -> list[tuple[int, int]]:
    """Which groups there are, in which order, and of how many parameters."""
    return [(id(group), len(group["params"])) for group in groups]
