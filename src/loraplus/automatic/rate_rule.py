r"""The rule of automatic rates: its constants, what a layer asks for, and the pair that all layers get.

    η_B = ρ·RMS(y) / d_B    η_A = min(ρ·RMS(y) / d_A, κ·RMS(z) / d_z)    2 ≤ λ = η_B / η_A ≤ 4

What the symbols stand for is said at the head of `auto.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from loraplus.steps.movement import Movement


@dataclass(frozen=True)
class LayerRates:
    """What one layer asks for; None where a factor did not move."""

    lr_a: float | None
    lr_b: float | None


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
    agreement_band: float = 0.1  # c̄ above which steps are too short, and below the negative of which too long
    growth: float = 2.5  # how fast k follows
    most_growth: float = 6.0  # k is not above, nor below 1

    def output_change(self, loss_terms: float, layers: int) -> float:
        """ρ: how far a step may move the output of one of `layers` layers, as a part of it."""
        return min(self.output_part * math.sqrt(max(loss_terms, 1.0)), self.most_output_part) / math.sqrt(layers)

    def asked_for(self, moved: Movement, size_a: float, size_b: float, rho: float) -> LayerRates:
        """What one layer asks for.

        Args:
            moved: what steps of RMS 1 do to it.
            size_a, size_b: RMS of the steps themselves.
            rho: ρ, as `output_change` gives it; where it is no number, so is no rate.
        """
        lr_a = lr_b = None
        if size_b and moved.delta2:
            lr_b = rho * moved.output / moved.delta2
        if size_a and moved.inner_change:
            by_output = rho * moved.output / moved.delta1 if moved.delta1 else math.inf
            # An A that starts at zero has no output yet that it could run away from.
            by_inner = self.inner_part * moved.inner / moved.inner_change if moved.inner else math.inf
            lr_a = min(by_output, by_inner)
        return LayerRates(*(lr if lr is not None and 0 < lr < math.inf else None for lr in (lr_a, lr_b)))

    def balanced(self, lr_a: float, lr_b: float) -> tuple[float, float, str]:
        """The pair (η_A, η_B) with λ = η_B / η_A brought between the rule's limits, and in words what held it.

        Below the least λ both move: B up and A down, at the same product η_A·η_B. Above the largest λ only B moves,
        down. While one of the two has no rate yet (0), the other stays as it is.
        """
        if not (lr_a and lr_b):
            return lr_a, lr_b, f"{'B' if lr_a else 'A'} has not moved"
        if lr_b < self.least_ratio * lr_a:
            lr_a = math.sqrt(lr_a * lr_b / self.least_ratio)
            return lr_a, self.least_ratio * lr_a, f"B kept at {self.least_ratio:g}×, their product as measured"
        if lr_b > self.most_ratio * lr_a:
            return lr_a, self.most_ratio * lr_a, f"B held at {self.most_ratio:g}×"
        return lr_a, lr_b, "as measured"

    def grown(self, factor: float, agreement: float, height: float) -> float:
        """k after a step: ln k moves by 2.5·h times what c̄ is beyond ±0.1.

        Args:
            factor: k before it.
            agreement: c̄, from −1 to 1: how far the gradients after steps would have these go on.
            height: h, what the schedule makes of a rate of 1, from 0 to 1.
        """
        beyond = agreement - min(max(agreement, -self.agreement_band), self.agreement_band)
        return min(max(factor * math.exp(self.growth * height * beyond), 1.0), self.most_growth)
