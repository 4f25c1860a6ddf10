"""Role → learning rate.

LoRA+ (Hayou et al., arXiv 2402.12354, section 4): η_A = lr and η_B = λ·lr. With Adam, A's features stay stable at
η_A = Θ(1/n) in the width n while B needs η_B = Θ(1), so one tied rate is wrong for one of them.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from loraplus.errors import InvalidRateError, LoraPlusWarning
from loraplus.roles import Role

DEFAULT_LR_RATIO = 16.0
"""The paper's rule of thumb, λ = 2⁴."""


def as_number(name: str, value: float) -> float:
    """`value` as a float. Raises InvalidRateError if it is no number; True and False are none."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return float(value)
    except (TypeError, ValueError):
        raise InvalidRateError(f"{name} must be a number, got {value!r}") from None


def _check_positive(name: str, value: float) -> float:
    number = as_number(name, value)
    if not math.isfinite(number) or number <= 0:
        raise InvalidRateError(f"{name} must be a positive, finite number, got {value!r}")
    return number


@dataclass(frozen=True)
class Rates:
    """The learning rates of one run, by role.

    η_A = lr, η_B = lr_ratio·lr; everything that is not a linear LoRA factor keeps lr unless told otherwise.

    Args:
        lr: η_A, in the optimizer's own unit.
        lr_ratio: λ = η_B / η_A; 1 is plain LoRA.
        lr_embedding: rate of both embedding factors, of trainable token rows and of whole embedding tables.
            Default: lr for all of them. An embedding's input is one-hot, so A's gradient does not grow with the width
            and the paper's argument for a larger B does not apply.
        lr_head: rate of `modules_to_save`. Default: lr.
        lr_magnitude: rate of DoRA's magnitude vectors. Default: lr.
        lr_overrides: {regular expression: factor}; every pattern found in a parameter's name multiplies its rate.

    Raises:
        InvalidRateError: a rate, ratio or factor is not a positive finite number, or a pattern is not valid.
    """

    lr: float
    lr_ratio: float = DEFAULT_LR_RATIO
    lr_embedding: float | None = None
    lr_head: float | None = None
    lr_magnitude: float | None = None
    lr_overrides: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("lr", "lr_ratio"):
            object.__setattr__(self, name, _check_positive(name, getattr(self, name)))
        for name in ("lr_embedding", "lr_head", "lr_magnitude"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _check_positive(name, getattr(self, name)))
        overrides = {}
        if not isinstance(self.lr_overrides or {}, Mapping):
            raise InvalidRateError(
                f"lr_overrides must map regular expressions to factors, got {type(self.lr_overrides).__name__}"
            )
        for pattern, factor in (self.lr_overrides or {}).items():
            try:
                re.compile(pattern)
            except re.error as error:
                raise InvalidRateError(f"lr_overrides: {pattern!r} is not a regular expression ({error})") from None
            overrides[pattern] = _check_positive(f"lr_overrides[{pattern!r}]", factor)
        object.__setattr__(self, "lr_overrides", overrides)
        if self.lr_ratio < 1:
            warnings.warn(
                f"lr_ratio = {self.lr_ratio:g} is below 1: B learns more slowly than A, the opposite of LoRA+",
                LoraPlusWarning,
                stacklevel=3,
            )

    def factor(self, name: str) -> float:
        """Product of the overrides whose pattern occurs in the parameter's name."""
        return math.prod(factor for pattern, factor in self.lr_overrides.items() if re.search(pattern, name))

    def of(self, role: Role, name: str = "") -> float:
        """The learning rate of a parameter.

        Example:
            >>> Rates(lr=2e-4, lr_ratio=16).of(Role.B)
            0.0032
        """
        own = {
            Role.B: self.lr * self.lr_ratio,
            Role.EMBEDDING_A: self.lr_embedding,
            Role.EMBEDDING_B: self.lr_embedding,
            Role.EMBEDDING: self.lr_embedding,
            Role.HEAD: self.lr_head,
            Role.MAGNITUDE: self.lr_magnitude,
        }.get(role)
        return (self.lr if own is None else own) * self.factor(name)

    def check_overrides(self, names: Iterable[str]) -> None:
        """Refuses a pattern that matches no trainable parameter: it would be ignored in silence.

        Raises:
            InvalidRateError: names the pattern.
        """
        names = list(names)
        for pattern in self.lr_overrides:
            if not any(re.search(pattern, name) for name in names):
                raise InvalidRateError(
                    f"lr_overrides: {pattern!r} matches no trainable parameter; the names are like {names[0]}"
                )
