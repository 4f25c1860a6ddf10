"""What an optimizer's step does with two rates, tried on stand-ins: the proof behind what its groups say.

An optimizer may take groups and never read their lr: those that estimate one rate for all (D-Adaptation, Prodigy),
those that make their own from the step count, those that read `defaults["lr"]`. The groups then say η_B = λ·η_A, and B
moves as A does. So two small matrices with the same start and the same gradients stand in a twin of the optimizer, one
in each of two groups, and take some steps: how far they come must be as far apart as the groups' rates.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import nn

from loraplus.errors import LoraPlusWarning
from loraplus.steps.group_rates import in_form_of
from loraplus.steps.twin import step_of, twin_over
from loraplus.steps.wrappers import unwrapped

_SHAPE = (4, 8)
_SETTLING, _STEPS = 8, 8  # the first steps may set weights or states up, so the ones after them are measured
_MOST_STEPS = 200  # where nothing moves before: a warm-up may start at zero
_LR = 1e-4  # of the slower stand-in: small enough for every step to be linear in it
_ROUNDING = 1e-4  # of the weights: what moves less is not measured beside them
_MOST_APART = 64.0
_ALIKE = 0.02  # rates nearer to each other than this (in log) prove nothing
_TOLERANCE = 0.15  # in log; some divide by what the weights are, so that their step is not quite linear in the rate
_SIGNATURES = 8
_PER_GROUP = frozenset({"params", "param_names", "lr", "initial_lr", "name"})


class Trial(NamedTuple):
    """What was found out about a step.

    Args:
        follows: it follows the rates of the groups; None if it could not be tried.
        asked: how far apart the rates of the two groups are.
        moved: how far apart the stand-ins moved; None if they did not.
        reason: why it could not be tried, or what the optimizer says to two rates.
    """

    follows: bool | None
    asked: float = 1.0
    moved: float | None = None
    reason: str = ""


def refusal(optimizer: torch.optim.Optimizer, trial: Trial) -> str:
    """What is wrong with an optimizer whose trial failed, and what to do."""
    optimizer = _that_steps(optimizer)
    name = type(optimizer).__name__
    if trial.moved is not None and not math.isfinite(trial.moved):
        return (
            f"a trial step of {name} gives numbers that are NaN or infinite; one of its settings (a rate, the weight "
            "decay) is far too large"
        )
    if trial.moved is None:
        what = f"{name} takes a step at one rate for all groups but not at two ({trial.reason})"
    else:
        what = (
            f"{name} does not follow the rates of its groups: in trial steps at rates {trial.asked:g} times apart the "
            f"faster of two equal matrices moved {trial.moved:.3g} times as far"
        )
    if any(group.get("relative_step") for group in optimizer.param_groups):
        return f"{what}; give it relative_step=False, or use torch.optim.AdamW, say"
    if any(part in name.lower() for part in ("prodigy", "adapt")):
        return (
            f"{what}; use torch.optim.AdamW, say, or loraplus.tasks.prodigy.SplitProdigy with lr=1 and lr_ratio=1, "
            "which estimates a rate for A and one for B"
        )
    return f"{what}; use an optimizer that reads every group's lr, such as torch.optim.AdamW, or lr_ratio=1"


_warned: WeakSet[Any] = WeakSet()


def warn_unproved(optimizer: torch.optim.Optimizer, trial: Trial) -> None:
    """Says, once for each optimizer, that its step could not be tried."""
    optimizer = _that_steps(optimizer)
    if optimizer not in _warned:
        _warned.add(optimizer)
        warnings.warn(
            f"the rates stand in the groups of {type(optimizer).__name__}, but whether its step follows them could not "
            f"be tried ({trial.reason})",
            LoraPlusWarning,
            stacklevel=3,
        )


class _Slots(NamedTuple):
    """Two groups, by index. In the trial both have the options of one of them, so that only their rates differ."""

    slow: int
    fast: int
    options: int


def try_step(optimizer: torch.optim.Optimizer, rates: Mapping[int, float]) -> Trial:
    """Tries whether a step follows the rates of the groups; the optimizer and the random state stay as they are.

    Args:
        optimizer: any torch optimizer, in Accelerate's or DeepSpeed's wrapper or not.
        rates: {index of a group: its rate}; groups left out are not looked at.

    Returns:
        The first trial that fails, else one that follows. With one rate there is nothing to follow.

    Example:
        >>> one, other = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
        >>> optimizer = torch.optim.SGD([{"params": [one], "lr": 0.1}, {"params": [other], "lr": 0.4}])
        >>> try_step(optimizer, {0: 0.1, 1: 0.4}).follows
        True
    """
    optimizer = _that_steps(optimizer)
    filled = {index: rate for index, rate in rates.items() if optimizer.param_groups[index]["params"]}
    if rates and not filled:
        return Trial(None, reason="its groups are empty between steps")  # DeepSpeed's ZeRO-3
    for slots in _pairs(optimizer, filled):
        asked = min(rates[slots.fast] / rates[slots.slow], _MOST_APART)
        trial = _try(optimizer, slots, asked)
        if not trial.follows:
            return trial
    return Trial(True)


def _that_steps(optimizer: torch.optim.Optimizer) -> Any:
    """The optimizer whose step moves the parameters: inside every wrapper, and in those of torch.distributed."""
    optimizer = unwrapped(optimizer)
    while type(optimizer).__module__.startswith("torch.distributed."):
        inner = getattr(optimizer, "optim", None)  # ZeroRedundancyOptimizer's, over its part of the parameters
        if inner is None:
            break
        optimizer = inner
    return optimizer


def _pairs(optimizer: torch.optim.Optimizer, rates: Mapping[int, float]) -> list[_Slots]:
    """For each set of options that groups have, two groups at different rates; none if all have one rate."""
    known = {index: rate for index, rate in rates.items() if rate > 0 and math.isfinite(rate)}
    pairs: dict[str, _Slots] = {}
    for index, rate in known.items():
        others = [other for other in known if abs(math.log(known[other] / rate)) > _ALIKE]
        signature = repr(_options(optimizer.param_groups[index]))
        if others and signature not in pairs and len(pairs) < _SIGNATURES:
            # Groups with other options may be another optimizer's, where two are in one.
            alike = [o for o in others if optimizer.param_groups[o].keys() == optimizer.param_groups[index].keys()]
            other = max(alike or others, key=lambda other: abs(math.log(known[other] / rate)))
            slow, fast = sorted((index, other), key=known.__getitem__)
            pairs[signature] = _Slots(slow, fast, index)
    return list(pairs.values())


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in _PER_GROUP}


def _try(optimizer: torch.optim.Optimizer, slots: _Slots, asked: float) -> Trial:
    refusals, random = [], False
    for attempt in _ATTEMPTS:
        try:
            slow, fast, at_random = _moved(optimizer, slots, asked, **attempt)
        except Exception as error:  # whatever an optimizer does not like about stand-ins, or about two rates
            refusals.append(f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")
            continue
        moved = fast / slow if slow else math.inf
        off = abs(math.log(moved / asked)) if 0 < moved < math.inf else math.inf
        if off <= min(_TOLERANCE, math.log(asked) / 4):
            return Trial(True, asked, moved)
        if not at_random:
            return Trial(_follows_when_new(optimizer, slots, asked, attempt), asked, moved)
        random = True
    if random:
        return Trial(None, asked, None, "its steps are partly random")
    for attempt in _ATTEMPTS:  # one that steps at one rate and not at two refuses the two
        with suppress(Exception):
            _moved(optimizer, slots, 1.0, **attempt)
            return Trial(False, asked, None, refusals[0])
    return Trial(None, asked, None, refusals[0])


def _follows_when_new(
    optimizer: torch.optim.Optimizer, slots: _Slots, asked: float, attempt: Mapping[str, Any]
) -> bool:
    """Whether the step follows the rates once what it counts in its groups stands at its start.

    Schedule-free optimizers weigh a step by the largest rate so far, which a trial at other rates cannot take over.
    """
    with suppress(Exception):
        counted = _counted(optimizer, slots, asked)
        if counted:
            slow, fast, _ = _moved(optimizer, slots, asked, **attempt, counted=counted)
            return abs(math.log(fast / slow / asked)) <= min(_TOLERANCE, math.log(asked) / 4)
    return False


def _counted(optimizer: torch.optim.Optimizer, slots: _Slots, asked: float) -> dict[str, Any]:
    """{option that a step changes: its default}."""
    parameter = optimizer.param_groups[slots.slow]["params"][0]
    stand_in = nn.Parameter(torch.full(_SHAPE, 0.5, device="cpu" if parameter.is_meta else parameter.device))
    twin = twin_over(optimizer, {parameter: stand_in}, with_state=False)
    (group,) = twin.param_groups
    train_mode(twin)
    before = copy.deepcopy(_options(group))
    _step(twin, [stand_in], 0, closure=False)
    return {key: twin.defaults[key] for key, value in before.items() if key in twin.defaults and group[key] != value}


_ATTEMPTS: tuple[dict[str, Any], ...] = (
    {},
    {"zero": True},  # steps too small beside a weight of 0.5 are whole beside one of 0
    {"closure": True},
    {"state": True, "zero": True},  # some make their state when they are built, and need it; 16 bits round off steps
    {"state": True},
    {"state": True, "closure": True},
    {"zero": True, "steps": _MOST_STEPS},
)


def _moved(
    optimizer: torch.optim.Optimizer,
    slots: _Slots,
    asked: float,
    *,
    zero: bool = False,
    state: bool = False,
    closure: bool = False,
    steps: int = _SETTLING + _STEPS,
    counted: Mapping[str, Any] | None = None,
) -> tuple[float, float, bool]:
    """How far a stand-in comes in the slower group and in the faster one, and whether random numbers were drawn.

    Raises:
        ArithmeticError: neither moves by more than rounding.
    """
    parameters: list[torch.Tensor] = [optimizer.param_groups[index]["params"][0] for index in (slots.slow, slots.fast)]
    device = torch.device("cpu") if parameters[0].is_meta else parameters[0].device
    if state:
        start = torch.zeros_like(parameters[0]) if zero else parameters[0].detach()
    else:
        start = torch.full(_SHAPE, 0.0 if zero else 0.5, device=device, dtype=torch.float32)
    stand_ins = [nn.Parameter(start.clone()) for _ in parameters]
    before = [start, start]
    with _random_state_kept(device):
        random_state = torch.get_rng_state()
        mapping = dict(zip(parameters, stand_ins, strict=True))
        twin = twin_over(optimizer, mapping, with_state=state, state_of=dict.fromkeys(parameters, parameters[0]))
        _set_up(twin, slots, asked)
        for group in twin.param_groups:
            group.update(counted or {})
        for step in range(steps):
            if step == _SETTLING:
                before = [tensor.detach().clone() for tensor in stand_ins]
            _step(twin, stand_ins, step, closure)
            if step + 1 < _SETTLING + _STEPS:
                continue
            slow, fast = (
                float((tensor.detach() - old).double().norm()) for tensor, old in zip(stand_ins, before, strict=True)
            )
            if max(slow, fast) > _ROUNDING * float(start.abs().max()):
                return slow, fast, not torch.equal(random_state, torch.get_rng_state())
    raise ArithmeticError(f"nothing moved in {steps} steps")


def _set_up(twin: torch.optim.Optimizer, slots: _Slots, asked: float) -> None:
    first, second = twin.param_groups if slots.slow < slots.fast else reversed(twin.param_groups)
    model = first if slots.options == slots.slow else second
    options = _options(model)
    # Some keep the rate of a group under another name, too, and start from there.
    rates = [key for key in options if all(_is_rate(group, key) for group in (first, second))]
    for group, rate in ((first, _LR), (second, _LR * asked)):
        group.update(copy.deepcopy(options) | dict.fromkeys(rates, rate))
        group["lr"] = in_form_of(group["lr"], rate)
    train_mode(twin)


def train_mode(twin: Any) -> None:
    """Schedule-free optimizers step in training mode only."""
    if callable(getattr(twin, "train", None)):
        twin.train()


def _is_rate(group: Mapping[str, Any], key: str) -> bool:
    value = group.get(key)
    return type(value) is float and value in (group["lr"], group.get("initial_lr"))


def _step(twin: torch.optim.Optimizer, stand_ins: list[nn.Parameter], step: int, closure: bool) -> None:
    def differentiate() -> torch.Tensor:  # a loss (), as a closure gives it
        for tensor in stand_ins:
            tensor.grad = trial_gradient(step, tensor)
        return torch.ones((), device=stand_ins[0].device)

    differentiate()
    step_of(twin, differentiate if closure else None)


def trial_gradient(step: int, like: torch.Tensor) -> torch.Tensor:
    """Of the shape of `like` (…), of full rank, changing size and constant sign, so that no sum over steps cancels."""
    entries = torch.arange(like.numel(), device="cpu", dtype=torch.float32)
    values = torch.cos(1.7 * entries) * (1 + 0.5 * torch.cos(step + 0.9 * entries))
    return values.reshape(like.shape).to(like.device, like.dtype)


def _random_state_kept(device: torch.device) -> Any:
    if device.type in ("cpu", "mps"):
        return torch.random.fork_rng(devices=[])
    return torch.random.fork_rng(devices=[device], device_type=device.type)
