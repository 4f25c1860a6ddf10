"""What is off about the rates of a run, the worst first, and what is worth knowing."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from loraplus.adapters.memory import overlapping
from loraplus.diagnosis.beside_factors import beside_factors
from loraplus.diagnosis.diagnosis import Diagnosis, named, number, some
from loraplus.diagnosis.findings import Findings
from loraplus.diagnosis.ratio import Expected, changed, ignored, later, ratio_problems
from loraplus.groups import parameters_by_group
from loraplus.parts import Role
from loraplus.steps.group_rates import group_labels, rate_as_number

_FACTOR_ROLES = {Role.A, Role.B}


def judge(findings: Findings, expected: Expected, source: str) -> Diagnosis:
    """Everything that is off about what was found.

    Args:
        findings: of models and optimizers.
        expected: what they should have.
        source: what was looked at.
    """
    rules: tuple[Callable[[Findings, Expected], Iterable[str]], ...] = (
        _uncalled, _nothing_trains, _not_held, _idle, ratio_problems, changed, ignored, _one_memory, _twice, _unmoved,
        _beside_factors, _decay, later,
    )  # fmt: skip
    problems = list(dict.fromkeys(problem for rule in rules for problem in rule(findings, expected)))
    return Diagnosis(
        source, tuple(findings.entries), tuple(findings.pairs), tuple(findings.optimizers()), tuple(problems),
        tuple(_notes(findings, expected)),
    )  # fmt: skip


def _uncalled(findings: Findings, expected: Expected) -> Iterator[str]:
    if expected.uncalled:
        yield (
            f"{expected.uncalled} is never called, so what it builds does not train; this version of transformers "
            "calls create_optimizer and create_scheduler, each by itself: override these"
        )


def _nothing_trains(findings: Findings, expected: Expected) -> Iterator[str]:
    factors = [entry for entry in findings.entries if entry.role in _FACTOR_ROLES]
    frozen_b = [pair.layer for pair in findings.pairs if pair.b_frozen]
    if findings.frozen and not factors:
        yield (
            f"no factor trains: {some(len(findings.frozen), 'factor')} of the adapter are frozen (first: "
            f"{findings.frozen[0]}); load it with PeftModel.from_pretrained(..., is_trainable=True), or call "
            "model.set_adapter(name)"
        )
    elif frozen_b:
        yield (
            f"B is frozen in {some(len(frozen_b), 'pair')} (first: {frozen_b[0]}), so only A learns there; "
            "set requires_grad of lora_B before the optimizer is built"
        )


def _not_held(findings: Findings, expected: Expected) -> Iterator[str]:
    missing = [entry.name for entry in findings.entries if entry.optimizer is None and not entry.shares]
    if missing:
        yield (
            f"{len(missing)} of {some(len(findings.entries), 'trainable parameter')} are in no optimizer, so they do "
            f"not learn: {named(missing)}; build the optimizer after the adapter is on the model, from all parameters "
            "that require gradients"
        )


def _idle(findings: Findings, expected: Expected) -> Iterator[str]:
    if any(observed.steps or observed.at_zero for observed in findings.seen):
        for observed in findings.seen:
            if not (observed.steps or observed.at_zero):
                yield f"{observed.name} holds factors and has taken no step while others stepped"


def _one_memory(findings: Findings, expected: Expected) -> Iterator[str]:
    entries = {entry.name: entry for entry in findings.entries}
    names = [name for name in findings.parameters if entries[name].optimizer is not None]
    for places in overlapping([findings.parameters[name] for name in names]):
        on_one = [entries[names[place]] for place in places]
        if len({entry.step_lr for entry in on_one}) > 1:
            told = ", ".join(f"{entry.name} at {number(entry.step_lr)}" for entry in on_one)
            yield f"parameters on one memory learn at several rates: {told}; give them one group"


def _twice(findings: Findings, expected: Expected) -> Iterator[str]:
    names = {id(parameter): name for name, parameter in findings.parameters.items()}
    held: dict[int, list[str]] = defaultdict(list)
    for observed in findings.seen:
        groups = observed.optimizer.param_groups
        for label, group in zip(group_labels(groups), groups, strict=True):
            for parameter in group["params"]:
                held[id(parameter)].append(f"{observed.name}'s {label}")
    twice = [key for key, where in held.items() if len(where) > 1 and key in names]
    if twice:
        yield (
            f"{some(len(twice), 'parameter')} in more than one group, so a step moves it as often: "
            f"{named([names[key] for key in twice])} in {' and '.join(held[twice[0]])}; leave each in one"
        )


def _unmoved(findings: Findings, expected: Expected) -> Iterator[str]:
    still = [entry.name for entry in findings.entries if entry.step_lr == 0 and entry.lr]
    if still:
        yield f"a step does not move {some(len(still), 'parameter')} that their groups give a rate: {named(still)}"
    at_zero = [entry.name for entry in findings.entries if entry.optimizer is not None and entry.lr == 0]
    if at_zero:
        yield f"the rate of {some(len(at_zero), 'trainable parameter')} is 0: {named(at_zero)}"
    for observed in findings.seen:
        factors = [
            entry.name for entry in findings.entries
            if entry.role in _FACTOR_ROLES and id(findings.parameters.get(entry.name)) in observed.last_stated
        ]  # fmt: skip
        idle = [name for name in factors if id(findings.parameters[name]) not in observed.learnt]
        if idle and len(idle) == len(factors):
            yield (
                f"no gradient reached a factor in {some(observed.steps, 'step')}: {named(idle)}; is the model that the "
                f"loss is computed with the one whose parameters {observed.name} was given?"
            )


def _beside_factors(findings: Findings, expected: Expected) -> Iterator[str]:
    asked_by_name = any(observed.is_ours for observed in findings.seen)
    yield from beside_factors(findings.entries, findings.pairs, asked_by_name=asked_by_name)


def _decay(findings: Findings, expected: Expected) -> Iterator[str]:
    every = [entry for entry in findings.entries if entry.role in _FACTOR_ROLES and entry.optimizer is not None]
    for observed in findings.seen:
        held = {id(parameter) for _, own in parameters_by_group(observed.optimizer) for parameter in own}
        factors = [entry for entry in every if id(findings.parameters.get(entry.name)) in held]
        asked, where = expected.weight_decay, "the training arguments"
        given = rate_as_number(getattr(observed.optimizer, "defaults", {}).get("weight_decay"))
        if not asked and given and given != _class_default(observed.optimizer):
            asked, where = given, observed.name
        without = [entry.name for entry in factors if entry.weight_decay == 0]
        if asked and factors and without:
            yield (
                f"weight decay {asked:g} was given to {where} and is left out of {len(without)} of "
                f"{some(len(factors), 'factor')}: {named(without)}; PEFT's create_loraplus_optimizer takes it as "
                "loraplus_weight_decay, others as weight_decay of each group"
            )
            return


def _class_default(optimizer: Any) -> Any:
    try:
        parameter = inspect.signature(type(optimizer).__init__).parameters.get("weight_decay")
    except (TypeError, ValueError):  # a class made in C, or by a wrapper
        return None
    return None if parameter is None else parameter.default


def _notes(findings: Findings, expected: Expected) -> Iterator[str]:
    for observed in findings.seen:
        name, groups = observed.name, observed.optimizer.param_groups
        empty = [label for label, group in zip(group_labels(groups), groups, strict=True) if not group["params"]]
        if empty:
            yield (
                f"{len(empty)} of {some(len(groups), 'group')} of {name} are empty ({named(empty)}); DeepSpeed crashes "
                "on empty groups from torch 2.10 on"
            )
        if not observed.steps and not observed.at_zero and expected.watched:
            yield f"{name} took no step: these are the rates that a step would have, tried on a twin of it"
        if observed.trouble:
            yield f"the steps of {name} could not be measured ({observed.trouble}); the groups' rates are shown"
        if observed.at_zero and not observed.steps:
            yield f"every rate was 0 in the {some(observed.at_zero, 'step')} of {name} that were watched; see --steps"
    frozen_a = [pair for pair in findings.pairs if pair.a_frozen]
    if frozen_a:
        yield f"A is frozen in {len(frozen_a)} of {some(len(findings.pairs), 'pair')}: B alone learns there (LoRA-FA)"
    silent = {
        entry.name
        for observed in findings.seen
        if observed.steps
        for entry in findings.entries
        if entry.optimizer is not None
        and (key := id(findings.parameters.get(entry.name))) in observed.last_stated
        and key not in observed.learnt
        and findings.parameters[entry.name].numel()  # the rest of a shard is elsewhere
    }
    if silent:
        yield f"no gradient has reached {some(len(silent), 'parameter')} yet: {named(sorted(silent))}"
    trained = {id(parameter) for model in findings.models for parameter in model.parameters()}
    for observed in findings.seen:
        held = [p for group in observed.optimizer.param_groups for p in group["params"] if id(p) in trained]
        still = [parameter for parameter in held if not parameter.requires_grad]
        if still:
            yield f"{observed.name} holds {some(len(still), 'parameter')} that are frozen"
