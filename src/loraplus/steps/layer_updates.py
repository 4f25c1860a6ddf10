r"""What a step did to each adapted layer, relative to its output, and whether A or B is stuck.

A step changes the output of an adapted layer, y = W x + s·B A x, by three terms (Hayou et al., arXiv 2402.12354,
section 3):

    δ1 = s·B ΔA x    (A moves)      δ2 = s·ΔB A x    (B moves)      δ3 = s·ΔB ΔA x

Features are learned efficiently when δ1 and δ2 are of one order as the width grows. If one of them is much smaller
than the other, the factor behind it is stuck: it might as well be frozen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict, dataclass
from typing import Any, Literal

from loraplus.steps.movement import AdaptedLayer, Movement

STUCK_BELOW = 0.1
"""A factor counts as stuck if its δ is below this part of the other's."""


@dataclass(frozen=True)
class LayerUpdate:
    """One layer's δ1, δ2, δ3 as parts of its output's RMS, and which factor is stuck; one that is at rest is not."""

    name: str
    delta1: float
    delta2: float
    delta3: float
    stuck: Literal["A", "B"] | None

    @classmethod
    def from_movement(cls, entry: AdaptedLayer, moved: Movement, at_rest: Set[int] = frozenset()) -> LayerUpdate:
        """Relative to the layer's output.

        Args:
            entry: the layer.
            moved: what a step did to it.
            at_rest: ids of the parameters whose rate was 0 in that step. A rate of 0 tells nothing of λ.
        """
        a_trains, b_trains = (weight.requires_grad and id(weight) not in at_rest for weight in entry.weights)
        d1, d2, d3 = (value / max(moved.output, 1e-30) for value in (moved.delta1, moved.delta2, moved.delta3))
        stuck: Literal["A", "B"] | None = None
        if d1 < STUCK_BELOW * d2:
            stuck = "A" if a_trains else None
        elif d2 < STUCK_BELOW * d1:
            stuck = "B" if b_trains else None
        return cls(entry.name, d1, d2, d3, stuck)


@dataclass(frozen=True)
class FeatureUpdates:
    """δ1, δ2 and δ3 of every adapted layer; prints as a table with a diagnosis."""

    layers: tuple[LayerUpdate, ...]

    @classmethod
    def from_movements(
        cls, layers: Sequence[AdaptedLayer], moved: Mapping[str, Movement], at_rest: Set[int] = frozenset()
    ) -> FeatureUpdates:
        """Of the layers that were measured, by name; `at_rest` as in `LayerUpdate.from_movement`."""
        measured = [layer for layer in layers if layer.name in moved]
        return cls(tuple(LayerUpdate.from_movement(layer, moved[layer.name], at_rest) for layer in measured))

    @property
    def diagnosis(self) -> str:
        """The paper's efficiency condition in words; none where nothing moved, as at a rate of 0."""
        total = len(self.layers)
        if not any(layer.delta1 or layer.delta2 for layer in self.layers):
            return (
                f"neither A nor B moved in any of {total} layers, so nothing is concluded: is the rate 0 at this step?"
            )
        parts = []
        for factor, other, delta in (("A", "B", "delta1"), ("B", "A", "delta2")):
            count = sum(layer.stuck == factor for layer in self.layers)
            still = sum(getattr(layer, delta) == 0 and layer.stuck != factor for layer in self.layers)
            if still:
                parts.append(
                    f"{factor} does not move in {still} of {total} layers, where it is frozen or its rate is 0, so "
                    "nothing is concluded of it there"
                )
            if count:
                advice = "a smaller" if factor == "A" else "a larger"
                parts.append(
                    f"{factor} is stuck in {count} of {total} layers: it moves the output by less than "
                    f"{STUCK_BELOW:.0%} of what {other} does; {advice} lr_ratio brings it along"
                )
        return "; ".join(parts) or f"A and B both move the output in all {total} layers"

    def to_dict(self) -> dict[str, Any]:
        """{"diagnosis": …, "layers": {name: {delta1, delta2, delta3, stuck}}}."""
        rows = {}
        for layer in self.layers:
            fields = asdict(layer)
            rows[fields.pop("name")] = fields
        return {"diagnosis": self.diagnosis, "layers": rows}

    def logs(self) -> dict[str, float]:
        """Geometric means over the layers, under the names that training logs them by."""
        return {
            f"updates/{term}": _geometric_mean([getattr(layer, term) for layer in self.layers])
            for term in ("delta1", "delta2")
        }

    def __str__(self) -> str:
        width = max(len("layer"), *(len(layer.name) for layer in self.layers), 0)
        lines = [f"{'layer':{width}}  {'δ1 (A)':>9}  {'δ2 (B)':>9}  {'δ3':>9}  stuck"]
        lines += [
            f"{layer.name:{width}}  {layer.delta1:9.2e}  {layer.delta2:9.2e}  {layer.delta3:9.2e}  {layer.stuck or '–'}"
            for layer in self.layers
        ]
        return "\n".join([*lines, self.diagnosis])


def _geometric_mean(values: list[float]) -> float:
    if not values or min(values) <= 0:
        return 0.0
    return math.exp(sum(map(math.log, values)) / len(values))
