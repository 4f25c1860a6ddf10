"""The groups of A and of B, whose rates are set for the length of a step; their scheduler sees its own numbers only.

The schedule of a group is read as a factor: its rate over its base rate. The base rate is `initial_lr`, or OneCycle's
`max_lr`, or without either the rate that the group had when it was first seen. Where a schedule goes above its base, as
a cycle does, its highest rate counts as 1, so that no rate is ever above what was asked for.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from loraplus.errors import LoraPlusError, TrainerSetupError
from loraplus.notices import told_once
from loraplus.roles import Role, clean_name, trainable_parameters
from loraplus.steps.group_rates import in_form_of

_FACTORS = (Role.A, Role.B)
_DUMMY = 0.1  # a rate that no head is trained with, and that stands for "set automatically"
_OF_NO_ACCOUNT = {"params", "param_names", "name", "lr", "initial_lr", "max_lr", "min_lr", "weight_decay"}
_NAME = re.compile(r"(?:^|[._])lora_[AB](?:_x(?P<factor>[^_]+))?(?:_no_decay)?$")  # as `Rates.group_name` makes them
_INSTALL_AGAIN = "install them again once the groups are as they are to be: AutoRates(model, optimizer)"

Lent = list[tuple[dict[str, Any], Any, Any]]
"""(group, the rate that was put there, the scheduler's own)."""


@dataclass(eq=False)
class Owned:
    """A group whose rate is set: what it was built with, and how its schedule is read."""

    group: dict[str, Any]
    role: Role
    base: float  # what its scheduler multiplies; 0 where it was first seen at the start of a warm-up
    members: list[torch.Tensor]  # held, so that none of them is taken for another
    factor: float = 1.0  # what its role's rate is multiplied with for it
    peak: float = 1.0  # the highest that its schedule was


class OwnedGroups:
    """The groups of one model's A and B in an optimizer, which may hold other models' too.

    Groups of one role keep the relation of the rates that they were built with: one that `lr_overrides` halved gets
    half of the role's rate. They are followed wherever they stand among the optimizer's groups, and where their dicts
    are replaced (as by a checkpoint that is loaded) known by their parameters.

    Args:
        model: whose factors they hold.
        optimizer: has them in groups apart.

    Raises:
        TrainerSetupError: A or B share a group with other parameters, or are not in the optimizer.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._model, self._optimizer = model, optimizer
        self._all = _groups_of_factors(model, optimizer)
        plain = {role: self._plain_rate(role) for role in {owned.role for owned in self._all}}
        for owned in self._all:
            if owned.base and plain[owned.role]:
                owned.factor = owned.base / plain[owned.role]
        self._lent: Lent = []
        self._order: list[int] = []
        self._here: dict[int, Owned] = {}
        self._places = _places(optimizer)

    def examples(self) -> list[torch.Tensor]:
        """A parameter (…) of each kind of group; rate, weight decay and name make no kind."""
        kinds = {}
        for owned in self._now().values():
            options = {key: value for key, value in owned.group.items() if key not in _OF_NO_ACCOUNT}
            kinds.setdefault(repr(options), owned.group["params"][0])
        return list(kinds.values())

    def of(self, group: Mapping[str, Any]) -> Owned | None:
        """What is known of a group, if it is one of them."""
        return self._now().get(id(group))

    def factors(self, owned: Owned) -> tuple[float, float]:
        """(what the schedule makes of a group at this step, what its role's rate is multiplied with for it)."""
        scheduled = self._scheduled(owned)
        return scheduled / max(scheduled, owned.peak), owned.factor

    def height(self) -> float:
        """The highest that a schedule makes of a rate of 1 at this step."""
        return max((self.factors(owned)[0] for owned in self._now().values()), default=0.0)

    def by_parameter(self) -> dict[int, float]:
        """{id of a parameter: product of its group's factors}."""
        products = {}
        for owned in self._now().values():
            scheduled, factor = self.factors(owned)
            products |= {id(parameter): scheduled * factor for parameter in owned.group["params"]}
        return products

    def lend(self, rates: Mapping[Role, float]) -> Any:
        """Puts the rates of a step into the groups, times their factors.

        Returns:
            What has to be kept until the step ends; when it goes, an error in the step included, the rates go too.

        Raises:
            TrainerSetupError: a factor has moved to another group, or come into one of the user's own.
        """
        self.give_back()
        self._follow()
        self._lent = []  # a new list: an earlier loan ends by itself
        for owned in self._now().values():
            group = owned.group
            owned.base = owned.base or float(group["lr"])
            owned.peak = max(owned.peak, self._scheduled(owned))
            scheduled, factor = self.factors(owned)
            put = in_form_of(group["lr"], rates[owned.role] * scheduled * factor)
            self._lent.append((group, put, group["lr"]))
            group["lr"] = put
        return _Loan(self._lent)

    def give_back(self) -> None:
        """Puts the scheduler's own rates back."""
        _give_back(self._lent)

    def state_dict(self) -> dict[str, Any]:
        """What the reading of a schedule depends on."""
        return {"bases": [owned.base for owned in self._all], "peaks": [owned.peak for owned in self._all]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from there."""
        if len(state.get("bases", ())) == len(self._all):
            for owned, base, peak in zip(self._all, state["bases"], state["peaks"], strict=True):
                owned.base, owned.peak = base, peak

    def _now(self) -> dict[int, Owned]:
        """{id of a group that is in the optimizer: what is known of it}."""
        groups = self._optimizer.param_groups
        order = list(map(id, groups))
        if order != self._order:
            self._order = order
            lost = [owned for owned in self._all if id(owned.group) not in order]
            homes = {id(parameter): group for group in groups for parameter in group["params"]} if lost else {}
            for owned in lost:
                owned.group = next((homes[id(p)] for p in owned.members if id(p) in homes), owned.group)
            self._here = {id(owned.group): owned for owned in self._all if id(owned.group) in order}
        return self._here

    def _follow(self) -> None:
        """Takes note of parameters that have come and gone since the step before.

        Raises:
            TrainerSetupError: see `lend`.
        """
        places = _places(self._optimizer)
        if places == self._places:
            return
        here = self._now()
        if not here:
            raise TrainerSetupError(
                f"the optimizer no longer has any of the groups whose rates are automatic; {_INSTALL_AGAIN}"
            )
        homes = {id(parameter): owned for owned in self._all for parameter in owned.members}
        roles = _roles(self._model)
        for index, group in enumerate(self._optimizer.param_groups):
            owned = here.get(id(group))
            for parameter in group["params"]:
                home = homes.get(id(parameter))
                role = roles.get(id(parameter)) if home is None else home.role
                expected = None if owned is None else owned.role
                is_right = home is owned if home else role is expected or (role not in _FACTORS and owned is None)
                if not is_right and (home or role or parameter.requires_grad):
                    raise TrainerSetupError(
                        f"{_name(self._model, parameter)} has come into {group.get('name', f'group {index}')} of the "
                        f"optimizer since its rates were made automatic; {_INSTALL_AGAIN}"
                    )
                if owned is not None and home is None:
                    owned.members.append(parameter)
        self._places = places

    def _plain_rate(self, role: Role) -> float:
        """The rate of a role's group without overrides; where all names are the user's own, the highest."""
        mine = [(owned.base, owned.group) for owned in self._all if owned.role is role]
        named = [(base, match["factor"]) for base, group in mine if (match := _NAME.search(str(group.get("name", ""))))]
        if not named:
            return max(base for base, _ in mine)
        base, factor = min(named, key=lambda pair: pair[1] is not None)
        return base / float(factor or 1.0)

    def _scheduled(self, owned: Owned) -> float:
        """The scheduler's own rate over the base rate."""
        group = owned.group
        own = next((_without_loan(*loan) for loan in self._lent if loan[0] is group), group["lr"])
        base = float(group.get("max_lr") or group.get("initial_lr") or owned.base or own)
        return float(own) / base if base else 0.0

    def check_others(self, model: nn.Module) -> None:
        """Refuses to train a head, say, with a rate that was given for A and B, to be replaced.

        Raises:
            TrainerSetupError: names the group and what to give it.
        """
        trainable = {id(entry.parameter) for entry in trainable_parameters(model)}
        for index, group in enumerate(self._optimizer.param_groups):
            rate = _base(group)
            stands_in = self.of(group) is None and rate >= _DUMMY and rate in [owned.base for owned in self._all]
            if stands_in and any(id(parameter) in trainable for parameter in group["params"]):
                raise TrainerSetupError(
                    f"automatic rates set those of A and B only, and {group.get('name', f'group {index}')} would be "
                    f"trained with lr = {rate:g}; give it a rate of its own (lr_head=…, lr_embedding=…, "
                    'lr_magnitude=…), or let lr="auto" of create_optimizer choose one'
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
        return in_form_of(now, multiplied)
    return now


def _base(group: Mapping[str, Any]) -> float:
    return float(group.get("max_lr") or group.get("initial_lr") or group["lr"])


def _places(optimizer: torch.optim.Optimizer) -> list[list[int]]:
    """Which parameters are in which group, by their ids."""
    return [list(map(id, group["params"])) for group in optimizer.param_groups]


@told_once(silent=True)
def _roles(model: nn.Module) -> dict[int, Role]:
    """{id of a trainable parameter: role}; none where the adapter is merged, frozen or disabled."""
    try:
        return {id(entry.parameter): entry.role for entry in trainable_parameters(model)}
    except LoraPlusError:
        return {}


def _name(model: nn.Module, parameter: torch.Tensor) -> str:
    """What a model calls a parameter (…), for messages."""
    return next((clean_name(name) for name, mine in model.named_parameters() if mine is parameter), "a parameter")


@told_once(silent=True)
def _groups_of_factors(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Owned]:
    """The groups that hold A, or B, and nothing else that trains."""
    roles = {id(entry.parameter): entry.role for entry in trainable_parameters(model)}
    owned_groups = []
    for index, group in enumerate(optimizer.param_groups):
        roles_in_group = {roles.get(id(parameter)) for parameter in group["params"] if parameter.requires_grad}
        for role in _FACTORS:
            if roles_in_group == {role}:
                owned_groups.append(Owned(group, role, _base(group), list(group["params"])))
            elif role in roles_in_group:
                raise TrainerSetupError(
                    f"group {index} of the optimizer holds {role} beside other parameters, so it cannot have a rate of "
                    "its own; build the optimizer with loraplus.create_optimizer"
                )
    if not owned_groups or {owned.role for owned in owned_groups} != {*_FACTORS} & set(roles.values()):
        raise TrainerSetupError("the optimizer does not hold the model's A and B; build it from this model")
    return owned_groups
