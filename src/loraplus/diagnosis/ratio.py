"""What is off about λ: what it should be, what it is at every step, and what made it so."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from loraplus.diagnosis.diagnosis import NEAR, Pair, near, number, ratios_of, rounded, short, some
from loraplus.diagnosis.findings import Findings, ratios_by_step
from loraplus.diagnosis.measuring import rates_by_id
from loraplus.diagnosis.observer import Observed
from loraplus.steps.group_rates import base_rate, group_labels, reference_group
from loraplus.steps.step_probe import refusal, try_step
from loraplus.watching.schedulers import cause, will_flatten

_REMEDY = "loraplus.param_groups, loraplus.create_optimizer or loraplus.attach(trainer, lr_ratio=...) do"


@dataclass(frozen=True)
class Expected:
    """What a run should have.

    Args:
        lr_ratio: λ of every pair; None: whatever it has.
        where: what says so.
        weight_decay: of the factors; None: whatever they have.
        watched: steps were waited for.
        names_ratio: the script speaks of a ratio, so plain LoRA is not what was meant.
        uncalled: a method of the trainer that was to build the optimizer, and is never called; "" if there is none.
    """

    lr_ratio: float | None = None
    where: str = ""
    weight_decay: float | None = None
    names_ratio: bool = False
    watched: bool = False
    uncalled: str = ""


def judge_ratio(pairs: Sequence[Pair], expected: Expected, why: Callable[[Pair], str]) -> Iterator[str]:
    """What is off about λ.

    Args:
        pairs: with the rates of their steps.
        expected: what they should have.
        why: says what made a pair's λ.
    """
    known = [pair for pair in pairs if pair.lr_ratio is not None]
    if expected.lr_ratio is not None:
        off = [pair for pair in pairs if not near(pair.lr_ratio, expected.lr_ratio)]
        if off:
            is_now = "" if off[0].lr_ratio is None else f"is {off[0].lr_ratio:.3g} and "
            yield (
                f"λ {is_now}should be {expected.lr_ratio:g}, as {expected.where}, in {len(off)} of "
                f"{some(len(pairs), 'pair')} ({short(off[0].layer)}: {_of_pair(off[0])}); {why(off[0])}"
            )
        return
    slower = [pair for pair in known if pair.lr_ratio is not None and pair.lr_ratio < 1 - NEAR]
    if slower:
        yield (
            f"B learns slower than A in {some(len(slower), 'pair')} ({short(slower[0].layer)}: {_of_pair(slower[0])}); "
            f"B is the factor that should learn faster: are the two swapped? {why(slower[0])}"
        )
    plain = [pair for pair in known if near(pair.lr_ratio, 1.0)]
    if plain and len(plain) < len(known) and not slower:
        others = sorted(set(ratios_of(known)) - {1})
        yield (
            f"in {len(plain)} of {some(len(known), 'pair')} A and B share a rate ({short(plain[0].layer)}: "
            f"{number(plain[0].lr_a)}), and λ is {', '.join(f'{ratio:g}' for ratio in others)} in the others; "
            f"{why(plain[0])}"
        )
    elif plain and len(plain) == len(known) and expected.names_ratio:
        yield (
            f"B learns at A's rate ({number(plain[0].lr_a)}) in all {some(len(known), 'pair')}: this is plain LoRA, "
            f"though {expected.where}; {why(plain[0])}"
        )


def _of_pair(pair: Pair) -> str:
    if pair.lr_ratio is not None:
        return f"A at {number(pair.lr_a)}, B at {number(pair.lr_b)}"
    a, b = (
        "frozen" if frozen else "in no optimizer" if rate is None else f"at {number(rate)}"
        for frozen, rate in ((pair.a_frozen, pair.lr_a), (pair.b_frozen, pair.lr_b))
    )
    return f"A {a}, B {b}"


def ratio_problems(findings: Findings, expected: Expected) -> Iterator[str]:
    """λ of the steps of living optimizers, and what made it."""
    ids = dict(zip(map(id, findings.pairs), findings.pair_ids, strict=True))
    expected = expected if expected.lr_ratio is not None else replace(expected, **_meant(findings))
    yield from judge_ratio(findings.pairs, expected, lambda pair: _why(findings, pair, *ids[id(pair)]))


def _meant(findings: Findings) -> dict[str, Any]:
    """λ as groups were built, or as they say, where the steps have less: what they were built for has been lost."""
    measured = ratios_of(findings.pairs)
    if not measured or any(getattr(each.optimizer, "loraplus_autos", ()) for each in findings.seen):
        return {}
    stated = {key: rate for each in findings.seen for key, rate in each.last_stated.items()}
    for rates, where in ((findings.built, "it was built"), (stated, "its groups say")):
        ratios = {rounded(rates[b] / rates[a]) for a, b in findings.pair_ids if rates.get(a) and rates.get(b)}
        if len(ratios) == 1 and max(measured) < (ratio := ratios.pop()) * (1 - NEAR) and not near(ratio, 1):
            return {"lr_ratio": ratio, "where": where}
    return {}


def _why(findings: Findings, pair: Pair, a: int, b: int) -> str:
    """What made λ of a pair, whose factors have these ids."""
    for observed in findings.seen:
        optimizer, labels = observed.optimizer, group_labels(observed.optimizer.param_groups)
        places = {id(p): place for place, group in enumerate(optimizer.param_groups) for p in group["params"]}
        if b not in places:
            continue
        name, built = observed.name, findings.built
        now = observed.last_stated or rates_by_id(optimizer)
        said = now[b] / now[a] if now.get(a) and b in now else None
        if said and pair.lr_ratio is not None and not near(pair.lr_ratio, said):
            return _refusal(observed) or f"the groups say λ = {said:.3g}, and something changes that within the step"
        if said and built.get(a) and said < built.get(b, 0.0) / built[a] * (1 - NEAR):
            return f"it was built with λ = {built[b] / built[a]:.3g}: {cause(optimizer, *_relations(optimizer, built))}"
        if places.get(a) == places[b]:
            return f"A and B are in one group of {name} ({labels[places[b]]}); give each its own, as " + _REMEDY
        return f"{name} was built with these rates; build its groups with " + _REMEDY
    return "build the optimizer with " + _REMEDY


def _relations(optimizer: Any, built: dict[int, float]) -> tuple[list[float | None], int]:
    """(each group's rate over that of A's group, index of A's group), as they were built."""
    groups = optimizer.param_groups
    rates = [next((built[id(p)] for p in group["params"] if id(p) in built), None) for group in groups]
    reference = reference_group(group_labels(groups))
    if not rates[reference]:
        reference = next((place for place, rate in enumerate(rates) if rate), 0)
    of_a = rates[reference] or 1.0
    return [None if rate is None else rate / of_a for rate in rates], reference


def changed(findings: Findings, expected: Expected) -> Iterator[str]:
    """λ that did not stay what it was, from step to step."""
    for observed, by_step in zip(findings.seen, ratios_by_step(findings), strict=True):
        off = next((step for step, now in enumerate(by_step) if not all(map(near, now, by_step[0]))), None)
        if off is not None:
            first = observed.stated[0]
            yield (
                f"λ changed from {by_step[0][1]:.3g} to {by_step[off][1]:.3g} at step {off + 1}; "
                f"{cause(observed.optimizer, *_relations(observed.optimizer, first))}"
            )


def ignored(findings: Findings, expected: Expected) -> Iterator[str]:
    """Optimizers whose step takes no notice of their groups' rates."""
    if next(ratio_problems(findings, expected), None) is None:  # else it stands there
        yield from filter(None, map(_refusal, findings.seen))


def _refusal(observed: Observed) -> str:
    """What is wrong with an optimizer whose step takes no notice of its groups' rates; "" if nothing is."""
    groups = observed.optimizer.param_groups
    stated = observed.last_stated
    rates = {
        place: stated.get(id(group["params"][0])) or base_rate(group)
        for place, group in enumerate(groups)
        if group["params"]
    }
    known = {place: rate for place, rate in rates.items() if rate}
    if len(set(known.values())) > 1:
        trial = try_step(observed.optimizer, known)
        if trial.follows is False:
            return refusal(observed.optimizer, trial)
    return ""


def later(findings: Findings, expected: Expected) -> Iterator[str]:
    """Schedulers that keep λ for now."""
    if all(near(ratio, 1.0) for ratio in ratios_of(findings.pairs)):
        return
    for observed in findings.seen:
        first = observed.stated[0] if observed.stated else rates_by_id(observed.optimizer)
        yield from will_flatten(observed.optimizer, *_relations(observed.optimizer, first))
