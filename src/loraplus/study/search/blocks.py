"""A grid of half-decade steps of η_A and η_B, extended by blocks until the best pair lies inside.

A block is a rectangle of the grid, or a piece of its diagonal η_A = η_B; a run of the toy model trains one at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

REACH = 4
EXTENSION = 2
MOST_EXTENSIONS = 4

Point = tuple[int, int]
"""(a, b): η_A = 10^(a/2), η_B = 10^(b/2)."""
Losses = Mapping[Point, float]


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


@dataclass(frozen=True)
class BlockGrid:
    """One search around a centre."""

    centre: Point

    def next(self, losses: Mapping[Block, Losses]) -> list[Block]:
        """The blocks to train now: those to begin with, then what must be added.

        Args:
            losses: Of every block that has been trained: those of its points, over the seeds.

        Returns:
            First the rectangle around the centre, and the diagonal's piece with the same products η_A·η_B; then what
            must be added for the best pair to lie inside the rectangle, and the best tied rate inside the diagonal.
        """
        a, b = self.centre
        middle = round((a + b) / 2)
        rectangle = Block("grid", a - REACH, a + REACH, b - REACH, b + REACH)
        more = blocks = [rectangle, Block("diagonal", *((middle - REACH, middle + REACH) * 2))]
        while more:
            if missing := [block for block in blocks if block not in losses]:
                return missing
            points = {point: losses[block][point] for block in blocks for point in block.points}
            more = [*_wider(blocks, points), *_longer(blocks, points)]
            blocks = blocks + more
        return []


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


def best(losses: Losses, where: Callable[[Point], bool] = lambda point: True) -> Point:
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
