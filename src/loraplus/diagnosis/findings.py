"""The live objects: models and trainers of a process, and what stands in them about every trainable parameter."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn
from torch.optim import Optimizer

from loraplus.adapters.layouts import PAIRS
from loraplus.adapters.structure import Structure
from loraplus.diagnosis.diagnosis import OptimizerSeen, Pair, ParameterStep
from loraplus.diagnosis.measuring import decays, trial_rates
from loraplus.diagnosis.observer import Observed
from loraplus.errors import NoLoraFactorsError, NoTrainableParametersError
from loraplus.groups import parameters_by_group
from loraplus.notices import told_once
from loraplus.parts import Role
from loraplus.roles import TrainableParameter, clean_name, trainable_parameters
from loraplus.steps.group_rates import base_rate, group_labels, rate_as_number
from loraplus.steps.wrappers import unwrapped

_FACTOR_NAMES = frozenset(name for pair in PAIRS for name in pair if name.startswith("lora_"))


class Alive(NamedTuple):
    """What there is in a process."""

    modules: list[nn.Module]
    optimizers: list[Optimizer]
    trainers: list[Any]  # transformers'


def alive() -> Alive:
    """Looks through all objects of the process."""
    living = Alive([], [], [])
    homes: dict[type, list[Any] | None] = {}
    for each in gc.get_objects():
        kind = type(each)  # not isinstance: proxies answer that by importing what they stand for
        if kind not in homes:
            is_trainer = any(parent.__name__ == "Trainer" for parent in kind.__mro__)
            homes[kind] = (
                living.modules if issubclass(kind, nn.Module)
                else living.optimizers if issubclass(kind, Optimizer)
                else living.trainers if is_trainer and hasattr(kind, "create_optimizer")
                else None
            )  # fmt: skip
        home = homes[kind]
        if home is not None:
            home.append(each)
    return living


def models_of(optimizers: Sequence[Any], modules: Sequence[nn.Module]) -> list[nn.Module]:
    """The outermost modules that hold parameters of these optimizers; where none does, those that hold factors.

    A copy that no optimizer trains (an average of weights, a reference model) is none of them.
    """
    inner = {id(child) for module in modules for child in module._modules.values() if child is not None}
    roots = [module for module in modules if id(module) not in inner]
    held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    sized = sorted(((len(list(root.parameters())), root) for root in roots), key=lambda each: -each[0])
    outermost, covered = [], set()
    for _, root in sized:
        own = {id(parameter) for parameter in root.parameters()}
        if own & held - covered:
            outermost.append(root)
            covered |= own
    return outermost or [root for _, root in sized if has_factors(root)]


def has_factors(model: nn.Module) -> bool:
    """Whether factors are there by name, trained or frozen."""
    return any(_is_called_a_factor(name) for name, _ in model.named_parameters())


def idle_optimizers(
    seen: Sequence[Observed], models: Sequence[nn.Module], optimizers: Sequence[Optimizer]
) -> list[Optimizer]:
    """Those that took no step and hold parameters of these models that no other one holds."""
    stepped = {id(each.optimizer) for each in seen}
    held = {id(p) for each in seen for group in each.optimizer.param_groups for p in group["params"]}
    free = {id(p) for model in models for p in model.parameters()} - held
    idle = []
    for each in optimizers:
        if id(each) not in stepped and hasattr(each, "param_groups"):
            own = {id(parameter) for group in each.param_groups for parameter in group["params"]}
            if own & free and not own & held and unwrapped(each) is each:
                idle.append(each)
    return idle


def trainer_of(seen: Sequence[Observed], trainers: Sequence[Any]) -> Any:
    """The trainer that trains with one of these optimizers, wrapped or not; None if none does."""
    known = {id(each.optimizer) for each in seen}
    for each in trainers:
        own = getattr(each, "optimizer", None)
        if own is not None and id(unwrapped(own)) in known:
            return each
    return None


@dataclass
class Findings:
    """What stands in models and optimizers, and what steps had; `judging` says what is off about it.

    Args:
        entries, pairs: of all models.
        seen: each optimizer, with what was watched of it.
        built: {id of a parameter: the rate that it was built with}.
        parameters: {name of an entry: its tensor}.
        frozen: names of factors that do not train.
    """

    models: list[nn.Module]
    seen: list[Observed]
    built: dict[int, float]
    entries: list[ParameterStep] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)
    pair_ids: list[tuple[int, int]] = field(default_factory=list)
    parameters: dict[str, Any] = field(default_factory=dict)
    frozen: list[str] = field(default_factory=list)

    def optimizers(self) -> list[OptimizerSeen]:
        """As the diagnosis shows them."""
        shown = []
        for observed in self.seen:
            groups = observed.optimizer.param_groups
            rows = [
                {
                    "name": label,
                    "lr": rate_as_number(group.get("lr")),
                    "weight_decay": rate_as_number(group.get("weight_decay")),
                    "tensors": len(group["params"]),
                }
                for label, group in zip(group_labels(groups), groups, strict=True)
            ]
            shown.append(OptimizerSeen(observed.name, observed.steps, tuple(rows)))
        return shown


def find(models: list[nn.Module], seen: list[Observed], built: dict[int, float] | None = None) -> Findings:
    """Reads models and optimizers; rates that no step has shown are tried in a twin.

    Args:
        models: those that the optimizers train.
        seen: the optimizers.
        built: {id of a parameter: the rate of its group when the optimizer was built}, where known.

    Raises:
        NoLoraFactorsError: no model has a factor, trained or frozen.
        UnknownAdapterParameterError, FlattenedParametersError: see `loraplus.explain`.
    """
    findings = Findings(models, seen, built or {})
    places = _places(seen)
    prefix = len([model for model in models if any(p.requires_grad for p in model.parameters())]) > 1
    refusals: list[Exception] = []
    for index, model in enumerate(models):
        start = f"{type(model).__name__}{index}." if prefix else ""
        try:
            listed = _listed(model)
        except (NoLoraFactorsError, NoTrainableParametersError) as error:
            findings.frozen += [
                start + clean_name(name) for name, _ in model.named_parameters() if _is_called_a_factor(name)
            ]
            refusals.append(error)
            listed = [
                TrainableParameter(clean_name(name), p, Role.OTHER, None)
                for name, p in model.named_parameters() if p.requires_grad
            ]  # fmt: skip
            findings.entries += [_entry(start, each, places) for each in listed if id(each.parameter) in places]
            continue
        findings.entries += [_entry(start, each, places) for each in listed]
        findings.parameters |= {start + each.name: each.parameter for each in listed}
        _add_pairs(findings, model, start, listed)
    if refusals and not findings.parameters and not findings.frozen:
        raise refusals[0]
    return findings


@told_once(silent=True)
def _listed(model: nn.Module) -> list[TrainableParameter]:
    return trainable_parameters(model)


def _is_called_a_factor(name: str) -> bool:
    return not _FACTOR_NAMES.isdisjoint(name.split("."))


@dataclass(frozen=True)
class _Place:
    """Where a parameter stands, and what its step had."""

    optimizer: str
    group: str
    lr: float | None
    step_lr: float | None
    weight_decay: float | None
    measured: bool


def _places(seen: Sequence[Observed]) -> dict[int, _Place]:
    places: dict[int, _Place] = {}
    kinds = [observed.name for observed in seen]
    for index, observed in enumerate(seen):
        optimizer = observed.optimizer
        name = kinds[index] if kinds.count(kinds[index]) == 1 else f"{kinds[index]} {index + 1}"
        held = list(parameters_by_group(optimizer))
        own = [p for group in optimizer.param_groups for p in group["params"]]
        watched = observed.measured()
        measured = trial_rates(optimizer, [p for p in own if id(p) not in watched]) | watched
        stated = observed.last_stated
        labels = group_labels(optimizer.param_groups)
        for place, parameters in held:
            group = optimizer.param_groups[place]
            of_group = [measured[id(p)] for p in group["params"] if id(p) in measured]
            decay = rate_as_number(group.get("weight_decay"))
            if decay and group["params"] and decays(optimizer, group) is False:
                decay = 0.0
            for parameter in parameters:
                lr = stated.get(id(parameter)) or rate_as_number(group.get("lr")) or base_rate(group)
                # DeepSpeed's groups hold flat copies: what their step had, the model's parameters had.
                step_lr = measured.get(id(parameter), of_group[0] if len(set(of_group)) == 1 else None)
                places[id(parameter)] = _Place(
                    name, labels[place], lr, lr if step_lr is None else step_lr, decay, step_lr is not None
                )
    return places


def _entry(start: str, listed: TrainableParameter, places: dict[int, _Place]) -> ParameterStep:
    place, count = places.get(id(listed.parameter)), listed.parameter.numel()
    name, shares = start + listed.name, listed.shares and start + listed.shares
    if place is None:
        return ParameterStep(name, listed.role, None, None, None, None, None, 0 if shares else count, True, shares)
    return ParameterStep(
        name, listed.role, place.optimizer, place.group, place.lr, place.step_lr, place.weight_decay,
        0 if shares else count, place.measured, shares,
    )  # fmt: skip


def _add_pairs(findings: Findings, model: nn.Module, start: str, listed: Sequence[TrainableParameter]) -> None:
    structure = Structure(model)
    owners = {id(p): structure.owners[name.rpartition(".")[0]] for name, p in model.named_parameters()}
    every = {clean_name(name): p for name, p in model.named_parameters()}
    rates = {entry.name: entry.step_lr for entry in findings.entries}
    roles = {each.name: each.role for each in listed}
    done: set[str] = set()
    for each in listed:
        if each.role not in (Role.A, Role.B) or each.name in done:
            continue
        owner = owners[id(each.parameter)]
        other = next((other for other in structure.partner_names(each.name, owner) if other in every), None)
        if other is None:
            continue
        done |= {each.name, other}
        a, b = (each.name, other) if each.role is Role.A else (other, each.name)
        findings.pair_ids.append((id(every[a]), id(every[b])))
        findings.pairs.append(
            Pair(
                start + _layer(a, b),
                rates.get(start + a), rates.get(start + b), a_frozen=a not in roles, b_frozen=b not in roles,
            )
        )  # fmt: skip
        findings.frozen += [start + name for name in (a, b) if name not in roles]


def _layer(a: str, b: str) -> str:
    common: list[str] = []
    for one, other in zip(a.split("."), b.split("."), strict=False):
        if one != other:
            break
        common.append(one)
    return ".".join(common)


def ratios_by_step(findings: Findings) -> Iterator[list[tuple[float, float]]]:
    """For each optimizer, [(least λ, greatest λ) of a step], as its groups said."""
    for observed in findings.seen:
        by_step = []
        for rates in observed.stated:
            ratios = [rates[b] / rates[a] for a, b in findings.pair_ids if rates.get(a) and b in rates]
            if ratios:
                by_step.append((min(ratios), max(ratios)))
        yield by_step
