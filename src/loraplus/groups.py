"""Parameter groups with LoRA+ rates, and the proof of which parameter got which.

`param_groups` gives named, never empty groups to any torch optimizer; `explain` reads any optimizer back; `verify`
raises if a parameter has another rate than the one asked for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from loraplus.errors import FlattenedParametersError, InvalidRateError, RateMismatchError
from loraplus.existing_groups import Groups, base_rates, refuse_beside_groups, with_prefix
from loraplus.notices import told_once
from loraplus.rate_keywords import takes_rates
from loraplus.rates import OWN_RATES, Rates, as_number
from loraplus.roles import Role, TrainableParameter, read_once, trainable_parameters
from loraplus.steps.group_rates import base_rate, in_form_of, rate_as_number
from loraplus.steps.step_probe import refusal, try_step, warn_unproved
from loraplus.steps.wrappers import unwrapped

_RELATIVE_TOLERANCE = 1e-6
_NAMED_IN_MESSAGE = 3  # all that a message has room for


@told_once()
@takes_rates("lr", "lr_ratio", needed=["lr"])
def param_groups(
    model: nn.Module, weight_decay: float | None = None, *, rates: Rates, prefix: str = ""
) -> list[dict[str, Any]]:
    """Splits the trainable parameters into named groups with LoRA+ rates.

    η_A = lr, η_B = lr_ratio·lr, everything else lr.

    Args:
        model: a model with LoRA factors, wrapped or not.
        rates: a `Rates`, or its fields as keywords; `lr` and `lr_ratio` also by position. A rate that is a tensor gives
            every group a tensor of its own (capturable and compiled optimizers).
        weight_decay: decay of every parameter but biases and norms, as transformers' Trainer places it. None leaves
            the optimizer's own default, which torch applies to every parameter.
        prefix: the model's name in an optimizer of several: "unet" makes groups "unet.lora_A", "unet.lora_B".

    Returns:
        Groups `{"params", "lr", "name"[, "weight_decay"]}`; none is empty, every parameter is in exactly one.

    Raises:
        InvalidRateError: a rate that cannot be used, a rate of a role that no parameter has, or a pattern that matches
            nothing.
        FlattenedParametersError: FSDP1 has flattened what needs different rates or weight decays.
        NoTrainableParametersError, NoLoraFactorsError, UnknownAdapterParameterError: see `trainable_parameters`.

    Example:
        >>> import loraplus, torch
        >>> class Adapter(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.lora_A = torch.nn.ModuleDict({"default": torch.nn.Linear(8, 2, bias=False)})
        ...         self.lora_B = torch.nn.ModuleDict({"default": torch.nn.Linear(2, 8, bias=False)})
        >>> groups = loraplus.param_groups(Adapter(), lr=1e-3, lr_ratio=16)
        >>> [(group["name"], group["lr"]) for group in groups]
        [('lora_A', 0.001), ('lora_B', 0.016)]

    Source: Hayou, Ghosh, Yu, arXiv 2402.12354, section 4.
    """
    as_number("lr", rates.lr)
    groups = groups_for(trainable_parameters(model), rates, weight_decay)
    for group in groups:
        group["lr"] = in_form_of(rates.tensor, group["lr"])
    return with_prefix(groups, prefix)


def groups_for(parameters: list[TrainableParameter], rates: Rates, weight_decay: float | None) -> list[dict[str, Any]]:
    """`param_groups` for parameters already listed and rates already checked."""
    if weight_decay is not None:
        weight_decay = as_number("weight_decay", weight_decay)
        if not (math.isfinite(weight_decay) and weight_decay >= 0):
            raise InvalidRateError(f"weight_decay must be a finite number ≥ 0, got {weight_decay!r}")
    rates.check(parameters)
    groups: dict[str, dict[str, Any]] = {}
    for entry in parameters:
        if weight_decay and entry.decays is None:
            raise FlattenedParametersError(
                f"FSDP has put a bias into one flat parameter with {entry.name}, so weight decay cannot leave it out; "
                "wrap with FullyShardedDataParallel(..., use_orig_params=True), or use fully_shard (FSDP2)"
            )
        name = rates.group_name(entry.role, entry.rate_name)
        if weight_decay is not None and not entry.decays:
            name += "_no_decay"
        if name not in groups:
            groups[name] = {"params": [], "lr": rates.of(entry.role, entry.rate_name), "name": name}
            if weight_decay is not None:
                groups[name]["weight_decay"] = weight_decay if entry.decays else 0.0
        groups[name]["params"].append(entry.parameter)
    return list(groups.values())


@dataclass(frozen=True)
class ParameterRate:
    """What an optimizer does with one parameter; lr is None if the optimizer does not hold it.

    Where several parameters share memory, the first counts its elements. The others count 0 and name the first in
    `shares`.
    """

    name: str
    role: str
    group: str
    lr: float | None
    base_lr: float | None
    weight_decay: float | None
    parameters: int
    shares: str | None = None


@dataclass(frozen=True)
class RateTable:
    """The rates that an optimizer gives to every trainable parameter; prints as a table of its groups.

    lr is the rate of this moment, base lr what the schedule multiplies: after training lr is often 0.
    """

    entries: tuple[ParameterRate, ...]

    def groups(self) -> list[dict[str, Any]]:
        """One row per group, role and rate: name, role, lr, base_lr, weight_decay, tensors, parameters."""
        rows: dict[tuple[Any, ...], dict[str, Any]] = {}
        for entry in self.entries:
            key = (entry.group, entry.role, entry.lr, entry.base_lr, entry.weight_decay)
            shared = {name: getattr(entry, name) for name in ("role", "lr", "base_lr", "weight_decay")}
            row = rows.setdefault(key, {"name": entry.group, **shared, "tensors": 0, "parameters": 0})
            row["tensors"] += 1
            row["parameters"] += entry.parameters
        return list(rows.values())

    def to_dict(self) -> dict[str, Any]:
        """{"groups": [...], "parameters": {name: {role, group, lr, base_lr, weight_decay, parameters, shares}}}."""
        parameters = {}
        for entry in self.entries:
            fields = asdict(entry)
            parameters[fields.pop("name")] = fields
        return {"groups": self.groups(), "parameters": parameters}

    def __str__(self) -> str:
        header = ("group", "role", "lr", "base lr", "weight decay", "tensors", "parameters")
        rows = []
        for row in self.groups():
            counts = (f"{row[name]:,}" for name in ("tensors", "parameters"))
            numbers = (_number(row[name]) for name in ("lr", "base_lr", "weight_decay"))
            rows.append((row["name"], row["role"], *numbers, *counts))
        widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]
        lines = []
        for line in [header, tuple("-" * width for width in widths), *rows]:
            left = [cell.ljust(width) for cell, width in zip(line[:2], widths[:2], strict=True)]
            right = [cell.rjust(width) for cell, width in zip(line[2:], widths[2:], strict=True)]
            lines.append("  ".join(left + right))
        return "\n".join(lines)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def rate_of_group(optimizer: torch.optim.Optimizer, group: Mapping[str, Any], *, base: bool = False) -> float | None:
    """The rate of a group at this moment; with `base`, the one that a scheduler multiplies. Reads `AutoRates`' too."""
    optimizer = unwrapped(optimizer)
    auto = getattr(optimizer, "loraplus_auto", None)
    own_rates = auto.rates_of(group) if auto is not None else None
    if own_rates is not None and (own_rates[1] or not base):  # before the first measured step there is none yet
        return own_rates[1] if base else own_rates[0]
    return _own_rate(optimizer, group, base=base)


def parameters_by_group(optimizer: Any) -> Iterator[tuple[int, list[Any]]]:
    """(index of a group, the model's parameters in it). DeepSpeed's groups hold flat copies; it keeps the originals."""
    zero = optimizer
    while zero is not None:
        if hasattr(zero, "sub_group_to_group_id"):  # ZeRO-3
            for index, parameters in enumerate(zero.fp16_groups):
                yield zero.sub_group_to_group_id[index], parameters
            return
        originals = getattr(zero, "bit16_groups", None) or getattr(zero, "bf16_groups", None)  # ZeRO-1/2; bf16 alone
        if originals is not None:
            yield from enumerate(originals)
            return
        zero = getattr(zero, "optimizer", None)
    for index, group in enumerate(optimizer.param_groups):
        yield index, group["params"]


def _number_of(parameter: Any) -> int:
    return getattr(parameter, "ds_numel", parameter.numel())  # ZeRO-3 holds a part here


def _group_of(optimizer: torch.optim.Optimizer) -> dict[int, int]:
    """{id of a parameter: index of its group}."""
    return {id(p): index for index, parameters in parameters_by_group(optimizer) for p in parameters}


@told_once()
def explain(model: nn.Module, optimizer: torch.optim.Optimizer) -> RateTable:
    """Reads back which role, rate and weight decay every trainable parameter has in any optimizer.

    Args:
        model: the model, wrapped or not.
        optimizer: any torch optimizer, whoever built it.

    Returns:
        A `RateTable`: `print` it, or take `.to_dict()`. `lr` is the rate of this moment, `base_lr` the one a
        scheduler multiplies. A trainable parameter that the optimizer does not hold is shown as "(not optimized)".

    Raises:
        NoTrainableParametersError, NoLoraFactorsError, UnknownAdapterParameterError: see `trainable_parameters`.

    Example:
        >>> print(loraplus.explain(model, optimizer))  # doctest: +SKIP
    """
    return _table(trainable_parameters(model), optimizer)


def built_rates(model: nn.Module, optimizer: torch.optim.Optimizer) -> RateTable:
    """`explain` with the rates that the groups were built with, whatever `AutoRates` has made of them."""
    return _table(trainable_parameters(model), optimizer, _own_rate)


def _own_rate(optimizer: torch.optim.Optimizer, group: Mapping[str, Any], *, base: bool = False) -> float | None:
    return base_rate(group) if base else rate_as_number(group.get("lr"))


def _table(parameters: list[TrainableParameter], optimizer: Any, rate_of: Any = None) -> RateTable:
    rate_of = rate_of or rate_of_group
    group_of = _group_of(optimizer)
    entries = []
    for entry in parameters:
        index = group_of.get(id(entry.parameter))
        group = {} if index is None else optimizer.param_groups[index]
        entries.append(
            ParameterRate(
                name=entry.name,
                role=entry.role.value,
                group="(not optimized)" if index is None else str(group.get("name", f"group {index}")),
                lr=rate_of(optimizer, group),
                base_lr=rate_of(optimizer, group, base=True),
                weight_decay=rate_as_number(group.get("weight_decay")),
                parameters=0 if entry.shares else _number_of(entry.parameter),
                shares=entry.shares,
            )
        )
    return RateTable(tuple(entries))


@told_once()
@read_once()
@takes_rates("lr_ratio", needed=["lr_ratio"])
def verify(
    model: nn.Module, optimizer: torch.optim.Optimizer, *, rates: Rates, groups: Groups | None = None
) -> RateTable:
    """Checks that the optimizer gives every trainable parameter the LoRA+ rate asked for, and that its step follows it.

    Both the present rates and the base rates that a scheduler multiplies are checked, so it can be called at any time:
    after wrapping, in warm-up (where every rate may be 0), or after resuming. The step is tried on two small matrices
    in a twin of the optimizer, which is left alone; a step that cannot be tried is a LoraPlusWarning.

    Args:
        model: the model, wrapped or not.
        optimizer: the optimizer in use, wrapped or not.
        rates: those that the run should have: a `Rates`, or its fields as keywords; `lr_ratio` also by position.
            `lr` is the base η_A. None takes it from the optimizer, so that only the relations are checked; where A or B
            alone trains there is none, and lr is needed.
        groups: the groups that `split_groups` was given; each parameter's η_A is then its group's lr, and `lr` the
            rate of groups that have none.

    Returns:
        The table of `explain`, as the proof.

    Raises:
        RateMismatchError: names the parameters that have another rate, or none; or the optimizer whose step takes no
            notice of its groups' rates.
        ParameterGroupError, InvalidRateError: groups that cannot be split.

    Example:
        >>> loraplus.verify(model, optimizer, lr_ratio=16.0)  # doctest: +SKIP
    """
    sources = trainable_parameters(model)
    table = _table(sources, optimizer)
    if groups is not None:
        refuse_beside_groups(rates)
        bases = base_rates(model, groups, None if rates.lr is None else rates.lr_a)
        unit = rates.at(1.0)
        asked = [unit.of(source.role, source.rate_name) * bases[id(source.parameter)] for source in sources]
    else:
        rates = rates if rates.lr is not None else rates.at(_base_rate(table, rates))
        asked = [rates.of(source.role, source.rate_name) for source in sources]
    rates.check(sources)

    wrong, tolerance = [], _precision(optimizer)
    scale = None  # what the schedule has multiplied all rates by, read off the first parameter
    for entry, expected in zip(table.entries, asked, strict=True):
        if entry.lr is None or entry.base_lr is None:
            wrong.append(f"{entry.name} is in no group of the optimizer")
            continue
        if not math.isclose(entry.base_lr, expected, rel_tol=tolerance):
            wrong.append(f"{entry.name} ({entry.role}) has {entry.base_lr:.6g}, expected {expected:.6g}")
            continue
        scale = entry.lr / entry.base_lr if scale is None else scale
        if not math.isclose(entry.lr, expected * scale, rel_tol=2 * tolerance):
            wrong.append(f"{entry.name} ({entry.role}) is at {entry.lr:.6g}, expected {expected * scale:.6g}")
    if wrong:
        more = f"; and {len(wrong) - _NAMED_IN_MESSAGE} more" if len(wrong) > _NAMED_IN_MESSAGE else ""
        raise RateMismatchError(
            f"{len(wrong)} of {len(table.entries)} parameters do not have the rate of lr_ratio = {rates.lr_ratio:g}: "
            + "; ".join(wrong[:_NAMED_IN_MESSAGE])
            + more
        )
    _prove_step(optimizer, sources, rates.lr_ratio)
    return table


def _precision(optimizer: torch.optim.Optimizer) -> float:
    """How far rates may be off by rounding alone: those in tensors have their tensor's precision."""
    rates = [rate for group in optimizer.param_groups for rate in (group.get("lr"), group.get("initial_lr"))]
    kinds = {rate.dtype for rate in rates if isinstance(rate, torch.Tensor) and rate.is_floating_point()}
    return max([_RELATIVE_TOLERANCE, *(torch.finfo(kind).eps for kind in kinds)])


def _prove_step(optimizer: torch.optim.Optimizer, sources: list[TrainableParameter], lr_ratio: float) -> None:
    group_of = _group_of(optimizer)
    in_use = sorted({group_of[id(source.parameter)] for source in sources})
    rates = {index: rate_of_group(optimizer, optimizer.param_groups[index], base=True) or 0.0 for index in in_use}
    trial = try_step(optimizer, rates)
    if trial.follows is False:
        raise RateMismatchError(
            f"the groups have the rates of lr_ratio = {lr_ratio:g}, the step does not: {refusal(optimizer, trial)}"
        )
    if trial.follows is None:
        warn_unproved(optimizer, trial)


def _base_rate(table: RateTable, rates: Rates) -> float:
    """η_A as the optimizer has it: the base rate of a parameter that has η_A, over what it has at lr = 1.

    Raises:
        RateMismatchError: no relation to B's rate can be read off.
    """
    roles = {entry.role for entry in table.entries}
    fixed = {role for name in rates.own_rates() for role in OWN_RATES[name].metadata["roles"]}
    if Role.B not in roles or not roles - fixed - {Role.B}:
        alone = "B alone trains" if Role.B in roles else "no factor B of a linear layer trains"
        raise RateMismatchError(
            f"lr_ratio cannot be proved from the optimizer alone, since {alone} (what trains: "
            f"{', '.join(sorted(roles))}); pass lr, the η_A that the run should have: verify(..., lr=...)"
        )
    for role in (Role.A, *Role):  # A's if it trains, else that of something which keeps lr
        for entry in table.entries:
            if entry.role == role and entry.base_lr and role != Role.B and role not in fixed:
                return entry.base_lr / rates.at(1.0).of(role, entry.shares or entry.name)
    raise RateMismatchError("nothing that trains at η_A has a positive rate in this optimizer")
