r"""Both learning rates set from what each layer's output does, in one run.

The optimizer proposes a step u_A, u_B for the factors of every adapted layer (Adam's first moment over the root of its
second, say). How far would it move the layer's output y = W x + s·B A x, were its entries of unit size?

    d_B = s·RMS(û_B A x)    d_A = s·RMS(B û_A x)    d_z = RMS(û_A x),      û = u / RMS(u)

The rates are those at which each factor moves the output by the part ρ of itself, while A moves its own output z = A x
by no more than the part κ (B starts at zero, so at first nothing else holds A back):

    η_B = ρ·RMS(y) / d_B    η_A = min(ρ·RMS(y) / d_A, κ·RMS(z) / d_z)

A step may move more the more terms of the loss it is averaged over, and each layer less the more layers move with it:

    ρ = min(ρ₁·√n, ρ_max) / √L      for n loss terms (`movement.loss_terms`) and L adapted layers

One pair serves all layers: the geometric means of these, with λ = η_B / η_A between 2 and 4. Where κ alone holds A, its
movement can run ahead of B's and A outgrows B; then the pair keeps its product, on which the loss depends most. Where B
asks for more than 4·η_A, it gets that and no more: the steps of B are what a run collapses from. The schedule (warm-up
and decay) multiplies both. How the constants were found, and what else was tried: docs/research/auto-rates.md.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from loraplus.errors import TrainerSetupError
from loraplus.feature_updates import FeatureUpdates, LayerUpdate, twin_of
from loraplus.movement import AdaptedLayer, Movement, StepWatcher, adapted_layers, factors, full, held, movement, rms
from loraplus.roles import Role, trainable_parameters


@dataclass(frozen=True)
class Rule:
    """The constants of the rule: the same for every model and task, so that a user sets none."""

    output_part: float = 0.018  # ρ₁
    most_output_part: float = 0.23  # ρ_max
    inner_part: float = 0.1  # κ
    least_ratio: float = 2.0  # λ is not below
    most_ratio: float = 4.0  # nor above
    measured_at_first: int = 10  # steps measured one after the other, before
    measured_every: int = 20  # … every so many

    def part(self, loss_terms: float, layers: int) -> float:
        """ρ: how far a step may move the output of one of `layers` layers, as a part of it."""
        return min(self.output_part * math.sqrt(max(loss_terms, 1.0)), self.most_output_part) / math.sqrt(layers)


@dataclass(frozen=True)
class LayerRates:
    """What one layer asks for; None where a factor did not move."""

    lr_a: float | None
    lr_b: float | None


class AutoRates(StepWatcher):
    """Sets η_A and η_B of an optimizer while it trains; install it once, and train as ever.

    η_B = ρ·RMS(y) / d_B, η_A = min(ρ·RMS(y) / d_A, κ·RMS(z) / d_z), 2 ≤ λ = η_B / η_A ≤ 4

    Each is multiplied by what the scheduler makes of its own base rate; the rates that the optimizer was built with do
    not matter. Measured at the first steps and every twentieth one; a measured step is taken with the rates that it
    gave. No random number is drawn. Under data parallelism every process arrives at the same rates. Groups that hold
    neither A nor B keep their rates.

    Args:
        model: a PEFT model, wrapped or not, with trainable `lora_A` and `lora_B`.
        optimizer: holds A and B in groups apart (as `loraplus.create_optimizer` makes them), before its first step.
        rule: constants other than the built-in ones, for research.

    Raises:
        NoLoraFactorsError: no layer to measure.
        TrainerSetupError: A and B share a group, the optimizer's steps do not scale with its rate (Prodigy,
            schedule-free, Adafactor, …), or the factors are flattened (FSDP1) or sharded away (ZeRO-3).

    Example:
        >>> optimizer = loraplus.create_optimizer(model, torch.optim.AdamW, lr=1.0)  # doctest: +SKIP
        >>> scheduler = transformers.get_linear_schedule_with_warmup(optimizer, 6, 100)  # doctest: +SKIP
        >>> rates = loraplus.AutoRates(model, optimizer)  # doctest: +SKIP
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, *, rule: Rule | None = None) -> None:
        optimizer = getattr(optimizer, "optimizer", optimizer)  # Accelerate's wrapper
        _check(adapted_layers(model), optimizer)
        self._roles = _roles_of_groups(model, optimizer)
        super().__init__(model, optimizer)
        self.rule = rule or Rule()
        self.steps = 0
        self.layer_rates: dict[str, LayerRates] = {}
        self.updates: FeatureUpdates | None = None
        self.lr_a = self.lr_b = 0.0  # without the schedule
        self._scheduled: list[Any] = []
        self._recorder.on = self._is_due()
        self._optimizer.loraplus_auto = self  # type: ignore[attr-defined]  # where `explain` finds the rates in use

    def remove(self) -> None:
        """Takes all hooks off the model and the optimizer."""
        super().remove()
        del self._optimizer.loraplus_auto  # type: ignore[attr-defined]

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint has to hold."""
        return {"lr_a": self.lr_a, "lr_b": self.lr_b, "steps": self.steps}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Goes on from a checkpoint."""
        self.lr_a, self.lr_b = float(state["lr_a"]), float(state["lr_b"])
        self.steps = int(state["steps"])
        self._recorder.on = self._is_due()

    def summary(self) -> dict[str, Any]:
        """The rates without the schedule, and what each layer asks for."""
        layers = {name: {"lora_A": rates.lr_a, "lora_B": rates.lr_b} for name, rates in self.layer_rates.items()}
        return {"lr_a": self.lr_a, "lr_b": self.lr_b, "steps": self.steps, "layers": layers}

    def rates_of(self, group: Mapping[str, Any]) -> tuple[float, float] | None:
        """(rate at this moment of the schedule, rate without schedule) of a group of A or B; None for any other."""
        for role, ours in self._groups():
            if ours is group:
                return self._rate(role) * _schedule_factor(group), self._rate(role)
        return None

    def _groups(self) -> list[tuple[Role, dict[str, Any]]]:
        """The groups of A and of B; looked up each time, since loading a checkpoint replaces them."""
        return [(role, self._optimizer.param_groups[index]) for index, role in self._roles.items()]

    def _rate(self, role: Role) -> float:
        return self.lr_a if role is Role.A else self.lr_b

    def _is_due(self) -> bool:
        return self.steps < self.rule.measured_at_first or self.steps % self.rule.measured_every == 0

    def _before_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        super()._before_step(optimizer, args, kwargs)
        self._scheduled = [group["lr"] for _, group in self._groups()]
        for role, group in self._groups():
            # At rate 1 the weights move by the proposed step itself; they are then put where the rates say.
            group["lr"] = 1.0 if self._recorder.on else self._rate(role) * _schedule_factor(group)

    def _after_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        for (_, group), lr in zip(self._groups(), self._scheduled, strict=True):
            group["lr"] = lr
        if self._recorder.on:
            now = factors(self._layers)
            proposed = [before - weight.detach() for before, weight in zip(self._before, now, strict=True)]
            part = _schedule_factor(self._groups()[0][1])
            with held(self._layers, self._before):
                self._measure(proposed, part)
            with torch.no_grad():
                for i, (weight, before) in enumerate(zip(now, self._before, strict=True)):
                    weight.copy_(before - part * self._rate(Role.B if i % 2 else Role.A) * proposed[i])
        super()._after_step(optimizer, args, kwargs)
        self.steps += 1
        self._recorder.on = self._is_due()

    def _measure(self, proposed: list[torch.Tensor], part: float) -> None:
        device = proposed[0].device
        (terms,) = _summed([self._recorder.loss_terms], device)
        part_of_output = self.rule.part(terms, len(self._layers))
        moved: dict[str, Movement] = {}
        for i, entry in enumerate(self._layers):
            if entry.name in self._recorder.samples:
                u_a, u_b = full(proposed[2 * i]), full(proposed[2 * i + 1])
                moved[entry.name] = movement(entry, self._recorder.samples[entry.name], u_a, u_b)
                asked_for = self._asked_for(moved[entry.name], rms(u_a), rms(u_b), part_of_output)
                self.layer_rates[entry.name] = asked_for
        if not moved:
            raise TrainerSetupError(
                "AutoRates saw no forward pass of the model before this step; give it the model that is trained"
            )
        found = [self.layer_rates[name] for name in moved]
        self.lr_a, self.lr_b = _balanced(
            _geometric_mean([rates.lr_a for rates in found], self.lr_a, device),
            _geometric_mean([rates.lr_b for rates in found], self.lr_b, device),
            self.rule,
        )
        a, b = self.lr_a * part, self.lr_b * part
        self.updates = FeatureUpdates(
            tuple(LayerUpdate.from_movement(name, m.scaled(a, b)) for name, m in moved.items())
        )

    def _asked_for(self, moved: Movement, rms_a: float, rms_b: float, part: float) -> LayerRates:
        # What is measured is d·RMS(u).
        lr_a = lr_b = None
        if rms_b and moved.delta2:
            lr_b = part * moved.output * rms_b / moved.delta2
        if rms_a and moved.inner_change:
            by_output = part * moved.output / moved.delta1 if moved.delta1 else math.inf
            # An A that starts at zero has no output yet that it could run away from.
            by_inner = self.rule.inner_part * moved.inner / moved.inner_change if moved.inner else math.inf
            lr_a = rms_a * min(by_output, by_inner) if min(by_output, by_inner) < math.inf else None
        return LayerRates(lr_a, lr_b)


