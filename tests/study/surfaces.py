"""Losses that behave like training, as functions of the rates and of the part of a full run that was trained.

A shorter run ends higher, its best rate is somewhat higher, and the loss rises more steeply above the best rate than
below it. Every run has its own noise, fixed by its rates.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from loraplus.study.search import Point


@dataclass(frozen=True)
class Surface:
    """Lowest at √(η_A·η_B) = 10**`rate` and λ = 4**`ratio`."""

    rate: float = -2.6
    ratio: float = 2.0
    steepness: float = 0.3
    """Relative loss a decade below the best rate."""
    skew: float = 3.0
    """How much steeper it is above."""
    ratio_matters: float = 0.02
    """Relative loss a factor of 4 from the best λ."""
    drift: float = 0.05
    """Decades by which the best rate is higher in a run of half the length."""
    tilt: float = 0.0
    """Decades by which the best rate rises when λ grows by a factor of 4."""
    cliff: float = math.inf
    """Decades above the best rate from which on runs diverge."""
    noise: float = 0.003
    seed: int = 0

    def loss(self, point: Point, part: float = 1.0, noise: float | None = None) -> float:
        halvings = -math.log2(part)
        y = math.log(point.lr_ratio, 4) - self.ratio
        x = math.log10(point.geometric_mean_lr) - self.rate - self.drift * halvings - self.tilt * y
        if x > self.cliff:
            return math.inf
        bend = self.steepness * (self.skew if x > 0 else 1) * x**2 / (1 + 0.3 * abs(x))
        luck = random.Random(f"{point}{part:.4f}{self.seed}").gauss(0, self.noise if noise is None else noise)
        return 0.4 * (1 + 0.1 * halvings) * (1 + bend + self.ratio_matters * y**2) * (1 + luck)

    def best_of_grid(self) -> float:
        """Lowest noiseless loss of an exhaustive grid: eight rates a decade, λ = 1, 4, 16, 64."""
        points = [Point.from_geometric_mean(10 ** (n / 8), 4.0**y) for n in range(-48, 0) for y in range(4)]
        return min(self.loss(point, noise=0) for point in points)
