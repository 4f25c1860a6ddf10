r"""What an optimizer would do: asked of a twin, with nothing of the user's touched.

Two things are found out about an optimizer beforehand, on small matrices: whether its steps are its rate times a
direction that does not depend on the rate, and whether they are of the size of Adam's. Where gradients are pure noise,
whatever their scale, Adam's steps have the size √((1−β₁)/(1+β₁)), 0.23 for β₁ = 0.9, and n of them lead as far as √n.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from loraplus.steps.group_rates import in_form_of
from loraplus.steps.movement import local_part, rms
from loraplus.steps.twin import step_of, twin_over

_RATE = 1e-3
_TRIED = 7  # steps; what looks back every fifth or sixth of them (Lookahead) shows too
_SEEN = 1e-6
_NOISE_STEPS = 60
_SIZES = (0.05, 0.6)  # of a step in pure noise, for it to count as Adam's
_SAME = 1.25
_IN_TRAINING = 1.5  # times the size in noise; RMS of Adam's steps is 0.22 to 0.36 (docs/research/auto-rates.md)


def proposed(
    optimizer: torch.optim.Optimizer, weights: Sequence[nn.Parameter], rates: Sequence[float], *, decay: bool = False
) -> list[torch.Tensor | None]:
    """The optimizer's next step for each weight, per unit of rate; None where it has no gradient or is held elsewhere.

    Args:
        optimizer: holds the weights, which have their gradients.
        weights: some of its parameters, of any shapes (…).
        rates: one for each weight, at which the step is asked for: 1, or a larger one where a step at 1 is so small
            beside its weight that it would be rounded off.
        decay: whether weight decay is part of the step.

    Returns:
        A tensor of its weight's shape (…) for each, as float32.
    """
    stand_ins, members = {}, {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for weight in weights:
        if weight.grad is not None and id(weight) in members:
            stand_ins[weight] = weight.detach().clone()
            stand_ins[weight].grad = weight.grad.detach().clone()
    twin = twin_over(optimizer, stand_ins)
    rate_of = {id(stand_ins[weight]): rate for weight, rate in zip(weights, rates, strict=True) if weight in stand_ins}
    for group in twin.param_groups:
        _set_rate(group, rate_of[id(group["params"][0])], decay)
    step_of(twin)
    steps: list[torch.Tensor | None] = []
    for weight, rate in zip(weights, rates, strict=True):
        stand_in = stand_ins.get(weight)
        steps.append(None if stand_in is None else (weight.detach() - stand_in.detach()).float() / rate)
    return steps


def scales_with_rate(optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> bool:
    """Whether steps at rate 1, scaled down, lead where steps at a small rate lead; False if none can be taken.

    Args:
        optimizer: whose class and settings are tried.
        parameter: one that it holds, (…); a twin steps on a small matrix in its place.
    """
    try:
        plain, *tried = (_path(optimizer, parameter, at_one) for at_one in ((), (0,), range(_TRIED)))
    except Exception:  # an optimizer that cannot take a step on a small matrix cannot be asked either
        return False
    # A step too small to see (D-Adaptation's and Prodigy's first ones) says nothing.
    size = float(plain.abs().max())
    return size > _SEEN and all(float((moved - plain).abs().max()) < 1e-2 * size for moved in tried)


def size_like_adams(optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> float | None:
    r"""The root mean square that steps need to go as far as Adam's; None if they are of Adam's size as they are.

    n steps of RMS σ in pure noise lead as far as q·σ·√n: q = 1 where each goes its own way, √((1+β)/(1−β)) with a
    momentum. Adam's lead as far as √n, which is q·σ = 1, and in training they are half as large again where gradients
    agree. So σ = min(1, 1.5/q): 1 for SGD, Adagrad and RMSprop, 0.4 with a momentum of 0.9.
    """
    ones, q = _in_noise(optimizer, parameter, shape=(16, 16), weight=1.0, gradient=1.0)
    others, _ = _in_noise(optimizer, parameter, shape=(4, 64), weight=1e-2, gradient=1e-3)
    if min(ones) > 0 and min(others) > 0:
        same = all(1 / _SAME < one / other < _SAME for one, other in zip(ones, others, strict=True))
        _, middle, last = ones
        if same and _SIZES[0] < last < _SIZES[1] and last > middle / _SAME:  # Adagrad's fall by √2
            return None
    return min(1.0, _IN_TRAINING / q) if q else 1.0


def asking_rate(weights: Sequence[nn.Parameter]) -> float:
    """A rate at which a step of the gradients' size is not lost in the rounding of the weights."""
    sizes = [rms(local_part(weight.grad)) for weight in weights if weight.grad is not None]
    largest = max(sizes, default=0.0)
    return 1 / largest if largest and 0 < 1 / largest < math.inf else 1.0


