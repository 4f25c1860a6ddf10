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
from typing import TYPE_CHECKING

from loraplus.errors import InvalidRateError, LoraPlusWarning
from loraplus.parts import EMBEDDINGS, Role

if TYPE_CHECKING:
    from loraplus.roles import TrainableParameter

DEFAULT_LR_RATIO = 16.0
"""The paper's rule of thumb, λ = 2⁴."""


ROLES_OF = {
    "lr_embedding": (EMBEDDINGS, "an embedding, its factors or its rows"),
    "lr_head": (frozenset({Role.HEAD}), "a head: modules_to_save, or an output layer that is unfrozen"),
    "lr_magnitude": (frozenset({Role.MAGNITUDE}), "a magnitude of DoRA"),
}


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


def _check_patterns(name: str, overrides: Mapping[str, float] | None) -> dict[str, float]:
    if not isinstance(overrides or {}, Mapping):
        raise InvalidRateError(f"{name} must map regular expressions to numbers, got {type(overrides).__name__}")
    checked = {}
    for pattern, value in (overrides or {}).items():
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            raise InvalidRateError(f"{name}: {pattern!r} is not a regular expression ({error})") from None
        checked[pattern] = _check_positive(f"{name}[{pattern!r}]", value)
    return checked


@dataclass(frozen=True)
class Rates:
    """The learning rates of one run, by role.

    η_A = lr, η_B = lr_ratio·lr; everything that is not a linear LoRA factor keeps lr unless told otherwise.

    Args:
        lr: η_A, in the optimizer's own unit.
        lr_ratio: λ = η_B / η_A; 1 is plain LoRA.
        lr_embedding: rate of both embedding factors, of trainable token rows and of whole embedding tables; and of what
            shares memory with one of them.
            Default: lr for all of them. An embedding's input is one-hot, so A's gradient does not grow with the width
            and the paper's argument for a larger B does not apply.
        lr_head: rate of `modules_to_save` and of output layers that are unfrozen. Default: lr.
        lr_magnitude: rate of DoRA's magnitude vectors. Default: lr.
        lr_overrides: {regular expression: factor}; every pattern found in a parameter's name multiplies its rate.
        lr_ratio_overrides: {regular expression: λ}; B factors whose name holds the pattern have this λ instead of
            lr_ratio, as in {"lora_unet": 16, "lora_te": 4}. No name may match two patterns.

    Raises:
        InvalidRateError: a rate, ratio or factor is not a positive finite number, or a pattern is not valid.
    """

    lr: float
    lr_ratio: float = DEFAULT_LR_RATIO
    lr_embedding: float | None = None
    lr_head: float | None = None
    lr_magnitude: float | None = None
    lr_overrides: Mapping[str, float] = field(default_factory=dict)
    lr_ratio_overrides: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("lr", "lr_ratio"):
            object.__setattr__(self, name, _check_positive(name, getattr(self, name)))
        for name in ("lr_embedding", "lr_head", "lr_magnitude"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _check_positive(name, getattr(self, name)))
        for name in ("lr_overrides", "lr_ratio_overrides"):
            object.__setattr__(self, name, _check_patterns(name, getattr(self, name)))
        for ratio in (self.lr_ratio, *self.lr_ratio_overrides.values()):
            if ratio < 1:
                warnings.warn(
                    f"lr_ratio = {ratio:g} is below 1: B learns more slowly than A, the opposite of LoRA+",
                    LoraPlusWarning,
                    stacklevel=3,
                )

    def ratio(self, name: str) -> float:
        """λ of the B factor of this name: `lr_ratio`, unless an override matches."""
        return next(
            (ratio for pattern, ratio in self.lr_ratio_overrides.items() if re.search(pattern, name)), self.lr_ratio
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
            Role.B: self.lr * self.ratio(name),
            Role.EMBEDDING_A: self.lr_embedding,
            Role.EMBEDDING_B: self.lr_embedding,
            Role.EMBEDDING: self.lr_embedding,
            Role.HEAD: self.lr_head,
            Role.MAGNITUDE: self.lr_magnitude,
        }.get(role)
        return (self.lr if own is None else own) * self.factor(name)

    def group_name(self, role: Role, name: str) -> str:
        """Name of the group for a parameter's rate: its role, and what overrides make of it.

        Example:
            >>> Rates(1e-4, lr_overrides={"value": 0.5}, lr_ratio_overrides={"lora_te": 4}).group_name(
            ...     Role.B, "lora_te_value.lora_up.weight")
            'lora_B_ratio4_x0.5'
        """
        found = role.value
        if role is Role.B and self.ratio(name) != self.lr_ratio:
            found += f"_ratio{self.ratio(name):g}"
        factor = self.factor(name)
        return found if factor == 1 else f"{found}_x{factor:g}"

    def check(self, parameters: Iterable[TrainableParameter]) -> None:
        """Refuses a setting that would be ignored in silence.

        Warns where a ratio reaches nothing, since it has a default.

        Raises:
            InvalidRateError: names the rate of a role that no parameter has; the pattern that matches no trainable
                parameter, or no B factor where it sets a ratio; or the two that set the ratio of one parameter.
        """
        entries = list(parameters)
        roles = {entry.role for entry in entries}
        unused = [
            f"{name} = {getattr(self, name):g} (nothing that trains is {what})"
            for name, (of, what) in ROLES_OF.items()
            if getattr(self, name) is not None and not roles & of
        ]
        if unused:
            raise InvalidRateError(
                f"a setting that reaches no parameter: {', '.join(unused)}; leave it out (what trains: "
                f"{', '.join(sorted(roles))})"
            )
        if self.lr_ratio != 1 and Role.B not in roles:
            warnings.warn(
                f"lr_ratio = {self.lr_ratio:g} reaches no parameter: no factor B of a linear layer trains "
                f"(what trains: {', '.join(sorted(roles))})",
                LoraPlusWarning,
                stacklevel=3,
            )
        for pattern in self.lr_overrides:
            if not any(re.search(pattern, entry.name) for entry in entries):
                raise InvalidRateError(
                    f"lr_overrides: {pattern!r} matches no trainable parameter; the names are like {entries[0].name}"
                )
        names = [entry.name for entry in entries if entry.role is Role.B]
        for pattern in self.lr_ratio_overrides:
            if not any(re.search(pattern, name) for name in names):
                raise InvalidRateError(
                    f"lr_ratio_overrides: {pattern!r} matches no B factor"
                    + (f"; the names are like {names[0]}" if names else ", and there is none")
                )
        for name in names:
            found = [pattern for pattern in self.lr_ratio_overrides if re.search(pattern, name)]
            if len(found) > 1:
                raise InvalidRateError(
                    f"lr_ratio_overrides: {found[0]!r} and {found[1]!r} both match {name}; make them exclude each other"
                )
