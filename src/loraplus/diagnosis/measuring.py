"""The rate that a step of an optimizer really had, parameter by parameter, read off how far the step moved it.

A twin of the optimizer takes the same step over copies, with one rate u in all its groups. Steps are linear in the
rate, so with the movements Δ of a parameter and Δ_u of its copy

    rate = u · ⟨Δ, Δ_u⟩ / ⟨Δ_u, Δ_u⟩,

whatever the optimizer makes of gradients, and whatever its groups say. An optimizer that does not read its groups'
rates moves both alike: all its parameters then have one rate.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from loraplus.steps.group_rates import base_rate, in_form_of, rate_as_number
from loraplus.steps.step_probe import train_mode, trial_gradient
from loraplus.steps.twin import step_of, twin_over

_LEAST_ALIKE = 0.98  # cosine of the two movements: below it a step is not linear in the rate, or lost to rounding
_LARGEST = 2**28  # numbers that are copied for one step
_SIDE = 8  # of a stand-in, at most
_SAME = 1e-3  # relative: a rate that is the group's but for rounding is the group's
_SAME_IN_16_BITS = 0.05  # of parameters in bfloat16, whose step is a few of the weight's last digits

Rates = dict[int, float]
"""{id of a parameter: the rate that its step had}"""


class StepMeasurement:
    """Made before a step, asked after it. What has no gradient, or does not move, is not measured.

    Args:
        optimizer: a torch optimizer whose gradients are there.

    Raises:
        Exception: whatever an optimizer does not like about being copied.
    """

    def __init__(self, optimizer: Any) -> None:
        moving = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None and p.numel()]
        self._groups = rates_by_id(optimizer)
        self._unit = _unit_rate(self._groups.values())
        self._reference = None
        if self._unit is None or not moving or sum(p.numel() for p in moving) > _LARGEST:
            return
        self._before = {p: p.detach().clone() for p in moving}
        stand_ins: dict[torch.Tensor, torch.Tensor] = {}
        for parameter in moving:
            stand_in = nn.Parameter(parameter.detach().clone())
            stand_in.grad = parameter.grad.detach().clone()
            stand_ins[parameter] = stand_in
        self._stand_ins = stand_ins
        self._reference = twin_over(optimizer, stand_ins)
        _at_one_rate(self._reference, self._unit)

    def rates(self) -> Rates:
        """What the step that was taken since had."""
        if self._reference is None or self._unit is None:
            return {}
        step_of(self._reference)
        rates = {}
        for parameter, before in self._before.items():
            rate = _rate(parameter.detach() - before, self._stand_ins[parameter].detach() - before, self._unit)
            if rate is not None:
                same = _SAME if parameter.element_size() > 2 else _SAME_IN_16_BITS
                rates[id(parameter)] = _as_stated(rate, self._groups.get(id(parameter)), same)
        return rates


def trial_rates(optimizer: Any, parameters: Iterable[torch.Tensor]) -> Rates:
    """The rates that a step would have, tried on stand-ins in twins; the optimizer takes none.

    Args:
        optimizer: a torch optimizer. A group whose schedule is at 0 is tried at its base rate.
        parameters: those to ask about, (…); small tensors of as many dimensions stand in for them.
    """
    wanted = list(parameters)
    stated = rates_by_id(optimizer)
    unit = _unit_rate(stated.values())
    if unit is None or not wanted:
        return {}
    for start, with_state in ((0.0, False), (0.5, False), (0.0, True)):
        try:
            own = _stand_ins(wanted, start, whole=with_state)
            alike = _stand_ins(wanted, start, whole=with_state)
            twins = [twin_over(optimizer, stand_ins, with_state=with_state) for stand_ins in (own, alike)]
            for twin in twins:
                train_mode(twin)
            for group in twins[0].param_groups:
                if not rate_as_number(group.get("lr")) and (base := base_rate(group)):
                    group["lr"] = in_form_of(group["lr"], base)
            _at_one_rate(twins[1], unit)
            for twin in twins:
                step_of(twin)
        except Exception:  # whatever an optimizer does not like about stand-ins
            continue
        rates = {}
        for parameter in wanted:
            moved, reference = (tensors[parameter].detach() - start for tensors in (own, alike))
            rate = _rate(moved, reference, unit)
            if rate is not None:
                rates[id(parameter)] = _as_stated(rate, stated.get(id(parameter)))
        if rates:
            return rates
    return {}


def decays(optimizer: Any, group: Mapping[str, Any]) -> bool | None:
    """Whether a step of this group makes weights smaller that have a gradient of 0; None if it cannot be tried.

    Args:
        optimizer: a torch optimizer; it is left alone.
        group: one of its groups, not empty.
    """
    parameter = group["params"][0]
    try:
        stand_in = nn.Parameter(torch.ones(_shape(parameter), device=_device(parameter)))
        stand_in.grad = torch.zeros_like(stand_in)
        twin = twin_over(optimizer, {parameter: stand_in}, with_state=False)
        train_mode(twin)
        for own in twin.param_groups:
            own["lr"] = in_form_of(own["lr"], 1e-2)  # so large that a small decay is not lost to rounding
        step_of(twin)
    except Exception:  # one that needs its state, or will not be copied
        return None
    return bool((stand_in.detach() < 1).any())


def _unit_rate(rates: Iterable[float]) -> float | None:
    """A rate for all groups of a reference: the smallest of theirs above 0."""
    return min((rate for rate in rates if rate > 0 and math.isfinite(rate)), default=None)


def _as_stated(rate: float, stated: float | None, same: float = _SAME) -> float:
    """The rate that a group states, where the measured one differs from it by rounding alone."""
    return stated if stated and math.isclose(rate, stated, rel_tol=same) else rate


def rates_by_id(optimizer: Any) -> dict[int, float]:
    """{id of a parameter: the rate of its group, where that is a number; its base rate where the present one is 0}."""
    return {
        id(parameter): rate
        for group in optimizer.param_groups
        if (rate := rate_as_number(group.get("lr")) or base_rate(group)) is not None
        for parameter in group["params"]
    }


def _at_one_rate(twin: Any, rate: float) -> None:
    for group in twin.param_groups:
        if rate_as_number(group.get("lr")) is not None:  # None: it finds its own
            group["lr"] = in_form_of(group["lr"], rate)


def _stand_ins(parameters: list[torch.Tensor], start: float, *, whole: bool) -> dict[torch.Tensor, torch.Tensor]:
    """{parameter (…): a tensor filled with `start`, with a gradient}, of as many dimensions; of its shape if whole."""
    stand_ins: dict[torch.Tensor, torch.Tensor] = {}
    for parameter in parameters:
        shape = tuple(parameter.shape) if whole else _shape(parameter)
        stand_in = nn.Parameter(torch.full(shape, start, device=_device(parameter)))
        stand_in.grad = trial_gradient(0, stand_in)
        stand_ins[parameter] = stand_in
    return stand_ins


def _shape(parameter: torch.Tensor) -> tuple[int, ...]:
    """Of a stand-in for a parameter (…): as many dimensions, none of them long."""
    return tuple(max(1, min(size, _SIDE)) for size in parameter.shape)


def _device(parameter: torch.Tensor) -> torch.device:
    return torch.device("cpu") if parameter.is_meta else parameter.device


def _rate(moved: torch.Tensor, reference: torch.Tensor, unit: float) -> float | None:
    """u · ⟨Δ, Δ_u⟩ / ⟨Δ_u, Δ_u⟩ of two movements (…) of one shape; None if they say nothing."""
    moved, reference = (getattr(t, "_local_tensor", t).double().flatten() for t in (moved, reference))
    of_reference, of_moved = float(reference @ reference), float(moved @ moved)
    if not of_reference or not math.isfinite(of_reference) or not math.isfinite(of_moved):
        return None
    product = float(moved @ reference)
    if of_moved and product < _LEAST_ALIKE * math.sqrt(of_reference * of_moved):
        return None
    return unit * product / of_reference
