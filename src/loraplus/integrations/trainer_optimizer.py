"""The optimizer that a trainer builds with its own hooks, split by role where it stands.

Trainers build optimizers in many ways: an override of `create_optimizer` or `get_optimizer_cls_and_kwargs`, a class, a
partial or a factory in `optimizer_cls_and_kwargs`, groups by layer, parameters of a loss. What they build is kept, its
class, its options and its groups. Within each group A keeps the group's rate and B learns λ times faster.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer

from loraplus.errors import InvalidRateError, ParameterGroupError, TrainerSetupError
from loraplus.existing_groups import rate_of
from loraplus.groups import groups_for
from loraplus.integrations.trainer_settings import RateSettings, in_optim_args
from loraplus.optimizer import check_class, finish
from loraplus.rates import Rates
from loraplus.roles import FACTORS, Role, TrainableParameter, read_once, trainable_parameters
from loraplus.steps.group_rates import in_form_of
from loraplus.watching.watch import unwatch_rates

_GROUP_THEMSELVES = ("galore", "apollo", "lomo", "adalomo")
_REST = "rest"  # what LoRA+ says nothing of: parameters that are frozen, or not the model's (a loss's)

Group = dict[str, Any]


class Split(NamedTuple):
    """An optimizer whose groups were split, the groups that it had, and the rates of those it has over that of A."""

    optimizer: torch.optim.Optimizer
    rates: Rates
    own_groups: list[Group]
    factors: list[float]


@contextmanager
def own_class(trainer: Any, model: nn.Module) -> Iterator[None]:
    """While a trainer builds its optimizer: a partial is the class that it is of; one that cannot do is refused.

    Raises:
        TrainerSetupError: `args.optim` groups the parameters itself (GaLore, APOLLO, LOMO).
        OptimizerSetupError: the class cannot have LoRA+ groups.
    """
    given, own = trainer.optimizer_cls_and_kwargs, vars(trainer).get("get_optimizer_cls_and_kwargs")
    optim = str(getattr(trainer.args.optim, "value", trainer.args.optim))
    if given is None and optim.startswith(_GROUP_THEMSELVES):
        raise _groups_itself(f"optim = {optim}")
    known = None if given is None else _class_and_kwargs(model, *given)
    build, optim_args = trainer.get_optimizer_cls_and_kwargs, trainer.args.optim_args
    try:
        trainer.args.optim_args = in_optim_args(optim_args)[1]  # some optimizers take all that stands there
        trainer.optimizer_cls_and_kwargs = known
        trainer.get_optimizer_cls_and_kwargs = lambda *args, **kwargs: _class_and_kwargs(model, *build(*args, **kwargs))
        yield
    finally:
        trainer.args.optim_args = optim_args
        trainer.optimizer_cls_and_kwargs = given
        del trainer.get_optimizer_cls_and_kwargs
        if own is not None:
            trainer.get_optimizer_cls_and_kwargs = own


def _class_and_kwargs(model: nn.Module, optimizer_cls: Any, kwargs: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    given: Any = optimizer_cls
    if isinstance(given, functools.partial) and not given.args and _is_optimizer(given.func):
        optimizer_cls, kwargs = given.func, {**given.keywords, **kwargs}  # Trainer would take it for a factory
    if _is_optimizer(optimizer_cls):
        check_class(model, optimizer_cls)
        if getattr(optimizer_cls, "takes_model", False):
            kwargs = {**kwargs, "factors_of": model}
    return optimizer_cls, dict(kwargs)  # a copy, since Trainer takes some out


def _is_optimizer(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, torch.optim.Optimizer)


def _groups_itself(what: str) -> TrainerSetupError:
    return TrainerSetupError(
        f"{what} groups the parameters itself, so LoRA+ cannot give A and B their own rates; choose one that takes "
        "parameter groups, such as adamw_torch"
    )


@read_once()
def split(trainer: Any, model: nn.Module, settings: RateSettings, rates_at: Callable[[float], Rates]) -> Split:
    """Splits the groups of the optimizer that a trainer has just built, in place, by role.

    Args:
        trainer: its `optimizer` has taken no step yet.
        model: whose parameters have roles.
        settings: what was asked for.
        rates_at: `settings.rates.resolved`, which may be remembered.

    Raises:
        TrainerSetupError: no torch optimizer, one that has LoRA+ rates already, or whose groups cannot be reached.
        ParameterGroupError: a factor is in no group.
        InvalidRateError: a setting contradicts the trainer's own groups; else as `loraplus.param_groups`.
    """
    optimizer, who = trainer.optimizer, type(trainer).__name__
    if isinstance(optimizer, LayerWiseDummyOptimizer):
        raise _groups_itself(f"{who}'s layer-wise optimizer")
    if not isinstance(optimizer, torch.optim.Optimizer):
        made = "no optimizer" if optimizer is None else f"a {type(optimizer).__name__}, which is no torch optimizer"
        raise TrainerSetupError(
            f"{who}.create_optimizer made {made}, so LoRA+ cannot set the rates of its groups; have it set "
            "self.optimizer to a torch.optim.Optimizer"
        )
    listed = trainable_parameters(model)
    home = _home(who, listed, optimizer)
    lrs = _rates_of(home, listed)
    _refuse_twice(who, home, listed)
    rates = rates_at(lrs[0])
    if len(lrs) > 1 and (own_rates := settings.rates.own_rates()):
        name, value = next(iter(own_rates.items()))
        raise InvalidRateError(
            f"{name} = {value:g} contradicts {who}, whose own groups learn at {', '.join(f'{lr:g}' for lr in lrs)}; "
            f"set that rate in {who}, or leave {name} out"
        )
    groups_for(listed, rates, trainer.args.weight_decay)  # raises what the model or a setting makes impossible
    asked = _asked(home, listed, rates, one_rate=len(lrs) == 1)
    holding = [group for group in optimizer.param_groups if any(id(p) in asked for p in group["params"])]
    own = [{"params": [p for p in group["params"] if id(p) in asked], "lr": float(group["lr"])} for group in holding]
    parts = _Parts(listed, asked, rates, _suffixes(holding, lambda: _decaying(trainer, model)))
    unwatch_rates(optimizer)  # whoever built it may have had its groups watched as they were
    for holder in _with_inner(optimizer):
        parts.replace(holder.param_groups)
        if "lr" in settings.rates.own_rates() and "lr" in holder.defaults:
            holder.defaults["lr"] = rates.lr_a  # what schedulers that end at a rate of their own divide by
    got = {id(parameter): float(group["lr"]) for group in optimizer.param_groups for parameter in group["params"]}
    if any(abs(got.get(key, 0.0) - lr) > 1e-6 * lr for key, lr in asked.items()):
        raise TrainerSetupError(
            f"{type(optimizer).__name__} keeps parameter groups where LoRA+ cannot reach them; have {who}'s "
            "create_optimizer build it over loraplus.param_groups, and give it to Trainer's `optimizers`"
        )
    check_class(model, type(optimizer))
    finish(model, optimizer)
    return Split(optimizer, rates, own, [float(group["lr"]) / rates.lr_a for group in optimizer.param_groups])


def keep_ratio(scheduler: Any, made: Split) -> None:
    """Gives schedulers that take a least and a largest rate (`ReduceLROnPlateau`, `GreedyLR`) those of each group.

    One number is η_A's; the other groups' are in the relation that they have to it. Otherwise all would meet there.
    """
    scheduler = getattr(scheduler, "scheduler", scheduler)
    if set(made.factors) == {1.0}:
        return
    for name in ("min_lrs", "max_lrs"):
        bounds = getattr(scheduler, name, None)
        if isinstance(bounds, list) and len(bounds) == len(made.factors) and len(set(bounds)) == 1:
            setattr(scheduler, name, [bound * factor for bound, factor in zip(bounds, made.factors, strict=True)])
            scheduler.eps = 0.0  # a change below eps is left out, which the smaller of two rates meets first


def _home(who: str, listed: list[TrainableParameter], optimizer: torch.optim.Optimizer) -> dict[int, Group]:
    """{id of a trainable parameter of the model: the group that it is in}"""
    group_of = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    missing = [entry.name for entry in listed if entry.role in FACTORS and id(entry.parameter) not in group_of]
    if missing:
        raise ParameterGroupError(
            f"the optimizer that {who} builds leaves out {len(missing)} trainable factors (first: {missing[0]}); "
            "add them to a group, or freeze them"
        )
    return {key: group_of[key] for entry in listed if (key := id(entry.parameter)) in group_of}


def _rates_of(home: Mapping[int, Group], listed: list[TrainableParameter]) -> list[float]:
    """The different rates that the trainer's own groups have, those with factors first."""
    rates: dict[float, None] = {}
    for entry in sorted(listed, key=lambda entry: entry.role not in FACTORS):
        group = home.get(id(entry.parameter))
        if group is not None:
            factor = entry.role in FACTORS
            rates[float(rate_of(group, f"of {entry.name}", None) if factor else group["lr"])] = None
    return list(rates)


