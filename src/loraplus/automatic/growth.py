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
_AT_ONCE = 2**30  # numbers; a GPU multiplies no vectors of 2³¹


class Growth:
    """Watches the steps of some weights, and says how many times larger the next one is to be: `factor`.

    While it watches it keeps the last step, four bytes a weight. It stops for good once k has not moved for some time.

    Args:
        weights: gives A and B of all layers, (r, d_in), (d_out, r), …, as they are at that moment: FSDP2 puts others
            in their place.
        rule: its constants.
    """

    def __init__(self, weights: Callable[[], Sequence[nn.Parameter]], rule: Rule) -> None:
        self.factor = 1.0  # k
        self.has_changed = False  # at the last look
        self._weights = weights
        self._rule = rule
        self._mean = self._weight = 0.0  # of c; c̄ is their quotient
        self._looks = 0
        self._calm = 0.0
        self._kept: list[torch.Tensor] = []  # the weights before a step; once it is taken, what it took off them: −Δ
        self._moving: list[nn.Parameter] = []  # in the step that is being taken

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
        self.has_changed = False
        agreement = self._agreement(summed)
        if agreement is None:
            return
        self._mean = _REMEMBERED * self._mean + (1 - _REMEMBERED) * agreement
        self._weight = _REMEMBERED * self._weight + 1 - _REMEMBERED
        self._looks += 1
        before = self.factor
        if self._looks >= _FIRST:
            self.factor = self._rule.grown(self.factor, self._mean / self._weight, height)
        self.has_changed = self.factor != before
        self._calm = 0.0 if self.has_changed else self._calm + height

    def step_begins(self) -> None:
        """Keeps the weights as they are before the step."""
        self._kept = []  # first, so that its memory is there for what comes
        self._moving = self._trained() if self.is_watching else []
        self._kept = _flat(self._moving)

    def step_ends(self) -> None:
        """Keeps the step that was taken."""
        if self._moving:
            now = _flat(self._moving)
            fits = _are_alike(now, self._kept)
            pairs = zip(self._kept, now, strict=True) if fits else ()
            self._kept = [before.to(after.device).sub_(after) for before, after in pairs]  # in place, for memory
            self._moving = []

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint has to hold; of sharded weights without the last step, which no process has as a whole."""
        is_whole = not (self._moving or any(map(is_sharded, self._weights())))
        step = [part.to("cpu", copy=True) for part in self._kept] if is_whole else []
        numbers = {"factor": self.factor, "has_changed": self.has_changed, "mean": self._mean, "weight": self._weight}
        return {**numbers, "looks": self._looks, "calm": self._calm, "step": step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a checkpoint."""
        self.factor, self.has_changed = float(state["factor"]), bool(state["has_changed"])
        self._mean, self._weight = float(state["mean"]), float(state["weight"])
        self._looks, self._calm = int(state["looks"]), float(state["calm"])
        like = _flat(self._trained())
        self._kept, self._moving = [], []
        if _are_alike(state["step"], like):
            self._kept = [part.to(other, copy=True) for part, other in zip(state["step"], like, strict=True)]

    def __str__(self) -> str:
        """What is worth saying of it, if anything is."""
        return f"; grown {self.factor:.2g}-fold, as steps stopped short" if self.factor >= _SEEN else ""

    def _agreement(self, summed: Callable[[list[float]], list[float]]) -> float | None:
        """c of the last step; None if there was none, or what is there is no number."""
        if self._moving or not self._kept:
            return None
        weights = self._trained()
        gradients = _flat([torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in weights])
        if not _are_alike(gradients, self._kept):
            return None  # a factor was frozen since, or no longer is
        products = torch.zeros(3, dtype=torch.float64)
        for gradient, kept in zip(gradients, self._kept, strict=True):
            for g, step in zip(gradient.split(_AT_ONCE), kept.to(gradient).split(_AT_ONCE), strict=True):
                products += torch.stack([torch.dot(g, step), torch.dot(g, g), torch.dot(step, step)]).cpu()
        along, of_gradient, of_step = summed(products.tolist())
        size = math.sqrt(of_gradient) * math.sqrt(of_step) if min(of_gradient, of_step) >= 0 else math.nan
        return along / size if math.isfinite(along) and 0 < size < math.inf else None

    def _trained(self) -> list[nn.Parameter]:
        return [weight for weight in self._weights() if weight.requires_grad]


@torch.no_grad()
def _flat(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """All numbers that this process has of some tensors (…), copied: a vector (n,) a device, in 32 bits at least."""
    on_device: dict[torch.device, list[torch.Tensor]] = {}
    for tensor in tensors:
        part = local_part(tensor)
        on_device.setdefault(part.device, []).append(part.reshape(-1))
    vectors = [torch.cat(parts) for parts in on_device.values()]
    return [vector.to(torch.promote_types(vector.dtype, torch.float32)) for vector in vectors]


def _are_alike(some: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> bool:
    """Whether vectors (n,) come from the same number of weights."""
    return [vector.shape for vector in some] == [vector.shape for vector in others]