def _geometric_mean(values: list[float | None], otherwise: float, device: torch.device) -> float:
    """Over the layers that gave a value, in all processes; `otherwise` if none did."""
    logs = [math.log(value) for value in values if value]
    total, count = _summed([sum(logs), float(len(logs))], device)
    return math.exp(total / count) if count else otherwise


def _summed(values: list[float], device: torch.device) -> list[float]:
    """Over all processes."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return values
    sums = torch.tensor(values, dtype=torch.float32, device=device)
    torch.distributed.all_reduce(sums)
    return sums.tolist()


def _balanced(lr_a: float, lr_b: float, rule: Rule) -> tuple[float, float]:
    """The pair with λ within its limits: raised at constant product, lowered by holding B; free while one has none."""
    if not (lr_a and lr_b):
        return lr_a, lr_b
    if lr_b < rule.least_ratio * lr_a:
        lr_a = math.sqrt(lr_a * lr_b / rule.least_ratio)
        return lr_a, rule.least_ratio * lr_a
    return lr_a, min(lr_b, rule.most_ratio * lr_a)


def _schedule_factor(group: Mapping[str, Any]) -> float:
    """What the scheduler multiplies this group's base rate by at this step; 1 without a scheduler."""
    return float(group["lr"] / group["initial_lr"]) if group.get("initial_lr") else 1.0