def _refuse_twice(who: str, home: Mapping[int, Group], listed: list[TrainableParameter]) -> None:
    """Refuses groups that have a ratio already: another would multiply it."""
    of_a, of_b = (
        {float(home[id(entry.parameter)]["lr"]) for entry in listed if entry.role is role} for role in (Role.A, Role.B)
    )
    if of_a and of_b and not of_a & of_b:
        raise TrainerSetupError(
            f"the optimizer that {who} builds has A at {min(of_a):g} and B at {min(of_b):g} already; set LoRA+ up "
            "once: there, or with loraplus.attach"
        )


def _asked(
    home: Mapping[int, Group], listed: list[TrainableParameter], rates: Rates, *, one_rate: bool
) -> dict[int, float]:
    """{id of a parameter: its rate}; without one rate for all, each group's own, times λ for B."""
    unit = rates.at(1.0)
    asked = {}
    for entry in listed:
        group = home.get(id(entry.parameter))
        if group is not None:
            own = (rates, 1.0) if one_rate else (unit, float(group["lr"]))
            asked[id(entry.parameter)] = own[0].of(entry.role, entry.rate_name) * own[1]
    return asked


def _decaying(trainer: Any, model: nn.Module) -> set[int]:
    names = set(trainer.get_decay_parameter_names(model))
    return {id(parameter) for name, parameter in model.named_parameters() if name in names}


