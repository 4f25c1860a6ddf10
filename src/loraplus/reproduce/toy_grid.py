"""The grid of the toy model: half-decade steps of η_A and η_B, extended until the best pair lies inside.

A block is a rectangle of the grid, or a piece of its diagonal η_A = η_B; a run trains one block at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from loraplus.reproduce.toy_model import Optimizer

REACH = 4
EXTENSION = 2
MOST_EXTENSIONS = 4

Point = tuple[int, int]
"""(a, b): η_A = 10^(a/2), η_B = 10^(b/2)."""
Losses = Mapping[Point, float]


@dataclass(frozen=True)
class Family:
    """Networks of all widths with one optimizer and one size of W_out.

    Args:
        optimizer: adam or sgd.
        readout: `standard` for W_out of variance 1/n, `small` for entries of order 1/n.
        title: In words.
        start: Where the search starts at width 64.
        exponents: Of the best η_A and η_B in n, as the theory has them (`toy.py`).
    """

    optimizer: Optimizer
    readout: str
    title: str
    start: Point
    exponents: tuple[float, float]

    @property
    def readout_power(self) -> float:
        """c of W_out = Θ(n^−c)."""
        return 0.5 if self.readout == "standard" else 1.0

    def centre(self, width: int) -> Point:
        """Where the search starts: along the theory's slopes. It may end anywhere."""
        growth = 2 * math.log10(width / 64)
        a, b = (round(at + growth * power) for at, power in zip(self.start, self.exponents, strict=True))
        return a, b


FAMILIES = (
    Family("adam", "small", "Adam, W_out of order 1/n", (-2, -1), (-1.0, 0.0)),
    Family("adam", "standard", "Adam, W_out of variance 1/n", (-3, -2), (-1.0, -0.5)),
    Family("sgd", "small", "SGD, W_out of order 1/n", (-2, 4), (-1.0, 1.0)),
    Family("sgd", "standard", "SGD, W_out of variance 1/n", (-1, 1), (-1.0, 0.0)),
)


@dataclass(frozen=True)
class Block:
    """Points to train at once, both ends included; of a diagonal, a and b have the same ends."""

    shape: str
    a_from: int
    a_to: int
    b_from: int
    b_to: int

    @property
    def points(self) -> list[Point]:
        """In rows of equal b."""
        if self.shape == "diagonal":
            return [(k, k) for k in range(self.a_from, self.a_to + 1)]
        return [(a, b) for b in range(self.b_from, self.b_to + 1) for a in range(self.a_from, self.a_to + 1)]


def first_blocks(centre: Point) -> list[Block]:
    """The rectangle around the centre, and the diagonal's piece with the same products η_A·η_B."""
    a, b = centre
    middle = round((a + b) / 2)
    return [
        Block("grid", a - REACH, a + REACH, b - REACH, b + REACH),
        Block("diagonal", *((middle - REACH, middle + REACH) * 2)),
    ]


def extensions(blocks: list[Block], losses: Losses) -> list[Block]:
    """What must be added for the best pair to lie inside the rectangle, and the best tied rate inside the diagonal.

    Args:
        blocks: All so far.
        losses: Of all their points, over the seeds.
    """
    return [*_wider(blocks, losses), *_longer(blocks, losses)]


def _wider(blocks: list[Block], losses: Losses) -> list[Block]:
    rectangles = [block for block in blocks if block.shape == "grid"]
    if len(rectangles) > MOST_EXTENSIONS:
        return []
    low_a, high_a, low_b, high_b = _ends(rectangles)
    a, b = best(losses, lambda p: low_a <= p[0] <= high_a and low_b <= p[1] <= high_b)
    if a in (low_a, high_a):
        ends = (low_a - EXTENSION, low_a - 1) if a == low_a else (high_a + 1, high_a + EXTENSION)
        return [Block("grid", *ends, low_b, high_b)]
    if b in (low_b, high_b):
        ends = (low_b - EXTENSION, low_b - 1) if b == low_b else (high_b + 1, high_b + EXTENSION)
        return [Block("grid", low_a, high_a, *ends)]
    return []


def _longer(blocks: list[Block], losses: Losses) -> list[Block]:
    pieces = [block for block in blocks if block.shape == "diagonal"]
    if len(pieces) > MOST_EXTENSIONS:
        return []
    low, high, _, _ = _ends(pieces)
    k, _ = best(losses, lambda p: p[0] == p[1] and low <= p[0] <= high)
    if k == low:
        return [Block("diagonal", *((low - EXTENSION, low - 1) * 2))]
    return [Block("diagonal", *((high + 1, high + EXTENSION) * 2))] if k == high else []


def _ends(blocks: list[Block]) -> tuple[int, int, int, int]:
    return (
        min(block.a_from for block in blocks),
        max(block.a_to for block in blocks),
        min(block.b_from for block in blocks),
        max(block.b_to for block in blocks),
    )


def best(losses: Losses, where=lambda point: True) -> Point:  # type: ignore[no-untyped-def]
    """The point with the lowest loss; of equals the lowest rates."""
    return min((point for point in losses if where(point)), key=lambda point: (losses[point], point))


def good_region(losses: Losses, within: float) -> list[Point]:
    """All points whose loss is at most `within` times the lowest."""
    lowest = min(losses.values())
    return [point for point, loss in losses.items() if loss <= within * lowest]


def centre_of(points: list[Point]) -> tuple[float, float]:
    """Mean decimal logarithms of η_A and η_B."""
    return sum(a for a, _ in points) / len(points) / 2, sum(b for _, b in points) / len(points) / 2


def rates(point: Point) -> tuple[float, float]:
    """η_A and η_B of a point."""
    return 10 ** (point[0] / 2), 10 ** (point[1] / 2)