def _roles_of_groups(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[int, Role]:
    """{index of a group that holds A, or B: role}."""
    roles = {id(entry.parameter): entry.role for entry in trainable_parameters(model)}
    found = {}
    for index, group in enumerate(optimizer.param_groups):
        here = {roles.get(id(parameter)) for parameter in group["params"]}
        for role in (Role.A, Role.B):
            if here == {role}:
                found[index] = role
            elif role in here:
                raise TrainerSetupError(
                    f"group {index} of the optimizer holds {role} beside other parameters, so it cannot have a rate of "
                    "its own; build the optimizer with loraplus.create_optimizer"
                )
    if set(found.values()) != {Role.A, Role.B}:
        raise TrainerSetupError("the optimizer does not hold the model's A and B; build it from this model")
    return found


def _check(layers: list[AdaptedLayer], optimizer: torch.optim.Optimizer) -> None:
    """Refuses factors that cannot be read and optimizers that cannot be asked what they would do."""
    for entry in layers:
        for weight in entry.weights:
            if weight.dim() < 2 or not weight.numel():
                raise TrainerSetupError(
                    f"AutoRates cannot read the factors of {entry.name}: they are flattened or sharded away (FSDP1, "
                    "ZeRO-3); use DDP, FSDP2 or ZeRO-1/2, or give lr and lr_ratio as numbers"
                )
    try:
        plain, *probed = (_three_steps(optimizer, probed) for probed in ((), (0,), (0, 1, 2)))
        same = all(torch.allclose(end, plain, rtol=1e-3, atol=1e-7) for end in probed)
    except Exception:  # an optimizer that cannot take a step on a small matrix cannot be asked either
        same = False
    if not same:
        raise TrainerSetupError(
            f"AutoRates cannot set the rates of {type(optimizer).__name__}: its steps do not simply scale with lr; use "
            "AdamW, Adam, SGD, Lion or the like, or give lr and lr_ratio as numbers"
        )


def _three_steps(optimizer: torch.optim.Optimizer, probed: Sequence[int]) -> torch.Tensor:
    """Where three steps at rate 1e-3 take a small matrix, those of `probed` taken at rate 1 and scaled down."""
    lr = 1e-3
    device = optimizer.param_groups[0]["params"][0].device
    weight = nn.Parameter(torch.linspace(0.5, 1.5, 16, device=device).reshape(4, 4))
    twin = twin_of(optimizer)
    twin.state = defaultdict(dict)
    twin.param_groups = [{**optimizer.param_groups[0], "params": [weight], "lr": lr}]
    for step in range(3):
        before = weight.detach().clone()
        weight.grad = torch.sin(torch.arange(16.0, device=device) + step).reshape(4, 4)
        twin.param_groups[0]["lr"] = 1.0 if step in probed else lr
        type(twin).step(twin)
        if step in probed:
            with torch.no_grad():
                weight.copy_(before - lr * (before - weight))
    return weight.detach()