def _suffixes(holding: list[Group], decaying: Callable[[], set[int]]) -> dict[int, str]:
    """{id of a group: what its parts have behind their role's name}, for groups such as Trainer itself makes.

    That is one, or two that differ in weight decay only, and without names.
    """
    if any("name" in group for group in holding) or len(holding) > 2:
        return {}
    if len(holding) == 1:
        return {id(holding[0]): ""}
    decays = [group.get("weight_decay", 0.0) for group in holding]
    if any(not _same(holding[0].get(key), value) for key, value in holding[1].items() if key not in _DIFFER):
        return {}
    if decays[0] == decays[1]:
        names = decaying()
        inside = [{id(parameter) in names for parameter in group["params"]} for group in holding]
        return dict(zip(map(id, holding), ("", _NO_DECAY), strict=True)) if inside == [{True}, {False}] else {}
    if 0.0 not in decays:
        return {}
    return {id(group): "" if decay else _NO_DECAY for group, decay in zip(holding, decays, strict=True)}


_DIFFER = frozenset({"params", "param_names", "weight_decay"})
_NO_DECAY = "_no_decay"


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return torch.equal(one, other)
    return one is other or bool(one == other)


def _with_inner(optimizer: torch.optim.Optimizer) -> Iterator[torch.optim.Optimizer]:
    """An optimizer, and those inside it: Lookahead's, or Muon's and AdamW's in one of both."""
    seen: dict[int, Any] = {}
    waiting: list[Any] = [optimizer]
    while waiting:
        item = waiting.pop(0)
        if isinstance(item, (list, tuple)):
            waiting += item
        elif isinstance(item, dict):
            waiting += item.values()
        elif isinstance(item, torch.optim.Optimizer) and id(item) not in seen:
            seen[id(item)] = item
            yield item
            inner = {key: value for key, value in vars(item).items() if key not in ("param_groups", "state")}
            waiting += [
                value for value in inner.values() if isinstance(value, (list, tuple, dict, torch.optim.Optimizer))
            ]


