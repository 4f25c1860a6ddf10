r"""Optimizers that step A and B of a layer together: what they share, so that a method is one direction.

    P ← P − η·(u + decay·P),      u = direction(P, partner, ∂L/∂P)

A and B have the same part in B·A, so a method is written once, for a factor that has the rank in its last dimension:
B (outputs, r) as it is, A (r, inputs) transposed. Its partner has the rank last, too. All that is no factor is stepped
by AdamW.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn

from loraplus.errors import DivergedError, OptimizerSetupError
from loraplus.steps.movement import adapted_layers, gathered, is_sharded


class PairOptimizer(torch.optim.Optimizer):
    """Steps pairs of factors by `direction`, and everything else by AdamW.

    Rates, decay, dtypes, sharding and states are taken care of here. All directions of a pair are computed before one
    of the two moves. Moments are kept in float32, whatever the factors' type; a checkpoint keeps them as they are.
    Factors that FSDP2 has sharded are gathered for the direction, and every process steps its part.

    Args:
        params: groups, as `loraplus.param_groups` makes them.
        factors_of: the model, whose layers say which factors belong together; `loraplus.create_optimizer` and a
            Trainer of LoRA+ pass it. (Trainer takes an option called `model` for something else.)
        lr: of groups without one.
        betas: of the two moments.
        eps: added to the root of the second one.
        weight_decay: decoupled, as AdamW's.

    Raises:
        NoLoraFactorsError: no layer of the model has a trainable factor.
        OptimizerSetupError: no model; an option that the method does not have, or out of its range; a bank of experts,
            or factors that are flattened or sharded away (FSDP1, ZeRO-3).
        DivergedError: in `step`, a gradient is not finite, and the method cannot make a direction of it.
    """

    takes_model = True
    """`loraplus.optimizer.build` gives it the model."""
    like_adam = False
    """Whether steps are of the size of Adam's, whatever the gradients; `AutoRates` sets the rates of such a method."""

    def __init__(
        self,
        params: Any,
        *,
        factors_of: nn.Module | None = None,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **options: object,
    ) -> None:
        kind = type(self)
        if factors_of is None:
            raise OptimizerSetupError(
                f"{kind.__name__} needs the model, to know which factors belong together: build it with "
                f"loraplus.create_optimizer(model, {kind.__name__}, ...), or call loraplus.attach(trainer)"
            )
        steppers = [each for each in kind.__mro__ if issubclass(each, PairOptimizer)]
        known = {name for each in steppers for name in inspect.signature(each.__init__).parameters}
        unknown = [name for name in options if name not in known]
        if unknown:
            raise OptimizerSetupError(f"{kind.__name__} has no option {unknown[0]}")
        self.require(all(0 <= beta < 1 for beta in betas), f"betas in [0, 1), got {betas}")
        self.require(eps > 0, f"eps > 0, got {eps}")
        self.pairs = _pairs(factors_of, kind.__name__)
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, **options})

    def require(self, holds: bool, what: str) -> None:
        """Refuses an option that is out of its range.

        Args:
            holds: it is not.
            what: the method needs.

        Raises:
            OptimizerSetupError: it is.
        """
        if not holds:
            raise OptimizerSetupError(f"{type(self).__name__} needs {what}")

    def direction(
        self,
        factor: torch.Tensor,
        partner: torch.Tensor,
        gradient: torch.Tensor,
        state: dict[str, Any],
        options: dict[str, Any],
    ) -> torch.Tensor:
        """The step of one factor per unit of rate.

        Args:
            factor: (d, r), as float32.
            partner: the pair's other factor, (d', r), as float32.
            gradient: of the loss by the factor, (d, r), as float32.
            state: of the factor; empty but for `step`, which is 1, at the first step. What is put in is saved.
            options: the factor's group: betas, eps and whatever the method has of its own.

        Returns:
            (d, r).
        """
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        partners = self._partners()
        steps = []
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    state["step"] = state.get("step", 0) + 1
                    steps.append(
                        (parameter, group, self._step_of(parameter, partners.get(id(parameter)), group, state))
                    )
        for parameter, group, update in steps:
            if group["weight_decay"]:
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.sub_(group["lr"] * update)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from a checkpoint; moments keep their type, which torch would change to that of the parameter."""
        super().load_state_dict(state_dict)
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=True):
            for name, value in state_dict["state"].get(number, {}).items():
                if isinstance(value, torch.Tensor) and not is_sharded(value):
                    self.state[parameter][name] = value.to(parameter.device, copy=True)

    def _partners(self) -> dict[int, tuple[torch.Tensor, bool]]:
        """{id of a factor: (its partner, whether the factor is an A)}; in a twin some stand-ins are no pair."""
        partners = {}
        for a, b in self.pairs:
            if a.dim() > 1 and b.dim() > 1 and a.shape[0] == b.shape[1]:
                partners |= {id(a): (b, True), id(b): (a, False)}
        return partners

    def _step_of(
        self,
        parameter: torch.Tensor,
        pair: tuple[torch.Tensor, bool] | None,
        group: dict[str, Any],
        state: dict[str, Any],
    ) -> torch.Tensor:
        """The step of a parameter (…) per unit of rate, in its own type, shape and sharding."""
        gradient = cast(torch.Tensor, parameter.grad)
        if pair is None:
            return adam(gradient.float(), state, group).to(parameter.dtype)
        partner, is_a = pair
        factor, gradient = _rank_last(gathered(parameter), is_a), _rank_last(gathered(gradient), is_a)
        try:
            update = self.direction(factor, _rank_last(gathered(partner), not is_a), gradient, state, group)
        except RuntimeError as error:  # torch.linalg's
            if all(bool(tensor.isfinite().all()) for tensor in (gradient, factor)):
                raise
            raise DivergedError(
                f"{type(self).__name__}: the gradient of a factor {tuple(parameter.shape)}, or the factor itself, is "
                "not finite; lower the rate, or step through a GradScaler, which skips such steps"
            ) from error
        whole = (update.T if is_a else update).reshape(parameter.shape).to(parameter.dtype)
        if not is_sharded(parameter):
            return whole
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)


def adam(gradient: torch.Tensor, state: dict[str, Any], options: dict[str, Any]) -> torch.Tensor:
    """Adam's step (…) per unit of rate for a gradient (…), which may be one that a method has changed.

    m / (1 − β₁ᵗ) / (√(v / (1 − β₂ᵗ)) + ε)

    Args:
        gradient: as float32.
        state: holds `step`, and the moments `m` and `v` of the gradient's shape.
        options: betas and eps.
    """
    (beta1, beta2), step = options["betas"], state["step"]
    if "m" not in state:
        state["m"], state["v"] = torch.zeros_like(gradient), torch.zeros_like(gradient)
    state["m"] = torch.lerp(state["m"], gradient, 1 - beta1)
    state["v"] = torch.lerp(state["v"], gradient.square(), 1 - beta2)
    return state["m"] / (1 - beta1**step) / ((state["v"] / (1 - beta2**step)).sqrt() + options["eps"])


def _rank_last(tensor: torch.Tensor, is_a: bool) -> torch.Tensor:
    """A (r, inputs) or B (outputs, r) as (d, r); of a convolution (r, inputs, …) and (outputs, r, 1, …)."""
    matrix = tensor.detach().float().flatten(1)
    return matrix.T if is_a else matrix


def _pairs(model: nn.Module, method: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(A, B) of every adapted layer."""
    layers = adapted_layers(model)
    for entry in layers:
        a, b = entry.weights
        if entry.experts or a.dim() < 2 or b.dim() < 2 or a.shape[0] != b.shape[1]:
            raise OptimizerSetupError(
                f"{method} cannot step the factors of {entry.name} as a pair: they are a bank of experts, grouped, or "
                "flattened or sharded away (FSDP1, ZeRO-3); adapt other layers, use DDP or FSDP2, or use AdamW"
            )
    return [entry.weights for entry in layers]
