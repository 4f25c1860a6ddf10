"""Role → learning rate.

LoRA+ (Hayou et al., arXiv 2402.12354, section 4): η_A = lr and η_B = λ·lr. With Adam, A's features stay stable at
η_A = Θ(1/n) in the width n while B needs η_B = Θ(1), so one tied rate is wrong for one of them.

`Rates` is the only place where the settings are declared. Keywords of functions, training arguments and command-line
flags are made from its fields (`rate_keywords`).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from loraplus.errors import InvalidRateError
from loraplus.notices import tell, told_once
from loraplus.parts import EMBEDDINGS, Role

if TYPE_CHECKING:
    from loraplus.roles import TrainableParameter

DEFAULT_LR_RATIO = 16.0
"""The paper's rule of thumb, λ = 2⁴."""


class Default(float):
    """A number that stands where none was given, told from the same number that somebody asked for.

    Example:
        >>> Rates(lr_ratio=16) == Rates(), Rates(lr_ratio=16).is_given, Rates().is_given
        (True, True, False)
    """


AUTO = "auto"
"""Instead of a number for `lr`: `AutoRates` sets η_A and η_B."""

# PEFT's examples train classifiers at about 3e-4. With automatic rates, norms, magnitudes and embeddings learn at this
# rate, which hurts none of them.
DEFAULT_LR = 3e-4
# A new head starts from nothing and learns at its own pace, the same whatever the adapter's rates are: otherwise a
# search over η_A and λ would be a search over the head's rate, too.
DEFAULT_LR_HEAD = 2e-3


