"""JSON and YAML text of unknown origin: read within limits, every defect a `ParseError` of one line.

Such text may be nested deeper than Python's calls go, hold numbers that take minutes to read, or grow from a few lines
to gigabytes by references.
"""

from __future__ import annotations

import json
from typing import Any

import yaml

MOST_VALUES = 10_000_000  # in one text: a value of two characters takes a hundred bytes of memory
DEEPEST = 100  # brackets within brackets; data and settings have ten at most
LONGEST_YAML = 2**16
_DEEPEST_YAML = 20
_DEEP_JSON = f"JSON that is nested too deeply (over {DEEPEST})"
_LONGEST_NUMBER = 100
_NULL, _INT, _FLOAT, _TIMESTAMP = (f"tag:yaml.org,2002:{kind}" for kind in ("null", "int", "float", "timestamp"))


class ParseError(ValueError):
    """What is wrong with a text, and in which line (from 1) if that is known."""

    def __init__(self, what: str, line: int | None = None) -> None:
        super().__init__(what)
        self.line = line


def parse_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ParseError: it is no JSON, nested more than `DEEPEST` deep, holds more than `MOST_VALUES` values, or a number of
            thousands of digits.

    Example:
        >>> parse_json("[" * 101 + "]" * 101)
        Traceback (most recent call last):
        loraplus.files.parsing.ParseError: JSON that is nested too deeply (over 100)
    """
    inside = values_in(text)
    if inside > MOST_VALUES:
        raise ParseError(f"JSON that holds more than {MOST_VALUES:,} values")
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ParseError(f"not valid JSON ({error.msg})", error.lineno) from None
    except RecursionError:
        raise ParseError(_DEEP_JSON) from None
    except ValueError:
        raise ParseError("JSON that holds too long a number") from None
    if inside > DEEPEST and is_deep(value):
        raise ParseError(_DEEP_JSON)
    return value


def values_in(text: str) -> int:
    """An upper bound on the values in a JSON text, however they are nested."""
    return 1 + sum(map(text.count, "[{,"))


def is_deep(value: object, most: int = DEEPEST) -> bool:
    """Whether lists and mappings are nested more than so deep.

    Example:
        >>> is_deep({"a": [1]}, most=2), is_deep({"a": [[1]]}, most=2)
        (False, True)
    """
    level = [value] if isinstance(value, (list, tuple, dict)) else []
    for _ in range(most):
        inside = (inner for outer in level for inner in (outer.values() if isinstance(outer, dict) else outer))
        level = [inner for inner in inside if isinstance(inner, (list, tuple, dict))]
    return bool(level)


def parse_yaml(text: str, *, as_text: bool = False) -> Any:
    """The value of a YAML text without references and tags.

    Args:
        text: of a configuration, so of at most `LONGEST_YAML` characters.
        as_text: leave every value but null the text that it is written as, instead of guessing numbers and booleans.

    Raises:
        ParseError: it is no YAML, or more than a configuration needs.

    Example:
        >>> parse_yaml("lr: 1e-4\\nbf16: yes", as_text=True)
        {'lr': '1e-4', 'bf16': 'yes'}
    """
    if len(text) > LONGEST_YAML:
        raise ParseError(f"longer than {LONGEST_YAML} characters, so no configuration")
    try:
        return yaml.load(text, _Text if as_text else _Plain)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        reason = getattr(error, "problem", None) or str(error).strip().partition("\n")[0]
        raise ParseError(f"not valid YAML ({reason})", mark.line + 1 if mark else None) from None
    except ParseError:
        raise
    except (ValueError, TypeError, OverflowError) as error:  # of numbers that are none
        raise ParseError(f"not usable YAML ({str(error).partition(';')[0]})") from None


class _Plain(yaml.SafeLoader):
    """Neither references, which grow, nor tags, nor dates, which no setting is."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent):
            raise ParseError(f"references (*{event.anchor}) are not taken; write the value out", line)
        if getattr(event, "tag", None) is not None:
            raise ParseError(f"tags ({event.tag}) are not taken; write the value alone", line)
        if self.depth == _DEEPEST_YAML:
            raise ParseError(f"nested more than {_DEEPEST_YAML} deep", line)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_number(self, node: Any) -> Any:
        if len(node.value) > _LONGEST_NUMBER:
            raise ParseError(f"a number of {len(node.value)} characters", node.start_mark.line + 1)
        return self.construct_yaml_int(node) if node.tag == _INT else self.construct_yaml_float(node)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise ParseError("a key is a list or a mapping, expected a word", key.start_mark.line + 1)
            if key.value in seen:
                raise ParseError(f"{key.value} is given twice", key.start_mark.line + 1)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _resolvers(keep: Any) -> dict[Any, Any]:
    resolvers = yaml.SafeLoader.yaml_implicit_resolvers.items()
    return {first: [(tag, pattern) for tag, pattern in tags if keep(tag)] for first, tags in resolvers}


for _tag in (_INT, _FLOAT):
    _Plain.add_constructor(_tag, _Plain.construct_number)
_Plain.yaml_implicit_resolvers = _resolvers(lambda tag: tag != _TIMESTAMP)


class _Text(_Plain):
    """Every value but null as it is written."""

    yaml_implicit_resolvers = _resolvers(lambda tag: tag == _NULL)
