"""Parameter groups that the user has already, split by role instead of replaced.

Within a group of rate lr, A keeps lr and B gets lr_ratio·lr; every other option of the group, and every parameter
that is no factor, stays as it was.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from loraplus.errors import InvalidRateError, ParameterGroupError
from loraplus.notices import told_once
from loraplus.rate_keywords import takes_rates
from loraplus.rates import SETTINGS, Rates, as_number
from loraplus.roles import Role, TrainableParameter, trainable_parameters
from loraplus.steps.group_rates import in_form_of

Groups = Iterable[Mapping[str, Any]]
_PARAMETERS = frozenset({"params", "param_names"})


@told_once()
@takes_rates("lr_ratio")
def split_groups(model: nn.Module, groups: Groups, *, rates: Rates, prefix: str = "") -> list[dict[str, Any]]:
    """Splits parameter groups by role, so that each keeps its own options and B learns lr_ratio times faster in it.

    η_A = group's lr, η_B = lr_ratio · group's lr, everything else as it was.

    Args:
        model: holds every parameter of the groups; for several models, `torch.nn.ModuleDict({"unet": unet, …})`.
        groups: as torch's optimizers take them: dicts with "params" and any options, or an optimizer's `param_groups`.
        rates: a `Rates`, or its fields as keywords; `lr_ratio` also by position. `lr` is the rate of groups that have
            none. Rates of roles and `lr_overrides` are refused: give such parameters a group of their own.
        prefix: the model's name in an optimizer of several, put before every group's name.

    Returns:
        New groups; those given are left alone. A group without factors comes back as it was. The factors of any other
        move to groups named "<name>/lora_A" and "<name>/lora_B". A group without a name is called "group_<index>".

    Raises:
        ParameterGroupError: a parameter is in two groups, in none, or not the model's; two on one memory are in groups
            of different rates; or no groups are given.
        InvalidRateError: a group has no rate that can be used.
        NoTrainableParametersError, NoLoraFactorsError, UnknownAdapterParameterError: see `trainable_parameters`.

    Example:
        >>> import torch
        >>> class Adapter(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.lora_A = torch.nn.ModuleDict({"default": torch.nn.Linear(8, 2, bias=False)})
        ...         self.lora_B = torch.nn.ModuleDict({"default": torch.nn.Linear(2, 8, bias=False)})
        >>> model = Adapter()
        >>> mine = [{"params": model.parameters(), "lr": 1e-3, "betas": (0.9, 0.99), "name": "encoder"}]
        >>> [(group["name"], group["lr"], group["betas"]) for group in split_groups(model, mine, lr_ratio=8)]
        [('encoder/lora_A', 0.001, (0.9, 0.99)), ('encoder/lora_B', 0.008, (0.9, 0.99))]
    """
    refuse_beside_groups(rates)
    lr = None if rates.lr is None else in_form_of(rates.tensor, rates.lr_a)
    rates = rates.at(1.0)  # a parameter's rate is then what its group's is multiplied with
    listed = trainable_parameters(model)
    rates.check(listed)
    groups = with_lists(groups)
    check_membership(model, groups, listed)
    _check_memory(groups, listed, lr)
    entries = {id(entry.parameter): entry for entry in listed}
    parts = [part for index, group in enumerate(groups) for part in _split(index, group, rates, lr, entries)]
    return with_prefix(parts, prefix)


def with_prefix(groups: list[dict[str, Any]], prefix: str) -> list[dict[str, Any]]:
    """The groups, named "<prefix>.<name>"."""
    for group in groups if prefix else ():
        group["name"] = f"{prefix}.{group['name']}"
    return groups


def _split(
    index: int, group: dict[str, Any], rates: Rates, lr: float | None, entries: Mapping[int, TrainableParameter]
) -> list[dict[str, Any]]:
    name = str(group.get("name", f"group_{index}"))
    options = {key: value for key, value in group.items() if key not in _PARAMETERS}
    if lr is not None:
        options.setdefault("lr", lr)
    schedule = {key for key in ("lr", "initial_lr") if options.get(key) is not None}  # initial_lr: a scheduler's base

    def scaled(factor: float) -> dict[str, Any]:
        return {key: in_form_of(options[key], options[key] * factor) for key in schedule}

    parts: dict[str, dict[str, Any]] = {}
    for member in group["params"]:
        entry = entries.get(id(_tensor(member)))  # None: frozen
        if entry is None or entry.role not in (Role.A, Role.B):
            part = parts.setdefault(name, {**options, **scaled(1), "params": [], "name": name})
        else:
            rate_of(group, name, lr)
            label = f"{name}/{rates.group_name(entry.role, entry.rate_name)}"
            factor = rates.of(entry.role, entry.rate_name)
            part = parts.setdefault(label, {**options, **scaled(factor), "params": [], "name": label})
        part["params"].append(member)
    return list(parts.values())


def rate_of(group: Mapping[str, Any], name: str, lr: float | None) -> Any:
    """The rate of a group as it stands there (a number or a tensor), else `lr`.

    Raises:
        InvalidRateError: there is none, or no training run can use it.
    """
    rate = group.get("lr", lr)
    if rate is None:
        raise InvalidRateError(f"group {name} has no lr; give it one, or pass lr for the groups that have none")
    in_use = as_number(f"lr of group {name}", group.get("initial_lr", rate))  # lr itself may be 0 in a warm-up
    if not math.isfinite(in_use) or in_use <= 0:
        raise InvalidRateError(f"lr of group {name} must be a positive, finite number, got {rate!r}")
    return rate


def base_rates(model: nn.Module, groups: Groups, lr: float | None) -> dict[int, float]:
    """{id of a parameter: rate of its group}, before any splitting.

    Raises:
        The errors of `split_groups` about groups.
    """
    groups, listed = with_lists(groups), trainable_parameters(model)
    check_membership(model, groups, listed)
    _check_memory(groups, listed, lr)
    rates = {}
    for index, group in enumerate(groups):
        name = str(group.get("name", f"group_{index}"))
        rate = rate_of(group, name, lr)
        rates |= {id(_tensor(member)): float(group.get("initial_lr", rate)) for member in group["params"]}
    return rates


def _check_memory(groups: Iterable[Mapping[str, Any]], listed: Sequence[TrainableParameter], lr: float | None) -> None:
    """Refuses groups of different rates that hold two parameters on one memory.

    Raises:
        ParameterGroupError: names both, and their groups.
    """
    places = {
        id(_tensor(member)): (str(group.get("name", f"group_{index}")), group)
        for index, group in enumerate(groups)
        for member in group["params"]
    }
    by_name = {entry.name: entry for entry in listed}
    for entry in listed:
        if entry.shares is None:
            continue
        (name, one), (other_name, other) = (places[id(shared.parameter)] for shared in (by_name[entry.shares], entry))
        rates = [float(rate_of(group, label, lr)) for label, group in ((name, one), (other_name, other))]
        if not math.isclose(*rates):
            raise ParameterGroupError(
                f"{entry.shares} (group {name}, lr {rates[0]:g}) and {entry.name} (group {other_name}, lr "
                f"{rates[1]:g}) are on one memory, which can have one rate only; put them into one group"
            )


def refuse_beside_groups(rates: Rates) -> None:
    """Refuses settings that groups make themselves.

    Raises:
        InvalidRateError: names the setting.
    """
    for name, setting in SETTINGS.items():
        of_a_group = name == "lr" or setting.metadata.get("sets_ratio")
        if not of_a_group and getattr(rates, name):
            raise InvalidRateError(
                f"{name} is not used when groups are given: give the parameters a group at that rate"
            )


def with_lists(groups: Groups) -> list[dict[str, Any]]:
    """Copies of the groups, with their parameters in lists: tensors, or (name, tensor) as torch takes both.

    Raises:
        ParameterGroupError: something is no group.
    """
    groups = list(groups)
    if not groups:
        raise ParameterGroupError("groups is empty; leave it out to have loraplus make the groups")
    copies = []
    for index, group in enumerate(groups):
        if not isinstance(group, Mapping) or "params" not in group:
            raise ParameterGroupError(
                f'group {index} must be a dict with "params", as torch.optim takes them, got {type(group).__name__}'
            )
        members = group["params"]
        members = [members] if isinstance(members, torch.Tensor) else list(members)
        names = group.get("param_names")  # an optimizer's own groups hold names beside the tensors
        if names is not None and members and isinstance(members[0], torch.Tensor):
            members = list(zip(names, members, strict=True))
        if not all(isinstance(_tensor(member), torch.Tensor) for member in members):
            raise ParameterGroupError(f"group {group.get('name', index)}: params must be tensors or (name, tensor)")
        copies.append({**group, "params": members})
    return copies


def check_membership(
    model: nn.Module, groups: Sequence[Mapping[str, Any]], listed: Iterable[TrainableParameter]
) -> None:
    """Refuses groups that hold a parameter twice, one that is not the model's, or not every trainable one.

    Raises:
        ParameterGroupError: names the parameter and its groups.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    seen: dict[int, str] = {}
    for index, group in enumerate(groups):
        label = str(group.get("name", f"group_{index}"))
        for member in group["params"]:
            key = id(_tensor(member))
            if key not in names:
                raise ParameterGroupError(
                    f"group {label} holds a parameter of shape {tuple(_tensor(member).shape)} that is not in "
                    f"{type(model).__name__}; pass the module that holds all of them, such as "
                    'torch.nn.ModuleDict({"unet": unet, "text_encoder": text_encoder})'
                )
            if key in seen:
                both = f"groups {seen[key]} and {label}" if seen[key] != label else f"group {label} twice"
                raise ParameterGroupError(f"{names[key]} is in {both}; it can have one rate only")
            seen[key] = label
    missing = [entry.name for entry in listed if id(entry.parameter) not in seen]
    if missing:
        empty = [str(group.get("name", index)) for index, group in enumerate(groups) if not group["params"]]
        raise ParameterGroupError(
            f"{len(missing)} trainable parameters are in no group, so they would not be trained (first: {missing[0]}); "
            "add them to a group, or freeze them"
            + (f"; group {empty[0]} is empty: a generator can be read only once" if empty else "")
        )


def _tensor(member: object) -> Any:
    return member[1] if isinstance(member, tuple) and len(member) == 2 else member
