r"""Whether an optimizer's steps go on in one direction, wander, or turn back.

Over a window of n steps with rates g_i·η (g the schedule) the weights move by Σ g_i·η·u_i. Were the directions u_i
independent but for the optimizer's momentum β, the squared length would be

    E ‖θ_n − θ_0‖² = Σ_ij g_i g_j β^|i−j| · ‖η·u‖²

and R = ‖θ_n − θ_0‖² / that is 1. R > 1: the steps go on in one direction, and a higher rate would get there sooner.
R < 1: they turn back, held by the curvature of the loss. Measured at good fixed rates, R is about 0.85 on classifiers
and language models alike; at a third of such a rate it is 1.0 to 1.5; above it, it stays where it is
(docs/research/auto-rates.md). So it tells a rate that is too low, and cannot tell one that is too high.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

DRIFTS = 0.95  # above: steps go on, the rates are raised by (R / DRIFTS)²
STEADY = 0.85  # R at good rates; below: what was raised is taken back by (R / STEADY)²
MOST_PER_WINDOW = 1.5
MOST = 4.0
SCHEDULE_FROM = 0.5  # windows on lower parts of the schedule are not read: there the rate is meant to be low


class Drift:
    """Reads windows of steps and says by what factor, 1 to 4, the rates should be raised.

    Args:
        momentum: β of the optimizer.
    """

    def __init__(self, momentum: float) -> None:
        self.raised = 1.0
        self.ratio: float | None = None
        self._momentum = momentum
        self._weights: list[torch.Tensor] | None = None
        self._size = 0.0
        self._schedule: list[float] = []

    def passed(self, part: float) -> None:
        """Notes the schedule's factor of a step that was taken."""
        if self._weights is not None:
            self._schedule.append(part)

    def look(self, weights: Sequence[torch.Tensor], size: float) -> None:
        """Ends a window and begins the next one.

        Args:
            weights: of this moment, before the step that is being measured.
            size: ‖η·u‖² of that step, without the schedule and without what this object raises the rates by.
        """
        if self._weights is not None and self._schedule:
            moved = sum(float((now - then).square().sum()) for now, then in zip(weights, self._weights, strict=True))
            expected = self._correlated() * (self._size + size * self.raised**2) / 2
            self.ratio = moved / expected if expected else None
            if self.ratio is not None and min(self._schedule) >= SCHEDULE_FROM:
                # Nothing in between: since R stays where it is above the good rates, following its noise would ratchet.
                factor = max(self.ratio / DRIFTS, 1.0) ** 2 * min(self.ratio / STEADY, 1.0) ** 2
                factor = min(max(factor, 1 / MOST_PER_WINDOW), MOST_PER_WINDOW)
                self.raised = min(max(self.raised * factor, 1.0), MOST)
        self._weights = [weight.clone() for weight in weights]
        self._size = size * self.raised**2
        self._schedule = []

    def _correlated(self) -> float:
        """Σ_ij g_i g_j β^|i−j|."""
        total = carried = 0.0  # carried: Σ_{j<i} g_j β^(i−j)
        for g in self._schedule:
            total += g * g + 2 * g * carried
            carried = self._momentum * (carried + g)
        return total

    def state_dict(self) -> dict[str, Any]:
        """All that a checkpoint has to hold for the window under way to go on."""
        return {"raised": self.raised, "size": self._size, "schedule": list(self._schedule), "weights": self._weights}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Goes on from a checkpoint."""
        weights = state["weights"]
        self.raised, self._size = float(state["raised"]), float(state["size"])
        self._schedule = list(state["schedule"])
        self._weights = None if weights is None else [weight.to(device) for weight in weights]


def momentum_of(group: Mapping[str, Any]) -> float:
    """β of an optimizer's group: Adam's β₁, SGD's momentum, or 0."""
    betas = group.get("betas")
    return float(betas[0] if betas else group.get("momentum") or 0.0)
