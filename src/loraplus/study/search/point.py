"""A pair of rates, and what all searches have in common."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from loraplus.errors import InvalidRateError

What = TypeVar("What")


class Search(Protocol[What]):
    """Proposes what to run: pairs of rates, such pairs with a length, or whole blocks of them."""

    def next(self, losses: Mapping[What, Any]) -> Sequence[What]:
        """What to run now, side by side if wanted; nothing once the search is over.

        Args:
            losses: Of all that has been run, in whatever order; infinite or NaN where it diverged.
        """
        ...


@dataclass(frozen=True)
class Point:
    """A pair of rates: `lr` = η_A and `lr_ratio` = λ = η_B / η_A."""

    lr: float
    lr_ratio: float

    @property
    def geometric_mean_lr(self) -> float:
        """√(η_A·η_B) = η_A·√λ."""
        return self.lr * math.sqrt(self.lr_ratio)

    @classmethod
    def from_geometric_mean(cls, geometric_mean_lr: float, lr_ratio: float) -> Point:
        """The point with √(η_A·η_B) and λ as given, each rounded to three digits so that it can serve as a key.

        Example:
            >>> Point.from_geometric_mean(1e-3, 16)
            Point(lr=0.00025, lr_ratio=16.0)
        """
        return cls(_three_digits(geometric_mean_lr / math.sqrt(lr_ratio)), _three_digits(lr_ratio))


def best_point(tried: Mapping[Point, float]) -> Point:
    """The point of the lowest loss; of equal losses (inf and NaN count as equal) that with the lowest rate.

    Raises:
        InvalidRateError: nothing has been tried.
    """
    if not tried:
        raise InvalidRateError("no point has been tried, so none of them is the best")
    return min(tried, key=lambda point: (finite(tried[point]), point.geometric_mean_lr, point.lr_ratio))


def finite(loss: float) -> float:
    """The loss for comparisons: NaN counts as infinite."""
    return math.inf if math.isnan(loss) else loss


def _three_digits(value: float) -> float:
    return float(f"{value:.3g}")