def as_number(name: str, value: Any) -> float:
    """`value` as a float. Raises InvalidRateError if it is no number; True and False are none."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return float(value)
    except (TypeError, ValueError):
        raise InvalidRateError(f"{name} must be a number, got {value!r}") from None


def _check_positive(name: str, value: object) -> float:
    number = as_number(name, value)
    if not math.isfinite(number) or number <= 0:
        raise InvalidRateError(f"{name} must be a positive, finite number, got {value!r}")
    return number


def _check_lr(name: str, value: object) -> float | str | None:
    if value is None or (isinstance(value, str) and value == AUTO):
        return value
    try:
        return _check_positive(name, value)
    except InvalidRateError:
        if isinstance(value, str):
            raise InvalidRateError(f'{name} must be a positive number or "{AUTO}", got {value!r}') from None
        raise


def _check_ratio(name: str, value: object) -> float:
    return value if isinstance(value, Default) else _check_positive(name, value)


def _check_own_rate(name: str, value: object) -> float | None:
    return None if value is None else _check_positive(name, value)


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


def _ratio(help: str) -> Any:
    return field(default=Default(DEFAULT_LR_RATIO), metadata={"help": help, "check": _check_ratio, "sets_ratio": True})


def _rate_of(roles: frozenset[Role], what: str, help: str) -> Any:
    """A rate of its own for some roles; `what` says in an error which parameters have them."""
    return field(default=None, metadata={"help": help, "check": _check_own_rate, "roles": roles, "what": what})


def _by_name(help: str, *, sets_ratio: bool = False) -> Any:
    metadata = {"help": help, "check": _check_patterns, "by_name": True, "sets_ratio": sets_ratio}
    return field(default_factory=dict, metadata=metadata)


@dataclass(frozen=True)
class Rates:
    """The learning rates of one run, by role.

    η_A = lr, η_B = lr_ratio·lr; everything that is not a linear LoRA factor keeps lr unless told otherwise.

    Args:
        lr: η_A, in the optimizer's own unit. None where there is one already: `attach` takes the trainer's, `verify`
            the optimizer's. "auto" in `attach` and `create_optimizer`: `AutoRates` sets η_A and η_B.
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

    Example:
        >>> Rates(lr=2e-4, lr_ratio=16).of(Role.B)
        0.0032
    """

    tensor: ClassVar[Any] = None
    """The rate that was given as a tensor, if one was. Every group then gets its rate in a tensor like it."""

    lr: float | str | None = field(default=None, metadata={"help": "η_A, the rate of A.", "check": _check_lr})
    lr_ratio: float = _ratio("λ = η_B / η_A; 1 is plain LoRA.")
    lr_embedding: float | None = _rate_of(
        EMBEDDINGS, "an embedding, its factors or its rows", "Rate of embedding factors and rows. Default: lr."
    )
    lr_head: float | None = _rate_of(
        frozenset({Role.HEAD}),
        "a head: modules_to_save, or an output layer that is unfrozen",
        "Rate of the head (modules_to_save). Default: lr.",
    )
    lr_magnitude: float | None = _rate_of(
        frozenset({Role.MAGNITUDE}), "a magnitude of DoRA", "Rate of DoRA's magnitudes. Default: lr."
    )
    lr_overrides: Mapping[str, float] = _by_name("{regular expression: factor} on parameter names, as JSON.")
    lr_ratio_overrides: Mapping[str, float] = _by_name(
        "{regular expression: λ} on names of B factors, as JSON.", sets_ratio=True
    )

    def __post_init__(self) -> None:
        given = vars(self).values()
        tensor = next((value for value in given if hasattr(value, "untyped_storage")), None)  # torch is not needed here
        object.__setattr__(self, "tensor", tensor)
        for each in dataclasses.fields(self):
            object.__setattr__(self, each.name, each.metadata["check"](each.name, getattr(self, each.name)))
        for ratio in (self.lr_ratio, *self.lr_ratio_overrides.values()):
            if ratio < 1:
                tell(f"lr_ratio = {ratio:g} is below 1: B learns more slowly than A, the opposite of LoRA+")

    @property
    def lr_a(self) -> float:
        """η_A as a number.

        Raises:
            InvalidRateError: lr was left to a trainer, or to automatic rates.
        """
        return as_number("lr", self.lr)

    @property
    def auto(self) -> bool:
        """Whether `AutoRates` is to set η_A and η_B."""
        return self.lr == AUTO

    @property
    def given_ratio(self) -> str | None:
        """The setting that gives a ratio; None where it is left to its default, or to automatic rates."""
        if not isinstance(self.lr_ratio, Default):
            return "lr_ratio"
        return "lr_ratio_overrides" if self.lr_ratio_overrides else None

    @property
    def is_given(self) -> bool:
        """Whether anything was asked for, be it what is the default."""
        return self.given_ratio is not None or self != Rates()

    def at(self, lr: float) -> Rates:
        """The same with another η_A."""
        with told_once(silent=True):  # a low ratio was warned of when this was made
            return dataclasses.replace(self, lr=lr)

    def resolved(self, lr: float) -> Rates:
        """What an optimizer is built with where lr is left to a trainer, which is at this one, or to automatic rates.

        With automatic rates A and B are built at that lr, too: `AutoRates` replaces their rates, and looks at nothing
        but what the schedule makes of them. All other parameters really learn at it.

        Raises:
            InvalidRateError: a ratio beside automatic rates.
        """
        if not self.auto:
            return dataclasses.replace(self, lr=lr if self.lr is None else self.lr)
        if self.given_ratio is not None:
            raise InvalidRateError(
                f"{self.given_ratio} is not used with automatic rates, which set the ratio; leave it out, or give lr "
                "as a number"
            )
        return dataclasses.replace(self, lr=lr, lr_ratio=1.0)

    def beside_automatic(self, roles: Collection[Role]) -> Rates:
        """What an optimizer is built with where A and B are set automatically and no trainer has a rate for the others.

        A head learns at 2e-3, all else that is no factor at 3e-4, unless it has a rate of its own.

        Args:
            roles: of all that trains.

        Raises:
            InvalidRateError: a ratio beside automatic rates.
        """
        head = DEFAULT_LR_HEAD if self.lr_head is None and Role.HEAD in roles else self.lr_head
        return dataclasses.replace(self, lr_head=head).resolved(DEFAULT_LR)

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
        setting = SETTING_OF_ROLE.get(role)
        own = None if setting is None else getattr(self, setting)
        if role is Role.B:
            own = self.lr_a * self.ratio(name)
        return (self.lr_a if own is None else own) * self.factor(name)

    def own_rates(self) -> dict[str, float]:
        """{setting: rate} of the settings that were given and are rates themselves, not multiples of one."""
        rates = {name: getattr(self, name) for name in ("lr", *OWN_RATES)}
        return {name: rate for name, rate in rates.items() if rate not in (None, AUTO)}

    def group_name(self, role: Role, name: str) -> str:
        """Name of the group for a parameter's rate: its role, and what overrides make of it.

        Example:
            >>> Rates(1e-4, lr_overrides={"value": 0.5}, lr_ratio_overrides={"lora_te": 4}).group_name(
            ...     Role.B, "lora_te_value.lora_up.weight")
            'lora_B_ratio4_x0.5'
        """
        group = role.value
        if role is Role.B and self.ratio(name) != self.lr_ratio:
            group += f"_ratio{self.ratio(name):g}"
        factor = self.factor(name)
        return group if factor == 1 else f"{group}_x{factor:g}"

    def check(self, parameters: Iterable[TrainableParameter]) -> None:
        """Refuses a setting that would change nothing, and two that set the ratio of one parameter.

        Warns where lr_ratio itself reaches nothing: it has a default, so it may not have been asked for.

        Raises:
            InvalidRateError: names the rate of a role that no parameter has; the pattern that matches no trainable
                parameter, or no B factor where it sets a ratio; or the two that set the ratio of one parameter.
        """
        entries = list(parameters)
        roles = {entry.role for entry in entries}
        unused = [
            f"{name} = {getattr(self, name):g} (nothing that trains is {setting.metadata['what']})"
            for name, setting in OWN_RATES.items()
            if getattr(self, name) is not None and not roles & setting.metadata["roles"]
        ]
        if unused:
            raise InvalidRateError(
                f"a setting that reaches no parameter: {', '.join(unused)}; leave it out (what trains: "
                f"{', '.join(sorted(roles))})"
            )
        if self.lr_ratio != 1 and Role.B not in roles:
            tell(
                f"lr_ratio = {self.lr_ratio:g} reaches no parameter: no factor B of a linear layer trains "
                f"(what trains: {', '.join(sorted(roles))})"
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
            matching = [pattern for pattern in self.lr_ratio_overrides if re.search(pattern, name)]
            if len(matching) > 1:
                raise InvalidRateError(
                    f"lr_ratio_overrides: {matching[0]!r} and {matching[1]!r} both match {name}; "
                    "make them exclude each other"
                )


SETTINGS = {each.name: each for each in dataclasses.fields(Rates)}
OWN_RATES = {name: each for name, each in SETTINGS.items() if "roles" in each.metadata}
"""The settings that are the rate of some roles, whatever lr is."""
SETTING_OF_ROLE = {role: name for role in Role for name, each in OWN_RATES.items() if role in each.metadata["roles"]}
