r"""How many times larger than the rule's a run's steps may be: grown where the next batch says that they stop short.

    c = −⟨g, Δ⟩ / (|g|·|Δ|)    g: this step's gradient of all A and B, Δ: the step before it
    ln k ← ln k + 2.5·h·(c̄ ∓ 0.1) where c̄ is above 0.1 or below −0.1,    1 ≤ k ≤ 6

Where c is large, a fresh batch would have the last step go on: it was too short. Noise is not taken for that, since the
noise of two batches has nothing in common. c̄ is a running mean of c. h is the height of the schedule, from 0 to 1: it
makes k as large in a long warm-up as in a short one. How the constants were found: docs/research/auto-rates.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from loraplus.automatic.rate_rule import Rule
from loraplus.steps.movement import is_sharded, local_part

_REMEMBERED = 0.8  # weight of what was, in the running mean
_FIRST = 5  # values that it has before it is believed
_CALM = 50.0  # steps at full height without a change, after which the run is no longer watched
_SEEN = 1.05  # k from which it is worth a word


class Growth:
    """Watches the steps of some weights, and says how many times larger the next one is to be: `factor`.

    It holds one copy of the weights' size while it watches. It stops for good once k has not moved for some time.

    Args:
        weights: A and B of all layers, (r, d_in), (d_out, r), …
        rule: its constants.
    """

    def __init__(self, weights: Sequence[nn.Parameter], rule: Rule) -> None:
        self.factor = 1.0  # k
        self.has_grown = False  # or shrunk, at the last look
        self._weights = [weight for weight in weights if weight.requires_grad]
        self._rule = rule
        self._mean = self._weight = 0.0  # of c; c̄ is their quotient
        self._looks = 0
        self._calm = 0.0
        self._start: list[torch.Tensor] = []
        self._step: list[torch.Tensor] = []

    @property
    def is_watching(self) -> bool:
        """Whether the next step is to be looked at."""
        return self._calm < _CALM

    def look(self, height: float, summed: Callable[[list[float]], list[float]]) -> None:
        """Takes the gradients that there are for a judgement of the last step, and sets `factor`.

        Args:
            height: what the schedule makes of a rate of 1 at this step.
            summed: of values of this process, their sums over all that train the model.
        """
        self.has_grown = False
        if not self._step:
            return
        gradients = _flat([weight.grad for weight in self._weights], self._weights)
        pairs = list(zip(gradients, self._step, strict=True))
        parts = [torch.stack([torch.dot(g, step), torch.dot(g, g), torch.dot(step, step)]) for g, step in pairs]
        along, of_gradient, of_step = summed([sum(values) for values in zip(*(p.tolist() for p in parts), strict=True)])
        size = math.sqrt(of_gradient) * math.sqrt(of_step) if min(of_gradient, of_step) >= 0 else math.nan
        if not (math.isfinite(along) and 0 < size < math.inf):
            return
        self._mean = _REMEMBERED * self._mean - (1 - _REMEMBERED) * along / size
        self._weight = _REMEMBERED * self._weight + 1 - _REMEMBERED
        self._looks += 1
        before = self.factor
        if self._looks >= _FIRST:
            self.factor = self._rule.grown(self.factor, self._mean / self._weight, height)
        self.has_grown = self.factor != before
        self._calm = 0.0 if self.has_grown else self._calm + height

    def step_begins(self) -> None:
        """Keeps the weights as they are before the step."""
        self._step = []
        self._start = _flat([weight.detach() for weight in self._weights], self._weights) if self.is_watching else []

    def step_ends(self) -> None:
        """Keeps the step that was taken."""
        if self._start:
            now = _flat([weight.detach() for weight in self._weights], self._weights)
            self._step = [after - start for after, start in zip(now, self._start, strict=True)]
            self._start = []

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint has to hold; of sharded weights without the last step, which no process has as a whole."""
        step = [] if any(is_sharded(weight) for weight in self._weights) else [part.cpu() for part in self._step]
        numbers = {"factor": self.factor, "mean": self._mean, "weight": self._weight}
        return {**numbers, "looks": self._looks, "calm": self._calm, "step": step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a checkpoint."""
        self.factor, self._mean, self._weight = float(state["factor"]), float(state["mean"]), float(state["weight"])
        self._looks, self._calm = int(state["looks"]), float(state["calm"])
        like = _flat([weight.detach() for weight in self._weights], self._weights)
        step = list(state["step"])
        fits = [part.shape for part in step] == [part.shape for part in like]
        self._step = [part.to(other.device) for part, other in zip(step, like, strict=True)] if fits else []

    def __str__(self) -> str:
        """What is worth saying of it, if anything is."""
        return f", {self.factor:.2g} times larger since steps stopped short" if self.factor >= _SEEN else ""


def _flat(tensors: Sequence[torch.Tensor | None], weights: Sequence[nn.Parameter]) -> list[torch.Tensor]:
    """All numbers that this process has of some tensors, (…), as one vector a device, (n,), in 32 bits at least.

    Args:
        tensors: of the weights' shapes; None stands for zeros.
        weights: whose devices and dtypes count.
    """
    by_device: dict[torch.device, list[torch.Tensor]] = {}
    for tensor, weight in zip(tensors, weights, strict=True):
        part = torch.zeros_like(local_part(weight.detach())) if tensor is None else local_part(tensor)
        wide = part.detach().to(torch.promote_types(part.dtype, torch.float32))
        by_device.setdefault(part.device, []).append(wide.reshape(-1))
    return [torch.cat(parts) for parts in by_device.values()]