def _path(optimizer: torch.optim.Optimizer, parameter: torch.Tensor, at_one: Sequence[int]) -> torch.Tensor:
    """Where some steps at a small rate lead: (4, 4), or the parameter's shape.

    The steps of `at_one` are taken at rate 1 and scaled down. Where they lead elsewhere, steps do not scale with lr.
    """
    twin, weight = _fresh(optimizer, parameter, (4, 4))
    with torch.no_grad():
        weight += torch.linspace(0.05, 0.15, weight.numel(), device=weight.device).reshape(weight.shape)
    start = weight.detach().clone()
    numbers = torch.arange(float(weight.numel()), device=weight.device).reshape(weight.shape)
    for step in range(_TRIED):
        before = weight.detach().clone()
        weight.grad = torch.sin(numbers + step)
        _set_rate(twin.param_groups[0], 1.0 if step in at_one else _RATE)
        step_of(twin)
        if step in at_one:
            with torch.no_grad():
                weight.copy_(before - _RATE * (before - weight))
    return weight.detach() - start


def _in_noise(
    optimizer: torch.optim.Optimizer, parameter: torch.Tensor, shape: tuple[int, int], weight: float, gradient: float
) -> tuple[tuple[float, float, float], float]:
    """(RMS of steps per unit of rate: the first five, five midway, the last five; q of the second half)."""
    generator = torch.Generator().manual_seed(0)
    twin, tried = _fresh(optimizer, parameter, shape)
    with torch.no_grad():
        tried += weight * torch.randn(tried.shape, generator=generator).to(tried.device)
    rate = _RATE * weight
    _set_rate(twin.param_groups[0], rate)
    sizes, half, halfway = [], _NOISE_STEPS // 2, tried.detach().clone()
    for step in range(_NOISE_STEPS):
        if step == half:
            halfway = tried.detach().clone()
        before = tried.detach().clone()
        tried.grad = gradient * torch.randn(tried.shape, generator=generator).to(tried.device)
        step_of(twin)
        sizes.append(rms(before - tried) / rate)
    first, middle, last = (
        math.sqrt(sum(s * s for s in part) / 5) for part in (sizes[:5], sizes[half : half + 5], sizes[-5:])
    )
    apart = math.sqrt(sum(s * s for s in sizes[half:]))
    return (first, middle, last), rms(tried - halfway) / rate / apart if apart else 0.0


def _fresh(
    optimizer: torch.optim.Optimizer, parameter: torch.Tensor, shape: tuple[int, int]
) -> tuple[torch.optim.Optimizer, torch.Tensor]:
    """A twin without a past, and the zeros it is over, (rows, columns).

    If the twin needs a state to start with, they are of the parameter's shape (…), and the state is zeros.
    """

    def over(size: Any) -> tuple[torch.optim.Optimizer, torch.Tensor]:  # the tensor: of that size (…)
        weight = torch.zeros(size, device=parameter.device)
        twin = twin_over(optimizer, {parameter: weight}, with_state=False)
        return twin, weight

    twin, weight = over(shape)
    weight.grad = torch.ones_like(weight)
    try:
        step_of(twin)
    except Exception:  # Adagrad makes its state when it is built
        state = optimizer.state.get(parameter)
        if not state:
            raise
        twin, weight = over(parameter.shape)
        twin.state[weight] = {key: _blank(value, parameter, weight) for key, value in state.items()}
        return twin, weight
    return over(shape)


def _blank(value: Any, parameter: torch.Tensor, weight: torch.Tensor) -> Any:
    """A value of a parameter's state, its numbers zeros: the weight's shape (…) where it had the parameter's (…)."""
    if not isinstance(value, torch.Tensor):
        return value
    return torch.zeros_like(weight) if value.shape == parameter.shape else torch.zeros_like(value)


def _set_rate(group: dict[str, Any], rate: float, decay: bool = False) -> None:
    """The rate of a twin's group, and no weight decay unless that is part of what is asked for."""
    group["lr"] = in_form_of(group["lr"], rate)
    if "weight_decay" in group and not decay:
        group["weight_decay"] = 0.0
