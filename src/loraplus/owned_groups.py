"""The groups of A and of B whose rates are set from outside, while their scheduler sees no numbers but its own.

What the scheduler makes of a group is read as a factor: its rate over its base rate (`initial_lr`; OneCycle's `max_lr`;
without either the rate that it had when it was first seen). A schedule that goes above its base (a cycle's) is read as
going up to 1, so that no rate is ever above what was asked for.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from loraplus.errors import LoraPlusWarning, TrainerSetupError
from loraplus.notices import told_once
from loraplus.proposal import as_before
from loraplus.roles import Role, trainable_parameters

_DUMMY = 0.1  # a rate that no head is trained with, and that stands for "set automatically"
_OF_NO_ACCOUNT = {"params", "param_names", "name", "lr", "initial_lr", "max_lr", "min_lr", "weight_decay"}
_NAME = re.compile(r"(?:^|[._])lora_[AB](?:_x(?P<factor>[^_]+))?(?:_no_decay)?$")  # as `Rates.group_name` makes them

Lent = list[tuple[dict[str, Any], Any, Any]]
"""(group, the rate that was put there, the scheduler's own)."""


class OwnedGroups:
    """The groups of one model's A and B in an optimizer, which may hold other models' too.

    Groups of one role keep the relation of the rates that they were built with: one that `lr_overrides` halved gets
    half of the role's rate.

    Args:
        model: whose factors they hold.
        optimizer: has them in groups apart.

    Raises:
        TrainerSetupError: A or B share a group with other parameters, or are not in the optimizer.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self.roles = _roles_of_groups(model, optimizer)
        self._bases = {index: _base(group) for index, group in self._groups()}
        self._peaks = dict.fromkeys(self.roles, 1.0)
        plain = {role: self._plain_rate(role) for role in self.roles.values()}
        self._factors = {
            index: self._bases[index] / plain[role] if self._bases[index] and plain[role] else 1.0
            for index, role in self.roles.items()
        }
        self._lent: Lent = []

    def examples(self) -> list[torch.Tensor]:
        """A parameter of each kind of group; rate, weight decay and name make no kind."""
        kinds = {}
        for _, group in self._groups():
            options = {key: value for key, value in group.items() if key not in _OF_NO_ACCOUNT}
            kinds.setdefault(repr(options), group["params"][0])
        return list(kinds.values())

    def index_of(self, group: Mapping[str, Any]) -> int | None:
        """Which of them a group is, if any."""
        return next((index for index, ours in self._groups() if ours is group), None)

    def factors(self, index: int) -> tuple[float, float]:
        """(what the schedule makes of a group at this step, what its role's rate is multiplied with for it)."""
        scheduled = self._scheduled(index)
        return scheduled / max(scheduled, self._peaks[index]), self._factors[index]

    def by_parameter(self) -> dict[int, float]:
        """{id of a parameter: product of its group's factors}."""
        found = {}
        for index, group in self._groups():
            scheduled, factor = self.factors(index)
            found |= {id(parameter): scheduled * factor for parameter in group["params"]}
        return found

    def lend(self, rates: Mapping[Role, float]) -> Any:
        """Puts the rates of a step into the groups, times their factors.

        Returns:
            What has to be kept until the step ends; when it goes, an error in the step included, the rates go too.
        """
        self.give_back()
        self._lent = []  # a new list: an earlier loan ends by itself
        for index, group in self._groups():
            self._bases[index] = self._bases[index] or float(group["lr"])
            self._peaks[index] = max(self._peaks[index], self._scheduled(index))
            scheduled, factor = self.factors(index)
            put = as_before(group["lr"], rates[self.roles[index]] * scheduled * factor)
            self._lent.append((group, put, group["lr"]))
            group["lr"] = put
        return _Loan(self._lent)

    def give_back(self) -> None:
        """Puts the scheduler's own rates back."""
        _give_back(self._lent)

    def state_dict(self) -> dict[str, Any]:
        """What the reading of a schedule depends on."""
        return {"bases": list(self._bases.values()), "peaks": list(self._peaks.values())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from there."""
        if len(state.get("bases", ())) == len(self.roles):
            self._bases = dict(zip(self.roles, state["bases"], strict=True))
            self._peaks = dict(zip(self.roles, state["peaks"], strict=True))

    def _groups(self) -> list[tuple[int, dict[str, Any]]]:
        """Looked up each time, since loading a checkpoint replaces them."""
        return [(index, self._optimizer.param_groups[index]) for index in self.roles]

    def _plain_rate(self, role: Role) -> float:
        """The rate of a role's group without overrides; where all names are the user's own, the highest."""
        mine = [(self._bases[index], group) for index, group in self._groups() if self.roles[index] is role]
        named = [(base, found["factor"]) for base, group in mine if (found := _NAME.search(str(group.get("name", ""))))]
        if not named:
            return max(base for base, _ in mine)
        base, factor = min(named, key=lambda pair: pair[1] is not None)
        return base / float(factor or 1.0)

    def _scheduled(self, index: int) -> float:
        """The scheduler's own rate over the base rate."""
        group = self._optimizer.param_groups[index]
        own = next((_without_loan(*loan) for loan in self._lent if loan[0] is group), group["lr"])
        base = float(group.get("max_lr") or group.get("initial_lr") or self._bases[index] or own)
        return float(own) / base if base else 0.0

    def warn_of_dummies(self, model: nn.Module) -> None:
        """Warns of what would be trained with a rate that was given for A and B, to be replaced."""
        mine = {id(entry.parameter) for entry in trainable_parameters(model)}
        for index, group in enumerate(self._optimizer.param_groups):
            rate = _base(group)
            dummy = index not in self.roles and rate >= _DUMMY and rate in self._bases.values()
            if dummy and any(id(parameter) in mine for parameter in group["params"]):
                warnings.warn(
                    f"automatic rates set those of A and B only: {group.get('name', f'group {index}')} is trained with "
                    f"lr = {rate:g}; give it a rate of its own (lr_head=…, lr_embedding=…, lr_magnitude=…)",
                    LoraPlusWarning,
                    stacklevel=3,
                )


class _Loan:
    def __init__(self, lent: Lent) -> None:
        self._lent = lent

    def __del__(self) -> None:
        _give_back(self._lent)


def _give_back(lent: Lent) -> None:
    for loan in lent:
        loan[0]["lr"] = _without_loan(*loan)
    lent.clear()


def _without_loan(group: dict[str, Any], put: Any, own: Any) -> Any:
    """A group's rate as its scheduler has it, though a step's rate is, or was, in its place.

    After an error inside a step a scheduler may move on before the loan is given back. One that multiplies has then
    multiplied the step's rate, one that sets has set its own. A schedule moves little in a step: that tells them apart.
    """
    now = group["lr"]
    if now is put:
        return own
    set_by_it, multiplied = float(now), float(own) * float(now) / float(put) if float(put) else float(now)
    if not (set_by_it > 0 and multiplied > 0 and float(own) > 0):
        return now
    if abs(math.log(multiplied / float(own))) < abs(math.log(set_by_it / float(own))):
        return as_before(now, multiplied)
    return now


def _base(group: Mapping[str, Any]) -> float:
    return float(group.get("max_lr") or group.get("initial_lr") or group["lr"])


@told_once(silent=True)
def _roles_of_groups(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[int, Role]:
    """{index of a group that holds A, or B: role}."""
    roles = {id(entry.parameter): entry.role for entry in trainable_parameters(model)}
    found = {}
    for index, group in enumerate(optimizer.param_groups):
        here = {roles.get(id(parameter)) for parameter in group["params"]}
        for role in (Role.A, Role.B):
            if here == {role}:
                found[index] = role
            elif role in here:
                raise TrainerSetupError(
                    f"group {index} of the optimizer holds {role} beside other parameters, so it cannot have a rate of "
                    "its own; build the optimizer with loraplus.create_optimizer"
                )
    if not found or set(found.values()) != {Role.A, Role.B} & set(roles.values()):
        raise TrainerSetupError("the optimizer does not hold the model's A and B; build it from this model")
    return found