class _Parts:
    """The parts of groups, each group's made once: optimizers that share a group go on sharing.

    Args:
        listed: the trainable parameters with their roles.
        asked: {id of a parameter: its rate}.
        rates: name the groups.
        suffixes: see `_suffixes`.
    """

    def __init__(
        self, listed: list[TrainableParameter], asked: Mapping[int, float], rates: Rates, suffixes: Mapping[int, str]
    ) -> None:
        self._entries = {id(entry.parameter): (place, entry) for place, entry in enumerate(listed)}
        self._asked, self._rates, self._suffixes = asked, rates, suffixes
        self._done: dict[int, tuple[Group, list[tuple[int, Group]]]] = {}  # with the group, which keeps its id taken

    def replace(self, groups: list[Group]) -> None:
        """Puts the parts where the groups were, in the model's order.

        So a checkpoint's states are those of the same parameters, whatever groups a trainer makes.
        """
        parts = []
        for index, group in enumerate(groups):
            if id(group) not in self._done:
                self._done[id(group)] = group, self._of(index, group)
            parts += self._done[id(group)][1]
        groups[:] = [part for _, part in sorted(parts, key=lambda item: item[0])]

    def _of(self, index: int, group: Group) -> list[tuple[int, Group]]:
        def of(parameter: Any) -> tuple[int, TrainableParameter | None]:
            return self._entries.get(id(parameter), (len(self._entries) + index, None))  # behind the model's

        parts: dict[str, tuple[int, Group]] = {}
        names = group.get("param_names") or [None] * len(group["params"])
        members = zip(group["params"], names, strict=True)
        for parameter, name in sorted(members, key=lambda member: of(member[0])[0]):
            place, entry = of(parameter)
            label = _REST if entry is None else self._rates.group_name(entry.role, entry.rate_name)
            if label not in parts:
                parts[label] = place, _empty(group, None if entry is None else self._asked[id(parameter)])
            parts[label][1]["params"].append(parameter)
            if name is not None:
                parts[label][1]["param_names"].append(name)
        own = str(group.get("name", f"group_{index}"))
        suffix = self._suffixes.get(id(group))
        whole = len(parts) == 1 and not any(e.role in FACTORS for _, e, *_ in members if e is not None)
        for label, (_, part) in parts.items():
            if suffix is not None:
                part["name"] = label + suffix
            else:
                part["name"] = own if whole or own == label else f"{own}/{label}"
        return list(parts.values())


def _empty(group: Group, lr: float | None) -> Group:
    """A group of the same options without parameters, at another rate if one is given."""
    part = {**group, "params": []}
    if "param_names" in group:
        part["param_names"] = []
    old = part.get("lr")
    if lr is not None and old and "initial_lr" in part:
        part["initial_lr"] = part["initial_lr"] * lr / float(old)
    if "lr" in part:  # a tensor of its own, as schedulers write into it
        part["lr"] = in_form_of(old, old if lr is None else lr)
    return part
