"""Which scheduler took an optimizer's groups away from the ratios they were built with, and what to give it instead.

Schedulers that multiply each group's own rate keep every ratio. Those that take a rate themselves (`max_lr`, `min_lr`,
`swa_lr`, `eta_min`) give all groups the same one, unless they are given one a group.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer, lr_scheduler

_TOLERANCE = 1e-6
_FINDERS = "lr_finder"  # Lightning's module, and torch-lr-finder's
_OF_GROUPS = {"OneCycleLR": "max_lr", "SWALR": "swa_lr"}  # kept in the groups, under the argument's name
_OF_SCHEDULERS = {"min_lrs": "min_lr", "max_lrs": "max_lr"}  # kept in the scheduler: attribute → argument
_MULTIPLY = tuple(
    getattr(lr_scheduler, name)
    for name in (
        "LinearLR ConstantLR StepLR MultiStepLR ExponentialLR PolynomialLR SequentialLR ChainedScheduler "
        "ReduceLROnPlateau"
    ).split()
)


def cause(optimizer: Optimizer, relations: Sequence[float | None], reference: int) -> str:
    """What set the present rates, and what to do about it, as two clauses; causes by a search through all objects.

    Args:
        optimizer: whose groups are off.
        relations: rate of each group over that of group `reference`, as it should be; None where that is not known.
        reference: index of A's group.
    """
    causes = [told for scheduler in schedulers_of(optimizer) if (told := _told(scheduler, relations, reference))]
    if causes:
        return min(causes)[1]
    factors = ", ".join("1" if relation is None else f"{relation:.6g}" for relation in relations)
    return (
        "no scheduler did it: a rate was written into the groups, by hand or by a callback; multiply instead: for "
        f'group, factor in zip(optimizer.param_groups, [{factors}]): group["lr"] = factor * lr'
    )


def schedulers_of(optimizer: Optimizer) -> Iterator[Any]:
    """Every scheduler that is alive and sets this optimizer's rates, torch's or another's."""
    looks_like_one: dict[type, bool] = {}
    for candidate in gc.get_objects():
        kind = type(candidate)  # not isinstance: proxies answer that by importing what they stand for
        if kind not in looks_like_one:
            others = issubclass(kind, (Optimizer, nn.Module, type))
            looks_like_one[kind] = not others and callable(getattr(kind, "step", None))
        if looks_like_one[kind]:
            try:
                mine = vars(candidate).get("optimizer")
            except TypeError:  # no __dict__
                continue
            while mine is not None and mine is not optimizer:  # wrapped
                mine = getattr(mine, "optimizer", None)
            if mine is optimizer and any(hasattr(candidate, name) for name in ("get_last_lr", "base_lrs", "_last_lr")):
                yield candidate


def _told(scheduler: Any, relations: Sequence[float | None], reference: int) -> tuple[int, str] | None:
    """(rank, what is to be said of it), the best rank first; None if it keeps ratios."""
    name, wrote = type(scheduler).__name__, _wrote(scheduler)
    rank = 0 if wrote else 1
    if _FINDERS in type(scheduler).__module__:
        return rank, (
            "a learning-rate finder did it: it tries one rate for all groups, so what it measures and suggests is the "
            "rate of plain LoRA; do not use it for LoRA+ (`loraplus tune` and AutoRates find rates for A and B)"
        )
    own = _own_rates(scheduler)
    if own:
        right = {argument: _in_relation(rates, relations, reference) for argument, rates in own.items()}
        if all(_close(own[argument], right[argument]) for argument in own):
            if getattr(scheduler, "eps", 0) and wrote:  # ReduceLROnPlateau's
                return rank, f"{name} did it: it leaves out changes below its eps = {scheduler.eps:g}; give it eps=0"
            return None
        if "eta_min" in own:
            part = own["eta_min"][reference] / float(scheduler.base_lrs[reference])
            return rank, (
                f"{name}(eta_min={own['eta_min'][reference]:.6g}) did it: it has one for all groups; use eta_min=0, or "
                f"transformers' get_cosine_with_min_lr_schedule_with_warmup with min_lr_rate={part:.6g}"
            )
        listed = ", ".join(f"{argument}=[{', '.join(f'{r:.6g}' for r in rates)}]" for argument, rates in right.items())
        given = " and ".join(right)
        which = f"its {given} {'are' if len(right) > 1 else 'is'} not in the ratio of the groups"
        return rank, f"{name} did it: {which}; give it one a group: {listed}"
    if not wrote or isinstance(scheduler, _MULTIPLY):
        return None
    lambdas = getattr(scheduler, "lr_lambdas", None)
    if lambdas is not None:
        if all(each is lambdas[0] for each in lambdas):
            return None
        return rank, (
            f"{name} did it: its lambdas differ between the groups; if that is meant, nothing is to be done, else give "
            "it one lambda for all"
        )
    return 2, f"{name} did it; use one that multiplies each group's own rate, as torch's LambdaLR does"


def _wrote(scheduler: Any) -> bool:
    """Whether the present rates are the last that it set."""
    last = getattr(scheduler, "_last_lr", None)
    groups = scheduler.optimizer.param_groups
    return bool(last) and len(last) == len(groups) and _close(last, [group["lr"] for group in groups])


def _own_rates(scheduler: Any) -> dict[str, list[float]]:
    """The rates by group that it was given itself, by argument; none in a scheduler that only multiplies."""
    count = len(scheduler.optimizer.param_groups)
    key = next((_OF_GROUPS[kind.__name__] for kind in type(scheduler).__mro__ if kind.__name__ in _OF_GROUPS), None)
    if key is not None:
        return {key: [float(group.get(key, 0.0)) for group in scheduler.optimizer.param_groups]}
    if isinstance(scheduler, (lr_scheduler.CosineAnnealingLR, lr_scheduler.CosineAnnealingWarmRestarts)):
        return {"eta_min": [float(scheduler.eta_min)] * count}
    by_argument = {
        argument: [float(rate) for rate in getattr(scheduler, attribute)]
        for attribute, argument in _OF_SCHEDULERS.items()
        if len(getattr(scheduler, attribute, ())) == count
    }
    if isinstance(scheduler, lr_scheduler.CyclicLR):
        by_argument = {"base_lr": [float(rate) for rate in scheduler.base_lrs], **by_argument}
    return by_argument


def _in_relation(rates: list[float], relations: Sequence[float | None], reference: int) -> list[float]:
    """What the rates would be, were they in relation to that of A's group."""
    return [
        rate if relation is None else rates[reference] * relation
        for rate, relation in zip(rates, relations, strict=True)
    ]


def _close(some: Sequence[Any], others: Sequence[Any]) -> bool:
    return all(math.isclose(a, b, rel_tol=_TOLERANCE) for a, b in zip(some, others, strict=True))


def will_flatten(optimizer: Optimizer, relations: Sequence[float | None], reference: int) -> list[str]:
    """What the schedulers of an optimizer will do to ratios that still hold, and what to give them instead.

    Args:
        optimizer: whose groups have their ratios now.
        relations: rate of each group over that of group `reference`; None where that is not known.
        reference: index of A's group.
    """
    told = []
    for scheduler in schedulers_of(optimizer):
        own = _own_rates(scheduler)
        if any(not _close(rates, _in_relation(rates, relations, reference)) for rates in own.values()):
            told.append(_told(scheduler, relations, reference))
    return sorted({text.replace(" did it: ", " changes λ as it goes: ", 1) for _, text in filter(None, told)})
