"""The fields of `Rates` in other forms: as keywords of a function, and as fields of a dataclass that flags are made of.

So a field that is added to `Rates` is a keyword, a training argument and a flag at once.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
from collections.abc import Callable, Collection
from dataclasses import field
from typing import Any, TypeVar

from loraplus.errors import InvalidRateError, TrainerSetupError
from loraplus.rates import SETTINGS, Rates

Result = TypeVar("Result")


def takes_rates(
    *in_place: str,
    needed: Collection[str] = (),
    left_out: Collection[str] = (),
    prefix: str = "",
    optional: bool = False,
) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """Has a function with a keyword `rates` take a `Rates` anywhere among its arguments, or the fields as keywords.

    Args:
        in_place: keywords that may be given by position, after what the function itself needs.
        needed: keywords without a default.
        left_out: fields of `Rates` that are no keywords.
        prefix: of all keywords but `lr`.
        optional: `rates` is None where none of them is given, which differs from giving the defaults.

    Example:
        >>> @takes_rates("lr", needed=["lr"])
        ... def rate_of_b(*, rates):
        ...     return rates.lr_a * rates.lr_ratio
        >>> rate_of_b(1e-3), rate_of_b(lr=1e-3, lr_ratio=2), rate_of_b(Rates(1e-3, 4)), rate_of_b(rates=Rates(1e-3, 8))
        (0.016, 0.002, 0.004, 0.008)
    """
    keyword_of = {name: name if name == "lr" else prefix + name for name in SETTINGS if name not in left_out}

    def decorate(function: Callable[..., Result]) -> Callable[..., Result]:
        signature = _signature(function, keyword_of, in_place, needed)

        @functools.wraps(function)
        def with_rates(*args: object, **given: Any) -> Result:
            rates = [value for value in args if isinstance(value, Rates)]
            if isinstance(given.get("rates"), Rates):
                rates.append(given.pop("rates"))
            if rates:
                twice = [name for name in keyword_of.values() if name in given] or ["rates"] * (len(rates) - 1)
                if twice:
                    raise InvalidRateError(f"{twice[0]} is given beside a Rates; give the rates once")
                return function(*(value for value in args if not isinstance(value, Rates)), rates=rates[0], **given)
            try:
                bound = signature.bind(*args, **given)
            except TypeError as error:
                raise TypeError(f"{function.__name__}() {error}") from None
            fields = {name: bound.arguments.pop(key) for name, key in keyword_of.items() if key in bound.arguments}
            return function(*bound.args, **bound.kwargs, rates=Rates(**fields) if fields or not optional else None)

        with_rates.__signature__ = signature  # type: ignore[attr-defined]
        return with_rates

    return decorate


def _signature(
    function: Callable[..., Any], keyword_of: dict[str, str], in_place: Collection[str], needed: Collection[str]
) -> inspect.Signature:
    """What the function takes, with the fields of `Rates` in the place of its keyword `rates`."""
    own = inspect.signature(function)
    parameters = [parameter for name, parameter in own.parameters.items() if name != "rates"]
    by_place = [each for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD]
    first_default = next((i for i, each in enumerate(by_place) if each.default is not each.empty), len(by_place))
    kinds = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    made = {
        name: inspect.Parameter(
            key,
            kinds[key not in in_place],
            default=inspect.Parameter.empty if key in needed else _default(name),
            annotation=SETTINGS[name].type,
        )
        for name, key in keyword_of.items()
    }
    front = [made.pop(name) for name, key in keyword_of.items() if key in in_place]
    rest = parameters[len(by_place) :]
    ordered = [*by_place[:first_default], *front, *by_place[first_default:], *made.values()]
    return own.replace(parameters=[*ordered, *rest])


def _default(name: str) -> Any:
    setting = SETTINGS[name]
    return None if setting.default is dataclasses.MISSING else setting.default  # for a dict, which is none's to change


def rate_fields(
    *, sets_ratio: bool | None = None, prefix: str = "", overrides: object = dict[str, float] | str | None
) -> list[tuple[str, Any, Any]]:
    """(name, type, field) of each setting but lr, for `dataclasses.make_dataclass`.

    Args:
        sets_ratio: only the settings that set a ratio, or only those that do not.
        prefix: of the names.
        overrides: type of the settings that map names to numbers.
    """
    made = []
    for name in _names(sets_ratio):
        setting, default = SETTINGS[name], _default(name)
        kind = overrides if "by_name" in setting.metadata else float | None if default is None else float
        made.append((prefix + name, kind, field(default=default, metadata={"help": setting.metadata["help"]})))
    return made


def _names(sets_ratio: bool | None) -> list[str]:
    return [
        name
        for name, setting in SETTINGS.items()
        if name != "lr" and sets_ratio in (None, setting.metadata.get("sets_ratio", False))
    ]


def fields_of(rates: Rates, *, sets_ratio: bool | None = None, prefix: str = "") -> dict[str, Any]:
    """{name: value} of each setting but lr, as `rate_fields` names them."""
    return {prefix + name: getattr(rates, name) for name in _names(sets_ratio)}


def rates_from(settings: object, lr: float | str | None = None, *, prefix: str = "") -> Rates:
    """The `Rates` that an object with `rate_fields` asks for; fields that it does not have keep their defaults.

    Raises:
        InvalidRateError: a value cannot be used.
        TrainerSetupError: overrides that are neither a dict nor JSON of one.
    """
    given = {name: getattr(settings, prefix + name, None) for name in SETTINGS if name != "lr"}
    for name in [name for name in given if "by_name" in SETTINGS[name].metadata]:
        given[name] = overrides_from(prefix + name, given[name])
    return Rates(lr, **{name: value for name, value in given.items() if value is not None})


def overrides_from(name: str, value: dict[str, float] | str | None) -> dict[str, float] | None:
    """A setting that maps regular expressions to numbers, from a dict or from JSON text.

    Args:
        name: of the setting, for the error.
        value: as it was given.

    Raises:
        TrainerSetupError: it is neither.
    """
    mapping: Any = value
    if isinstance(value, str):
        try:
            mapping = json.loads(value)
        except json.JSONDecodeError as error:
            raise TrainerSetupError(f"{name} is not JSON: {error}") from None
    if mapping is not None and not isinstance(mapping, dict):
        raise TrainerSetupError(
            f'{name} must map regular expressions to numbers, as in {{"value": 0.5}}; got {value!r}'
        )
    return mapping
